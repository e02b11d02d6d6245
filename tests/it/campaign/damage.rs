//! A flipped bit in a pack, a large object, a tree block, a placement - in the lake, in the tier, with
//! the daemon running and stopped: at every verify level no wrong byte that the contract excludes is
//! read, and the tier heals from the lake.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::{Campaign, flip};
use crate::kit::World;
use crate::kit::s3::TestS3;

fn files_below(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![root.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                dirs.push(path);
            } else {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Gives how many bytes of a file of the embedded lake are the object's: behind them lies what the store
/// knows of it, its length in front of the last eight bytes. Damage there is the store's failure, which is
/// asked again until the read gives up.
fn body_len(object: &Path) -> u64 {
    let bytes = fs::read(object).expect("reads");
    let (rest, _magic) = bytes.split_last_chunk::<8>().expect("a tail");
    let (meta, len) = rest.split_last_chunk::<4>().expect("a tail");
    meta.len() as u64 - u64::from(u32::from_le_bytes(*len))
}

struct Scene {
    world: World,
    s3: TestS3,
    wanted: BTreeMap<PathBuf, Vec<u8>>,
}

impl Scene {
    fn new(campaign: &mut Campaign) -> Self {
        let s3 = TestS3::start();
        let mut world = World::new();
        world.set_all(s3.env("lake"));
        let source = world.path("source");
        fs::create_dir_all(source.join("d")).expect("makes it");
        for number in 0..40 {
            let size = [10, 5000, 100_000, 300_000][number % 4];
            fs::write(source.join(format!("d/f{number}")), campaign.bytes(size)).expect("writes");
        }
        fs::write(source.join("large"), campaign.bytes(70 << 20)).expect("writes");
        world.push(&source, "data");
        let wanted = files_below(&source)
            .into_iter()
            .map(|path| (path.strip_prefix(&source).expect("below").to_owned(), fs::read(&path).expect("reads")))
            .collect();
        Self { world, s3, wanted }
    }

    fn mount(&self, verify: &str) -> PathBuf {
        self.world.mount("data", "m", &["--verify", verify])
    }

    fn umount(&self) {
        self.world.ok(["umount", self.world.path("m").to_str().expect("plain")]);
    }

    /// Reads everything.
    fn read_all(&self, mount: &Path) -> Seen {
        let mut seen = Seen::default();
        for (path, wanted) in &self.wanted {
            match fs::read(mount.join(path)) {
                Ok(bytes) if bytes == *wanted => seen.right += 1,
                Ok(_) => seen.wrong.push(path.clone()),
                Err(_) => seen.failed.push(path.clone()),
            }
        }
        seen
    }

    fn drop_page_cache() {
        nix::unistd::sync();
        fs::write("/proc/sys/vm/drop_caches", b"3").expect("drops the page cache (needs root)");
    }
}

/// What readers saw of the files.
#[derive(Debug, Default)]
struct Seen {
    right: usize,
    wrong: Vec<PathBuf>,
    failed: Vec<PathBuf>,
}

#[test]
#[ignore = "long: make campaign PART=damage"]
fn damage_in_the_tier_is_healed_from_the_lake() {
    let mut campaign = Campaign::new();
    let scene = Scene::new(&mut campaign);
    for round in 0.. {
        if !campaign.goes_on(round, 12) {
            break;
        }
        scene.world.run(["uncache", "data"]);
        scene.world.ok(["cache", "data"]);
        let objects: Vec<_> = files_below(&scene.world.tier().join("objects"));
        let victim = objects[campaign.below(objects.len() as u64) as usize].clone();
        let len = fs::metadata(&victim).expect("looks").len();
        flip(&victim, campaign.below(len));
        // Half of the rounds meet a daemon that never saw the object.
        if round % 2 == 0 && scene.world.daemon_pid().is_some() {
            scene.world.ok(["daemon", "stop"]);
            // A new node's memory: what was verified before the damage does not count (the window of `node`).
            let _ = fs::remove_file(scene.world.state().join("node.redb"));
        }
        Scene::drop_page_cache();
        let verify = if round % 2 == 0 { ["node", "always", "tier"][(round as usize / 2) % 3] } else { "always" };
        let mount = scene.mount(verify);
        let seen = scene.read_all(&mount);
        assert!(seen.failed.is_empty(), "round {round}, verify {verify}: the lake has the right bytes: {seen:?}");
        // `tier` believes the node that published; still only the file whose byte it was is another.
        let wrong_at_most = usize::from(verify == "tier" && victim.extension().is_none());
        assert!(seen.wrong.len() <= wrong_at_most, "round {round}, verify {verify}, {}: {seen:?}", victim.display());
        scene.umount();
    }
}

#[test]
#[ignore = "long: make campaign PART=damage"]
fn damage_in_the_lake_is_an_error_and_only_for_what_it_hit() {
    let mut campaign = Campaign::new();
    for (round, verify) in ["tier", "node", "always", "node"].iter().cycle().enumerate() {
        if !campaign.goes_on(round as u64, 12) {
            break;
        }
        let scene = Scene::new(&mut campaign);
        let objects = scene.s3.object_files();
        let victim = objects[campaign.below(objects.len() as u64) as usize].clone();
        // Of a pack's bytes only what one file has there is hit.
        let is_data = victim.parent().is_some_and(|dir| dir.ends_with("lake.d/data.d"));
        let at = campaign.below(body_len(&victim));
        flip(&victim, at);
        // The push left blocks on this node's disk; a node that never saw them meets the damage.
        let _ = fs::remove_dir_all(scene.world.state().join("meta"));
        let mounted =
            scene.world.run(["mount", "data", scene.world.make_dir("m").to_str().expect("plain"), "--verify", verify]);
        if mounted.code == 0 {
            let seen = scene.read_all(&scene.world.path("m"));
            println!("round {round}: {seen:?}, damage in {}", victim.display());
            assert!(seen.wrong.is_empty(), "round {round}, verify {verify}: other bytes were read");
            assert!(!is_data || seen.failed.len() <= 1, "round {round}: the byte was one file's");
            scene.umount();
        } else {
            println!("round {round}: refused: {}", mounted.stderr.trim());
            assert!(!is_data, "round {round}: a mount needs no file's bytes");
        }
        // Right again in the lake: what this node remembers of the damage fails nobody.
        flip(&victim, at);
        let mount = scene.mount(verify);
        let seen = scene.read_all(&mount);
        assert_eq!(seen.right, scene.wanted.len(), "round {round}: {seen:?}");
        scene.umount();
    }
}
