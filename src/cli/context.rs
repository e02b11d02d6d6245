//! What every command gets: configuration, runtime, lake, catalog, tier, daemon.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use anyhow::Context as _;
use indicatif::ProgressBar;
use serde::Serialize;

use super::Global;
use super::output::{self, Out, Table};
use super::report::usage;
use crate::config::{self, Config, Env, Loaded, Overrides, TierSection};

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
        Self {
            global,
            overrides,
            loaded: OnceLock::new(),
            runtime: OnceLock::new(),
        }
    }

    /// Loads the configuration (once); commands that need it find it loaded.
    pub(super) fn load_config(&self) -> Result<&Loaded, config::ConfigError> {
        if let Some(loaded) = self.loaded.get() {
            return Ok(loaded);
        }
        let loaded = config::load(
            self.global.config.as_deref(),
            &Env::of_process(),
            &self.overrides,
        )?;
        Ok(self.loaded.get_or_init(|| loaded))
    }

    /// Gives the configuration with the origin of each value.
    pub fn loaded(&self) -> &Loaded {
        self.loaded
            .get()
            .expect("main loads the configuration before a command that needs it")
    }

    /// Gives the configuration.
    pub fn config(&self) -> &Config {
        &self.loaded().config
    }

    /// Gives the configuration file that was named with `--config` or `LARDER_CONFIG`.
    pub fn config_file(&self) -> Option<&PathBuf> {
        self.global.config.as_ref()
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
                usage(format!(
                    "there is no tier `{name}`; configured: {}",
                    names.join(", ")
                ))
            }
        }
    }

    /// Starts logging to stderr: warnings, more with `-v`; a daemon follows its configuration.
    pub(super) fn init_logging(&self, is_daemon: bool) {
        use tracing_subscriber::EnvFilter;
        let filter = match (is_daemon, self.global.quiet, self.global.verbose) {
            (true, _, 0) => self
                .loaded
                .get()
                .map_or("info", |loaded| &loaded.config.daemon.log),
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
    pub async fn lake(&self) -> anyhow::Result<Arc<dyn crate::store::lake::Lake>> {
        anyhow::bail!("the lake is not wired up yet")
    }
}
