//! How a job's process is run: as a plain process, or in a container. The seam is thin on purpose: an
//! executor says which command a rank is, and everything that must not fail (once, and not lost) is the
//! [task](super::task)'s.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::api::ExecRequest;
use super::disk::{self, DiskError};
use super::gpus::{self, Gpu};
use super::job::{Attempt, JobRecord};
use super::snapshot::user_of;
use super::store::{JobPlace, MountOf, Store};
use super::supervise::groups_of;
use super::task::{ImageArg, MARKER, TaskSpec};
use crate::quota::{MilliGpus, Seat};

/// Ports from here on are given to gangs for their rendezvous.
const PORT_FIRST: u128 = 20_000;
const PORTS: u128 = 10_000;
/// Where a container finds the list of its gang's nodes.
const HOSTFILE: &str = "/etc/larder/hostfile";
/// Where it says how far it is.
const PROGRESS: &str = "/run/larder";

/// One rank of an attempt that is to be run.
#[derive(Debug)]
pub struct Launch<'a> {
    pub store: &'a Store,
    pub job: &'a JobRecord,
    pub attempt: &'a Attempt,
    pub rank: u32,
    pub seat: &'a Seat,
    /// The node's GPUs are only counted.
    pub simulated: bool,
    /// They are only counted, and another node has the GPUs of this machine: the job must not see those.
    pub beside_real: bool,
    /// Where the paths of the machine lead that the job names.
    pub real_paths: &'a BTreeMap<PathBuf, PathBuf>,
    /// What is known of the node's GPUs.
    pub gpus: &'a [Gpu],
    /// Where CUDA's multi-process service is, if it runs.
    pub mps_pipes: &'a Path,
}

/// A command beside a running job, for `job exec`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecPlan {
    pub argv: Vec<String>,
    pub env: BTreeMap<String, String>,
    pub cwd: PathBuf,
    /// As whom; None: as who runs the scheduler.
    #[serde(default)]
    pub user: Option<(u32, u32)>,
    /// It is the container engine, which belongs to who runs the scheduler.
    #[serde(default)]
    pub by_engine: bool,
}

