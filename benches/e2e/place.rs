//! The bench's directory, what runs in it, and that nothing of it is left.
//!
//! Everything the bench starts is in process groups of its own, so a Ctrl-C reaches the bench alone:
//! it notes it, the work at hand ends with an error, and all that is on the stack is dropped - mounts,
//! servers, at last the directory. A second Ctrl-C ends it at once; the next run clears the rest.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

static STOPPED: AtomicBool = AtomicBool::new(false);

/// Is an error after a Ctrl-C (or SIGTERM): called by whatever takes long.
pub fn go_on() -> Result<()> {
    if STOPPED.load(Ordering::Relaxed) {
        bail!("interrupted");
    }
    Ok(())
}

/// Listens for Ctrl-C and SIGTERM from now on.
pub fn watch_for_stop() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            loop {
                tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
                if STOPPED.swap(true, Ordering::Relaxed) {
                    std::process::exit(130);
                }
                eprintln!("interrupted: unmounting and clearing up; once more ends it at once");
            }
        });
    });
    Ok(())
}

/// The directory that everything lies in: the data, the store, mounts and caches.
#[derive(Debug)]
pub struct Workplace {
    pub dir: PathBuf,
    keep: bool,
}

impl Workplace {
    /// Makes `larder-bench` below `parent`, and takes mounts of a killed run away.
    pub fn open(parent: &Path, keep: bool) -> Result<Self> {
        let dir = parent.join("larder-bench");
        std::fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        let place = Self { dir: dir.canonicalize()?, keep };
        place.unmount_all();
        Ok(place)
    }

    fn unmount_all(&self) {
        let table = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        for target in table.lines().filter_map(|line| line.split(' ').nth(1)) {
            if Path::new(target).starts_with(&self.dir)
                && let Err(error) = unmount(Path::new(target))
            {
                eprintln!("{error:#}");
            }
        }
    }

    /// Says early that the disk is too small.
    pub fn needs(&self, what: &str, bytes: u64) -> Result<()> {
        let disk = nix::sys::statvfs::statvfs(&self.dir)?;
        let free = disk.blocks_available() as u64 * disk.fragment_size() as u64;
        if free < bytes {
            let (needed, free) = (bytes >> 30, free >> 30);
            bail!(
                "{what} needs {needed} GiB below {}, and {free} GiB are free: give --dir, or a smaller --scale",
                self.dir.display()
            );
        }
        Ok(())
    }
}

impl Drop for Workplace {
    fn drop(&mut self) {
        if self.keep {
            eprintln!("{} is kept for the next run", self.dir.display());
            return;
        }
        self.unmount_all();
        // A mount that is still there must not be emptied through.
        let table = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let held =
            table.lines().filter_map(|line| line.split(' ').nth(1)).any(|it| Path::new(it).starts_with(&self.dir));
        if held {
            eprintln!("{} is not removed: something in it is still mounted", self.dir.display());
        } else if let Err(error) = std::fs::remove_dir_all(&self.dir) {
            eprintln!("{} is not removed: {error}", self.dir.display());
        }
    }
}

/// Drops the page cache, dentries and inodes (needs root), and touches so much free memory, half of it at most.
///
/// A virtual machine's host takes freed memory back; whoever writes first to such a page pays for it many
/// times what the write costs. Without this the first to read after a pause, or the one after a peer with
/// a small cache, is measured with that cost and the others are not.
pub fn level_memory(bytes: u64) -> Result<()> {
    nix::unistd::sync();
    std::fs::write("/proc/sys/vm/drop_caches", b"3").context("drop the page cache (root is needed)")?;
    let table = std::fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    let free = table.lines().find_map(|line| line.strip_prefix("MemFree:")?.trim().strip_suffix(" kB"));
    let free_bytes = free.and_then(|kib| kib.parse::<u64>().ok()).context("no MemFree in /proc/meminfo")? << 10;
    let mut scratch = Vec::new();
    for _ in 0..bytes.min(free_bytes / 2) / PIECE {
        go_on()?;
        scratch.push(vec![1_u8; PIECE as usize]);
    }
    std::hint::black_box(&scratch);
    Ok(())
}

/// What [`level_memory`] takes at a time.
const PIECE: u64 = 64 << 20;

/// Puts a command into a process group of its own, where no Ctrl-C of the terminal reaches it.
pub fn own_group(mut command: Command) -> Command {
    command.process_group(0);
    command
}

/// Runs a command to its end, or kills it when the bench is stopped; `log` has what it says.
pub fn run(command: Command, log: &Path) -> Result<()> {
    let mut command = own_group(command);
    let said = std::fs::File::create(log).with_context(|| format!("make {}", log.display()))?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said);
    let mut child = command.spawn().with_context(|| format!("run {command:?}"))?;
    let stopped_before = STOPPED.load(Ordering::Relaxed);
    loop {
        if let Some(status) = child.try_wait()? {
            if status.success() {
                return Ok(());
            }
            let said = std::fs::read_to_string(log).unwrap_or_default();
            bail!("{command:?} ended with {status}: {}", said.lines().last().unwrap_or(""));
        }
        // What clears up after a stop runs to its end.
        if !stopped_before && go_on().is_err() {
            child.kill()?;
            child.wait()?;
            bail!("interrupted");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Empties a directory, or makes it.
pub fn clear(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("clear {}", dir.display()))
        }
        _ => std::fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display())),
    }
}

/// Unmounts; a mount that is busy or dead is taken out of the tree all the same.
pub fn unmount(target: &Path) -> Result<()> {
    for words in [&["umount"][..], &["umount", "--lazy"]] {
        let done = Command::new(words[0]).args(&words[1..]).arg(target).stderr(Stdio::null()).status();
        if done.context("run umount")?.success() {
            return wait_for_mount(target, false);
        }
    }
    bail!("{} cannot be unmounted", target.display())
}

/// Waits until something is mounted at `target`, or nothing any more.
pub fn wait_for_mount(target: &Path, mounted: bool) -> Result<()> {
    let begin = Instant::now();
    loop {
        let table = std::fs::read_to_string("/proc/self/mounts")?;
        if table.lines().any(|line| line.split(' ').nth(1).map(Path::new) == Some(target)) == mounted {
            return Ok(());
        }
        if begin.elapsed() > Duration::from_secs(30) {
            let state = if mounted { "not mounted" } else { "still mounted" };
            bail!("{} is {state} after 30 s", target.display());
        }
        if mounted {
            go_on()?;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
