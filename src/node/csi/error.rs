//! Why a volume cannot be given: in words for the user, who reads them as an event of the pod, and with the code of
//! gRPC that tells the kubelet whether to come back.

use std::path::PathBuf;
use std::time::Duration;

use tonic::{Code, Status};

use super::books::BooksError;
use super::volume::VolumeError;
use crate::node::client::ClientError;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum CsiError {
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error("{}: another volume, or the same with other attributes, is published there; unpublish it first", target.display())]
    Taken { target: PathBuf },
    #[error("no volume of that id is published at {}", target.display())]
    NotPublished { target: PathBuf },
    #[error("another call for this volume has been under way for {} s; it is tried again", waited.as_secs())]
    Busy { waited: Duration },
    #[error("the daemon of this node does not answer; its container (or `systemctl status larder`) says why")]
    NoDaemon(#[source] Box<ClientError>),
    #[error("the daemon of this node is beginning, and has not taken up its mounts yet; it is tried again")]
    NotReady,
    #[error("{what}")]
    Daemon {
        what: &'static str,
        #[source]
        source: Box<ClientError>,
    },
    #[error("the lake does not answer{since}: {problem}")]
    Lake { problem: String, since: String },
    #[error("the mount of this commit on this node is not served now: {reason}; it is tried again")]
    Unserved { reason: String },
    #[error(
        "{revision} is not complete in the tier yet: {done} of {total} bytes are there, the rest is being brought; the kernel engine waits for it (`engine: fuse` or `auto` would not)"
    )]
    Filling { revision: String, done: u64, total: u64 },
    #[error("the kernel engine cannot serve {revision}; write `engine: auto` or `fuse`")]
    Kernel {
        revision: String,
        #[source]
        source: Box<ClientError>,
    },
    #[error("{}: something that is not larder's is mounted there", target.display())]
    Foreign { target: PathBuf },
    #[error("{}: the mount that was made there is not to be seen here: the pod of the keeper needs the folder with mountPropagation Bidirectional, that of the driver with HostToContainer", target.display())]
    NotPropagated { target: PathBuf },
    #[error("{}: cannot {doing}", path.display())]
    Io {
        path: PathBuf,
        doing: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Books(#[from] BooksError),
    #[error("the Kubernetes API does not answer, and the claim's annotations are to be read: {message}")]
    Api { message: String },
    #[error("{what} took longer than {} s; it goes on, and is tried again", after.as_secs())]
    Late { what: &'static str, after: Duration },
    #[error("{what} ended without a result; the driver's log says why")]
    Panicked { what: &'static str },
}

impl CsiError {
    /// Wraps what the daemon's client says: absent or not.
    pub fn of_daemon(what: &'static str) -> impl Fn(ClientError) -> Self {
        move |source| match source {
            source @ (ClientError::Absent { .. } | ClientError::Lost { .. }) => Self::NoDaemon(Box::new(source)),
            source => Self::Daemon { what, source: Box::new(source) },
        }
    }

    /// Gives the HTTP status with which the daemon refused, where it did.
    pub fn refused_with(&self) -> Option<u16> {
        match self {
            Self::Daemon { source, .. } => match source.as_ref() {
                ClientError::Refused { status, .. } => Some(*status),
                _ => None,
            },
            _ => None,
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::Volume(_) => Code::InvalidArgument,
            Self::Taken { .. } => Code::AlreadyExists,
            Self::NotPublished { .. } => Code::NotFound,
            Self::Busy { .. } => Code::Aborted,
            Self::NoDaemon(_) | Self::NotReady | Self::Lake { .. } | Self::Unserved { .. } | Self::Api { .. } => {
                Code::Unavailable
            }
            Self::Filling { .. } | Self::Kernel { .. } => Code::FailedPrecondition,
            Self::Late { .. } => Code::DeadlineExceeded,
            Self::Daemon { .. } => match self.refused_with() {
                Some(400) => Code::InvalidArgument,
                Some(403) => Code::PermissionDenied,
                Some(404) => Code::NotFound,
                Some(409) => Code::Aborted,
                _ => Code::Internal,
            },
            Self::Foreign { .. } | Self::NotPropagated { .. } | Self::Io { .. } | Self::Books(_) => Code::Internal,
            Self::Panicked { .. } => Code::Internal,
        }
    }

    /// Gives the message with all causes, and the daemon's advice.
    pub fn text(&self) -> String {
        let mut texts = vec![self.to_string()];
        let mut at = std::error::Error::source(self);
        while let Some(cause) = at {
            let text = cause.to_string();
            if texts.last() != Some(&text) {
                texts.push(text);
            }
            at = cause.source();
        }
        let hint = match self {
            Self::Daemon { source, .. } | Self::Kernel { source, .. } => source.hint(),
            _ => None,
        };
        let text = texts.join(": ");
        hint.map_or(text.clone(), |hint| format!("{text} ({hint})"))
    }
}

impl From<CsiError> for Status {
    fn from(error: CsiError) -> Self {
        let (code, text) = (error.code(), error.text());
        tracing::warn!(%code, error = text, "a call failed");
        Self::new(code, text)
    }
}

impl From<VolumeError> for Status {
    fn from(error: VolumeError) -> Self {
        CsiError::from(error).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::api::ApiError;

    fn refused(status: u16) -> ClientError {
        let error = ApiError { error: "no".into(), causes: vec![], hint: Some("do".into()) };
        ClientError::Refused { status, error, source: None }
    }

    #[test]
    fn the_kubelet_learns_whether_to_come_back() {
        let of = |status| Status::from(CsiError::of_daemon("mounting")(refused(status))).code();
        assert_eq!(
            [400, 403, 404, 409, 500].map(of),
            [Code::InvalidArgument, Code::PermissionDenied, Code::NotFound, Code::Aborted, Code::Internal]
        );
        let source = std::io::ErrorKind::NotFound.into();
        let absent = CsiError::of_daemon("mounting")(ClientError::Absent { socket: "/s".into(), source });
        assert_eq!(Status::from(absent).code(), Code::Unavailable);
        assert_eq!(Status::from(VolumeError::NoDataset).code(), Code::InvalidArgument);
    }

    #[test]
    fn a_message_has_its_causes_and_the_advice() {
        let text = CsiError::of_daemon("cannot mount xray")(refused(404)).text();
        assert_eq!(text, "cannot mount xray: no (do)");
    }
}
