//! What the command line speaks with a daemon: HTTP over the unix socket, or over TCP (`dial`), a connection for each request.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::api::{
    ApiError, BindRequest, FillInfo, FillRequest, MountInfo, MountRequest, NodeInfo, PermitRequest, ResolveInfo,
    ResolveRequest, UmountRequest, UnbindRequest, UncacheInfo, UncacheRequest, UpgradeRequest,
};
use super::dial::{Dial, DialError, Stream};
use crate::config::DaemonSection;

/// No answer is longer: thousands of mounts fit.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Why the daemon did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no daemon listens at {}", socket.display())]
    Absent {
        socket: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Somebody else's daemon.
    #[error("the daemon at {} belongs to user {uid}; set LARDER_SOCKET to your own", socket.display())]
    Foreign { socket: PathBuf, uid: u32 },
    #[error("you may not use the daemon at {}", socket.display())]
    Denied {
        socket: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("the daemon at {at} went away; its log says why: `larder daemon log` there, or the journal")]
    Lost {
        at: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It is on another machine.
    #[error("cannot ask the daemon at {at}")]
    Unreachable {
        at: String,
        #[source]
        source: DialError,
    },
    /// It understood, and refused or failed.
    #[error("{}", error.error)]
    Refused {
        status: u16,
        error: ApiError,
        #[source]
        source: Option<Causes>,
    },
}

/// The causes that the daemon told, as a chain.
#[derive(Debug)]
pub struct Causes {
    text: String,
    next: Option<Box<Causes>>,
}

impl std::fmt::Display for Causes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Causes {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.next.as_ref().map(|next| next as &dyn std::error::Error)
    }
}

impl Causes {
    fn chain(texts: &[String]) -> Option<Self> {
        let (first, rest) = texts.split_first()?;
        Some(Self { text: first.clone(), next: Self::chain(rest).map(Box::new) })
    }
}

impl ClientError {
    /// Says whether no daemon is there at all.
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Absent { .. })
    }

    /// Gives the daemon's advice.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::Refused { error, .. } => error.hint.as_deref(),
            _ => None,
        }
    }
}

/// A daemon, by its socket or its URL. Cheap to clone; each request makes a connection of its own.
#[derive(Debug, Clone)]
pub struct NodeClient {
    way: Way,
}

#[derive(Debug, Clone)]
enum Way {
    Socket(PathBuf),
    Tcp(Arc<Dial>),
}

impl NodeClient {
    /// Names the daemon; speaks to nobody yet.
    pub fn at(socket: &Path) -> Self {
        Self { way: Way::Socket(socket.to_owned()) }
    }

    /// Names the daemon that is configured: at a URL, or at the socket.
    pub fn configured(config: &DaemonSection) -> Self {
        match Dial::configured(config) {
            Some(dial) => Self { way: Way::Tcp(Arc::new(dial)) },
            None => Self::at(&config.socket),
        }
    }

    /// Says where it is.
    pub fn place(&self) -> String {
        match &self.way {
            Way::Socket(socket) => socket.display().to_string(),
            Way::Tcp(dial) => dial.authority(),
        }
    }

    /// Asks who the daemon is.
    pub async fn info(&self) -> Result<NodeInfo, ClientError> {
        self.get("/v1/info").await
    }

    pub async fn mount(&self, request: &MountRequest) -> Result<MountInfo, ClientError> {
        self.post("/v1/mounts", request).await
    }

    pub async fn mounts(&self) -> Result<Vec<MountInfo>, ClientError> {
        self.get("/v1/mounts").await
    }

    pub async fn umount(&self, request: &UmountRequest) -> Result<MountInfo, ClientError> {
        self.post("/v1/umount", request).await
    }

    /// Asks whether somebody may do something with a dataset.
    pub async fn permit(&self, request: &PermitRequest) -> Result<(), ClientError> {
        let _: serde_json::Value = self.post("/v1/permit", request).await?;
        Ok(())
    }

    pub async fn resolve(&self, request: &ResolveRequest) -> Result<ResolveInfo, ClientError> {
        self.post("/v1/resolve", request).await
    }

    pub async fn bind(&self, request: &BindRequest) -> Result<(), ClientError> {
        let _: serde_json::Value = self.post("/v1/bind", request).await?;
        Ok(())
    }

    pub async fn unbind(&self, request: &UnbindRequest) -> Result<(), ClientError> {
        let _: serde_json::Value = self.post("/v1/unbind", request).await?;
        Ok(())
    }

