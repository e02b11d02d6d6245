//! What every command gets: configuration, runtime, lake, catalog, tier, daemon.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use anyhow::Context as _;
use indicatif::ProgressBar;
use serde::Serialize;

use super::Global;
use super::output::{self, Out, Table};
use super::report::{HintExt as _, usage};
use crate::config::{self, Config, Env, Loaded, Overrides, TierSection};
use crate::node::api::NodeInfo;
use crate::node::client::NodeClient;
use crate::node::place::Place;
use crate::node::spawn::{self, SpawnSpec};
use crate::node::{daemon, open};
use crate::store::catalog::Catalog;
use crate::store::fetch::Fetcher;
use crate::store::kv::Kv;
use crate::store::lake::Lake;
use crate::store::tier::Tier;

/// A command's surroundings; everything expensive is made on first use.
#[derive(Debug)]
pub struct Context {
    global: Global,
    overrides: Overrides,
    loaded: OnceLock<Loaded>,
    runtime: OnceLock<tokio::runtime::Runtime>,
}

impl Context {
    pub(super) fn new(global: Global, overrides: Overrides) -> Self {
        Self { global, overrides, loaded: OnceLock::new(), runtime: OnceLock::new() }
    }

    /// Loads the configuration (once); commands that need it find it loaded.
    pub(super) fn load_config(&self) -> Result<&Loaded, config::ConfigError> {
        if let Some(loaded) = self.loaded.get() {
            return Ok(loaded);
        }
        let loaded = config::load(self.global.config.as_deref(), &Env::of_process(), &self.overrides)?;
        Ok(self.loaded.get_or_init(|| loaded))
    }

    /// Gives the configuration with the origin of each value.
    pub fn loaded(&self) -> &Loaded {
        self.loaded.get().expect("main loads the configuration before a command that needs it")
    }

    /// Gives the configuration.
    pub fn config(&self) -> &Config {
        &self.loaded().config
    }

    /// Gives the configuration file that was named with `--config` or `LARDER_CONFIG`.
    pub fn config_file(&self) -> Option<&PathBuf> {
        self.global.config.as_ref()
    }

    /// Gives the configuration file that was named, or is found where none is.
    pub fn config_file_looked_at(&self) -> Option<PathBuf> {
        let found = || config::load::usual_places(&Env::of_process()).into_iter().find(|path| path.exists());
        self.global.config.clone().or_else(found)
    }

    /// Gives the configuration flags of this command line, to hand them to a daemon.
    pub fn overrides(&self) -> &Overrides {
        &self.overrides
    }

    /// Says whether `--json` was given.
    pub fn json(&self) -> bool {
        self.global.json
    }

    /// Says whether `--quiet` was given.
    pub fn quiet(&self) -> bool {
        self.global.quiet
    }

    /// Gives the runtime, made on first use.
    pub fn rt(&self) -> &tokio::runtime::Runtime {
        self.runtime.get_or_init(|| {
            tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .thread_name("larder")
                .build()
                .expect("the runtime's threads start")
        })
    }

