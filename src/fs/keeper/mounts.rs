//! The calls that make, find and take away mounts. Nothing else in Larder calls mount(2).
//!
//! With root: mount(2) itself. Without: `fusermount3`, which is setuid and hands back the
//! descriptor. Both give the same mount: read-only (the kernel then never asks for a new access
//! time, which would need a daemon), nosuid, nodev, permissions checked by the kernel.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;
use nix::unistd::{getegid, geteuid};

use crate::fs::sys;

use super::kernel;
use super::wire::MountRequest;

/// The file system type that every Larder mount has in the mount table.
const FS_TYPE: &str = "fuse.larder";

/// One line of the mount table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MountLine {
    /// Names this mount of the file system, for as long as it lives.
    pub id: u64,
    /// The mount that it is mounted on: at the same directory, the one below.
    parent: u64,
    /// `major:minor` of the file system, which also names its entry in /sys/class/bdi.
    pub dev: String,
    pub dir: PathBuf,
    pub fs_type: String,
    pub source: PathBuf,
}

/// Mounts; gives the /dev/fuse descriptor.
pub(super) fn make(request: &MountRequest) -> io::Result<OwnedFd> {
    if geteuid().is_root() { make_as_root(request) } else { make_by_fusermount(request) }
}

fn source_of(request: &MountRequest) -> String {
    format!("larder:{}", request.source)
}

fn make_as_root(request: &MountRequest) -> io::Result<OwnedFd> {
    let fuse = nix::fcntl::open("/dev/fuse", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())?;
    let mut data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions",
        fuse.as_raw_fd(),
        geteuid(),
        getegid()
    );
    if request.allow_other {
        data.push_str(",allow_other");
    }
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let source = source_of(request);
    let (target, _held) = target(&request.dir, request.owner)?;
    mount(Some(source.as_str()), &target, Some(FS_TYPE), flags, Some(data.as_str()))?;
    Ok(fuse)
}

/// Gives the name under which a directory is mounted on. Where it has to be somebody's it is held open and named by
/// its descriptor: what that user puts in its place from now on is not what is mounted on.
fn target(dir: &Path, owner: Option<u32>) -> io::Result<(PathBuf, Option<OwnedFd>)> {
    let Some(owner) = owner else {
        return Ok((dir.to_owned(), None));
    };
    let held = kernel::open_owned(dir, owner)?;
    Ok((Path::new("/proc/self/fd").join(held.as_raw_fd().to_string()), Some(held)))
}

/// Puts a backslash before what separates options.
fn escape_option(value: &str) -> String {
    value.chars().flat_map(|c| if matches!(c, ',' | '\\') { vec!['\\', c] } else { vec![c] }).collect()
}

fn make_by_fusermount(request: &MountRequest) -> io::Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    // Single-threaded: nobody else can start a process that would inherit it.
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty()))?;
    let mut options =
        format!("fsname={},subtype=larder,ro,nosuid,nodev,default_permissions", escape_option(&source_of(request)));
    if request.allow_other {
        options.push_str(",allow_other");
    }
    let output = Command::new("fusermount3")
        .arg("-o")
        .arg(options)
        .arg("--")
        .arg(&request.dir)
        .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
        .output()
        .map_err(|error| io::Error::new(error.kind(), format!("fusermount3: {error}; install the package fuse3")))?;
    drop(theirs);
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(said.trim().to_owned()));
    }
    let (_, fds) = sys::receive_message(ours.as_fd(), 64)?;
    fds.into_iter().next().ok_or_else(|| io::Error::other("fusermount3 gave no descriptor"))
}

/// Unmounts what was found in the mount table. Lazily: takes the mount out of the tree at once, whoever uses it.
pub(super) fn unmake(line: &MountLine, lazy: bool) -> io::Result<()> {
    if geteuid().is_root() {
        return unmake_as_root(line, lazy);
    }
    let dir = &line.dir;
    let mut command = Command::new("fusermount3");
    command.arg("-u");
    if lazy {
        command.arg("-z");
    }
    let output = command.arg("--").arg(dir).output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if said.contains("busy") { Err(Errno::EBUSY.into()) } else { Err(io::Error::other(said)) }
}

