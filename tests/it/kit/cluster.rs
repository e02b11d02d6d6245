//! Several nodes, each with its own home, state and daemon, on one tier and one lake that counts.

use std::fs;
use std::path::{Path, PathBuf};

use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

use super::proxy::Proxy;
use super::s3::{TestS3, env_at};
use super::world::World;

/// What readers may ask of each pack ahead of its fill (`FetchConfig::ahead_bytes_max`).
pub const AHEAD_BYTES: u64 = 1 << 20;

/// A file of the dataset: where it lies below a root, and what it has.
pub type SourceFile = (PathBuf, u64);

/// Nodes that share a tier.
pub struct Cluster {
    pub nodes: Vec<World>,
    pub proxy: Proxy,
    s3: TestS3,
    shared: tempfile::TempDir,
}

impl Cluster {
    /// Starts a lake, and makes a tier and so many nodes.
    pub fn new(nodes: usize) -> Self {
        let s3 = TestS3::start();
        let proxy = Proxy::start(s3.addr());
        let shared = tempfile::Builder::new().prefix("larder-it-").tempdir().expect("a directory");
        let mut cluster = Self { nodes: Vec::new(), proxy, s3, shared };
        for _ in 0..nodes {
            cluster.nodes.push(cluster.make_node());
        }
        cluster.nodes[0].ok(["lake", "init"]);
        cluster.renew_tier();
        cluster
    }

    fn make_node(&self) -> World {
        let mut world = World::new();
        world.set_all(env_at(&self.proxy.endpoint(), "nodes"));
        world.set("LARDER_TIER", self.tier().to_str().expect("plain"));
        world.set("LARDER_PEER_LISTEN", "127.0.0.1:0");
        world.set("LARDER_STEWARD_PERIOD", "2s");
        // A node that is killed stays dead.
        world.set("LARDER_DAEMON_RESTART", "false");
        world.set("LARDER_TIER_GRACE", "90s");
        world.set("LARDER_TIER_SCRUB_RATE", "0");
        world
    }

    /// Gives the tier's directory.
    pub fn tier(&self) -> PathBuf {
        self.shared.path().join("tier")
    }

    /// Throws the tier away and makes a new one: everything is cold again.
    pub fn renew_tier(&self) {
        for node in &self.nodes {
            // A mount that stays comes back with its daemon.
            for dir in node.mounted() {
                node.run(["umount", dir.to_str().expect("plain")]);
            }
            node.run(["daemon", "stop"]);
        }
        let _ = fs::remove_dir_all(self.tier());
        self.nodes[0].ok(["tier", "init", self.tier().to_str().expect("plain")]);
        self.proxy.reset_counters();
    }

    /// Pushes a dataset of such sizes, mounts it cold on every node and reads it whole on all at once, with so
    /// many threads each. Gives the files; the mounts stay.
    pub fn read_cold_on_all(&self, sizes: &[u64], threads: u64) -> Vec<SourceFile> {
        let source = self.nodes[0].path("source");
        let files = write_source(&source, sizes, 1);
        self.nodes[0].push(&source, "data");
        self.renew_tier();
        let mounts: Vec<_> = self.nodes.iter().map(|node| node.mount("data", "m", &[])).collect();
        self.proxy.reset_counters();
        std::thread::scope(|scope| {
            for (node, mount) in mounts.iter().enumerate() {
                let (source, files) = (&source, &files);
                scope.spawn(move || read_and_compare(source, mount, files, threads, Order::Shuffled(node as u64)));
            }
        });
        files
    }

    /// Asks a daemon for one of its counters, summed over what matches the text.
    pub fn counter(&self, node: usize, name: &str, label: &str) -> u64 {
        let text = self.nodes[node].run(["daemon", "metrics"]).stdout;
        let lines = text.lines().filter(|line| line.starts_with(name) && line.contains(label));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>() as u64
    }

    /// The same of all daemons.
    pub fn total(&self, name: &str, label: &str) -> u64 {
        (0..self.nodes.len()).map(|node| self.counter(node, name, label)).sum()
    }

    /// Says where bytes came from, for people.
    pub fn print_sources(&self) {
        let of = |source: &str| self.total("larder_fetch_read_bytes_total", &format!("source=\"{source}\"")) >> 10;
        let lane = |lane: &str| self.total("larder_lake_bytes_total", &format!("lane=\"{lane}\"")) >> 10;
        println!(
            "read, KiB: memory {} tier {} staging {} peer {} in_flight {}; lake, KiB: demand {} prefetch {} meta {}",
            of("memory"),
            of("tier"),
            of("staging"),
            of("peer"),
            of("in_flight"),
            lane("demand"),
            lane("prefetch"),
            lane("meta")
        );
    }
}

/// Writes files of random bytes below `root`.
pub fn write_source(root: &Path, sizes: &[u64], seed: u64) -> Vec<SourceFile> {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut files = Vec::new();
    for (number, size) in sizes.iter().enumerate() {
        let path = PathBuf::from(format!("d{:02}/f{number:05}", number / 500));
        fs::create_dir_all(root.join(&path).parent().expect("has one")).expect("makes the directory");
        let mut file = fs::File::create(root.join(&path)).expect("makes a file");
        let mut left = *size;
        let mut bytes = vec![0; 1 << 20];
        while left > 0 {
            let now = left.min(bytes.len() as u64) as usize;
            random.fill_bytes(&mut bytes[..now]);
            std::io::Write::write_all(&mut file, &bytes[..now]).expect("writes");
            left -= now as u64;
        }
        files.push((path, *size));
    }
    files
}

/// Gives the bytes that one copy of these files takes in packs, about.
pub fn one_copy(files: &[SourceFile]) -> u64 {
    files.iter().map(|(_, size)| size.next_multiple_of(4096)).sum()
}

/// The order in which files are read.
#[derive(Debug, Clone, Copy)]
pub enum Order {
    /// As the tree has them.
    Tree,
    /// At random, by this seed.
    Shuffled(u64),
}

/// Reads every file of a mount with some threads and compares it.
#[track_caller]
pub fn read_and_compare(source: &Path, mount: &Path, files: &[SourceFile], threads: u64, order: Order) {
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let mine = files.iter().enumerate().filter(move |(number, _)| *number as u64 % threads == thread);
            let mut mine: Vec<_> = mine.map(|(_, file)| file).collect();
            if let Order::Shuffled(seed) = order {
                mine.shuffle(&mut SmallRng::seed_from_u64(seed * 100 + thread));
            }
            // One pair of buffers for all files: making them costs more than reading a small file.
            let mut buffers = (vec![0; 1 << 20], vec![0; 1 << 20]);
            scope.spawn(move || mine.into_iter().for_each(|(path, _)| compare(source, mount, path, &mut buffers)));
        }
    });
}

fn compare(source: &Path, mount: &Path, path: &Path, (a, b): &mut (Vec<u8>, Vec<u8>)) {
    use std::io::Read as _;
    let open = |root: &Path| fs::File::open(root.join(path)).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let (mut wanted, mut found) = (open(source), open(mount));
    loop {
        let read = |file: &mut fs::File, into: &mut [u8]| {
            let mut filled = 0;
            while filled < into.len() {
                match file.read(&mut into[filled..]) {
                    Ok(0) => break,
                    Ok(n) => filled += n,
                    Err(error) => panic!("{}: {error}", path.display()),
                }
            }
            filled
        };
        let (len, other) = (read(&mut wanted, a), read(&mut found, b));
        assert!(len == other && a[..len] == b[..len], "{}: other bytes", path.display());
        if len == 0 {
            return;
        }
    }
}
