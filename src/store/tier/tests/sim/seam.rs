//! The seam that simulated nodes use: the simulated file system, and one rule of the protocol broken
//! where a test wants to see that it is missed.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::sync::Arc;

use nix::libc;
use parking_lot::Mutex;

use super::baton::Baton;
use super::broken::Broken;
use crate::store::tier::io::Listed;
use crate::store::tier::{Space, Stat, TierFile, TierIo};
use crate::testkit::sim_tier::{SimFile, SimIo};

/// A client of the simulated server.
#[derive(Debug)]
pub(super) struct Seam {
    pub(super) io: SimIo,
    /// Folders of objects in which a pack can lie; the others are always empty and cost no step.
    pub(super) fans: Vec<String>,
    pub(super) broken: Option<Broken>,
    pub(super) baton: Arc<Baton>,
    pub(super) skew_ms: i64,
    /// What a broken rule answers from, by actor.
    pub(super) seen: Mutex<BTreeMap<usize, Seen>>,
}

/// What an actor saw in its public call.
#[derive(Debug, Default)]
pub(super) struct Seen {
    call: u64,
    lists: BTreeMap<String, Vec<Listed>>,
    gone: BTreeSet<String>,
    moved: bool,
    /// Turns of others that were moved aside, by their names there.
    taken: BTreeSet<String>,
    generations: BTreeMap<String, String>,
}

/// An open file.
#[derive(Debug)]
pub(super) struct SeamFile {
    pub(super) file: SimFile,
    broken: Option<Broken>,
}

fn is_turn(path: &str) -> bool {
    path.contains("/leases/") || path.ends_with(".claim") || path == "steward/lease"
}

impl Seam {
    fn breaks(&self, rule: Broken) -> bool {
        self.broken == Some(rule)
    }

    fn seen<T>(&self, look: impl FnOnce(&mut Seen) -> T) -> T {
        let (actor, call) = self.baton.call_number();
        let mut all = self.seen.lock();
        let seen = all.entry(actor).or_default();
        if seen.call != call {
            let generations = std::mem::take(&mut seen.generations);
            *seen = Seen { call, generations, ..Seen::default() };
        }
        look(seen)
    }

    fn file(&self, file: SimFile) -> SeamFile {
        SeamFile { file, broken: self.broken }
    }

    /// Says whether a second look at a folder gets the first one's answer.
    fn is_blind(&self, dir: &str) -> bool {
        match self.broken {
            Some(Broken::LeasesSeenOnce) => dir.ends_with("/leases"),
            Some(Broken::RecordSeenOnceByKeep) => dir.starts_with("commits/") && self.baton.call_name() == "keep",
            Some(Broken::RecordsSeenOnce) => {
                dir.starts_with("commits") && !dir.ends_with("/leases") && self.seen(|seen| seen.moved)
            }
            _ => false,
        }
    }

    /// With one generation for all, names in staging do not say whose they are.
    fn one_generation<'a>(&self, path: &'a str) -> std::borrow::Cow<'a, str> {
        let Some(rest) = path.strip_prefix("staging/").filter(|_| self.breaks(Broken::NoGenerations)) else {
            return path.into();
        };
        let Some((pack, name)) = rest.split_once('/') else {
            return path.into();
        };
        let is_generation = |part: &&str| part.len() == 32;
        let Some(generation) = name.split('.').find(is_generation) else {
            return path.into();
        };
        self.seen(|seen| seen.generations.insert(pack.to_owned(), generation.to_owned()));
        path.replace(generation, &"0".repeat(32)).into()
    }

    fn own_generation(&self, dir: &str, names: &mut [Listed]) {
        let Some(pack) = dir.strip_prefix("staging/").filter(|_| self.breaks(Broken::NoGenerations)) else {
            return;
        };
        if let Some(generation) = self.seen(|seen| seen.generations.get(pack).cloned()) {
            for listed in names {
                listed.name = listed.name.replace(&"0".repeat(32), &generation);
            }
        }
    }

    fn copy(&self, from: &str, to: &str) -> io::Result<()> {
        let source = self.io.open(from, false)?;
        let mut bytes = vec![0; usize::try_from(source.stat()?.size_bytes).unwrap_or(0)];
        source.read_at(&mut bytes, 0)?;
        let copy = self.io.create(to)?;
        copy.write_at(&bytes, 0)?;
        copy.sync()
    }
}

impl TierIo for Seam {
    type File = SeamFile;

    fn open(&self, path: &str, write: bool) -> io::Result<SeamFile> {
        Ok(self.file(self.io.open(&self.one_generation(path), write)?))
    }

