//! A keeper in a thread, with real mounts where this process may make them.

use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::*;

fn start(state: &Path) -> (Client, JoinHandle<io::Result<()>>) {
    let keeper = Keeper::open(state).expect("opens").expect("nobody else has it");
    let thread = thread::spawn(move || keeper.serve());
    (Client::connect(state).expect("answers"), thread)
}

fn can_mount() -> bool {
    let can = Path::new("/dev/fuse").exists() && geteuid().is_root();
    if !can {
        eprintln!("skipped: needs root and /dev/fuse");
    }
    can
}

fn request(dir: &Path) -> MountRequest {
    MountRequest { dir: dir.to_owned(), owner: None, source: "xray@v1".into(), allow_other: false, note: "n".into() }
}

#[test]
fn a_keeper_without_mounts_answers_and_stops() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (client, thread) = start(dir.path());
    assert_eq!(client.list().expect("lists"), []);
    client.stop().expect("stops");
    thread.join().expect("joins").expect("ended well");
    assert!(Client::connect(dir.path()).is_err());
}

#[test]
fn the_second_keeper_of_a_directory_leaves_the_first_alone() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (client, thread) = start(dir.path());
    assert!(Keeper::open(dir.path()).expect("looks").is_none());
    client.stop().expect("the first one still has its socket");
    thread.join().expect("joins").expect("ended well");
}

#[test]
fn a_socket_in_a_directory_with_a_long_name_works() {
    let dir = tempfile::tempdir().expect("tempdir");
    let long = dir.path().join("x".repeat(200)).join("y".repeat(200));
    let (client, thread) = start(&long);
    client.stop().expect("stops");
    thread.join().expect("joins").expect("ended well");
}

#[test]
fn what_is_not_a_larder_mount_is_not_unmounted() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (client, thread) = start(dir.path());
    let refused = client.unmount(Path::new("/proc"), true);
    assert!(matches!(refused, Err(KeeperError::Refused { .. })), "{refused:?}");
    assert!(Path::new("/proc/self").exists());
    client.stop().expect("stops");
    thread.join().expect("joins").expect("ended well");
}