/// Something that runs jobs.
pub trait Executor: Send + std::fmt::Debug {
    /// Gives the command of a rank. May write files for it.
    fn task(&self, launch: &Launch<'_>) -> Result<TaskSpec, DiskError>;

    /// Gives a command beside it, with the same surroundings.
    fn exec(&self, launch: &Launch<'_>, request: &ExecRequest) -> ExecPlan;
}

/// A path that a job names, and what lies there.
struct Shown {
    /// `DATASET_XRAY`: the variable that says where, without the prefix.
    variable: String,
    path: String,
    source: PathBuf,
    read_only: bool,
}

impl Launch<'_> {
    fn place(&self) -> JobPlace {
        self.store.job(&self.job.id)
    }

    /// Gives as whom the job runs; None: as the scheduler's own user.
    pub fn user(&self) -> Option<(u32, u32)> {
        user_of(self.job).map(|user| (user.uid, user.gid))
    }

    fn shown(&self) -> Vec<Shown> {
        let spec = &self.job.spec;
        let place = self.place();
        let datasets = spec.datasets.iter().map(|data| Shown {
            variable: format!("DATASET_{}", variable(&data.dataset)),
            path: data.path.clone(),
            source: self.store.mount(&MountOf::job(self.job, &data.commit)),
            read_only: true,
        });
        let outputs = spec.outputs.iter().map(|output| Shown {
            variable: format!("OUTPUT_{}", variable(&output.dataset)),
            path: output.path.clone(),
            source: place.output(&output.dataset),
            read_only: false,
        });
        let volumes = spec.volumes.iter().map(|volume| Shown {
            variable: format!("VOLUME_{}", variable(&volume.name)),
            path: volume.path.clone(),
            source: self.store.volume(&self.job.project, &volume.name),
            read_only: false,
        });
        let host = spec.host_paths.iter().map(|host| Shown {
            variable: format!("PATH_{}", variable(host.path.trim_matches('/'))),
            path: host.path.clone(),
            source: self.real_paths.get(&host.host).unwrap_or(&host.host).clone(),
            read_only: false,
        });
        datasets.chain(outputs).chain(volumes).chain(host).collect()
    }

    /// Makes what the job needs before it starts: directories, links, the list of its nodes. Done again
    /// after a crash, it changes nothing.
    pub fn lay_out(&self) -> Result<(), DiskError> {
        let place = self.place();
        let spec = &self.job.spec;
        // What is a user's is closed to the user's group: many have one in common.
        let (own, shared) = (if self.user().is_some() { 0o700 } else { 0o755 }, 0o755);
        if !spec.outputs.is_empty() {
            disk::make_dir(&place.path().join("out"), 0o711)?;
        }
        JobPlace::make_for(&place.work(), self.user(), own)?;
        JobPlace::make_for(&place.progress(), self.user(), own)?;
        for output in &spec.outputs {
            JobPlace::make_for(&place.output(&output.dataset), self.user(), own)?;
        }
        for volume in &spec.volumes {
            let volume = self.store.volume(&self.job.project, &volume.name);
            disk::make_dir(volume.parent().unwrap_or(&volume), 0o711)?;
            JobPlace::make_for(&volume, self.user(), shared)?;
        }
        let log = place.log(self.rank);
        disk::make_dir(log.parent().unwrap_or(Path::new("/")), 0o711)?;
        if spec.image.is_none() {
            for shown in self.shown() {
                link(&shown.source, &place.root(&shown.path))?;
            }
        }
        let hosts = place.attempt_file(self.attempt.number, "hostfile");
        disk::make_dir(hosts.parent().unwrap_or(Path::new("/")), 0o711)?;
        // Written once: the ranks before this one may be reading it.
        let text = self.hostfile();
        if fs::read(&hosts).is_ok_and(|have| have == text.as_bytes()) {
            return Ok(());
        }
        fs::write(&hosts, text).map_err(disk::at(&hosts, "write"))?;
        fs::set_permissions(&hosts, fs::Permissions::from_mode(0o644)).map_err(disk::at(&hosts, "open"))
    }

    /// A line for each node: its name, and how many ranks it has.
    fn hostfile(&self) -> String {
        let mut slots: Vec<(&str, usize)> = Vec::new();
        for seat in &self.attempt.placement.seats {
            match slots.iter_mut().find(|(node, _)| *node == seat.node.as_str()) {
                Some((_, count)) => *count += 1,
                None => slots.push((seat.node.as_str(), 1)),
            }
        }
        slots.iter().map(|(node, count)| format!("{node} slots={count}\n")).collect()
    }

    /// Gives what the job's variables say, but for where things lie.
    fn variables(&self) -> BTreeMap<String, String> {
        let job = self.job;
        let seats = &self.attempt.placement.seats;
        let here = |seat: &&Seat| seat.node == self.seat.node;
        let before = seats.iter().take(self.rank as usize).filter(here).count();
        let gpus: Vec<String> = self.seat.gpus.iter().map(ToString::to_string).collect();
        let port = PORT_FIRST + job.id.as_u128().wrapping_add(u128::from(self.attempt.number)) % PORTS;
        let mut all = job.spec.env.clone();
        let mut set = |name: &str, value: String| all.insert(name.to_owned(), value);
        set("LARDER_JOB", job.name.clone());
        set("LARDER_PROJECT", job.project.clone());
        set("LARDER_JOB_ID", job.id.to_string());
        set("LARDER_ATTEMPT", self.attempt.number.to_string());
        set("LARDER_NODE", self.seat.node.to_string());
        set("NVIDIA_VISIBLE_DEVICES", if self.beside_real { "void".to_owned() } else { gpus.join(",") });
        set("CUDA_VISIBLE_DEVICES", if self.beside_real { String::new() } else { self.cuda_devices() });
        set("RANK", self.rank.to_string());
        set("WORLD_SIZE", seats.len().to_string());
        set("LOCAL_RANK", before.to_string());
        set("LOCAL_WORLD_SIZE", seats.iter().filter(here).count().to_string());
        // All nodes of this executor are this machine.
        set("MASTER_ADDR", "127.0.0.1".to_owned());
        set("MASTER_PORT", port.to_string());
        if self.seat.each < MilliGpus::ONE {
            set("LARDER_GPU_MEMORY_SHARE", self.seat.each.to_string());
            set("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", (self.seat.each.0 / 10).max(1).to_string());
            if let Some(bytes) = self.memory_share() {
                set("LARDER_GPU_MEMORY_BYTES", bytes.to_string());
                if self.has_mps() {
                    // The client's own first GPU, of which it has just this one.
                    set("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", format!("0={}M", bytes >> 20));
                }
            }
            if self.has_mps() {
                set("CUDA_MPS_PIPE_DIRECTORY", self.mps_pipes.to_string_lossy().into_owned());
            }
        }
        if !self.simulated {
            // CUDA counts as the driver does, not the fastest first.
            set("CUDA_DEVICE_ORDER", "PCI_BUS_ID".to_owned());
        }
        all
    }

    /// Gives the memory of its part of a GPU, where the driver told how much the GPU has.
    fn memory_share(&self) -> Option<u64> {
        let index = self.seat.gpus.first()?;
        let bytes = self.gpus.iter().find(|gpu| gpu.index == *index)?.memory_bytes?;
        u64::try_from(u128::from(bytes) * u128::from(self.seat.each.0) / u128::from(MilliGpus::ONE.0)).ok()
    }

    /// Says whether its part of a GPU is kept by CUDA's multi-process service.
    fn has_mps(&self) -> bool {
        !self.simulated && self.seat.each < MilliGpus::ONE && gpus::is_mps(self.mps_pipes)
    }

    /// Gives the numbers by which CUDA knows its GPUs. A container has only those, counted from 0.
    fn cuda_devices(&self) -> String {
        let in_container = self.job.spec.image.is_some();
        let numbers = (0..).zip(&self.seat.gpus).map(|(at, gpu)| if in_container { at } else { *gpu });
        numbers.map(|number: u32| number.to_string()).collect::<Vec<_>>().join(",")
    }

    fn marker(&self) -> String {
        format!("{}.{}.{}", self.job.id, self.attempt.number, self.rank)
    }

    fn spec(&self, argv: Vec<String>, env: BTreeMap<String, String>, cwd: PathBuf) -> TaskSpec {
        let log = self.place().log(self.rank);
        let (stdout, kill, left, image, log_bytes_max) = (None, Vec::new(), Vec::new(), None, None);
        let (marker, user) = (self.marker(), self.user());
        let inherits = false;
        TaskSpec { marker, argv, env, inherits, cwd, user, log, stdout, kill, left, image, log_bytes_max }
    }
}

/// Makes a symbolic link, or leaves the one that is there, unless it leads elsewhere: an earlier scheduler may have
/// had the thing at another place.
fn link(source: &Path, at: &Path) -> Result<(), DiskError> {
    disk::make_dir(at.parent().unwrap_or(Path::new("/")), 0o755)?;
    if fs::read_link(at).is_ok_and(|old| old != source) {
        fs::remove_file(at).map_err(disk::at(at, "remove"))?;
    }
    match std::os::unix::fs::symlink(source, at) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map_err(disk::at(at, "link")),
    }
}

