//! A proxy before an S3 server, on loopback: it delays, breaks and counts.
//!
//! It understands as much of HTTP/1.1 as it needs to see where requests and answers end. Rules and
//! speeds may be changed while it runs; the first rule that matches a request counts.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use super::runtime;

/// What goes wrong with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The server is not asked; this status comes back, with an S3 error.
    Status(u16),
    /// The server is not asked; this status and S3 error come back, and how many seconds the store asks for.
    Refuse(u16, &'static str, Option<u64>),
    /// The connection is closed instead of an answer.
    CloseBefore,
    /// The connection is closed after so many bytes of the answer's body.
    CutBody(u64),
    /// The answer says that it has so many bytes, and has them: fewer than the object.
    ShortBody(u64),
    /// The byte at this offset of the answer's body is another one.
    WrongByte(u64),
    /// Nothing comes any more after so many bytes of the answer's body.
    Stall(u64),
    /// The answer begins so much later.
    Late(Duration),
    /// The server does what it was asked to, and the connection is closed instead of its answer.
    LostAnswer,
}

/// Which requests go wrong.
#[derive(Debug, Clone)]
pub struct Rule {
    /// None: any.
    pub method: Option<&'static str>,
    /// Path and query have to contain this.
    pub path_contains: String,
    /// So many that match go well first.
    pub skip: u64,
    /// So many then go wrong.
    pub times: u64,
    pub fault: Fault,
}

impl Rule {
    /// Every request of a method, from now on.
    pub fn every(method: &'static str, fault: Fault) -> Self {
        Self { method: Some(method), path_contains: String::new(), skip: 0, times: u64::MAX, fault }
    }

    /// The next request of a method.
    pub fn next(method: &'static str, fault: Fault) -> Self {
        Self { times: 1, ..Self::every(method, fault) }
    }

    /// Only requests whose path and query contain this.
    pub fn on(mut self, part: &str) -> Self {
        part.clone_into(&mut self.path_contains);
        self
    }

    /// The first so many go well.
    pub fn after(mut self, skip: u64) -> Self {
        self.skip = skip;
        self
    }

    /// So many go wrong.
    pub fn times(mut self, times: u64) -> Self {
        self.times = times;
        self
    }
}

/// What passed through.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    pub connections: u64,
    /// By method.
    pub requests: BTreeMap<String, u64>,
    /// Bytes of bodies to the server, and from it, by method.
    pub bytes_up: BTreeMap<String, u64>,
    pub bytes_down: BTreeMap<String, u64>,
    /// Bytes of answers to GETs of packs' data.
    pub data_down: u64,
    /// Requests that a rule met.
    pub faults: u64,
    /// Method and path of each request, in order.
    pub log: Vec<(String, String)>,
}

impl Counters {
    /// Counts all requests.
    pub fn total(&self) -> u64 {
        self.requests.values().sum()
    }
}

#[derive(Debug, Default)]
struct State {
    delay: Duration,
    bytes_per_sec: Option<u64>,
    /// One link for all connections, and until when it is taken.
    link: Option<(u64, Instant)>,
    down: bool,
    rules: Vec<Rule>,
    counters: Counters,
}

/// A running proxy; it stops when dropped.
pub struct Proxy {
    addr: SocketAddr,
    state: Arc<Mutex<State>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Proxy {
    /// Starts a proxy before `server`.
    pub fn start(server: SocketAddr) -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let listener = runtime().block_on(TcpListener::bind("127.0.0.1:0")).expect("a port");
        let addr = listener.local_addr().expect("an address");
        let task = runtime().spawn(accept(listener, server, state.clone()));
        Self { addr, state, task }
    }

    /// Gives `http://127.0.0.1:port`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Lets each request wait so long before it goes to the server: the store is so far away.
    pub fn set_delay(&self, delay: Duration) {
        self.lock().delay = delay;
    }

    /// Limits each connection's answers.
    pub fn set_bandwidth(&self, bytes_per_sec: Option<u64>) {
        self.lock().bytes_per_sec = bytes_per_sec;
    }

