//! Peers: nodes of the same tier ask one another for bytes that are on their way.
//!
//! `docs/formats/peers.md` has the protocol. Everything here is help that may fail: a daemon whose
//! address cannot be bound, or whose tier gives it no key, serves its mounts all the same.
//!
//! * [`Peering`]: what a daemon knows: its own address, the keys of its tiers.
//! * [`serve`]: answers. * [`HttpPeers`]: asks.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path as UrlPath, Query, State};
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::routing::get;
use bytes::{Bytes, BytesMut};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::format::ids::{PackId, TierId};
use crate::store::fetch::{Given, Peers};
use crate::store::tier::{PeerKey, Tier};

use super::daemon::{Daemon, OpenTier, blocking};

/// The first line of what a token digests.
const PROTOCOL: &str = "larder peers 1";
const NONCE: &str = "larder-nonce";
/// No answer is longer: a reader asks for units of at most 256 KiB.
const RANGE_BYTES_MAX: u64 = 1 << 20;
const CONNECTIONS_MAX: usize = 128;
const REQUESTS_MAX: usize = 64;
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
const HEAD_BYTES_MAX: usize = 16 << 10;
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(600);
const WAIT_MAX: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// What the way there and back may take of a reader's patience.
const WAY: Duration = Duration::from_millis(100);

/// What a daemon needs to answer other nodes.
#[derive(Debug)]
pub(super) struct Peering {
    /// As the others are told.
    address: String,
    keys: Mutex<HashMap<TierId, PeerKey>>,
    requests: Semaphore,
}

impl Daemon {
    /// Listens where the configuration says, and answers until the daemon stops. What goes wrong is
    /// logged: mounts do not depend on it.
    pub async fn answer_peers(&self) {
        let Some(listen) = self.config().daemon.peer_listen.clone() else {
            return;
        };
        let bound = match TcpListener::bind(&listen).await {
            Ok(bound) => bound,
            Err(error) => {
                tracing::warn!(listen, %error, "cannot listen to other nodes; they take what they need from the tier");
                return;
            }
        };
        let own = bound.local_addr().map_or(listen, |address| address.to_string());
        let address = self.config().daemon.peer_address.clone().unwrap_or(own);
        tracing::info!(address, "other nodes of the tier are answered");
        let peering = Arc::new(Peering { address, keys: Mutex::default(), requests: Semaphore::new(REQUESTS_MAX) });
        if self.inner.peering.set(peering.clone()).is_ok() {
            tokio::spawn(serve(self.clone(), peering, bound));
        }
    }

    /// Makes a tier that was just opened part of it: its claims say where we are, its readers ask.
    pub(super) async fn join_peers(&self, opened: &OpenTier) {
        let Some(tier) = opened.tier.clone() else {
            return;
        };
        let peering = self.inner.peering.get().cloned();
        let (looked, listens) = (tier.clone(), peering.is_some());
        let key = match blocking("reading the tier's key", move || looked.peer_key(listens)).await {
            Ok(Ok(Some(key))) => key,
            Ok(Ok(None)) => return,
            Ok(Err(error)) => {
                tracing::info!(%error, tier = opened.name, "without the tier's key other nodes are neither asked nor answered");
                return;
            }
            Err(_) => return,
        };
        if let Some(peering) = peering {
            peering.keys.lock().insert(tier.id(), key.clone());
            tier.set_address(Some(peering.address.clone()));
        }
        match HttpPeers::new(&tier, key) {
            Ok(peers) => opened.fetcher.set_peers(Arc::new(peers)),
            Err(error) => tracing::warn!(%error, "other nodes cannot be asked"),
        }
    }
}

/// Answers until the daemon stops.
async fn serve(daemon: Daemon, peering: Arc<Peering>, listener: TcpListener) {
    let stop = daemon.stopping();
    let router = Router::new().route("/v1/packs/{pack}", get(pack)).with_state((daemon, peering));
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = connections.clone().acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, _)) = accepted else {
            // Out of files, most likely: not to be asked for again at once.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let _permit = permit;
            let mut http = hyper::server::conn::http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(HEAD_BYTES_MAX);
            let served = timeout(CONNECTION_TIME_MAX, http.serve_connection(TokioIo::new(stream), service)).await;
            tracing::trace!(?served, "a peer's connection ended");
        });
    }
}

