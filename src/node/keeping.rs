//! The daemon and its keeper: each starts the other one again. `docs/formats/handover.md` has the rules.

use std::collections::HashSet;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::fs::keeper::{self, Client, KeeperError, PACKET_BYTES_MAX};
use crate::fs::mount::MountedView;
use crate::fs::session::HANDOVER;

use super::api::{MountState, UpgradeRequest};
use super::daemon::{Daemon, blocking, own_exe};
use super::error::NodeError;
use super::mounting::Live;

/// How long a keeper is waited for that a service manager starts. After that who needs it gets the error: one
/// that this daemon started could not mount from its sandbox, and would die with it.
const KEEPER_COMES_WITHIN: Duration = Duration::from_secs(10);
/// What an environment may take in the message that gives it to the keeper.
const ENV_BYTES_MAX: usize = PACKET_BYTES_MAX / 2;
/// Said by a service manager to the process that it has started, and to no other one.
pub(super) const MANAGER_NAMES: [&str; 3] = ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"];

impl Daemon {
    /// Has the keeper start a daemon with these arguments when this one dies.
    pub fn restart_with(&self, args: Vec<String>) {
        let text = |text: std::ffi::OsString| text.into_string().ok();
        let env = std::env::vars_os().filter_map(|(name, value)| Some((text(name)?, text(value)?)));
        let env = fitting(env.filter(|(name, _)| !MANAGER_NAMES.contains(&name.as_str())).collect());
        // Asked for once, at the start.
        let _ = self.inner.restart.set(keeper::Restart { program: own_exe(), args, env });
    }

    /// Says that a service manager starts the keeper: then it is waited for a while.
    pub fn expect_keeper(&self) {
        self.inner.keeper_comes.store(true, Ordering::Release);
    }

    /// Gives the keeper; starts it on first need, and again where it was killed.
    pub(super) async fn keeper(&self) -> Result<Client, NodeError> {
        let mut known = self.inner.keeper.lock().await;
        if let Some(client) = known.clone() {
            let asked = client.clone();
            if blocking("asking the keeper", move || asked.is_same()).await? {
                return Ok(client);
            }
            tracing::warn!("the keeper was killed; another one is looked for, or started");
        }
        let (dir, exe) = (self.inner.keeper_dir.clone(), own_exe());
        let comes = self.inner.keeper_comes.load(Ordering::Acquire);
        let started = blocking("starting the keeper", move || {
            if comes { wait_for_keeper(&dir) } else { Client::start_or_connect(&dir, &exe) }
        })
        .await?;
        let client = started?;
        *known = Some(client.clone());
        drop(known);
        self.be_watched(client.clone()).await;
        self.give_mounts(&client).await?;
        Ok(client)
    }

    /// Finds the keeper that a daemon before this one has left, and tells it that we live.
    pub(super) async fn find_keeper(&self) -> Result<Option<Client>, NodeError> {
        let (dir, comes) = (self.inner.keeper_dir.clone(), self.inner.keeper_comes.load(Ordering::Acquire));
        // One that a service manager starts may be about to listen, with the mounts.
        let look = move || if comes { wait_for_keeper(&dir) } else { Client::connect(&dir) };
        match blocking("looking for the keeper", look).await? {
            Ok(_) => Ok(Some(self.keeper().await?)),
            Err(error) if error.is_absent() && !comes => Ok(None),
            // It lives, and has the mounts: who mounts over them leaves their readers to wait for ever.
            Err(error) => Err(error.into()),
        }
    }

