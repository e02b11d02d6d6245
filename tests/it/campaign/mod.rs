//! The long tests, run by `make campaign`: every one is ignored in the ordinary run, works for at most
//! `LARDER_CAMPAIGN_MINUTES` (a part as a whole until `LARDER_CAMPAIGN_ENDS`, seconds since 1970) and repeats with `LARDER_CAMPAIGN_SEED`.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};

mod damage;
mod fault;
mod import;
mod jobs;
mod kill;
mod kube;
mod life;
mod nodes;
mod pressure;
mod sched;
mod shape;
mod soak;
mod survive;
mod trees;

/// How long a part may go on, and its random numbers.
struct Campaign {
    ends: Instant,
    random: SmallRng,
}

impl Campaign {
    fn new() -> Self {
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let seed = number("LARDER_CAMPAIGN_SEED").unwrap_or(1);
        println!("LARDER_CAMPAIGN_SEED={seed}");
        let mut left = Duration::from_secs(60 * number("LARDER_CAMPAIGN_MINUTES").unwrap_or(20));
        if let Some(ends) = number("LARDER_CAMPAIGN_ENDS") {
            let ends = SystemTime::UNIX_EPOCH + Duration::from_secs(ends);
            left = left.min(ends.duration_since(SystemTime::now()).unwrap_or_default());
        }
        Self { ends: Instant::now() + left, random: SmallRng::seed_from_u64(seed) }
    }

    /// Says whether another round may begin: one always, at most `rounds`, and no other behind the end.
    fn goes_on(&self, round: u64, rounds: u64) -> bool {
        round == 0 || (round < rounds && Instant::now() < self.ends)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.random.random_range(0..limit.max(1))
    }

    /// Writes a random tree: names that hurt, sizes around every limit, links, holes.
    fn write_tree(&mut self, root: &Path, files: u64) {
        fs::create_dir_all(root).expect("makes the root");
        let mut dirs = vec![root.to_path_buf()];
        for number in 0..files {
            let dir = dirs[self.below(dirs.len() as u64) as usize].clone();
            let name = self.name(number);
            let path = dir.join(&name);
            match self.below(12) {
                0 => {
                    fs::create_dir(&path).expect("makes a directory");
                    dirs.push(path);
                }
                1 => symlink(format!("../{number}/nowhere"), &path).expect("makes a symlink"),
                2 => {
                    let other = self.a_file(root).filter(|other| fs::hard_link(other, &path).is_ok());
                    if other.is_none() {
                        fs::write(&path, b"").expect("writes an empty file");
                    }
                }
                3 => {
                    let file = fs::File::create(&path).expect("makes a file");
                    let len = 1 << 20;
                    file.set_len(len).expect("makes a hole");
                    let at = self.below(len - 5000);
                    std::os::unix::fs::FileExt::write_all_at(&file, &self.bytes(5000), at).expect("writes into it");
                }
                _ => {
                    let sizes = [0, 1, 100, 4095, 4096, 4097, 70_000, 262_143, 262_144, 262_145, 600_000];
                    let size = sizes[self.below(sizes.len() as u64) as usize];
                    fs::write(&path, self.bytes(size)).expect("writes a file");
                    let mode = [0o644, 0o600, 0o755, 0o444][self.below(4) as usize];
                    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("sets the mode");
                }
            }
        }
    }

    fn name(&mut self, number: u64) -> std::ffi::OsString {
        use std::os::unix::ffi::OsStringExt;
        let mut name = match self.below(8) {
            0 => format!("-{number} with spaces\ttab").into_bytes(),
            1 => format!("{number}\u{e4}\u{4e2d}").into_bytes(),
            2 => [format!("{number}").as_bytes(), &[0xff, 0xfe, 0x80]].concat(),
            3 => format!("{number:0>255}").into_bytes(),
            4 => format!("{number}\nline").into_bytes(),
            _ => format!("f{number}").into_bytes(),
        };
        name.truncate(255);
        std::ffi::OsString::from_vec(name)
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.random.fill_bytes(&mut bytes);
        bytes
    }

    fn a_file(&mut self, root: &Path) -> Option<std::path::PathBuf> {
        let files: Vec<_> =
            fs::read_dir(root).ok()?.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_file())).collect();
        let chosen = self.below(files.len() as u64) as usize;
        files.get(chosen).map(|entry| entry.path())
    }
}

/// Compares a mount with its source as a user would: rsync by checksum with hard links, and diff.
#[track_caller]
fn assert_same_tree(source: &Path, mount: &Path) {
    let with_slash = |path: &Path| format!("{}/", path.display());
    let rsync = Command::new("rsync")
        .args(["-naciH", "--no-o", "--no-g", "--delete", &with_slash(source), &with_slash(mount)])
        .output()
        .expect("runs rsync");
    let said = String::from_utf8_lossy(&rsync.stdout);
    assert!(
        rsync.status.success() && said.trim().is_empty(),
        "rsync sees a difference:\n{said}\n{}",
        String::from_utf8_lossy(&rsync.stderr)
    );
    let diff = Command::new("diff").args(["-r", "--no-dereference"]).args([source, mount]).output().expect("runs diff");
    assert!(diff.status.success(), "diff sees a difference:\n{}", String::from_utf8_lossy(&diff.stdout));
}

/// The largest resident memory of a process so far, in MiB.
fn peak_memory_mib(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).map_or(0, |kib| kib / 1024)
}

/// Flips one bit of a file in place, keeping its times: damage that nobody notices by looking.
fn flip(path: &Path, offset: u64) {
    use std::os::unix::fs::FileExt;
    let before = fs::metadata(path).expect("looks at the file").modified().expect("has a time");
    let file = fs::File::options().read(true).write(true).open(path).expect("opens the file");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("reads the byte");
    file.write_all_at(&[byte[0] ^ 0x40], offset).expect("writes the byte");
    file.set_modified(before).expect("sets the time back");
}
