//! Who is measured: the plain file system, Larder, JuiceFS, rclone, s3fs.
//!
//! A peer is loaded at its first turn and takes its data away after its last one, so that the disk
//! has to hold the source, two copies in the store and one cache, and not all of them at once.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::data::Set;
use crate::place::{clear, own_group, run, unmount, wait_for_mount};
use crate::recipes::{JUICEFS, RCLONE, Recipe, S3FS};
use crate::store::{ACCESS_KEY, BUCKET, SECRET_KEY, Store, larder};

/// One file system under test.
pub trait Peer {
    fn name(&self) -> &str;
    /// Whether there is anything to be cold about.
    fn has_cache(&self) -> bool {
        true
    }
    /// Whether it mounts only what is cached already: then it has no cold phases.
    fn needs_cache(&self) -> bool {
        false
    }
    /// Whether it is somebody else's, and may take fewer turns.
    fn is_rival(&self) -> bool {
        false
    }
    /// What its objects' keys in the store begin with.
    fn objects(&self) -> Option<&str> {
        None
    }
    /// Brings the data into the store, once; gives the seconds where that is a push to compare.
    fn load(&mut self) -> Result<Option<f64>> {
        Ok(None)
    }
    /// Unmounts and empties the cache.
    fn reset(&mut self) -> Result<()>;
    /// Mounts (again) with the store at `endpoint`; gives the root of the data. Mounted already: as it is.
    fn mount(&mut self, endpoint: String) -> Result<PathBuf>;
    /// Waits until the cache is complete.
    fn settle(&mut self) -> Result<()> {
        Ok(())
    }
    fn unmount(&mut self) -> Result<()>;
}

/// Names the peers of one data set: who is not installed is left out with a line.
pub fn field(names: &[String], dir: &Path, store: &Store, set: &Set) -> Result<Vec<Box<dyn Peer>>> {
    let mut field: Vec<Box<dyn Peer>> = Vec::new();
    for name in names {
        let home = dir.join(name).join(set.name());
        let place = |objects: &str| Place {
            meta: store.meta_url(set.kind as usize, &home),
            home: home.clone(),
            store: store.endpoint(),
            set: set.root.clone(),
            prefix: format!("{objects}-{}", set.name()),
        };
        let recipe = match name.as_str() {
            "native" => {
                field.push(Box::new(Native { root: set.root.clone() }));
                continue;
            }
            "larder" => {
                std::fs::create_dir_all(&home)?;
                let place = place("larder");
                field.push(Box::new(Larder { endpoint: place.store.clone(), place, mounted: false, kernel: false }));
                continue;
            }
            "juicefs" => JUICEFS,
            "rclone" => RCLONE,
            "s3fs" => S3FS,
            "kernel" if !has_kernel_engine() => {
                eprintln!("kernel is left out: it needs root and Linux 6.12 with EROFS");
                continue;
            }
            "kernel" => {
                std::fs::create_dir_all(&home)?;
                let place = place("larder");
                field.push(Box::new(Larder { endpoint: place.store.clone(), place, mounted: false, kernel: true }));
                continue;
            }
            other => bail!("no such peer: {other}; there are native, larder, kernel, juicefs, rclone, s3fs"),
        };
        if !installed(recipe.program) {
            eprintln!("{name} is left out: it is not installed (benches/e2e/rivals.sh installs it)");
            continue;
        }
        std::fs::create_dir_all(&home)?;
        field.push(Box::new(Rival { place: place(recipe.objects), recipe, process: None }));
    }
    Ok(field)
}

/// Where a peer has its things.
#[derive(Debug, Clone)]
struct Place {
    home: PathBuf,
    /// JuiceFS's metadata engine.
    meta: String,
    store: String,
    set: PathBuf,
    prefix: String,
}

impl Place {
    fn mount_point(&self) -> PathBuf {
        self.home.join("mnt")
    }
    fn cache(&self) -> PathBuf {
        self.home.join("cache")
    }
    /// A marker beside the peers' directories says that the objects are in the store.
    fn loaded(&self) -> PathBuf {
        self.home.ancestors().nth(2).unwrap_or(&self.home).join(format!("loaded-{}", self.prefix))
    }
}

struct Native {
    root: PathBuf,
}

