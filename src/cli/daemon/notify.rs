//! What systemd is told: that the daemon is ready, and that it is alive (`Type=notify`, `WatchdogSec=`).

use std::time::Duration;

use crate::node::client::NodeClient;
use crate::node::daemon::Daemon;

/// Tells that the daemon is ready.
pub(super) fn ready() {
    tell("READY=1", true);
}

/// Tells at half of the watchdog's period that the daemon answers on its own socket. One that does not is
/// killed by systemd and started again; readers notice nothing.
pub(super) fn keep_watchdog_quiet(daemon: Daemon) {
    let period = std::env::var("WATCHDOG_USEC").ok().and_then(|text| text.parse().ok()).map(Duration::from_micros);
    let Some(period) = period.filter(|period| !period.is_zero()) else {
        return;
    };
    let client = NodeClient::at(&daemon.config().daemon.socket);
    let stop = daemon.stopping();
    tokio::spawn(async move {
        while !stop.is_cancelled() {
            if let Ok(Ok(_)) = tokio::time::timeout(period, client.info()).await {
                tell("WATCHDOG=1", false);
            }
            tokio::time::sleep(period / 2).await;
        }
    });
}

/// Tells one word; where it may not wait, a manager that does not listen misses it.
fn tell(what: &str, may_wait: bool) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let sent = std::os::unix::net::UnixDatagram::unbound().and_then(|socket| {
        use std::os::unix::ffi::OsStrExt;
        socket.set_nonblocking(!may_wait)?;
        match path.as_bytes().strip_prefix(b"@") {
            Some(name) => {
                use std::os::linux::net::SocketAddrExt;
                let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
                socket.send_to_addr(what.as_bytes(), &address)
            }
            None => socket.send_to(what.as_bytes(), &path),
        }
    });
    if let Err(error) = sent {
        tracing::debug!(%error, "the service manager was not told");
    }
}
