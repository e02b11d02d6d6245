//! The GPUs of this machine, as the driver tells of them.
//!
//! NVML is loaded when it is asked for; a machine without the driver has none. Without the library the device
//! files are counted: then nothing is known of a GPU but its number. MIG devices are not told apart: a GPU is one.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;
use serde::{Deserialize, Serialize};

/// Where clients of CUDA's multi-process service find it, if nothing else is said.
const MPS_PIPES: &str = "/tmp/nvidia-mps";
/// Processes of one GPU that are listed; more than any can have.
const GPUS_MAX: u32 = 64;

/// A GPU of this machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// By which the driver knows it, and CDI.
    pub index: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
}

/// How busy a GPU is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuLoad {
    pub index: u32,
    /// Of the last moments, in how many something ran on it.
    pub percent: u32,
    pub memory_used_bytes: u64,
    pub memory_bytes: u64,
}

/// Finds the GPUs of this machine; none where there is no driver.
pub fn discover() -> Vec<Gpu> {
    match by_driver() {
        Ok(gpus) => gpus,
        Err(error) => {
            tracing::info!(%error, "NVML does not tell of GPUs; the device files are counted");
            by_files(Path::new("/dev"))
        }
    }
}

fn by_driver() -> Result<Vec<Gpu>, NvmlError> {
    let nvml = Nvml::init()?;
    let mut gpus = Vec::new();
    for index in 0..nvml.device_count()?.min(GPUS_MAX) {
        let device = nvml.device_by_index(index)?;
        let memory_bytes = device.memory_info().ok().map(|memory| memory.total);
        gpus.push(Gpu { index, uuid: device.uuid().ok(), name: device.name().ok(), memory_bytes });
    }
    Ok(gpus)
}

/// Counts `nvidia0`, `nvidia1` and so on.
fn by_files(dev: &Path) -> Vec<Gpu> {
    let entries = std::fs::read_dir(dev).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let numbers = names.filter_map(|name| name.strip_prefix("nvidia")?.parse::<u32>().ok());
    let mut gpus: Vec<Gpu> = numbers.map(|index| Gpu { index, ..Gpu::default() }).collect();
    gpus.sort_by_key(|gpu| gpu.index);
    gpus
}

/// Says how busy the GPUs are; nothing where NVML does not tell.
pub fn loads() -> Vec<GpuLoad> {
    let told = || -> Result<Vec<GpuLoad>, NvmlError> {
        let nvml = Nvml::init()?;
        let mut loads = Vec::new();
        for index in 0..nvml.device_count()?.min(GPUS_MAX) {
            let device = nvml.device_by_index(index)?;
            let (memory, rates) = (device.memory_info()?, device.utilization_rates()?);
            let (memory_used_bytes, memory_bytes) = (memory.used, memory.total);
            loads.push(GpuLoad { index, percent: rates.gpu, memory_used_bytes, memory_bytes });
        }
        Ok(loads)
    };
    told().unwrap_or_default()
}

/// Gives where CUDA's multi-process service has its pipes on this machine.
pub fn mps_pipes() -> PathBuf {
    std::env::var_os("CUDA_MPS_PIPE_DIRECTORY").map_or_else(|| PathBuf::from(MPS_PIPES), PathBuf::from)
}

/// Says whether the multi-process service runs there. One of root's, or of who runs the scheduler: anybody may make the
/// usual directory, and would have the jobs of all in their hands.
pub(super) fn is_mps(pipes: &Path) -> bool {
    let own = nix::unistd::geteuid().as_raw();
    let is_trusted = |path: &Path, is_kind: fn(&std::fs::Metadata) -> bool| {
        let meta = std::fs::symlink_metadata(path).ok();
        meta.is_some_and(|meta| is_kind(&meta) && (meta.uid() == 0 || meta.uid() == own))
    };
    is_trusted(pipes, std::fs::Metadata::is_dir) && is_trusted(&pipes.join("control"), |meta| !meta.is_symlink())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_files_are_counted_by_their_numbers() {
        let dev = tempfile::tempdir().expect("a directory");
        for name in ["nvidia0", "nvidia2", "nvidia10", "nvidiactl", "nvidia-uvm", "null"] {
            std::fs::write(dev.path().join(name), "").expect("writes");
        }
        assert_eq!(by_files(dev.path()).iter().map(|gpu| gpu.index).collect::<Vec<_>>(), [0, 2, 10]);
        assert_eq!(by_files(&dev.path().join("none")), []);
    }

    #[test]
    fn a_multi_process_service_of_anybody_is_not_used() {
        let dir = tempfile::tempdir().expect("a directory");
        let (pipes, link) = (dir.path().join("mps"), dir.path().join("link"));
        std::fs::create_dir(&pipes).expect("makes");
        assert!(!is_mps(&pipes), "it does not run");
        std::fs::write(pipes.join("control"), "").expect("writes");
        std::os::unix::fs::symlink(&pipes, &link).expect("links");
        assert!(is_mps(&pipes) && !is_mps(&link));
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root, to give files to another user");
            return;
        }
        for path in [pipes.join("control"), pipes.clone()] {
            std::os::unix::fs::chown(&path, Some(4001), None).expect("gives it away");
            assert!(!is_mps(&pipes), "{}", path.display());
            std::os::unix::fs::chown(&path, Some(0), None).expect("takes it back");
        }
        assert!(is_mps(&pipes));
    }
}
