//! The control API over TCP, for who has a token: the same routes as at the socket (`server`).
//!
//! TLS where there is a certificate; without one only addresses of this machine itself are bound (`config`
//! refuses others). A token is 32 random bytes. The file of tokens has only their digests, a line each:
//! `NAME read|control DIGEST`; it is read at each request, so a line that is taken out counts at once.
//! `read` may look, `control` may do what the daemon's own user may, but not stop or replace the daemon. Root's daemon
//! mounts wherever `control` says: such a token is as good as root on the node.

use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::daemon::{Daemon, blocking};
use super::server::{self, Peer};
use crate::config::DaemonSection;

const CONNECTIONS_MAX: usize = 64;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
const HEAD_BYTES_MAX: usize = 16 << 10;
/// A fill is waited for in requests of a minute at most; a mount may take longer.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(3600);
/// No file of tokens is longer.
const TOKENS_BYTES_MAX: u64 = 1 << 20;
/// What a token begins with, so that people and scanners know one when they see it.
pub const TOKEN_PREFIX: &str = "larder_";

/// Why the API is not given over TCP.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    #[error("cannot listen at {address} (daemon.api_listen)")]
    Listen {
        address: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{}: {what}", path.display())]
    File { path: PathBuf, what: String },
}

/// What a token allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Look: what is mounted and cached, metrics.
    Read,
    /// Whatever the daemon's own user may, but for stopping and replacing the daemon.
    Control,
}

impl Access {
    /// Gives the word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Control => "control",
        }
    }
}

/// The tokens that are taken.
#[derive(Debug, Default)]
pub struct Tokens {
    known: Vec<(String, Access, blake3::Hash)>,
}

impl Tokens {
    /// Reads the file.
    pub fn read(path: &Path) -> Result<Self, RemoteError> {
        let wrong = |what: String| RemoteError::File { path: path.to_owned(), what };
        let meta = std::fs::metadata(path).map_err(|error| wrong(error.to_string()))?;
        let is_trusted = meta.uid() == 0 || meta.uid() == nix::unistd::geteuid().as_raw();
        if !is_trusted || meta.mode() & 0o022 != 0 {
            let what =
                "others than root and the daemon's user may write it, and so make themselves tokens: chmod it to 0600";
            return Err(wrong(what.to_owned()));
        }
        if meta.len() > TOKENS_BYTES_MAX {
            return Err(wrong("is too long for a file of tokens".to_owned()));
        }
        let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        Self::parse(&text).map_err(wrong)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mut known = Vec::new();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            if line.starts_with('#') {
                continue;
            }
            // What the line says is not repeated: somebody may have put a token there instead of its digest.
            let wrong = || {
                format!("line {} is not `NAME read|control DIGEST`; make one with `larder daemon token`", number + 1)
            };
            let words: Vec<&str> = line.split_whitespace().collect();
            let [name, access, digest] = words.as_slice() else {
                return Err(wrong());
            };
            let access = match *access {
                "read" => Access::Read,
                "control" => Access::Control,
                _ => return Err(wrong()),
            };
            known.push(((*name).to_owned(), access, blake3::Hash::from_hex(digest).map_err(|_| wrong())?));
        }
        Ok(Self { known })
    }

    /// Finds whose a token is, and what it allows.
    pub fn find(&self, token: &str) -> Option<(&str, Access)> {
        let digest = blake3::hash(token.as_bytes());
        // Comparing hashes takes the same time wherever they differ.
        self.known.iter().find(|(_, _, known)| *known == digest).map(|(name, access, _)| (name.as_str(), *access))
    }
}

/// Makes a token; gives it and the line for the file.
pub fn make_token(name: &str, access: Access) -> (String, String) {
    let token = format!("{TOKEN_PREFIX}{}", hex::encode(rand::random::<[u8; 32]>()));
    let line = format!("{name} {} {}", access.as_str(), blake3::hash(token.as_bytes()).to_hex());
    (token, line)
}

/// The API at a TCP address, not yet served.
pub struct Remote {
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    tokens: PathBuf,
}

impl Remote {
    /// Binds what is configured; None where nothing is.
    pub async fn open(config: &DaemonSection) -> Result<Option<Self>, RemoteError> {
        let (Some(address), Some(tokens)) = (config.api_listen.clone(), config.api_tokens.clone()) else {
            return Ok(None);
        };
        Tokens::read(&tokens)?;
        let tls = match (&config.api_cert, &config.api_key) {
            (Some(cert), Some(key)) => Some(acceptor(cert, key)?),
            _ => None,
        };
        let listener = TcpListener::bind(&address).await;
        let listener = listener.map_err(|source| RemoteError::Listen { address, source })?;
        Ok(Some(Self { listener, tls, tokens }))
    }

    /// Gives the address that was bound.
    pub fn address(&self) -> Option<SocketAddr> {
        self.listener.local_addr().ok()
    }

