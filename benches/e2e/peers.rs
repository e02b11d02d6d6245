//! Who is measured: the plain file system, Larder, JuiceFS, rclone, s3fs.
//!
//! Every rival runs read-only with its cache on the same local disk and metadata kept for a day or
//! for ever, since the data does not change: the options that its documentation names for that.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::data::Set;
use crate::store::{ACCESS_KEY, BUCKET, SECRET_KEY, Store, larder};

/// One file system under test.
pub trait Peer {
    fn name(&self) -> &str;
    /// Whether there is anything to be cold about.
    fn has_cache(&self) -> bool {
        true
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

/// Prepares the peers of one data set: who is not installed is left out with a line.
pub fn field(names: &[String], dir: &Path, store: &Store, set: &Set) -> Result<Vec<Box<dyn Peer>>> {
    let mut field: Vec<Box<dyn Peer>> = Vec::new();
    for name in names {
        let home = dir.join(name).join(set.name());
        std::fs::create_dir_all(&home)?;
        let place = Place {
            meta: store.meta_url(set.kind as usize, &home),
            home,
            store: store.endpoint(),
            set: set.root.clone(),
            prefix: format!("{name}-{}", set.name()),
        };
        let peer: Result<Box<dyn Peer>> = match name.as_str() {
            "native" => Ok(Box::new(Native { root: set.root.clone() })),
            "larder" => Larder::prepare(place).map(|peer| Box::new(peer) as _),
            "juicefs" => Rival::prepare(place, JUICEFS).map(|peer| Box::new(peer) as _),
            "rclone" => Rival::prepare(place, RCLONE).map(|peer| Box::new(peer) as _),
            "s3fs" => Rival::prepare(place, S3FS).map(|peer| Box::new(peer) as _),
            other => {
                bail!("no such peer: {other}; there are native, larder, juicefs, rclone, s3fs")
            }
        };
        match peer {
            Ok(peer) => field.push(peer),
            Err(error) => eprintln!("{name} is left out: {error:#}"),
        }
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
    /// A marker says that the data was loaded into this store's directory before.
    fn loaded(&self) -> PathBuf {
        self.home.join("loaded")
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
}

impl Larder {
    fn prepare(place: Place) -> Result<Self> {
        let endpoint = place.store.clone();
        let peer = Self { place, mounted: false, endpoint };
        if !peer.place.loaded().exists() {
            let set = peer.place.set.display().to_string();
            peer.run(&["push", &set, "bench"])?;
            std::fs::write(peer.place.loaded(), b"")?;
        }
        Ok(peer)
    }

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
        run(command)
    }
}

impl Peer for Larder {
    fn name(&self) -> &str {
        "larder"
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
            self.run(&["mount", "bench", &target.display().to_string()])?;
            self.mounted = true;
        }
        Ok(target)
    }
    fn settle(&mut self) -> Result<()> {
        self.run(&["cache", "bench"])
    }
    fn unmount(&mut self) -> Result<()> {
        if self.mounted {
            self.run(&["umount", &self.place.mount_point().display().to_string()])?;
            self.run(&["daemon", "stop"])?;
            self.mounted = false;
        }
        Ok(())
    }
}

/// How one rival is driven. Words in braces are replaced: {cache} {mnt} {set} {store} {bucket} {prefix} {home}.
struct Recipe {
    name: &'static str,
    program: &'static str,
    /// Loads the data once.
    load: &'static [&'static [&'static str]],
    mount: &'static [&'static str],
    /// Where the data lies below the mount point.
    below: &'static str,
    environment: &'static [(&'static str, &'static str)],
}

const JUICEFS: Recipe = Recipe {
    name: "juicefs",
    program: "juicefs",
    load: &[
        &[
            "format",
            "--storage",
            "s3",
            "--bucket",
            "{store}/{bucket}",
            "--access-key",
            "{access}",
            "--secret-key",
            "{secret}",
            "--compress",
            "none",
            "--trash-days",
            "0",
            "{meta}",
            "{prefix}",
        ],
        &["sync", "{set}/", "jfs://META/data/", "--threads", "8"],
    ],
    mount: &[
        "mount",
        "--read-only",
        "--no-usage-report",
        "--backup-meta",
        "0",
        "--no-bgjob",
        "--attr-cache",
        "86400",
        "--entry-cache",
        "86400",
        "--dir-entry-cache",
        "86400",
        "--open-cache",
        "86400",
        "--open-cache-limit",
        "0",
        "--readdir-cache",
        "--max-fuse-io",
        "1M",
        "--buffer-size",
        "1024",
        "--prefetch",
        "1",
        "--cache-size",
        "40960",
        "--free-space-ratio",
        "0.02",
        "--cache-dir",
        "{cache}",
        "--bucket",
        "{endpoint}/{bucket}",
        "{meta}",
        "{mnt}",
    ],
    below: "data",
    environment: &[("META", "{meta}")],
};

const RCLONE: Recipe = Recipe {
    name: "rclone",
    program: "rclone",
    load: &[&["copy", "--transfers", "8", "--s3-no-check-bucket", "{set}", "bench:{bucket}/{prefix}"]],
    mount: &[
        "mount2",
        "--read-only",
        "--vfs-cache-mode",
        "full",
        "--vfs-cache-max-age",
        "8760h",
        "--dir-cache-time",
        "8760h",
        "--attr-timeout",
        "8760h",
        "--poll-interval",
        "0",
        "--no-modtime",
        "--no-checksum",
        "--vfs-fast-fingerprint",
        "--use-server-modtime",
        "--s3-no-head-object",
        "--s3-list-version",
        "2",
        "--buffer-size",
        "16M",
        "--vfs-read-ahead",
        "64M",
        "--vfs-read-chunk-size",
        "16M",
        "--vfs-read-chunk-streams",
        "4",
        "--max-read-ahead",
        "1M",
        "--cache-dir",
        "{cache}",
        "bench:{bucket}/{prefix}",
        "{mnt}",
    ],
    below: "",
    environment: &[
        ("RCLONE_CONFIG_BENCH_TYPE", "s3"),
        ("RCLONE_CONFIG_BENCH_PROVIDER", "Other"),
        ("RCLONE_CONFIG_BENCH_ENDPOINT", "{endpoint}"),
        ("RCLONE_CONFIG_BENCH_ACCESS_KEY_ID", "{access}"),
        ("RCLONE_CONFIG_BENCH_SECRET_ACCESS_KEY", "{secret}"),
        ("RCLONE_CONFIG_BENCH_REGION", "us-east-1"),
        ("RCLONE_CONFIG", "{home}/rclone.conf"),
    ],
};

const S3FS: Recipe = Recipe {
    name: "s3fs",
    program: "s3fs",
    // The same objects as rclone's, in a prefix of its own.
    load: &[&[
        "!rclone",
        "copy",
        "--transfers",
        "8",
        "--s3-no-check-bucket",
        "--s3-directory-markers",
        "{set}",
        "bench:{bucket}/{prefix}",
    ]],
    mount: &[
        "{bucket}:/{prefix}",
        "{mnt}",
        "-f",
        "-o",
        "url={endpoint},use_path_request_style,ro,kernel_cache",
        "-o",
        "use_cache={cache},entry_timeout=86400,attr_timeout=86400,negative_timeout=86400",
        "-o",
        "max_stat_cache_size=1000000,stat_cache_expire=86400,enable_noobj_cache,listobjectsv2,sigv4",
        "-o",
        "parallel_count=16,multipart_size=16,multireq_max=64,max_background=128",
    ],
    below: "",
    environment: &[
        ("AWSACCESSKEYID", "{access}"),
        ("AWSSECRETACCESSKEY", "{secret}"),
        ("RCLONE_CONFIG_BENCH_TYPE", "s3"),
        ("RCLONE_CONFIG_BENCH_PROVIDER", "Other"),
        ("RCLONE_CONFIG_BENCH_ENDPOINT", "{endpoint}"),
        ("RCLONE_CONFIG_BENCH_ACCESS_KEY_ID", "{access}"),
        ("RCLONE_CONFIG_BENCH_SECRET_ACCESS_KEY", "{secret}"),
        ("RCLONE_CONFIG_BENCH_REGION", "us-east-1"),
        ("RCLONE_CONFIG", "{home}/rclone.conf"),
    ],
};

/// A rival: one process per mount.
struct Rival {
    place: Place,
    recipe: Recipe,
    process: Option<Child>,
}

impl Rival {
    fn prepare(place: Place, recipe: Recipe) -> Result<Self> {
        if !installed(recipe.program) {
            bail!("{} is not installed (benches/e2e/rivals.sh installs it)", recipe.program);
        }
        let peer = Self { place, recipe, process: None };
        if !peer.place.loaded().exists() {
            for words in peer.recipe.load {
                run(peer.command(words, &peer.place.store)).with_context(|| format!("load {}", peer.recipe.name))?;
            }
            std::fs::write(peer.place.loaded(), b"")?;
        }
        Ok(peer)
    }

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
            let mut command = self.command(self.recipe.mount, &endpoint);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
            self.process = Some(command.spawn()?);
            wait_for_mount(&target, true)?;
        }
        Ok(target.join(self.recipe.below))
    }

