//! The command line: one file per subcommand, configuration merged once.
//!
//! * [`context`]: what every command gets: configuration, runtime, lake, catalog, tier, daemon.
//! * [`output`]: tables, JSON, progress bars, sizes and times for people.
//! * [`report`]: how an error is told, and which exit status it has.
//! * one module per subcommand, each with `Args` and `run`.
//!
//! Invariants: data goes to stdout, messages to stderr; exit status 0, 1 (failed) or 2 (usage or
//! configuration); no question is ever asked. Commands stay thin: the work is in the library.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config::{self, Overrides};

pub mod branch;
pub mod cache;
pub mod cat;
pub mod completions;
pub mod config_cmd;
pub mod context;
pub mod csi;
pub mod daemon;
pub mod datasets;
pub mod diff;
pub mod doctor;
pub mod gc;
pub mod get;
pub mod grant;
pub mod import;
pub mod job;
pub mod keeper;
pub mod lake;
pub mod log;
pub mod ls;
pub mod man;
pub mod mount;
pub mod mounts;
pub mod node;
pub mod output;
pub mod project;
pub mod push;
pub mod report;
pub mod rm;
pub mod scheduler;
pub mod show;
pub mod status;
pub mod supervise;
pub mod tag;
pub mod tier;
pub mod top;
pub mod umount;
pub mod uncache;

pub use context::Context;

/// Versions of datasets: pushed to an object store, mounted next to the GPUs.
///
/// A dataset is a name with a history of commits. REV is `name`, `name@tag`, `name@branch` or
/// `name@id-prefix`.
#[derive(Debug, Parser)]
#[command(name = "larder", version, max_term_width = 100, subcommand_required = true, arg_required_else_help = true)]
#[command(after_help = "Examples:
  larder push ./photos photos -m 'first version'
  larder mount photos /data/photos
  larder status
Every command has examples of its own: larder COMMAND --help")]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Flags that every command takes.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Global {
    /// Reads this configuration file instead of the usual one
    #[arg(long, global = true, value_name = "FILE", env = "LARDER_CONFIG", hide_env = true)]
    pub config: Option<std::path::PathBuf>,
    /// Prints JSON with stable keys instead of text
    #[arg(long, global = true)]
    pub json: bool,
    /// Says more on stderr (twice: debug)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Says nothing on stderr but errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Stores a directory as a new commit of a dataset
    Push(push::Args),
    /// Makes a commit over objects that already lie in the object store
    Import(import::Args),
    /// Copies files of a commit out
    Get(get::Args),
    /// Prints files of a commit
    Cat(cat::Args),
    /// Lists files of a commit
    Ls(ls::Args),
    /// Shows the history of a dataset
    Log(log::Args),
    /// Shows a commit
    Show(show::Args),
    /// Shows what differs between two commits
    Diff(diff::Args),
    /// Lists, makes and removes tags
    Tag(tag::Args),
    /// Lists, moves and removes branches
    Branch(branch::Args),
    /// Removes a tag, a branch or a whole dataset
    Rm(rm::Args),
    /// Removes what no commit needs from the lake
    Gc(gc::Args),
    /// Lists and changes who may do what with a dataset
    Grant(grant::Args),
    /// Lists the datasets
    Datasets(datasets::Args),
    /// Mounts a commit as a read-only directory
    Mount(mount::Args),
    /// Unmounts a directory
    Umount(umount::Args),
    /// Lists the mounts
    Mounts(mounts::Args),
    /// Brings a commit into the cache
    Cache(cache::Args),
    /// Removes a commit from the cache now
    Uncache(uncache::Args),
    /// Shows what is cached, mounted and kept, and whether all is well
    Status(status::Args),
    /// Shows what each mount does, live
    Top(top::Args),
    /// Finds out what does not work here and says how to mend it
    Doctor(doctor::Args),
    /// Checks and shows the configuration
    Config(config_cmd::Args),
    /// Works on tiers (cache directories)
    Tier(tier::Args),
    /// Works on the lake (the object store)
    Lake(lake::Args),
    /// Runs, stops and asks the daemon that serves the mounts
    Daemon(daemon::Args),
    /// Submits a job: short for `job submit`
    Submit(Box<job::SubmitArgs>),
    /// Submits, shows and ends jobs
    Job(job::Args),
    /// Makes, shows and changes projects: who may use how many GPUs
    Project(project::Args),
    /// Adds, shows and changes nodes: where GPUs are
    Node(node::Args),
    /// Shares GPUs among projects: runs the scheduler, or simulates it
    Scheduler(scheduler::Args),
    /// Gives commits to the pods of Kubernetes as volumes
    Csi(csi::Args),
    /// Prints a shell's completions
    Completions(completions::Args),
    /// Writes the manual pages into a directory
    Man(man::Args),
    /// Holds mounts for a daemon (started by it)
    #[command(hide = true)]
    Keeper(keeper::Args),
    /// Runs one command of a job (started by the scheduler)
    #[command(hide = true)]
    Supervise(supervise::Args),
}

