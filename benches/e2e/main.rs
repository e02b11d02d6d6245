//! The end-to-end harness: the same work on the plain file system, on Larder and on its rivals, in
//! one run, as ratios.
//!
//! * [`data`]: the seeded data sets SMALL, TINY, BIG. * [`reader`]: epochs and walks, with checksums.
//! * [`store`]: one S3 server for everybody, and a proxy that delays it. * [`peers`]: who is measured.
//! * [`report`]: medians, ratios, the table and the JSON.
//!
//! Method: every round measures every peer before the next round begins, so that a slow minute of a
//! shared machine hits all; medians over the rounds; every epoch's checksum must be the data's. A cold
//! phase starts with an empty cache, a fresh mount and a dropped page cache; `warm` keeps the peer's
//! cache and drops the page cache; `rewarm` mounts again before that; `hot` drops nothing. Ratios are to
//! the plain file system: cold and warm to its warm, hot to its hot.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;

mod data;
mod peers;
mod reader;
mod report;
mod store;

/// Runs Larder, the plain file system and its rivals on the same work.
#[derive(Parser, Debug)]
struct Options {
    /// Who takes part: native, larder, juicefs, rclone, s3fs.
    #[arg(long, value_delimiter = ',', default_value = "native,larder,juicefs,rclone,s3fs")]
    peers: Vec<String>,
    /// Which work: small, tiny, big, walk.
    #[arg(long, value_delimiter = ',', default_value = "small,tiny,big,walk")]
    work: Vec<data::Work>,
    /// How often the store is delayed in cold phases, milliseconds.
    #[arg(long, value_delimiter = ',', default_value = "0,20")]
    delays: Vec<u64>,
    /// Rounds; the table shows medians.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Share of the full sizes, for a quick look (1 = the sizes of the documentation).
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Reader threads of an epoch.
    #[arg(long, default_value_t = 8)]
    threads: usize,
    /// Where data, caches and the store lie (on the disk to be measured; about 30 GB).
    #[arg(long)]
    dir: Option<PathBuf>,
    /// The JSON with every single measurement.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let dir = options.dir.clone().unwrap_or_else(|| std::env::temp_dir().join("larder-bench"));
    std::fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;

    let store = store::Store::start(&dir)?;
    let mut records = Vec::new();
    for kind in data::kinds(&options.work) {
        let set = data::generate(&dir, kind, options.scale)?;
        let mut field = peers::field(&options.peers, &dir, &store, &set)?;
        for round in 0..options.rounds {
            for peer in &mut field {
                eprintln!("round {} of {}: {} on {}", round + 1, options.rounds, peer.name(), set.name());
                records.extend(measure(&options, peer.as_mut(), &set, &store, round)?);
            }
        }
    }
    report::print(&records);
    if let Some(path) = &options.json {
        report::write_json(&records, path)?;
    }
    Ok(())
}

/// Takes one peer through all phases of one data set.
fn measure(
    options: &Options,
    peer: &mut dyn peers::Peer,
    set: &data::Set,
    store: &store::Store,
    round: usize,
) -> Result<Vec<report::Record>> {
    let mut phases = Phases { options, set, round, peer: peer.name().to_owned(), records: Vec::new() };
    if peer.has_cache() {
        for delay_ms in options.delays.iter().filter(|delay| **delay > 0) {
            store.set_delay(*delay_ms);
            peer.reset()?;
            let root = peer.mount(store.delayed_endpoint())?;
            // Rivals fetch a file when it is opened: the first 4,000 show their rate.
            phases.run(&root, &format!("cold-{delay_ms}ms"), Some(4000))?;
            peer.unmount()?;
        }
        peer.reset()?;
        let root = peer.mount(store.endpoint())?;
        phases.run(&root, "cold", None)?;
        peer.settle()?;
    }
    let root = peer.mount(store.endpoint())?;
    reader::drop_page_cache()?;
    phases.run(&root, "warm", None)?;
    phases.run(&root, "hot", None)?;
    peer.unmount()?;
    if peer.has_cache() {
        let root = peer.mount(store.endpoint())?;
        reader::drop_page_cache()?;
        phases.run(&root, "rewarm", None)?;
        peer.unmount()?;
    }
    Ok(phases.records)
}

struct Phases<'a> {
    options: &'a Options,
    set: &'a data::Set,
    round: usize,
    peer: String,
    records: Vec<report::Record>,
}

impl Phases<'_> {
    /// Measures the walk (where asked) and the epoch of one phase.
    fn run(&mut self, root: &std::path::Path, phase: &str, limit: Option<usize>) -> Result<()> {
        if self.options.work.contains(&data::Work::Walk) && self.set.walks() {
            let walk = reader::walk(root)?;
            self.push("walk", phase, walk.entries as f64 / walk.secs, "entries/s");
        }
        if !self.set.reads(&self.options.work) {
            return Ok(());
        }
        let epoch = reader::epoch(root, self.set, limit, self.options.threads)?;
        match self.set.kind {
            data::Kind::Big => self.push("big", phase, epoch.bytes as f64 / epoch.secs / 1048576.0, "MiB/s"),
            _ => self.push(self.set.name(), phase, epoch.files as f64 / epoch.secs, "files/s"),
        }
        Ok(())
    }

    fn push(&mut self, work: &str, phase: &str, rate: f64, unit: &'static str) {
        eprintln!("    {work:6} {phase:10} {rate:12.0} {unit}");
        self.records.push(report::Record {
            peer: self.peer.clone(),
            work: work.to_owned(),
            phase: phase.to_owned(),
            round: self.round,
            rate,
            unit,
        });
    }
}
