//! What every program expects of a file system.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::errno::Errno;
use nix::unistd::Whence;

use super::rig::{Mount, Rig, noise, options, read_range};
use crate::format::digest::digest;
use crate::fs::session::ServeOptions;
use crate::fs::view::{Look, ViewOptions};
use crate::testkit::model::{Dir, FILE_MODE, File, MTIME, Node, Packing, dir, file, members, subdirs};

pub(super) fn sample() -> Dir {
    let shared = Node::File(File { bytes: noise(1, 5000), group: 1, sparse: false });
    let mut holes = vec![0; 300_000];
    holes[200_000..200_100].fill(7);
    let long = "n".repeat(255);
    let mut hostile = dir([(long.as_str(), file(b"long")), (" ", file(b"blank")), ("-rf", file(b"dash"))]);
    hostile.insert(b"\xff\xfe\n\t\\".to_vec(), file(b"not text"));
    hostile.insert(b"\"'$(x)`;&|*?[".to_vec(), Node::Symlink(b"nowhere/\xff".to_vec()));
    dir([
        ("a", shared.clone()),
        ("big", file(&noise(2, 3 << 20))),
        ("deep", Node::Dir(dir([("er", Node::Dir(dir([("link", shared), ("empty", file(b""))])))]))),
        ("edge", file(&noise(3, 262_144))),
        ("edge1", file(&noise(4, 262_145))),
        ("holes", Node::File(File { bytes: holes, group: 0, sparse: true })),
        ("hostile", Node::Dir(hostile)),
        ("no names", Node::Dir(Dir::new())),
        ("nothing", Node::File(File { bytes: vec![0; 100_000], group: 0, sparse: true })),
        ("to", Node::Symlink(b"deep/er/empty".to_vec())),
    ])
}

fn rig() -> Option<Rig> {
    Rig::new(&sample(), Packing::default())
}

/// Compares everything below a directory with the model.
pub(super) fn compare(at: &Path, model: &Dir, counts: &HashMap<u8, u32>) {
    let listed: Vec<Vec<u8>> =
        fs::read_dir(at).expect("lists").map(|entry| entry.expect("reads").file_name().as_bytes().to_vec()).collect();
    assert_eq!(listed, model.keys().cloned().collect::<Vec<_>>(), "{}", at.display());
    assert_eq!(fs::metadata(at).expect("stats").nlink(), 2 + subdirs(model), "{}", at.display());
    for (name, node) in model {
        let path = at.join(OsStr::from_bytes(name));
        let meta = fs::symlink_metadata(&path).expect("stats");
        assert_eq!((meta.mtime(), meta.mtime_nsec()), (MTIME.secs, i64::from(MTIME.nanos)), "{}", path.display());
        match node {
            Node::Dir(below) => compare(&path, below, counts),
            Node::Symlink(target) => {
                assert!(meta.is_symlink());
                assert_eq!(fs::read_link(&path).expect("reads").as_os_str().as_bytes(), target);
            }
            Node::File(file) => {
                assert_eq!((meta.len(), meta.mode() & 0o7777), (file.bytes.len() as u64, FILE_MODE));
                assert_eq!(meta.nlink(), u64::from(counts.get(&file.group).copied().unwrap_or(1)));
                assert!(fs::read(&path).expect("reads") == file.bytes, "{} differs", path.display());
            }
        }
    }
}

#[test]
fn a_mount_shows_exactly_what_was_committed() {
    let Some(rig) = rig() else { return };
    let mount = rig.mount();
    let mut counts = HashMap::new();
    members(&sample(), &mut counts);
    compare(&mount.dir, &sample(), &counts);
    // Once more from the kernel's caches, and by listings of which nothing is kept.
    compare(&mount.dir, &sample(), &counts);
    assert_eq!(mount.mounted.stats().errors, 0);
}