    fn unmount(&mut self) -> Result<()> {
        if let Some(mut process) = self.process.take() {
            let target = self.place.mount_point();
            let mut command = Command::new("umount");
            command.arg(&target);
            run(command)?;
            wait_for_mount(&target, false)?;
            process.wait()?;
        }
        Ok(())
    }
}

impl Drop for Rival {
    fn drop(&mut self) {
        let _ = self.unmount();
    }
}

impl Drop for Larder {
    fn drop(&mut self) {
        let _ = self.unmount();
    }
}

fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

fn clear(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("clear {}", dir.display()))
        }
        _ => std::fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display())),
    }
}

fn run(mut command: Command) -> Result<()> {
    let done = command.stdin(Stdio::null()).output().with_context(|| format!("run {command:?}"))?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        bail!("{command:?} ended with {}: {}", done.status, said.lines().last().unwrap_or(""));
    }
    Ok(())
}

fn wait_for_mount(target: &Path, mounted: bool) -> Result<()> {
    let begin = Instant::now();
    let wanted = target.canonicalize()?.display().to_string();
    loop {
        let table = std::fs::read_to_string("/proc/self/mounts")?;
        if table.lines().any(|line| line.split(' ').nth(1) == Some(wanted.as_str())) == mounted {
            return Ok(());
        }
        if begin.elapsed() > Duration::from_secs(30) {
            bail!("{wanted} is {} after 30 s", if mounted { "not mounted" } else { "still mounted" });
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
