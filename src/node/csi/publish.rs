//! Publish and unpublish: one mount for each commit and set of effective options, shown at as many targets as ask.
//!
//! `docs/formats/csi.md` has the steps and what a crash behind each leaves. Every step looks first whether it is done
//! already, and asks the mount table and the books, never a file system that may hang.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;

use super::books::{Pod, Record};
use super::driver::{Driver, LOOK_INTERVAL, parent_is_gone, real, shown};
use super::error::CsiError;
use super::volume::{Attributes, Wanted, short_digest};
use crate::config::EngineChoice;
use crate::crash;
use crate::format::grants::Right;
use crate::fs::keeper::Shown;
use crate::node::api::{
    BindRequest, FillRequest, MountRequest, MountState, ResolveInfo, ResolveRequest, UmountRequest,
};

/// What the kubelet asks for.
#[derive(Debug, Clone)]
pub struct Publish {
    pub volume_id: String,
    pub target: PathBuf,
    pub attributes: Attributes,
    pub pod: Pod,
}

/// How often and how long a mount is waited for that another call makes.
const MOUNTING_FOR_MAX: Duration = Duration::from_secs(600);
/// So many mounts are taken away from one directory. More are none that end: they are not to be reached from here.
const STACK_MAX: usize = 16;

impl Driver {
    /// Shows a volume at a target. Gives what is shown.
    pub async fn publish(&self, ask: Publish) -> Result<Record, CsiError> {
        let wanted = Wanted::parse(&ask.attributes)?;
        let _target = self.lock_target(&ask.target).await?;
        let known = self.books().find(&ask.target)?;
        let is_new = known.is_none();
        let found = match known {
            Some(record) if record.volume_id == ask.volume_id && record.attributes == ask.attributes => record,
            Some(_) => return Err(CsiError::Taken { target: ask.target }),
            None => self.resolve(&ask, &wanted).await?,
        };
        if !is_new && self.is_shown(&found)? {
            return Ok(found);
        }
        self.wait_until_ready().await?;
        let made = self.make(found, &wanted).await;
        if let (Err(_), true) = (&made, is_new) {
            // The kubelet takes most errors for final, and does not come back to unpublish.
            self.undo(&ask.target).await;
        }
        let record = made?;
        self.tell(&record);
        Ok(record)
    }

    /// Finds out what the revision is now, and whether the pod may have it.
    async fn resolve(&self, ask: &Publish, wanted: &Wanted) -> Result<Record, CsiError> {
        let mut rights = vec![Right::Mount];
        rights.extend(wanted.request.ttl.map(|_| Right::Cache));
        let request = ResolveRequest { revision: wanted.text.clone(), pod: Some(ask.pod.principal()), rights };
        let resolved = self.daemon().resolve(&request).await;
        let ResolveInfo { dataset, commit } =
            match resolved.map_err(CsiError::of_daemon("the volume cannot be mounted")) {
                Ok(resolved) => resolved,
                Err(error) => return Err(self.explain(error).await),
            };
        let mut record = Record {
            format: Record::FORMAT,
            volume_id: ask.volume_id.clone(),
            target: ask.target.clone(),
            attributes: ask.attributes.clone(),
            dataset,
            revision: wanted.text.clone(),
            commit,
            engine: first_engine(wanted.engine),
            key: String::new(),
            pod: ask.pod.clone(),
            since_ms: crate::node::daemon::now_ms(),
        };
        record.key = key_of(&record, wanted);
        Ok(record)
    }

    /// An error that may come from the lake says so where the lake is in trouble.
    async fn explain(&self, error: CsiError) -> CsiError {
        match error.refused_with() {
            Some(500..) => self.lake_trouble().await.unwrap_or(error),
            _ => error,
        }
    }

    /// Makes everything that a record speaks of, as far as it is not there.
    async fn make(&self, record: Record, wanted: &Wanted) -> Result<Record, CsiError> {
        let made = self.make_with(&record, wanted).await;
        match made {
            // `auto`, and the kernel cannot serve it now: the daemon does.
            Err(CsiError::Kernel { source, .. })
                if wanted.engine == EngineChoice::Auto && record.engine == EngineChoice::Kernel =>
            {
                tracing::info!(error = %source, revision = record.revision, "the kernel engine cannot serve it now: FUSE does");
                let mut other = Record { engine: EngineChoice::Fuse, ..record };
                other.key = key_of(&other, wanted);
                self.make_with(&other, wanted).await?;
                Ok(other)
            }
            other => other.map(|()| record),
        }
    }