#[test]
fn inode_numbers_are_the_ranks_and_equal_in_every_mount() {
    let Some(rig) = rig() else { return };
    let (one, two) = (rig.mount(), rig.mount());
    assert_eq!(fs::metadata(&one.dir).expect("stats").ino(), 1);
    let ino = |mount: &Mount, path: &str| fs::symlink_metadata(mount.path(path)).expect("stats").ino();
    for (rank, path) in rig.made.order.iter().enumerate() {
        let path = String::from_utf8_lossy(path);
        if path.contains('\u{fffd}') {
            continue;
        }
        let first = if path == "deep/er/link" { 0 } else { rank as u64 };
        assert_eq!((ino(&one, &path), ino(&two, &path)), (first + 2, first + 2), "{path}");
    }
}

fn errno_of<T: std::fmt::Debug>(result: io::Result<T>) -> Option<Errno> {
    result.err().and_then(|error| error.raw_os_error()).map(Errno::from_raw)
}

#[test]
fn every_call_that_would_write_is_erofs() {
    let Some(rig) = rig() else { return };
    let mount = rig.mount();
    let (a, new) = (mount.path("a"), mount.path("new"));
    let nix = |result: nix::Result<()>| result.err();
    let now = nix::sys::time::TimeSpec::new(1, 1);
    let results = [
        ("open for writing", errno_of(OpenOptions::new().write(true).open(&a))),
        ("open for appending", errno_of(OpenOptions::new().append(true).open(&a))),
        ("open and truncate", errno_of(OpenOptions::new().write(true).truncate(true).open(&a))),
        ("creat", errno_of(fs::File::create(&new))),
        ("mkdir", errno_of(fs::create_dir(&new))),
        ("symlink", errno_of(symlink("x", &new))),
        ("link", errno_of(fs::hard_link(&a, &new))),
        ("unlink", errno_of(fs::remove_file(&a))),
        ("rmdir", errno_of(fs::remove_dir(mount.path("no names")))),
        ("rename", errno_of(fs::rename(&a, &new))),
        ("truncate", nix(nix::unistd::truncate(&a, 0))),
        ("chmod", errno_of(fs::set_permissions(&a, fs::Permissions::from_mode(0o600)))),
        ("chown", errno_of(std::os::unix::fs::chown(&a, Some(1), Some(1)))),
        ("mkfifo", nix(nix::unistd::mkfifo(&new, nix::sys::stat::Mode::S_IRWXU))),
        (
            "utimes",
            nix(nix::sys::stat::utimensat(
                nix::fcntl::AT_FDCWD,
                &a,
                &now,
                &now,
                nix::sys::stat::UtimensatFlags::FollowSymlink,
            )),
        ),
        ("access for writing", nix(nix::unistd::access(&a, nix::unistd::AccessFlags::W_OK))),
        (
            "create a file without a name",
            errno_of(OpenOptions::new().write(true).custom_flags(nix::libc::O_TMPFILE).open(&mount.dir)),
        ),
    ];
    for (call, errno) in results {
        assert_eq!(errno, Some(Errno::EROFS), "{call}");
    }
    let set = Command::new("setfattr").args(["-n", "user.x", "-v", "1"]).arg(&a).output();
    if let Ok(output) = set {
        assert!(String::from_utf8_lossy(&output.stderr).contains("Read-only file system"), "{output:?}");
    }
}

#[test]
fn the_mount_table_names_the_revision_and_forbids_suid_devices_and_writing() {
    let Some(rig) = rig() else { return };
    let mount = rig.mount();
    let table = fs::read_to_string("/proc/self/mountinfo").expect("reads");
    let line = table.lines().find(|line| line.contains(&*mount.dir.to_string_lossy())).expect("is there");
    assert!(line.contains(" - fuse.larder larder:made@v1 ro"), "{line}");
    for option in ["ro", "nosuid", "nodev"] {
        assert!(line.split([' ', ',']).any(|word| word == option), "{option}: {line}");
    }
    assert!(line.contains("default_permissions") && line.contains("allow_other"), "{line}");
}

