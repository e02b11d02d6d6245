//! Every path and descriptor system call with every kind of object: what a mount answers, by both engines, is what a
//! read-only bind mount of the same tree on the local disk answers.
//!
//! Two tables, calls and objects; each pair is tried on all of them, as root and as a user. Where a mount may differ
//! stands in [`DIFFERENCES`], each with the words of `docs/semantics.md` that say so and why.

use std::fmt::Write as _;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::mount::MsFlags;
use rustix::fs::{
    Access, Advice, AtFlags, CWD, FallocateFlags, FileType, FlockOperation, Gid, Mode, OFlags, RawDir, RenameFlags,
    SeekFrom, Stat, StatVfsMountFlags, Timespec, Timestamps, Uid, XattrFlags, inotify,
};
use rustix::io::Errno;

use crate::kit::{World, mount_by_kernel};

type Answer = Result<String, Errno>;

/// The objects, relative to the tree: everything a name can lead to.
fn objects() -> Vec<(&'static str, String)> {
    let name = |kind, path: &str| (kind, path.to_owned());
    vec![
        name("file", "file"),
        name("empty file", "empty"),
        name("program", "program"),
        name("closed file", "closed"),
        name("file with another name", "hard"),
        name("file in a directory", "dir/inner"),
        name("directory", "dir"),
        name("empty directory", "void"),
        name("closed directory", "closed-dir"),
        name("file in a closed directory", "closed-dir/inner"),
        name("link to a file", "to-file"),
        name("link to a directory", "to-dir"),
        name("link to nothing", "to-nothing"),
        name("link to itself", "to-itself"),
        name("absolute link out to nothing", "to-root"),
        name("through a link", "to-dir/inner"),
        name("root", "."),
        name("parent", "dir/.."),
        name("trailing slash on a file", "file/"),
        name("trailing slash on a directory", "dir/"),
        name("trailing slash on a link to a directory", "to-dir/"),
        name("trailing slash on nothing", "missing/"),
        name("nothing", "missing"),
        name("nothing in nothing", "missing/inner"),
        name("nothing in a directory", "dir/missing"),
        name("below a file", "file/inner"),
        name("below a link to nothing", "to-nothing/inner"),
        name("longest name", &"n".repeat(255)),
        name("name that is too long", &"n".repeat(256)),
        name("path that is too long", &"./".repeat(2048)),
        name("name that is no UTF-8", "\u{fffd}raw"),
    ]
}

fn make_tree(root: &Path) {
    let file = |name: &str, bytes: &[u8], mode: u32| {
        fs::write(root.join(name), bytes).expect("writes");
        fs::set_permissions(root.join(name), fs::Permissions::from_mode(mode)).expect("chmod");
    };
    for dir in ["dir", "void", "closed-dir", "dir/sub"] {
        fs::create_dir_all(root.join(dir)).expect("mkdir");
    }
    let bytes: Vec<u8> = (0..70_000_u32).map(|at| (at % 251) as u8).collect();
    file("file", &bytes, 0o644);
    file("empty", b"", 0o640);
    file("program", b"#!/bin/sh\nexit 0\n", 0o755);
    file("closed", b"closed", 0o000);
    file("dir/inner", b"inner", 0o4711);
    file("closed-dir/inner", b"inner", 0o644);
    file(&"n".repeat(255), b"long", 0o644);
    file("\u{fffd}raw", b"raw", 0o600);
    fs::hard_link(root.join("file"), root.join("hard")).expect("links");
    for (target, name) in [
        ("file", "to-file"),
        ("dir", "to-dir"),
        ("gone", "to-nothing"),
        ("to-itself", "to-itself"),
        ("/proc/self/larder/nothing", "to-root"),
    ] {
        symlink(target, root.join(name)).expect("links");
    }
    for (dir, mode) in [("closed-dir", 0o700), ("dir", 0o755), ("void", 0o1777), ("dir/sub", 0o2750)] {
        fs::set_permissions(root.join(dir), fs::Permissions::from_mode(mode)).expect("chmod");
    }
    fs::set_permissions(root, fs::Permissions::from_mode(0o755)).expect("chmod");
    // One time for all: the times of directories change while they are filled.
    let times = Timestamps {
        last_access: Timespec { tv_sec: 1_000_000_000, tv_nsec: 123_456_789 },
        last_modification: Timespec { tv_sec: 1_000_000_000, tv_nsec: 123_456_789 },
    };
    let mut all = vec![root.to_owned()];
    while let Some(path) = all.pop() {
        if path.is_dir() && !path.is_symlink() {
            all.extend(fs::read_dir(&path).expect("lists").flatten().map(|entry| entry.path()));
        }
        rustix::fs::utimensat(CWD, &path, &times, AtFlags::SYMLINK_NOFOLLOW).expect("sets the time");
    }
}