/// Whoever owns a directory above could have the path lead elsewhere by now, and have anything unmounted. So the
/// directory above is held, and what is mounted in it has to be what was found: a name that something is mounted on
/// can't be given to anything else.
fn unmake_as_root(line: &MountLine, lazy: bool) -> io::Result<()> {
    let (Some(above), Some(name)) = (line.dir.parent(), line.dir.file_name()) else {
        return Err(Errno::EINVAL.into());
    };
    let above = kernel::open_without_links(above)?;
    let held = Path::new("/proc/self/fd").join(above.as_raw_fd().to_string()).join(name);
    if mount_at(&held)? != line.id {
        return Err(io::Error::other("something else is mounted there by now"));
    }
    let flags = MntFlags::UMOUNT_NOFOLLOW | if lazy { MntFlags::MNT_DETACH } else { MntFlags::empty() };
    Ok(umount2(&held, flags)?)
}

/// Gives the number of the mount that a path shows. Asks only the kernel, not the file system, which may be dead.
fn mount_at(path: &Path) -> io::Result<u64> {
    let held = nix::fcntl::open(path, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", held.as_raw_fd()))?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
    id.ok_or_else(|| io::Error::other("the kernel does not tell what is mounted there"))
}

/// Shows what is mounted at `from` at `dir` too, as read-only as it is there.
pub(super) fn bind(from: &Path, dir: &Path) -> io::Result<()> {
    if !geteuid().is_root() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "only root shows a mount at another directory"));
    }
    Ok(mount(Some(from), dir, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
}

/// Says whether the kernel has given up a mount's connection (unmounted and no longer open, or aborted).
pub(super) fn is_gone(fuse: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fuse.as_fd(), PollFlags::empty())];
    match poll(&mut fds, PollTimeout::ZERO) {
        Ok(_) => fds.iter().any(|fd| fd.revents().is_some_and(|seen| seen.contains(PollFlags::POLLERR))),
        Err(_) => false,
    }
}

/// Undoes the octal escapes of the mount table.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..] if byte == b'\\' => {
                Some(((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'), after))
            }
            _ => None,
        };
        let (value, after) = octal.unwrap_or((byte, tail));
        out.push(value);
        rest = after;
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

/// Parses one line of /proc/self/mountinfo.
fn parse_line(line: &[u8]) -> Option<MountLine> {
    let mut fields = line.split(|&byte| byte == b' ');
    let id = fields.by_ref().next()?;
    let parent = fields.by_ref().next()?;
    let dev = fields.by_ref().next()?;
    let dir = fields.by_ref().nth(1)?;
    let mut behind = fields.skip_while(|field| *field != b"-").skip(1);
    let fs_type = behind.next()?;
    let source = behind.next()?;
    Some(MountLine {
        id: std::str::from_utf8(id).ok()?.parse().ok()?,
        parent: std::str::from_utf8(parent).ok()?.parse().ok()?,
        dev: String::from_utf8(dev.to_vec()).ok()?,
        dir: unescape(dir),
        fs_type: String::from_utf8(fs_type.to_vec()).ok()?,
        source: unescape(source),
    })
}

fn lines() -> io::Result<Vec<MountLine>> {
    let table = fs::read("/proc/self/mountinfo")?;
    Ok(table.split(|&byte| byte == b'\n').filter_map(parse_line).collect())
}

/// Gives what is mounted at `dir` itself, the topmost of several.
pub(super) fn find(dir: &Path) -> io::Result<Option<MountLine>> {
    Ok(topmost(lines()?, dir))
}

fn topmost(lines: Vec<MountLine>, dir: &Path) -> Option<MountLine> {
    stack(lines, dir).into_iter().next()
}

/// Gives what is mounted at `dir`, the topmost first. The order of the table says nothing of that: what was mounted
/// beneath another one comes later in it.
fn stack(mut lines: Vec<MountLine>, dir: &Path) -> Vec<MountLine> {
    lines.retain(|line| line.dir.as_os_str().as_bytes() == dir.as_os_str().as_bytes());
    let is_below = |line: &MountLine| lines.iter().any(|other| other.parent == line.id && other.id != line.id);
    // Of several towers the newest: the others are below something that is mounted on a directory above.
    let mut next = lines.iter().rposition(|line| !is_below(line));
    let mut stack = Vec::new();
    while let Some(at) = next {
        let line = lines.remove(at);
        next = lines.iter().position(|below| below.id == line.parent);
        stack.push(line);
    }
    stack
}

/// Gives the topmost mount at `dir` where it is one of Larder's.
pub(super) fn find_ours(dir: &Path) -> io::Result<Option<MountLine>> {
    Ok(find(dir)?.filter(|line| line.fs_type == FS_TYPE || kernel::is_image(&line.fs_type, &line.source)))
}

/// Says whether the topmost mount at `dir` is one of Larder's.
pub fn is_ours(dir: &Path) -> io::Result<bool> {
    Ok(find_ours(dir)?.is_some())
}

/// What is mounted at a directory, as the mount table has it: no file system is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// Names the file system: two directories that show the same mount have the same.
    pub dev: String,
    pub is_ours: bool,
}

