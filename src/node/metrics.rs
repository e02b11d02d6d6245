//! The names of all metrics, and their text for Prometheus.
//!
//! `docs/metrics.md` is generated from the table; a test compares. A name or unit that was released
//! does not change; a stable metric is removed only with a new major version.

use std::fmt::Write as _;

use crate::fs::session::MountStats;
use crate::store::fetch::FetchStats;
use crate::store::histogram::Times;
use crate::store::usage::TierUsage;

/// One metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metric {
    pub name: &'static str,
    pub kind: Kind,
    pub labels: &'static [&'static str],
    pub unit: &'static str,
    pub help: &'static str,
}

/// Whether a value only ever grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    /// Times in buckets.
    Histogram,
}

macro_rules! metrics {
    ($($id:ident = $name:literal, $kind:ident, [$($label:literal),*], $unit:literal, $help:literal;)*) => {
        $(pub const $id: Metric = Metric {
            name: $name, kind: Kind::$kind, labels: &[$($label),*], unit: $unit, help: $help,
        };)*
        /// All of them, in the order of the page.
        pub const ALL: &[Metric] = &[$($id),*];
    };
}

metrics! {
    UP_SECONDS = "larder_up_seconds", Gauge, [], "seconds", "Time since the daemon started";
    MOUNTS = "larder_mounts", Gauge, ["state"], "mounts", "Mounts by state: mounted, mounting, failed";
    TAKEN_OVER = "larder_mounts_taken_over_total", Counter, [], "mounts",
        "Mounts that this daemon took over from one that died or was replaced";
    LEASES = "larder_leases", Gauge, [], "leases", "Leases that this node has in tiers, one for each mount that a tier took one for";
    WITHOUT_LEASE = "larder_mounts_without_lease", Gauge, [], "mounts",
        "Mounts whose tier has not taken a lease: it may let the commit go, which is then read from the lake";
    EVICTIONS = "larder_tier_evictions_total", Counter, ["tier", "reason"], "commits",
        "Commits that this node, as the steward, let go: aged_out, room, uncached, leftover, other";
    MOUNT_ENGINE = "larder_mount_engine", Gauge, ["dir", "engine"], "mounts",
        "1 for what serves a mount now: fuse, or kernel (of which the other metrics of mounts know nothing)";
    FETCH_READ_BYTES = "larder_fetch_read_bytes_total", Counter, ["tier", "source"], "bytes",
        "Bytes served to readers, by where they came from: memory, tier, staging, peer, in_flight";
    FETCH_READS = "larder_fetch_reads_total", Counter, ["tier", "source"], "reads", "Reads served, by where the bytes came from";
    LAKE_BYTES = "larder_lake_bytes_total", Counter, ["tier", "lane"], "bytes",
        "Bytes asked from the lake, by lane: demand, prefetch, meta";
    LAKE_REQUESTS = "larder_lake_requests_total", Counter, ["tier", "lane"], "requests", "Requests to the lake, by lane";
    LAKE_SECONDS = "larder_lake_request_seconds", Histogram, ["kind"], "seconds",
        "How long the answers of the lake took to begin, by kind of request: get, head, put, delete, list, upload";
    LAKE_TROUBLE = "larder_lake_trouble", Gauge, [], "0 or 1", "1 while the last request to the lake was not answered";
    LAKE_THROTTLED = "larder_lake_throttled_total", Counter, [], "answers", "Answers of the lake that asked to be left alone for a time";
    LAKE_RENEWALS = "larder_lake_credential_renewals_total", Counter, [], "renewals",
        "How often credentials that the store did not take were asked for anew";
    LAKE_RETRIES = "larder_lake_retries_total", Counter, ["tier"], "requests", "Requests made again after a passing error";
    PEER_GIVEN_BYTES = "larder_peer_given_bytes_total", Counter, ["tier"], "bytes", "Bytes given to other nodes that waited for what this one brings";
    PEER_GIVEN = "larder_peer_given_total", Counter, ["tier"], "requests", "Requests of other nodes that were answered with bytes";
    CLAIMS = "larder_tier_claims_total", Counter, ["tier", "outcome"], "spans",
        "Spans that this node claimed (won), found claimed by another node (other), or lost to a node that took over (lost)";
    FETCH_DAMAGED = "larder_fetch_damaged_total", Counter, ["tier"], "fetches", "Fetched bytes that did not have their digest";
    FETCH_ERRORS = "larder_fetch_read_errors_total", Counter, ["tier"], "reads", "Reads that ended in an error";
    FETCH_HEALS = "larder_tier_heals_total", Counter, ["tier"], "objects", "Damaged objects of the tier that were set aside";
    FETCH_TIER_ERRORS = "larder_tier_errors_total", Counter, ["tier"], "errors", "Errors of the tier that readers did not see";
    FETCH_VERIFY_SECONDS = "larder_verify_seconds_total", Counter, ["tier"], "seconds", "Time spent digesting";
    FETCH_PUBLISHED = "larder_packs_published_total", Counter, ["tier"], "packs", "Packs published by this daemon";
    FETCH_PUBLISHED_BYTES = "larder_published_bytes_total", Counter, ["tier"], "bytes",
        "Bytes of the packs published by this daemon; of all nodes, lake bytes divided by these is what a byte cost the lake";
    FETCH_IN_FLIGHT = "larder_fetch_in_flight_bytes", Gauge, ["tier"], "bytes", "Bytes asked from the lake and not yet handed on";
    FETCH_MEMORY = "larder_fetch_memory_bytes", Gauge, ["tier"], "bytes", "Verified buffers in memory";
    FETCH_OPEN_FILES = "larder_tier_open_files", Gauge, ["tier"], "files", "Files of the tier held open";
    FETCH_PAUSED = "larder_fill_paused", Gauge, ["tier"], "0 or 1", "1 while filling pauses because the tier is full or fails";
    TIER_USED = "larder_tier_used_bytes", Gauge, ["tier"], "bytes", "Published objects that cached commits need";
    TIER_CAPACITY = "larder_tier_capacity_bytes", Gauge, ["tier"], "bytes", "What the tier may take";
    TIER_FREE = "larder_tier_free_bytes", Gauge, ["tier"], "bytes", "What may still be written";
    TIER_STAGING = "larder_tier_staging_bytes", Gauge, ["tier"], "bytes", "Bytes that have arrived of packs that are not complete";
    TIER_TRASH = "larder_tier_trash_bytes", Gauge, ["tier"], "bytes", "Removed objects that wait for the grace time";
    TIER_STALLED = "larder_tier_evictions_free_nothing", Gauge, ["tier"], "0 or 1",
        "1 while evictions for room are suspended because deleting freed nothing (server snapshots)";
    TIER_COMMITS = "larder_tier_commits", Gauge, ["tier"], "commits", "Cached commits";
    MOUNT_REQUESTS = "larder_mount_requests_total", Counter, ["dir"], "requests", "Requests of the kernel";
    MOUNT_WAITED = "larder_mount_waited_total", Counter, ["dir"], "requests", "Requests that waited for something to be fetched";
    MOUNT_WAIT_SECONDS = "larder_mount_wait_seconds", Histogram, ["dir"], "seconds",
        "How long the requests took that waited for something to be fetched; the others are answered at once";
    MOUNT_ERRORS = "larder_mount_errors_total", Counter, ["dir"], "requests", "Requests that were answered with EIO";
    MOUNT_READ_BYTES = "larder_mount_read_bytes_total", Counter, ["dir"], "bytes", "Bytes read through the daemon";
    MOUNT_BUSY_WORKERS = "larder_mount_busy_workers", Gauge, ["dir"], "threads", "Threads that are answering a request";
    MOUNT_WORKERS = "larder_mount_workers", Gauge, ["dir"], "threads", "Threads that answer requests";
    MOUNT_OPEN_FILES = "larder_mount_open_files", Gauge, ["dir"], "files", "Open files; 0 where the kernel opens them without telling";
    MOUNT_PASSTHROUGH = "larder_mount_passthrough_files", Gauge, ["dir"], "files", "Open files that the kernel reads itself";
    MOUNT_OPENS = "larder_mount_opens_total", Counter, ["dir", "reader"], "opens",
        "Opens of files, by who reads them: daemon, kernel; of what the kernel then reads nobody else knows how many bytes";
}