/// Makes a name fit for a variable: `x-ray` is `X_RAY`.
fn variable(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect()
}

/// What every program expects.
fn surroundings(user: Option<(u32, u32)>, cwd: &Path) -> BTreeMap<String, String> {
    let own = nix::unistd::geteuid();
    let uid = user.map_or(own, |(uid, _)| nix::unistd::Uid::from_raw(uid));
    let known = nix::unistd::User::from_uid(uid).ok().flatten();
    let home = known.as_ref().map_or_else(|| cwd.to_owned(), |user| user.dir.clone());
    let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/local/bin:/usr/bin:/bin".to_owned());
    let mut env = BTreeMap::from([
        ("PATH".to_owned(), path),
        ("HOME".to_owned(), home.to_string_lossy().into_owned()),
        ("LANG".to_owned(), "C.UTF-8".to_owned()),
    ]);
    if let Some(user) = known {
        env.insert("USER".to_owned(), user.name);
    }
    env
}

/// Runs jobs as processes of this machine. What they name by path lies below their own `root`
/// directory; variables say where.
#[derive(Debug, Clone, Copy, Default)]
pub struct Processes;

impl Processes {
    fn env(launch: &Launch<'_>) -> BTreeMap<String, String> {
        let place = launch.place();
        let mut env = surroundings(launch.user(), &place.work());
        env.extend(launch.variables());
        for shown in launch.shown() {
            let at = place.root(&shown.path).to_string_lossy().into_owned();
            env.insert(format!("LARDER_{}", shown.variable), at);
        }
        let hosts = place.attempt_file(launch.attempt.number, "hostfile");
        env.insert("LARDER_HOSTFILE".to_owned(), hosts.to_string_lossy().into_owned());
        let progress = place.progress().join("now");
        env.insert("LARDER_PROGRESS".to_owned(), progress.to_string_lossy().into_owned());
        env
    }
}

