//! How an error is told, and which exit status it has.
//!
//! `error: what` and then its causes, one `because: ...` each, then `hint: next step` on stderr.
//! Exit status 1, or 2 where the command line or the configuration is at fault. A reader of stdout
//! that went away (`larder ls | head`) is no error.

use std::error::Error;
use std::fmt;
use std::io;
use std::process::ExitCode;

use crate::config::ConfigError;

/// The command line asks for something that cannot be: exit status 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// An error with the next step for the user.
pub struct Hinted {
    inner: anyhow::Error,
    hint: String,
}

impl fmt::Debug for Hinted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.inner, f)
    }
}

impl fmt::Display for Hinted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.inner, f)
    }
}

impl Error for Hinted {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.inner.source()
    }
}

/// Adds a next step to an error.
pub trait HintExt<T> {
    /// Says what to do about it: printed last, as `hint: ...`.
    fn hint(self, hint: impl Into<String>) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> HintExt<T> for Result<T, E> {
    fn hint(self, hint: impl Into<String>) -> anyhow::Result<T> {
        self.map_err(|error| anyhow::Error::new(Hinted { inner: error.into(), hint: hint.into() }))
    }
}

/// Ends a command with a usage error (exit status 2).
pub fn usage<T>(message: impl Into<String>) -> anyhow::Result<T> {
    Err(anyhow::Error::new(Usage(message.into())))
}

/// Stdout's reader went away.
#[derive(Debug, thiserror::Error)]
#[error("nobody reads the output any more")]
pub struct StdoutClosed;

/// Tells the outcome and gives the exit status.
pub(super) fn exit(outcome: anyhow::Result<()>) -> ExitCode {
    let Err(error) = outcome else {
        return ExitCode::SUCCESS;
    };
    if stdout_closed(&error) {
        return ExitCode::SUCCESS;
    }
    eprint!("{}", tell(&error));
    if is_usage(&error) { ExitCode::from(2) } else { ExitCode::from(1) }
}

/// Prints clap's own error or help; a usage error is exit status 2.
pub(super) fn clap_exit(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    u8::try_from(error.exit_code()).map_or(ExitCode::from(2), ExitCode::from)
}

/// Says an error with its causes and hints.
pub fn tell(error: &anyhow::Error) -> String {
    let mut text = format!("error: {error}\n");
    let mut last = error.to_string();
    for cause in error.chain().skip(1) {
        let line = cause.to_string();
        // A cause that its parent already quotes says nothing new.
        if !last.contains(&line) {
            text.push_str(&format!("  because: {line}\n"));
        }
        last = line;
    }
    for hint in hints(error) {
        text.push_str(&format!("hint: {hint}\n"));
    }
    text
}

/// Gives all hints, the outermost first. A hinted error hides its inner one from the chain.
fn hints(error: &anyhow::Error) -> Vec<String> {
    let mut found = Vec::new();
    for cause in error.chain() {
        if let Some(hinted) = cause.downcast_ref::<Hinted>() {
            found.push(hinted.hint.clone());
            found.extend(hints(&hinted.inner));
        }
    }
    found.dedup();
    found
}

fn is_usage(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.is::<Usage>()
            || cause.is::<ConfigError>()
            || cause.is::<crate::format::refs::NameError>()
            || cause.downcast_ref::<Hinted>().is_some_and(|hinted| is_usage(&hinted.inner))
    })
}

fn stdout_closed(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.is::<StdoutClosed>()
            || cause
                .downcast_ref::<io::Error>()
                .and_then(io::Error::get_ref)
                .is_some_and(|inner| inner.is::<StdoutClosed>())
    })
}

/// Makes a `println!` to a closed stdout end the process quietly instead of with a panic message.
/// (Restoring SIGPIPE would do too, but it would also kill a push whose server hangs up.)
pub(super) fn quiet_on_closed_stdout() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let text = info.payload().downcast_ref::<String>();
        if text.is_some_and(|t| t.starts_with("failed printing to stdout") && t.contains("Broken pipe")) {
            std::process::exit(0);
        }
        default(info);
    }));
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn causes_and_hints_are_told_once_and_in_order() {
        let inner = Err::<(), _>(io::Error::other("disk on fire")).hint("bring water");
        let error = inner.context("cannot write /x").hint("choose another place").unwrap_err();
        assert_eq!(
            tell(&error),
            "error: cannot write /x\n  because: disk on fire\nhint: choose another place\nhint: bring water\n"
        );
    }

    #[test]
    fn a_usage_error_is_found_below_hints_and_contexts() {
        let error = usage::<()>("no").hint("say yes").context("asked").unwrap_err();
        assert!(is_usage(&error));
        assert!(!is_usage(&anyhow::anyhow!("other")));
    }

    #[test]
    fn a_reader_that_left_is_no_error() {
        let error = anyhow::Error::new(io::Error::new(io::ErrorKind::BrokenPipe, StdoutClosed)).context("listing");
        assert!(stdout_closed(&error));
        assert!(!stdout_closed(&anyhow::Error::new(io::Error::from(io::ErrorKind::BrokenPipe))));
    }
}