    /// Limits all answers together: the store is behind one link.
    pub fn set_link(&self, bytes_per_sec: Option<u64>) {
        self.lock().link = bytes_per_sec.map(|rate| (rate, Instant::now()));
    }

    /// Closes every connection at its next request, or no longer: the store is down.
    pub fn set_down(&self, down: bool) {
        self.lock().down = down;
    }

    /// Adds a rule.
    pub fn rule(&self, rule: Rule) {
        self.lock().rules.push(rule);
    }

    /// Forgets all rules, delays and limits.
    pub fn heal(&self) {
        let mut state = self.lock();
        *state = State { counters: std::mem::take(&mut state.counters), ..State::default() };
    }

    pub fn counters(&self) -> Counters {
        self.lock().counters.clone()
    }

    pub fn reset_counters(&self) {
        self.lock().counters = Counters::default();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no test fails while it holds the lock")
    }
}

async fn accept(listener: TcpListener, server: SocketAddr, state: Arc<Mutex<State>>) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok((client, _)) = listener.accept().await else {
            continue;
        };
        let state = state.clone();
        state.lock().expect("lock").counters.connections += 1;
        // Either side may close at any time: a connection's end is no error.
        connections.spawn(async move { Connection::serve(client, server, state).await.is_ok() });
    }
}

/// The head of a request or an answer.
struct Head {
    first_line: String,
    headers: Vec<(String, String)>,
}

/// How a body is delimited.
enum Framing {
    Length(u64),
    Chunked,
}

impl Head {
    /// Reads up to the empty line; None where the peer is done.
    async fn read<R: tokio::io::AsyncBufRead + Unpin>(from: &mut R) -> io::Result<Option<Self>> {
        let mut first_line = String::new();
        if from.read_line(&mut first_line).await? == 0 {
            return Ok(None);
        }
        let mut headers = Vec::new();
        loop {
            let mut line = String::new();
            if from.read_line(&mut line).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let Some((name, value)) = line.trim_end().split_once(':') else {
                break;
            };
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        Ok(Some(Self { first_line: first_line.trim_end().to_owned(), headers }))
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(have, _)| have == name).map(|(_, value)| value.as_str())
    }

    fn set(&mut self, name: &str, value: String) {
        self.headers.retain(|(have, _)| have != name);
        self.headers.push((name.to_owned(), value));
    }

    fn framing(&self) -> Framing {
        if self.header("transfer-encoding").is_some() {
            return Framing::Chunked;
        }
        let len = self.header("content-length").and_then(|len| len.parse().ok());
        Framing::Length(len.unwrap_or(0))
    }

    fn status(&self) -> u16 {
        self.first_line.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
    }

    fn encode(&self) -> Vec<u8> {
        let mut text = format!("{}\r\n", self.first_line);
        for (name, value) in &self.headers {
            text += &format!("{name}: {value}\r\n");
        }
        (text + "\r\n").into_bytes()
    }
}

type Reader = BufReader<tokio::net::tcp::OwnedReadHalf>;
type Writer = tokio::net::tcp::OwnedWriteHalf;

struct Connection {
    from_client: Reader,
    to_client: Writer,
    from_server: Reader,
    to_server: Writer,
    state: Arc<Mutex<State>>,
    /// The request that is being answered asks for a pack's data.
    is_data: bool,
}

fn split(stream: TcpStream) -> io::Result<(Reader, Writer)> {
    stream.set_nodelay(true)?;
    let (read, write) = stream.into_split();
    Ok((BufReader::new(read), write))
}

impl Connection {
    async fn serve(client: TcpStream, server: SocketAddr, state: Arc<Mutex<State>>) -> io::Result<()> {
        let (from_client, to_client) = split(client)?;
        let (from_server, to_server) = split(TcpStream::connect(server).await?)?;
        let mut connection = Self { from_client, to_client, from_server, to_server, state, is_data: false };
        while connection.exchange().await? {}
        Ok(())
    }

