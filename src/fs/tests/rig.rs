//! A lake in memory, a tier in a directory, a keeper in a thread, and mounts of a model's commit.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::format::ids::{NodeId, PackId};
use crate::fs::keeper::kernel::KernelError;
use crate::fs::keeper::{Client, Keeper};
use crate::fs::kernel::{self, BuildError, Image, Images, KernelMount, Subject};
use crate::fs::mount::{MountSpec, MountedView, mount};
use crate::fs::session::ServeOptions;
use crate::fs::view::{Look, View, ViewOptions};
use crate::store::fetch::{FetchConfig, Fetcher, Prefetch, Verify};
use crate::store::kv::Kv;
use crate::store::lake::{Lake, PutIf};
use crate::store::meta::{MetaStore, Snapshot};
use crate::store::tier::{InitOptions, Tier, TierConfig};
use crate::testkit::faulty_lake::{FaultyLake, MemLake};
use crate::testkit::model::{Dir, Made, Node, Packing, make};

/// Where things are, from the bottom up. Fields are dropped in this order, mounts are gone before.
pub(super) struct Rig {
    pub snapshot: Snapshot,
    pub made: Made,
    pub lake: Arc<FaultyLake>,
    pub memory: Arc<MemLake>,
    pub fetcher: Fetcher,
    pub meta: MetaStore,
    keeper: Client,
    keeper_thread: Option<JoinHandle<io::Result<()>>>,
    rt: tokio::runtime::Runtime,
    dir: tempfile::TempDir,
}

/// Says whether mounts can be made here.
pub(super) fn can_mount() -> bool {
    let can = Path::new("/dev/fuse").exists() && nix::unistd::geteuid().is_root();
    if !can {
        eprintln!("skipped: needs root and /dev/fuse");
    }
    can
}

fn fetch_config() -> FetchConfig {
    FetchConfig { memory_bytes_max: 1 << 20, read_timeout_ms: 2_000, absent_recheck_ms: 0, ..FetchConfig::default() }
}

pub(super) fn options() -> ViewOptions {
    ViewOptions {
        subdir: Vec::new(),
        look: Look { uid: 0, gid: 0, umask: 0, file_mode: None, dir_mode: None },
        verify: Verify::Node,
        prefetch: Prefetch::None,
    }
}

impl Rig {
    /// Puts a model into a new lake. None: no mounts here.
    pub fn new(model: &Dir, packing: Packing) -> Option<Self> {
        if !can_mount() {
            return None;
        }
        let rt = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
        let dir = tempfile::tempdir().expect("tempdir");
        let (lake, memory) = FaultyLake::over_memory();
        let made = make(model, packing);
        let snapshot = rt.block_on(made.put(&*lake));
        let tier_dir = dir.path().join("tier");
        std::fs::create_dir(&tier_dir).expect("mkdir");
        Tier::init(&tier_dir, &InitOptions::default()).expect("makes a tier");
        let node = NodeId(uuid::Uuid::from_u128(1));
        let tier = Tier::open(&tier_dir, node, TierConfig::default()).expect("opens the tier");
        let shared: Arc<dyn Lake> = lake.clone();
        let fetcher = Fetcher::new(
            Arc::clone(&shared),
            Some(Arc::new(tier)),
            Kv::in_memory(),
            fetch_config(),
            rt.handle().clone(),
        );
        let meta = MetaStore::new(shared, dir.path().join("meta"), 1 << 20);
        let state = dir.path().join("state");
        let serving = Keeper::open(&state).expect("opens").expect("nobody else has it");
        let keeper_thread = Some(std::thread::spawn(move || serving.serve()));
        let keeper = Client::connect(&state).expect("answers");
        Some(Self { snapshot, made, lake, memory, fetcher, meta, keeper, keeper_thread, rt, dir })
    }

    pub fn mount(&self) -> Mount {
        self.mount_as(options(), ServeOptions { workers: 2, ..ServeOptions::default() })
    }

    /// Mounts at a new directory.
    pub fn mount_as(&self, options: ViewOptions, serve: ServeOptions) -> Mount {
        let dir = tempfile::tempdir_in(self.dir.path()).expect("tempdir").keep();
        let view = View::open(self.snapshot.clone(), self.meta.clone(), self.fetcher.clone(), options);
        let view = self.rt.block_on(view).expect("opens");
        let spec = MountSpec {
            dir: dir.clone(),
            owner: None,
            source: "made@v1".to_owned(),
            allow_other: true,
            note: "{}".to_owned(),
            read_ahead_kib: 256,
            serve,
        };
        let mounted = mount(view, &self.keeper, spec, self.rt.handle()).expect("mounts");
        Mount { dir, mounted }
    }

    /// Mounts by the kernel engine at a new directory, or `instead` of the mount that is there. None: this kernel
    /// does not mount images from files.
    pub fn mount_by_kernel(
        &self,
        options: &ViewOptions,
        private: Option<u64>,
        instead: Option<&Path>,
    ) -> Option<KMount> {
        self.fill();
        for used in &self.snapshot.placement.packs {
            self.rt.block_on(self.fetcher.ready(used, options.verify)).expect("is checked");
        }
        let image = self.build(options.look, private).expect("is built");
        let prepared =
            match kernel::prepare(&image, |pack| self.object(pack), Path::new(OsStr::from_bytes(&options.subdir))) {
                Ok(prepared) => prepared,
                Err(KernelError::NotFromFiles { .. } | KernelError::NoErofs) => {
                    eprintln!("skipped: this kernel mounts no EROFS image from a file here");
                    return None;
                }
                Err(error) => panic!("{error}"),
            };
        let dir = match instead {
            Some(dir) => dir.to_owned(),
            None => tempfile::tempdir_in(self.dir.path()).expect("tempdir").keep(),
        };
        let mounted =
            KernelMount::place(&self.keeper, &prepared, &dir, image.id, instead.is_some(), None).expect("is placed");
        Some(KMount { dir, mounted })
    }

