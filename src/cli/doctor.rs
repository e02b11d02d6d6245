//! `larder doctor`: finds out what does not work here and says how to mend it.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::Serialize;

use super::{Context, output};
use crate::config::TierSection;
use crate::store::catalog::lakefmt;
use crate::store::lake::{Lake, LakeError, PutIf, get_all};

mod local;

/// How much is written and read to see how fast the lake is.
const SPEED_BYTES: usize = 4 << 20;
/// How often the lake is asked to see how far away it is.
const ASKED: usize = 5;
/// How long the lake may take for all that is asked of it.
const LAKE_TIMEOUT: Duration = Duration::from_secs(20);
/// A store refuses signed requests when the clocks are 15 minutes apart.
const CLOCK_SKEW_MS_MAX: i64 = 60_000;

/// Flags of `larder doctor`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  larder doctor
  larder doctor --json

Exit status 1 if anything fails; a warning is none. Writes and removes a small object in the lake and a
small file in each tier.")]
pub struct Args {}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    Warn,
    Fail,
}

#[derive(Debug, Serialize)]
struct Finding {
    check: String,
    level: Level,
    detail: String,
    fix: Option<String>,
}

#[derive(Debug, Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, check: impl Into<String>, level: Level, detail: impl Into<String>, fix: Option<&str>) {
        let (check, detail) = (check.into(), detail.into());
        self.0.push(Finding { check, level, detail, fix: fix.map(str::to_owned) });
    }
}

/// Runs the command.
pub fn run(ctx: &Context, _args: Args) -> anyhow::Result<()> {
    let mut found = Findings::default();
    check_config(ctx, &mut found);
    check_state(ctx, &mut found);
    check_fuse(&mut found);
    check_kernel(&mut found);
    local::check(ctx, &mut found);
    ctx.block_on(async {
        if tokio::time::timeout(LAKE_TIMEOUT, check_lake(ctx, &mut found)).await.is_err() {
            let detail = format!("no answer within {} s", LAKE_TIMEOUT.as_secs());
            found.add("lake", Level::Fail, detail, Some("check LARDER_ENDPOINT, the network and the credentials"));
        }
        let line = super::daemon::line(&ctx.node_client_at_rest()).await;
        let level = if line.starts_with("cannot") { Level::Fail } else { Level::Ok };
        found.add("daemon", level, line, (level == Level::Fail).then_some("look into `larder daemon log`"));
    });
    for (name, section) in &ctx.config().tier {
        check_tier(ctx, name, section, &mut found);
    }
    let failed = found.0.iter().filter(|finding| finding.level == Level::Fail).count();
    if ctx.json() {
        ctx.print_json(&found.0)?;
    } else {
        print(ctx, &found.0)?;
    }
    anyhow::ensure!(failed == 0, "{failed} of {} checks failed", found.0.len());
    Ok(())
}

fn print(ctx: &Context, findings: &[Finding]) -> anyhow::Result<()> {
    let mut out = ctx.out();
    let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
    for finding in findings {
        let mark = match finding.level {
            Level::Ok => "ok  ",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        writeln!(out, "{mark}  {:width$}  {}", finding.check, finding.detail)?;
        if let Some(fix) = &finding.fix {
            writeln!(out, "      {:width$}  -> {fix}", "")?;
        }
    }
    Ok(out.finish()?)
}

fn check_config(ctx: &Context, found: &mut Findings) {
    let file = ctx.loaded().file.as_ref().map_or("no file".to_owned(), |file| file.display().to_string());
    found.add("configuration", Level::Ok, file, None);
}

fn check_state(ctx: &Context, found: &mut Findings) {
    let state = &ctx.config().state;
    let fix = "make it writable for you, or set LARDER_STATE";
    match ctx.place().and_then(|place| Ok(place.node_id()?)) {
        Ok(node) => found.add("state", Level::Ok, format!("{}, node {node}", state.display()), None),
        Err(error) => found.add("state", Level::Fail, format!("{error:#}"), Some(fix)),
    }
}

fn check_fuse(found: &mut Findings) {
    let root = nix::unistd::geteuid().is_root();
    match OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(_) => found.add("/dev/fuse", Level::Ok, "can be opened", None),
        Err(error) => {
            let fix = "modprobe fuse; in a container: --device /dev/fuse --cap-add SYS_ADMIN";
            found.add("/dev/fuse", Level::Fail, error.to_string(), Some(fix));
        }
    }
    let helper = std::env::var_os("PATH")
        .and_then(|path| std::env::split_paths(&path).map(|dir| dir.join("fusermount3")).find(|file| file.exists()));
    match helper {
        _ if root => found.add("fusermount3", Level::Ok, "not needed by root", None),
        None => found.add("fusermount3", Level::Fail, "not in PATH", Some("apt install fuse3")),
        Some(file) => {
            let setuid = fs::metadata(&file).is_ok_and(|meta| meta.mode() & 0o4000 != 0 && meta.uid() == 0);
            let (level, fix) = if setuid { (Level::Ok, None) } else { (Level::Fail, Some("chmod u+s it, as root")) };
            found.add(
                "fusermount3",
                level,
                format!("{}{}", file.display(), if setuid { "" } else { " is not setuid root" }),
                fix,
            );
        }
    }
    let allowed = fs::read_to_string("/etc/fuse.conf")
        .is_ok_and(|text| text.lines().any(|line| line.trim() == "user_allow_other"));
    if !root && !allowed {
        let fix = "add the line user_allow_other to /etc/fuse.conf if others are to read your mounts";
        found.add("allow_other", Level::Warn, "--allow-other needs root or user_allow_other", Some(fix));
    }
}

