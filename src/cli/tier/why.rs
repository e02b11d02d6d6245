//! `larder tier why`: what protects a commit, what a sweep would do now, and what was decided last.

use std::fmt::Write as _;
use std::io::Write as _;

use crate::cli::Context;
use crate::cli::output;
use crate::cli::report::usage;
use crate::format::refs::Revision;
use crate::store::tier::{CommitKey, Decision, LeaseInfo, Purpose, Tier, Verdict, Why};

/// Runs the command.
pub(super) fn run(ctx: &Context, wanted: &str, tier: Option<&str>) -> anyhow::Result<()> {
    let (name, tier) = ctx.tier(tier)?;
    let key = find(ctx, &name, &tier, wanted)?;
    let why: Why = tier.why(&key)?;
    if ctx.json() {
        return ctx.print_json(&why);
    }
    let mut out = ctx.out();
    out.write_all(told(&key, &why).as_bytes())?;
    Ok(out.finish()?)
}

/// Finds a commit by the beginning of its id, which needs no lake, or by a revision.
pub(super) fn find(ctx: &Context, name: &str, tier: &Tier, wanted: &str) -> anyhow::Result<CommitKey> {
    let prefix = wanted.rsplit_once('@').map_or(wanted, |(_, id)| id);
    let is_prefix = prefix.len() >= 4 && prefix.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if is_prefix {
        let keys = tier.find_commits(prefix)?;
        match keys.as_slice() {
            [key] => return Ok(*key),
            [] => {}
            _ => anyhow::bail!("tier {name}: {} commits begin with {prefix}; give more of the id", keys.len()),
        }
    }
    let Ok(revision) = Revision::parse(wanted) else {
        return usage(format!("`{wanted}` is neither a revision nor the beginning of a commit's id"));
    };
    let found = ctx.block_on(async {
        let catalog = ctx.catalog().await?;
        let commit = catalog.resolve(&revision).await?;
        Ok::<_, anyhow::Error>(CommitKey { lake: catalog.lake_id, commit })
    });
    match found {
        Ok(key) => Ok(key),
        // A name of hex digits that the lake does not know was meant as an id.
        Err(_) if is_prefix => {
            anyhow::bail!("tier {name}: no commit {prefix}\u{2026} is cached, nor was one decided about")
        }
        Err(error) => Err(error),
    }
}

fn told(key: &CommitKey, why: &Why) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "commit: {}", key.commit);
    for record in &why.records {
        let (packs, here) = (record.packs, record.packs_cached);
        let size = output::bytes(record.bytes);
        let _ = writeln!(text, "record: {}, {size}, {here} of {packs} packs are here", record.dataset);
    }
    for lease in &why.leases {
        let _ = writeln!(text, "lease: {}", lease_text(lease));
    }
    for hold in &why.holds {
        let _ = writeln!(text, "hold: mount {} of node {}, {} packs", hold.mount, hold.node, hold.packs);
    }
    if why.kept {
        text.push_str("kept: `larder cache --no-keep` ends it\n");
    }
    if let Some(ttl_ms) = why.ttl_ms {
        let left = match why.expires_in_ms {
            Some(left) if left > 0 => format!("{} left", span(left)),
            Some(_) => "passed".to_owned(),
            None => "does not count now".to_owned(),
        };
        let _ = writeln!(text, "time to live: {}, {left}", span(i64::try_from(ttl_ms).unwrap_or(i64::MAX)));
    }
    decision(&mut text, "now", why.now.as_ref(), "not cached");
    decision(&mut text, "last decision", why.last.as_ref(), "none was made yet");
    text
}

fn lease_text(lease: &LeaseInfo) -> String {
    let node = lease.node.map_or_else(|| "unknown".to_owned(), |node| node.to_string());
    let host = lease.host.as_deref().unwrap_or("unknown host");
    let what = match lease.purpose {
        Purpose::Mount => "mount",
        Purpose::Fill => "fill",
    };
    let state = match (lease.live, lease.ended) {
        (true, false) => "",
        (true, true) => "; its process has ended, the next daemon of that node removes it",
        (false, _) => "; does not count any more",
    };
    format!("{what} of node {node} ({host}), renewed {} ago{state}", span(lease.age_ms))
}

fn decision(text: &mut String, head: &str, found: Option<&Decision>, none: &str) {
    let _ = match found {
        Some(found) => {
            let verdict = if found.verdict == Verdict::Stays { "stays" } else { "leaves" };
            let at = output::time(found.time_ms);
            writeln!(text, "{head}: {} {verdict}: {} ({at})", found.dataset, found.reason.text())
        }
        None => writeln!(text, "{head}: {none}"),
    };
}

fn span(ms: i64) -> String {
    output::span(u64::try_from(ms / 1000).unwrap_or(0))
}
