//! The one table of every scalar key: type, default, environment variable, flag, text.
//!
//! `tier.*.x` stands for `[tier.NAME] x`; its variable and flag set the default tier's. Whoever adds
//! a key adds a row here and a field in the section's struct; everything else follows (file check,
//! environment, flags, reference page, schema).

use super::types::{Percent, Size, Span};

/// What a value must look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Text,
    /// An absolute path (from the environment or a flag: made absolute).
    Path,
    /// `s3://bucket/prefix` or an absolute directory.
    Lake,
    Bool,
    Size,
    Duration,
    Percent,
    /// A whole number within bounds.
    Count {
        min: u32,
        max: u32,
    },
    Choice(&'static [&'static str]),
}

/// One scalar key.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// Dotted name in the file.
    pub name: &'static str,
    pub kind: Kind,
    /// None: nothing, or what the text says.
    pub default: Option<&'static str>,
    /// Environment variable.
    pub env: &'static str,
    /// Flag, without the dashes.
    pub flag: &'static str,
    /// One sentence without a final stop.
    pub doc: &'static str,
}

const fn key(
    name: &'static str,
    kind: Kind,
    default: Option<&'static str>,
    env: &'static str,
    flag: &'static str,
    doc: &'static str,
) -> Key {
    Key { name, kind, default, env, flag, doc }
}

