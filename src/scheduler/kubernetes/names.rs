//! Labels, annotations and reasons: what others write for the scheduler and what it writes for them.
//! `docs/formats/kube-scheduler.md` says what each means.

pub const PROJECT: &str = "larder.io/project";
pub const KIND: &str = "larder.io/kind";
pub const PRIORITY: &str = "larder.io/priority";
pub const PREEMPTIBLE: &str = "larder.io/preemptible";
pub const FRACTION: &str = "larder.io/gpu-fraction";
pub const GANG: &str = "larder.io/gang";
pub const GANG_SIZE: &str = "larder.io/gang-size";
pub const POOLS: &str = "larder.io/pools";
pub const QUEUED_AT: &str = "larder.io/queued-at";
pub const DATASETS: &str = "larder.io/datasets";

/// Written with a binding.
pub const GPUS: &str = "larder.io/gpus";
pub const GPU_SHARE: &str = "larder.io/gpu-share";
pub const START: &str = "larder.io/start";
pub const GROUNDS: &str = "larder.io/grounds";

/// Of a node.
pub const DRAIN: &str = "larder.io/drain";
pub const POOL_PREFIX: &str = "pool.larder.io/";
pub const COMMITS: &str = "larder.io/commits";

/// Written by the controller of Jobs.
pub const COMPLETION_INDEX: &str = "batch.kubernetes.io/job-completion-index";
/// The driver whose inline volumes say what a pod reads, and their attribute.
pub const CSI_DRIVER: &str = "csi.larder.io";
pub const CSI_DATASET: &str = "dataset";
/// Priority classes that are called so name a kind.
pub const CLASS_PREFIX: &str = "larder-";

/// The condition of a pod that says whether it has a node.
pub const POD_SCHEDULED: &str = "PodScheduled";
/// Who writes events, patches and leases.
pub const COMPONENT: &str = "larder-scheduler";
