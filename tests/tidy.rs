//! Keeps the structure true: which module may use which, which crate may be named where, how long
//! functions and files are, and what may not stand in the tree at all.
//!
//! The rules are those of `docs/architecture.md`. A rule that is broken on purpose is changed here,
//! with its reason, in the same commit.

use std::fs;
use std::path::{Path, PathBuf};

/// Module -> modules of this crate that it may use.
const ARROWS: &[(&str, &[&str])] = &[
    ("format", &["format"]),
    ("config", &["config", "format"]),
    ("store", &["store", "format", "testkit"]),
    ("fs", &["fs", "store", "format", "testkit"]),
    ("node", &["node", "fs", "store", "format", "config", "crash", "testkit"]),
    ("quota", &["quota"]),
    ("scheduler", &["scheduler", "quota", "crash"]),
    // Where tests have a process die; uses nothing.
    ("crash", &[]),
    ("cli", &["cli", "node", "fs", "store", "format", "config", "scheduler", "quota"]),
    ("testkit", &["testkit", "fs", "store", "format"]),
];

/// Crate -> the only places that may name it.
const FENCES: &[(&str, &[&str])] = &[
    ("aws_sdk_s3", &["store/lake/"]),
    ("aws_config", &["store/lake/"]),
    ("s3s", &["store/lake/"]),
    ("redb", &["store/kv.rs", "store/catalog/push/"]),
    ("fuser", &["fs/fuse", "fs/session", "fs/passthrough"]),
    ("axum", &["node/", "scheduler/server.rs", "scheduler/kubernetes/serve.rs"]),
    ("tonic", &["node/csi/"]),
    ("kube", &["node/csi/", "scheduler/kubernetes/"]),
    ("k8s_openapi", &["node/csi/", "scheduler/kubernetes/"]),
    ("tokio_rustls", &["node/dial.rs", "node/remote.rs"]),
    // For the calls that mount; nothing else needs it.
    ("rustix", &["fs/keeper/"]),
    ("clap", &["cli/", "config/"]),
    ("anyhow", &["cli/", "main.rs"]),
    ("indicatif", &["cli/"]),
    ("serde_saphyr", &["scheduler/simulate/scenario.rs"]),
    ("nvml_wrapper", &["scheduler/gpus.rs"]),
];

/// The pure modules do not know the world.
const PURE_FORBIDS: &[&str] = &["std::fs", "std::io", "std::time", "tokio", "tracing", "std::env", "std::thread"];

/// The tier protocol is a deterministic state machine.
const TIER_FORBIDS: &[&str] = &["tokio"];

/// Lines a function may have.
const FUNCTION_LINES_MAX: usize = 70;
/// Lines a source file may have, tests at its end not counted.
const FILE_LINES_MAX: usize = 800;

struct Source {
    /// Relative to the repository.
    path: String,
    text: String,
}

impl Source {
    /// The text before the inline tests.
    fn product(&self) -> &str {
        self.text.split("\n#[cfg(test)]\nmod ").next().unwrap_or(&self.text)
    }

    fn is_test(&self) -> bool {
        self.path.ends_with("tests.rs") || self.path.contains("/tests/") || self.path.contains("/testkit/")
    }

    fn room(&self) -> &str {
        let inner = self.path.strip_prefix("src/").unwrap_or(&self.path);
        inner.split(['/', '.']).next().unwrap_or(inner)
    }
}

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn collect(dir: &Path, ending: &str, into: &mut Vec<Source>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            if !path.ends_with("target") && !path.ends_with(".git") {
                collect(&path, ending, into);
            }
        } else if path.to_string_lossy().ends_with(ending)
            && let Ok(text) = fs::read_to_string(&path)
        {
            let name = path.strip_prefix(repository()).unwrap_or(&path).to_string_lossy().into_owned();
            into.push(Source { path: name, text });
        }
    }
}

fn sources(folder: &str, ending: &str) -> Vec<Source> {
    let mut found = Vec::new();
    collect(&repository().join(folder), ending, &mut found);
    assert!(!found.is_empty(), "no {ending} files below {folder}: the test looks in the wrong place");
    found
}

fn report(rule: &str, broken: &[String]) {
    assert!(broken.is_empty(), "{rule}:\n  {}\n", broken.join("\n  "));
}

/// Lines of code that are neither comments nor documentation.
fn code_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//"))
}

/// Whether `line` names `word` as a path's beginning: `word::` not preceded by an identifier.
fn names(line: &str, word: &str) -> bool {
    let pattern = format!("{word}::");
    line.match_indices(&pattern).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':')
    }) || line.contains(&format!("use {word};"))
}

#[test]
fn arrows_between_modules_point_down_only() {
    let mut broken = Vec::new();
    for source in sources("src", ".rs").iter().filter(|source| !source.is_test()) {
        let Some((_, allowed)) = ARROWS.iter().find(|(room, _)| *room == source.room()) else {
            continue;
        };
        for (number, line) in code_lines(source.product()) {
            let mut rest = line;
            while let Some(at) = rest.find("crate::") {
                rest = &rest[at + "crate::".len()..];
                let target: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                let is_room = ARROWS.iter().any(|(room, _)| *room == target);
                if is_room && !allowed.contains(&target.as_str()) {
                    broken.push(format!("{}:{}: {} uses {target}", source.path, number + 1, source.room()));
                }
            }
        }
    }
    report("a module uses one that stands above it", &broken);
}

