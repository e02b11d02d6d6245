//! The allocation over time as text: time runs to the right, GPUs are stacked, a letter for each project.

use super::report::Report;

/// Letters of the projects, in their order.
const LETTERS: &str = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
/// Rows of the plot, at most.
const ROWS_MAX: u64 = 16;

/// Draws a report into `columns` columns. Where the samples lie close together or far apart, each
/// column shows the state at the beginning of its slice of time.
pub fn plot(report: &Report, columns: usize) -> Vec<String> {
    let rows = (report.gpus.0 / 1000).clamp(1, ROWS_MAX);
    let per_row = report.gpus.0.div_ceil(rows).max(1);
    let slices: Vec<Vec<char>> = (0..columns).map(|column| slice(report, column, columns, per_row)).collect();
    let mut lines = Vec::new();
    for row in (0..rows).rev() {
        let line: String = slices.iter().map(|slice| slice.get(row as usize).copied().unwrap_or('.')).collect();
        lines.push(format!("{:>6} |{line}", crate::quota::MilliGpus(per_row * (row + 1)).to_string()));
    }
    lines.push(format!("{:>6} +{}", 0, "-".repeat(columns)));
    lines.push(format!(
        "{:>6}  0{:>width$}",
        "",
        format!("{} s", report.end_ms / 1000),
        width = columns.saturating_sub(1)
    ));
    let legend = report.projects.iter().zip(LETTERS.chars().cycle());
    let legend: Vec<String> = legend.map(|(project, letter)| format!("{letter} = {}", project.id)).collect();
    lines.push(format!("{:>6}  {}   . = idle", "", legend.join("  ")));
    lines
}

/// The letters of one column, from the bottom up.
fn slice(report: &Report, column: usize, columns: usize, per_row: u64) -> Vec<char> {
    let moment = report.end_ms.saturating_mul(column as u64) / columns.max(1) as u64;
    let Some(sample) = report.samples.iter().rev().find(|sample| sample.at_ms <= moment) else {
        return Vec::new();
    };
    let mut letters = Vec::new();
    let mut stacked = 0u64;
    for (project, letter) in report.projects.iter().zip(LETTERS.chars().cycle()) {
        stacked += sample.allocated.get(&project.id).map_or(0, |gpus| gpus.0);
        // A row is drawn for who fills more than half of it.
        while (letters.len() as u64 + 1) * per_row <= stacked + per_row / 2 {
            letters.push(letter);
        }
    }
    letters
}
