//! The end-to-end harness: the same work on the plain file system, on Larder and on its rivals, in
//! one run, as ratios.
//!
//! * [`data`]: the seeded data sets SMALL, TINY, BIG. * [`reader`]: epochs and walks, with checksums.
//! * [`store`]: one S3 server for everybody, and a proxy that delays it. * [`peers`]: who is measured;
//!   [`recipes`]: the rivals' options. * [`place`]: the directory, and that nothing of it is left.
//! * [`report`]: medians, ratios, the table and the JSON.
//!
//! Method: every round measures every peer before the next round begins, so that a slow minute of a
//! shared machine hits all; medians over the rounds; every epoch's checksum must be the data's.
//! `cold` starts with an empty cache, a fresh mount and a dropped page cache, and then reads the
//! peer's objects once in the store's own files, so that the store does not wait for the disk; walk
//! and epoch have a mount each, so that neither warms the other. Where the page cache is dropped, free
//! memory is touched once, so that nobody pays for pages that the machine's host took back. `warm` keeps the peer's cache and
//! drops the page cache; `hot` drops nothing, and is measured several times; `rewarm` is `warm` after an unmount and a mount. Ratios
//! are to the plain file system: cold and warm to its warm, hot to its hot.
//!
//! With a delayed store the rivals read the first `--rival-files` of the order only: they fetch a
//! file when it is opened, so their rate is the same for the rest. Larder reads all files always.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Parser;

mod data;
mod peers;
mod place;
mod reader;
mod recipes;
mod report;
mod store;

/// Runs Larder, the plain file system and its rivals on the same work.
#[derive(Parser, Debug, serde::Serialize)]
struct Options {
    /// Who takes part: native, larder, kernel (larder's other engine), juicefs, rclone, s3fs.
    #[arg(long, value_delimiter = ',', default_value = "native,larder,kernel,juicefs,rclone,s3fs")]
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
    /// Rounds of the rivals, in the first rounds of all; no more than `--rounds`.
    #[arg(long)]
    rival_rounds: Option<usize>,
    /// Files that rivals read from a delayed store.
    #[arg(long, default_value_t = 4000)]
    rival_files: usize,
    /// Share of the full sizes, for a quick look (1 = the sizes of the documentation).
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Reader threads of an epoch.
    #[arg(long, default_value_t = 8)]
    threads: usize,
    /// Where `larder-bench` is made for data, caches and the store, on the disk to be measured; 22 GB.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// The JSON with the conditions and every single measurement.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Leaves data and store for the next run.
    #[arg(long)]
    keep: bool,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    #[serde(skip)]
    bench: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    place::watch_for_stop()?;
    let parent = options.dir.clone().unwrap_or_else(std::env::temp_dir);
    let workplace = place::Workplace::open(&parent, options.keep)?;
    let store = store::Store::start(&workplace.dir)?;
    let mut bench = Bench { report: report::Report::new(&options), options, workplace, store };
    let done = data::kinds(&bench.options.work).into_iter().try_for_each(|kind| bench.set(kind));
    // What was measured before an error or a Ctrl-C is shown all the same.
    bench.report.print();
    bench.write_json()?;
    done
}

/// What is in memory already is read several times, for a few seconds.
const HOT_PASSES_MIN: usize = 3;
const HOT_PASSES_MAX: usize = 20;
const HOT_TIME: std::time::Duration = std::time::Duration::from_secs(3);

struct Bench {
    options: Options,
    report: report::Report,
    // In this order, so that the store ends before its directory goes.
    store: store::Store,
    workplace: place::Workplace,
}

impl Bench {
    /// Measures one data set in all rounds, and takes it away.
    fn set(&mut self, kind: data::Kind) -> Result<()> {
        let set = data::prepare(&self.workplace, kind, self.options.scale)?;
        let mut field = peers::field(&self.options.peers, &self.workplace.dir, &self.store, &set)?;
        for round in 0..self.options.rounds {
            let rivals_take_part = self.options.rival_rounds.is_none_or(|rounds| round < rounds);
            let mut failed = Vec::new();
            for peer in field.iter_mut().filter(|peer| rivals_take_part || !peer.is_rival()) {
                eprintln!("round {} of {}: {} on {}", round + 1, self.options.rounds, peer.name(), set.name());
                let done = self.turn(peer.as_mut(), &set, round);
                place::go_on()?;
                match done {
                    Err(error) if peer.is_rival() => {
                        eprintln!("{} fails and is left out from here: {error:#}", peer.name());
                        failed.push(peer.name().to_owned());
                    }
                    done => done.with_context(|| peer.name().to_owned())?,
                }
                self.write_json()?;
            }
            let last_of_rivals = self.options.rival_rounds.is_some_and(|rounds| round + 1 >= rounds);
            field.retain(|peer| {
                let is_over = last_of_rivals && peer.is_rival();
                !is_over && !failed.iter().any(|name| name == peer.name())
            });
        }
        drop(field);
        if self.options.keep { Ok(()) } else { data::remove(&set).and_then(|()| self.store.remove_all(set.name())) }
    }

