//! How jobs are told: the listing, everything about one, who uses which GPU.

use std::io::Write as _;

use serde_json::json;

use crate::cli::Context;
use crate::cli::output::{self, Out, Table};
use crate::cli::scheduler::client::Client;
use crate::quota::{Kind, Template};
use crate::scheduler::api::Top;
use crate::scheduler::gpus::GpuLoad;
use crate::scheduler::job::{Attempt, JobRecord, Stop};
use crate::scheduler::view::JobView;

fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Train => "train",
        Kind::Build => "build",
        Kind::Interactive => "interactive",
        Kind::Inference => "inference",
    }
}

fn span_ms(ms: i64) -> String {
    output::span(u64::try_from(ms / 1000).unwrap_or(0))
}

/// Prints a line for each job.
pub fn list(ctx: &Context, views: &[JobView]) -> anyhow::Result<()> {
    if ctx.json() {
        return ctx.print_json(&views);
    }
    if views.is_empty() {
        ctx.say("there are no jobs");
        return Ok(());
    }
    let mut table = Table::new(&["NAME", "STATUS", ">AGE", "NODE", "TYPE", "PROJECT", ">GPUS", "IMAGE"]);
    for view in views {
        let job = &view.job;
        table.row([
            job.name.clone(),
            view.status.clone(),
            span_ms(now_ms() - job.submitted_ms),
            view.nodes.join(","),
            kind(job.spec.kind).to_owned(),
            job.project.clone(),
            view.gpus.to_string(),
            job.spec.image.clone().unwrap_or_default(),
        ]);
    }
    ctx.print_table(&table)
}

/// Says what a job waits for.
pub fn why(ctx: &Context, view: &JobView) -> anyhow::Result<()> {
    if ctx.json() {
        return ctx.print_json(&json!({"name": view.job.name, "status": view.status, "why": view.why}));
    }
    let mut out = ctx.out();
    let name = &view.job.name;
    match &view.why {
        Some(why) => writeln!(out, "{name} is {}: {why}", view.status)?,
        None => writeln!(out, "{name} is {}", view.status)?,
    }
    Ok(out.finish()?)
}

/// Says everything about a job.
pub fn describe(ctx: &Context, view: &JobView) -> anyhow::Result<()> {
    if ctx.json() {
        return ctx.print_json(view);
    }
    let job = &view.job;
    let mut out = ctx.out();
    let mut line = |name: &str, value: String| writeln!(out, "{name:<11} {value}");
    line("name", job.name.clone())?;
    line("project", job.project.clone())?;
    line("id", job.id.to_string())?;
    line("status", view.status.clone())?;
    if let Some(why) = &view.why {
        line("why", why.clone())?;
    }
    line("type", kind(job.spec.kind).to_owned())?;
    line("submitted", format!("{} by user {}", output::time(job.submitted_ms), job.submitter.uid))?;
    if let Some(ended_ms) = job.ended_ms {
        line("ended", output::time(ended_ms))?;
    }
    line("paused", format!("{} times", job.pauses))?;
    asked(&mut out, job)?;
    attempts(&mut out, job)?;
    Ok(out.finish()?)
}

fn asked(out: &mut Out, job: &JobRecord) -> std::io::Result<()> {
    let spec = &job.spec;
    let mut line = |name: &str, value: String| writeln!(out, "{name:<11} {value}");
    for template in &spec.templates {
        line("asks for", shape(template))?;
    }
    if let Some(image) = &spec.image {
        let digest = job.attempts.iter().rev().find_map(|attempt| attempt.image.clone());
        line("image", digest.unwrap_or_else(|| image.clone()))?;
    }
    if let Some(from) = &spec.restore {
        line("begins with", format!("{} ({})", from.revision, from.commit))?;
    }
    let command: Vec<String> = spec.command.iter().map(|word| output::printable(word.as_bytes())).collect();
    line("command", command.join(" "))?;
    for (key, value) in &spec.env {
        line("env", format!("{key}={}", output::printable(value.as_bytes())))?;
    }
    if let Some(code) = &spec.code {
        line("code", output::printable(code.as_bytes()))?;
    }
    for data in &spec.datasets {
        line("dataset", format!("{} ({}) at {}", data.revision, data.commit, data.path))?;
    }
    for volume in &spec.volumes {
        line("volume", format!("{} at {}", volume.name, volume.path))?;
    }
    for output in &spec.outputs {
        let commit = job.outputs.iter().find(|made| made.dataset == output.dataset);
        let told = commit.map_or("no commit yet", |made| made.commit.as_str());
        line("output", format!("{} ({told}) from {}", output.dataset, output.path))?;
        for name in commit.iter().flat_map(|made| &made.left_out) {
            line("left out", output::printable(name.as_bytes()))?;
        }
    }
    for snapshot in &job.snapshots {
        let told = snapshot.commit.as_ref().or(snapshot.error.as_ref());
        let told = told.map_or("is being stored", String::as_str);
        line("snapshot", format!("{} ({told})", snapshot.dataset))?;
    }
    Ok(())
}