    /// Gives the keeper the mounts that it does not have.
    async fn give_mounts(&self, client: &Client) -> Result<(), NodeError> {
        let views: Vec<_> = {
            let live = self.inner.live.lock();
            let mounted = live.values().filter_map(|live| match live {
                Live::Mounted(mounted) => mounted.served.view().filter(|view| view.is_alive()).cloned(),
                _ => None,
            });
            mounted.collect()
        };
        if views.is_empty() {
            return Ok(());
        }
        let client = client.clone();
        let given = blocking("giving the mounts to the keeper", move || {
            let kept: HashSet<_> = client.list()?.into_iter().map(|kept| kept.dir).collect();
            let is_missing = |view: &MountedView| !kept.contains(view.dir()) && !keeper::shows_image(view.dir());
            for view in views.iter().filter(|view| is_missing(view)) {
                match view.give_to(&client) {
                    Ok(()) => tracing::info!(dir = %view.dir().display(), "the keeper has the mount"),
                    Err(error) => tracing::error!(%error, "if this daemon dies now, the mount dies with it"),
                }
            }
            Ok::<(), KeeperError>(())
        });
        Ok(given.await??)
    }

    /// Has the keeper watch this process, and watches the keeper.
    async fn be_watched(&self, client: Client) {
        let restart = self.inner.restart.get().cloned();
        // A mount in the foreground has no next daemon.
        let has_successor = self.inner.table.is_some();
        let (asked, is_ready) = (client.clone(), self.inner.is_ready.load(Ordering::Acquire));
        let watch = move || {
            let watching = if has_successor { asked.watch(restart)? } else { asked.watch_to_the_end()? };
            if is_ready {
                asked.ready()?;
            }
            Ok::<_, KeeperError>(watching)
        };
        let watching = match blocking("asking the keeper to watch", watch).await {
            Ok(Ok(watching)) => watching,
            Ok(Err(error)) => {
                tracing::warn!(%error, "this process is not watched: if it dies, who reads its mounts waits for the next one");
                return;
            }
            Err(_) => return,
        };
        let (daemon, rt) = (self.clone(), tokio::runtime::Handle::current());
        let spawned = std::thread::Builder::new().name("keeper-watch".to_owned()).spawn(move || {
            watching.wait();
            // Where it is the same, another daemon has come to it.
            if !daemon.inner.stop.is_cancelled() && !client.is_same() {
                rt.spawn(daemon.start_keeper_again());
            }
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "the keeper is not watched");
        }
    }