    /// Takes one peer through all phases of one data set; its cache is empty afterwards.
    fn turn(&mut self, peer: &mut dyn peers::Peer, set: &data::Set, round: usize) -> Result<()> {
        if let Some(secs) = peer.load()? {
            self.push(peer.name(), set, "push", round, set.files as f64 / secs, "files/s");
        }
        if peer.needs_cache() {
            peer.reset()?;
            peer.settle()?;
        } else if peer.has_cache() {
            let mut delays = self.options.delays.clone();
            // The undelayed one is last: its cache is read in the warm phases.
            delays.sort_by_key(|delay| std::cmp::Reverse(*delay));
            for delay_ms in delays {
                self.cold(peer, set, round, delay_ms)?;
            }
            peer.settle()?;
        }
        let root = peer.mount(self.store.endpoint())?;
        for part in ["walk", "epoch"] {
            place::level_memory(set.memory_bytes())?;
            self.part(part, peer, set, &root, "warm", round)?;
        }
        for part in ["walk", "epoch"] {
            // One pass may be over in a fraction of a second, which is too little to measure.
            let begun = std::time::Instant::now();
            let mut passes = 0;
            while passes < HOT_PASSES_MIN || (begun.elapsed() < HOT_TIME && passes < HOT_PASSES_MAX) {
                self.part(part, peer, set, &root, "hot", round)?;
                passes += 1;
            }
        }
        peer.unmount()?;
        if peer.has_cache() {
            let root = peer.mount(self.store.endpoint())?;
            place::level_memory(set.memory_bytes())?;
            self.epoch(peer, set, &root, "rewarm", round)?;
            peer.reset()?;
        }
        Ok(())
    }

    fn cold(&mut self, peer: &mut dyn peers::Peer, set: &data::Set, round: usize, delay_ms: u64) -> Result<()> {
        let phase = if delay_ms == 0 { "cold".to_owned() } else { format!("cold-{delay_ms}ms") };
        self.store.set_delay(delay_ms);
        let endpoint = if delay_ms == 0 { self.store.endpoint() } else { self.store.delayed_endpoint() };
        for part in ["walk", "epoch"] {
            if (part == "walk" && !self.walks(set)) || (part == "epoch" && !set.reads(&self.options.work)) {
                continue;
            }
            peer.reset()?;
            place::level_memory(set.memory_bytes())?;
            if let Some(objects) = peer.objects() {
                self.store.read_once(objects)?;
            }
            let root = peer.mount(endpoint.clone())?;
            self.part(part, peer, set, &root, &phase, round)?;
        }
        Ok(())
    }

    fn part(
        &mut self,
        part: &str,
        peer: &dyn peers::Peer,
        set: &data::Set,
        root: &Path,
        phase: &str,
        round: usize,
    ) -> Result<()> {
        match part {
            "walk" => self.walk(peer.name(), set, root, phase, round),
            _ => self.epoch(peer, set, root, phase, round),
        }
    }

    fn walks(&self, set: &data::Set) -> bool {
        self.options.work.contains(&data::Work::Walk) && set.walks()
    }

    fn walk(&mut self, peer: &str, set: &data::Set, root: &Path, phase: &str, round: usize) -> Result<()> {
        if self.walks(set) {
            let walk = reader::walk(root)?;
            self.report.push(peer, "walk", phase, round, walk.entries as f64 / walk.secs, "entries/s");
        }
        Ok(())
    }

    fn epoch(&mut self, peer: &dyn peers::Peer, set: &data::Set, root: &Path, phase: &str, round: usize) -> Result<()> {
        if !set.reads(&self.options.work) {
            return Ok(());
        }
        let few = peer.is_rival() && phase.starts_with("cold-") && set.kind != data::Kind::Big;
        let limit = few.then_some(self.options.rival_files);
        let epoch = reader::epoch(root, set, limit, self.options.threads)?;
        let (rate, unit) = match set.kind {
            data::Kind::Big => (epoch.bytes as f64 / epoch.secs / 1048576.0, "MiB/s"),
            _ => (epoch.files as f64 / epoch.secs, "files/s"),
        };
        self.push(peer.name(), set, phase, round, rate, unit);
        Ok(())
    }

    fn push(&mut self, peer: &str, set: &data::Set, phase: &str, round: usize, rate: f64, unit: &'static str) {
        self.report.push(peer, set.name(), phase, round, rate, unit);
    }

    fn write_json(&self) -> Result<()> {
        self.options.json.as_ref().map_or(Ok(()), |path| self.report.write_json(path))
    }
}
