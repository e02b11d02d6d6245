//! Defaults, file, environment and flags become one configuration.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::file::{self, Layer, Placed};
use super::keys::{KEYS, Kind};
use super::{Config, ConfigError, DaemonSection, DaemonUrl, Origin, Overrides, Problem, Sse};

/// `KEY=VALUE;...`: any keys of the file, by their dotted names.
pub const SET_VARIABLE: &str = "LARDER_SET";

/// The part of the process's surroundings that configuration depends on; tests make their own.
#[derive(Debug, Clone, Default)]
pub struct Env {
    pub vars: BTreeMap<String, String>,
    pub cwd: PathBuf,
}

impl Env {
    /// Takes the process's own.
    pub fn of_process() -> Self {
        Self {
            vars: std::env::vars_os()
                .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
                .collect(),
            cwd: std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
        }
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.vars.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    fn xdg(&self, variable: &str, below_home: &str) -> Option<PathBuf> {
        let given = self.get(variable).map(PathBuf::from).filter(|path| path.is_absolute());
        given.or_else(|| self.get("HOME").map(|home| Path::new(home).join(below_home)))
    }

    fn absolute(&self, text: &str) -> String {
        self.cwd.join(text).to_string_lossy().into_owned()
    }
}

/// A configuration and where each of its values came from.
#[derive(Debug, Clone)]
pub struct Loaded {
    pub config: Config,
    /// The file that was read; None where there is none.
    pub file: Option<PathBuf>,
    /// By dotted name.
    pub origins: BTreeMap<String, Origin>,
}

impl Loaded {
    /// Says whether somebody set this key.
    pub fn is_set(&self, dotted: &str) -> bool {
        self.origins.get(dotted).is_some_and(|origin| *origin != Origin::Default)
    }
}

/// Loads: `file` (must exist), else the XDG place, else /etc, else no file.
pub fn load(file: Option<&Path>, env: &Env, flags: &Overrides) -> Result<Loaded, ConfigError> {
    let path = match file {
        Some(path) => Some(env.cwd.join(path)),
        None => usual_places(env).into_iter().find(|path| path.exists()),
    };
    let text = match &path {
        Some(path) => {
            std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable { path: path.clone(), source })?
        }
        None => String::new(),
    };
    let mut loaded = merge(&text, path.as_deref().unwrap_or(Path::new("-")), env, flags)?;
    loaded.file = path;
    Ok(loaded)
}

/// Lists where a file is looked for when none is named.
pub fn usual_places(env: &Env) -> Vec<PathBuf> {
    let own = env.xdg("XDG_CONFIG_HOME", ".config").map(|dir| dir.join("larder/larder.toml"));
    own.into_iter().chain([PathBuf::from("/etc/larder/larder.toml")]).collect()
}

/// Merges a file's text with the rest: pure.
pub fn merge(text: &str, path: &Path, env: &Env, flags: &Overrides) -> Result<Loaded, ConfigError> {
    let mut problems = Vec::new();
    let mut values = file::parse(text, path).unwrap_or_else(|wrong| {
        problems.extend(wrong);
        Layer::new()
    });
    let mut above = environment(env, &mut problems);
    above.extend(flagged(env, flags, &mut problems));
    let default_tier = name_default_tier(&values, &above, &mut problems);
    for (name, placed) in above {
        values.insert(name.replace("tier.*.", &format!("tier.{default_tier}.")), placed);
    }
    fill_defaults(&mut values, &default_tier, env, &mut problems);
    if !problems.is_empty() {
        return Err(ConfigError::Wrong(problems));
    }
    let origins = values.iter().map(|(name, placed)| (name.clone(), placed.origin.clone())).collect();
    let config = build(values)?;
    let loaded = Loaded { config, file: None, origins };
    let problems = check_together(&loaded);
    if problems.is_empty() { Ok(loaded) } else { Err(ConfigError::Wrong(problems)) }
}