    /// Boxed, because a keeper that was started is watched, and a watched one is started.
    fn start_keeper_again(self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async move {
            self.forget_gone();
            if !self.has_mounts() {
                return;
            }
            if let Err(error) = self.keeper().await {
                tracing::error!(%error, "there is no keeper; if this daemon dies now, its mounts die with it");
            }
        })
    }

    fn has_mounts(&self) -> bool {
        self.inner.live.lock().values().any(|live| matches!(live, Live::Mounted(_)))
    }

    /// Makes sure from time to time that there is a keeper, where there are mounts.
    pub(super) async fn look_after_keeper(&self) {
        if !self.has_mounts() {
            return;
        }
        let kept = match self.keeper().await {
            Ok(client) => self.give_mounts(&client).await,
            Err(error) => Err(error),
        };
        if let Err(error) = kept {
            tracing::warn!(%error, "the keeper cannot be asked");
        }
    }

    async fn tell_keeper(
        &self,
        what: &'static str,
        tell: impl FnOnce(&Client) -> Result<(), KeeperError> + Send + 'static,
    ) {
        let Some(client) = self.inner.keeper.lock().await.clone() else {
            return;
        };
        if let Ok(Err(error)) = blocking(what, move || tell(&client)).await {
            tracing::info!(%error, what, "the keeper did not take it");
        }
    }

    /// Tells the keeper that what was mounted is served again.
    pub async fn tell_ready(&self) {
        self.inner.is_ready.store(true, Ordering::Release);
        self.tell_keeper("telling the keeper that we serve", Client::ready).await;
        self.inner.told_ready.store(true, Ordering::Release);
    }

    /// Tells the keeper that this daemon will end, and that no other one is to be started.
    pub async fn tell_end(&self) {
        self.tell_keeper("telling the keeper that we end", Client::unwatch).await;
    }

    /// Makes sure that another daemon can take over, and has the keeper start it when this one ends. Where it
    /// does not come up, the keeper starts this one again. An error has changed nothing.
    pub(super) async fn prepare_upgrade(&self, request: UpgradeRequest) -> Result<(), NodeError> {
        let no = |why: String| NodeError::NoUpgrade { why };
        if request.handover != HANDOVER {
            let theirs = request.handover;
            return Err(no(format!("it hands mounts over by version {HANDOVER}, the other one by version {theirs}")));
        }
        if !request.program.is_file() {
            return Err(no(format!("{} is not there", request.program.display())));
        }
        let Some(own) = self.inner.restart.get() else {
            return Err(no(
                "a service manager starts it, or daemon.restart is off: replace the program and start it again"
                    .to_owned(),
            ));
        };
        self.forget_gone();
        for live in self.inner.live.lock().values() {
            match live {
                Live::Mounting(row) => return Err(NodeError::Busy { dir: row.dir().to_owned() }),
                Live::Mounted(mounted) if mounted.served.view().is_some_and(|view| !view.can_hand_over()) => {
                    return Err(no("this kernel (before 6.9) does not send requests again; stop the daemon and start the other one".to_owned()));
                }
                Live::Mounted(_) | Live::Failed { .. } => {}
            }
        }
        let restart = keeper::Restart { program: request.program, args: request.args, env: own.env.clone() };
        let keeper = self.keeper().await?;
        Ok(blocking("telling the keeper what comes", move || keeper.replace(restart)).await??)
    }

    /// Names what should be mounted and is not.
    pub(super) fn not_ready(&self) -> Vec<String> {
        // Before the table was gone through, nothing may be listed yet.
        let begins = (!self.inner.is_ready.load(Ordering::Acquire)).then(|| "the daemon begins".to_owned());
        let mounts = self.mounts().into_iter().filter(|mount| mount.state != MountState::Mounted);
        let mounts =
            mounts.map(|mount| format!("{}: {}", mount.dir.display(), mount.reason.unwrap_or(mount.state.to_string())));
        begins.into_iter().chain(mounts).collect()
    }

    /// Ends the keeper, unless it still has a mount.
    pub async fn stop_keeper(&self) {
        self.tell_keeper("ending the keeper", Client::stop).await;
    }
}

fn wait_for_keeper(dir: &Path) -> Result<Client, KeeperError> {
    let until = Instant::now() + KEEPER_COMES_WITHIN;
    loop {
        match Client::connect(dir) {
            Err(_) if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
            other => return other,
        }
    }
}

/// Gives the environment, or of one that is too long for the keeper what a daemon uses.
fn fitting(mut env: Vec<(String, String)>) -> Vec<(String, String)> {
    let is_used = |name: &str| {
        let starts = ["XDG_", "LARDER_", "AWS_", "SSL_", "RUST_"].iter().any(|prefix| name.starts_with(prefix));
        starts || name.to_ascii_uppercase().ends_with("_PROXY") || ["PATH", "HOME", "TMPDIR", "TZ"].contains(&name)
    };
    if serde_json::to_vec(&env).is_ok_and(|bytes| bytes.len() > ENV_BYTES_MAX) {
        tracing::warn!("the environment is long: a daemon that the keeper starts gets the part of it that larder uses");
        env.retain(|(name, _)| is_used(name));
    }
    env
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_long_environment_the_keeper_gets_what_a_daemon_uses() {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let used =
            ["PATH", "HOME", "LARDER_LAKE", "AWS_REGION", "https_proxy", "SSL_CERT_FILE"].map(|name| pair(name, "v"));
        let short: Vec<_> = used.iter().cloned().chain([pair("OTHER", "v")]).collect();
        assert_eq!(fitting(short.clone()), short);
        let long: Vec<_> = short.into_iter().chain([pair("FUNCTIONS", &"\n".repeat(ENV_BYTES_MAX / 2))]).collect();
        assert_eq!(fitting(long), used);
    }
}
