//! Listing a bucket in key order without reading all of it.
//!
//! A page descends to where the last one ended and reads on from there; it touches the directories
//! on the way and those whose keys it gives. A sorted directory is kept in memory, so that the pages
//! of one large flat directory cost one scan and not one each. It is used again only where the
//! directory's modification time has not moved and was already old when it was read: a change within
//! the clock's grain cannot be missed, whichever process makes it.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lru::LruCache;
use parking_lot::Mutex;

use super::names::{DirName, NameKind, decode_name, encode_name};

/// A directory that changed this recently is scanned again: coarser than any file system's clock.
const SETTLED: Duration = Duration::from_secs(2);
/// Names that are kept sorted in memory, over all directories: about 64 bytes each.
const CACHED_NAMES_MAX: usize = 1_000_000;

#[derive(Debug, Clone)]
struct Sorted {
    inode: u64,
    modified_ns: i128,
    names: Arc<[DirName]>,
}

/// Sorted directories, the least recently used leave first.
#[derive(Debug)]
pub struct DirCache {
    dirs: Mutex<(LruCache<PathBuf, Sorted>, usize)>,
}

impl Default for DirCache {
    fn default() -> Self {
        Self { dirs: Mutex::new((LruCache::unbounded(), 0)) }
    }
}

fn modified_ns(meta: &std::fs::Metadata) -> i128 {
    i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec())
}

impl DirCache {
    /// Gives the names in a directory, sorted; none where there is no directory.
    fn names(&self, path: &Path) -> io::Result<Arc<[DirName]>> {
        let meta = match std::fs::metadata(path) {
            Ok(meta) => meta,
            Err(error) if is_gone(&error) => return Ok(Arc::default()),
            Err(error) => return Err(error),
        };
        let modified_ns = modified_ns(&meta);
        if let Some(sorted) = self.dirs.lock().0.get(path)
            && (sorted.inode, sorted.modified_ns) == (meta.ino(), modified_ns)
        {
            return Ok(sorted.names.clone());
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let names = match scan(path) {
            Ok(names) => names,
            Err(error) if is_gone(&error) => return Ok(Arc::default()),
            Err(error) => return Err(error),
        };
        if now.saturating_sub(SETTLED).as_nanos() as i128 > modified_ns {
            self.keep(path, Sorted { inode: meta.ino(), modified_ns, names: names.clone() });
        }
        Ok(names)
    }

    fn keep(&self, path: &Path, sorted: Sorted) {
        let mut dirs = self.dirs.lock();
        let (cache, count) = &mut *dirs;
        *count += sorted.names.len() + 1;
        if let Some(before) = cache.put(path.to_path_buf(), sorted) {
            *count -= before.names.len() + 1;
        }
        while *count > CACHED_NAMES_MAX {
            let Some((_, oldest)) = cache.pop_lru() else {
                break;
            };
            *count -= oldest.names.len() + 1;
        }
    }
}

fn scan(path: &Path) -> io::Result<Arc<[DirName]>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path)? {
        let name = entry?.file_name();
        names.extend(name.to_str().and_then(decode_name));
    }
    names.sort_unstable_by(|a, b| a.sort.cmp(&b.sort));
    Ok(names.into())
}

/// Says whether a file or a directory on its way is not there.
pub fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// What to do after a key was met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Next,
    /// Leave out all further keys that begin so.
    SkipPrefix(Vec<u8>),
    Stop,
}

/// Where a walk begins.
#[derive(Debug, Clone, Default)]
pub struct WalkFrom {
    /// Only keys that begin so.
    pub prefix: Vec<u8>,
    /// Only keys behind this one.
    pub after: Vec<u8>,
    /// No keys that begin so.
    pub skip: Option<Vec<u8>>,
}

/// Meets the keys below `root` whose last name has `kind`, in order, with their paths.
pub fn walk(
    cache: &DirCache,
    root: &Path,
    kind: NameKind,
    from: WalkFrom,
    visit: &mut dyn FnMut(&[u8], &Path) -> io::Result<Step>,
) -> io::Result<()> {
    let mut walk = Walk { cache, kind, from, visit };
    walk.dir(root, &mut Vec::new()).map(drop)
}

struct Walk<'a> {
    cache: &'a DirCache,
    kind: NameKind,
    from: WalkFrom,
    visit: &'a mut dyn FnMut(&[u8], &Path) -> io::Result<Step>,
}

