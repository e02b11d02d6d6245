//! Mounts of a user who is not root, through fusermount3.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use crate::kit::World;
use crate::survive::has_resend;

/// `nobody`: fusermount3 wants a user that has a name.
const UID: u32 = 65534;

/// Gives the script's prefix that makes /dev/fuse the user's in a mount namespace of its own (it is so on
/// most systems, but a container or a bare machine may have it for root only).
fn own_device(world: &World) -> Option<String> {
    let missing = |what: &str| {
        eprintln!("skipped: needs {what}");
        None
    };
    if !nix::unistd::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        return missing("root and /dev/fuse");
    }
    for program in ["unshare", "setpriv", "fusermount3"] {
        if Command::new(program).arg("--version").output().is_err() {
            return missing(program);
        }
    }
    let device = world.path("fuse");
    let mode = nix::sys::stat::Mode::from_bits_truncate(0o666);
    let number = nix::sys::stat::makedev(10, 229);
    if nix::sys::stat::mknod(&device, nix::sys::stat::SFlag::S_IFCHR, mode, number).is_err() {
        return missing("leave to make a device node");
    }
    fs::set_permissions(&device, fs::Permissions::from_mode(0o666)).expect("chmods");
    Some(format!("mount --bind {} /dev/fuse", device.display()))
}

#[test]
fn a_user_mounts_reads_and_unmounts_without_root() {
    let world = World::of_user(UID);
    let Some(prepare) = own_device(&world) else {
        return;
    };
    let source = world.files("source", &[("a", b"of a user"), ("dir/b", b"too")]);
    let target = world.make_dir("m");
    let larder = world.binary().display();
    let as_user = format!("setpriv --reuid {UID} --regid {UID} --clear-groups sh -e");
    let (home, source, target) = (world.path("home"), source.display(), target.display());
    let script = format!(
        "{prepare}
export HOME={home} LARDER_STEWARD_PERIOD=1s
cd {home}
{as_user} <<'USER'
{larder} push {source} own
{larder} mount own {target}
grep ' {target} ' /proc/self/mountinfo | sed 's/^.* - / - /;s/^/MOUNT /'
grep ' {target} ' /proc/self/mountinfo | cut -d' ' -f6 | sed 's/^/FLAGS /'
echo \"BYTES $(cat {target}/a) $(cat {target}/dir/b)\"
echo \"OWNER $(stat -c '%u %g %i' {target}/a)\"
touch {target}/a 2>&1 | sed 's/^/TOUCH /'
exec 3< {target}/a
{kill}
stat -f {target} > /dev/null
echo \"ALIVE $(cat <&3) $(ls {target}/dir)\"
exec 3<&-
USER
echo \"ROOT $(cat {target}/a 2>&1)\"
{as_user} <<'USER'
{larder} umount {target}
echo \"LEFT $(ls {target} | wc -l)\"
{larder} mount own {target}
cat {target}/a > /dev/null
fusermount3 -u {target}
echo \"GONE $(ls {target} | wc -l)\"
{larder} daemon stop
USER
",
        home = home.display(),
        // The keeper starts another daemon, without root as well.
        kill = if has_resend() { "kill -9 $(cat .local/state/larder/daemon.lock)" } else { "" },
    );
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-e", "-c", &script])
        .output()
        .expect("runs");
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let line =
        |word: &str| said.lines().find(|line| line.starts_with(word)).unwrap_or_else(|| panic!("no {word}: {said}"));
    assert!(line("MOUNT").contains(" - fuse.larder larder:own"), "{said}");
    assert!(line("MOUNT").contains(&format!("user_id={UID},group_id={UID},default_permissions")), "{said}");
    assert!(!line("MOUNT").contains("allow_other"), "{said}");
    for flag in ["ro", "nosuid", "nodev"] {
        assert!(line("FLAGS").split([' ', ',']).any(|word| word == flag), "{flag}: {said}");
    }
    assert_eq!(line("BYTES"), "BYTES of a user too");
    assert_eq!(line("ALIVE"), "ALIVE of a user b");
    assert_eq!(line("OWNER"), format!("OWNER {UID} {UID} 2"));
    assert!(line("TOUCH").contains("Read-only file system"), "{said}");
    assert!(line("ROOT").contains("Permission denied"), "not even root looks into a user's mount: {said}");
    assert_eq!(line("LEFT"), "LEFT 0");
    assert_eq!(line("GONE"), "GONE 0");
    assert!(output.status.success(), "{said}");
}