    /// Gives the path of a pack's object in the tier.
    pub fn object(&self, pack: &PackId) -> PathBuf {
        let name = pack.to_string();
        self.dir.path().join("tier/objects").join(&name[..2]).join(name)
    }

    /// Builds the image of the snapshot.
    pub fn build(&self, look: Look, private: Option<u64>) -> Result<Image, BuildError> {
        let images = Images::open(self.dir.path().join("images")).expect("opens");
        let subject = Subject {
            snapshot: self.snapshot.clone(),
            meta: self.meta.clone(),
            fetcher: self.fetcher.clone(),
            look,
            private,
        };
        kernel::build(&images, &subject, self.rt.handle(), &|| true)
    }

    /// Puts an object into the lake.
    pub fn put(&self, key: String, bytes: Vec<u8>) {
        self.rt.block_on(self.lake.put(&key, bytes.into(), PutIf::Always)).expect("puts");
    }

    /// Brings all packs to the tier.
    pub fn fill(&self) {
        let fill = self.fetcher.fill(self.snapshot.placement.packs.clone());
        let progress = self.rt.block_on(fill.wait()).expect("fills");
        assert_eq!(progress.packs_done, progress.packs_total);
    }

    /// Takes every published object out of the tier, as an eviction does.
    pub fn evict(&self) {
        let objects = self.dir.path().join("tier/objects");
        let Ok(fans) = std::fs::read_dir(objects) else {
            return;
        };
        for fan in fans.flatten() {
            for object in std::fs::read_dir(fan.path()).into_iter().flatten().flatten() {
                // Somebody else may have been faster.
                let _ = std::fs::remove_file(object.path());
            }
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        for kept in self.keeper.list().unwrap_or_default() {
            let _ = self.keeper.unmount(&kept.dir, true);
        }
        let _ = self.keeper.stop();
        if let Some(thread) = self.keeper_thread.take().filter(|_| !std::thread::panicking()) {
            thread.join().expect("the keeper lives").expect("the keeper ends well");
        }
    }
}

/// A mount of the kernel engine, until it is dropped.
pub(super) struct KMount {
    pub dir: PathBuf,
    pub mounted: KernelMount,
}

impl Drop for KMount {
    fn drop(&mut self) {
        if self.mounted.unmount(false).is_err() {
            let _ = self.mounted.unmount(true);
        }
    }
}

/// A mount, until it is dropped.
pub(super) struct Mount {
    pub dir: PathBuf,
    pub mounted: MountedView,
}

impl Mount {
    pub fn path(&self, path: &str) -> PathBuf {
        self.dir.join(path)
    }

    /// Waits until the kernel asks no more.
    pub fn wait_for_end(&self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.mounted.is_alive() {
            assert!(Instant::now() < deadline, "the mount does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until a counter is what a test waits for. The kernel sends releases when it likes.
    pub fn wait_for(&self, what: &str, holds: impl Fn(&crate::fs::session::MountStats) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !holds(&self.mounted.stats()) {
            assert!(Instant::now() < deadline, "{what} did not come: {:?}", self.mounted.stats());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.mounted.unmount(false).is_err() {
            let _ = self.mounted.unmount(true);
        }
    }
}

/// Opens a file, past the page cache where asked.
pub(super) fn open(path: &Path, direct: bool) -> io::Result<File> {
    let flags = if direct { nix::libc::O_DIRECT } else { 0 };
    std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path)
}

/// Makes the kernel forget the pages of a file.
pub(super) fn forget_pages(file: &File) {
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).expect("advises");
}

/// What reads past the page cache may have to be aligned to.
const SECTOR: usize = 4096;

/// Reads a range as far as the file goes, into a buffer that is aligned for every kind of read.
pub(super) fn read_range(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut room = vec![0; len + SECTOR];
    let start = room.as_ptr().align_offset(SECTOR);
    let bytes = &mut room[start..start + len];
    let mut have = 0;
    while have < len {
        match file.read_at(&mut bytes[have..], offset + have as u64) {
            Ok(0) => break,
            Ok(read) => have += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Behind the end of the file, where a read begins in the middle of a sector.
            Err(error) if have > 0 && error.raw_os_error() == Some(nix::libc::EINVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(bytes[..have].to_vec())
}

/// Gives every file of a model with its path.
pub(super) fn files(dir: &Dir, prefix: &Path, into: &mut Vec<(PathBuf, Vec<u8>)>) {
    use std::os::unix::ffi::OsStrExt;
    for (name, node) in dir {
        let path = prefix.join(std::ffi::OsStr::from_bytes(name));
        match node {
            Node::File(file) => into.push((path, file.bytes.clone())),
            Node::Dir(below) => files(below, &path, into),
            Node::Symlink(_) => {}
        }
    }
}

/// Bytes that differ everywhere and between seeds.
pub(super) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    let mut bytes = vec![0; len];
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}