/// Every scalar key but those of single datasets.
#[rustfmt::skip]
pub const KEYS: &[Key] = &[
    key("state", Kind::Path, None, "LARDER_STATE", "state",
        "This node's own directory: identity, metadata, mount table, daemon log (default: $XDG_STATE_HOME/larder)"),
    key("default_tier", Kind::Text, None, "LARDER_DEFAULT_TIER", "default-tier",
        "Name of the tier that is used where none is named (default: the only one, or `default`)"),
    key("lake.url", Kind::Lake, None, "LARDER_LAKE", "lake",
        "Where the data lies: s3://bucket/prefix, or a directory for the embedded lake (default: $XDG_DATA_HOME/larder/lake)"),
    key("lake.endpoint", Kind::Text, None, "LARDER_ENDPOINT", "endpoint",
        "URL of an S3-compatible store (default: that of AWS for the region)"),
    key("lake.region", Kind::Text, None, "LARDER_REGION", "region",
        "Region of the bucket (default: the AWS chain's, else us-east-1)"),
    key("lake.path_style", Kind::Bool, None, "LARDER_PATH_STYLE", "path-style",
        "Puts the bucket into the path of a request instead of the host name (default: where an endpoint is set)"),
    key("lake.ca_file", Kind::Path, None, "LARDER_CA_FILE", "ca-file",
        "Trusts the certificates in this PEM file besides those of the system"),
    key("lake.checksums", Kind::Choice(&["auto", "required", "supported"]), Some("auto"), "LARDER_CHECKSUMS", "checksums",
        "When checksum headers and trailers are sent, which some stores refuse; auto: on AWS only"),
    key("lake.connect_timeout", Kind::Duration, Some("5s"), "LARDER_CONNECT_TIMEOUT", "connect-timeout",
        "How long a connection to the store may take to be made"),
    key("lake.read_timeout", Kind::Duration, Some("1m"), "LARDER_READ_TIMEOUT", "read-timeout",
        "How long the store may take to begin its answer, the upload of a part included"),
    key("lake.sse", Kind::Choice(&["none", "s3", "kms", "c"]), Some("none"), "LARDER_SSE", "sse",
        "Asks for server-side encryption of what is written: SSE-S3, SSE-KMS or SSE-C"),
    key("lake.sse_kms_key", Kind::Text, None, "LARDER_SSE_KMS_KEY", "sse-kms-key",
        "Key id for sse = \"kms\" (default: the bucket's)"),
    key("lake.sse_c_key_file", Kind::Path, None, "LARDER_SSE_C_KEY_FILE", "sse-c-key-file",
        "File with the 32-byte key for sse = \"c\""),
    key("tier.*.path", Kind::Path, None, "LARDER_TIER", "tier-dir",
        "Directory of the tier, made with `larder tier init`"),
    key("tier.*.capacity", Kind::Size, None, "LARDER_TIER_CAPACITY", "tier-capacity",
        "Bytes that the tier may use (default: what the file system has)"),
    key("tier.*.ttl", Kind::Duration, None, "LARDER_TIER_TTL", "tier-ttl",
        "How long a commit stays after its last use (default: what `tier init --ttl` said, else 1d)"),
    key("tier.*.high_watermark", Kind::Percent, Some("90"), "LARDER_TIER_HIGH_WATERMARK", "tier-high-watermark",
        "Above this part of the capacity the least recently used commits are removed"),
    key("tier.*.low_watermark", Kind::Percent, Some("80"), "LARDER_TIER_LOW_WATERMARK", "tier-low-watermark",
        "Down to this part of the capacity"),
    key("tier.*.grace", Kind::Duration, Some("90s"), "LARDER_TIER_GRACE", "tier-grace",
        "How long removed objects stay in the trash: longer than any client's attribute cache"),
    key("tier.*.space_wait", Kind::Duration, Some("6m"), "LARDER_TIER_SPACE_WAIT", "tier-space-wait",
        "Deleted space that is not free after this time is held by something else (server snapshots): evictions for room rest"),
    key("tier.*.scrub_rate", Kind::Size, Some("16MiB"), "LARDER_TIER_SCRUB_RATE", "tier-scrub-rate",
        "Bytes of the tier that this node reads and digests again each second, to find damage; 0: none"),
    key("fetch.bytes_in_flight", Kind::Size, Some("256MiB"), "LARDER_FETCH_BYTES_IN_FLIGHT", "fetch-bytes-in-flight",
        "Bytes that are requested from the lake and not yet written, at most"),
    key("fetch.requests", Kind::Count { min: 1, max: 1024 }, Some("16"), "LARDER_FETCH_REQUESTS", "fetch-requests",
        "Requests of the prefetch lane at once, at most"),
    key("fetch.memory", Kind::Size, Some("256MiB"), "LARDER_FETCH_MEMORY", "fetch-memory",
        "Memory for verified data that is kept, at most"),
    key("fetch.stall_timeout", Kind::Duration, Some("5s"), "LARDER_FETCH_STALL_TIMEOUT", "fetch-stall-timeout",
        "How long a body may stand still before the rest is asked for again"),
    key("fetch.give_up", Kind::Duration, Some("30s"), "LARDER_FETCH_GIVE_UP", "fetch-give-up",
        "After this time without its bytes a read fails with EIO"),
    key("fetch.claim_wait", Kind::Duration, Some("2s"), "LARDER_FETCH_CLAIM_WAIT", "fetch-claim-wait",
        "How long a read waits for bytes that another node is bringing before it asks the lake"),
    key("mount.engine", Kind::Choice(&["auto", "kernel", "fuse"]), Some("fuse"), "LARDER_MOUNT_ENGINE", "mount-engine",
        "What serves a mount: the daemon, the kernel by itself (the commit has to be in the tier), or first the one, then the other"),
    key("mount.verify", Kind::Choice(&["tier", "node", "always"]), Some("node"), "LARDER_MOUNT_VERIFY", "mount-verify",
        "When bytes are checked: by who published them, once on each node, or at every read"),
    key("mount.prefetch", Kind::Choice(&["none", "touched", "all"]), Some("all"), "LARDER_MOUNT_PREFETCH", "mount-prefetch",
        "What is brought into the tier behind the reads"),
    key("mount.allow_other", Kind::Bool, Some("false"), "LARDER_MOUNT_ALLOW_OTHER", "mount-allow-other",
        "Lets other users read the mounts"),
    key("daemon.socket", Kind::Path, None, "LARDER_SOCKET", "socket",
        "Unix socket of the daemon (default: $XDG_RUNTIME_DIR/larder/…, or in the state directory)"),
    key("daemon.group", Kind::Text, None, "LARDER_DAEMON_GROUP", "daemon-group",
        "Group whose members may use the daemon's socket (default: only its owner and root)"),
    key("daemon.policy", Kind::Path, None, "LARDER_POLICY", "daemon-policy",
        "File that says which users and groups of the daemon's group may do what with which datasets (default: all that the datasets' grants allow)"),
    key("daemon.api_listen", Kind::Text, None, "LARDER_API_LISTEN", "api-listen",
        "Address such as 10.0.0.5:7072 where the API is given over TCP to who has a token (default: nowhere)"),
    key("daemon.api_tokens", Kind::Path, None, "LARDER_API_TOKENS", "api-tokens",
        "File with the digests of the tokens that daemon.api_listen takes: lines of `larder daemon token`"),
    key("daemon.api_cert", Kind::Path, None, "LARDER_API_CERT", "api-cert",
        "PEM file with the certificates of daemon.api_listen; without, only an address of this machine itself is taken"),
    key("daemon.api_key", Kind::Path, None, "LARDER_API_KEY", "api-key",
        "PEM file with the private key of daemon.api_cert"),
    key("daemon.url", Kind::Text, None, "LARDER_DAEMON", "daemon",
        "The daemon that commands speak to, on another machine: https://HOST:PORT of its daemon.api_listen (default: at daemon.socket)"),
    key("daemon.token_file", Kind::Path, None, "LARDER_DAEMON_TOKEN_FILE", "daemon-token-file",
        "File with the token for daemon.url, of `larder daemon token`; mode 0600"),
    key("daemon.ca", Kind::Path, None, "LARDER_DAEMON_CA", "daemon-ca",
        "PEM file with the authority of the certificate at daemon.url (default: those that this system trusts)"),
    key("daemon.peer_listen", Kind::Text, None, "LARDER_PEER_LISTEN", "peer-listen",
        "Address such as 10.0.0.5:7071 where nodes of the same tier ask for what this one is bringing (default: nowhere)"),
    key("daemon.peer_address", Kind::Text, None, "LARDER_PEER_ADDRESS", "peer-address",
        "host:port that the others are told, where it is not daemon.peer_listen itself"),
    key("daemon.log", Kind::Text, Some("info"), "LARDER_LOG", "log-filter",
        "What the daemon logs: error, warn, info, debug, or a filter such as larder::store=debug,info"),
    key("daemon.steward_period", Kind::Duration, Some("1m"), "LARDER_STEWARD_PERIOD", "steward-period",
        "How often leases are renewed and the tier is looked after"),
    key("daemon.start_timeout", Kind::Duration, Some("15s"), "LARDER_START_TIMEOUT", "start-timeout",
        "How long a command waits for the daemon that it started"),
    key("daemon.restart", Kind::Bool, Some("true"), "LARDER_DAEMON_RESTART", "daemon-restart",
        "Whether a new daemon is started when one dies that has mounts; a service manager does that itself"),
    key("daemon.on_demand", Kind::Bool, Some("true"), "LARDER_DAEMON_ON_DEMAND", "daemon-on-demand",
        "Whether a command that needs a daemon starts one; false where only a service manager does"),
];

