//! The `larder` binary: everything is in `larder::cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    larder::cli::main()
}