#[test]
fn statfs_gives_the_sums_of_the_commit() {
    let Some(rig) = rig() else { return };
    let mount = rig.mount();
    let stat = nix::sys::statvfs::statvfs(&mount.dir).expect("stats");
    let bytes = 5000 + (3 << 20) + 262_144 + 262_145 + 300_000 + 100_000 + 4 + 5 + 4 + 8;
    assert_eq!(stat.blocks() * stat.fragment_size(), u64::div_ceil(bytes, 4096) * 4096);
    assert_eq!((stat.blocks_free(), stat.blocks_available(), stat.files_free()), (0, 0, 0));
    // Everything but the second link of a, and the root.
    assert_eq!(stat.files(), rig.made.order.len() as u64 - 1 + 1);
    assert_eq!(stat.name_max(), 255);
}

#[test]
fn extended_attributes_show_commit_and_digest() {
    let Some(rig) = rig() else { return };
    let mount = rig.mount();
    let get = |path: &Path, name: &str| {
        let output = Command::new("getfattr").args(["-h", "--only-values", "-n", name]).arg(path).output().ok()?;
        Some(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let Some(commit) = get(&mount.dir, "user.larder.commit") else {
        eprintln!("skipped: needs getfattr (package attr)");
        return;
    };
    assert_eq!(commit, rig.snapshot.commit.to_string());
    assert_eq!(get(&mount.path("a"), "user.larder.digest"), Some(digest(&noise(1, 5000)).to_string()));
    assert_eq!(get(&mount.path("deep"), "user.larder.digest").as_deref(), Some(""));
    let listed = Command::new("getfattr").args(["-d", "-m", "-"]).arg(mount.path("a")).output().expect("runs");
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    for name in ["user.larder.commit=", "user.larder.tree=", "user.larder.digest="] {
        assert!(listed.contains(name), "{listed}");
    }
}

#[test]
fn mapped_pages_are_the_files_bytes() {
    let Some(rig) = rig() else { return };
    let mount = rig.mount();
    // cmp --bytes maps nothing; python maps.
    let script = "import mmap,sys,hashlib\nf=open(sys.argv[1],'rb')\nm=mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ)\nf.close()\nprint(hashlib.sha256(m[::-1]).hexdigest(), m[1000000:1000010].hex())";
    let Ok(output) = Command::new("python3").args(["-c", script]).arg(mount.path("big")).output() else {
        eprintln!("skipped: needs python3");
        return;
    };
    let expected = hex::encode(&noise(2, 3 << 20)[1_000_000..1_000_010]);
    assert!(String::from_utf8_lossy(&output.stdout).trim().ends_with(&expected), "{output:?}");
}

#[test]
fn a_program_runs_from_a_mount() {
    let cat = fs::read("/bin/cat").expect("reads");
    let Some(rig) = Rig::new(&dir([("cat", file(&cat))]), Packing::default()) else {
        return;
    };
    let look = Look { file_mode: Some(0o755), ..options().look };
    let mount = rig.mount_as(ViewOptions { look, ..options() }, ServeOptions::default());
    let output = Command::new(mount.path("cat")).arg("/proc/self/comm").output().expect("runs");
    assert_eq!(output.stdout, b"cat\n");
}

#[test]
fn reads_past_the_page_cache_have_any_offset_and_length() {
    let Some(rig) = rig() else { return };
    let mount = rig.mount();
    let expected = noise(2, 3 << 20);
    let file = super::rig::open(&mount.path("big"), true).expect("opens");
    for (offset, len) in
        [(0, 4096), (1, 1), (4095, 2), (262_143, 70_000), (3 << 20, 10), ((3 << 20) - 5, 100), (77, 3 << 20)]
    {
        let want = expected.get(offset..).unwrap_or_default();
        let want = &want[..want.len().min(len)];
        assert!(read_range(&file, offset as u64, len).expect("reads") == want, "{offset} {len}");
    }
}

#[test]
fn every_file_is_data_up_to_its_size() {
    let Some(rig) = rig() else { return };
    let mount = rig.mount();
    let file = fs::File::open(mount.path("holes")).expect("opens");
    assert_eq!(nix::unistd::lseek(&file, 1000, Whence::SeekData), Ok(1000));
    assert_eq!(nix::unistd::lseek(&file, 1000, Whence::SeekHole), Ok(300_000));
    assert_eq!(nix::unistd::lseek(&file, 300_000, Whence::SeekData), Err(Errno::ENXIO));
    assert_eq!(nix::unistd::lseek(&file, -1, Whence::SeekEnd), Ok(299_999));
}

#[test]
fn locks_work_between_the_processes_of_a_machine() {
    let Some(rig) = rig() else { return };
    let mount = rig.mount();
    let (one, two) = (fs::File::open(mount.path("a")).expect("opens"), fs::File::open(mount.path("a")).expect("opens"));
    one.try_lock().expect("locks");
    assert!(matches!(two.try_lock(), Err(fs::TryLockError::WouldBlock)));
    one.unlock().expect("unlocks");
    two.try_lock_shared().expect("locks");
    one.try_lock_shared().expect("locks");
}

#[test]
fn another_user_sees_what_the_modes_allow() {
    let Some(rig) = rig() else { return };
    let look = Look { uid: 12_345, gid: 54_321, file_mode: Some(0o640), dir_mode: Some(0o755), ..options().look };
    let mount = rig.mount_as(ViewOptions { look, ..options() }, ServeOptions::default());
    // The test's own directory is closed to others.
    let parent = mount.dir.parent().expect("lies in the test's directory");
    fs::set_permissions(parent, fs::Permissions::from_mode(0o755)).expect("chmods");
    let run = |uid: u32, gid: u32| Command::new("cat").arg(mount.path("a")).uid(uid).gid(gid).output().expect("runs");
    assert_eq!(run(12_345, 1).stdout, noise(1, 5000), "the owner reads");
    assert_eq!(run(1, 54_321).stdout, noise(1, 5000), "the group reads");
    let other = run(1, 1);
    assert!(
        other.stdout.is_empty() && String::from_utf8_lossy(&other.stderr).contains("Permission denied"),
        "{other:?}"
    );
    let meta = fs::metadata(mount.path("a")).expect("stats");
    assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o7777), (12_345, 54_321, 0o640));
}

