//! Trees nobody here wrote, pushed and mounted by the real binary, against their source.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, SystemTime};

use crate::kit::{World, mount_by_kernel};

/// Runs a tool; None where it is not installed.
fn tool(program: &str, args: &[&OsStr]) -> Option<Output> {
    let output = Command::new(program).args(args).env("LC_ALL", "C").output();
    if output.is_err() {
        eprintln!("skipped: needs {program}");
    }
    output.ok()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn with_slash(path: &Path) -> PathBuf {
    path.join("")
}

/// Sets a time of modification, also of directories.
fn set_mtime(path: &Path, time: SystemTime) {
    fs::File::open(path).expect("opens").set_modified(time).expect("sets the time");
}

/// Makes a tree of everything that file systems get wrong.
fn hostile(dir: &Path) {
    let put = |name: &[u8], bytes: &[u8]| {
        let path = dir.join(OsStr::from_bytes(name));
        fs::create_dir_all(path.parent().expect("has a parent")).expect("makes the parents");
        fs::write(&path, bytes).expect("writes");
        path
    };
    for name in [
        b" ".as_slice(),
        b"-rf",
        b"a\nb",
        b"\xff\xfe",
        b"*?[a]",
        b"$(echo x)`y`;&|",
        b"\"'\\",
        b"...",
        b"..a",
        b"CON",
        b"a:b",
        b"\t",
        b"~",
        b"#x#",
        &[b'n'; 255],
    ] {
        put(name, name);
        put(&[b"in/", name].concat(), name);
    }
    put(b"empty", b"");
    fs::create_dir_all(dir.join("no names/in/here")).expect("makes directories");
    let linked = put(b"links/one", &[3; 10_000]);
    fs::hard_link(&linked, dir.join("links/two")).expect("links");
    fs::hard_link(&linked, dir.join("a link elsewhere")).expect("links");
    for (name, target) in [("dangling", "no/such"), ("absolute", "/etc/hostname"), ("up", "../../.."), ("self", "self")]
    {
        symlink(target, dir.join(name)).expect("links");
    }
    symlink("x".repeat(4000), dir.join("long target")).expect("links");
    symlink(OsStr::from_bytes(b"\xff/\n"), dir.join("odd target")).expect("links");
    let sparse = fs::File::create(dir.join("sparse")).expect("creates");
    sparse.set_len(5_000_000).expect("grows");
    sparse.write_all_at(b"in the middle", 2_500_000).expect("writes");
    fs::File::create(dir.join("only holes")).expect("creates").set_len(1_000_000).expect("grows");
    for (name, mode) in
        [("set ids", 0o6755), ("sticky", 0o1777), ("nothing", 0o000), ("run", 0o755), ("write only", 0o222)]
    {
        fs::set_permissions(put(name.as_bytes(), name.as_bytes()), fs::Permissions::from_mode(mode)).expect("chmods");
    }
    fs::set_permissions(dir.join("links"), fs::Permissions::from_mode(0o2750)).expect("chmods");
    let epoch = SystemTime::UNIX_EPOCH;
    set_mtime(&dir.join("empty"), epoch);
    set_mtime(&dir.join("run"), epoch - Duration::new(86_400 * 3650, 1));
    set_mtime(&dir.join("sticky"), epoch + Duration::new(4_102_444_800, 999_999_999));
    set_mtime(&dir.join("in"), epoch + Duration::new(1, 123_456_789));
    let deep = "d/".repeat(120);
    put(format!("{deep}bottom").as_bytes(), b"deep");
    for size in [1, 4095, 4096, 4097, 262_143, 262_144, 262_145, 3_000_000] {
        put(format!("sizes/{size}").as_bytes(), &vec![size as u8 | 1; size]);
    }
}

/// Asserts that rsync, diff, find and tar see no difference between a tree and its mount.
fn assert_same(source: &Path, mounted: &Path) {
    let (from, to) = (with_slash(source), with_slash(mounted));
    let args = ["-naciH", "--no-o", "--no-g", "--delete"].map(OsStr::new);
    let args = [&args[..], &[from.as_os_str(), to.as_os_str()]].concat();
    if let Some(output) = tool("rsync", &args) {
        assert!(output.status.success() && output.stdout.is_empty(), "rsync: {}", text(&output));
    }
    let args = [OsStr::new("-r"), OsStr::new("--no-dereference"), from.as_os_str(), to.as_os_str()];
    if let Some(output) = tool("diff", &args) {
        assert!(output.status.success() && output.stdout.is_empty(), "diff: {}", text(&output));
    }
    // Kind, mode, links (also of directories), size, time to the nanosecond, target.
    let list = |at: &Path| {
        let script = "find . -mindepth 1 \\( -type d -printf '%P %y %m %n %T@ %l\\0' -o -printf '%P %y %m %n %s %T@ %l\\0' \\) | sort -z";
        let output = Command::new("sh").args(["-c", script]).current_dir(at).env("LC_ALL", "C").output().expect("runs");
        assert!(output.status.success(), "find: {}", text(&output));
        output.stdout
    };
    let (expected, got) = (list(source), list(mounted));
    for (expected, got) in expected.split(|&b| b == 0).zip(got.split(|&b| b == 0)) {
        assert_eq!(String::from_utf8_lossy(got), String::from_utf8_lossy(expected));
    }
    assert_eq!(got.len(), expected.len());
    let pack = |at: &Path| {
        let script = "tar --sort=name --owner=0 --group=0 --numeric-owner --format=posix --pax-option=delete=atime,delete=ctime -cf - . | sha256sum";
        let output = Command::new("sh").args(["-c", script]).current_dir(at).output().expect("runs");
        assert!(output.stderr.is_empty(), "tar: {}", text(&output));
        output.stdout
    };
    assert_eq!(pack(source), pack(mounted), "tar makes another archive of the mount");
}

fn can_mount_for_others() -> bool {
    let can = Path::new("/dev/fuse").exists() && nix::unistd::geteuid().is_root();
    if !can {
        eprintln!("skipped: needs root and /dev/fuse");
    }
    can
}

#[test]
fn a_tree_of_everything_that_goes_wrong_comes_back_as_it_was() {
    if !can_mount_for_others() {
        return;
    }
    let world = World::new();
    let source = world.make_dir("source");
    hostile(&source);
    world.push(&source, "hostile");
    let mounted = world.mount("hostile", "m", &[]);
    assert_same(&source, &mounted);
    // From the kernel's caches as well, and in a second mount with the same numbers.
    assert_same(&source, &mounted);
    let second = world.mount("hostile", "m2", &[]);
    let numbers = |at: &Path| {
        let output = Command::new("sh").args(["-c", "find . -printf '%i %P\\0' | sort -z"]).current_dir(at).output();
        output.expect("runs").stdout
    };
    assert_eq!(numbers(&mounted), numbers(&second));
    // The same contract by the other engine.
    world.ok(["cache", "hostile"]);
    let Some(third) = mount_by_kernel(&world, "hostile", "m3", &["--allow-other"]) else { return };
    assert_same(&source, &third);
    assert_same(&source, &third);
}

#[test]
fn a_tree_of_programs_comes_back_as_it_was() {
    let perl = Path::new("/usr/share/perl");
    if !can_mount_for_others() || !perl.exists() {
        return;
    }
    let world = World::new();
    let source = world.make_dir("source");
    let copied = tool("cp", &["-a".as_ref(), perl.as_os_str(), source.as_os_str()]).expect("cp is everywhere");
    assert!(copied.status.success(), "{}", text(&copied));
    world.push(&source, "perl");
    assert_same(&source, &world.mount("perl", "m", &[]));
    world.ok(["cache", "perl"]);
    if let Some(mounted) = mount_by_kernel(&world, "perl", "m2", &["--allow-other"]) {
        assert_same(&source, &mounted);
    }
}

#[test]
fn a_mount_is_taken_away_by_the_systems_own_tools_too() {
    if !can_mount_for_others() {
        return;
    }
    let world = World::new();
    let source = world.files("source", &[("a", b"1")]);
    world.push(&source, "small");
    let mounted = world.mount("small", "m", &[]);
    assert_eq!(fs::read(mounted.join("a")).expect("reads"), b"1");
    let output = tool("umount", &[mounted.as_os_str()]).expect("umount is everywhere");
    assert!(output.status.success(), "{}", text(&output));
    assert!(world.mounted().is_empty());
    world.ok(["mount", "small", mounted.to_str().expect("plain")]);
    assert_eq!(fs::read(mounted.join("a")).expect("reads"), b"1");
}