/// A call with a path.
type PathCall = (&'static str, fn(&Path) -> Answer);

/// Nothing outside of the tree is ever named by an object: the calls change what they reach, if they can.
fn done<T>(result: Result<T, Errno>) -> Answer {
    result.map(|_| "done".to_owned())
}

fn told(stat: &Stat) -> String {
    let kind = FileType::from_raw_mode(stat.st_mode);
    // A directory's size is its file system's affair.
    let size = if kind == FileType::Directory { 0 } else { stat.st_size };
    format!(
        "{kind:?} {:o} links {} of {}:{} size {size} at {}.{}",
        stat.st_mode, stat.st_nlink, stat.st_uid, stat.st_gid, stat.st_mtime, stat.st_mtime_nsec
    )
}

fn open(path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::from_raw_mode(0o644))
}

/// Opens, and tells what was opened.
fn opened(path: &Path, flags: OFlags) -> Answer {
    let fd = open(path, flags)?;
    Ok(told(&rustix::fs::fstat(&fd)?))
}

fn names(path: &Path) -> Answer {
    let fd = open(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
    let mut buffer = Vec::with_capacity(8192);
    let mut names = Vec::new();
    let mut listed = RawDir::new(&fd, buffer.spare_capacity_mut());
    while let Some(entry) = listed.next() {
        let entry = entry?;
        names.push(format!("{} {:?}", entry.file_name().to_string_lossy(), entry.file_type()));
    }
    names.sort();
    Ok(names.join(", "))
}

fn beside(path: &Path) -> PathBuf {
    // In the same tree, and not there.
    path.parent().unwrap_or(path).join("new-name")
}

fn attribute_names(path: &Path, follow: bool) -> Answer {
    let mut buffer = [0_u8; 4096];
    let len = match follow {
        true => rustix::fs::listxattr(path, &mut buffer)?,
        false => rustix::fs::llistxattr(path, &mut buffer)?,
    };
    let text = String::from_utf8_lossy(&buffer[..len]).into_owned();
    let names: Vec<&str> = text.split('\0').filter(|name| !name.is_empty()).collect();
    Ok(names.join(" "))
}

fn attribute(path: &Path, name: &str) -> Answer {
    let mut buffer = [0_u8; 4096];
    let len = rustix::fs::getxattr(path, name, &mut buffer)?;
    Ok(format!("{len} bytes"))
}

fn watched(path: &Path) -> Answer {
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC)?;
    done(inotify::add_watch(&watch, path, inotify::WatchFlags::ALL_EVENTS))
}

fn executed(path: &Path) -> Answer {
    let ran = std::process::Command::new(path).current_dir("/").output();
    match ran {
        Ok(output) => Ok(format!("ended {:?}", output.status.code())),
        Err(error) => Err(Errno::from_raw_os_error(error.raw_os_error().unwrap_or(0))),
    }
}

fn nix_errno(errno: nix::errno::Errno) -> Errno {
    Errno::from_raw_os_error(errno as i32)
}

fn now() -> Timestamps {
    let now = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
    Timestamps { last_access: now, last_modification: now }
}