#[test]
fn a_subdirectory_can_be_the_root() {
    let Some(rig) = rig() else { return };
    let whole = rig.mount();
    let mount = rig.mount_as(ViewOptions { subdir: b"deep/er".to_vec(), ..options() }, ServeOptions::default());
    let names: Vec<_> = fs::read_dir(&mount.dir).expect("lists").map(|e| e.expect("reads").file_name()).collect();
    assert_eq!(names, ["empty", "link"]);
    assert_eq!(fs::read(mount.path("link")).expect("reads"), noise(1, 5000));
    let ino = |path: &Path| fs::metadata(path).expect("stats").ino();
    assert_eq!(ino(&mount.dir), 1);
    assert_eq!(ino(&mount.path("link")), ino(&whole.path("a")));
}

#[test]
fn many_threads_read_at_once() {
    let Some(rig) = rig() else { return };
    let mount = rig.mount();
    let paths = ["a", "big", "edge", "edge1", "holes", "deep/er/link"];
    let expected: Vec<Vec<u8>> = paths.iter().map(|path| fs::read(mount.path(path)).expect("reads")).collect();
    assert!(expected[1] == noise(2, 3 << 20));
    std::thread::scope(|scope| {
        for thread in 0..64 {
            let (mount, expected) = (&mount, &expected);
            scope.spawn(move || {
                for round in 0..6 {
                    let at = (thread + round) % paths.len();
                    let mut bytes = Vec::new();
                    let mut file = super::rig::open(&mount.path(paths[at]), round % 2 == 1).expect("opens");
                    file.read_to_end(&mut bytes).expect("reads");
                    assert!(bytes == expected[at], "{} differs", paths[at]);
                }
            });
        }
    });
    assert_eq!(mount.mounted.stats().errors, 0);
}

