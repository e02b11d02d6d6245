//! The data sets: seeded, incompressible, the same bytes on every machine.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};

use crate::place::{Workplace, go_on};

/// What the user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
pub enum Work {
    Small,
    Tiny,
    Big,
    Walk,
}

/// What is generated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// 20,000 files, lognormal around 110 KB, in 200 directories.
    Small,
    /// 100,000 files of 4 KiB in 100 directories; an epoch reads a fixed 20,000 of them.
    Tiny,
    /// 4 files of 1 GiB.
    Big,
}

/// One generated data set.
#[derive(Debug)]
pub struct Set {
    pub kind: Kind,
    pub root: PathBuf,
    /// How many files there are; an epoch may read fewer.
    pub files: usize,
    /// Relative paths in the order of the epoch, with size and checksum.
    pub order: Vec<File>,
}

/// One file of an epoch.
#[derive(Debug, Clone)]
pub struct File {
    pub path: String,
    pub size: u64,
    pub checksum: u64,
}

impl Set {
    pub fn name(&self) -> &'static str {
        match self.kind {
            Kind::Small => "small",
            Kind::Tiny => "tiny",
            Kind::Big => "big",
        }
    }

    /// About what a cold epoch takes of memory: the store's files, the peer's cache and the mount each once in
    /// the page cache, and the processes.
    pub fn memory_bytes(&self) -> u64 {
        3 * self.order.iter().map(|file| file.size).sum::<u64>() + (1 << 30)
    }

    /// The walk is measured on SMALL.
    pub fn walks(&self) -> bool {
        self.kind == Kind::Small
    }

    pub fn reads(&self, work: &[Work]) -> bool {
        work.contains(&match self.kind {
            Kind::Small => Work::Small,
            Kind::Tiny => Work::Tiny,
            Kind::Big => Work::Big,
        })
    }
}

/// Says which data sets the asked work needs.
pub fn kinds(work: &[Work]) -> Vec<Kind> {
    let mut kinds = Vec::new();
    if work.contains(&Work::Small) || work.contains(&Work::Walk) {
        kinds.push(Kind::Small);
    }
    if work.contains(&Work::Tiny) {
        kinds.push(Kind::Tiny);
    }
    if work.contains(&Work::Big) {
        kinds.push(Kind::Big);
    }
    kinds
}

/// Makes the data set in the workplace, or takes it from there.
pub fn prepare(workplace: &Workplace, kind: Kind, scale: f64) -> Result<Set> {
    let dir = &workplace.dir;
    let (name, count, folders) = match kind {
        Kind::Small => ("small", (20_000.0 * scale) as usize, 200),
        Kind::Tiny => ("tiny", (100_000.0 * scale) as usize, 100),
        Kind::Big => ("big", 4, 1),
    };
    let bytes = match kind {
        Kind::Small => 2.3e9 * scale,
        Kind::Tiny => 4.1e8 * scale,
        Kind::Big => 4.3e9 * scale.min(1.0),
    };
    // The source, three copies in the store, one cache.
    workplace.needs(name, (bytes * 5.0) as u64)?;
    let share = (scale * 1000.0) as u64;
    let root = dir.join(format!("data-{name}-x{share}"));
    let done = dir.join(format!("data-{name}-x{share}.done"));
    let fresh = !done.exists();
    if fresh {
        eprintln!("making the data set {name} below {}", root.display());
        let _ = fs::remove_dir_all(&root);
    }
    let mut random = SmallRng::seed_from_u64(0x1a2d_e200 + count as u64);
    let mut order = Vec::with_capacity(count);
    let mut buffer = Vec::new();
    for number in 0..count {
        go_on()?;
        let size = match kind {
            Kind::Small => lognormal(&mut random),
            Kind::Tiny => 4096,
            Kind::Big => ((1u64 << 30) as f64 * scale.min(1.0)) as u64 & !4095,
        };
        let path = format!("d{:03}/f{number:06}.bin", number % folders);
        let checksum = write_file(&root.join(&path), size, number as u64, fresh, &mut buffer)?;
        order.push(File { path, size, checksum });
    }
    if fresh {
        nix::unistd::sync();
        fs::write(&done, b"")?;
    }
    shuffle(&mut order, &mut random);
    if kind == Kind::Tiny {
        order.truncate((20_000.0 * scale) as usize);
    }
    Ok(Set { kind, root, files: count, order })
}

/// Takes a data set away.
pub fn remove(set: &Set) -> Result<()> {
    let _ = fs::remove_file(set.root.with_extension("done"));
    fs::remove_dir_all(&set.root).with_context(|| format!("remove {}", set.root.display()))
}

/// A size around 110 KB: the exponential of a sum of uniforms, near enough to a lognormal.
fn lognormal(random: &mut SmallRng) -> u64 {
    let normal: f64 = (0..12).map(|_| random.random::<f64>()).sum::<f64>() - 6.0;
    (80_000.0 * (0.8 * normal).exp()) as u64 + 1
}

/// Writes (or only recomputes) one file; gives its checksum.
fn write_file(path: &Path, size: u64, seed: u64, write: bool, buffer: &mut Vec<u8>) -> Result<u64> {
    let mut random = SmallRng::seed_from_u64(seed ^ 0x5eed);
    let mut sum = super::reader::Checksum::default();
    if write {
        fs::create_dir_all(path.parent().context("a file has a folder")?)?;
    }
    let mut file = if write { Some(fs::File::create(path)?) } else { None };
    let mut left = size;
    buffer.resize(1 << 20, 0);
    while left > 0 {
        let len = left.min(buffer.len() as u64) as usize;
        random.fill_bytes(&mut buffer[..len]);
        sum.update(&buffer[..len]);
        if let Some(file) = &mut file {
            std::io::Write::write_all(file, &buffer[..len])?;
        }
        left -= len as u64;
    }
    Ok(sum.finish())
}

fn shuffle(order: &mut [File], random: &mut SmallRng) {
    for at in (1..order.len()).rev() {
        order.swap(at, random.random_range(0..=at));
    }
}