#[rustfmt::skip]
const PATH_CALLS: &[PathCall] = &[
    ("stat", |p| rustix::fs::stat(p).map(|stat| told(&stat))),
    ("lstat", |p| rustix::fs::lstat(p).map(|stat| told(&stat))),
    ("access to exist", |p| done(rustix::fs::access(p, Access::EXISTS))),
    ("access to read", |p| done(rustix::fs::access(p, Access::READ_OK))),
    ("access to write", |p| done(rustix::fs::access(p, Access::WRITE_OK))),
    ("access to execute", |p| done(rustix::fs::access(p, Access::EXEC_OK))),
    ("open O_RDONLY", |p| opened(p, OFlags::RDONLY)),
    ("open O_WRONLY", |p| opened(p, OFlags::WRONLY)),
    ("open O_RDWR", |p| opened(p, OFlags::RDWR)),
    ("open O_WRONLY|O_APPEND", |p| opened(p, OFlags::WRONLY | OFlags::APPEND)),
    ("open O_RDONLY|O_TRUNC", |p| opened(p, OFlags::RDONLY | OFlags::TRUNC)),
    ("open O_RDONLY|O_CREAT", |p| opened(p, OFlags::RDONLY | OFlags::CREATE)),
    ("open O_WRONLY|O_CREAT", |p| opened(p, OFlags::WRONLY | OFlags::CREATE)),
    ("open O_CREAT|O_EXCL", |p| opened(p, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL)),
    ("open O_DIRECTORY", |p| opened(p, OFlags::RDONLY | OFlags::DIRECTORY)),
    ("open O_NOFOLLOW", |p| opened(p, OFlags::RDONLY | OFlags::NOFOLLOW)),
    ("open O_PATH", |p| opened(p, OFlags::PATH)),
    ("open O_PATH|O_NOFOLLOW", |p| opened(p, OFlags::PATH | OFlags::NOFOLLOW)),
    ("open O_TMPFILE", |p| opened(p, OFlags::TMPFILE | OFlags::RDWR)),
    ("open O_NOATIME", |p| opened(p, OFlags::RDONLY | OFlags::NOATIME)),
    ("open O_NONBLOCK", |p| opened(p, OFlags::RDONLY | OFlags::NONBLOCK)),
    ("open O_DIRECT", |p| opened(p, OFlags::RDONLY | OFlags::DIRECT)),
    ("open O_SYNC", |p| opened(p, OFlags::RDONLY | OFlags::SYNC)),
    ("list", names),
    ("readlink", |p| rustix::fs::readlink(p, Vec::new()).map(|target| target.to_string_lossy().into_owned())),
    ("mkdir", |p| done(rustix::fs::mkdir(p, Mode::from_raw_mode(0o755)))),
    ("rmdir", |p| done(rustix::fs::rmdir(p))),
    ("unlink", |p| done(rustix::fs::unlink(p))),
    ("mkfifo", |p| done(rustix::fs::mknodat(CWD, p, FileType::Fifo, Mode::from_raw_mode(0o644), 0))),
    ("mknod file", |p| done(rustix::fs::mknodat(CWD, p, FileType::RegularFile, Mode::from_raw_mode(0o644), 0))),
    ("mknod device", |p| done(rustix::fs::mknodat(CWD, p, FileType::CharacterDevice, Mode::from_raw_mode(0o644), 0x103))),
    ("rename to nothing", |p| done(rustix::fs::rename(p, beside(p)))),
    ("rename to itself", |p| done(rustix::fs::rename(p, p))),
    ("rename onto a file", |p| done(rustix::fs::rename(p, beside(p).with_file_name("empty")))),
    ("rename out of the tree", |p| done(rustix::fs::rename(p, "/dev/shm/larder-posix-never"))),
    ("rename, not replacing", |p| done(rustix::fs::renameat_with(CWD, p, CWD, beside(p), RenameFlags::NOREPLACE))),
    ("rename, exchanging", |p| done(rustix::fs::renameat_with(CWD, p, CWD, beside(p).with_file_name("empty"), RenameFlags::EXCHANGE))),
    ("link to nothing", |p| done(rustix::fs::link(p, beside(p)))),
    ("link onto it", |p| done(rustix::fs::link(p.parent().unwrap_or(p).join("empty"), p))),
    ("symlink at it", |p| done(rustix::fs::symlink("target", p))),
    ("truncate", |p| done(nix::unistd::truncate(p, 1).map_err(nix_errno))),
    ("truncate to less than nothing", |p| done(nix::unistd::truncate(p, -1).map_err(nix_errno))),
    ("chmod", |p| done(rustix::fs::chmod(p, Mode::from_raw_mode(0o600)))),
    ("chown", |p| done(rustix::fs::chown(p, Some(Uid::from_raw(1)), None))),
    ("chown to nobody in particular", |p| done(rustix::fs::chown(p, None, None))),
    ("lchown", |p| done(rustix::fs::chownat(CWD, p, None, Some(Gid::from_raw(1)), AtFlags::SYMLINK_NOFOLLOW))),
    ("utimensat", |p| done(rustix::fs::utimensat(CWD, p, &now(), AtFlags::empty()))),
    ("utimensat of a link", |p| done(rustix::fs::utimensat(CWD, p, &now(), AtFlags::SYMLINK_NOFOLLOW))),
    ("setxattr", |p| done(rustix::fs::setxattr(p, "user.x", b"y", XattrFlags::empty()))),
    ("setxattr trusted", |p| done(rustix::fs::setxattr(p, "trusted.x", b"y", XattrFlags::empty()))),
    ("removexattr", |p| done(rustix::fs::removexattr(p, "user.x"))),
    ("getxattr of nothing", |p| attribute(p, "user.x")),
    ("getxattr of an ACL", |p| attribute(p, "system.posix_acl_access")),
    ("getxattr of capabilities", |p| attribute(p, "security.capability")),
    ("listxattr", |p| attribute_names(p, true)),
    ("llistxattr", |p| attribute_names(p, false)),
    ("statvfs", |p| rustix::fs::statvfs(p).map(|fs| format!("read-only {} no devices {} names {}", fs.f_flag.contains(StatVfsMountFlags::RDONLY), fs.f_flag.contains(StatVfsMountFlags::NODEV), fs.f_namemax))),
    ("watch", watched),
    ("execute", executed),
];

