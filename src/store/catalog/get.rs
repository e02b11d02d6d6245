//! Contents copied out of a commit: get and cat.
//!
//! Directories are made on the way down and get their modes and times at the end, when nothing is
//! written into them any more. Files are written in parallel, each with its mode, its time and its holes.
//! A file that cannot be read is named and does not stop the others.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::{StreamExt, TryStreamExt, stream};
use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use tokio::task::JoinSet;

use crate::format::placement::Location;
use crate::format::tree::nav::{self, EntryAt, NavError};
use crate::format::tree::{EntryKind, Mtime};
use crate::store::catalog::scan::Walk;
use crate::store::catalog::{Catalog, Snapshot};
use crate::store::fetch::{ContentRef, FetchError, Fetcher, Verify};
use crate::store::meta::MetaError;

/// How many files are written at a time.
const FILES_PARALLEL: usize = 16;
/// How much one read asks for, and how many run for one file.
const READ_LEN: u32 = 8 << 20;
const READS_PARALLEL: usize = 4;
/// How many failures are named; the rest is counted.
const FAILED_NAMED_MAX: usize = 1000;

/// How far a get is.
#[derive(Debug, Default)]
pub struct GetProgress {
    pub bytes: AtomicU64,
    pub files: AtomicU64,
}

/// A file that could not be copied out.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Failed {
    pub path: String,
    pub why: String,
}

/// What was copied out.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct GetReport {
    pub files: u64,
    pub dirs: u64,
    pub symlinks: u64,
    pub hard_links: u64,
    pub bytes: u64,
    pub failed_count: u64,
    pub failed: Vec<Failed>,
}

/// Why contents cannot be copied out.
#[derive(Debug, thiserror::Error)]
pub enum GetError {
    #[error("the commit has no `{path}`; `larder ls` shows what it has")]
    NoPath { path: String },
    #[error("`{path}` is a directory; `larder get` copies directories")]
    IsDir { path: String },
    #[error("`{path}` is a symbolic link to `{target}`; name that one")]
    IsSymlink { path: String, target: String },
    #[error("{} is there already and not an empty directory; name another place", path.display())]
    Exists { path: PathBuf },
    #[error("{}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("`{path}` cannot be read")]
    Fetch {
        path: String,
        #[source]
        source: FetchError,
    },
    #[error(transparent)]
    Meta(#[from] MetaError),
}

fn io_at(path: &Path) -> impl FnOnce(io::Error) -> GetError + '_ {
    move |source| GetError::Io { path: path.to_owned(), source }
}

/// An entry of a snapshot by its path; the root has no entry.
#[derive(Debug, Clone)]
pub struct Found {
    pub path: Vec<u8>,
    pub at: Option<EntryAt>,
}

/// Finds a path in a snapshot.
pub async fn find(catalog: &Catalog, snap: &Snapshot, path: &[u8]) -> Result<Found, GetError> {
    let trimmed = trim(path);
    let found = catalog.meta.drive(|blocks| nav::resolve(&snap.root, blocks, &trimmed)).await;
    match found {
        Ok(at) => Ok(Found { path: trimmed, at }),
        Err(MetaError::Nav(NavError::NotFound | NavError::NotDir)) => {
            Err(GetError::NoPath { path: String::from_utf8_lossy(path).into_owned() })
        }
        Err(error) => Err(error.into()),
    }
}

/// Takes needless slashes and `.` out of a path.
fn trim(path: &[u8]) -> Vec<u8> {
    let names = path.split(|&byte| byte == b'/');
    let names: Vec<&[u8]> = names.filter(|name| !name.is_empty() && *name != b".").collect();
    names.join(&b'/')
}

/// Gives the content of a file (of a later hard link: of its first entry), with that entry.
pub async fn content_of(
    catalog: &Catalog,
    snap: &Snapshot,
    at: &EntryAt,
) -> Result<Option<(ContentRef, EntryAt)>, MetaError> {
    catalog
        .meta
        .drive(|blocks| {
            let first = nav::resolve_link(&snap.root, blocks, at)?;
            let EntryKind::File { size, content, .. } = &first.entry.kind else {
                return Ok(None);
            };
            let location = nav::location(&snap.root, &snap.placement, blocks, first.rank)?;
            let content = ContentRef { content: *content, size: *size, location };
            Ok(Some((content, first)))
        })
        .await
}