/// Keys of `[dataset.NAME]`; `--set` and `LARDER_SET` set them.
#[rustfmt::skip]
pub const DATASET_KEYS: &[Key] = &[
    key("dataset.*.ttl", Kind::Duration, None, "", "",
        "How long a commit of this dataset stays in a tier after its last use (default: the tier's)"),
    key("dataset.*.tier", Kind::Text, None, "", "",
        "Name of the tier that commits of this dataset are mounted from and cached in where none is named (default: default_tier)"),
];

impl Kind {
    /// Gives what stands behind the flag in the help.
    pub const fn value_name(&self) -> &'static str {
        match self {
            Self::Text => "TEXT",
            Self::Path => "PATH",
            Self::Lake => "URL",
            Self::Bool => "BOOL",
            Self::Size => "SIZE",
            Self::Duration => "DURATION",
            Self::Percent => "PERCENT",
            Self::Count { .. } => "N",
            Self::Choice(_) => "WORD",
        }
    }

    /// Says in words what is expected.
    pub fn expected(&self) -> String {
        match self {
            Self::Text => "text".to_owned(),
            Self::Path => "an absolute path".to_owned(),
            Self::Lake => "s3://bucket/prefix or an absolute directory".to_owned(),
            Self::Bool => "true or false".to_owned(),
            Self::Size => "a size such as 512MiB or 4GiB".to_owned(),
            Self::Duration => "a duration such as 30s, 12h or 1d".to_owned(),
            Self::Percent => "a percentage from 1 to 100".to_owned(),
            Self::Count { min, max } => format!("a whole number from {min} to {max}"),
            Self::Choice(words) => format!("one of {}", words.join(", ")),
        }
    }

    /// Checks a written value; gives it as it goes into the typed struct.
    pub fn check(&self, text: &str) -> Result<toml::Value, String> {
        let wrong = || format!("`{text}` is not {}", self.expected());
        match self {
            Self::Text if text.is_empty() => Err("is empty; leave it out instead".to_owned()),
            Self::Text => Ok(toml::Value::String(text.to_owned())),
            Self::Path => {
                if text.starts_with('/') {
                    Ok(toml::Value::String(text.to_owned()))
                } else {
                    Err(wrong())
                }
            }
            Self::Lake => check_lake(text).map(|()| toml::Value::String(text.to_owned())),
            Self::Bool => match text {
                "true" | "1" | "yes" | "on" => Ok(toml::Value::Boolean(true)),
                "false" | "0" | "no" | "off" => Ok(toml::Value::Boolean(false)),
                _ => Err(wrong()),
            },
            Self::Size => text.parse::<Size>().map(|v| toml::Value::String(v.to_string())).map_err(|e| e.to_string()),
            Self::Duration => {
                text.parse::<Span>().map(|v| toml::Value::String(v.to_string())).map_err(|e| e.to_string())
            }
            Self::Percent => {
                text.parse::<Percent>().map(|v| toml::Value::String(v.to_string())).map_err(|e| e.to_string())
            }
            Self::Count { min, max } => text
                .parse::<u32>()
                .ok()
                .filter(|n| n >= min && n <= max)
                .map(|n| toml::Value::Integer(i64::from(n)))
                .ok_or_else(wrong),
            Self::Choice(words) => {
                if words.contains(&text) {
                    Ok(toml::Value::String(text.to_owned()))
                } else {
                    Err(wrong())
                }
            }
        }
    }
}