    async fn make_with(&self, record: &Record, wanted: &Wanted) -> Result<(), CsiError> {
        let _mount = self.lock_mount(&record.key).await?;
        self.books().write(record)?;
        crash::point("recorded");
        self.ensure_mounted(record, wanted).await?;
        crash::point("mounted");
        let target = real(&record.target)?;
        self.clear_target(&target, record).await?;
        crash::point("target_made");
        self.show(&target, record).await?;
        crash::point("bound");
        Ok(())
    }

    /// Says whether the target shows the record's mount already.
    fn is_shown(&self, record: &Record) -> Result<bool, CsiError> {
        if parent_is_gone(&record.target) {
            return Ok(false);
        }
        let mount = shown(&self.books().mount_dir(&record.key))?;
        Ok(mount.as_ref().is_some_and(|mount| mount.is_ours) && shown(&real(&record.target)?)? == mount)
    }

    /// Has the daemon mount the record's commit, unless it has.
    async fn ensure_mounted(&self, record: &Record, wanted: &Wanted) -> Result<(), CsiError> {
        let dir = self.books().mount_dir(&record.key);
        let until = tokio::time::Instant::now() + MOUNTING_FOR_MAX;
        loop {
            match self.mounts().await?.remove(&record.key) {
                Some(mount) if mount.state == MountState::Mounted => return Ok(()),
                Some(mount) if mount.state == MountState::Failed => {
                    // The daemon tries again by itself; who reads through other targets waits for that.
                    return Err(CsiError::Unserved { reason: mount.reason.unwrap_or_default() });
                }
                Some(_) => {}
                None => {
                    self.clear_mount_dir(&dir).await?;
                    match self.mount(record, wanted, &dir).await {
                        // Another call of the daemon's has the directory at this moment.
                        Err(error) if error.refused_with() == Some(409) => {}
                        other => return other,
                    }
                }
            }
            if tokio::time::Instant::now() >= until {
                return Err(CsiError::Busy { waited: MOUNTING_FOR_MAX });
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// Makes the directory of a mount; what nobody serves there is taken away.
    async fn clear_mount_dir(&self, dir: &Path) -> Result<(), CsiError> {
        self.take_away(dir, None).await?;
        make_dir(dir)
    }

    /// Takes away what is mounted at a directory and is ours, but for one mount. Gives what is there then.
    async fn take_away(&self, at: &Path, but: Option<&Shown>) -> Result<Option<Shown>, CsiError> {
        for _ in 0..STACK_MAX {
            match shown(at)? {
                Some(here) if here.is_ours && Some(&here) != but => self.unbind(at).await?,
                other => return Ok(other),
            }
        }
        Err(CsiError::NotPropagated { target: at.to_owned() })
    }

    async fn mount(&self, record: &Record, wanted: &Wanted, dir: &Path) -> Result<(), CsiError> {
        let request = MountRequest { dir: dir.to_owned(), ..mount_request(record, wanted) };
        let mounted = self.daemon().mount(&request).await;
        let Err(error) = mounted.map(drop).map_err(CsiError::of_daemon("the volume cannot be mounted")) else {
            return Ok(());
        };
        let error = self.explain(error).await;
        let is_the_engines = record.engine == EngineChoice::Kernel && matches!(error.refused_with(), Some(500..));
        match error {
            CsiError::Daemon { source, .. } if is_the_engines => {
                let filling = if wanted.engine == EngineChoice::Auto { None } else { self.fill(record, wanted).await };
                Err(filling.unwrap_or(CsiError::Kernel { revision: record.revision.clone(), source }))
            }
            error => Err(error),
        }
    }

    /// Begins to bring into the tier what the kernel engine waits for; says how far that is. None: that is not what
    /// is in the way.
    async fn fill(&self, record: &Record, wanted: &Wanted) -> Option<CsiError> {
        let begun = self.inner.fills.lock().get(&record.key).copied();
        let running = match begun {
            Some(id) => self.daemon().fill_info(&id, Duration::ZERO).await.ok(),
            None => None,
        };
        let info = match running.filter(|info| !info.finished) {
            Some(info) => info,
            None => {
                let revision = exact(record);
                let request = FillRequest { revision, tier: wanted.request.tier.clone(), ..FillRequest::default() };
                let info = self.daemon().fill(&request).await.ok()?;
                // One that is complete says so in a moment.
                let info = self.daemon().fill_info(&info.id, Duration::from_secs(1)).await.ok()?;
                self.inner.fills.lock().insert(record.key.clone(), info.id);
                info
            }
        };
        if info.finished {
            self.inner.fills.lock().remove(&record.key);
            return None;
        }
        let (revision, done, total) = (record.revision.clone(), info.bytes_done, info.bytes_total);
        Some(CsiError::Filling { revision, done, total })
    }

    /// Makes the target's directory, and takes away what is mounted there and is ours, but not this mount.
    async fn clear_target(&self, target: &Path, record: &Record) -> Result<(), CsiError> {
        let mount = shown(&self.books().mount_dir(&record.key))?;
        match self.take_away(target, mount.as_ref()).await? {
            None => make_dir(target),
            here if here == mount => Ok(()),
            Some(_) => Err(CsiError::Foreign { target: target.to_owned() }),
        }
    }

    /// Shows the mount at the target.
    async fn show(&self, target: &Path, record: &Record) -> Result<(), CsiError> {
        let dir = self.books().mount_dir(&record.key);
        let is_there = || Ok::<_, CsiError>(shown(&dir)?.is_some() && shown(target)? == shown(&dir)?);
        if is_there()? {
            return Ok(());
        }
        let request = BindRequest { dir: dir.clone(), target: target.to_owned() };
        let bound = self.daemon().bind(&request).await;
        bound.map_err(CsiError::of_daemon("the volume cannot be shown to the pod"))?;
        if is_there()? { Ok(()) } else { Err(CsiError::NotPropagated { target: target.to_owned() }) }
    }

    /// Takes back what a publish that failed has made.
    async fn undo(&self, target: &Path) {
        if let Err(error) = self.take_down(target).await {
            tracing::warn!(error = error.text(), target = %target.display(), "what a publish that failed has made stays until it is unpublished");
        }
        // Later: the kubelet waits to hear what is wrong.
        let driver = self.clone();
        tokio::spawn(async move { driver.sweep().await });
    }

    /// Tells the pod what its volume is.
    fn tell(&self, record: &Record) {
        let Record { revision, commit, engine, volume_id, pod, .. } = record;
        let note = format!("{revision} is commit {commit} (volume {volume_id}, {} engine)", engine.name());
        tracing::info!(namespace = pod.namespace, pod = pod.name, target = %record.target.display(), "{note}");
        if let Some(kube) = self.inner.kube.as_ref().filter(|_| !pod.uid.is_empty()) {
            kube.tell(pod, "LarderMounted", &note);
        }
    }

    /// Takes a volume away from a target.
    pub async fn unpublish(&self, volume_id: &str, target: &Path) -> Result<(), CsiError> {
        let _target = self.lock_target(target).await?;
        let record = self.books().find(target)?;
        if record.is_some_and(|record| record.volume_id != volume_id) {
            return Err(CsiError::NotPublished { target: target.to_owned() });
        }
        self.take_down(target).await?;
        self.sweep().await;
        Ok(())
    }

    async fn take_down(&self, target: &Path) -> Result<(), CsiError> {
        if !parent_is_gone(target) {
            let at = real(target)?;
            if self.take_away(&at, None).await?.is_some() {
                return Err(CsiError::Foreign { target: at });
            }
            crash::point("unbound");
            match std::fs::remove_dir(&at) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(CsiError::Io { path: at, doing: "be removed", source: error });
                }
                _ => {}
            }
            crash::point("target_removed");
        }
        self.books().remove(target)?;
        crash::point("forgotten");
        Ok(())
    }

    /// Unmounts what no record names any more. Says whether everything could be looked at.
    pub async fn sweep(&self) -> bool {
        let swept = self.try_sweep().await;
        if let Err(error) = &swept {
            tracing::warn!(error = error.text(), "mounts that no pod uses stay until the next sweep");
        }
        swept.is_ok()
    }

    async fn try_sweep(&self) -> Result<(), CsiError> {
        self.wait_until_ready().await?;
        let listed = self.mounts().await?;
        let mut keys = self.books().keys()?;
        keys.extend(listed.keys().cloned());
        keys.sort_unstable();
        keys.dedup();
        let records = self.books().all()?;
        keys.retain(|key| !records.iter().any(|record| record.key == *key));
        for key in keys {
            // Who has the lock publishes at this moment, and wants it.
            let Some(_mount) = self.try_lock_mount(&key) else {
                continue;
            };
            // Since then it may have been wanted again.
            if self.books().all()?.iter().any(|record| record.key == key) {
                continue;
            }
            if let Err(error) = self.end_mount(&key).await {
                tracing::warn!(error = error.text(), key, "a mount that no pod uses stays until the next sweep");
            }
        }
        Ok(())
    }

    async fn end_mount(&self, key: &str) -> Result<(), CsiError> {
        let dir = self.books().mount_dir(key);
        if self.mounts().await?.contains_key(key) {
            let umount = |force| UmountRequest { dir: dir.clone(), force };
            let ended = match self.daemon().umount(&umount(false)).await {
                // Whoever looks at it is no pod.
                Err(_) => self.daemon().umount(&umount(true)).await,
                ended => ended,
            };
            let failed = CsiError::of_daemon("a mount that no pod uses cannot be unmounted");
            ended.map(drop).map_err(failed).or_else(|error| match error.refused_with() {
                Some(404) => Ok(()),
                _ => Err(error),
            })?;
            tracing::info!(dir = %dir.display(), "unmounted: no pod uses it any more");
        }
        self.take_away(&dir, None).await?;
        match std::fs::remove_dir(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(CsiError::Io { path: dir, doing: "be removed", source: error });
            }
            _ => {}
        }
        crash::point("swept");
        Ok(())
    }