    /// Passes one request and its answer. False: the connection ends.
    async fn exchange(&mut self) -> io::Result<bool> {
        let Some(mut request) = Head::read(&mut self.from_client).await? else {
            return Ok(false);
        };
        let mut words = request.first_line.split(' ');
        let method = words.next().unwrap_or_default().to_owned();
        let path = words.next().unwrap_or_default().to_owned();
        self.is_data = method == "GET" && path.contains("/data/");
        let (fault, delay, down) = self.meet(&method, &path);
        if down || fault == Some(Fault::CloseBefore) {
            return Ok(false);
        }
        if request.header("expect").is_some() {
            request.headers.retain(|(name, _)| name != "expect");
            self.to_client.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
        }
        tokio::time::sleep(delay).await;
        let refusal = match fault {
            Some(Fault::Status(status)) => {
                Some((status, if status == 503 { "SlowDown" } else { "InternalError" }, None))
            }
            Some(Fault::Refuse(status, code, after)) => Some((status, code, after)),
            _ => None,
        };
        if let Some((status, code, after)) = refusal {
            self.request_body(&request, &method, false).await?;
            self.refuse(status, code, after, &method).await?;
            return Ok(true);
        }
        self.to_server.write_all(&request.encode()).await?;
        self.request_body(&request, &method, true).await?;
        self.answer(&method, fault).await
    }

    /// Counts a request; gives the fault that meets it, the delay, and whether the store is down.
    fn meet(&self, method: &str, path: &str) -> (Option<Fault>, Duration, bool) {
        let mut state = self.state.lock().expect("lock");
        *state.counters.requests.entry(method.to_owned()).or_default() += 1;
        state.counters.log.push((method.to_owned(), path.to_owned()));
        let mut fault = None;
        for rule in &mut state.rules {
            if rule.method.is_some_and(|wanted| wanted != method) || !path.contains(&rule.path_contains) {
                continue;
            }
            if rule.skip > 0 {
                rule.skip -= 1;
            } else if rule.times > 0 && fault.is_none() {
                rule.times -= u64::from(rule.times != u64::MAX);
                fault = Some(rule.fault);
            }
        }
        state.counters.faults += u64::from(fault.is_some());
        (fault, state.delay, state.down)
    }