impl Command {
    /// Says whether the command needs a valid configuration before it starts.
    fn needs_config(&self) -> bool {
        match self {
            Self::Scheduler(args) => args.needs_config(),
            Self::Config(_) | Self::Completions(_) | Self::Man(_) | Self::Keeper(_) | Self::Supervise(_) => false,
            _ => true,
        }
    }

    /// Says whether the command goes on in the background, and logs as its configuration says.
    fn is_service(&self) -> bool {
        match self {
            Self::Scheduler(args) => args.is_service(),
            Self::Daemon(_) | Self::Keeper(_) | Self::Csi(_) => true,
            _ => false,
        }
    }

    fn run(self, ctx: &Context) -> anyhow::Result<()> {
        match self {
            Self::Push(args) => push::run(ctx, args),
            Self::Import(args) => import::run(ctx, args),
            Self::Get(args) => get::run(ctx, args),
            Self::Cat(args) => cat::run(ctx, args),
            Self::Ls(args) => ls::run(ctx, args),
            Self::Log(args) => log::run(ctx, args),
            Self::Show(args) => show::run(ctx, args),
            Self::Diff(args) => diff::run(ctx, args),
            Self::Tag(args) => tag::run(ctx, args),
            Self::Branch(args) => branch::run(ctx, args),
            Self::Rm(args) => rm::run(ctx, args),
            Self::Gc(args) => gc::run(ctx, args),
            Self::Grant(args) => grant::run(ctx, args),
            Self::Datasets(args) => datasets::run(ctx, args),
            Self::Mount(args) => mount::run(ctx, args),
            Self::Umount(args) => umount::run(ctx, args),
            Self::Mounts(args) => mounts::run(ctx, args),
            Self::Cache(args) => cache::run(ctx, args),
            Self::Uncache(args) => uncache::run(ctx, args),
            Self::Status(args) => status::run(ctx, args),
            Self::Top(args) => top::run(ctx, args),
            Self::Doctor(args) => doctor::run(ctx, args),
            Self::Config(args) => config_cmd::run(ctx, args),
            Self::Tier(args) => tier::run(ctx, args),
            Self::Lake(args) => lake::run(ctx, args),
            Self::Daemon(args) => daemon::run(ctx, args),
            Self::Submit(args) => job::run_submit(ctx, *args),
            Self::Job(args) => job::run(ctx, args),
            Self::Project(args) => project::run(ctx, args),
            Self::Node(args) => node::run(ctx, args),
            Self::Scheduler(args) => scheduler::run(ctx, args),
            Self::Csi(args) => csi::run(ctx, args),
            Self::Completions(args) => completions::run(ctx, args),
            Self::Man(args) => man::run(ctx, args),
            Self::Keeper(args) => keeper::run(ctx, args),
            Self::Supervise(args) => supervise::run(ctx, &args),
        }
    }
}

/// Gives the clap command: derived, plus one hidden global flag for each scalar configuration key.
pub fn command() -> clap::Command {
    let mut command = Cli::command();
    for key in config::KEYS {
        command = command.arg(
            clap::Arg::new(key.name)
                .long(key.flag)
                .value_name(key.kind.value_name())
                .help(key.doc)
                .global(true)
                .hide(true)
                .allow_hyphen_values(true),
        );
    }
    with_set(command, false).after_long_help(config::flags_help())
}

/// Adds `--set` to a command and those below it. It is no global flag: of those only the last place on
/// the line counts where a flag is given several times.
fn with_set(command: clap::Command, hidden: bool) -> clap::Command {
    let set = clap::Arg::new(SET)
        .long(SET)
        .value_name("KEY=VALUE")
        .help(
            "Sets any key of the configuration by its dotted name, such as tier.fast.ttl=3d or dataset.xray.tier=fast",
        )
        .action(clap::ArgAction::Append)
        .hide(hidden)
        .value_parser(set_pair);
    command.arg(set).mut_subcommands(|below| with_set(below, true))
}

/// The flag, and the id, of what sets any key.
const SET: &str = "set";

fn set_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.contains('*') => Ok((name.trim().to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE, such as tier.fast.ttl=3d".to_owned()),
    }
}

/// Runs the command line.
pub fn main() -> ExitCode {
    tell_name();
    keep_secrets_in();
    if let Some(ended) = keeper::run_if_asked() {
        return ended;
    }
    report::quiet_on_closed_stdout();
    let matches = match command().try_get_matches_from(spelled_out(std::env::args_os().collect())) {
        Ok(matches) => matches,
        Err(error) => return report::clap_exit(&error),
    };
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(error) => return report::clap_exit(&error),
    };
    report::exit(run(cli, overrides(&matches)))
}

/// A daemon that was started on demand, perhaps by a job, says what it is where everybody can read it: it does not
/// end with the job. Before its environment is closed to others.
fn tell_name() {
    use crate::scheduler::family::{APART, APART_NAMES};
    if std::env::var_os(APART).is_none() {
        return;
    }
    let command = std::env::args_os().nth(1).unwrap_or_default();
    let name = APART_NAMES.into_iter().find(|name| name.strip_prefix("larder-").is_some_and(|name| command == name));
    if let Some(name) = name.and_then(|name| std::ffi::CString::new(name).ok()) {
        // Without it, it ends with the job that happened to start it.
        let _ = nix::sys::prctl::set_name(&name);
    }
}