/// Says which row of the kernel table this machine is.
fn check_kernel(found: &mut Findings) {
    let release =
        nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default();
    let row = match version(&release) {
        Some(at) if at >= (6, 12) => "passthrough, request resend, file-backed EROFS",
        Some(at) if at >= (6, 9) => "passthrough and request resend; no file-backed EROFS (6.12)",
        Some(at) if at >= (5, 4) => "everything but passthrough and request resend (6.9) and file-backed EROFS (6.12)",
        _ => "too old or unknown",
    };
    let level = if row == "too old or unknown" { Level::Warn } else { Level::Ok };
    found.add("kernel", level, format!("{release}: {row}"), None);
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

async fn check_lake(ctx: &Context, found: &mut Findings) {
    let url = ctx.config().lake.url.clone();
    let lake = match ctx.lake().await {
        Ok(lake) => lake,
        Err(error) => {
            return found.add(
                "lake",
                Level::Fail,
                format!("{error:#}"),
                Some("check the [lake] section: `larder config show`"),
            );
        }
    };
    match lakefmt::read(lake.as_ref()).await {
        Ok(Some(format)) => {
            found.add(
                "lake",
                Level::Ok,
                format!("{url}: id {}, refs move by {:?}", format.lake_id, format.refs).to_lowercase(),
                None,
            );
        }
        Ok(None) => found.add(
            "lake",
            Level::Warn,
            format!("{url}: empty"),
            Some("`larder lake init` or the first push makes it a lake"),
        ),
        Err(error) => {
            let detail = format!("{:#}", anyhow::Error::new(error));
            let fix = "check LARDER_LAKE, LARDER_ENDPOINT, the network and the credentials";
            return found.add("lake", Level::Fail, detail, Some(fix));
        }
    }
    check_lake_writes(lake.as_ref(), found).await;
    check_lake_speed(lake.as_ref(), found).await;
}

/// Says how far away the lake is, and how fast one request to it is read.
async fn check_lake_speed(lake: &dyn Lake, found: &mut Findings) {
    match measure(lake).await {
        Ok((way, rate)) => {
            let detail =
                format!("{} ms until an answer, {} a second in one request", way.as_millis(), output::bytes(rate));
            found.add("lake speed", Level::Ok, detail, None);
        }
        Err(error) => {
            let detail = format!("not measured: {error}");
            found.add("lake speed", Level::Warn, detail, Some("a small object has to be written for that"));
        }
    }
}

async fn measure(lake: &dyn Lake) -> Result<(Duration, u64), LakeError> {
    let key = format!("tmp/doctor-{}", uuid::Uuid::new_v4().simple());
    lake.put(&key, Bytes::from(vec![7; SPEED_BYTES]), PutIf::Always).await?;
    let measured = async {
        let mut ways = Vec::with_capacity(ASKED);
        for _ in 0..ASKED {
            let begun = Instant::now();
            lake.head(&key).await?;
            ways.push(begun.elapsed());
        }
        ways.sort_unstable();
        let begun = Instant::now();
        let got = get_all(lake, &key, SPEED_BYTES as u64).await?;
        let rate = got.len() as f64 / begun.elapsed().as_secs_f64().max(1e-6);
        Ok((ways.get(ASKED / 2).copied().unwrap_or_default(), rate as u64))
    };
    let measured = measured.await;
    let deleted = lake.delete(&key).await;
    if let Err(error) = deleted {
        tracing::warn!(%error, key, "a small object stays in the lake");
    }
    measured
}

/// Writes, finds and removes a small object; its time shows how far the clocks are apart.
async fn check_lake_writes(lake: &dyn Lake, found: &mut Findings) {
    let key = format!("tmp/doctor-{}", uuid::Uuid::new_v4().simple());
    if let Err(error) = lake.put(&key, Bytes::from_static(b"doctor"), PutIf::Always).await {
        let detail = format!("cannot write: {:#}", anyhow::Error::new(error));
        return found.add("lake writes", Level::Warn, detail, Some("enough for reading; a push needs write access"));
    }
    let now_ms = jiff::Timestamp::now().as_millisecond();
    match lake.head(&key).await {
        Ok(meta) => {
            let skew_ms = (meta.modified_ms - now_ms).abs();
            found.add("lake writes", Level::Ok, "a small object was written and found", None);
            if skew_ms > CLOCK_SKEW_MS_MAX {
                let detail = format!("this clock and the store's are {} s apart", skew_ms / 1000);
                found.add("clock", Level::Fail, detail, Some("set the clock (NTP); requests are signed with the time"));
            } else {
                found.add("clock", Level::Ok, format!("within {} s of the store's", skew_ms / 1000 + 1), None);
            }
        }
        Err(error) => found.add(
            "lake writes",
            Level::Fail,
            format!("written, but not found: {error}"),
            Some("the store is not consistent"),
        ),
    }
    if let Err(error) = lake.delete(&key).await {
        found.add("lake deletes", Level::Warn, error.to_string(), Some("gc needs to delete"));
    }
}

fn check_tier(ctx: &Context, name: &str, section: &TierSection, found: &mut Findings) {
    let label = format!("tier {name}");
    if section.auto_init && !section.path.exists() {
        return found.add(label, Level::Ok, format!("{}: made on first use", section.path.display()), None);
    }
    let tier = match ctx.tier(Some(name)) {
        Ok((_, tier)) => tier,
        Err(error) => {
            let fix = format!("mount the export, or `larder tier init {}`", section.path.display());
            return found.add(label, Level::Fail, format!("{error:#}"), Some(&fix));
        }
    };
    match links(tier.dir()) {
        Ok(true) => found.add(
            label,
            Level::Ok,
            format!("{}: writable, hard links and exclusive files work", section.path.display()),
            None,
        ),
        Ok(false) => {
            let detail = format!("{}: a hard link does not count", section.path.display());
            found.add(label, Level::Fail, detail, Some("the file system must keep hard links"));
        }
        Err(error) => {
            let detail = format!("{}: {error}", section.path.display());
            found.add(label, Level::Fail, detail, Some("check the export's mode and owner, and whether it is full"));
        }
    }
}

/// Writes a file and a second name for it, as publishing does; makes one that is there already, as a claim is made.
fn links(dir: &Path) -> std::io::Result<bool> {
    let tmp = dir.join("tmp");
    let name = format!("doctor-{}", uuid::Uuid::new_v4().simple());
    let (one, two) = (tmp.join(&name), tmp.join(format!("{name}-link")));
    fs::write(&one, b"doctor")?;
    let linked = fs::hard_link(&one, &two).and_then(|()| fs::metadata(&two));
    let again = fs::hard_link(&one, &two);
    let exclusive = OpenOptions::new().write(true).create_new(true).open(&one);
    let _ = fs::remove_file(&two);
    fs::remove_file(&one)?;
    // A second link must not replace the first, and who comes second must not win.
    Ok(linked?.nlink() == 2 && again.is_err() && exclusive.is_err())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_are_read_by_their_first_two_numbers() {
        assert_eq!(version("6.18.44-fc-v657"), Some((6, 18)));
        assert_eq!(version("6.1.0-13-amd64"), Some((6, 1)));
        assert_eq!(version("strange"), None);
    }

    #[test]
    fn a_directory_with_hard_links_passes() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir(dir.path().join("tmp")).expect("makes it");
        assert!(links(dir.path()).expect("works"));
        assert!(links(&dir.path().join("gone")).is_err());
    }
}