impl Executor for Processes {
    fn task(&self, launch: &Launch<'_>) -> Result<TaskSpec, DiskError> {
        Ok(launch.spec(launch.job.spec.command.clone(), Self::env(launch), launch.place().work()))
    }

    fn exec(&self, launch: &Launch<'_>, request: &ExecRequest) -> ExecPlan {
        let cwd = launch.place().work();
        // It ends with the job, as all that has its marker.
        let mut env = Self::env(launch);
        env.insert(MARKER.to_owned(), launch.marker());
        ExecPlan { argv: request.argv.clone(), env, cwd, user: launch.user(), by_engine: false }
    }
}

/// Runs jobs in containers, by podman or docker.
#[derive(Debug, Clone)]
pub struct Containers {
    /// `podman` or `docker`.
    pub engine: String,
    /// Arguments of each `run`, before ours.
    pub args: Vec<String>,
}

impl Containers {
    fn name(launch: &Launch<'_>) -> String {
        format!("larder-{}-{}-{}", launch.job.id, launch.attempt.number, launch.rank)
    }

    fn env() -> BTreeMap<String, String> {
        let mut env = surroundings(None, Path::new("/"));
        for name in ["XDG_RUNTIME_DIR", "DOCKER_HOST", "CONTAINER_HOST"] {
            env.extend(std::env::var(name).ok().map(|value| (name.to_owned(), value)));
        }
        env
    }

    /// Gives the variables of a container. They are in a file that only the engine reads: everybody sees its
    /// command line, and its own environment is not the job's to set.
    fn variables(launch: &Launch<'_>) -> BTreeMap<String, String> {
        let mut all = launch.variables();
        let mut set = |name: &str, value: &str| all.insert(name.to_owned(), value.to_owned());
        set(MARKER, &launch.marker());
        set("LARDER_HOSTFILE", HOSTFILE);
        set("LARDER_PROGRESS", &format!("{PROGRESS}/now"));
        for shown in launch.shown() {
            set(&format!("LARDER_{}", shown.variable), &shown.path);
        }
        all
    }

    fn env_file(launch: &Launch<'_>) -> PathBuf {
        launch.place().attempt_file(launch.attempt.number, &format!("env-{}", launch.rank))
    }

