//! The walk: every name of the directory once, in tree order, into the spool.
//!
//! Directories in preorder, the entries of one directory together, names in byte order: the order
//! of a tree. Symbolic links are never followed; other file systems mounted below are entered, as
//! rsync does. What no tree can hold (sockets, pipes, devices) or this process may not read is
//! listed, and the caller decides.
//!
//! Memory: the names of one directory, the names of the subdirectories still to visit, and 24 bytes
//! a file with several links.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::stat::{FileStat, SFlag};

use super::error::{AtPath, Problem, ProblemKind, PushError};
use super::exclude::Excludes;
use super::progress::{Progress, add};
use super::spool::{DirCounts, Item, Kind, Spool, Stat};
use super::sys;

/// What a walk found beside the spool.
#[derive(Debug)]
pub(super) struct Walked {
    pub spool: Spool,
    pub problems: Vec<Problem>,
    /// Directories and empty files with attributes; of other files the contents pass finds out, or knows.
    pub xattrs_dropped: u64,
}

/// A directory whose own entries are in the spool; its subdirectories are visited one by one.
#[derive(Debug)]
struct Frame {
    number: u64,
    counts: DirCounts,
    /// Length of its path.
    path_len: usize,
    /// Names of its subdirectories, whose numbers follow each other.
    subdirs: sys::Names,
    first_number: u64,
    next: usize,
}

/// The first entry of a hard-link group.
#[derive(Debug, Clone)]
struct First {
    at: u64,
    path: Box<[u8]>,
}

#[derive(Debug)]
struct Walker<'a> {
    root: OwnedFd,
    root_dir: &'a Path,
    excludes: &'a Excludes,
    progress: &'a Progress,
    spool: Spool,
    links: HashMap<(u64, u64), First>,
    problems: Vec<Problem>,
    xattrs_dropped: u64,
    /// root reads everything: no need to ask.
    ask_readable: bool,
}

/// Walks `dir`; temporary files go below `scratch`.
pub(super) fn walk(dir: &Path, scratch: &Path, excludes: &Excludes, progress: &Progress) -> Result<Walked, PushError> {
    let root = sys::open_root(dir).at(dir)?;
    let stat = sys::fstat(&root).at(dir)?;
    let spool = Spool::create(scratch, stat.st_mode & 0o7777, sys::mtime_of(&stat))?;
    let mut walker = Walker {
        root,
        root_dir: dir,
        excludes,
        progress,
        spool,
        links: HashMap::new(),
        problems: Vec::new(),
        xattrs_dropped: 0,
        ask_readable: !nix::unistd::geteuid().is_root(),
    };
    walker.run()?;
    walker.spool.flush()?;
    Ok(Walked { spool: walker.spool, problems: walker.problems, xattrs_dropped: walker.xattrs_dropped })
}