fn check_lake(text: &str) -> Result<(), String> {
    if text.starts_with('/') {
        return Ok(());
    }
    let Some(rest) = text.strip_prefix("s3://") else {
        return Err(format!("`{text}` is neither s3://bucket/prefix nor an absolute directory"));
    };
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.len() < 3 || !bucket.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)) {
        return Err(format!("`{bucket}` in `{text}` is not a bucket's name"));
    }
    if prefix.split('/').any(|part| part == "." || part == "..") || prefix.contains("//") || prefix.starts_with('/') {
        return Err(format!("the prefix in `{text}` has an empty, `.` or `..` part"));
    }
    Ok(())
}

/// Finds the row of a dotted name as it stands in a file (`tier.fast.ttl` is `tier.*.ttl`).
pub fn find(dotted: &str) -> Option<&'static Key> {
    let parts: Vec<&str> = dotted.split('.').collect();
    let name = match parts.as_slice() {
        [section @ ("tier" | "dataset"), _, last] => format!("{section}.*.{last}"),
        _ => dotted.to_owned(),
    };
    KEYS.iter().chain(DATASET_KEYS).find(|key| key.name == name)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_variables_and_flags_are_unique_and_well_formed() {
        let names: BTreeSet<_> = KEYS.iter().map(|k| k.name).collect();
        let envs: BTreeSet<_> = KEYS.iter().map(|k| k.env).collect();
        let flags: BTreeSet<_> = KEYS.iter().map(|k| k.flag).collect();
        assert_eq!((names.len(), envs.len(), flags.len()), (KEYS.len(), KEYS.len(), KEYS.len()));
        assert!(KEYS.iter().all(|k| k.env.starts_with("LARDER_") && !k.doc.ends_with('.')));
    }

    #[test]
    fn every_default_is_a_valid_value() {
        for key in KEYS {
            if let Some(default) = key.default {
                assert!(key.kind.check(default).is_ok(), "{}", key.name);
            }
        }
    }

    #[test]
    fn lakes_are_checked_before_anything_is_asked() {
        for good in ["s3://bucket", "s3://my-bucket/a/b", "/srv/lake"] {
            assert_eq!(check_lake(good), Ok(()), "{good}");
        }
        for bad in ["bucket/prefix", "s3://", "s3:///x", "s3://b_$/x", "s3://bucket/../x", "s3://bucket//x", "lake"] {
            assert!(check_lake(bad).is_err(), "{bad}");
        }
    }
}
