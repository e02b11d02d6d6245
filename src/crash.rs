//! Named moments at which a test has a process die, as by SIGKILL or a power cut.
//!
//! Random kills find the wide windows; these are the narrow ones: between a record and what follows from it.
//! Only builds with debug assertions look at the variables. `tests/it/campaign/jobs.rs` (the scheduler and its
//! supervisors) and `tests/it/csi.rs` (the CSI driver) go through all of them.

use nix::sys::signal::{Signal, kill};

/// The variable that names the moment, and that of a file which is made by who dies: only one does.
const VARIABLE: &str = "LARDER_CRASH_POINT";
const ONCE: &str = "LARDER_CRASH_ONCE";

/// Dies here if that is what the variables say.
pub(crate) fn point(name: &str) {
    if !cfg!(debug_assertions) || std::env::var_os(VARIABLE).is_none_or(|wanted| wanted != name) {
        return;
    }
    if std::env::var_os(ONCE).is_some_and(|once| std::fs::File::create_new(once).is_ok()) {
        let _ = kill(nix::unistd::getpid(), Signal::SIGKILL);
        // The signal may take a moment, in which nothing else must happen.
        loop {
            std::thread::park();
        }
    }
}