    /// Forgets records of pods that are gone: nobody will come to unpublish them.
    pub async fn forget_gone_pods(&self) {
        let all = match self.books().all() {
            Ok(all) => all,
            Err(error) => return tracing::warn!(%error, "the books cannot be read"),
        };
        for record in all.iter().filter(|record| parent_is_gone(&record.target)) {
            let Ok(_target) = self.lock_target(&record.target).await else {
                continue;
            };
            if parent_is_gone(&record.target) {
                tracing::info!(target = %record.target.display(), "forgotten: the pod is gone");
                if let Err(error) = self.books().remove(&record.target) {
                    tracing::warn!(%error, "a record of a pod that is gone stays");
                }
            }
        }
    }
}

/// What is tried first.
fn first_engine(wanted: EngineChoice) -> EngineChoice {
    match wanted {
        EngineChoice::Fuse => EngineChoice::Fuse,
        EngineChoice::Kernel | EngineChoice::Auto => EngineChoice::Kernel,
    }
}

/// Names the commit itself.
fn exact(record: &Record) -> String {
    format!("{}@{}", record.dataset, record.commit)
}

/// What the daemon is asked for, but for the directory.
fn mount_request(record: &Record, wanted: &Wanted) -> MountRequest {
    MountRequest { revision: exact(record), engine: Some(record.engine), ..wanted.request.clone() }
}