#[test]
fn a_mount_is_listed_given_again_and_unmounted() {
    if !can_mount() {
        return;
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let target = dir.path().join("target");
    fs::create_dir(&target).expect("mkdir");
    let (client, thread) = start(&dir.path().join("state"));
    let fds = client.mount(request(&target)).expect("mounts");
    client.set_note(fds.id, "other").expect("keeps a note");
    let listed = client.list().expect("lists");
    assert_eq!(listed.len(), 1);
    let kept = listed.first().expect("one");
    assert_eq!((kept.dir.as_path(), kept.note.as_str(), kept.detached), (target.as_path(), "other", false));
    assert_eq!(kept.server_pid, std::process::id() as i32);
    assert_eq!(client.attach(fds.id).expect("gives").id, fds.id);
    let busy = client.stop();
    assert!(matches!(busy, Err(KeeperError::Refused { .. })), "{busy:?}");
    client.unmount(&target, false).expect("unmounts");
    assert_eq!(client.list().expect("lists"), []);
    client.stop().expect("stops");
    thread.join().expect("joins").expect("ended well");
}

#[test]
fn what_has_to_be_somebodys_directory_is_not_reached_through_a_link_and_not_anybody_elses() {
    if !can_mount() {
        return;
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let (own, other) = (dir.path().join("own/m"), dir.path().join("other"));
    for path in [&own, &other] {
        fs::create_dir_all(path).expect("mkdir");
    }
    std::os::unix::fs::chown(&own, Some(4242), None).expect("chown");
    let (client, thread) = start(&dir.path().join("state"));
    let theirs = |dir: &Path| MountRequest { owner: Some(4242), ..request(dir) };
    for path in [other.clone(), dir.path().join("gone")] {
        assert!(client.mount(theirs(&path)).is_err(), "{}", path.display());
    }
    client.mount(theirs(&own)).expect("mounts on their own");
    client.unmount(&own, false).expect("unmounts");
    // As a user does who has a row in the mount table and waits for the next daemon.
    fs::rename(dir.path().join("own"), dir.path().join("moved")).expect("moves");
    std::os::unix::fs::symlink(dir.path().join("moved"), dir.path().join("own")).expect("links");
    let refused = client.mount(theirs(&own));
    assert!(matches!(refused, Err(KeeperError::Refused { .. })), "{refused:?}");
    fs::remove_file(dir.path().join("own")).expect("unlinks");
    fs::create_dir(dir.path().join("own")).expect("mkdir");
    std::os::unix::fs::symlink(&other, &own).expect("links");
    assert!(client.mount(theirs(&own)).is_err(), "the directory itself is a link");
    assert_eq!(client.list().expect("lists"), []);
    client.stop().expect("stops");
    thread.join().expect("joins").expect("ended well");
}

#[test]
fn a_mount_that_somebody_else_unmounts_is_forgotten() {
    if !can_mount() {
        return;
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let target = dir.path().join("a b");
    fs::create_dir(&target).expect("mkdir");
    let (client, thread) = start(&dir.path().join("state"));
    client.mount(request(&target)).expect("mounts");
    nix::mount::umount(&target).expect("unmounts");
    assert_eq!(client.list().expect("lists"), []);
    client.stop().expect("stops");
    thread.join().expect("joins").expect("ended well");
}

#[test]
fn notes_longer_than_a_packet_are_listed_in_several() {
    if !can_mount() {
        return;
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let (client, thread) = start(&dir.path().join("state"));
    let targets: Vec<_> = (0..12).map(|i| dir.path().join(format!("m{i}"))).collect();
    for target in &targets {
        fs::create_dir(target).expect("mkdir");
        client.mount(MountRequest { note: "n".repeat(NOTE_BYTES_MAX), ..request(target) }).expect("mounts");
    }
    let listed = client.list().expect("lists");
    assert_eq!(listed.iter().map(|kept| kept.dir.clone()).collect::<Vec<_>>(), targets);
    for target in &targets {
        client.unmount(target, true).expect("unmounts");
    }
    assert_eq!(client.list().expect("lists"), []);
    client.stop().expect("stops");
    thread.join().expect("joins").expect("ended well");
}

#[test]
fn a_keeper_whose_directory_is_gone_ends() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (client, thread) = start(dir.path());
    fs::remove_file(dir.path().join(SOCKET_NAME)).expect("rm");
    assert!(client.list().is_err());
    // A change of the mount table wakes it; so does time.
    drop(dir);
    if geteuid().is_root() {
        let other = tempfile::tempdir().expect("tempdir");
        let none: Option<&str> = None;
        nix::mount::mount(Some("tmpfs"), other.path(), Some("tmpfs"), nix::mount::MsFlags::empty(), none)
            .expect("mounts");
        nix::mount::umount(other.path()).expect("unmounts");
        while !thread.is_finished() {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn readers_of_a_mount_that_nobody_serves_end_when_it_is_taken_away_by_force() {
    if !can_mount() {
        return;
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let target = dir.path().join("target");
    fs::create_dir(&target).expect("mkdir");
    let (client, thread) = start(&dir.path().join("state"));
    drop(client.mount(request(&target)).expect("mounts"));
    let reader = thread::spawn({
        let target = target.clone();
        move || fs::read_dir(target).map(|_| ())
    });
    thread::sleep(Duration::from_millis(50));
    assert!(!reader.is_finished(), "it waits for a daemon");
    client.unmount(&target, true).expect("unmounts");
    assert!(reader.join().expect("ends").is_err());
    assert_eq!(client.list().expect("lists"), []);
    client.stop().expect("stops");
    thread.join().expect("joins").expect("ended well");
}