#[derive(Debug, Deserialize)]
struct Wanted {
    tier: TierId,
    from: u64,
    to: u64,
    wait_ms: u64,
}

async fn pack(
    State((daemon, peering)): State<(Daemon, Arc<Peering>)>,
    UrlPath(pack): UrlPath<PackId>,
    Query(wanted): Query<Wanted>,
    uri: Uri,
    headers: HeaderMap,
) -> Result<(StatusCode, Bytes), StatusCode> {
    let Ok(_permit) = peering.requests.try_acquire() else {
        return Err(StatusCode::SERVICE_UNAVAILABLE);
    };
    if !peering.admits(&wanted.tier, &uri, &headers) {
        return Err(StatusCode::UNAUTHORIZED);
    }
    if wanted.from >= wanted.to || wanted.to - wanted.from > RANGE_BYTES_MAX {
        return Err(StatusCode::BAD_REQUEST);
    }
    let is_it = |opened: &OpenTier| opened.tier.as_ref().is_some_and(|tier| tier.id() == wanted.tier);
    let opened = daemon.open_tiers().into_iter().find(is_it).ok_or(StatusCode::NOT_FOUND)?;
    let patience = Duration::from_millis(wanted.wait_ms).min(WAIT_MAX);
    match opened.fetcher.give(&pack, wanted.from..wanted.to, patience).await {
        Given::Bytes(bytes) => Ok((StatusCode::OK, bytes)),
        Given::Coming => Ok((StatusCode::ACCEPTED, Bytes::new())),
        Given::Nothing => Err(StatusCode::NOT_FOUND),
    }
}

impl Peering {
    fn admits(&self, tier: &TierId, uri: &Uri, headers: &HeaderMap) -> bool {
        let Some(key) = self.keys.lock().get(tier).cloned() else {
            return false;
        };
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let (Some(nonce), Some(given)) = (text(NONCE), text("authorization")) else {
            return false;
        };
        let asked = uri.path_and_query().map_or("", |asked| asked.as_str());
        let given = given.strip_prefix("Larder ").and_then(|hex| blake3::Hash::from_hex(hex).ok());
        // Comparing hashes takes the same time wherever they differ.
        nonce.len() == 32 && given.is_some_and(|given| given == token(key, &self.address, asked, nonce))
    }
}

fn token(key: PeerKey, address: &str, asked: &str, nonce: &str) -> blake3::Hash {
    key.token(&[PROTOCOL, address, asked, nonce])
}

/// Asks other nodes over HTTP.
#[derive(Debug)]
struct HttpPeers {
    tier: TierId,
    key: PeerKey,
    client: reqwest::Client,
}

impl HttpPeers {
    fn new(tier: &Tier, key: PeerKey) -> Result<Self, reqwest::Error> {
        let client = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .pool_max_idle_per_host(8)
            .pool_idle_timeout(Duration::from_secs(30))
            .build()?;
        Ok(Self { tier: tier.id(), key, client })
    }
}

#[async_trait::async_trait]
impl Peers for HttpPeers {
    async fn get(&self, address: &str, pack: &PackId, range: Range<u64>, patience: Duration) -> Given {
        match is_address(address) {
            true => self.ask(address, pack, range, patience).await.unwrap_or(Given::Nothing),
            false => Given::Nothing,
        }
    }
}