    /// Serves until the daemon stops.
    pub async fn serve(self, daemon: Daemon) {
        let stop = daemon.stopping();
        let authenticate = middleware::from_fn_with_state(self.tokens, authenticate);
        let router = server::router(daemon).layer(authenticate);
        let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let Ok(permit) = connections.clone().acquire_owned().await else {
                return;
            };
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = self.listener.accept() => accepted,
            };
            let Ok((stream, from)) = accepted else {
                // Out of files, most likely: not to be asked for again at once.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let (router, tls) = (router.clone(), self.tls.clone());
            tokio::spawn(async move {
                let _permit = permit;
                serve_one(stream, tls, router, from).await;
            });
        }
    }
}

fn acceptor(cert: &Path, key: &Path) -> Result<TlsAcceptor, RemoteError> {
    let wrong = |path: &Path, what: String| RemoteError::File { path: path.to_owned(), what };
    let certs = CertificateDer::pem_file_iter(cert).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let certs = certs.map_err(|error| wrong(cert, format!("no certificates in PEM: {error}")))?;
    let secret = PrivateKeyDer::from_pem_file(key);
    let secret = secret.map_err(|error| wrong(key, format!("no private key in PEM: {error}")))?;
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(certs, secret));
    let config = config.map_err(|error| wrong(cert, format!("does not go with {}: {error}", key.display())))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

async fn serve_one(stream: TcpStream, tls: Option<TlsAcceptor>, router: Router, from: SocketAddr) {
    let _ = stream.set_nodelay(true);
    let Some(tls) = tls else {
        return serve_http(stream, router).await;
    };
    match timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await {
        Ok(Ok(stream)) => serve_http(stream, router).await,
        Ok(Err(error)) => tracing::debug!(%from, %error, "no TLS was agreed on"),
        Err(_) => tracing::debug!(%from, "no TLS was agreed on in time"),
    }
}

async fn serve_http(stream: impl AsyncRead + AsyncWrite + Unpin, router: Router) {
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(HEAD_BYTES_MAX);
    let service = TowerToHyperService::new(router);
    let served = timeout(CONNECTION_TIME_MAX, http.serve_connection(TokioIo::new(stream), service)).await;
    tracing::trace!(?served, "a connection of the API ended");
}

/// Lets through who has a token for what is asked.
async fn authenticate(State(tokens): State<PathBuf>, mut request: Request, next: Next) -> Response {
    let given = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let given = given.and_then(|value| value.strip_prefix("Bearer ")).map(str::to_owned);
    let Some(token) = given else {
        return refuse(StatusCode::UNAUTHORIZED, "no token: send `Authorization: Bearer TOKEN`");
    };
    let found = blocking("looking a token up", move || {
        let tokens = Tokens::read(&tokens)?;
        Ok::<_, RemoteError>(tokens.find(&token).map(|(name, access)| (name.to_owned(), access)))
    });
    let found = match found.await {
        Ok(Ok(found)) => found,
        Ok(Err(error)) => {
            tracing::error!(%error, "no token is taken");
            None
        }
        Err(_) => None,
    };
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    match found {
        None => refuse(StatusCode::UNAUTHORIZED, "this token is not known here"),
        Some((_, Access::Read)) if method != Method::GET => refuse(StatusCode::FORBIDDEN, "this token may only look"),
        Some((name, _)) => {
            if method != Method::GET {
                tracing::info!(token = name, %method, path, "asked over TCP");
            }
            request.extensions_mut().insert(ConnectInfo(Peer::by_token()));
            next.run(request).await
        }
    }
}

fn refuse(status: StatusCode, why: &str) -> Response {
    (status, axum::Json(serde_json::json!({ "error": why, "causes": [] }))).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_found_by_its_digest_only() {
        let (token, line) = make_token("hub", Access::Read);
        let (other, _) = make_token("hub", Access::Control);
        assert!(!line.contains(&token) && token != other, "{line}");
        let tokens = Tokens::parse(&format!("# tokens\n\n{line}\n")).expect("is right");
        assert_eq!(tokens.find(&token), Some(("hub", Access::Read)));
        let digest = line.rsplit(' ').next().expect("a digest");
        for wrong in ["", "x", &other, digest] {
            assert_eq!(tokens.find(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_file_of_tokens_that_others_may_write_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let file = tempfile::NamedTempFile::new().expect("a file");
        let (_, line) = make_token("hub", Access::Read);
        std::fs::write(file.path(), line).expect("writes");
        for (mode, is_taken) in [(0o600, true), (0o644, true), (0o620, false), (0o602, false)] {
            std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(mode)).expect("chmod");
            assert_eq!(Tokens::read(file.path()).is_ok(), is_taken, "{mode:o}");
        }
    }

    #[test]
    fn a_wrong_line_is_told_by_its_number_and_not_repeated() {
        let (token, line) = make_token("hub", Access::Control);
        for wrong in [format!("hub control {token}"), format!("hub all {}", "0".repeat(64)), "hub".to_owned()] {
            let told = Tokens::parse(&format!("{line}\n{wrong}")).expect_err("is wrong");
            assert!(told.contains("line 2") && !told.contains(&token), "{told}");
        }
    }
}
