//! `larder daemon upgrade`: another program takes over from the daemon that runs.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::cli::Context;
use crate::cli::mount::with_hint;
use crate::cli::report::{HintExt as _, usage};
use crate::node::api::{NodeInfo, UpgradeRequest};
use crate::node::daemon::own_exe;
use crate::node::place::Place;

/// How often it is looked whether the other daemon answers.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Runs the command.
pub(super) fn run(ctx: &Context, program: Option<PathBuf>) -> anyhow::Result<()> {
    ctx.only_here("`daemon upgrade`")?;
    let program = match program {
        Some(named) => std::fs::canonicalize(&named).with_context(|| format!("cannot find {}", named.display()))?,
        None => own_exe(),
    };
    let client = ctx.node_client_at_rest();
    let before = ctx.block_on(client.info()).hint("`larder daemon` starts one")?;
    check_same_place(ctx, &before)?;
    let args = ctx.daemon_args();
    let handover = ask(&program, &args)?;
    let has_mounts = !ctx.block_on(client.mounts()).map_err(with_hint)?.is_empty();
    if has_mounts {
        let request = UpgradeRequest { program: program.clone(), args, handover };
        ctx.block_on(client.upgrade(&request)).map_err(with_hint)?;
    } else {
        // Nobody would notice: it is started as a command starts one.
        super::stop(ctx)?;
        let started = Command::new(&program).arg("daemon").args(args.get(3..).unwrap_or_default()).output();
        started.with_context(|| format!("cannot start {}", program.display()))?;
    }
    let timeout = ctx.config().daemon.start_timeout.0 * 4;
    let begun = Instant::now();
    loop {
        match ctx.block_on(client.info()) {
            Ok(now) if now.pid != before.pid && now.program == program && now.ready => {
                if ctx.json() {
                    return ctx.print_json(&now);
                }
                let from = format!("{} (pid {})", before.version, before.pid);
                ctx.say(format!("the daemon is {} (pid {}) now, it was {from}", now.version, now.pid));
                return Ok(());
            }
            Ok(now) if now.pid != before.pid && now.program != program => {
                let text = format!("{} did not come up; {} serves again", program.display(), now.program.display());
                return Err(anyhow::anyhow!(text)).hint("`larder daemon log` says why");
            }
            _ if begun.elapsed() > timeout => {
                let tail = Place::at(&ctx.config().state).log_tail(0, 10);
                anyhow::bail!("no daemon is ready after {} s; the end of its log:\n{tail}", timeout.as_secs());
            }
            _ => std::thread::sleep(LOOK_INTERVAL),
        }
    }
}

/// What takes over has the configuration of this command: it would look for the mounts in its state directory.
fn check_same_place(ctx: &Context, daemon: &NodeInfo) -> anyhow::Result<()> {
    let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let own = &ctx.config().state;
    if real(own) != real(&daemon.state) {
        let (theirs, own) = (daemon.state.display(), own.display());
        let text = format!("the daemon (pid {}) has its state in {theirs}, this command means {own}", daemon.pid);
        return usage(text).hint("give this command the configuration that the daemon has");
    }
    ctx.check_same_lake(daemon)
}

/// Asks a program whether it can take over, with the configuration that it would have.
fn ask(program: &Path, args: &[String]) -> anyhow::Result<u32> {
    // Behind `daemon run --detached` come the flags of the configuration.
    let flags = args.get(3..).unwrap_or_default();
    let asked = Command::new(program).args(["daemon", "handover"]).args(flags).output();
    let output = asked.with_context(|| format!("{} cannot be run; the daemon stays", program.display()))?;
    let said = String::from_utf8_lossy(&output.stdout).trim().parse().ok().filter(|_| output.status.success());
    said.with_context(|| {
        let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        format!("{} cannot take over; the daemon stays: {why}", program.display())
    })
}
