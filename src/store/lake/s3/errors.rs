//! What the SDK's errors mean: which pass, which are refusals, which say that an object is not there.

use std::error::Error;
use std::time::Duration;

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};
use aws_smithy_runtime_api::client::interceptors::context::InterceptorContext;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_runtime_api::client::retries::classifiers::{ClassifyRetry, RetryAction};

use crate::store::lake::LakeError;

/// What went wrong with a request, in words.
#[derive(Debug, thiserror::Error)]
pub enum S3Failure {
    #[error("the store answered {status} {code}{message}{}", hint(.code))]
    Answer {
        status: u16,
        code: String,
        /// Empty, or begins with a colon.
        message: String,
        /// How long the store asks to be left alone.
        retry_after: Option<Duration>,
    },
    #[error("no credentials: neither the environment, nor a profile, nor this machine's role has any")]
    NoCredentials {
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    #[error("{what}")]
    NoAnswer {
        what: &'static str,
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
}

impl S3Failure {
    /// Says how long the store asks to be left alone.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Answer { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// Says whether other credentials would help.
    pub fn is_of_credentials(&self) -> bool {
        const CODES: [&str; 5] =
            ["ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId", "SignatureDoesNotMatch"];
        match self {
            Self::Answer { code, .. } => CODES.contains(&code.as_str()),
            Self::NoCredentials { .. } => true,
            Self::NoAnswer { .. } => false,
        }
    }
}

/// Reads the header `Retry-After` of an answer that asks for time; the form with a date is left to the usual waits.
pub(super) fn retry_after(answer: &HttpResponse) -> Option<Duration> {
    if !matches!(answer.status().as_u16(), 429 | 503) {
        return None;
    }
    answer.headers().get("retry-after")?.trim().parse().ok().map(Duration::from_secs)
}

/// Leaves the waiting to us where the store says how long: the SDK would ask again within a second.
#[derive(Debug)]
pub(super) struct AsksForTime;

impl ClassifyRetry for AsksForTime {
    fn classify_retry(&self, context: &InterceptorContext) -> RetryAction {
        match context.response().and_then(retry_after) {
            Some(_) => RetryAction::RetryForbidden,
            None => RetryAction::NoActionIndicated,
        }
    }

    fn name(&self) -> &'static str {
        "the store asks for time"
    }
}

/// Says the next step, where a code has one.
fn hint(code: &str) -> &'static str {
    match code {
        "NoSuchBucket" => "; `larder lake init --create-bucket` makes the bucket",
        "SignatureDoesNotMatch" => "; the secret key is not that of the access key",
        "InvalidAccessKeyId" => "; the store does not know the access key",
        "RequestTimeTooSkewed" => "; this machine's clock is off",
        "PermanentRedirect" | "AuthorizationHeaderMalformed" => "; the bucket is in another region",
        "ExpiredToken" => "; log in again",
        _ => "",
    }
}

/// The kinds of failure that callers tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    NotFound,
    Precondition,
    Denied,
    Passing,
    Permanent,
}

/// Classifies an answer by its status and S3's error code.
fn kind_of(status: u16, code: &str) -> Kind {
    match (status, code) {
        // A missing bucket must not look like an empty lake.
        (_, "NoSuchBucket") => Kind::Permanent,
        (_, "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired" | "InvalidAccessKeyId") => Kind::Denied,
        (_, "RequestTimeout" | "SlowDown" | "Throttling" | "IncompleteBody" | "BadDigest") => Kind::Passing,
        (404, _) => Kind::NotFound,
        (304 | 412, _) => Kind::Precondition,
        // Two conditional writes, or a write and a deletion, met: the store asks to try again.
        (409, "ConditionalRequestConflict" | "OperationAborted") => Kind::Passing,
        (401 | 403, _) => Kind::Denied,
        (408 | 429, _) => Kind::Passing,
        (501 | 505, _) => Kind::Permanent,
        (500..=599, _) => Kind::Passing,
        _ => Kind::Permanent,
    }
}

/// Turns the SDK's errors into ours.
pub trait About<T> {
    /// Says which key, prefix or bucket the request was about.
    fn about(self, key: &str) -> Result<T, LakeError>;
}