/// A call with a descriptor of an object that was opened for reading.
type FdCall = (&'static str, fn(&OwnedFd) -> Answer);

fn digest(bytes: &[u8]) -> String {
    format!("{} bytes {}", bytes.len(), &blake3::hash(bytes).to_hex()[..12])
}

fn read_at(fd: &OwnedFd, len: usize, offset: u64) -> Answer {
    let mut bytes = vec![0; len];
    let got = rustix::io::pread(fd, &mut bytes, offset)?;
    Ok(digest(&bytes[..got]))
}

fn mapped(fd: &OwnedFd, protection: nix::sys::mman::ProtFlags, flags: nix::sys::mman::MapFlags) -> Answer {
    let len = std::num::NonZeroUsize::new(4096).expect("not zero");
    // SAFETY: a new mapping at a place that the kernel chooses; nothing refers to it, and it is taken away again.
    let mapping = unsafe { nix::sys::mman::mmap(None, len, protection, flags, fd, 0) }.map_err(nix_errno)?;
    // SAFETY: the mapping that was just made.
    unsafe { nix::sys::mman::munmap(mapping, 4096) }.map_err(nix_errno)?;
    Ok("mapped".to_owned())
}

fn elsewhere() -> OwnedFd {
    // Not on a disk: whoever the thread is, it may make one.
    rustix::fs::memfd_create("elsewhere", rustix::fs::MemfdFlags::CLOEXEC).expect("a file in memory")
}

fn copied(fd: &OwnedFd) -> Answer {
    let to = elsewhere();
    let mut sum = 0;
    loop {
        let got = rustix::fs::copy_file_range(fd, None, &to, None, 1 << 20)?;
        if got == 0 {
            return Ok(format!("{sum} bytes"));
        }
        sum += got;
    }
}

fn again(fd: &OwnedFd, flags: OFlags) -> Answer {
    use std::os::fd::AsRawFd;
    opened(Path::new(&format!("/proc/self/fd/{}", fd.as_raw_fd())), flags)
}

fn locked(fd: &OwnedFd, kind: nix::libc::c_int) -> Answer {
    let lock = nix::libc::flock {
        l_type: kind as nix::libc::c_short,
        l_whence: nix::libc::SEEK_SET as nix::libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    done(nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETLK(&lock)).map_err(nix_errno))
}

use nix::sys::mman::{MapFlags, ProtFlags};

#[rustfmt::skip]
const FD_CALLS: &[FdCall] = &[
    ("fstat", |fd| rustix::fs::fstat(fd).map(|stat| told(&stat))),
    ("read", |fd| { let mut bytes = vec![0; 100_000]; let got = rustix::io::read(fd, &mut bytes[..])?; Ok(digest(&bytes[..got])) }),
    ("read nothing", |fd| { let got = rustix::io::read(fd, &mut [0_u8; 0][..])?; Ok(format!("{got}")) }),
    ("pread in the middle", |fd| read_at(fd, 5000, 4000)),
    ("pread over the end", |fd| read_at(fd, 5000, 69_000)),
    ("pread at the end", |fd| read_at(fd, 10, 70_000)),
    ("pread behind the end", |fd| read_at(fd, 10, 1 << 40)),
    ("pread before the beginning", |fd| read_at(fd, 10, u64::MAX)),
    ("write", |fd| done(rustix::io::write(fd, b"x"))),
    ("pwrite", |fd| done(rustix::io::pwrite(fd, b"x", 0))),
    ("lseek to 10", |fd| rustix::fs::seek(fd, SeekFrom::Start(10)).map(|at| at.to_string())),
    ("lseek to the end", |fd| rustix::fs::seek(fd, SeekFrom::End(0)).map(|at| if at > 1 << 40 { "far".to_owned() } else { at.to_string() })),
    ("lseek before the beginning", |fd| rustix::fs::seek(fd, SeekFrom::Current(-1 << 40)).map(|at| at.to_string())),
    ("lseek to data", |fd| rustix::fs::seek(fd, SeekFrom::Data(0)).map(|at| at.to_string())),
    ("lseek to a hole", |fd| rustix::fs::seek(fd, SeekFrom::Hole(0)).map(|at| at.to_string())),
    ("lseek to data behind the end", |fd| rustix::fs::seek(fd, SeekFrom::Data(1 << 40)).map(|at| at.to_string())),
    ("ftruncate", |fd| done(rustix::fs::ftruncate(fd, 1))),
    ("fallocate", |fd| done(rustix::fs::fallocate(fd, FallocateFlags::empty(), 0, 10))),
    ("fallocate a hole", |fd| done(rustix::fs::fallocate(fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, 10))),
    ("fsync", |fd| done(rustix::fs::fsync(fd))),
    ("fdatasync", |fd| done(rustix::fs::fdatasync(fd))),
    ("syncfs", |fd| done(rustix::fs::syncfs(fd))),
    ("fchmod", |fd| done(rustix::fs::fchmod(fd, Mode::from_raw_mode(0o600)))),
    ("fchown", |fd| done(rustix::fs::fchown(fd, Some(Uid::from_raw(1)), None))),
    ("futimens", |fd| done(rustix::fs::futimens(fd, &now()))),
    ("fsetxattr", |fd| done(rustix::fs::fsetxattr(fd, "user.x", b"y", XattrFlags::empty()))),
    ("fremovexattr", |fd| done(rustix::fs::fremovexattr(fd, "user.x"))),
    ("flock shared", |fd| done(rustix::fs::flock(fd, FlockOperation::NonBlockingLockShared))),
    ("flock exclusive", |fd| done(rustix::fs::flock(fd, FlockOperation::NonBlockingLockExclusive))),
    ("lock to read", |fd| locked(fd, nix::libc::F_RDLCK as nix::libc::c_int)),
    ("lock to write", |fd| locked(fd, nix::libc::F_WRLCK as nix::libc::c_int)),
    ("fadvise sequential", |fd| done(rustix::fs::fadvise(fd, 0, None, Advice::Sequential))),
    ("fadvise not needed", |fd| done(rustix::fs::fadvise(fd, 0, None, Advice::DontNeed))),
    ("map privately, to write", |fd| mapped(fd, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)),
    ("map shared, to read", |fd| mapped(fd, ProtFlags::PROT_READ, MapFlags::MAP_SHARED)),
    ("map shared, to write", |fd| mapped(fd, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED)),
    ("map to execute", |fd| mapped(fd, ProtFlags::PROT_READ | ProtFlags::PROT_EXEC, MapFlags::MAP_PRIVATE)),
    ("copy_file_range out", copied),
    ("copy_file_range in", |fd| done(rustix::fs::copy_file_range(elsewhere(), None, fd, None, 10))),
    ("sendfile out", |fd| rustix::fs::sendfile(elsewhere(), fd, None, 1 << 20).map(|got| got.to_string())),
    ("open it again to read", |fd| again(fd, OFlags::RDONLY)),
    ("open it again to write", |fd| again(fd, OFlags::WRONLY)),
    ("flags", |fd| rustix::fs::fcntl_getfl(fd).map(|flags| format!("{:?}", flags & (OFlags::RDWR | OFlags::WRONLY | OFlags::APPEND)))),
    ("get the inode's flags", |fd| done(rustix::fs::ioctl_getflags(fd))),
    ("set the inode's flags", |fd| done(rustix::fs::ioctl_setflags(fd, rustix::fs::IFlags::NOATIME))),
    ("make a file in it", |fd| done(rustix::fs::openat(fd, "new", OFlags::WRONLY | OFlags::CREATE, Mode::from_raw_mode(0o644)))),
    ("look a name up in it", |fd| rustix::fs::statat(fd, "inner", AtFlags::empty()).map(|stat| told(&stat))),
    ("remove a name from it", |fd| done(rustix::fs::unlinkat(fd, "inner", AtFlags::empty()))),
];

/// Where a mount may answer otherwise than the local disk.
struct Difference {
    /// Empty: both.
    engine: &'static str,
    /// Beginnings of the names of calls.
    calls: &'static [&'static str],
    /// Beginnings of what the disk answers; empty: anything.
    disk: &'static [&'static str],
    /// Beginnings of what the mount answers: a value, or an errno's name.
    mount: &'static [&'static str],
    /// Words of `docs/semantics.md`, "Differences from a local disk", that say so.
    documented: &'static str,
}