/// Collects values and renders them.
#[derive(Debug, Default)]
pub struct Page {
    values: Vec<(Metric, Vec<String>, Value)>,
}

#[derive(Debug)]
enum Value {
    Number(f64),
    Times(Times),
}

impl Page {
    /// Adds a value; `labels` in the order of the metric's.
    pub fn add(&mut self, metric: Metric, labels: &[&str], value: f64) {
        self.push(metric, labels, Value::Number(value));
    }

    /// Adds times; `labels` in the order of the metric's.
    pub fn times(&mut self, metric: Metric, labels: &[&str], times: Times) {
        self.push(metric, labels, Value::Times(times));
    }

    fn push(&mut self, metric: Metric, labels: &[&str], value: Value) {
        debug_assert_eq!(metric.labels.len(), labels.len(), "{}", metric.name);
        debug_assert_eq!(metric.kind == Kind::Histogram, matches!(value, Value::Times(_)), "{}", metric.name);
        self.values.push((metric, labels.iter().map(|label| (*label).to_owned()).collect(), value));
    }

    /// Renders all values, each metric's together below its help and type.
    pub fn render(&self) -> String {
        let mut text = String::new();
        for metric in ALL {
            let mut values = self.values.iter().filter(|(of, _, _)| of == metric).peekable();
            if values.peek().is_none() {
                continue;
            }
            let kind = kind_word(metric.kind);
            // Writing to a String cannot fail.
            let _ = writeln!(text, "# HELP {} {}\n# TYPE {} {kind}", metric.name, metric.help, metric.name);
            for (_, labels, value) in values {
                let pairs: Vec<String> = metric
                    .labels
                    .iter()
                    .zip(labels)
                    .map(|(name, value)| format!("{name}=\"{}\"", escape(value)))
                    .collect();
                render_value(&mut text, metric.name, &pairs, value);
            }
        }
        text
    }