    /// Runs a future to its end on the runtime.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.rt().block_on(future)
    }

    /// Gives stdout, buffered; end with `finish()`.
    pub fn out(&self) -> Out {
        Out::new()
    }

    /// Prints one JSON document.
    pub fn print_json(&self, value: &impl Serialize) -> anyhow::Result<()> {
        let mut out = self.out();
        let text = serde_json::to_string_pretty(value).context("cannot make JSON of the result")?;
        writeln!(out, "{text}")?;
        Ok(out.finish()?)
    }

    /// Prints a table.
    pub fn print_table(&self, table: &Table) -> anyhow::Result<()> {
        let mut out = self.out();
        out.write_all(table.render().as_bytes())?;
        Ok(out.finish()?)
    }

    /// Says something on stderr, unless `--quiet`.
    pub fn say(&self, message: impl std::fmt::Display) {
        if !self.global.quiet {
            // Nothing can be done where stderr is gone.
            let _ = writeln!(io::stderr(), "{message}");
        }
    }

    /// Makes a progress bar over bytes, hidden without a terminal, with `--quiet` and with `--json`.
    pub fn progress(&self, len: u64) -> ProgressBar {
        output::progress(len, self.global.quiet || self.global.json)
    }

    /// Makes a progress line without a known end, hidden likewise.
    pub fn spinner(&self) -> ProgressBar {
        output::spinner(self.global.quiet || self.global.json)
    }

    /// Gives a tier's name and section: the default one's where none is named.
    pub fn tier_section(&self, name: Option<&str>) -> anyhow::Result<(&str, &TierSection)> {
        let config = self.config();
        let Some(name) = name.or(config.default_tier.as_deref()) else {
            return usage("no tier is configured; set LARDER_TIER to a tier's directory");
        };
        match config.tier.get_key_value(name) {
            Some((name, section)) => Ok((name, section)),
            None => {
                let names: Vec<&str> = config.tier.keys().map(String::as_str).collect();
                usage(format!("there is no tier `{name}`; configured: {}", names.join(", ")))
            }
        }
    }

    /// Names the tier that a dataset's commits are cached in where none is named.
    pub fn tier_of_dataset<'a>(&'a self, named: Option<&'a str>, dataset: &str) -> Option<&'a str> {
        named.or_else(|| self.config().dataset.get(dataset).and_then(|section| section.tier.as_deref()))
    }

    /// Starts logging to stderr: warnings, more with `-v`; a daemon follows its configuration.
    pub(super) fn init_logging(&self, is_daemon: bool) {
        use tracing_subscriber::EnvFilter;
        let filter = match (is_daemon, self.global.quiet, self.global.verbose) {
            (true, _, 0) => self.loaded.get().map_or("info", |loaded| &loaded.config.daemon.log),
            (_, true, _) => "error",
            (_, _, 0) => "warn",
            (_, _, 1) => "larder=info,warn",
            (_, _, 2) => "larder=debug,info",
            _ => "debug",
        };
        let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("warn"));
        let _ = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(io::stderr)
            .with_ansi(io::stderr().is_terminal())
            .try_init();
    }

    /// Gives the lake that is configured.
    pub async fn lake(&self) -> anyhow::Result<Arc<dyn Lake>> {
        Ok(open::open_lake(&self.config().lake).await?)
    }

    /// Opens the catalog of the lake that is configured.
    pub async fn catalog(&self) -> anyhow::Result<Catalog> {
        let opened = open::open_catalog(self.lake().await?, self.config()).await;
        opened.hint("`larder doctor` checks whether the lake can be reached")
    }

    /// Opens the catalog for writing: makes the lake where there is none.
    pub async fn catalog_or_create(&self) -> anyhow::Result<Catalog> {
        let opened = open::open_or_create_catalog(self.lake().await?, self.config()).await;
        opened.hint("`larder doctor` checks whether the lake can be reached")
    }

    /// Makes a fetcher without a daemon: reads what the default tier has, if there is one that can be
    /// opened, and else the lake.
    pub async fn fetcher(&self, catalog: &Catalog) -> anyhow::Result<Fetcher> {
        let tier = match self.tier_section(None) {
            Ok((_, section)) if Tier::is_tier(&section.path) => self.tier(None).ok().map(|(_, tier)| tier),
            _ => None,
        };
        let rt = tokio::runtime::Handle::current();
        let lake = Arc::clone(&catalog.lake);
        Ok(open::open_fetcher(lake, tier, Kv::in_memory(), &self.config().fetch, rt))
    }

    /// Opens a tier in this process: the default one where none is named. Gives its name too.
    pub fn tier(&self, name: Option<&str>) -> anyhow::Result<(String, Tier)> {
        let (name, section) = self.tier_section(name)?;
        Ok((name.to_owned(), open::open_tier(name, section, &self.place()?)?))
    }

    /// Gives this node's state directory, made where it is missing.
    pub fn place(&self) -> anyhow::Result<Place> {
        Ok(Place::open(&self.config().state)?)
    }

    /// Gives the daemon's client without starting a daemon.
    pub fn node_client_at_rest(&self) -> NodeClient {
        NodeClient::configured(&self.config().daemon)
    }

    /// Says whether the daemon is one of another machine: its directories are not ours.
    pub fn is_remote(&self) -> bool {
        self.config().daemon.url.is_some()
    }

    /// Refuses a command that can only be given where the daemon runs.
    pub fn only_here(&self, what: &str) -> anyhow::Result<()> {
        if self.is_remote() {
            return usage(format!("{what} works on the daemon's own machine only, not with daemon.url"));
        }
        Ok(())
    }

    /// Gives a daemon that answers: the one that runs, or one that is started now. Refused where it
    /// serves another lake than this command means.
    pub async fn node_client(&self) -> anyhow::Result<NodeClient> {
        self.daemon_reach().client().await
    }

    /// Says how the daemon of this configuration is reached.
    pub(super) fn daemon_reach(&self) -> DaemonReach {
        let loaded = self.loaded();
        let lake = &loaded.config.lake;
        let means_it = loaded.is_set("lake.url") || !loaded.is_set("daemon.socket") && !self.is_remote();
        DaemonReach {
            client: self.node_client_at_rest(),
            spawn: self.spawn_spec(),
            on_demand: self.config().daemon.on_demand,
            names_socket: loaded.is_set("daemon.socket"),
            lake: means_it.then(|| (lake.url.clone(), lake.endpoint.clone())),
        }
    }

    /// Says how the daemon of this configuration is started.
    pub(super) fn spawn_spec(&self) -> SpawnSpec {
        let config = self.config();
        SpawnSpec {
            exe: daemon::own_exe(),
            args: self.daemon_args(),
            state: config.state.clone(),
            socket: config.daemon.socket.clone(),
            timeout: config.daemon.start_timeout.0,
        }
    }

    /// Gives the arguments with which a daemon is started that has this command's configuration.
    pub(super) fn daemon_args(&self) -> Vec<String> {
        let run = ["daemon", "run", "--detached"].map(str::to_owned);
        run.into_iter().chain(self.config_args()).collect()
    }

    /// Gives the arguments that give another command the configuration of this one.
    pub(super) fn config_args(&self) -> Vec<String> {
        let mut args = Vec::new();
        if let Some(file) = &self.loaded().file {
            args.extend(["--config".to_owned(), file.to_string_lossy().into_owned()]);
        }
        // Paths of flags were made absolute: take what holds, not what was typed.
        for (name, value) in &self.overrides {
            let Some(key) = config::find(name) else { continue };
            let is_path = key.kind == config::Kind::Path || key.kind == config::Kind::Lake && !value.contains("://");
            let value = match (is_path, std::path::absolute(value)) {
                (true, Ok(path)) => path.to_string_lossy().into_owned(),
                _ => value.clone(),
            };
            args.push(match key.name == name {
                true => format!("--{}={value}", key.flag),
                false => format!("--set={name}={value}"),
            });
        }
        args
    }

    pub(super) fn check_same_lake(&self, info: &NodeInfo) -> anyhow::Result<()> {
        self.daemon_reach().check_same_lake(info)
    }
}