const DIFFERENCES: &[Difference] = &[
    Difference {
        engine: "",
        calls: &["get the inode's flags", "set the inode's flags"],
        disk: &[],
        mount: &["ENOTTY", "ENOSYS", "EOPNOTSUPP", "EROFS", "EACCES", "EPERM"],
        documented: "`ioctl` for inode flags",
    },
    Difference {
        engine: "",
        calls: &["listxattr", "llistxattr"],
        disk: &[],
        mount: &["user.larder", "\"\"", "EOPNOTSUPP"],
        documented: "attributes of Larder's own",
    },
    Difference {
        engine: "",
        calls: &["getxattr"],
        disk: &[],
        mount: &["ENODATA", "EOPNOTSUPP"],
        documented: "no attribute of the source is kept",
    },
    Difference {
        engine: "kernel",
        calls: &["open O_DIRECT"],
        disk: &[],
        mount: &["EINVAL"],
        documented: "`O_DIRECT` | works | EINVAL",
    },
    Difference {
        engine: "",
        calls: &["access to write", "truncate", "open O_WRONLY", "open O_RDWR", "open it again to write"],
        disk: &["EACCES"],
        mount: &["EROFS"],
        documented: "EROFS comes before EACCES",
    },
    Difference {
        engine: "kernel",
        calls: &["fsync", "fdatasync"],
        disk: &["done"],
        mount: &["EINVAL"],
        documented: "`fsync`, `fdatasync` with the kernel engine",
    },
];

