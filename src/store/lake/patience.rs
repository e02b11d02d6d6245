//! Waiting for a while, by a clock that goes on while the process stands still.
//!
//! A process that was stopped (SIGSTOP, a paused machine) finds all its times over when it goes on, though
//! it has looked at nothing meanwhile: what it waits for may lie in its sockets. To call that a stall would
//! throw away up to some MiB for each connection, and ask the store for them again.

use std::time::Duration;

use tokio::time::error::Elapsed;
use tokio::time::{Instant, timeout};

/// A wait that is over so much later than it should be was not looked at in time.
const STOOD_STILL: Duration = Duration::from_secs(1);

/// Waits for a future, for so long at most; once more where nobody could look in that time.
pub(crate) async fn within<F: Future>(patience: Duration, future: F) -> Result<F::Output, Elapsed> {
    tokio::pin!(future);
    let begun = Instant::now();
    match timeout(patience, &mut future).await {
        Err(_) if begun.elapsed() > patience + STOOD_STILL => timeout(patience, &mut future).await,
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_stood_still_looks_once_more() {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        tokio::spawn(async move {
            // Nothing runs on this thread meanwhile.
            std::thread::sleep(STOOD_STILL + Duration::from_millis(500));
            for _ in 0..20 {
                tokio::task::yield_now().await;
            }
            sender.send(7).expect("somebody waits");
        });
        assert_eq!(within(Duration::from_millis(100), receiver).await.expect("in time").expect("sent"), 7);
    }

    #[tokio::test]
    async fn what_never_comes_is_given_up() {
        assert!(within(Duration::from_millis(20), std::future::pending::<()>()).await.is_err());
    }
}
