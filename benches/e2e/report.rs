//! Medians, ratios to the plain file system, the table and the JSON.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};

/// The phases in the order of the table.
const PHASES: [&str; 5] = ["push", "cold", "warm", "rewarm", "hot"];

/// One measurement.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Record {
    pub peer: String,
    pub work: String,
    pub phase: String,
    pub round: usize,
    pub rate: f64,
    pub unit: &'static str,
    /// The machine's load in the minute before: what others did at the same time, too.
    pub load: f64,
}

/// Everything measured, with the conditions.
#[derive(Debug, serde::Serialize)]
pub struct Report {
    conditions: BTreeMap<&'static str, serde_json::Value>,
    records: Vec<Record>,
}

fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0.0)
}

fn first_line(path: &str, begins: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(begins)).unwrap_or("");
    line.trim_start_matches([' ', '\t', ':']).trim().to_owned()
}

impl Report {
    pub fn new(options: &impl serde::Serialize) -> Self {
        let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
        let conditions = BTreeMap::from([
            ("begun", jiff::Timestamp::now().to_string().into()),
            ("kernel", first_line("/proc/sys/kernel/osrelease", "").into()),
            ("processor", first_line("/proc/cpuinfo", "model name").into()),
            ("memory", first_line("/proc/meminfo", "MemTotal").into()),
            ("cores", cores.into()),
            ("options", serde_json::to_value(options).unwrap_or_default()),
        ]);
        Self { conditions, records: Vec::new() }
    }

    pub fn push(&mut self, peer: &str, work: &str, phase: &str, round: usize, rate: f64, unit: &'static str) {
        eprintln!("    {work:6} {phase:10} {rate:12.0} {unit}");
        let (peer, work, phase) = (peer.to_owned(), work.to_owned(), phase.to_owned());
        self.records.push(Record { peer, work, phase, round, rate, unit, load: load() });
    }

    /// (work, phase) -> peer -> median rate, in the table's order.
    fn medians(&self) -> BTreeMap<(String, usize, String), BTreeMap<String, f64>> {
        let mut rates: BTreeMap<_, BTreeMap<String, Vec<f64>>> = BTreeMap::new();
        for record in &self.records {
            let stem = record.phase.split('-').next().unwrap_or_default();
            let place = PHASES.iter().position(|phase| *phase == stem).unwrap_or(PHASES.len());
            let row = rates.entry((record.work.clone(), place, record.phase.clone())).or_default();
            row.entry(record.peer.clone()).or_default().push(record.rate);
        }
        rates
            .into_iter()
            .map(|(key, row)| (key, row.into_iter().map(|(peer, rates)| (peer, median(rates))).collect()))
            .collect()
    }

    /// Prints the conditions and one table: a row for each work and phase, a column for each peer.
    pub fn print(&self) {
        for (name, value) in &self.conditions {
            println!("{name}: {}", value.as_str().map_or_else(|| value.to_string(), str::to_owned));
        }
        let medians = self.medians();
        let mut peers: Vec<&str> = Vec::new();
        for record in &self.records {
            if !peers.contains(&record.peer.as_str()) {
                peers.push(&record.peer);
            }
        }
        let native = |work: &str, phase: &str| {
            let mut rows = medians.iter().filter(|((at, _, name), _)| at == work && name == phase);
            rows.next().and_then(|(_, row)| row.get("native")).copied()
        };
        println!("\n| work | phase | unit | {} |", peers.join(" | "));
        println!("|---|---|---|{}", "---:|".repeat(peers.len()));
        for ((work, _, phase), row) in &medians {
            let base = native(work, if phase == "hot" { "hot" } else { "warm" });
            let unit = self.records.iter().find(|record| record.work == *work && record.phase == *phase);
            let cells: Vec<String> = peers
                .iter()
                .map(|peer| match (row.get(*peer), base) {
                    (Some(rate), Some(base)) if phase != "push" => format!("{rate:.0} ({:.3}x)", rate / base),
                    (Some(rate), _) => format!("{rate:.0}"),
                    (None, _) => "-".to_owned(),
                })
                .collect();
            println!("| {work} | {phase} | {} | {} |", unit.map_or("", |record| record.unit), cells.join(" | "));
        }
    }

    /// Writes the conditions and every measurement.
    pub fn write_json(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }
}

/// The middle value; of an even count the mean of the two in the middle.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.get(middle) {
        Some(upper) if values.len().is_multiple_of(2) => {
            values.get(middle - 1).map_or(*upper, |lower| (lower + upper) / 2.0)
        }
        Some(middle) => *middle,
        None => 0.0,
    }
}