    fn run_args(&self, launch: &Launch<'_>) -> Vec<String> {
        let spec = &launch.job.spec;
        let mut args = vec![self.engine.clone(), "run".to_owned(), "--rm".to_owned()];
        args.extend(self.args.iter().cloned());
        let names_network = self.args.iter().any(|arg| arg.starts_with("--net"));
        let mut add = |flag: &str, value: String| args.extend([flag.to_owned(), value]);
        add("--name", Self::name(launch));
        if let Some((uid, gid)) = launch.user() {
            add("--user", format!("{uid}:{gid}"));
            // A setuid program of the image must not make its user root of what is shown to it.
            add("--security-opt", "no-new-privileges".to_owned());
            for group in groups_of(uid, gid).iter().filter(|group| group.as_raw() != gid) {
                add("--group-add", group.to_string());
            }
        }
        add("--env-file", Self::env_file(launch).to_string_lossy().into_owned());
        for shown in launch.shown() {
            let mode = if shown.read_only { ":ro" } else { "" };
            add("--volume", format!("{}:{}{mode}", shown.source.display(), shown.path));
        }
        let hosts = launch.place().attempt_file(launch.attempt.number, "hostfile");
        add("--volume", format!("{}:{HOSTFILE}:ro", hosts.display()));
        add("--volume", format!("{}:{PROGRESS}", launch.place().progress().display()));
        if !launch.simulated {
            for gpu in &launch.seat.gpus {
                add("--device", format!("nvidia.com/gpu={gpu}"));
            }
        }
        for port in &spec.ports {
            add("--publish", port.clone());
        }
        if launch.has_mps() {
            let pipes = launch.mps_pipes.display();
            add("--volume", format!("{pipes}:{pipes}"));
        }
        // The multi-process service speaks with its clients through shared memory too.
        if spec.large_shm || launch.has_mps() {
            add("--ipc", "host".to_owned());
        }
        // The ranks of a gang find each other at the machine's own address.
        if launch.attempt.placement.seats.len() > 1 && !names_network && spec.ports.is_empty() {
            add("--network", "host".to_owned());
        }
        args
    }
}

/// Writes variables so that an engine reads them: a line each, as they are.
fn write_env(path: &Path, variables: &BTreeMap<String, String>) -> Result<(), DiskError> {
    let text: String = variables.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
    disk::write_text(path, &text)
}

impl Executor for Containers {
    fn task(&self, launch: &Launch<'_>) -> Result<TaskSpec, DiskError> {
        write_env(&Self::env_file(launch), &Self::variables(launch))?;
        let mut argv = self.run_args(launch);
        let at = argv.len();
        argv.extend(launch.job.spec.image.clone());
        argv.extend(launch.job.spec.command.iter().cloned());
        let mut spec = launch.spec(argv, Self::env(), PathBuf::from("/"));
        // The engine runs as the scheduler's user, what is inside as the submitter.
        spec.user = None;
        let name = Self::name(launch);
        spec.kill = [&self.engine, "rm", "--force", &name].map(str::to_owned).to_vec();
        let filter = format!("name=^{name}$");
        let left = [&self.engine, "ps", "--all", "--filter", &filter, "--format", "{{.Names}}"];
        spec.left = left.map(str::to_owned).to_vec();
        spec.image = Some(ImageArg { engine: self.engine.clone(), at });
        Ok(spec)
    }

    fn exec(&self, launch: &Launch<'_>, request: &ExecRequest) -> ExecPlan {
        let mut all = vec![self.engine.clone(), "exec".to_owned(), "--interactive".to_owned()];
        all.extend(request.terminal.then(|| "--tty".to_owned()));
        all.push(Self::name(launch));
        all.extend(request.argv.iter().cloned());
        ExecPlan { argv: all, env: Self::env(), cwd: PathBuf::from("/"), user: None, by_engine: true }
    }
}

#[cfg(test)]
#[path = "executor_tests.rs"]
mod tests;