/// Credentials of the lake are in this process's memory and environment: no core dump of it is written, and no other
/// process of the same user reads them from /proc. Not so for processes that hold none, and that their own user
/// looks after through /proc.
fn keep_secrets_in() {
    let looked_after = ["supervise", "scheduler"].map(std::ffi::OsStr::new);
    let command = std::env::args_os().nth(1).unwrap_or_default();
    if !looked_after.contains(&command.as_os_str())
        && let Err(error) = nix::sys::prctl::set_dumpable(false)
    {
        eprintln!("warning: a core dump of this process could show credentials: {error}");
    }
}

/// Spells out `-v HOST:PATH` of `submit`, which people know from other tools: everywhere else `-v` says more, and so
/// it does there where no path follows.
fn spelled_out(mut args: Vec<OsString>) -> Vec<OsString> {
    let end = args.iter().position(|arg| arg == "--").unwrap_or(args.len());
    if !args.iter().take(end).any(|arg| arg == "submit") {
        return args;
    }
    let is_pair = |pair: &[OsString]| match pair {
        [flag, value] => flag == "-v" && value.to_string_lossy().contains(":/"),
        _ => false,
    };
    let flags: Vec<usize> =
        args.windows(2).enumerate().take(end).filter(|(_, pair)| is_pair(pair)).map(|(at, _)| at).collect();
    for at in flags {
        if let Some(flag) = args.get_mut(at) {
            *flag = "--host-path".into();
        }
    }
    args
}

/// Collects the configuration flags that were given, wherever on the line they stand.
fn overrides(matches: &clap::ArgMatches) -> Overrides {
    let (mut found, mut set) = (Overrides::new(), Overrides::new());
    let mut level = Some(matches);
    while let Some(at) = level {
        for key in config::KEYS {
            if let Ok(Some(value)) = at.try_get_one::<String>(key.name) {
                found.insert(key.name.to_owned(), value.clone());
            }
        }
        if let Ok(Some(pairs)) = at.try_get_many::<(String, String)>(SET) {
            set.extend(pairs.cloned());
        }
        level = at.subcommand().map(|(_, below)| below);
    }
    set.extend(found);
    set
}

fn run(cli: Cli, overrides: Overrides) -> anyhow::Result<()> {
    let ctx = Context::new(cli.global, overrides);
    if cli.command.needs_config() {
        ctx.load_config()?;
    }
    ctx.init_logging(cli.command.is_service());
    cli.command.run(&ctx)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn a_path_behind_v_is_a_path_of_the_machine_and_only_for_submit() {
        let spell = |line: &str| {
            let args = spelled_out(line.split(' ').map(OsString::from).collect());
            args.join(std::ffi::OsStr::new(" ")).into_string().expect("is text")
        };
        assert_eq!(
            spell("larder submit x -v /a:/b -v /c:/d -- -v"),
            "larder submit x --host-path /a:/b --host-path /c:/d -- -v"
        );
        for same in ["larder submit x -v -- sh -v /a:/b", "larder mounts -v /a:/b", "larder job submit x -v"] {
            assert_eq!(spell(same), same);
        }
    }

    #[test]
    fn a_configuration_flag_is_found_behind_the_subcommand() {
        let matches = command().try_get_matches_from(["larder", "mounts", "--lake", "s3://b/p"]).expect("parses");
        assert_eq!(overrides(&matches).get("lake.url").map(String::as_str), Some("s3://b/p"));
    }

    #[test]
    fn any_key_is_set_by_its_name_and_a_keys_own_flag_wins() {
        let line = ["larder", "--set", "tier.fast.ttl=3d", "mounts", "--lake", "s3://b/p", "--set", "lake.url=/x"];
        let matches = command().try_get_matches_from(line).expect("parses");
        let found = overrides(&matches);
        assert_eq!(found.get("lake.url").map(String::as_str), Some("s3://b/p"));
        assert_eq!(found.get("tier.fast.ttl").map(String::as_str), Some("3d"));
        assert!(command().try_get_matches_from(["larder", "mounts", "--set", "tier.fast.ttl"]).is_err());
    }

    #[test]
    fn every_command_shows_examples() {
        fn walk(command: &clap::Command, path: &str, missing: &mut Vec<String>) {
            let path = format!("{path} {}", command.get_name());
            let help = command.get_after_help().or(command.get_after_long_help()).map(ToString::to_string);
            let leaf = !command.has_subcommands();
            if leaf && !command.is_hide_set() && !help.is_some_and(|h| h.contains("Example")) {
                missing.push(path.clone());
            }
            for below in command.get_subcommands().filter(|c| c.get_name() != "help") {
                walk(below, &path, missing);
            }
        }
        let mut missing = Vec::new();
        walk(&command(), "", &mut missing);
        assert!(missing.is_empty(), "commands without examples: {missing:?}");
    }
}
