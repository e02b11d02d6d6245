//! The way to a daemon over TCP: a URL, a token, TLS (`remote` is the other end).
//!
//! The token is read from its file at each request, so that another one counts at once, and the file may be nobody
//! else's. Without TLS only this machine itself is asked (`config` refuses others): a token is a secret.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::config::{DaemonSection, DaemonUrl};

/// How long a connection and the agreement on TLS may take, each.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// Where systems keep the authorities that they trust.
const AUTHORITIES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem"];
/// Nothing that is longer is a token.
const TOKEN_BYTES_MAX: u64 = 4096;

/// Why a daemon is not reached over TCP.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error("no connection")]
    Connect(#[source] io::Error),
    #[error("no connection within {} s", CONNECT_TIMEOUT.as_secs())]
    Slow,
    #[error("no TLS; is daemon.ca the authority of its certificate?")]
    Tls(#[source] io::Error),
    #[error("{}: {what}", path.display())]
    File { path: PathBuf, what: String },
    #[error("daemon.token_file names no file with the token that `larder daemon token` gave")]
    NoToken,
}

/// What both kinds of connections are.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// A daemon at a TCP address.
#[derive(Debug)]
pub struct Dial {
    url: DaemonUrl,
    token_file: Option<PathBuf>,
    /// None: the authorities that this system trusts.
    ca: Option<PathBuf>,
}

impl Dial {
    /// Takes what is configured; None where it is the unix socket.
    pub fn configured(config: &DaemonSection) -> Option<Self> {
        let url = config.url.as_deref()?;
        // A wrong one has been refused with the configuration.
        let url = DaemonUrl::parse(url).ok()?;
        Some(Self { url, token_file: config.token_file.clone(), ca: config.ca.clone() })
    }

    /// Gives host and port.
    pub fn authority(&self) -> String {
        self.url.authority()
    }

    /// Reads the token.
    pub fn token(&self) -> Result<String, DialError> {
        let path = self.token_file.as_ref().ok_or(DialError::NoToken)?;
        let wrong = |what: String| DialError::File { path: path.clone(), what };
        let meta = std::fs::metadata(path).map_err(|error| wrong(error.to_string()))?;
        if meta.mode() & 0o077 != 0 {
            return Err(wrong("others may read this token: `chmod 600` it, and make a new one".to_owned()));
        }
        if meta.len() > TOKEN_BYTES_MAX {
            return Err(wrong("is too long for a token".to_owned()));
        }
        let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        let token = text.trim();
        if token.is_empty() || token.chars().any(|c| !c.is_ascii_graphic()) {
            return Err(wrong("is no token: one line, as `larder daemon token` printed it".to_owned()));
        }
        Ok(token.to_owned())
    }

    /// Connects.
    pub async fn connect(&self) -> Result<Box<dyn Stream>, DialError> {
        let address = (self.url.host.as_str(), self.url.port);
        let connected = timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await.map_err(|_| DialError::Slow)?;
        let stream = connected.map_err(DialError::Connect)?;
        let _ = stream.set_nodelay(true);
        if !self.url.tls {
            return Ok(Box::new(stream));
        }
        let connector = TlsConnector::from(Arc::new(self.tls()?));
        let name = ServerName::try_from(self.url.host.clone());
        let name = name.map_err(|error| DialError::Tls(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
        let agreed = timeout(CONNECT_TIMEOUT, connector.connect(name, stream)).await.map_err(|_| DialError::Slow)?;
        Ok(Box::new(agreed.map_err(DialError::Tls)?))
    }

    fn tls(&self) -> Result<ClientConfig, DialError> {
        let system = || AUTHORITIES.iter().map(Path::new).find(|path| path.exists()).map(Path::to_owned);
        let path = self.ca.clone().or_else(system).unwrap_or_else(|| PathBuf::from("daemon.ca"));
        let wrong = |what: String| DialError::File { path: path.clone(), what };
        let certs = CertificateDer::pem_file_iter(&path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let certs = certs.map_err(|error| wrong(format!("no certificates in PEM: {error}")))?;
        let mut roots = RootCertStore::empty();
        let (taken, _) = roots.add_parsable_certificates(certs);
        if taken == 0 {
            return Err(wrong("has no authority's certificate".to_owned()));
        }
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| wrong(error.to_string()))?;
        Ok(builder.with_root_certificates(roots).with_no_client_auth())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn dial(token_file: Option<PathBuf>) -> Dial {
        Dial { url: DaemonUrl::parse("http://127.0.0.1:1").expect("is one"), token_file, ca: None }
    }

    #[test]
    fn a_token_that_others_may_read_is_not_sent() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("token");
        std::fs::write(&path, "larder_12\n").expect("writes");
        let mode = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("chmod");
        let one = dial(Some(path.clone()));
        mode(0o640);
        assert!(one.token().expect_err("is open").to_string().contains("chmod 600"));
        mode(0o600);
        assert_eq!(one.token().expect("reads"), "larder_12");
        std::fs::write(&path, "two\nlines\n").expect("writes");
        let told = one.token().expect_err("is none").to_string();
        assert!(told.contains("no token") && !told.contains("lines\n"), "{told}");
        assert!(matches!(dial(None).token(), Err(DialError::NoToken)));
    }
}