/// Every key can be set by its dotted name in `LARDER_SET`; most have a variable of their own, which wins.
fn environment(env: &Env, problems: &mut Vec<Problem>) -> Layer {
    let mut layer = Layer::new();
    let pairs = env.get(SET_VARIABLE).unwrap_or_default().split([';', '\n']).map(str::trim);
    for pair in pairs.filter(|pair| !pair.is_empty()) {
        let origin = Origin::Env(SET_VARIABLE.to_owned());
        match pair.split_once('=') {
            Some((name, text)) => place(&mut layer, name.trim(), text.trim(), origin, env, problems),
            None => problems.push(Problem { origin, key: None, message: format!("`{pair}` is not KEY=VALUE") }),
        }
    }
    for key in KEYS {
        if let Some(text) = env.get(key.env) {
            place(&mut layer, key.name, text, Origin::Env(key.env.to_owned()), env, problems);
        }
    }
    layer
}

fn flagged(env: &Env, flags: &Overrides, problems: &mut Vec<Problem>) -> Layer {
    let mut layer = Layer::new();
    for (name, text) in flags {
        let own = KEYS.iter().find(|key| key.name == name);
        let flag = own.map_or_else(|| format!("set {name}"), |key| key.flag.to_owned());
        place(&mut layer, name, text, Origin::Flag(flag), env, problems);
    }
    layer
}

/// Checks a value that does not come from the file, and puts it where its name says.
fn place(layer: &mut Layer, name: &str, text: &str, origin: Origin, env: &Env, problems: &mut Vec<Problem>) {
    let checked = file::check_name(name).and_then(|key| {
        let is_path = key.kind == Kind::Path || key.kind == Kind::Lake && !text.contains("://");
        let text = if is_path && !text.is_empty() { env.absolute(text) } else { text.to_owned() };
        key.kind.check(&text)
    });
    match checked {
        Ok(value) => drop(layer.insert(name.to_owned(), Placed { value, origin })),
        Err(message) => problems.push(Problem { origin, key: Some(name.to_owned()), message }),
    }
}

/// Decides which tier a bare `LARDER_TIER` or no name at all means.
fn name_default_tier(file: &Layer, above: &Layer, problems: &mut Vec<Problem>) -> String {
    let tiers: Vec<String> = {
        let named = file.keys().chain(above.keys()).filter_map(|name| tier_name(name));
        let names: BTreeSet<&str> = named.filter(|name| *name != "*").collect();
        names.into_iter().map(str::to_owned).collect()
    };
    let chosen = above.get("default_tier").or_else(|| file.get("default_tier"));
    let from_outside = above.contains_key("tier.*.path");
    match (chosen, tiers.as_slice()) {
        (Some(placed), _) => {
            let name = placed.value.as_str().unwrap_or_default().to_owned();
            if !tiers.contains(&name) && !from_outside {
                let message = format!("there is no [tier.{name}]");
                let key = Some("default_tier".to_owned());
                problems.push(Problem { origin: placed.origin.clone(), key, message });
            }
            name
        }
        (None, [only]) => only.clone(),
        (None, []) => "default".to_owned(),
        (None, several) => {
            if !several.iter().any(|name| name == "default") {
                let origin = file.values().next().map_or(Origin::Default, |placed| placed.origin.clone());
                let message = format!("say which of the tiers {} is used where none is named", several.join(", "));
                problems.push(Problem { origin, key: Some("default_tier".to_owned()), message });
            }
            "default".to_owned()
        }
    }
}

fn tier_name(dotted: &str) -> Option<&str> {
    dotted.strip_prefix("tier.")?.split('.').next()
}

/// Sets a value that nobody else has set.
fn set(values: &mut Layer, name: &str, value: toml::Value) {
    values.entry(name.to_owned()).or_insert(Placed { value, origin: Origin::Default });
}