impl Walk<'_> {
    /// Walks one directory, whose keys all begin with `base`. False: the walk has ended.
    fn dir(&mut self, path: &Path, base: &mut Vec<u8>) -> io::Result<bool> {
        let names = self.cache.names(path)?;
        let base_len = base.len();
        for name in names.get(self.first(&names, base)..).unwrap_or_default() {
            base.truncate(base_len);
            base.extend_from_slice(&name.sort);
            if past(base, &self.from.prefix) {
                break;
            }
            if self.leaves_out(base, name.kind) {
                continue;
            }
            let below = path.join(encode_name(name));
            let goes_on = match name.kind {
                NameKind::Dir | NameKind::Chunk => self.dir(&below, base)?,
                _ => self.key(&below, base)?,
            };
            if !goes_on {
                return Ok(false);
            }
        }
        base.truncate(base_len);
        Ok(true)
    }

    /// Finds the first name that may lead to a key behind `after` with the prefix. All names before
    /// the last one that is not behind the target lead to earlier keys only: a name that leads to
    /// the target is a beginning of it, and no other name lies between the two.
    fn first(&self, names: &[DirName], base: &[u8]) -> usize {
        let target = (&self.from.after).max(&self.from.prefix);
        match target.strip_prefix(base) {
            Some(rest) => names.partition_point(|name| &*name.sort <= rest).saturating_sub(1),
            None => 0,
        }
    }

    fn leaves_out(&self, full: &[u8], kind: NameKind) -> bool {
        let from = &self.from;
        if from.skip.as_ref().is_some_and(|skip| full.starts_with(skip)) {
            return true;
        }
        match kind {
            NameKind::Dir | NameKind::Chunk => {
                let no_prefix = !full.starts_with(&from.prefix) && !from.prefix.starts_with(full);
                no_prefix || (full < from.after.as_slice() && !from.after.starts_with(full))
            }
            kind => {
                let done = !from.after.is_empty() && full <= from.after.as_slice();
                kind != self.kind || done || !full.starts_with(&from.prefix)
            }
        }
    }

    fn key(&mut self, path: &Path, key: &[u8]) -> io::Result<bool> {
        match (self.visit)(key, path)? {
            Step::Next => Ok(true),
            Step::SkipPrefix(skip) => {
                self.from.skip = Some(skip);
                Ok(true)
            }
            Step::Stop => Ok(false),
        }
    }
}

/// Says whether `full`, and with it all that follows in order, lies behind all keys with the prefix.
fn past(full: &[u8], prefix: &[u8]) -> bool {
    full > prefix && !full.starts_with(prefix) && !prefix.starts_with(full)
}

#[cfg(test)]
mod tests {
    use super::super::names::key_path;
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn make(root: &Path, keys: &BTreeSet<String>) {
        for key in keys {
            let path = key_path(root, key, NameKind::Object);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, b"").unwrap();
        }
    }

    fn list(root: &Path, from: WalkFrom, limit: usize) -> Vec<String> {
        let mut found = Vec::new();
        let mut visit = |key: &[u8], _: &Path| {
            found.push(String::from_utf8(key.to_vec()).unwrap());
            Ok(if found.len() == limit { Step::Stop } else { Step::Next })
        };
        walk(&DirCache::default(), root, NameKind::Object, from, &mut visit).unwrap();
        found
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_walk_meets_what_a_sorted_set_has(
            keys in proptest::collection::btree_set("[ab/!0]{1,4}|b{58,62}[/!0b]{0,2}", 1..30),
            prefix in "[ab/]{0,2}|b{59,61}",
            after in "[ab/!0]{0,4}|b{59,61}/?",
            limit in 1usize..8,
        ) {
            let dir = tempfile::tempdir().unwrap();
            make(dir.path(), &keys);
            let from = WalkFrom { prefix: prefix.clone().into(), after: after.clone().into(), skip: None };
            let expected: Vec<_> = keys
                .iter()
                .filter(|key| key.starts_with(&prefix) && (after.is_empty() || **key > after))
                .take(limit)
                .cloned()
                .collect();
            prop_assert_eq!(list(dir.path(), from, limit), expected);
        }
    }

    #[test]
    fn a_name_that_another_process_adds_is_seen_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let cache = DirCache::default();
        for round in 0..50 {
            std::fs::write(dir.path().join(format!("{round}.o")), b"").unwrap();
            assert_eq!(cache.names(dir.path()).unwrap().len(), round + 1);
        }
    }

    #[test]
    fn a_directory_at_rest_is_scanned_once() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.o"), b"").unwrap();
        let file = std::fs::File::open(dir.path()).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(60)).unwrap();
        let cache = DirCache::default();
        let first = cache.names(dir.path()).unwrap();
        assert!(Arc::ptr_eq(&first, &cache.names(dir.path()).unwrap()));
    }
}
