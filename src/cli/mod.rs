//! The command line: one file per subcommand, config merged once.

use std::process::ExitCode;

/// Runs the command line.
pub fn main() -> ExitCode {
    ExitCode::from(2)
}
