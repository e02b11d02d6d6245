//! Configuration: one TOML file, environment variables and flags, merged once at the edge.
//!
//! * [`keys`]: the one table of every scalar key: type, default, environment variable, flag, text.
//! * [`types`]: sizes, durations and percentages as they are written.
//! * [`DaemonUrl`]: where a daemon on another machine is.
//! * [`mod@file`]: a file's text to checked values, each with its line and column.
//! * [`mod@load`]: defaults < file < environment < flags, and what only fits together.
//! * [`mod@reference`]: the reference page and the JSON schema, generated from the table.
//!
//! Invariants: nothing below `cli` reads an environment variable of Larder's; an unknown key is an
//! error; every value knows where it came from; all that is wrong is told at once. Parsing and merging
//! are pure: text and maps in, a value or problems out.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

mod daemon_url;
pub mod file;
pub mod keys;
pub mod load;
pub mod reference;
pub mod types;

pub use daemon_url::DaemonUrl;
pub use keys::{KEYS, Key, Kind, find};
pub use load::{Env, Loaded, load};
pub use reference::flags_help;
pub use types::{Percent, Size, Span, ValueError};

/// Values given on the command line, by dotted name: of the table (`tier.*.ttl`, from a key's own flag) or
/// as it stands in a file (`tier.fast.ttl`, from `--set`).
pub type Overrides = BTreeMap<String, String>;

/// Everything that is configured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// This node's own directory.
    pub state: PathBuf,
    /// Name of the tier that is used where none is named; None where no tier is configured.
    #[serde(default)]
    pub default_tier: Option<String>,
    pub lake: LakeSection,
    #[serde(default)]
    pub tier: BTreeMap<String, TierSection>,
    #[serde(default)]
    pub dataset: BTreeMap<String, DatasetSection>,
    pub fetch: FetchSection,
    pub mount: MountSection,
    pub daemon: DaemonSection,
}

/// Where the lake is and how to speak to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LakeSection {
    /// `s3://bucket/prefix`, or a directory for the embedded lake.
    pub url: String,
    #[serde(default)]
    pub endpoint: Option<String>,
    #[serde(default)]
    pub region: Option<String>,
    #[serde(default)]
    pub path_style: Option<bool>,
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    pub checksums: Checksums,
    pub connect_timeout: Span,
    pub read_timeout: Span,
    pub sse: Sse,
    #[serde(default)]
    pub sse_kms_key: Option<String>,
    #[serde(default)]
    pub sse_c_key_file: Option<PathBuf>,
}

/// When checksum headers and trailers are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Checksums {
    Auto,
    Required,
    Supported,
}

/// Server-side encryption of what is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sse {
    None,
    S3,
    Kms,
    C,
}

/// One tier: a cache directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierSection {
    pub path: PathBuf,
    /// None: what the file system has.
    #[serde(default)]
    pub capacity: Option<Size>,
    /// None: what the tier's marker says.
    #[serde(default)]
    pub ttl: Option<Span>,
    pub high_watermark: Percent,
    pub low_watermark: Percent,
    /// How long removed objects stay in the trash.
    pub grace: Span,
    /// How long deleted space may take to become free.
    pub space_wait: Span,
    /// Bytes a second that are digested again; 0: none.
    pub scrub_rate: Size,
    /// The tier that is made where it is missing: only the laptop default.
    #[serde(default)]
    pub auto_init: bool,
}

/// What holds for one dataset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetSection {
    #[serde(default)]
    pub ttl: Option<Span>,
    /// None: the default tier.
    #[serde(default)]
    pub tier: Option<String>,
}

/// How much is fetched at once, and how long is waited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FetchSection {
    pub bytes_in_flight: Size,
    pub requests: u32,
    pub memory: Size,
    pub stall_timeout: Span,
    pub give_up: Span,
    pub claim_wait: Span,
}

/// Defaults of `larder mount`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountSection {
    pub engine: EngineChoice,
    pub verify: VerifyLevel,
    pub prefetch: PrefetchLevel,
    pub allow_other: bool,
}

/// What serves a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum EngineChoice {
    /// The daemon at once, the kernel as soon as it can
    Auto,
    /// The kernel alone: the commit has to be in the tier
    Kernel,
    /// The daemon
    #[default]
    Fuse,
}

impl EngineChoice {
    /// Gives the word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Kernel => "kernel",
            Self::Fuse => "fuse",
        }
    }
}

/// When bytes are checked against their digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum VerifyLevel {
    /// The publisher's check is trusted
    Tier,
    /// Each node checks an object once
    Node,
    /// Every read is checked
    Always,
}

/// What is brought into the tier beyond what is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum PrefetchLevel {
    /// Only what is read
    None,
    /// The packs that a read touched
    Touched,
    /// The whole commit, behind the first read
    All,
}

/// The daemon of this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DaemonSection {
    pub socket: PathBuf,
    /// Group that may use the socket (mode 0660); None: only its owner and root (0600).
    #[serde(default)]
    pub group: Option<String>,
    /// Who of that group may do what; None: only the grants of a dataset count.
    #[serde(default)]
    pub policy: Option<PathBuf>,
    /// Where the API is given over TCP; None: nowhere.
    #[serde(default)]
    pub api_listen: Option<String>,
    /// Digests of the tokens that are taken there.
    #[serde(default)]
    pub api_tokens: Option<PathBuf>,
    #[serde(default)]
    pub api_cert: Option<PathBuf>,
    #[serde(default)]
    pub api_key: Option<PathBuf>,
    /// The daemon that commands speak to over TCP; None: at the socket.
    #[serde(default)]
    pub url: Option<String>,
    /// The token for it.
    #[serde(default)]
    pub token_file: Option<PathBuf>,
    /// Who has signed its certificate; None: who this system trusts.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// Where nodes of the same tier may ask this one; None: nowhere.
    #[serde(default)]
    pub peer_listen: Option<String>,
    /// What they are told; None: the address that was bound.
    #[serde(default)]
    pub peer_address: Option<String>,
    pub log: String,
    pub steward_period: Span,
    pub start_timeout: Span,
    /// Whether the keeper starts a new daemon when this one dies.
    pub restart: bool,
    /// Whether a command that needs a daemon starts one.
    pub on_demand: bool,
}

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    Default,
    File { path: PathBuf, line: usize, column: usize },
    Env(String),
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line, column } => write!(f, "{}:{line}:{column}", path.display()),
            Self::Env(name) => write!(f, "${name}"),
            Self::Flag(name) => write!(f, "--{name}"),
        }
    }
}

/// One thing that is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    pub origin: Origin,
    pub key: Option<String>,
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.origin)?;
        if let Some(key) = &self.key {
            write!(f, "{key}: ")?;
        }
        f.write_str(&self.message)
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("the configuration file {path} cannot be read")]
    Unreadable {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the configuration is wrong:{}", lines(.0))]
    Wrong(Vec<Problem>),
}

fn lines(problems: &[Problem]) -> String {
    problems.iter().map(|problem| format!("\n  {problem}")).collect()
}

impl ConfigError {
    /// Lists what is wrong, one problem each.
    pub fn problems(&self) -> Vec<Problem> {
        match self {
            Self::Wrong(problems) => problems.clone(),
            Self::Unreadable { path, source } => vec![Problem {
                origin: Origin::File { path: path.clone(), line: 1, column: 1 },
                key: None,
                message: format!("cannot be read: {source}"),
            }],
        }
    }
}