/// Names the mount: the same for the same commit with the same options.
fn key_of(record: &Record, wanted: &Wanted) -> String {
    let request = mount_request(record, wanted);
    short_digest(&serde_json::to_vec(&request).unwrap_or_default())
}

/// Makes a directory that is nobody's but ours; one that is there is fine.
fn make_dir(dir: &Path) -> Result<(), CsiError> {
    let at = |source| CsiError::Io { path: dir.to_owned(), doing: "be made", source };
    match std::fs::create_dir(dir) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let meta = std::fs::symlink_metadata(dir).map_err(at)?;
            if meta.is_dir() { Ok(()) } else { Err(at(Errno::ENOTDIR.into())) }
        }
        Err(error) => Err(at(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::ids::CommitId;

    fn of(pairs: &[(&str, &str)], commit: u8, engine: EngineChoice) -> String {
        let attributes: Attributes = pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        let wanted = Wanted::parse(&attributes).expect("is right");
        let record = Record {
            format: Record::FORMAT,
            volume_id: "v".into(),
            target: "/t".into(),
            attributes,
            dataset: "xray".into(),
            revision: wanted.text.clone(),
            commit: CommitId([commit; 32]),
            engine,
            key: String::new(),
            pod: Pod::default(),
            since_ms: 0,
        };
        key_of(&record, &wanted)
    }

    #[test]
    fn the_same_commit_with_the_same_options_is_one_mount_however_it_is_called() {
        let fuse = EngineChoice::Fuse;
        let tag = of(&[("dataset", "xray@v2")], 1, fuse);
        assert_eq!(tag, of(&[("dataset", "xray@main"), ("uid", "0"), ("subdir", "/")], 1, fuse));
        assert_eq!(tag, of(&[("dataset", "xray"), ("engine", "auto")], 1, fuse));
        for other in [
            of(&[("dataset", "xray@v2")], 2, fuse),
            of(&[("dataset", "xray@v2")], 1, EngineChoice::Kernel),
            of(&[("dataset", "xray@v2"), ("subdir", "a")], 1, fuse),
            of(&[("dataset", "xray@v2"), ("uid", "1")], 1, fuse),
            of(&[("dataset", "xray@v2"), ("verify", "always")], 1, fuse),
            of(&[("dataset", "xray@v2"), ("ttl", "1d")], 1, fuse),
        ] {
            assert_ne!(tag, other);
        }
    }
}