    /// Adds the fetcher's counters.
    pub fn fetch(&mut self, tier: &str, stats: &FetchStats) {
        let reads = [
            ("memory", stats.memory),
            ("tier", stats.tier),
            ("staging", stats.staging),
            ("peer", stats.peer),
            ("in_flight", stats.in_flight),
        ];
        for (source, of) in reads {
            self.add(FETCH_READS, &[tier, source], of.requests as f64);
            self.add(FETCH_READ_BYTES, &[tier, source], of.bytes as f64);
        }
        let lanes = [("demand", stats.lake_demand), ("prefetch", stats.lake_prefetch), ("meta", stats.lake_meta)];
        for (lane, of) in lanes {
            self.add(LAKE_REQUESTS, &[tier, lane], of.requests as f64);
            self.add(LAKE_BYTES, &[tier, lane], of.bytes as f64);
        }
        let claims = [("won", stats.claims_won), ("other", stats.claims_other), ("lost", stats.claims_lost)];
        for (outcome, count) in claims {
            self.add(CLAIMS, &[tier, outcome], count as f64);
        }
        let paused = f64::from(u8::from(stats.filling_paused.is_some()));
        let plain = [
            (PEER_GIVEN_BYTES, stats.to_peers.bytes as f64),
            (PEER_GIVEN, stats.to_peers.requests as f64),
            (LAKE_RETRIES, stats.retries as f64),
            (FETCH_DAMAGED, stats.damaged_fetches as f64),
            (FETCH_ERRORS, stats.read_errors as f64),
            (FETCH_HEALS, stats.heals as f64),
            (FETCH_TIER_ERRORS, stats.tier_errors as f64),
            (FETCH_VERIFY_SECONDS, stats.verify_us as f64 / 1e6),
            (FETCH_PUBLISHED, stats.packs_published as f64),
            (FETCH_PUBLISHED_BYTES, stats.bytes_published as f64),
            (FETCH_IN_FLIGHT, stats.in_flight_bytes as f64),
            (FETCH_MEMORY, stats.memory_bytes as f64),
            (FETCH_OPEN_FILES, stats.open_files as f64),
            (FETCH_PAUSED, paused),
        ];
        for (metric, value) in plain {
            self.add(metric, &[tier], value);
        }
    }

    /// Adds what a tier holds.
    pub fn tier(&mut self, tier: &str, usage: &TierUsage) {
        let plain = [
            (TIER_USED, usage.used_bytes),
            (TIER_CAPACITY, usage.capacity_bytes),
            (TIER_FREE, usage.free_bytes),
            (TIER_STAGING, usage.staging_bytes),
            (TIER_TRASH, usage.trash_bytes),
            (TIER_STALLED, u64::from(usage.evictions_free_nothing)),
            (TIER_COMMITS, usage.commits.len() as u64),
        ];
        for (metric, value) in plain {
            self.add(metric, &[tier], value as f64);
        }
    }

