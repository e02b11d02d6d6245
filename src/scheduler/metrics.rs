//! The scheduler's metrics, as Prometheus text. `docs/jobs.md` lists them.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::core::Core;

const STATES: [&str; 8] =
    ["Pending", "Starting", "Running", "Stopping", "Completing", "Succeeded", "Failed", "Cancelled"];

/// Writes a metric's head.
pub(super) fn head(page: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(page, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// Renders all metrics.
pub(super) fn page(core: &Core) -> String {
    let mut page = String::new();
    let mut jobs: BTreeMap<&str, usize> = STATES.map(|state| (state, 0)).into();
    for job in core.jobs.values() {
        *jobs.entry(job.state.word()).or_default() += 1;
    }
    head(&mut page, "larder_scheduler_jobs", "gauge", "Jobs by state.");
    for (state, count) in jobs {
        let _ = writeln!(page, "larder_scheduler_jobs{{state=\"{state}\"}} {count}");
    }
    let projects = core.projects();
    let gpus = |milli: u64| milli as f64 / 1000.0;
    head(
        &mut page,
        "larder_scheduler_project_gpus",
        "gauge",
        "GPUs of a project: its quota, its fair share, what it has.",
    );
    for view in &projects {
        let share = view.fair_share.unwrap_or_default();
        for (what, amount) in
            [("quota", view.project.shares.quota), ("fair_share", share), ("allocated", view.allocated)]
        {
            let (name, amount) = (&view.name, gpus(amount.0));
            let _ = writeln!(page, "larder_scheduler_project_gpus{{project=\"{name}\",what=\"{what}\"}} {amount}");
        }
    }
    head(&mut page, "larder_scheduler_node_gpus", "gauge", "GPUs of a node: all of them, and those in use.");
    for view in core.nodes() {
        let (name, all, used) = (&view.node.node.id, view.node.node.gpus, gpus(view.allocated.0));
        let _ = writeln!(page, "larder_scheduler_node_gpus{{node=\"{name}\",what=\"all\"}} {all}");
        let _ = writeln!(page, "larder_scheduler_node_gpus{{node=\"{name}\",what=\"allocated\"}} {used}");
    }
    let pauses: u64 = core.jobs.values().map(|job| u64::from(job.pauses)).sum();
    head(&mut page, "larder_scheduler_pauses", "gauge", "How often the jobs that are known now were paused.");
    let _ = writeln!(page, "larder_scheduler_pauses {pauses}");
    head(&mut page, "larder_scheduler_cycles_total", "counter", "Decisions since the start.");
    let _ = writeln!(page, "larder_scheduler_cycles_total {}", core.cycles);
    head(&mut page, "larder_scheduler_cycle_seconds", "gauge", "How long the last decision took.");
    let _ = writeln!(page, "larder_scheduler_cycle_seconds {}", core.cycle_us as f64 / 1e6);
    page
}