/// How a daemon is found, and started where that may be: the same for commands and the scheduler.
#[derive(Debug, Clone)]
pub struct DaemonReach {
    client: NodeClient,
    pub spawn: SpawnSpec,
    on_demand: bool,
    names_socket: bool,
    /// Url and endpoint of the lake that it has to serve; None: whichever it serves.
    lake: Option<(String, Option<String>)>,
}

impl DaemonReach {
    /// Gives a daemon that answers: the one that runs, or one that is started now.
    pub async fn client(&self) -> anyhow::Result<NodeClient> {
        let client = self.client.clone();
        let info = match client.info().await {
            Ok(info) => info,
            Err(error) if error.is_absent() && !self.on_demand => {
                return Err(error)
                    .hint("start its service, as daemon.on_demand = false says: `systemctl start larder`");
            }
            Err(error) if error.is_absent() && self.names_socket && !self.may_start() => {
                return Err(error).hint("start the daemon that owns this socket");
            }
            Err(error) if error.is_absent() => spawn::connect_or_start(&self.spawn).await?.info().await?,
            Err(error) => return Err(error.into()),
        };
        self.check_same_lake(&info)?;
        Ok(client)
    }

    /// A socket outside of the state directory may belong to the system's daemon: it is not started
    /// from here where its directory is not ours.
    fn may_start(&self) -> bool {
        let dir = self.spawn.socket.parent().unwrap_or(std::path::Path::new("/"));
        !dir.exists() || nix::unistd::access(dir, nix::unistd::AccessFlags::W_OK).is_ok()
    }

    fn check_same_lake(&self, info: &NodeInfo) -> anyhow::Result<()> {
        let Some((url, endpoint)) = &self.lake else {
            return Ok(());
        };
        if info.lake == *url && info.endpoint == *endpoint {
            return Ok(());
        }
        let named = |url: &str, endpoint: &Option<String>| match endpoint {
            Some(endpoint) => format!("{url} at {endpoint}"),
            None => url.to_owned(),
        };
        let text = format!(
            "the daemon (pid {}) serves the lake {}, this command means {}",
            info.pid,
            named(&info.lake, &info.endpoint),
            named(url, endpoint)
        );
        usage(text).hint("stop it with `larder daemon stop`, or give each lake a LARDER_STATE of its own")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::cli::report::tell;

    #[tokio::test]
    async fn a_daemon_that_is_a_services_is_not_started_by_who_needs_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let spawn = SpawnSpec {
            exe: "/no/such/program".into(),
            args: Vec::new(),
            state: dir.path().join("state"),
            socket: dir.path().join("daemon.sock"),
            timeout: Duration::from_secs(60),
        };
        let client = NodeClient::at(&spawn.socket);
        let mut reach = DaemonReach { client, spawn, on_demand: false, names_socket: false, lake: None };
        let told = tell(&reach.client().await.expect_err("nobody is there"));
        assert!(told.contains("daemon.on_demand = false"), "{told}");
        reach.on_demand = true;
        let told = tell(&reach.client().await.expect_err("can't be started"));
        assert!(told.contains("/no/such/program"), "{told}");
    }
}