    /// Adds a mount's counters.
    pub fn mount(&mut self, dir: &str, stats: &MountStats) {
        let plain = [
            (MOUNT_REQUESTS, stats.requests),
            (MOUNT_WAITED, stats.waited),
            (MOUNT_ERRORS, stats.errors),
            (MOUNT_READ_BYTES, stats.read_bytes),
            (MOUNT_BUSY_WORKERS, stats.busy_workers),
            (MOUNT_WORKERS, stats.workers),
            (MOUNT_OPEN_FILES, stats.open_files),
            (MOUNT_PASSTHROUGH, stats.passthrough_files),
        ];
        for (metric, value) in plain {
            self.add(metric, &[dir], value as f64);
        }
        for (reader, opens) in [("daemon", stats.cached_opens), ("kernel", stats.passthrough_opens)] {
            self.add(MOUNT_OPENS, &[dir, reader], opens as f64);
        }
    }
}

fn kind_word(kind: Kind) -> &'static str {
    match kind {
        Kind::Counter => "counter",
        Kind::Gauge => "gauge",
        Kind::Histogram => "histogram",
    }
}

fn render_value(text: &mut String, name: &str, pairs: &[String], value: &Value) {
    let labels = |more: Option<String>| {
        let all: Vec<String> = pairs.iter().cloned().chain(more).collect();
        if all.is_empty() { String::new() } else { format!("{{{}}}", all.join(",")) }
    };
    let plain = labels(None);
    // Writing to a String cannot fail.
    let _ = match value {
        Value::Number(value) => writeln!(text, "{name}{plain} {value}"),
        Value::Times(times) => {
            for (bound, count) in &times.buckets {
                let _ = writeln!(text, "{name}_bucket{} {count}", labels(Some(format!("le=\"{bound}\""))));
            }
            let _ = writeln!(text, "{name}_bucket{} {}", labels(Some("le=\"+Inf\"".to_owned())), times.count);
            let _ = writeln!(text, "{name}_sum{plain} {}", times.sum_seconds);
            writeln!(text, "{name}_count{plain} {}", times.count)
        }
    };
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Renders `docs/metrics.md`.
pub fn markdown() -> String {
    let mut text = String::from(
        "# Metrics\n\nGenerated from `src/node/metrics.rs`; do not edit.\n\nThe daemon gives them as Prometheus text: \
         `GET /metrics` on its socket, or `larder daemon metrics`.\nAll are stable: a name, a unit or a label does not \
         change without a new major version. Counters begin at 0 when\nthe daemon starts. `tier` is the tier's name in the \
         configuration, `dir` the directory of a mount.\n\n| metric | kind | labels | unit | meaning |\n| --- | --- | --- | --- | --- |\n",
    );
    for metric in ALL {
        let kind = kind_word(metric.kind);
        let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        let _ = writeln!(
            text,
            "| `{}` | {kind} | {} | {} | {} |",
            metric.name,
            labels.join(", "),
            metric.unit,
            metric.help
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_groups_values_and_escapes_labels() {
        let mut page = Page::default();
        page.add(MOUNTS, &["failed"], 0.0);
        page.add(UP_SECONDS, &[], 1.5);
        page.add(MOUNTS, &["a\"b\n"], 2.0);
        let text = page.render();
        assert!(text.contains("larder_up_seconds 1.5\n"), "{text}");
        assert!(text.contains("larder_mounts{state=\"failed\"} 0\nlarder_mounts{state=\"a\\\"b\\n\"} 2\n"), "{text}");
        assert_eq!(text.matches("# TYPE larder_mounts gauge").count(), 1);
    }

    #[test]
    fn names_follow_the_conventions() {
        for metric in ALL {
            assert_eq!(metric.kind == Kind::Counter, metric.name.ends_with("_total"), "{}", metric.name);
            assert!(metric.name.starts_with("larder_"), "{}", metric.name);
        }
    }

    #[test]
    fn the_page_of_the_documentation_is_up_to_date() {
        let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md");
        if std::env::var_os("LARDER_BLESS").is_some() {
            std::fs::write(&file, markdown()).expect("writes the page");
        }
        let have = std::fs::read_to_string(&file).unwrap_or_default();
        assert!(have == markdown(), "docs/metrics.md is stale; run this test with LARDER_BLESS=1");
    }
}