    pub async fn fill(&self, request: &FillRequest) -> Result<FillInfo, ClientError> {
        self.post("/v1/fills", request).await
    }

    pub async fn uncache(&self, request: &UncacheRequest) -> Result<UncacheInfo, ClientError> {
        self.post("/v1/uncache", request).await
    }

    /// Gives how a fill does, at once where `wait` is zero, else when it changed or the time is over.
    pub async fn fill_info(&self, id: &Uuid, wait: Duration) -> Result<FillInfo, ClientError> {
        self.get(&format!("/v1/fills/{id}?wait_ms={}", wait.as_millis())).await
    }

    pub async fn stop(&self) -> Result<(), ClientError> {
        let _: serde_json::Value = self.post("/v1/stop", &serde_json::json!({})).await?;
        Ok(())
    }

    /// Has the daemon end for another one, which takes its mounts over.
    pub async fn upgrade(&self, request: &UpgradeRequest) -> Result<(), ClientError> {
        let _: serde_json::Value = self.post("/v1/upgrade", request).await?;
        Ok(())
    }

    pub async fn metrics(&self) -> Result<String, ClientError> {
        let (_, body) = self.exchange(Method::GET, "/metrics", Bytes::new()).await?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    /// Asks another API that speaks as the daemon's does (the scheduler's), with a body where there is one.
    pub async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> Result<T, ClientError> {
        let body = match body {
            Some(body) => serde_json::to_vec(body).map_err(|error| self.lost(error))?,
            None => Vec::new(),
        };
        self.ask(method, path, body.into()).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.ask(Method::GET, path, Bytes::new()).await
    }

    async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| self.lost(error))?;
        self.ask(Method::POST, path, body.into()).await
    }

    async fn ask<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<T, ClientError> {
        let (status, body) = self.exchange(method, path, body).await?;
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|error| self.lost(error));
        }
        let error = serde_json::from_slice(&body).unwrap_or_else(|_| ApiError {
            error: format!("the daemon answered {status} to {path}: {}", String::from_utf8_lossy(&body)),
            causes: Vec::new(),
            hint: None,
        });
        let source = Causes::chain(&error.causes);
        Err(ClientError::Refused { status: status.as_u16(), error, source })
    }

    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> Result<(StatusCode, Bytes), ClientError> {
        let (stream, host, token) = self.connect().await?;
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|error| self.lost(error))?;
        let driver = tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::HOST, host)
            .header(http::header::CONTENT_TYPE, "application/json");
        if let Some(token) = token {
            request = request.header(http::header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request.body(Body::from(body)).map_err(|error| self.lost(error))?;
        let answer = sender.send_request(request).await.map_err(|error| self.lost(error))?;
        let status = answer.status();
        let bytes =
            to_bytes(Body::new(answer.into_body()), ANSWER_BYTES_MAX).await.map_err(|error| self.lost(error))?;
        driver.abort();
        Ok((status, bytes))
    }

    /// Connects; gives the host that is asked, and the token where one is needed.
    async fn connect(&self) -> Result<(Box<dyn Stream>, String, Option<String>), ClientError> {
        match &self.way {
            Way::Socket(path) => Ok((Box::new(self.connect_to(path).await?), "larder".to_owned(), None)),
            Way::Tcp(dial) => {
                let failed = |source| ClientError::Unreachable { at: dial.authority(), source };
                let token = dial.token().map_err(failed)?;
                Ok((dial.connect().await.map_err(failed)?, dial.authority(), Some(token)))
            }
        }
    }

    /// Connects, and makes sure that the other end is this user's daemon or root's.
    async fn connect_to(&self, path: &Path) -> Result<tokio::net::UnixStream, ClientError> {
        let socket = || path.to_owned();
        let stream = tokio::net::UnixStream::connect(path).await.map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => ClientError::Denied { socket: socket(), source },
            _ => ClientError::Absent { socket: socket(), source },
        })?;
        let peer = stream.peer_cred().map_err(|error| self.lost(error))?;
        if peer.uid() != 0 && peer.uid() != nix::unistd::geteuid().as_raw() {
            return Err(ClientError::Foreign { socket: socket(), uid: peer.uid() });
        }
        Ok(stream)
    }

    fn lost(&self, error: impl std::error::Error + Send + Sync + 'static) -> ClientError {
        ClientError::Lost { at: self.place(), source: Box::new(error) }
    }
}