impl Walker<'_> {
    fn run(&mut self) -> Result<(), PushError> {
        let mut path: Vec<u8> = Vec::new();
        let Some(root) = self.visit(0, 0, &path)? else {
            let source = std::io::Error::from_raw_os_error(Errno::EACCES as i32);
            return Err(PushError::Io { path: self.root_dir.to_owned(), source });
        };
        let mut stack = vec![root];
        while let Some(frame) = stack.last_mut() {
            path.truncate(frame.path_len);
            let Some(name) = frame.subdirs.get(frame.next) else {
                let (number, counts) = (frame.number, frame.counts);
                stack.pop();
                if let Some(parent) = stack.last_mut() {
                    parent.counts.descendants += counts.descendants;
                }
                self.spool.set_counts(number, counts)?;
                continue;
            };
            join(&mut path, name);
            let number = frame.first_number + frame.next as u64;
            let parent = frame.number;
            frame.next += 1;
            match self.visit(number, parent, &path)? {
                Some(child) => stack.push(child),
                // Listed as a problem: if the push goes on, the directory is there and empty.
                None => {
                    self.spool.enter(number, &path)?;
                    self.spool.set_counts(number, DirCounts { parent, ..DirCounts::default() })?;
                }
            }
        }
        Ok(())
    }

    /// Spools the entries of one directory; None where it cannot be listed.
    fn visit(&mut self, number: u64, parent: u64, path: &[u8]) -> Result<Option<Frame>, PushError> {
        let opened = sys::open_dir(&self.root, path).and_then(|dir| sys::list(&dir).map(|names| (dir, names)));
        let (dir, names) = match opened {
            Ok(opened) => opened,
            Err(errno) => {
                self.problem(path, errno);
                return Ok(None);
            }
        };
        if !path.is_empty() && sys::has_xattrs_open(&dir) {
            self.xattrs_dropped += 1;
        }
        self.spool.enter(number, path)?;
        let mut frame = Frame {
            number,
            counts: DirCounts { parent, ..DirCounts::default() },
            path_len: path.len(),
            subdirs: sys::Names::default(),
            first_number: 0,
            next: 0,
        };
        let mut child = path.to_vec();
        for name in names.iter() {
            child.truncate(path.len());
            join(&mut child, name);
            self.visit_name(&dir, name, &child, &mut frame)?;
        }
        frame.counts.descendants = frame.counts.children;
        Ok(Some(frame))
    }

    fn visit_name(&mut self, dir: &OwnedFd, name: &[u8], path: &[u8], frame: &mut Frame) -> Result<(), PushError> {
        let stat = match sys::lstat(dir, name) {
            Ok(stat) => stat,
            Err(errno) => {
                self.problem(path, errno);
                return Ok(());
            }
        };
        let kind = stat.st_mode & SFlag::S_IFMT.bits();
        if self.excludes.matches(path, kind == SFlag::S_IFDIR.bits()) {
            return Ok(());
        }
        add(&self.progress.walked, 1);
        let Some(kind) = self.kind_of(dir, name, path, &stat, frame)? else {
            return Ok(());
        };
        if stat.st_size == 0 && matches!(kind, Kind::File(_)) && sys::has_xattrs(dir, name) {
            self.xattrs_dropped += 1;
        }
        let is_file = matches!(kind, Kind::File(_));
        let is_link = matches!(kind, Kind::Link { .. });
        let item = Item {
            name: name.to_vec(),
            mode: if is_link { 0 } else { stat.st_mode & 0o7777 },
            mtime: if is_link { crate::format::tree::Mtime::default() } else { sys::mtime_of(&stat) },
            nlink: 1,
            kind,
        };
        let at = self.spool.item(&item)?;
        frame.counts.children += 1;
        if is_file {
            add(&self.progress.files_total, 1);
            add(&self.progress.bytes_total, u64::try_from(stat.st_size).unwrap_or(0));
            if stat.st_nlink > 1 {
                self.links.insert((stat.st_dev, stat.st_ino), First { at, path: path.into() });
            }
        }
        Ok(())
    }

    /// Says what a name is; None where it was listed as a problem.
    fn kind_of(
        &mut self,
        dir: &OwnedFd,
        name: &[u8],
        path: &[u8],
        stat: &FileStat,
        frame: &mut Frame,
    ) -> Result<Option<Kind>, PushError> {
        let (kind, reason) = match SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) {
            SFlag::S_IFREG => return self.regular(dir, name, path, stat),
            SFlag::S_IFDIR => {
                let number = self.spool.number_dir();
                if frame.counts.subdirs == 0 {
                    frame.first_number = number;
                }
                frame.counts.subdirs += 1;
                if !frame.subdirs.push(name) {
                    return Err(self.spool.damaged("a directory has more than 4 GiB of names"));
                }
                return Ok(Some(Kind::Dir { number }));
            }
            SFlag::S_IFLNK => {
                return Ok(match sys::read_link(dir, name) {
                    Ok(target) => Some(Kind::Symlink { target }),
                    Err(errno) => {
                        self.problem(path, errno);
                        None
                    }
                });
            }
            SFlag::S_IFSOCK => (ProblemKind::Socket, "a socket has no contents"),
            SFlag::S_IFIFO => (ProblemKind::Fifo, "a named pipe has no contents"),
            SFlag::S_IFBLK => (ProblemKind::BlockDevice, "a block device is not stored"),
            _ => (ProblemKind::CharDevice, "a character device is not stored"),
        };
        self.problems.push(Problem::new(path, kind, reason));
        Ok(None)
    }

    fn regular(&mut self, dir: &OwnedFd, name: &[u8], path: &[u8], stat: &FileStat) -> Result<Option<Kind>, PushError> {
        if stat.st_nlink > 1
            && let Some(first) = self.links.get(&(stat.st_dev, stat.st_ino)).cloned()
        {
            self.spool.add_link(first.at)?;
            return Ok(Some(Kind::Link { first_at: first.at, path: first.path.into_vec() }));
        }
        if self.ask_readable
            && let Err(errno) = sys::readable(dir, name)
        {
            self.problem(path, errno);
            return Ok(None);
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        Ok(Some(Kind::File(Stat {
            size,
            stored: u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512).min(size),
            mtime: sys::mtime_of(stat),
            ctime: sys::ctime_of(stat),
            dev: stat.st_dev,
            ino: stat.st_ino,
        })))
    }

    fn problem(&mut self, path: &[u8], errno: Errno) {
        let shown: &[u8] = if path.is_empty() { b"." } else { path };
        let problem = match errno {
            Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP => {
                Problem::new(shown, ProblemKind::Changed, "it went away during the walk")
            }
            errno => Problem::new(shown, ProblemKind::Unreadable, std::io::Error::from(errno).to_string()),
        };
        self.problems.push(problem);
    }
}

/// Appends a name to a path.
pub(super) fn join(path: &mut Vec<u8>, name: &[u8]) {
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
}