/// Adds the compiled-in defaults, and those that depend on the XDG directories.
fn fill_defaults(values: &mut Layer, default_tier: &str, env: &Env, problems: &mut Vec<Problem>) {
    let text = |path: PathBuf| toml::Value::String(path.to_string_lossy().into_owned());
    set(values, "default_tier", toml::Value::String(default_tier.to_owned()));
    let places: [(&str, Option<PathBuf>); 2] = [
        ("state", env.xdg("XDG_STATE_HOME", ".local/state").map(|dir| dir.join("larder"))),
        ("lake.url", env.xdg("XDG_DATA_HOME", ".local/share").map(|dir| dir.join("larder/lake"))),
    ];
    for (name, place) in places {
        match place {
            Some(place) => set(values, name, text(place)),
            None if values.contains_key(name) => {}
            None => problems.push(homeless(name)),
        }
    }
    let no_tier = !values.keys().any(|name| tier_name(name).is_some() && name.ends_with(".path"));
    let default_path = format!("tier.{default_tier}.path");
    if no_tier && default_tier == "default" {
        match env.xdg("XDG_CACHE_HOME", ".cache") {
            Some(dir) => {
                set(values, &default_path, text(dir.join("larder/tier")));
                set(values, "tier.default.auto_init", toml::Value::Boolean(true));
            }
            None => problems.push(homeless(&default_path)),
        }
    }
    fill_scalars(values, problems);
    let state = values.get("state").and_then(|placed| placed.value.as_str()).map(PathBuf::from);
    if let Some(state) = state {
        set(values, "daemon.socket", text(default_socket(&state, env)));
    }
}

/// Adds the defaults of the table, for each tier its own; a tier without a directory is none.
fn fill_scalars(values: &mut Layer, problems: &mut Vec<Problem>) {
    let tiers: Vec<String> = values.keys().filter_map(|name| tier_name(name)).map(str::to_owned).collect();
    for key in KEYS {
        let Some(default) = key.default.and_then(|default| key.kind.check(default).ok()) else {
            continue;
        };
        match key.name.strip_prefix("tier.*.") {
            Some(last) => tiers.iter().for_each(|tier| set(values, &format!("tier.{tier}.{last}"), default.clone())),
            None => set(values, key.name, default),
        }
    }
    for tier in &tiers {
        if !values.contains_key(&format!("tier.{tier}.path")) {
            let named =
                values.iter().find(|(name, placed)| tier_name(name) == Some(tier) && placed.origin != Origin::Default);
            let origin = named.map_or(Origin::Default, |(_, placed)| placed.origin.clone());
            let message = "is missing: the tier's directory".to_owned();
            problems.push(Problem { origin, key: Some(format!("tier.{tier}.path")), message });
        }
    }
    problems.dedup();
}

fn homeless(key: &str) -> Problem {
    let message = "has no default where neither HOME nor the XDG directories are set; set it".to_owned();
    Problem { origin: Origin::Default, key: Some(key.to_owned()), message }
}

