//! The readers: whole files through several threads in a given order, and a walk that stats.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::data::{File, Set};
use crate::place::go_on;

/// A checksum that is cheap beside a read: 8-byte words, position-dependent.
#[derive(Debug, Default)]
pub struct Checksum {
    sum: u64,
    tail: Vec<u8>,
}

impl Checksum {
    pub fn update(&mut self, mut bytes: &[u8]) {
        if !self.tail.is_empty() {
            let missing = (8 - self.tail.len()).min(bytes.len());
            self.tail.extend_from_slice(&bytes[..missing]);
            bytes = &bytes[missing..];
            if self.tail.len() == 8 {
                let word = std::mem::take(&mut self.tail);
                self.word(&word);
            }
        }
        let mut words = bytes.chunks_exact(8);
        for word in &mut words {
            self.word(word);
        }
        self.tail.extend_from_slice(words.remainder());
    }

    fn word(&mut self, word: &[u8]) {
        let value = u64::from_le_bytes(word.try_into().unwrap_or_default());
        self.sum = self.sum.rotate_left(5) ^ value;
    }

    pub fn finish(mut self) -> u64 {
        let mut last = std::mem::take(&mut self.tail);
        last.resize(8, 0);
        self.word(&last);
        self.sum
    }
}

/// What an epoch did.
#[derive(Debug)]
pub struct Epoch {
    pub files: usize,
    pub bytes: u64,
    pub secs: f64,
}

/// Reads the files of the set in its order through `threads` readers; a wrong byte ends the run.
pub fn epoch(root: &Path, set: &Set, limit: Option<usize>, threads: usize) -> Result<Epoch> {
    let files = &set.order[..limit.unwrap_or(usize::MAX).min(set.order.len())];
    let next = AtomicUsize::new(0);
    let begin = Instant::now();
    let results: Vec<Result<u64>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(|| read_some(root, files, &next))).collect();
        workers.into_iter().map(|worker| worker.join().unwrap_or_else(|_| bail!("a reader panicked"))).collect()
    });
    let secs = begin.elapsed().as_secs_f64();
    let mut bytes = 0;
    for result in results {
        bytes += result?;
    }
    go_on()?;
    Ok(Epoch { files: files.len(), bytes, secs })
}

fn read_some(root: &Path, files: &[File], next: &AtomicUsize) -> Result<u64> {
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
        let path = root.join(&file.path);
        let (size, checksum) = read_file(&path, &mut buffer).with_context(|| format!("read {}", path.display()))?;
        if size != file.size || checksum != file.checksum {
            bail!("{} gave {size} bytes of {} or wrong ones", path.display(), file.size);
        }
        bytes += size;
    }
    Ok(bytes)
}

fn read_file(path: &Path, buffer: &mut [u8]) -> Result<(u64, u64)> {
    let mut file = fs::File::open(path)?;
    let mut sum = Checksum::default();
    let mut size = 0;
    loop {
        go_on()?;
        let len = file.read(buffer)?;
        if len == 0 {
            return Ok((size, sum.finish()));
        }
        sum.update(&buffer[..len]);
        size += len as u64;
    }
}

/// What a walk saw.
#[derive(Debug)]
pub struct Walk {
    pub entries: u64,
    pub secs: f64,
}

/// Lists every directory and stats every entry, one thread.
pub fn walk(root: &Path) -> Result<Walk> {
    let begin = Instant::now();
    let mut entries = 0;
    let mut open = vec![root.to_path_buf()];
    while let Some(dir) = open.pop() {
        go_on()?;
        for entry in fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))? {
            let entry = entry?;
            entries += 1;
            if entry.metadata()?.is_dir() {
                open.push(entry.path());
            }
        }
    }
    Ok(Walk { entries, secs: begin.elapsed().as_secs_f64() })
}