impl HttpPeers {
    async fn ask(&self, address: &str, pack: &PackId, range: Range<u64>, patience: Duration) -> Option<Given> {
        let wait_ms = patience.saturating_sub(WAY).as_millis();
        let asked =
            format!("/v1/packs/{pack}?tier={}&from={}&to={}&wait_ms={wait_ms}", self.tier, range.start, range.end);
        let nonce = hex::encode(rand::random::<[u8; 16]>());
        let token = token(self.key.clone(), address, &asked, &nonce);
        let request = self
            .client
            .get(format!("http://{address}{asked}"))
            .timeout(patience)
            .header(NONCE, &nonce)
            .header("authorization", format!("Larder {}", token.to_hex()));
        let answer = request.send().await.inspect_err(|error| tracing::debug!(address, %error, "a peer fails")).ok()?;
        let len = range.end - range.start;
        if answer.status() == StatusCode::ACCEPTED.as_u16() {
            return Some(Given::Coming);
        }
        if answer.status() != StatusCode::OK.as_u16() || answer.content_length() != Some(len) {
            tracing::debug!(address, status = %answer.status(), "a peer does not give what it brings");
            return None;
        }
        read_body(answer, usize::try_from(len).ok()?).await.map(Given::Bytes)
    }
}

/// Reads exactly so many bytes.
async fn read_body(mut answer: reqwest::Response, len: usize) -> Option<Bytes> {
    let mut body = BytesMut::with_capacity(len);
    while let Some(chunk) = answer.chunk().await.ok()? {
        if body.len() + chunk.len() > len {
            return None;
        }
        body.extend_from_slice(&chunk);
    }
    (body.len() == len).then(|| body.freeze())
}

/// Says whether a claim's text can be an address: it comes from a file that others wrote.
fn is_address(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b':' | b'[' | b']');
    let port = text.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
    text.len() <= 260 && text.bytes().all(plain) && port.is_some_and(|port| port > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_claim_says_is_an_address_or_nobody_is_asked() {
        for good in ["10.0.0.5:7071", "node-3.example.org:80", "[fe80::1]:7071"] {
            assert!(is_address(good), "{good}");
        }
        for bad in ["", "10.0.0.5", "a:0", "a:99999", "user@host:80", "host:80/path", "a b:1", "h\n:1", "x?:1"] {
            assert!(!is_address(bad), "{bad}");
        }
    }

    #[test]
    fn only_a_token_of_the_tiers_key_for_this_request_and_this_node_is_admitted() {
        let (tier, other) = (TierId(uuid::Uuid::from_u128(1)), TierId(uuid::Uuid::from_u128(2)));
        let key = PeerKey::new([7; 32]);
        let peering = Peering {
            address: "10.0.0.5:7071".to_owned(),
            keys: Mutex::new(HashMap::from([(tier, key.clone())])),
            requests: Semaphore::new(1),
        };
        let asked = "/v1/packs/ab?tier=x&from=0&to=9&wait_ms=5";
        let nonce = "00112233445566778899aabbccddeeff";
        let headers = |token: blake3::Hash, nonce: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(NONCE, nonce.parse().expect("a value"));
            headers.insert("authorization", format!("Larder {}", token.to_hex()).parse().expect("a value"));
            headers
        };
        let uri: Uri = asked.parse().expect("a path");
        let good = token(key.clone(), "10.0.0.5:7071", asked, nonce);
        assert!(peering.admits(&tier, &uri, &headers(good, nonce)));
        assert!(!peering.admits(&other, &uri, &headers(good, nonce)), "another tier");
        assert!(!peering.admits(&tier, &uri, &HeaderMap::new()), "no token");
        assert!(!peering.admits(&tier, &uri, &headers(good, "11112233445566778899aabbccddeeff")), "another nonce");
        let longer: Uri = asked.replace("to=9", "to=99").parse().expect("a path");
        assert!(!peering.admits(&tier, &longer, &headers(good, nonce)), "another range");
        let for_another = token(key, "10.0.0.6:7071", asked, nonce);
        assert!(!peering.admits(&tier, &uri, &headers(for_another, nonce)), "another node");
        let wrong = token(PeerKey::new([8; 32]), "10.0.0.5:7071", asked, nonce);
        assert!(!peering.admits(&tier, &uri, &headers(wrong, nonce)), "another key");
    }
}