/// Chooses a socket path that every command with the same state directory finds, and that fits into
/// the 108 bytes of a socket address.
fn default_socket(state: &Path, env: &Env) -> PathBuf {
    let inside = state.join("daemon.sock");
    let default_state = env.xdg("XDG_STATE_HOME", ".local/state").map(|dir| dir.join("larder"));
    let runtime = env.get("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_absolute());
    if default_state.as_deref() == Some(state)
        && let Some(runtime) = &runtime
    {
        return runtime.join("larder/daemon.sock");
    }
    // 108 bytes with the final NUL; the keeper's socket lies beside it and has a name as long.
    if inside.as_os_str().len() <= 100 {
        return inside;
    }
    let digest = blake3::hash(state.as_os_str().as_encoded_bytes()).to_hex();
    let name = format!("larder-{}.d/daemon.sock", digest.get(..16).unwrap_or_default());
    runtime.unwrap_or_else(|| PathBuf::from("/tmp")).join(name)
}

fn build(values: Layer) -> Result<Config, ConfigError> {
    let mut root = toml::Table::new();
    for (name, placed) in values {
        let mut parts: Vec<&str> = name.split('.').collect();
        let Some(last) = parts.pop() else { continue };
        let mut at = &mut root;
        for part in parts {
            let below = at.entry(part).or_insert_with(|| toml::Value::Table(toml::Table::new()));
            let toml::Value::Table(below) = below else { unreachable!("a key of the table is no section") };
            at = below;
        }
        at.insert(last.to_owned(), placed.value);
    }
    Config::deserialize(root).map_err(|error| {
        let message = error.message().to_owned();
        ConfigError::Wrong(vec![Problem { origin: Origin::Default, key: None, message }])
    })
}

use serde::Deserialize as _;

/// Checks what single values cannot show.
fn check_together(loaded: &Loaded) -> Vec<Problem> {
    let config = &loaded.config;
    let mut found: Vec<(String, String)> = Vec::new();
    let mut wrong = |key: String, message: String| found.push((key, message));
    check_tiers(config, &mut wrong);
    check_datasets(config, &mut wrong);
    check_lake(config, &mut wrong);
    check_limits(config, &mut wrong);
    let told = found.into_iter().map(|(key, message)| Problem {
        origin: loaded.origins.get(&key).cloned().unwrap_or(Origin::Default),
        key: Some(key),
        message,
    });
    told.collect()
}

fn check_tiers(config: &Config, wrong: &mut dyn FnMut(String, String)) {
    for (name, tier) in &config.tier {
        if tier.low_watermark >= tier.high_watermark {
            let message = format!("must be below high_watermark, which is {}", tier.high_watermark);
            wrong(format!("tier.{name}.low_watermark"), message);
        }
        if tier.ttl.is_some_and(|ttl| ttl.0.is_zero()) {
            wrong(format!("tier.{name}.ttl"), "must be longer than nothing".to_owned());
        }
        if let Some((other, _)) = config.tier.iter().find(|(other, t)| *other < name && t.path == tier.path) {
            wrong(format!("tier.{name}.path"), format!("is the directory of [tier.{other}] too"));
        }
    }
}

fn check_datasets(config: &Config, wrong: &mut dyn FnMut(String, String)) {
    for (name, dataset) in &config.dataset {
        if let Some(tier) = dataset.tier.as_ref().filter(|tier| !config.tier.contains_key(*tier)) {
            wrong(format!("dataset.{name}.tier"), format!("there is no [tier.{tier}]"));
        }
    }
}

fn check_lake(config: &Config, wrong: &mut dyn FnMut(String, String)) {
    if let Some(endpoint) = &config.lake.endpoint {
        let host = endpoint.strip_prefix("http://").or_else(|| endpoint.strip_prefix("https://"));
        if host.is_none_or(|host| host.is_empty() || host.starts_with('/')) {
            wrong(
                "lake.endpoint".to_owned(),
                format!("`{endpoint}` does not begin with http:// or https:// and a host"),
            );
        }
        if endpoint.contains('@') {
            let why = "has a name or a password in it, which messages and `ps` would show: use the AWS credentials";
            wrong("lake.endpoint".to_owned(), why.to_owned());
        }
        if config.lake.url.starts_with('/') {
            wrong("lake.endpoint".to_owned(), "the embedded lake has no endpoint; set lake.url to s3://...".to_owned());
        }
    }
    if config.lake.sse == Sse::C && config.lake.sse_c_key_file.is_none() {
        wrong("lake.sse".to_owned(), "needs lake.sse_c_key_file".to_owned());
    }
    if config.lake.sse != Sse::C && config.lake.sse_c_key_file.is_some() {
        wrong("lake.sse_c_key_file".to_owned(), "is for sse = \"c\"".to_owned());
    }
    if config.lake.sse != Sse::Kms && config.lake.sse_kms_key.is_some() {
        wrong("lake.sse_kms_key".to_owned(), "is for sse = \"kms\"".to_owned());
    }
}

fn check_limits(config: &Config, wrong: &mut dyn FnMut(String, String)) {
    if config.daemon.socket.as_os_str().len() > 107 {
        wrong("daemon.socket".to_owned(), "is longer than the 107 bytes that a socket's path may have".to_owned());
    }
    if config.fetch.bytes_in_flight.0 < 16 << 20 {
        wrong("fetch.bytes_in_flight".to_owned(), "must be 16MiB at least".to_owned());
    }
    check_peers(&config.daemon, wrong);
    check_api(&config.daemon, wrong);
    check_url(&config.daemon, wrong);
    for (key, span) in [
        ("daemon.steward_period", config.daemon.steward_period),
        ("daemon.start_timeout", config.daemon.start_timeout),
        ("lake.connect_timeout", config.lake.connect_timeout),
        ("lake.read_timeout", config.lake.read_timeout),
        ("fetch.stall_timeout", config.fetch.stall_timeout),
        ("fetch.give_up", config.fetch.give_up),
        ("fetch.claim_wait", config.fetch.claim_wait),
    ] {
        if span.0.as_millis() < 50 {
            wrong(key.to_owned(), "must be 50ms at least".to_owned());
        }
    }
}

fn check_api(daemon: &DaemonSection, wrong: &mut dyn FnMut(String, String)) {
    let mut wrong = |key: &str, message: &str| wrong(format!("daemon.{key}"), message.to_owned());
    if daemon.api_cert.is_some() != daemon.api_key.is_some() {
        wrong("api_cert", "daemon.api_cert and daemon.api_key belong together");
    }
    let Some(listen) = &daemon.api_listen else {
        let unused = [("api_tokens", &daemon.api_tokens), ("api_cert", &daemon.api_cert)];
        for (key, _) in unused.into_iter().filter(|(_, path)| path.is_some()) {
            wrong(key, "is of no use without daemon.api_listen");
        }
        return;
    };
    match listen.parse::<SocketAddr>() {
        Err(_) => wrong("api_listen", "is no address such as 10.0.0.5:7072"),
        Ok(listen) if !listen.ip().is_loopback() && daemon.api_cert.is_none() => {
            wrong("api_listen", "can be reached by others: needs daemon.api_cert and daemon.api_key");
        }
        Ok(_) => {}
    }
    if daemon.api_tokens.is_none() {
        wrong("api_listen", "needs daemon.api_tokens: without a token nobody is served");
    }
}

fn check_url(daemon: &DaemonSection, wrong: &mut dyn FnMut(String, String)) {
    match &daemon.url {
        Some(url) => {
            if let Err(why) = DaemonUrl::parse(url) {
                wrong("daemon.url".to_owned(), why.to_owned());
            } else if daemon.token_file.is_none() {
                wrong("daemon.url".to_owned(), "needs daemon.token_file: without a token nobody is served".to_owned());
            }
        }
        None => {
            let unused = [("daemon.token_file", &daemon.token_file), ("daemon.ca", &daemon.ca)];
            for (key, _) in unused.into_iter().filter(|(_, path)| path.is_some()) {
                wrong(key.to_owned(), "is of no use without daemon.url".to_owned());
            }
        }
    }
}

fn check_peers(daemon: &DaemonSection, wrong: &mut dyn FnMut(String, String)) {
    let listen = daemon.peer_listen.as_ref().map(|listen| listen.parse::<SocketAddr>());
    match (listen, &daemon.peer_address) {
        (Some(Err(_)), _) => wrong("daemon.peer_listen".to_owned(), "is no address such as 10.0.0.5:7071".to_owned()),
        (Some(Ok(listen)), None) if listen.ip().is_unspecified() => {
            let why = "is every address of this machine; say in daemon.peer_address which one the others take";
            wrong("daemon.peer_listen".to_owned(), why.to_owned());
        }
        (None, Some(_)) => {
            wrong("daemon.peer_address".to_owned(), "is of no use without daemon.peer_listen".to_owned())
        }
        _ => {}
    }
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