#[test]
fn crates_are_named_only_behind_their_fences() {
    let mut broken = Vec::new();
    for source in sources("src", ".rs").iter().filter(|source| !source.is_test()) {
        let inner = source.path.strip_prefix("src/").unwrap_or(&source.path);
        for (number, line) in code_lines(source.product()) {
            for (name, places) in FENCES {
                if names(line, name) && !places.iter().any(|place| inner.starts_with(place)) {
                    broken.push(format!("{}:{}: names {name}, which belongs to {places:?}", source.path, number + 1));
                }
            }
        }
    }
    report("a crate is named outside its fence", &broken);
}

#[test]
fn pure_modules_do_not_touch_the_world() {
    let mut broken = Vec::new();
    for source in sources("src", ".rs").iter().filter(|source| !source.is_test()) {
        let forbidden: &[&str] = match () {
            () if ["format", "quota"].contains(&source.room()) => PURE_FORBIDS,
            () if source.path.starts_with("src/store/tier/") => TIER_FORBIDS,
            () => &[],
        };
        for (number, line) in code_lines(source.product()) {
            for word in forbidden.iter().filter(|word| names(line, word)) {
                broken.push(format!("{}:{}: names {word}", source.path, number + 1));
            }
        }
    }
    report("a pure module names I/O, a clock, threads or logging", &broken);
}

#[test]
fn functions_stay_short() {
    let mut long = Vec::new();
    for source in sources("src", ".rs").iter().filter(|source| !source.is_test()) {
        let lines: Vec<&str> = source.product().lines().collect();
        for (number, line) in lines.iter().enumerate() {
            let trimmed = line.trim_start();
            let is_function = trimmed.starts_with("fn ") || (trimmed.contains(" fn ") && trimmed.ends_with(['{', '(']));
            // A declaration without a body, as in a trait, has no length.
            if !is_function || trimmed.starts_with("//") || trimmed.ends_with(';') {
                continue;
            }
            let end = format!("{}}}", &line[..line.len() - trimmed.len()]);
            let length = lines[number..].iter().position(|line| **line == end).map_or(0, |at| at + 1);
            if length > FUNCTION_LINES_MAX {
                long.push(format!("{}:{}: {length} lines", source.path, number + 1));
            }
        }
    }
    report(&format!("a function has more than {FUNCTION_LINES_MAX} lines"), &long);
}

#[test]
fn files_stay_short() {
    let long: Vec<String> = sources("src", ".rs")
        .iter()
        .filter(|source| !source.is_test())
        .map(|source| (source.product().lines().count(), &source.path))
        .filter(|(lines, _)| *lines > FILE_LINES_MAX)
        .map(|(lines, path)| format!("{path}: {lines} lines"))
        .collect();
    report("a file is too long: split it by noun", &long);
}

#[test]
fn every_module_says_what_it_is_for() {
    let silent: Vec<String> = sources("src", ".rs")
        .iter()
        .filter(|source| !source.text.starts_with("//!"))
        .map(|source| source.path.clone())
        .collect();
    report("a module does not open with `//!`", &silent);
}

#[test]
fn nothing_is_left_for_later() {
    // Spelled apart so that this file does not find itself.
    let words = [concat!("todo", "!("), concat!("unimplemented", "!("), concat!("FIX", "ME"), concat!("XX", "X")];
    let mut broken = Vec::new();
    for folder in ["src", "tests", "benches", "fuzz"] {
        if !repository().join(folder).is_dir() {
            continue;
        }
        for source in sources(folder, ".rs") {
            for (number, line) in source.text.lines().enumerate() {
                if words.iter().any(|word| line.contains(word)) {
                    broken.push(format!("{}:{}: {}", source.path, number + 1, line.trim()));
                }
            }
        }
    }
    report("something was left for later", &broken);
}

#[test]
fn ignored_tests_say_why() {
    let bare = concat!("#[", "ignore]");
    let mut broken = Vec::new();
    for folder in ["src", "tests"] {
        for source in sources(folder, ".rs") {
            for (number, line) in source.text.lines().enumerate() {
                if line.contains(bare) {
                    broken.push(format!("{}:{}", source.path, number + 1));
                }
            }
        }
    }
    report("an ignored test gives no reason", &broken);
}

#[test]
fn docs_link_to_files_that_exist() {
    let mut broken = Vec::new();
    let mut pages = sources("docs", ".md");
    collect(&repository(), "README.md", &mut pages);
    for page in &pages {
        let folder = repository().join(&page.path).parent().map(Path::to_path_buf).unwrap_or_default();
        for piece in page.text.split("](").skip(1) {
            let Some(target) = piece.split(')').next() else {
                continue;
            };
            let file = target.split('#').next().unwrap_or(target);
            if file.is_empty() || file.contains("://") {
                continue;
            }
            if !folder.join(file).exists() {
                broken.push(format!("{}: {target}", page.path));
            }
        }
    }
    report("a page links to a file that is not there", &broken);
}
