//! What a request must look like before it is taken.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::core::{Caller, Options};
use super::error::SchedulerError;
use super::family::APART;
use super::job::{JobSpec, Submitter};
use super::lake_side::{LakeSide, Need};

/// Templates, datasets, outputs and the like that a job may have.
const PARTS_MAX: usize = 64;
/// Processes of a gang; each is a process of this machine, and a supervisor.
const PROCESSES_MAX: u32 = 1024;
/// All that was asked for, as JSON: so much of each job is in memory, and in a record.
const SPEC_BYTES_MAX: usize = 512 << 10;
/// What becomes an argument of the push that stores an output; the kernel takes none above 128 KiB.
const ARGUMENT_BYTES_MAX: usize = 4 << 10;
/// The command, and the environment, as JSON.
const TEXT_BYTES_MAX: usize = 100 << 10;
/// Prefixes by which an engine takes something of the machine's, seen as the scheduler sees it, for an image.
const TRANSPORTS: [&str; 9] = [
    "dir:",
    "docker-archive:",
    "docker-daemon:",
    "oci:",
    "oci-archive:",
    "containers-storage:",
    "sif:",
    "ostree:",
    "tarball:",
];

/// Ports from here on are anybody's.
const PORT_FREE: u16 = 1024;

fn wrong<T>(what: impl Into<String>) -> Result<T, SchedulerError> {
    Err(SchedulerError::Wrong { what: what.into() })
}

/// Checks the name of a job, a project, a node or a volume: it is part of paths.
pub fn name(kind: &'static str, name: &str) -> Result<(), SchedulerError> {
    let mut bytes = name.bytes();
    let first = bytes.next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    let rest = bytes.all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    if first && rest && name.len() <= 63 {
        return Ok(());
    }
    Err(SchedulerError::Name { kind, name: name.to_owned() })
}

/// Checks the name of a dataset that a job makes commits of.
pub fn dataset(dataset: &str) -> Result<(), SchedulerError> {
    name("dataset", dataset)?;
    if dataset.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return wrong(format!("`{dataset}` can't be the name of a dataset: use small letters"));
    }
    Ok(())
}

/// Says whether a dataset may be called so.
fn is_dataset(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
    let first = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    first && name.len() <= 100 && name.bytes().all(plain)
}

/// Checks how long texts are, and that they are not taken for something else where they are arguments.
fn lengths(spec: &JobSpec) -> Result<(), SchedulerError> {
    if serde_json::to_string(spec).is_ok_and(|text| text.len() > SPEC_BYTES_MAX) {
        return wrong("the job is longer than 512 KiB: put what is long into files");
    }
    if spec.image.iter().chain(&spec.code).any(|text| text.len() > ARGUMENT_BYTES_MAX) {
        return wrong("image and code are longer than 4 KiB");
    }
    let read = spec.datasets.iter().map(|data| &data.dataset).chain(spec.restore.iter().map(|from| &from.dataset));
    match read.into_iter().find(|name| !is_dataset(name)) {
        Some(name) => wrong(format!("`{name}` can't be the name of a dataset")),
        None => Ok(()),
    }
}

/// Checks a path inside of a job.
fn inside(path: &str) -> Result<(), SchedulerError> {
    let parts = path.strip_prefix('/').unwrap_or_default().split('/');
    if path.len() > 1 && path.starts_with('/') && !path.contains([':', '\0', ',']) {
        let mut parts = parts.peekable();
        if parts.all(|part| !part.is_empty() && part != "." && part != "..") {
            return Ok(());
        }
    }
    wrong(format!("`{path}` is no path for a job: write an absolute one without `.`, `..` and `:`, such as /data"))
}