    async fn request_body(&mut self, request: &Head, method: &str, forward: bool) -> io::Result<()> {
        match request.framing() {
            Framing::Length(mut left) => {
                let mut piece = vec![0; 64 * 1024];
                while left > 0 {
                    let want = piece.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    let got = self.from_client.read(&mut piece[..want]).await?;
                    if got == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    left -= got as u64;
                    self.count(method, got, 0);
                    if forward {
                        self.to_server.write_all(&piece[..got]).await?;
                    }
                }
            }
            Framing::Chunked => {
                while let Some((raw, payload)) = read_chunk(&mut self.from_client).await? {
                    self.count(method, payload, 0);
                    if forward {
                        self.to_server.write_all(&raw).await?;
                    }
                    if payload == 0 {
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    fn count(&self, method: &str, up: usize, down: usize) {
        let mut state = self.state.lock().expect("lock");
        *state.counters.bytes_up.entry(method.to_owned()).or_default() += up as u64;
        *state.counters.bytes_down.entry(method.to_owned()).or_default() += down as u64;
        state.counters.data_down += if self.is_data { down as u64 } else { 0 };
    }

    async fn refuse(&mut self, status: u16, code: &str, after: Option<u64>, method: &str) -> io::Result<()> {
        let after = after.map_or_else(String::new, |seconds| format!("retry-after: {seconds}\r\n"));
        let body = match method {
            "HEAD" => String::new(),
            _ => format!(
                "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>{code}</Code><Message>injected</Message></Error>"
            ),
        };
        let head = format!(
            "HTTP/1.1 {status} Injected\r\ncontent-type: application/xml\r\n{after}content-length: {}\r\n\r\n",
            body.len()
        );
        self.to_client.write_all(head.as_bytes()).await?;
        self.to_client.write_all(body.as_bytes()).await
    }

    /// Passes the answer, with what goes wrong in it. False: the connection ends.
    async fn answer(&mut self, method: &str, fault: Option<Fault>) -> io::Result<bool> {
        let mut answer = loop {
            match Head::read(&mut self.from_server).await? {
                None => return Ok(false),
                Some(head) if head.status() == 100 => {}
                Some(head) => break head,
            }
        };
        if fault == Some(Fault::LostAnswer) {
            return Ok(false);
        }
        if let Some(Fault::Late(time)) = fault {
            tokio::time::sleep(time).await;
        }
        let mut framing = answer.framing();
        if method == "HEAD" || matches!(answer.status(), 204 | 304) {
            framing = Framing::Length(0);
        }
        let short = match (fault, &framing) {
            (Some(Fault::ShortBody(short)), Framing::Length(len)) if short < *len => Some(short),
            _ => None,
        };
        if let Some(short) = short {
            answer.set("content-length", short.to_string());
        }
        self.to_client.write_all(&answer.encode()).await?;
        let goes_on = self.answer_body(method, framing, fault, short).await?;
        Ok(goes_on && answer.header("connection") != Some("close"))
    }

    async fn answer_body(
        &mut self,
        method: &str,
        framing: Framing,
        fault: Option<Fault>,
        short: Option<u64>,
    ) -> io::Result<bool> {
        let Framing::Length(len) = framing else {
            while let Some((raw, payload)) = read_chunk(&mut self.from_server).await? {
                self.count(method, 0, payload);
                self.to_client.write_all(&raw).await?;
                if payload == 0 {
                    break;
                }
            }
            return Ok(true);
        };
        let end = match fault {
            Some(Fault::CutBody(at) | Fault::Stall(at)) => at.min(len),
            _ => short.unwrap_or(len),
        };
        let mut at = 0;
        let mut piece = vec![0; 64 * 1024];
        while at < end {
            let want = piece.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
            let got = self.from_server.read(&mut piece[..want]).await?;
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if let Some(Fault::WrongByte(wrong)) = fault
                && (at..at + got as u64).contains(&wrong)
            {
                piece[usize::try_from(wrong - at).expect("within the piece")] ^= 1;
            }
            self.pace(got).await;
            self.to_client.write_all(&piece[..got]).await?;
            self.count(method, 0, got);
            at += got as u64;
        }
        match fault {
            Some(Fault::Stall(_)) if end < len => {
                std::future::pending::<()>().await;
                Ok(false)
            }
            // What is left of the server's answer would come before the next one.
            _ => Ok(end == len),
        }
    }

    async fn pace(&self, len: usize) {
        let (limit, turn) = {
            let mut state = self.state.lock().expect("lock");
            let turn = state.link.as_mut().map(|(rate, free)| {
                *free = (*free).max(Instant::now()) + Duration::from_secs_f64(len as f64 / *rate as f64);
                *free
            });
            (state.bytes_per_sec, turn)
        };
        if let Some(turn) = turn {
            tokio::time::sleep_until(turn.into()).await;
        }
        if let Some(bytes_per_sec) = limit {
            tokio::time::sleep(Duration::from_secs_f64(len as f64 / bytes_per_sec as f64)).await;
        }
    }
}

/// Reads a chunk with its framing; gives it raw, and its payload's length. The last has none.
async fn read_chunk(from: &mut Reader) -> io::Result<Option<(Vec<u8>, usize)>> {
    let mut line = String::new();
    if from.read_line(&mut line).await? == 0 {
        return Ok(None);
    }
    let size = line.trim_end().split(';').next().unwrap_or_default();
    let payload = usize::from_str_radix(size, 16).map_err(io::Error::other)?;
    let mut raw = line.into_bytes();
    if payload == 0 {
        // Trailers end with an empty line.
        loop {
            let mut trailer = String::new();
            let got = from.read_line(&mut trailer).await?;
            raw.extend_from_slice(trailer.as_bytes());
            if got == 0 || trailer.trim_end().is_empty() {
                return Ok(Some((raw, 0)));
            }
        }
    }
    let start = raw.len();
    raw.resize(start + payload + 2, 0);
    from.read_exact(&mut raw[start..]).await?;
    Ok(Some((raw, payload)))
}