    fn create(&self, path: &str) -> io::Result<SeamFile> {
        Ok(self.file(self.io.create(&self.one_generation(path))?))
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        let (from, to) = (&*self.one_generation(from), &*self.one_generation(to));
        match self.broken {
            Some(Broken::NotPutBack) if from.starts_with("trash/") && to.starts_with("objects/") => {
                return Err(io::Error::from_raw_os_error(libc::EEXIST));
            }
            Some(Broken::TakenOverUnseen) if self.seen(|seen| seen.taken.contains(from)) => {
                return Err(io::Error::from_raw_os_error(libc::EEXIST));
            }
            Some(Broken::PublishedByCopy) if from.starts_with("staging/") => return self.copy(from, to),
            Some(Broken::HoldUntold) if to.ends_with("/hold") => return Ok(()),
            Some(Broken::ClaimsReplace) if to.ends_with(".claim") => return self.io.rename(from, to),
            Some(Broken::RecordsSeenOnce) => self.seen(|seen| seen.moved = false),
            _ => {}
        }
        self.io.link(from, to)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let (from, to) = (&*self.one_generation(from), &*self.one_generation(to));
        self.io.rename(from, to)?;
        if self.broken.is_some() {
            self.seen(|seen| {
                seen.moved = from.starts_with("objects/") && !from.contains('.') && to.starts_with("trash/");
                seen.gone.insert(from.to_owned());
                if is_turn(from) {
                    seen.taken.insert(to.to_owned());
                }
            });
        }
        Ok(())
    }

    fn unlink(&self, path: &str) -> io::Result<()> {
        if self.breaks(Broken::NothingRemoved) && path.starts_with("tmp/") {
            return Ok(());
        }
        self.io.unlink(&self.one_generation(path))
    }

    fn mkdir(&self, path: &str) -> io::Result<()> {
        self.io.mkdir(path)
    }

    fn rmdir(&self, path: &str) -> io::Result<()> {
        self.io.rmdir(path)
    }

    fn list(&self, dir: &str) -> io::Result<Vec<Listed>> {
        if dir.starts_with("objects/") && !self.fans.iter().any(|fan| fan == dir) {
            return Ok(Vec::new());
        }
        if self.is_blind(dir)
            && let Some(first) = self.seen(|seen| {
                let mut names = seen.lists.get(dir).cloned()?;
                names.retain(|listed| !seen.gone.contains(&format!("{dir}/{}", listed.name)));
                Some(names)
            })
        {
            return Ok(first);
        }
        let mut names = self.io.list(dir)?;
        self.own_generation(dir, &mut names);
        if self.broken.is_some() {
            self.seen(|seen| seen.lists.insert(dir.to_owned(), names.clone()));
        }
        Ok(names)
    }

    fn stat(&self, path: &str) -> io::Result<Stat> {
        let mut stat = self.io.stat(&self.one_generation(path))?;
        if self.breaks(Broken::CountedTwice) && !path.starts_with("quarantine") {
            let mut hasher = DefaultHasher::new();
            path.hash(&mut hasher);
            stat.file_id = hasher.finish();
        }
        Ok(stat)
    }

    fn touch(&self, path: &str) -> io::Result<Stat> {
        let mut stat = self.io.touch(&self.one_generation(path))?;
        if self.breaks(Broken::HostsClock) && path.starts_with("nodes/") {
            stat.mtime_ns += self.skew_ms * 1_000_000;
        }
        Ok(stat)
    }

    fn refresh(&self, dir: &str) -> io::Result<()> {
        if self.breaks(Broken::NoRefresh) {
            return Ok(());
        }
        self.io.refresh(dir)
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        if self.breaks(Broken::NamesNotSynced) {
            return Ok(());
        }
        self.io.sync_dir(dir)
    }

    fn is_remote(&self) -> bool {
        self.io.is_remote()
    }

    fn space(&self) -> io::Result<Space> {
        self.io.space()
    }
}

impl TierFile for SeamFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_at(bytes, offset)
    }

    fn extend(&self, len_bytes: u64) -> io::Result<()> {
        if self.broken == Some(Broken::Truncated) {
            self.file.truncate()?;
        }
        self.file.extend(len_bytes)
    }

    fn stat(&self) -> io::Result<Stat> {
        self.file.stat()
    }

    fn sync(&self) -> io::Result<()> {
        match self.broken {
            Some(Broken::BytesNotSynced) => Ok(()),
            Some(Broken::NamesNotSynced) => self.file.sync_data(),
            _ => self.file.sync(),
        }
    }
}