/// Runs on a thread that is another user: only this thread, as the kernel sees it.
fn as_user<T: Send>(uid: u32, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if uid != 0 {
                let id = nix::libc::c_long::from(uid);
                // SAFETY: changes what this thread is to the kernel; the thread ends with the work.
                unsafe {
                    assert_eq!(nix::libc::syscall(nix::libc::SYS_setgroups, 0, 0), 0);
                    assert_eq!(nix::libc::syscall(nix::libc::SYS_setresgid, id, id, id), 0);
                    assert_eq!(nix::libc::syscall(nix::libc::SYS_setresuid, id, id, id), 0);
                }
            }
            work()
        });
        thread.join().expect("the calls do not panic")
    })
}

/// Gives what every call answers for every object below a root, in order.
fn answers(root: &Path) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for (kind, relative) in objects() {
        let path = Path::new(root).join(&relative);
        // `join` takes trailing dots and slashes as they are: so does the kernel.
        for (call, run) in PATH_CALLS {
            all.push((format!("{call}: {kind}"), answer(run(&path))));
        }
        for (call, run) in FD_CALLS {
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
            if let Ok(fd) = rustix::fs::open(&path, flags, Mode::empty()) {
                let is_dir = rustix::fs::fstat(&fd)
                    .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
                let mut told = answer(run(&fd));
                // A place in a directory is its file system's affair.
                if is_dir && call.starts_with("lseek") {
                    told = "a position, or none".to_owned();
                }
                all.push((format!("{call} of a descriptor: {kind}"), told));
            }
        }
    }
    all
}

