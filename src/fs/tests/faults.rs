//! A lake that is slow, down or damaged, seen through a mount.

use std::fs;
use std::io::ErrorKind;
use std::time::{Duration, Instant};

use nix::libc::EIO;

use super::rig::{Rig, noise, options};
use crate::fs::session::ServeOptions;
use crate::fs::view::ViewOptions;
use crate::store::fetch::Verify;
use crate::testkit::faulty_lake::{Fault, Op, Rule};
use crate::testkit::model::{Dir, Packing, dir, file};

fn many() -> Dir {
    let files =
        |from: u64| (from..from + 20).map(|i| (format!("f{i:02}").into_bytes(), file(&noise(i, 3000)))).collect();
    dir([("one", crate::testkit::model::Node::Dir(files(0))), ("two", crate::testkit::model::Node::Dir(files(40)))])
}

#[test]
fn a_slow_lake_does_not_use_up_the_workers() {
    let Some(rig) = Rig::new(&many(), Packing { pack_len: 1, ..Packing::default() }) else {
        return;
    };
    let mount = rig.mount_as(options(), ServeOptions { workers: 1, ..ServeOptions::default() });
    assert_eq!(fs::read(mount.path("two/f40")).expect("reads"), noise(40, 3000));
    rig.lake.reset_counters();
    rig.lake.rule(Rule::every(Op::Get, Fault::UntilHealed));
    let (served, answers) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        for i in 0..10 {
            let path = mount.path(&format!("one/f{i:02}"));
            scope.spawn(move || assert_eq!(fs::read(path).expect("reads late"), noise(i, 3000)));
        }
        while rig.lake.counters().gets() == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let here = mount.path("two/f40");
        scope.spawn(move || {
            let file = super::rig::open(&here, true).expect("opens");
            served.send(super::rig::read_range(&file, 0, 3000).expect("reads")).expect("somebody listens");
        });
        let bytes = answers.recv_timeout(Duration::from_secs(60));
        rig.lake.heal();
        assert_eq!(bytes.expect("it did not wait for others"), noise(40, 3000));
    });
}

#[test]
fn a_lake_that_is_down_is_eio_in_time_and_not_remembered() {
    let Some(rig) = Rig::new(&many(), Packing { pack_len: 1, ..Packing::default() }) else {
        return;
    };
    let mount = rig.mount();
    let known = fs::read(mount.path("one/f00")).expect("reads");
    rig.lake.rule(Rule::every(Op::Get, Fault::Passing));
    let began = Instant::now();
    let failed = fs::read(mount.path("one/f01")).expect_err("the lake is down");
    assert_eq!(failed.raw_os_error(), Some(EIO));
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
    assert!(mount.mounted.stats().errors > 0);
    assert_eq!(fs::read(mount.path("one/f00")).expect("what is here is served"), known);
    rig.lake.heal();
    assert_eq!(fs::read(mount.path("one/f01")).expect("reads again"), noise(1, 3000));
}

#[test]
fn metadata_that_cannot_be_fetched_is_eio_until_it_can() {
    let Some(rig) = Rig::new(&many(), Packing::default()) else {
        return;
    };
    let mount = rig.mount();
    rig.lake.rule(Rule::every(Op::Get, Fault::Denied));
    let failed = fs::read_dir(mount.path("one")).map(|_| ()).expect_err("nothing is known of it");
    assert_eq!(failed.raw_os_error(), Some(EIO));
    rig.lake.heal();
    assert_eq!(fs::read_dir(mount.path("one")).expect("lists").count(), 20);
}

#[test]
fn a_damaged_object_in_the_lake_is_eio_for_its_own_files_only() {
    let Some(rig) = Rig::new(&many(), Packing { pack_len: 1, ..Packing::default() }) else {
        return;
    };
    let pack = rig.made.packs.first().expect("has packs");
    let bad = pack.bytes[..3000].to_vec();
    rig.memory.flip(&crate::format::paths::data_key(&pack.key()), 1234);
    for verify in [Verify::Tier, Verify::Node, Verify::Always] {
        let mount = rig.mount_as(ViewOptions { verify, ..options() }, ServeOptions::default());
        for i in (0..20).chain(40..60) {
            let path = mount.path(&format!("{}/f{i:02}", if i < 40 { "one" } else { "two" }));
            match fs::read(&path) {
                Ok(bytes) => assert!(bytes == noise(i, 3000) && bytes != bad, "{}", path.display()),
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(EIO));
                    assert_eq!(noise(i, 3000), bad, "only the damaged one fails: {}", path.display());
                }
            }
        }
        assert!(mount.mounted.stats().errors > 0, "the damage was met");
    }
}

#[test]
fn a_subdirectory_that_does_not_exist_is_refused() {
    let Some(rig) = Rig::new(&many(), Packing::default()) else {
        return;
    };
    let open = |subdir: &str| {
        let options = ViewOptions { subdir: subdir.into(), ..options() };
        let view = crate::fs::view::View::open(rig.snapshot.clone(), rig.meta.clone(), rig.fetcher.clone(), options);
        tokio::runtime::Runtime::new().expect("runtime").block_on(view)
    };
    assert!(matches!(open("nope"), Err(crate::fs::view::ViewError::NoEntry)));
    assert!(matches!(open("one/f00"), Err(crate::fs::view::ViewError::NotDir)));
    assert!(open("one").is_ok());
}

#[test]
fn a_name_that_does_not_exist_stays_missing() {
    let Some(rig) = Rig::new(&many(), Packing::default()) else {
        return;
    };
    let mount = rig.mount();
    for _ in 0..3 {
        let missing = fs::read(mount.path("one/none")).expect_err("is not there");
        assert_eq!(missing.kind(), ErrorKind::NotFound);
    }
    let below = fs::read(mount.path("one/f00/x")).expect_err("is not a directory");
    assert_eq!(below.kind(), ErrorKind::NotADirectory);
}