/// Gives a file's bytes, in order, to `sink`.
pub async fn cat(
    catalog: &Catalog,
    fetcher: &Fetcher,
    snap: &Snapshot,
    path: &[u8],
    mut sink: impl FnMut(&[u8]) -> io::Result<()>,
) -> Result<u64, GetError> {
    let text = || String::from_utf8_lossy(path).into_owned();
    let found = find(catalog, snap, path).await?;
    let Some(at) = found.at.filter(|at| at.dir.is_none()) else {
        return Err(GetError::IsDir { path: text() });
    };
    if let EntryKind::Symlink { target } = &at.entry.kind {
        let target = String::from_utf8_lossy(target).into_owned();
        return Err(GetError::IsSymlink { path: text(), target });
    }
    let Some((content, _)) = content_of(catalog, snap, &at).await? else {
        return Err(GetError::NoPath { path: text() });
    };
    let content = Arc::new(content);
    let mut reads = stream::iter(chunks(0, content.size))
        .map(|(offset, len)| {
            let (fetcher, content) = (fetcher.clone(), content.clone());
            async move { fetcher.read(&content, offset, len, Verify::Always).await }
        })
        .buffered(READS_PARALLEL);
    loop {
        let read = reads.try_next().await;
        let Some(bytes) = read.map_err(|source| GetError::Fetch { path: text(), source })? else {
            return Ok(content.size);
        };
        sink(&bytes).map_err(io_at(Path::new("stdout")))?;
    }
}

/// Cuts a range of a file into reads.
fn chunks(from: u64, to: u64) -> impl Iterator<Item = (u64, u32)> {
    (from..to).step_by(READ_LEN as usize).map(move |offset| {
        let len = (to - offset).min(u64::from(READ_LEN));
        (offset, u32::try_from(len).unwrap_or(READ_LEN))
    })
}

/// Copies a path of a snapshot out to `dest`, which must not exist, or be an empty directory where
/// the path is a directory.
pub async fn get(
    catalog: &Catalog,
    fetcher: &Fetcher,
    snap: &Snapshot,
    path: &[u8],
    dest: &Path,
    progress: &Arc<GetProgress>,
) -> Result<GetReport, GetError> {
    let found = find(catalog, snap, path).await?;
    check_dest(&found, dest)?;
    let mut getter = Getter {
        catalog,
        fetcher,
        snap,
        progress: progress.clone(),
        running: JoinSet::new(),
        report: GetReport::default(),
        dirs: Vec::new(),
        firsts: HashMap::new(),
        links: Vec::new(),
    };
    match found.at {
        None => {
            let root = nav::root_dir(&snap.root);
            getter.tree(root, dest, snap.root.mode, snap.root.mtime).await?;
        }
        Some(at) => match at.dir {
            Some(dir) => getter.tree(dir, dest, at.entry.mode, at.entry.mtime).await?,
            None => getter.entry(&at, &found.path, dest.to_owned()).await?,
        },
    }
    getter.finish().await
}

fn check_dest(found: &Found, dest: &Path) -> Result<(), GetError> {
    let is_dir = found.at.as_ref().is_none_or(|at| at.dir.is_some());
    match fs::symlink_metadata(dest) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io_at(dest)(error)),
        Ok(stat) => {
            let empty = || fs::read_dir(dest).is_ok_and(|mut items| items.next().is_none());
            if is_dir && stat.is_dir() && empty() {
                return Ok(());
            }
            Err(GetError::Exists { path: dest.to_owned() })
        }
    }
}

struct Getter<'a> {
    catalog: &'a Catalog,
    fetcher: &'a Fetcher,
    snap: &'a Snapshot,
    progress: Arc<GetProgress>,
    running: JoinSet<Result<(), (String, String)>>,
    report: GetReport,
    /// Directories that were made, parents first.
    dirs: Vec<(PathBuf, u32, Mtime)>,
    /// Where the file of a hard-link group was written, by the rank of its first entry.
    firsts: HashMap<u64, PathBuf>,
    /// Links to be made at the end: where, and to what.
    links: Vec<(PathBuf, PathBuf)>,
}