fn answer(answer: Answer) -> String {
    match answer {
        Ok(text) if text.is_empty() => "\"\"".to_owned(),
        Ok(text) => text,
        Err(errno) => {
            nix::errno::Errno::from_raw(errno.raw_os_error()).to_string().split(':').next().unwrap_or("").to_owned()
        }
    }
}

/// Lists where a mount differs and may not; marks the differences that were met.
fn compare(engine: &str, uid: u32, disk: &[(String, String)], mount: &[(String, String)], met: &mut [bool]) -> String {
    let mut wrong = String::new();
    assert_eq!(disk.len(), mount.len(), "{engine} as {uid}: what can be opened differs");
    for ((call, wanted), (_, got)) in disk.iter().zip(mount) {
        if wanted == got {
            continue;
        }
        let allowed = DIFFERENCES.iter().position(|difference| {
            (difference.engine.is_empty() || difference.engine == engine)
                && difference.calls.iter().any(|begin| call.starts_with(begin))
                && (difference.disk.is_empty() || difference.disk.iter().any(|begin| wanted.starts_with(begin)))
                && difference.mount.iter().any(|begin| got.starts_with(begin))
        });
        match allowed {
            Some(at) => met[at] = true,
            None => {
                let _ = writeln!(wrong, "{engine} as {uid}: {call}: the disk says {wanted}, the mount {got}");
            }
        }
    }
    wrong
}

/// A read-only bind mount, taken away when dropped.
struct Bound(PathBuf);

impl Bound {
    fn of(source: &Path, at: PathBuf) -> Self {
        let none = None::<&str>;
        nix::mount::mount(Some(source), &at, none, MsFlags::MS_BIND, none).expect("binds");
        let flags =
            MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        nix::mount::mount(none, &at, none, flags, none).expect("makes it read-only");
        Self(at)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_mount_answers_every_call_for_every_object_as_a_read_only_disk_does() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root, for a bind mount to compare with");
        return;
    }
    let world = World::new();
    // Other users get through to the trees.
    fs::set_permissions(world.path(""), fs::Permissions::from_mode(0o755)).expect("opens the world");
    let source = world.make_dir("source");
    make_tree(&source);
    world.push(&source, "tree");
    world.ok(["cache", "tree"]);
    let disk = Bound::of(&source, world.make_dir("disk"));
    let options = ["--allow-other", "--uid", "0", "--gid", "0"];
    let mut mounts = vec![("fuse", world.mount("tree", "fuse", &options))];
    mounts.extend(mount_by_kernel(&world, "tree", "kernel", &options).map(|dir| ("kernel", dir)));
    let mut met = vec![false; DIFFERENCES.len()];
    let mut wrong = String::new();
    for uid in [0, 4001] {
        let wanted = as_user(uid, || answers(&disk.0));
        assert!(wanted.len() > 2000, "{} answers: the tables were walked", wanted.len());
        for (engine, dir) in &mounts {
            let got = as_user(uid, || answers(dir));
            wrong += &compare(engine, uid, &wanted, &got, &mut met);
        }
    }
    assert!(wrong.is_empty(), "{} differences that no page explains:\n{wrong}", wrong.lines().count());
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/semantics.md")).expect("reads");
    for difference in DIFFERENCES {
        assert!(page.contains(difference.documented), "docs/semantics.md does not say: {}", difference.documented);
    }
}
