//! The kernel engine: the same commits, read by the kernel alone.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use nix::errno::Errno;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::basic::{compare, sample};
use super::rig::{Rig, noise, options};
use crate::format::placement::{Location, PlacedBlock, PlacementRoot};
use crate::format::tree::build::BlockOf;
use crate::fs::kernel::BuildError;
use crate::fs::view::{Look, ViewOptions};
use crate::testkit::model::{Dir, File, Node, Packing, dir, file, members};

fn assert_shows(model: &Dir, packing: Packing) {
    let Some(rig) = Rig::new(model, packing) else { return };
    let Some(mount) = rig.mount_by_kernel(&options(), None, None) else { return };
    let mut counts = HashMap::new();
    members(model, &mut counts);
    compare(&mount.dir, model, &counts);
    assert!(mount.mounted.is_alive());
    mount.mounted.unmount(false).expect("unmounts");
    assert!(!mount.mounted.is_alive());
}

#[test]
fn the_kernel_alone_shows_exactly_what_was_committed() {
    assert_shows(&sample(), Packing::default());
    // Every file a pack of its own length: all ends come from the file of tails.
    assert_shows(&sample(), Packing { whole_len: 1, pack_len: 1 });
    assert_shows(&Dir::new(), Packing::default());
}

#[test]
fn files_of_any_shape_are_shown_to_the_last_byte() {
    let piece = (any::<bool>(), prop_oneof![Just(4096_usize), Just(65_536), 1..9000_usize]);
    let files = prop::collection::vec((prop::collection::vec(piece, 1..8), any::<bool>()), 1..20);
    let mut runner = TestRunner::new(Config { cases: 6, ..Config::default() });
    let ran = runner.run(&(files, prop_oneof![Just(1_u64), Just(1 << 20)]), |(files, whole_len)| {
        let node = |(number, (pieces, sparse)): (usize, (Vec<(bool, usize)>, bool))| {
            let bytes = pieces.iter().flat_map(|(data, len)| match data {
                true => noise(number as u64 + *len as u64, *len),
                false => vec![0; *len],
            });
            let file = File { bytes: bytes.collect(), group: 0, sparse };
            (number.to_string().into_bytes(), Node::File(file))
        };
        assert_shows(&files.into_iter().enumerate().map(node).collect(), Packing { whole_len, pack_len: 256 << 10 });
        Ok(())
    });
    ran.expect("holds");
}

#[test]
fn a_directory_of_a_hundred_thousand_names_is_listed_and_looked_up() {
    let names = (0..100_000_u32).map(|n| (format!("{:x}-{n}", n.wrapping_mul(2_654_435_761)).into_bytes(), file(b"")));
    let model: Dir = names.collect();
    let Some(rig) = Rig::new(&model, Packing::default()) else { return };
    let Some(mount) = rig.mount_by_kernel(&options(), None, None) else { return };
    let mut listed = 0;
    for entry in fs::read_dir(&mount.dir).expect("lists") {
        entry.expect("lists");
        listed += 1;
    }
    assert_eq!(listed, model.len());
    for name in model.keys().step_by(997) {
        let name = std::str::from_utf8(name).expect("is text");
        assert_eq!(fs::metadata(mount.dir.join(name)).expect("is there").len(), 0);
    }
    assert!(!mount.dir.join("no such name").exists());
}

#[test]
fn whoever_reads_while_the_kernel_takes_over_reads_on() {
    let bytes = noise(5, 3 << 20);
    let model = dir([("big", file(&bytes)), ("small", file(b"small"))]);
    let Some(rig) = Rig::new(&model, Packing::default()) else { return };
    let fuse = rig.mount();
    let mut open = fs::File::open(fuse.path("big")).expect("opens");
    let mut first = vec![0; 1 << 20];
    open.read_exact(&mut first).expect("reads");
    let Some(kernel) = rig.mount_by_kernel(&options(), None, Some(&fuse.dir)) else { return };
    let mut rest = Vec::new();
    open.read_to_end(&mut rest).expect("reads on");
    assert!([first, rest].concat() == bytes);
    let (before, now) = (open.metadata().expect("stats"), fs::metadata(fuse.path("big")).expect("stats"));
    assert_ne!(before.dev(), now.dev(), "who opens now is served by the kernel");
    assert!(fs::read(fuse.path("big")).expect("reads") == bytes);
    assert!(fuse.mounted.is_alive(), "as long as something is open");
    fuse.mounted.unmount(true).expect("it is nowhere any more");
    assert!(kernel.mounted.is_alive(), "what is at its directory now is not unmounted in its name");
    drop(open);
    fuse.wait_for_end();
    assert!(kernel.mounted.is_alive());
}

#[test]
fn an_image_beneath_what_somebody_mounted_over_it_lives_and_is_not_mistaken_for_it() {
    let model = dir([("f", file(b"x"))]);
    let Some(rig) = Rig::new(&model, Packing::default()) else { return };
    let Some(kernel) = rig.mount_by_kernel(&options(), None, None) else { return };
    let none: Option<&str> = None;
    nix::mount::mount(none, &kernel.dir, Some("tmpfs"), nix::mount::MsFlags::empty(), none).expect("covers it");
    assert!(kernel.mounted.is_alive());
    let refused = kernel.mounted.unmount(true);
    nix::mount::umount(&kernel.dir).expect("uncovers it");
    assert!(refused.expect_err("is covered").to_string().contains("mounted over it"));
    assert_eq!(fs::read(kernel.dir.join("f")).expect("reads"), b"x");
    kernel.mounted.unmount(false).expect("unmounts");
    assert!(!kernel.mounted.is_alive());
}