impl<T, E> About<T> for Result<T, SdkError<E, HttpResponse>>
where
    E: ProvideErrorMetadata + Error + Send + Sync + 'static,
{
    fn about(self, key: &str) -> Result<T, LakeError> {
        self.map_err(|error| lake_error(key, error))
    }
}

/// Turns an SDK error into ours.
pub fn lake_error<E>(key: &str, error: SdkError<E, HttpResponse>) -> LakeError
where
    E: ProvideErrorMetadata + Error + Send + Sync + 'static,
{
    let (kind, failure) = match error {
        SdkError::ServiceError(answer) => {
            let status = answer.raw().status().as_u16();
            let retry_after = retry_after(answer.raw());
            let code = answer.err().code().unwrap_or("").to_owned();
            let message = match answer.err().message() {
                Some(message) => format!(": {message}"),
                None if !code.is_empty() => String::new(),
                // An answer that is none of S3's: what the SDK says of it.
                None => format!(": {}", DisplayErrorContext(answer.err())),
            };
            (kind_of(status, &code), S3Failure::Answer { status, code, message, retry_after })
        }
        other => without_answer(other),
    };
    let (key, source) = (key.to_owned(), failure.into());
    match kind {
        Kind::NotFound => LakeError::NotFound { key },
        Kind::Precondition => LakeError::Precondition { key },
        Kind::Denied => LakeError::Denied { key, source },
        Kind::Passing => LakeError::Passing { key, source },
        Kind::Permanent => LakeError::Permanent { key, source },
    }
}

/// Classifies an error that came without an answer of the store.
fn without_answer<E>(error: SdkError<E, HttpResponse>) -> (Kind, S3Failure)
where
    E: Error + Send + Sync + 'static,
{
    let (kind, what) = match &error {
        SdkError::ConstructionFailure(_) => (Kind::Permanent, "the request could not be built"),
        SdkError::TimeoutError(_) => (Kind::Passing, "no answer in time"),
        SdkError::ResponseError(_) => (Kind::Passing, "the answer broke off, or is no S3 answer"),
        SdkError::DispatchFailure(failure) if failure.is_user() => (Kind::Permanent, "the request could not be sent"),
        SdkError::DispatchFailure(failure) if failure.is_timeout() => (Kind::Passing, "no connection in time"),
        _ => (Kind::Passing, "the connection failed"),
    };
    let source: Box<dyn Error + Send + Sync> = error.into();
    if chain(&*source).any(|error| error.is::<CredentialsError>()) {
        return (Kind::Denied, S3Failure::NoCredentials { source });
    }
    if chain(&*source).any(|error| error.to_string().contains("invalid peer certificate")) {
        let what = "the store's certificate is not trusted; name its authority in ca_file";
        return (Kind::Permanent, S3Failure::NoAnswer { what, source });
    }
    (kind, S3Failure::NoAnswer { what, source })
}

fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error: &&'a (dyn Error + 'static)| (*error).source())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_apart() {
        for (status, code, kind) in [
            (404, "NoSuchKey", Kind::NotFound),
            (404, "", Kind::NotFound),
            (404, "NoSuchUpload", Kind::NotFound),
            (404, "NoSuchBucket", Kind::Permanent),
            (412, "PreconditionFailed", Kind::Precondition),
            (304, "", Kind::Precondition),
            (409, "ConditionalRequestConflict", Kind::Passing),
            (409, "BucketAlreadyExists", Kind::Permanent),
            (403, "AccessDenied", Kind::Denied),
            (403, "SignatureDoesNotMatch", Kind::Denied),
            (400, "ExpiredToken", Kind::Denied),
            (400, "RequestTimeout", Kind::Passing),
            (400, "BadDigest", Kind::Passing),
            (400, "InvalidArgument", Kind::Permanent),
            (416, "InvalidRange", Kind::Permanent),
            (429, "", Kind::Passing),
            (500, "InternalError", Kind::Passing),
            (501, "NotImplemented", Kind::Permanent),
            (503, "SlowDown", Kind::Passing),
            (301, "PermanentRedirect", Kind::Permanent),
        ] {
            assert_eq!(kind_of(status, code), kind, "{status} {code}");
        }
    }
}