#[test]
fn what_the_kernel_knows_is_not_asked_again() {
    let Some(rig) = rig() else { return };
    let mount = rig.mount();
    let look = || {
        for path in ["a", "deep/er/empty", "missing", "deep/missing", "to"] {
            let _ = fs::symlink_metadata(mount.path(path));
        }
        let _ = fs::read_link(mount.path("to"));
        let _ = fs::read(mount.path("deep/er/link"));
        assert!(fs::read_dir(&mount.dir).expect("lists").count() > 5);
    };
    look();
    look();
    mount.wait_for("the release", |stats| stats.open_files == 0);
    let before = mount.mounted.stats().requests;
    look();
    mount.wait_for("the release", |stats| stats.open_files == 0);
    let asked = mount.mounted.stats().requests - before;
    assert!(asked <= 2, "an open and a release, but {asked} requests came");
}

#[test]
fn small_files_that_the_kernel_has_are_opened_and_read_without_asking() {
    let model: Dir = (0..100).map(|n| (format!("f{n}").into_bytes(), file(&noise(n, 700)))).collect();
    let Some(rig) = Rig::new(&model, Packing { pack_len: 1 << 20, ..Packing::default() }) else { return };
    for counts_opens in [false, true] {
        let mount = rig.mount_as(options(), ServeOptions { workers: 2, counts_opens, ..ServeOptions::default() });
        assert_eq!(mount.mounted.stats().skips_opens, !counts_opens);
        compare(&mount.dir, &model, &HashMap::new());
        mount.wait_for("the releases", |stats| stats.open_files == 0);
        let before = mount.mounted.stats().requests;
        compare(&mount.dir, &model, &HashMap::new());
        mount.wait_for("the releases", |stats| stats.open_files == 0);
        let asked = mount.mounted.stats().requests - before;
        assert_eq!(asked, if counts_opens { 200 } else { 0 }, "an open and a release for each, or nothing");
    }
}

#[test]
fn no_special_files_and_kinds_are_right_in_listings() {
    let Some(rig) = rig() else { return };
    let mount = rig.mount();
    for entry in fs::read_dir(&mount.dir).expect("lists") {
        let entry = entry.expect("reads");
        let (listed, found) = (entry.file_type().expect("type"), entry.metadata().expect("stats").file_type());
        assert_eq!(listed, found, "{:?}", entry.file_name());
        assert!(!listed.is_fifo() && !listed.is_socket() && !listed.is_char_device() && !listed.is_block_device());
    }
}

#[test]
fn a_busy_mount_is_unmounted_by_force_only_and_open_files_go_on() {
    let Some(rig) = rig() else { return };
    let mount = rig.mount();
    let file = fs::File::open(mount.path("big")).expect("opens");
    let busy = mount.mounted.unmount(false);
    assert!(matches!(busy, Err(crate::fs::keeper::KeeperError::Busy { .. })), "{busy:?}");
    mount.mounted.unmount(true).expect("unmounts");
    assert!(!mount.path("big").exists());
    let mut bytes = [0; 10];
    file.read_exact_at(&mut bytes, 2 << 20).expect("reads");
    assert_eq!(bytes, noise(2, 3 << 20)[2 << 20..][..10]);
    assert!(mount.mounted.is_alive());
    drop(file);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while mount.mounted.is_alive() {
        assert!(std::time::Instant::now() < deadline, "the workers end with the last file");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

#[test]
fn an_unmount_by_somebody_else_ends_the_workers() {
    let Some(rig) = rig() else { return };
    let mount = rig.mount();
    nix::mount::umount(&mount.dir).expect("unmounts");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while mount.mounted.is_alive() {
        assert!(std::time::Instant::now() < deadline, "the workers end");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    mount.mounted.unmount(false).expect("nothing is left to do");
}