/// Gives what is mounted at `dir` itself, the topmost of several.
pub fn shown_at(dir: &Path) -> io::Result<Option<Shown>> {
    let line = find(dir)?;
    Ok(line.map(|line| Shown {
        is_ours: line.fs_type == FS_TYPE || kernel::is_image(&line.fs_type, &line.source),
        dev: line.dev,
    }))
}

/// A mount of the kernel engine's, as the mount table has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageLine {
    /// The mount's number.
    pub id: u64,
    /// Where it is now: a directory above may have got another name.
    pub dir: PathBuf,
    /// The image's file.
    pub image: PathBuf,
    /// Nothing is mounted over it.
    pub is_on_top: bool,
}

impl ImageLine {
    fn of(line: MountLine, is_on_top: bool) -> Option<Self> {
        let is_image = kernel::is_image(&line.fs_type, &line.source);
        is_image.then_some(Self { id: line.id, dir: line.dir, image: line.source, is_on_top })
    }
}

/// Gives the topmost image at `dir`, also beneath what others have mounted over it; none where it lies beneath
/// a FUSE mount of ours, which then is what is shown.
pub fn image_at(dir: &Path) -> io::Result<Option<ImageLine>> {
    Ok(image_among(lines()?, dir))
}

fn image_among(lines: Vec<MountLine>, dir: &Path) -> Option<ImageLine> {
    for (depth, line) in stack(lines, dir).into_iter().enumerate() {
        if line.fs_type == FS_TYPE {
            return None;
        }
        if let Some(image) = ImageLine::of(line, depth == 0) {
            return Some(image);
        }
    }
    None
}

/// Says whether `dir` shows an image: whatever FUSE mount of ours was there is not there any more, and nothing may
/// be unmounted there in its name.
pub fn shows_image(dir: &Path) -> bool {
    matches!(image_at(dir), Ok(Some(image)) if image.is_on_top)
}

/// Finds an image's mount by its number, wherever it is.
pub fn image_by_id(id: u64) -> io::Result<Option<ImageLine>> {
    let lines = lines()?;
    let Some(line) = lines.iter().find(|line| line.id == id).cloned() else {
        return Ok(None);
    };
    let is_on_top = topmost(lines, &line.dir).is_some_and(|top| top.id == id);
    Ok(ImageLine::of(line, is_on_top))
}

/// Lists the mounts of the kernel engine.
pub fn images_shown() -> io::Result<Vec<ImageLine>> {
    Ok(lines()?.into_iter().filter_map(|line| ImageLine::of(line, true)).collect())
}

/// Says whether what is mounted at `dir` answers nobody any more: its keeper and its daemon died. Asks the file
/// system, and so waits where a daemon is only late.
pub fn is_dead(dir: &Path) -> bool {
    nix::sys::statvfs::statvfs(dir) == Err(Errno::ENOTCONN)
}

/// Raises the read-ahead of a mounted file system; never lowers it.
pub(super) fn raise_read_ahead(dev: &str, kib: u32) -> io::Result<()> {
    let path = Path::new("/sys/class/bdi").join(dev).join("read_ahead_kb");
    let now: u32 = fs::read_to_string(&path)?.trim().parse().unwrap_or(u32::MAX);
    if now < kib {
        fs::write(&path, kib.to_string())?;
    }
    Ok(())
}