impl Peer for Native {
    fn name(&self) -> &str {
        "native"
    }
    fn has_cache(&self) -> bool {
        false
    }
    fn reset(&mut self) -> Result<()> {
        Ok(())
    }
    fn mount(&mut self, _endpoint: String) -> Result<PathBuf> {
        Ok(self.root.clone())
    }
    fn unmount(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Ourselves, through the command line as a user would.
struct Larder {
    place: Place,
    mounted: bool,
    endpoint: String,
    /// The kernel engine.
    kernel: bool,
}

/// Says whether the kernel engine can be tried here.
fn has_kernel_engine() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map_while(|word| word.parse::<u32>().ok());
    let systems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    nix::unistd::geteuid().is_root()
        && systems.contains("erofs")
        && (numbers.next(), numbers.next()) >= (Some(6), Some(12))
}

impl Larder {
    fn run(&self, words: &[&str]) -> Result<()> {
        let mut command = Command::new(larder()?);
        command
            .args(words)
            .env("LARDER_LAKE", format!("s3://{BUCKET}/{}", self.place.prefix))
            .env("LARDER_ENDPOINT", &self.endpoint)
            .env("LARDER_PATH_STYLE", "true")
            .env("LARDER_TIER", self.place.cache())
            .env("LARDER_STATE", self.place.home.join("state"))
            .env("AWS_ACCESS_KEY_ID", ACCESS_KEY)
            .env("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
            .env("AWS_REGION", "us-east-1");
        run(command, &self.place.home.join("command.log"))
    }
}

impl Peer for Larder {
    fn name(&self) -> &str {
        if self.kernel { "kernel" } else { "larder" }
    }
    fn needs_cache(&self) -> bool {
        self.kernel
    }
    fn objects(&self) -> Option<&str> {
        Some(&self.place.prefix)
    }
    fn load(&mut self) -> Result<Option<f64>> {
        if self.place.loaded().exists() {
            return Ok(None);
        }
        self.endpoint.clone_from(&self.place.store);
        let set = self.place.set.display().to_string();
        let begin = Instant::now();
        self.run(&["push", &set, "bench"])?;
        let secs = begin.elapsed().as_secs_f64();
        std::fs::write(self.place.loaded(), b"")?;
        Ok(Some(secs))
    }
    fn reset(&mut self) -> Result<()> {
        self.unmount()?;
        clear(&self.place.cache())?;
        clear(&self.place.home.join("state"))?;
        let cache = self.place.cache().display().to_string();
        self.run(&["tier", "init", &cache])
    }
    fn mount(&mut self, endpoint: String) -> Result<PathBuf> {
        let target = self.place.mount_point();
        if !self.mounted {
            self.endpoint = endpoint;
            std::fs::create_dir_all(&target)?;
            self.mounted = true;
            let engine = if self.kernel { "kernel" } else { "fuse" };
            self.run(&["mount", "bench", &target.display().to_string(), "--engine", engine])?;
        }
        Ok(target)
    }
    fn settle(&mut self) -> Result<()> {
        self.run(&["cache", "bench"])
    }
    fn unmount(&mut self) -> Result<()> {
        if std::mem::take(&mut self.mounted) {
            let target = self.place.mount_point().display().to_string();
            let done = self.run(&["umount", &target]);
            // The daemon has to go even where the mount did not.
            self.run(&["daemon", "stop"])?;
            done?;
        }
        Ok(())
    }
}

/// A rival: one process per mount.
struct Rival {
    place: Place,
    recipe: Recipe,
    process: Option<Child>,
}

impl Rival {
    fn fill(&self, word: &str, endpoint: &str) -> String {
        word.replace("{cache}", &self.place.cache().display().to_string())
            .replace("{mnt}", &self.place.mount_point().display().to_string())
            .replace("{set}", &self.place.set.display().to_string())
            .replace("{home}", &self.place.home.display().to_string())
            .replace("{meta}", &self.place.meta)
            .replace("{store}", &self.place.store)
            .replace("{endpoint}", endpoint)
            .replace("{bucket}", BUCKET)
            .replace("{prefix}", &self.place.prefix)
            .replace("{access}", ACCESS_KEY)
            .replace("{secret}", SECRET_KEY)
    }

    /// A first word with `!` names another program.
    fn command(&self, words: &[&str], endpoint: &str) -> Command {
        let (program, words) = match words {
            [first, rest @ ..] if first.starts_with('!') => (first.trim_start_matches('!'), rest),
            all => (self.recipe.program, all),
        };
        let mut command = Command::new(program);
        command.args(words.iter().map(|word| self.fill(word, endpoint)));
        command.envs(self.recipe.environment.iter().map(|(key, value)| (*key, self.fill(value, endpoint))));
        command
    }
}

impl Peer for Rival {
    fn name(&self) -> &str {
        self.recipe.name
    }

    fn is_rival(&self) -> bool {
        true
    }

    fn objects(&self) -> Option<&str> {
        Some(&self.place.prefix)
    }

    fn load(&mut self) -> Result<Option<f64>> {
        if !self.place.loaded().exists() {
            for words in self.recipe.load {
                run(self.command(words, &self.place.store), &self.place.home.join("load.log"))
                    .with_context(|| format!("load {}", self.recipe.name))?;
            }
            std::fs::write(self.place.loaded(), b"")?;
        }
        Ok(None)
    }

    fn reset(&mut self) -> Result<()> {
        self.unmount()?;
        clear(&self.place.cache())
    }

    fn mount(&mut self, endpoint: String) -> Result<PathBuf> {
        let target = self.place.mount_point();
        if self.process.is_none() {
            std::fs::create_dir_all(&target)?;
            std::fs::create_dir_all(self.place.cache())?;
            let log = std::fs::File::create(self.place.home.join("mount.log"))?;
            let mut command = own_group(self.command(self.recipe.mount, &endpoint));
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
            self.process = Some(command.spawn()?);
            wait_for_mount(&target, true)?;
        }
        Ok(target.join(self.recipe.below))
    }

    fn unmount(&mut self) -> Result<()> {
        let Some(mut process) = self.process.take() else {
            return Ok(());
        };
        let done = unmount(&self.place.mount_point());
        let begin = Instant::now();
        while process.try_wait()?.is_none() {
            if done.is_err() || begin.elapsed() > Duration::from_secs(60) {
                process.kill()?;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        done
    }
}

impl Drop for Rival {
    fn drop(&mut self) {
        if let Err(error) = self.unmount() {
            eprintln!("{} is not unmounted: {error:#}", self.recipe.name);
        }
    }
}

impl Drop for Larder {
    fn drop(&mut self) {
        if let Err(error) = self.unmount() {
            eprintln!("larder is not unmounted: {error:#}");
        }
    }
}

fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}