impl Getter<'_> {
    async fn tree(&mut self, dir: nav::DirAt, dest: &Path, mode: u32, mtime: Mtime) -> Result<(), GetError> {
        if !dest.is_dir() {
            fs::create_dir_all(dest).map_err(io_at(dest))?;
        }
        self.dirs.push((dest.to_owned(), mode, mtime));
        let mut walk = Walk::new(&self.catalog.meta, self.snap, dir, Vec::new(), true);
        loop {
            let walked = walk.next().await?;
            if walked.is_empty() {
                return Ok(());
            }
            for item in walked {
                let to = dest.join(OsStr::from_bytes(&item.path));
                self.entry(&item.at, &item.path, to).await?;
            }
        }
    }

    async fn entry(&mut self, at: &EntryAt, path: &[u8], to: PathBuf) -> Result<(), GetError> {
        match &at.entry.kind {
            EntryKind::Dir { .. } => {
                fs::create_dir(&to).map_err(io_at(&to))?;
                self.dirs.push((to, at.entry.mode, at.entry.mtime));
                self.report.dirs += 1;
            }
            EntryKind::Symlink { target } => {
                symlink(OsStr::from_bytes(target), &to).map_err(io_at(&to))?;
                set_mtime(&to, at.entry.mtime).map_err(io_at(&to))?;
                self.report.symlinks += 1;
            }
            EntryKind::File { .. } | EntryKind::HardLink { .. } => {
                self.file(at, path, to).await?;
            }
        }
        Ok(())
    }

    async fn file(&mut self, at: &EntryAt, path: &[u8], to: PathBuf) -> Result<(), GetError> {
        let found = content_of(self.catalog, self.snap, at).await?;
        let Some((content, first)) = found else {
            return Ok(());
        };
        if first.entry.nlink > 1 || first.rank != at.rank {
            if let Some(written) = self.firsts.get(&first.rank) {
                self.links.push((to, written.clone()));
                return Ok(());
            }
            self.firsts.insert(first.rank, to.clone());
        }
        while self.running.len() >= FILES_PARALLEL {
            self.join_one().await;
        }
        let (fetcher, progress) = (self.fetcher.clone(), self.progress.clone());
        let (mode, mtime) = (first.entry.mode, first.entry.mtime);
        let name = String::from_utf8_lossy(path).into_owned();
        self.report.files += 1;
        self.report.bytes += content.size;
        self.running.spawn(async move {
            let written = write_file(&fetcher, content, &to, mode, mtime, &progress).await;
            progress.files.fetch_add(1, Ordering::Relaxed);
            written.map_err(|why| {
                // Half a file is worse than none.
                let _ = fs::remove_file(&to);
                (name, why)
            })
        });
        Ok(())
    }

    async fn join_one(&mut self) {
        let failed = match self.running.join_next().await {
            Some(Ok(Err(failed))) => failed,
            Some(Err(error)) if error.is_panic() => {
                std::panic::resume_unwind(error.into_panic());
            }
            _ => return,
        };
        self.fail(failed);
    }

    fn fail(&mut self, (path, why): (String, String)) {
        self.report.failed_count += 1;
        if self.report.failed.len() < FAILED_NAMED_MAX {
            self.report.failed.push(Failed { path, why });
        }
    }

    /// Makes the hard links, then gives directories their modes and times, the innermost first.
    async fn finish(mut self) -> Result<GetReport, GetError> {
        while !self.running.is_empty() {
            self.join_one().await;
        }
        for (to, written) in std::mem::take(&mut self.links) {
            match fs::hard_link(&written, &to) {
                Ok(()) => self.report.hard_links += 1,
                Err(error) => self.fail((to.to_string_lossy().into_owned(), error.to_string())),
            }
        }
        for (dir, mode, mtime) in self.dirs.iter().rev() {
            let permissions = fs::Permissions::from_mode(*mode);
            // Times first: a mode may forbid it afterwards.
            let done = set_mtime(dir, *mtime).and_then(|()| fs::set_permissions(dir, permissions));
            done.map_err(io_at(dir))?;
        }
        let failed = self.report.failed_count;
        self.report.files = self.report.files.saturating_sub(failed);
        Ok(self.report)
    }
}

fn set_mtime(path: &Path, mtime: Mtime) -> io::Result<()> {
    let time = TimeSpec::new(mtime.secs, i64::from(mtime.nanos));
    let flags = UtimensatFlags::NoFollowSymlink;
    Ok(utimensat(AT_FDCWD, path, &time, &time, flags)?)
}

/// Writes one file; says in words why it could not.
async fn write_file(
    fetcher: &Fetcher,
    content: ContentRef,
    to: &Path,
    mode: u32,
    mtime: Mtime,
    progress: &GetProgress,
) -> Result<(), String> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to);
    let file = file.map_err(|error| error.to_string())?;
    fill(fetcher, &content, &file, progress).await.map_err(|error| chain(error.as_ref()))?;
    let done = file.set_permissions(fs::Permissions::from_mode(mode)).and_then(|()| set_mtime(to, mtime));
    done.map_err(|error| error.to_string())
}

/// Says an error with its causes in one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(&format!(": {inner}"));
        cause = inner.source();
    }
    text
}

/// Writes what is stored of a file; what is a hole stays one.
async fn fill(
    fetcher: &Fetcher,
    content: &ContentRef,
    file: &File,
    progress: &GetProgress,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let ranges = match &content.location {
        Location::Sparse { extents, .. } => {
            file.set_len(content.size)?;
            let ends = extents.iter().map(|extent| {
                let end = extent.logical.saturating_add(extent.len);
                (extent.logical, end.min(content.size))
            });
            ends.collect()
        }
        Location::None if content.size > 0 => {
            // Holes only: one read proves that the content is nothing but zeros.
            fetcher.read(content, 0, 1, Verify::Always).await?;
            file.set_len(content.size)?;
            Vec::new()
        }
        Location::None | Location::Run { .. } => vec![(0, content.size)],
    };
    let reads = ranges.into_iter().flat_map(|(from, to)| chunks(from, to));
    let mut reads = stream::iter(reads)
        .map(|(offset, len)| async move {
            let bytes = fetcher.read(content, offset, len, Verify::Always).await?;
            Ok::<_, FetchError>((offset, bytes))
        })
        .buffer_unordered(READS_PARALLEL);
    while let Some((offset, bytes)) = reads.try_next().await? {
        file.write_all_at(&bytes, offset)?;
        progress.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    }
    Ok(())
}
