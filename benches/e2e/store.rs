//! One S3 server for everybody (`larder lake serve`), and a proxy in front of it that delays it.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::place::{go_on, own_group};

/// The key pair of the bench's store.
pub const ACCESS_KEY: &str = "bench";
/// Its secret.
pub const SECRET_KEY: &str = "bench-secret-key";
/// The bucket that every peer has its own prefix in.
pub const BUCKET: &str = "bench";

/// The running server and its proxy; both end with it.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    server: Child,
    /// JuiceFS's metadata engine, where installed: its fastest, with its files kept between runs.
    redis: Option<(Child, u16)>,
    port: u16,
    proxy_port: u16,
    delay_ms: Arc<AtomicU64>,
}

impl Store {
    /// Starts the server over `dir/store` and the proxy.
    pub fn start(dir: &Path) -> Result<Self> {
        let port = free_port()?;
        let mut server = own_group(Command::new(larder()?));
        let server = server
            .args(["lake", "serve"])
            .arg(dir.join("store"))
            .args(["--listen", &format!("127.0.0.1:{port}")])
            .args(["--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY, "--bucket", BUCKET])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(dir.join("store.log"))?)
            .spawn()
            .context("start larder lake serve")?;
        let begin = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if begin.elapsed() > Duration::from_secs(20) {
                bail!("the store does not listen; see {}", dir.join("store.log").display());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let delay_ms = Arc::new(AtomicU64::new(0));
        let proxy_port = start_proxy(port, delay_ms.clone())?;
        let redis = start_redis(dir)?;
        Ok(Self { dir: dir.join("store"), server, redis, port, proxy_port, delay_ms })
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn delayed_endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.proxy_port)
    }

    /// Where JuiceFS keeps the metadata of data set `number`.
    pub fn meta_url(&self, number: usize, home: &Path) -> String {
        match &self.redis {
            Some((_, port)) => format!("redis://127.0.0.1:{port}/{number}"),
            None => format!("sqlite3://{}/meta.db", home.display()),
        }
    }

    /// Reads the files below every object that begins with `objects/`, so that they are in the page cache.
    pub fn read_once(&self, objects: &str) -> Result<()> {
        let mut open = vec![self.objects(objects)];
        let mut buffer = vec![0; 1 << 20];
        while let Some(dir) = open.pop() {
            go_on()?;
            for entry in std::fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    open.push(entry.path());
                    continue;
                }
                let mut file = std::fs::File::open(entry.path())?;
                while file.read(&mut buffer)? > 0 {}
            }
        }
        Ok(())
    }

    /// Removes all objects of one data set.
    pub fn remove_all(&self, set: &str) -> Result<()> {
        let below = self.dir.parent().unwrap_or(&self.dir);
        for peer in ["larder", "juicefs", "objects"] {
            let objects = format!("{peer}-{set}");
            let _ = std::fs::remove_file(below.join(format!("loaded-{objects}")));
            match std::fs::remove_dir_all(self.objects(&objects)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("remove {objects} from the store"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Where the embedded lake has the objects whose keys begin with `objects/`.
    fn objects(&self, objects: &str) -> PathBuf {
        self.dir.join(BUCKET).join("objects").join(format!("{objects}.d"))
    }

    pub fn set_delay(&self, delay_ms: u64) {
        self.delay_ms.store(delay_ms, Ordering::Relaxed);
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        if let Some((redis, _)) = &mut self.redis {
            // SIGTERM lets it write its files.
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(redis.id().try_into().unwrap_or(0)),
                nix::sys::signal::Signal::SIGTERM,
            );
            let _ = redis.wait();
        }
    }
}

fn start_redis(dir: &Path) -> Result<Option<(Child, u16)>> {
    let home = dir.join("redis");
    std::fs::create_dir_all(&home)?;
    let port = free_port()?;
    let spawned = own_group(Command::new("redis-server"))
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--appendonly", "yes", "--save", "", "--dir"])
        .arg(&home)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(child) = spawned else {
        eprintln!("redis-server is not installed: JuiceFS keeps its metadata in SQLite");
        return Ok(None);
    };
    let begin = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() && begin.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(Some((child, port)))
}

/// The binary under test, from `LARDER_BIN`.
pub fn larder() -> Result<PathBuf> {
    let path = std::env::var_os("LARDER_BIN").context("LARDER_BIN is not set: run `make bench`")?;
    Ok(PathBuf::from(path))
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Forwards connections to `port`; what the client sends arrives `delay_ms` later, in order and
/// without a limit on what is under way, as over a long line.
fn start_proxy(port: u16, delay_ms: Arc<AtomicU64>) -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let proxy_port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let delay = Duration::from_millis(delay_ms.load(Ordering::Relaxed));
            let _ = serve_client(client, port, delay);
        }
    });
    Ok(proxy_port)
}

fn serve_client(client: TcpStream, port: u16, delay: Duration) -> std::io::Result<()> {
    let server = TcpStream::connect(("127.0.0.1", port))?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (from_client, to_server) = (client.try_clone()?, server.try_clone()?);
    std::thread::spawn(move || pump(from_client, to_server, delay));
    std::thread::spawn(move || pump(server, client, Duration::ZERO));
    Ok(())
}

fn pump(mut from: TcpStream, mut to: TcpStream, delay: Duration) {
    let (sender, receiver) = mpsc::sync_channel::<(Instant, Vec<u8>)>(1024);
    let writer = std::thread::spawn(move || {
        for (due, bytes) in receiver {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Write);
    });
    let mut buffer = vec![0; 256 << 10];
    while let Ok(len) = from.read(&mut buffer) {
        if len == 0 || sender.send((Instant::now() + delay, buffer[..len].to_vec())).is_err() {
            break;
        }
    }
    drop(sender);
    let _ = writer.join();
}