/// Checks what was asked for.
pub fn spec(spec: &JobSpec, options: &Options) -> Result<(), SchedulerError> {
    if spec.command.is_empty() && spec.image.is_none() {
        return wrong("a job without an image needs a command: write it behind `--`");
    }
    if spec.image.is_some() && options.containers.is_none() {
        return wrong("the scheduler has no container engine: install podman and start it again, or leave out --image");
    }
    // The engine would take it for one of its options.
    if let Some(image) = spec.image.as_ref().filter(|image| image.is_empty() || image.starts_with('-')) {
        return wrong(format!("`{image}` is no image"));
    }
    let image = spec.image.as_deref().unwrap_or_default();
    if TRANSPORTS.iter().any(|transport| image.starts_with(transport)) {
        return wrong(format!("`{image}` names files of the machine: push the image to a registry, or load it"));
    }
    let grace = std::time::Duration::from_millis(spec.grace_ms);
    if grace > options.grace_max {
        let longest = humantime::format_duration(options.grace_max);
        return wrong(format!("the grace time is longer than this scheduler allows, {longest}"));
    }
    if spec.env.keys().any(|key| key.is_empty() || key.contains(['=', '\0'])) {
        return wrong("the name of a variable is not empty and has no `=`");
    }
    if spec.env.contains_key(APART) {
        return wrong(format!("{APART} is not a job's to set: it says that a process is none of its job's"));
    }
    // An engine takes a line for each.
    let fits = |(name, value): (&String, &String)| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
        name.chars().all(plain) && !value.contains(['\n', '\r'])
    };
    if spec.image.is_some() && !spec.env.iter().all(fits) {
        return wrong("a container takes no variables with line breaks or with odd names: put them into a file");
    }
    let sizes = [serde_json::to_string(&spec.command), serde_json::to_string(&spec.env)];
    if sizes.iter().any(|text| text.as_ref().is_ok_and(|text| text.len() > TEXT_BYTES_MAX)) {
        let what = "the command or its variables are longer than 100 KiB: put them into a file, and name that";
        return wrong(what);
    }
    let others = spec.image.iter().chain(&spec.code).chain(&spec.ports);
    let mut texts = spec.command.iter().chain(spec.env.values()).chain(others);
    if texts.any(|text| text.contains('\0')) {
        return wrong("commands and variables have no NUL bytes");
    }
    lengths(spec)?;
    if spec.templates.is_empty() {
        return wrong("a job needs at least one template");
    }
    if let Some(template) = spec.templates.iter().find(|template| !template.is_sound()) {
        let gpus = template.gpus;
        return wrong(format!(
            "{gpus} GPUs can't be given to a process: ask for a fraction below 1, or for whole ones"
        ));
    }
    if spec.templates.iter().any(|template| template.processes > PROCESSES_MAX) {
        return wrong(format!("a job may have {PROCESSES_MAX} processes at most"));
    }
    let lists = [spec.templates.len(), spec.datasets.len(), spec.outputs.len(), spec.volumes.len()];
    let others = [spec.host_paths.len(), spec.ports.len()];
    if lists.iter().chain(&others).any(|count| *count > PARTS_MAX) {
        return wrong(format!("a job may have {PARTS_MAX} templates, datasets, outputs, volumes and paths each"));
    }
    paths(spec)
}

/// Checks the ports that a container publishes: `[[ADDRESS:]HOST:]CONTAINER[/tcp|udp]`. The engine is the scheduler's,
/// who may be root: others get none that only root may have.
pub fn ports(ports: &[String], caller: Caller) -> Result<(), SchedulerError> {
    for port in ports {
        let Some(host) = host_port(port) else {
            return wrong(format!(
                "`{port}` is no port: write 8888, 8888:80 or 127.0.0.1:8888:80, with /udp where wanted"
            ));
        };
        if host.is_some_and(|host| host < PORT_FREE) && !caller.is_master() {
            return wrong(format!("`{port}`: ports of the machine below {PORT_FREE} are root's"));
        }
    }
    Ok(())
}

