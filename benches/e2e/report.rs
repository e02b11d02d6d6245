//! Medians, ratios to the plain file system, the table and the JSON.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};

/// One measurement.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Record {
    pub peer: String,
    pub work: String,
    pub phase: String,
    pub round: usize,
    pub rate: f64,
    pub unit: &'static str,
}

/// (work, phase) -> peer -> median rate.
fn medians(records: &[Record]) -> BTreeMap<(String, String), BTreeMap<String, f64>> {
    let mut rates: BTreeMap<(String, String), BTreeMap<String, Vec<f64>>> = BTreeMap::new();
    for record in records {
        let row = rates.entry((record.work.clone(), record.phase.clone())).or_default();
        row.entry(record.peer.clone()).or_default().push(record.rate);
    }
    let median = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(0.0)
    };
    rates
        .into_iter()
        .map(|(key, row)| (key, row.into_iter().map(|(peer, values)| (peer, median(values))).collect()))
        .collect()
}

/// Prints one table: a row for each work and phase, a column for each peer.
pub fn print(records: &[Record]) {
    let medians = medians(records);
    let mut peers: Vec<String> = Vec::new();
    for record in records {
        if !peers.contains(&record.peer) {
            peers.push(record.peer.clone());
        }
    }
    println!("| work | phase | unit | {} |", peers.join(" | "));
    println!("|---|---|---|{}", "---:|".repeat(peers.len()));
    for ((work, phase), row) in &medians {
        let base_phase = if phase == "hot" { "hot" } else { "warm" };
        let base = medians.get(&(work.clone(), base_phase.to_owned())).and_then(|row| row.get("native")).copied();
        let unit = records.iter().find(|record| record.work == *work).map_or("", |record| record.unit);
        let cells: Vec<String> = peers
            .iter()
            .map(|peer| match (row.get(peer), base) {
                (Some(rate), Some(base)) => format!("{rate:.0} ({:.3}x)", rate / base),
                (Some(rate), None) => format!("{rate:.0}"),
                (None, _) => "-".to_owned(),
            })
            .collect();
        println!("| {work} | {phase} | {unit} | {} |", cells.join(" | "));
    }
}

/// Writes every measurement.
pub fn write_json(records: &[Record], path: &Path) -> Result<()> {
    let text = serde_json::to_string_pretty(records)?;
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
}