fn shape(template: &Template) -> String {
    let mut text = format!("{} GPUs", template.gpus);
    if template.processes > 1 {
        text = format!("{} processes of {text}", template.processes);
    }
    if let Some(pool) = &template.pool {
        text.push_str(&format!(" in pool {pool}"));
    }
    for (label, value) in &template.labels {
        text.push_str(&format!(", {label}={value}"));
    }
    text
}

fn attempts(out: &mut Out, job: &JobRecord) -> std::io::Result<()> {
    for attempt in &job.attempts {
        writeln!(out, "\nattempt {}   {}", attempt.number, output::time(attempt.begun_ms))?;
        for (rank, seat) in attempt.placement.seats.iter().enumerate() {
            let gpus: Vec<String> = seat.gpus.iter().map(ToString::to_string).collect();
            writeln!(out, "  rank {rank}: node {}, GPU {} ({} of each)", seat.node, gpus.join(","), seat.each)?;
        }
        writeln!(out, "  {}", ended(attempt))?;
    }
    Ok(())
}

fn ended(attempt: &Attempt) -> String {
    let exits: Vec<String> = attempt.exits.iter().map(ToString::to_string).collect();
    let stop = match &attempt.stop {
        None => String::new(),
        Some(Stop::Preempted { why } | Stop::Failed { why }) => format!("{why}; "),
        Some(Stop::NodeGone { node }) => format!("node {node} was taken away; "),
        Some(Stop::Unready { why }) => format!("could not start: {why}; "),
        Some(Stop::Lost) => "lost; ".to_owned(),
        Some(Stop::Cancelled) => "cancelled; ".to_owned(),
        Some(Stop::Deleted) => "deleted; ".to_owned(),
    };
    match attempt.ended_ms {
        None => "has not ended".to_owned(),
        Some(ended_ms) => format!("ended after {}: {stop}{}", span_ms(ended_ms - attempt.begun_ms), exits.join(", ")),
    }
}

/// Shows who uses which GPU, how busy that is, and how far the job is.
pub fn top(ctx: &Context, client: &Client<'_>) -> anyhow::Result<()> {
    let top: Top = client.get("/v1/top")?;
    if ctx.json() {
        return ctx.print_json(&top);
    }
    let jobs: Vec<JobView> = client.get("/v1/jobs")?;
    let find = |key: &str| jobs.iter().find(|view| view.job.key().as_str() == key);
    let headers = ["NODE", "GPU", ">PART", ">BUSY", ">MEMORY", "JOB", ">RANK", "STATUS", ">RUNS FOR", "PROGRESS"];
    let mut table = Table::new(&headers);
    for view in &top.nodes {
        for one in &view.uses {
            let job = find(&one.job);
            let begun = job.and_then(|view| view.job.attempt()).map(|attempt| attempt.begun_ms);
            let (busy, memory) = if view.node.simulated { Default::default() } else { load(&one.gpus, &top.loads) };
            table.row([
                view.node.node.id.to_string(),
                one.gpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
                one.each.to_string(),
                busy,
                memory,
                one.job.clone(),
                one.rank.to_string(),
                job.map_or(String::new(), |view| view.status.clone()),
                begun.map_or(String::new(), |begun| span_ms(now_ms() - begun)),
                top.progress.get(&one.job).map(|text| output::printable(text.as_bytes())).unwrap_or_default(),
            ]);
        }
    }
    ctx.print_table(&table)
}

/// Gives how busy some GPUs are on the mean, and what of their memory is used, by whomever.
fn load(gpus: &[u32], loads: &[GpuLoad]) -> (String, String) {
    let these: Vec<&GpuLoad> = loads.iter().filter(|load| gpus.contains(&load.index)).collect();
    let Some(count) = u32::try_from(these.len()).ok().filter(|count| *count > 0) else {
        return Default::default();
    };
    let percent = these.iter().map(|load| load.percent).sum::<u32>() / count;
    let used: u64 = these.iter().map(|load| load.memory_used_bytes).sum();
    let all: u64 = these.iter().map(|load| load.memory_bytes).sum();
    (format!("{percent} %"), format!("{} of {}", output::bytes(used), output::bytes(all)))
}