#[test]
fn what_is_changed_about_owners_and_modes_is_in_the_image() {
    let model = dir([("d", Node::Dir(dir([("f", file(b"x"))])))]);
    let Some(rig) = Rig::new(&model, Packing::default()) else { return };
    let look = Look { uid: 12, gid: 34, umask: 0o022, file_mode: Some(0o666), dir_mode: Some(0o777) };
    let chosen = ViewOptions { look, ..options() };
    let Some(mount) = rig.mount_by_kernel(&chosen, None, None) else { return };
    let meta = fs::metadata(mount.dir.join("d/f")).expect("stats");
    assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o7777), (12, 34, 0o644));
    assert_eq!(fs::metadata(mount.dir.join("d")).expect("stats").mode() & 0o7777, 0o755);
    // The directory that is shown as the root keeps others out, and only that one.
    let below = ViewOptions { subdir: b"d".to_vec(), ..chosen };
    let mount = rig.mount_by_kernel(&below, Some(1), None).expect("as before");
    assert_eq!(fs::metadata(&mount.dir).expect("stats").mode() & 0o7777, 0o700);
    assert_eq!(fs::read(mount.dir.join("f")).expect("reads"), b"x");
}

#[test]
fn nothing_can_be_changed_and_a_mapping_ends_in_zeros() {
    let model = dir([("f", file(&[7; 5000])), ("g", file(&[8; 100]))]);
    let Some(rig) = Rig::new(&model, Packing::default()) else { return };
    let Some(mount) = rig.mount_by_kernel(&options(), None, None) else { return };
    let error = fs::write(mount.dir.join("f"), b"x").expect_err("is read-only");
    assert_eq!(error.raw_os_error(), Some(Errno::EROFS as i32));
    let open = fs::File::open(mount.dir.join("f")).expect("opens");
    let mut behind = [0; 100];
    assert_eq!(open.read_at(&mut behind, 4990).expect("reads"), 10, "a read ends where the file does");
    assert_eq!(behind[..12], [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0, 0]);
}

#[test]
fn an_image_that_the_disk_changed_is_built_again() {
    let model = dir([("f", file(&[7; 5000]))]);
    let Some(rig) = Rig::new(&model, Packing { whole_len: 1, pack_len: 1 }) else { return };
    rig.fill();
    let first = rig.build(options().look, None).expect("is built");
    for path in [first.path.clone(), first.path.with_extension("tails")] {
        let whole = fs::read(&path).expect("is there");
        let mut bytes = whole.clone();
        *bytes.last_mut().expect("has bytes") ^= 1;
        fs::write(&path, &bytes).expect("writes");
        let again = rig.build(options().look, None).expect("is built");
        assert_eq!(again.about, first.about);
        assert!(fs::read(&path).expect("is there") == whole);
    }
}

#[test]
fn ends_that_are_copied_into_an_image_are_checked_whatever_a_mount_asks_for() {
    let bytes = noise(3, 5000);
    let model = dir([("f", file(&bytes))]);
    let Some(rig) = Rig::new(&model, Packing { whole_len: 1, pack_len: 1 }) else { return };
    rig.fill();
    for used in &rig.snapshot.placement.packs {
        let object = rig.object(&used.pack);
        let mut damaged = fs::read(&object).expect("is there");
        damaged[4999] ^= 1;
        fs::set_permissions(&object, fs::Permissions::from_mode(0o644)).expect("is ours");
        let open = fs::OpenOptions::new().write(true).open(&object).expect("opens");
        open.write_all_at(&damaged, 0).expect("writes");
    }
    let image = rig.build(options().look, None).expect("is built");
    let tails = fs::read(image.path.with_extension("tails")).expect("is there");
    assert!(tails.ends_with(&[0; 100]));
    let end = &bytes[4096..];
    assert!(tails.windows(end.len()).any(|window| window == end), "the end as it was committed");
}

#[test]
fn a_placement_that_points_elsewhere_makes_no_image() {
    let model = dir([("a", file(&[1; 5000])), ("b", file(&[2; 5000]))]);
    let Some(mut rig) = Rig::new(&model, Packing::default()) else { return };
    let placed = rig.made.blocks.iter().find(|block| block.of == BlockOf::Placement).expect("is there");
    let Ok(PlacedBlock::Segment(mut locations)) = PlacedBlock::decode(&placed.bytes) else { panic!("one segment") };
    assert!(locations.iter().all(|location| matches!(location, Location::Run { .. })));
    locations.swap(0, 1);
    let swapped = PlacedBlock::Segment(locations).encode();
    let id = PlacedBlock::id_of(&swapped);
    let root = PlacementRoot { top: vec![id], ..(*rig.snapshot.placement).clone() };
    rig.put(crate::format::paths::placed_key(&id), swapped);
    rig.fill();
    rig.build(options().look, None).expect("the right one makes an image");
    rig.snapshot.placement_id = root.id();
    rig.snapshot.placement = root.into();
    assert!(matches!(rig.build(options().look, None), Err(BuildError::Misplaced { rank: 0 })));
}