/// Gives the port of the machine, where one is named. None: it is no port.
fn host_port(text: &str) -> Option<Option<u16>> {
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let number = |text: &str| {
        let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse::<u16>().ok().filter(|port| plain && *port > 0)
    };
    if !matches!(protocol, "tcp" | "udp") {
        return None;
    }
    match ports.split(':').collect::<Vec<_>>().as_slice() {
        [container] => number(container).map(|_| None),
        [host, container] => number(container).and(Some(Some(number(host)?))),
        [address, host, container] => {
            address.parse::<std::net::Ipv4Addr>().ok()?;
            number(container).and(Some(Some(number(host)?)))
        }
        _ => None,
    }
}

/// Says what a job does with which datasets.
fn needs(spec: &JobSpec) -> BTreeSet<(&str, Need)> {
    let read = spec.datasets.iter().map(|data| (&*data.dataset, Need::Read));
    let restored = spec.restore.iter().map(|from| (&*from.dataset, Need::Read));
    let made = spec.outputs.iter().map(|output| (&*output.dataset, Need::Store));
    read.chain(restored).chain(made).collect()
}

/// Refuses a job whose submitter may not read or make what it names, before it waits for GPUs. What can't be told now
/// is asked again when it counts: before each start, and before anything is stored.
pub fn rights(spec: &JobSpec, lake: &dyn LakeSide, caller: Caller) -> Result<(), SchedulerError> {
    needs(spec).into_iter().try_for_each(|(dataset, need)| right(dataset, need, lake, caller))
}