/// Opens the mount table so that poll(2) reports its changes.
pub(super) fn open_table() -> io::Result<File> {
    File::open("/proc/self/mountinfo")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_table_lines_parse_with_spaces_in_paths_and_optional_fields() {
        let line =
            br"36 35 0:52 / /mnt/a\040b\134c rw,nosuid shared:1 master:2 - fuse.larder larder:xray@v1 ro,user_id=0";
        let parsed = parse_line(line).expect("is a line");
        assert_eq!((parsed.id, parsed.dev.as_str()), (36, "0:52"));
        assert_eq!(parsed.dir, Path::new(r"/mnt/a b\c"));
        assert_eq!(parsed.fs_type, "fuse.larder");
        assert_eq!(parsed.source, Path::new("larder:xray@v1"));
        assert!(parse_line(b"").is_none());
        assert!(parse_line(b"36 35 0:52 / /mnt rw -").is_none());
    }

    #[test]
    fn an_image_is_found_beneath_what_others_mounted_over_it_but_not_beneath_a_fuse_mount_of_ours() {
        let line = |id: u64, dir: &str, fs_type: &str, source: &str| {
            let parent = id - 1;
            parse_line(format!("{id} {parent} 0:52 / {dir} ro - {fs_type} {source} ro").as_bytes()).expect("is a line")
        };
        let image = line(40, "/m", "erofs", "/state/images/aa.larder");
        let found = |more: &[MountLine]| {
            let lines = [&[line(39, "/n", "erofs", "/state/images/bb.larder"), image.clone()], more].concat();
            image_among(lines, Path::new("/m")).map(|image| (image.id, image.is_on_top))
        };
        assert_eq!(found(&[]), Some((40, true)));
        assert_eq!(found(&[line(41, "/m", "tmpfs", "none")]), Some((40, false)));
        assert_eq!(found(&[line(41, "/m", FS_TYPE, "larder:a@b")]), None);
        assert_eq!(found(&[line(41, "/m", "erofs", "/other.img")]), Some((40, false)), "no image of ours");
    }

    #[test]
    fn the_topmost_is_whatever_nothing_is_mounted_on_also_where_another_was_put_beneath_it_later() {
        let line = |id: u64, parent: u64| parse_line(format!("{id} {parent} 0:52 / /m ro - tmpfs x ro").as_bytes());
        let ids = |lines: &[(u64, u64)]| {
            let lines = lines.iter().filter_map(|&(id, parent)| line(id, parent)).collect();
            stack(lines, Path::new("/m")).iter().map(|line| line.id).collect::<Vec<_>>()
        };
        assert_eq!(ids(&[(40, 1), (41, 40), (42, 41)]), [42, 41, 40]);
        assert_eq!(ids(&[(40, 41), (41, 1)]), [40, 41], "41 was put beneath 40");
        assert_eq!(ids(&[(40, 1), (50, 2)]), [50], "40 lies below what covers a directory above");
        assert_eq!(ids(&[]), [0; 0]);
    }

    #[test]
    fn a_path_that_leads_elsewhere_by_now_unmounts_nothing() {
        if !geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let dir = tempfile::tempdir().expect("a directory");
        let dir = dir.path().canonicalize().expect("is there");
        let (own, victim) = (dir.join("own/m"), dir.join("victim/m"));
        for path in [&own, &victim] {
            fs::create_dir_all(path).expect("makes");
            mount(Some("none"), path, Some("tmpfs"), MsFlags::empty(), None::<&str>).expect("mounts");
        }
        let line = find(&own).expect("reads").expect("is mounted");
        // What the owner of a directory above does between the look and the call.
        fs::rename(dir.join("own"), dir.join("moved")).expect("moves");
        std::os::unix::fs::symlink(dir.join("victim"), dir.join("own")).expect("links");
        let by_link = unmake(&line, true);
        fs::remove_file(dir.join("own")).expect("unlinks");
        fs::rename(dir.join("victim"), dir.join("own")).expect("moves");
        let by_name = unmake(&line, true);
        let moved = find(&dir.join("moved/m")).expect("reads").expect("is still mounted");
        let there = find(&own).expect("reads");
        unmake(&moved, false).expect("is where it is looked for");
        if let Some(there) = &there {
            unmake(there, false).expect("unmounts");
        }
        assert!(by_link.is_err() && by_name.is_err(), "{by_link:?} {by_name:?}");
        assert_eq!(moved.id, line.id);
        assert!(there.is_some(), "what is somebody else's was unmounted");
    }

    #[test]
    fn options_are_escaped_for_fusermount() {
        assert_eq!(escape_option(r"a,b\c"), r"a\,b\\c");
    }
}