/// Likewise for one dataset.
pub fn right(dataset: &str, need: Need, lake: &dyn LakeSide, caller: Caller) -> Result<(), SchedulerError> {
    if caller.is_master() {
        return Ok(());
    }
    match lake.permit(dataset, need, Submitter { uid: caller.uid, gid: caller.gid }) {
        Err(error) if lake.is_final(&error) => Err(SchedulerError::NotGranted { why: error.to_string() }),
        Err(error) => {
            tracing::warn!(%error, dataset, uid = caller.uid, "nobody tells now whether this user may");
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

fn paths(spec: &JobSpec) -> Result<(), SchedulerError> {
    let datasets = spec.datasets.iter().map(|data| &data.path);
    let outputs = spec.outputs.iter().map(|output| &output.path);
    let volumes = spec.volumes.iter().map(|volume| &volume.path);
    let host = spec.host_paths.iter().map(|host| &host.path);
    let all: Vec<&String> = datasets.chain(outputs).chain(volumes).chain(host).collect();
    all.iter().try_for_each(|path| inside(path))?;
    for (number, path) in all.iter().enumerate() {
        let others = all.iter().enumerate().filter(|(other, _)| *other != number);
        if let Some((_, other)) = others.into_iter().find(|(_, other)| covers(path, other)) {
            return wrong(format!("the job has two things at {path} and {other}: one would hide the other"));
        }
    }
    let mut names: Vec<&String> = spec.outputs.iter().map(|output| &output.dataset).collect();
    names.sort();
    if names.windows(2).any(|pair| matches!(pair, [a, b] if a == b)) {
        return wrong("two outputs of a job can't be the same dataset");
    }
    spec.volumes.iter().try_for_each(|volume| name("volume", &volume.name))?;
    spec.outputs.iter().try_for_each(|output| dataset(&output.dataset))?;
    let is_id = |commit: &str| commit.len() == 64 && commit.bytes().all(|byte| byte.is_ascii_hexdigit());
    let mut commits = spec.datasets.iter().map(|data| &data.commit).chain(spec.restore.iter().map(|from| &from.commit));
    if let Some(commit) = commits.find(|commit| !is_id(commit)) {
        return wrong(format!("`{commit}` is no commit id"));
    }
    Ok(())
}

/// Checks the paths of the machine that a job names, first by their texts: nobody makes the scheduler wait for a
/// file system that is not for jobs. Then by where their links lead, which is looked at again at each start.
pub fn host_paths(spec: &JobSpec, allowed: &[PathBuf]) -> Result<(), SchedulerError> {
    for host in &spec.host_paths {
        let plain = !host.host.components().any(|part| part == std::path::Component::ParentDir);
        let plain = plain && host.host.is_absolute() && !host.host.to_string_lossy().contains([':', ',', '\0']);
        if !plain || !is_below(&host.host, allowed) || real_path(&host.host, allowed).is_none() {
            return wrong(format!(
                "{} is not there, or not among the paths that jobs may see (`larder scheduler run --host-path`)",
                host.host.display()
            ));
        }
    }
    Ok(())
}

fn is_below(path: &Path, allowed: &[PathBuf]) -> bool {
    allowed.iter().any(|allowed| path.starts_with(allowed))
}

/// Gives where a path leads, if it is there and jobs may see that.
pub(super) fn real_path(path: &Path, allowed: &[PathBuf]) -> Option<PathBuf> {
    let real = std::fs::canonicalize(path).ok()?;
    (is_below(&real, allowed) && !real.to_string_lossy().contains([':', ','])).then_some(real)
}

/// Says whether `b` is `a` or lies inside of it.
fn covers(a: &str, b: &str) -> bool {
    b.strip_prefix(a).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_becomes_an_argument_is_short_and_no_flag() {
        let commit = "a".repeat(64);
        let spec = |name: &str, code: String| -> JobSpec {
            let data = serde_json::json!({"dataset": name, "revision": "r", "commit": commit, "path": "/data"});
            let spec = serde_json::json!({"kind": "train", "templates": [], "command": ["x"], "datasets": [data],
                "code": code, "grace_ms": 0});
            serde_json::from_value(spec).expect("is a spec")
        };
        assert!(lengths(&spec("x-ray.v2", "r7".to_owned())).is_ok());
        for name in ["", "-x", "../x", "X", "a/b"] {
            assert!(lengths(&spec(name, String::new())).is_err(), "{name}");
        }
        assert!(lengths(&spec("xray", "c".repeat(ARGUMENT_BYTES_MAX + 1))).is_err());
        let long = JobSpec { command: vec!["c".repeat(SPEC_BYTES_MAX)], ..spec("xray", String::new()) };
        assert!(lengths(&long).is_err());
    }

    #[test]
    fn ports_are_numbers_and_those_of_root_are_roots() {
        let caller = |uid| Caller { uid, gid: 1 };
        let may = |uid, port: &str| ports(&[port.to_owned()], caller(uid)).is_ok();
        let user = nix::unistd::geteuid().as_raw() + 4001;
        for port in ["8888", "80", "8888:80", "127.0.0.1:8888:80", "5353:53/udp"] {
            assert!(may(user, port), "{port}");
        }
        for port in ["443:8443", "0.0.0.0:53:53/udp", "1023:1"] {
            assert!(!may(user, port) && may(0, port), "{port}");
        }
        for port in ["", "0", "x", "80:", ":80", "65536", "+80", "8888:80/sctp", "h:1:2", "1:2:3", "1-9:1-9", "-p:80"] {
            assert!(!may(0, port), "{port}");
        }
    }

    #[test]
    fn names_and_paths_that_could_lead_out_of_their_place_are_refused() {
        for good in ["a", "train-1", "x.y_z", "0"] {
            assert!(name("job", good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "-a", "a b", "ä", &"x".repeat(64)] {
            assert!(name("job", bad).is_err(), "{bad}");
        }
        for good in ["/data", "/a/b.c"] {
            assert!(inside(good).is_ok(), "{good}");
        }
        for bad in ["", "/", "data", "/a/../b", "/a//b", "/a/", "/./a", "/a:b"] {
            assert!(inside(bad).is_err(), "{bad}");
        }
        assert!(covers("/a", "/a") && covers("/a", "/a/b") && !covers("/a", "/ab"));
    }
}
