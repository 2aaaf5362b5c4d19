//! An engine in its own process that takes commands, line by line.
#![allow(dead_code)] // each test target uses its part

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{channel, Receiver};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use uccl_p2p::config::Config;
use uccl_p2p::engine::{Connection, Direction, Engine, FifoItem, List, LocalSegment};

#[path = "../local/mod.rs"]
mod local;
pub use local::*;

/// Names the test that a child process runs, and is not set in the test's own process.
pub const CHILD: &str = "UCCL_TEST_CHILD";
// ---- the outside of it ----

/// A process with an engine.
pub struct Victim {
    child: Child,
    input: ChildStdin,
    answers: Receiver<String>,
    pub port: u16,
    log: std::path::PathBuf,
}

/// How long a process may take to answer.
const ANSWER: Duration = Duration::from_secs(120);

/// What a transfer came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done(u64),
    Pending,
    Failed(String),
}

impl Victim {
    /// `test`: a test of the calling program that does nothing but [`serve`] where [`CHILD`] names it.
    pub fn start(test: &str, environment: &[(&str, &str)]) -> Victim {
        Victim::under(&[], test, environment)
    }

    /// The same behind other commands, as `ip netns exec`.
    pub fn under(prefix: &[&str], test: &str, environment: &[(&str, &str)]) -> Victim {
        static NUMBER: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let log = std::env::temp_dir().join(format!("uccl-victim-{}-{number}.log", std::process::id()));
        let own = std::env::current_exe().unwrap().display().to_string();
        let words: Vec<&str> =
            prefix.iter().copied().chain([&*own, test, "--exact", "--nocapture", "--test-threads=1"]).collect();
        let mut command = Command::new(words[0]);
        // Its warnings are looked at, whatever this process's own level.
        command.args(&words[1..]).env(CHILD, test).env("UCCL_P2P_LOG_LEVEL", "warn").envs(environment.iter().copied());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(std::fs::File::create(&log).unwrap());
        let mut child = command.spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let (answer, answers) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if let Some((_, text)) = line.split_once("= ") {
                    let _ = answer.send(text.trim().to_owned());
                }
            }
        });
        let mut victim = Victim { child, input, answers, port: 0, log };
        victim.port = victim.answer().parse().unwrap();
        victim
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The next line that has "= ".
    pub fn answer(&mut self) -> String {
        match self.answers.recv_timeout(ANSWER) {
            Ok(answer) => answer,
            Err(e) => panic!("the victim does not answer ({e}), {:?}: {}", self.child.try_wait(), self.log()),
        }
    }

    pub fn tell(&mut self, command: &str) {
        let _ = writeln!(self.input, "{command}");
    }

    pub fn ask(&mut self, command: &str) -> String {
        self.tell(command);
        self.answer()
    }

    pub fn number(&mut self, command: &str) -> usize {
        let answer = self.ask(command);
        answer.parse().unwrap_or_else(|_| panic!("{command}: {answer}"))
    }

    /// A buffer of the victim's, full of a byte: its number and item.
    pub fn buffer(&mut self, len: usize, fill: u8) -> (usize, FifoItem) {
        let answer = self.ask(&format!("buffer {len} {fill}"));
        let (number, item) = answer.split_once(' ').unwrap();
        (number.parse().unwrap(), item_of(item))
    }

    /// Starts a transfer; its number, or why not.
    pub fn start_transfer(&mut self, command: &str) -> Result<u64, String> {
        let answer = self.ask(command);
        match answer.strip_prefix("error ") {
            Some(error) => Err(error.to_owned()),
            None => Ok(answer.parse().unwrap()),
        }
    }

    pub fn wait(&mut self, connection: usize, id: u64, limit: Duration) -> Outcome {
        let answer = self.ask(&format!("wait {connection} {id} {}", limit.as_millis()));
        match answer.split_once(' ').unwrap_or((&answer, "")) {
            ("done", total) => Outcome::Done(total.parse().unwrap()),
            ("error", why) => Outcome::Failed(why.to_owned()),
            _ => Outcome::Pending,
        }
    }

    /// [`local::signal`] to it.
    pub fn signal(&self, signal: i32) {
        local::signal(&self.child, signal);
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn log_len(&self) -> u64 {
        std::fs::metadata(&self.log).map_or(0, |m| m.len())
    }

    /// Whether it still runs.
    pub fn lives(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Asks it to end; whether it ended well within the limit.
    pub fn end(mut self, limit: Duration) -> bool {
        self.tell("end");
        until(limit, || !self.lives()) && self.child.wait().is_ok_and(|status| status.success())
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.log);
    }
}

pub fn text_of(item: &FifoItem) -> String {
    item.to_bytes().iter().map(|b| format!("{b:02x}")).collect()
}

pub fn item_of(text: &str) -> FifoItem {
    FifoItem::from_bytes(&std::array::from_fn(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()))
}

// ---- the inside of it ----

/// Set: buffers are in memory files, which an engine with UCCL_TCPX_EMULATE_DEVICE=1 can share like GPU memory.
pub const SHARED_MEMORY: &str = "UCCL_TEST_SHARED_MEMORY";

/// Memory of a buffer.
pub enum Bytes {
    Heap(Vec<u8>),
    File { at: *mut u8, len: usize, fd: Arc<OwnedFd> },
}

/// A mapping of a memory file from `offset` on, at `at` where that is not null.
fn map(fd: &OwnedFd, offset: usize, len: usize, at: *mut u8) -> *mut u8 {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | if at.is_null() { 0 } else { libc::MAP_FIXED };
    // SAFETY: where the kernel chooses, or instead of a mapping of this test.
    let got = unsafe { libc::mmap(at.cast(), len, access, flags, fd.as_raw_fd(), offset as i64) };
    assert_ne!(got, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    got.cast()
}

fn memory_file(len: usize) -> Arc<OwnedFd> {
    // SAFETY: a terminated name, a fresh descriptor.
    unsafe {
        let fd = libc::memfd_create(c"test-gpu".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        let fd = OwnedFd::from_raw_fd(fd);
        assert_eq!(libc::ftruncate(fd.as_raw_fd(), len as i64), 0);
        Arc::new(fd)
    }
}

impl Bytes {
    pub fn new(len: usize, fill: u8) -> Bytes {
        if std::env::var(SHARED_MEMORY).as_deref() != Ok("1") {
            return Bytes::Heap(vec![fill; len]);
        }
        Bytes::shared(len, fill)
    }

    /// A memory file of its own.
    pub fn shared(len: usize, fill: u8) -> Bytes {
        let fd = memory_file(len);
        Bytes::of_file(&fd, 0, len, fill)
    }

    fn of_file(fd: &Arc<OwnedFd>, offset: usize, len: usize, fill: u8) -> Bytes {
        let at = map(fd, offset, len, std::ptr::null_mut());
        // SAFETY: the mapping just made.
        unsafe { at.write_bytes(fill, len) };
        Bytes::File { at, len, fd: fd.clone() }
    }

    /// Parts of one memory file, none adjacent to another.
    fn many(count: usize, len: usize, fill: u8) -> Vec<Bytes> {
        let fd = memory_file(2 * count * len);
        (0..count).map(|i| Bytes::of_file(&fd, 2 * i * len, len, fill)).collect()
    }

    /// Memory that is mapped nowhere else, not even by the kernel; `None` where there is none.
    fn secret(len: usize, fill: u8) -> Option<Bytes> {
        // SAFETY: a plain system call, whose result is fresh.
        let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, 0) };
        if fd < 0 {
            return None;
        }
        // SAFETY: as above.
        let fd = Arc::new(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        // SAFETY: a plain system call.
        assert_eq!(unsafe { libc::ftruncate(fd.as_raw_fd(), len as i64) }, 0);
        Some(Bytes::of_file(&fd, 0, len, fill))
    }

    /// Takes away the page at an offset; who reads it waits until the descriptor is closed, and finds zeros. `None` where this user may not.
    fn keep_from(&self, offset: usize) -> Option<OwnedFd> {
        const API: libc::Ioctl = 0xC018_AA3F_u32 as libc::Ioctl;
        const REGISTER: libc::Ioctl = 0xC020_AA00_u32 as libc::Ioctl;
        const MISSING: u64 = 1;
        let Bytes::File { at, fd: file, .. } = self else { return None };
        let page = *at as u64 + offset as u64 / 4096 * 4096;
        // SAFETY: a page of our mapping, and structures as the kernel's userfaultfd.h has them.
        unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK);
            if fd < 0 {
                return None;
            }
            let fd = OwnedFd::from_raw_fd(fd as i32);
            let (mut api, mut range) = ([0xAAu64, 0, 0], [page, 4096, MISSING, 0]);
            let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let done = libc::ioctl(fd.as_raw_fd(), API, api.as_mut_ptr()) == 0
                && libc::ioctl(fd.as_raw_fd(), REGISTER, range.as_mut_ptr()) == 0
                && libc::fallocate(file.as_raw_fd(), hole, (page - *at as u64) as i64, 4096) == 0;
            done.then_some(fd)
        }
    }

    /// Another memory file at the same place.
    pub fn replace(&mut self, fill: u8) {
        let Bytes::File { at, len, fd: own } = self else { panic!("no memory file") };
        let fd = memory_file(*len);
        map(&fd, 0, *len, *at);
        // SAFETY: the mapping just made.
        unsafe { at.write_bytes(fill, *len) };
        *own = fd;
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Heap(bytes) => bytes,
            // SAFETY: our mapping.
            Bytes::File { at, len, .. } => unsafe { std::slice::from_raw_parts(std::hint::black_box(*at), *len) },
        }
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        if let Bytes::File { at, len, .. } = self {
            // SAFETY: our mapping.
            unsafe { libc::munmap(at.cast(), *len) };
        }
    }
}

/// Mappings of other processes' memory files in this process.
pub fn mappings() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("/memfd:test-gpu") && line.contains("r--s")).count()
}

struct Buffer {
    mr: u64,
    /// None once it was freed.
    bytes: Option<Bytes>,
    /// Its content when it was deregistered.
    last: Option<Vec<u8>>,
}

/// The application has given it back and watches it.
fn given_back(b: &Buffer) -> bool {
    b.bytes.is_some() && b.last.is_some()
}

struct Inside {
    engine: Arc<Engine>,
    /// None once it was closed.
    connections: Arc<Mutex<Vec<Option<Arc<Connection>>>>>,
    buffers: Vec<Buffer>,
    /// Transfers that were started.
    transfers: usize,
    /// Where lines of the log wait, and where they went before.
    held: Option<(OwnedFd, OwnedFd)>,
    /// Descriptors that the application has taken.
    taken: Vec<std::fs::File>,
    /// Keeps a page from being there.
    keeper: Option<OwnedFd>,
}

/// Replaces standard error by a full pipe: a thread that logs a line blocks. Returns the pipe's other end and the old descriptor.
fn hold_the_log() -> (OwnedFd, OwnedFd) {
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors; all that come are fresh.
    unsafe {
        let before = OwnedFd::from_raw_fd(libc::fcntl(libc::STDERR_FILENO, libc::F_DUPFD_CLOEXEC, 3));
        assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK), 0);
        let (out, inn) = (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]));
        while libc::write(inn.as_raw_fd(), [b'.'; 4096].as_ptr().cast(), 4096) > 0 {}
        while libc::write(inn.as_raw_fd(), [b'.'].as_ptr().cast(), 1) > 0 {}
        assert_eq!(libc::fcntl(inn.as_raw_fd(), libc::F_SETFL, 0), 0);
        assert_eq!(libc::dup2(inn.as_raw_fd(), libc::STDERR_FILENO), libc::STDERR_FILENO);
        (out, before)
    }
}

/// Restores standard error, and unblocks waiting writers.
fn let_the_log_go((out, before): (OwnedFd, OwnedFd)) {
    // SAFETY: plain system calls on open descriptors, into memory of this call.
    unsafe {
        assert_eq!(libc::dup2(before.as_raw_fd(), libc::STDERR_FILENO), libc::STDERR_FILENO);
        let mut some = [0u8; 4096];
        for _ in 0..100 {
            while libc::read(out.as_raw_fd(), some.as_mut_ptr().cast(), some.len()) > 0 {}
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The body of a victim's process; returns at once in the test's own process.
pub fn serve(test: &str, change: impl FnOnce(Config) -> Config) {
    if std::env::var(CHILD).as_deref() != Ok(test) {
        return;
    }
    let engine = Engine::new(change(config())).unwrap();
    println!("= {}", port(&engine));
    let mut inside = Inside {
        engine,
        connections: Arc::default(),
        buffers: Vec::new(),
        transfers: 0,
        held: None,
        taken: Vec::new(),
        keeper: None,
    };
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        if line == "end" {
            break;
        }
        let words: Vec<&str> = line.split(' ').collect();
        println!("= {}", inside.obey(&words).unwrap_or_else(|e| format!("error {e}")));
    }
    inside.connections.lock().unwrap().clear();
    inside.engine.shutdown();
}

impl Inside {
    fn accept(&self) {
        let (engine, connections) = (self.engine.clone(), self.connections.clone());
        std::thread::spawn(move || {
            while let Ok(connection) = engine.accept() {
                connections.lock().unwrap().push(Some(connection));
            }
        });
    }

    fn connection(&self, n: usize) -> Arc<Connection> {
        self.connections.lock().unwrap()[n].clone().expect("a connection that was not closed")
    }

    fn whole(&self, n: usize, len: usize) -> LocalSegment {
        let buffer = &self.buffers[n];
        LocalSegment { mr: buffer.mr, addr: buffer.bytes.as_ref().map_or(0, |b| b.as_ptr() as usize), len }
    }

    fn obey(&mut self, words: &[&str]) -> Result<String, Box<dyn std::error::Error>> {
        let n = |i: usize| words.get(i).and_then(|w| w.parse::<usize>().ok()).unwrap_or(0);
        Ok(match words[0] {
            "accept" => {
                self.accept();
                "accepting".to_owned()
            }
            "connect" => {
                let connection = self.engine.connect(words[1], "", n(2) as u16)?;
                let mut all = self.connections.lock().unwrap();
                all.push(Some(connection));
                (all.len() - 1).to_string()
            }
            "connections" => self.connections.lock().unwrap().len().to_string(),
            "buffer" => {
                let bytes = Bytes::new(n(1), n(2) as u8);
                let mr = self.engine.register(bytes.as_ptr() as usize, bytes.len())?;
                let item = self.engine.fifo_item(mr, bytes.as_ptr() as usize, bytes.len())?;
                self.buffers.push(Buffer { mr, bytes: Some(bytes), last: None });
                format!("{} {}", self.buffers.len() - 1, text_of(&item))
            }
            direction @ ("write" | "read") => {
                let direction = if direction == "write" { Direction::Write } else { Direction::Read };
                let pair = (self.whole(n(2), n(3)), item_of(words[4]));
                let connection = self.connection(n(1));
                self.transfers += 1;
                // Either way in turns.
                let id = if self.transfers % 2 == 0 {
                    connection.transfer(direction, std::iter::once(pair))?
                } else {
                    connection.transfer_list(direction, &List::new(1, std::iter::once((pair.0, &pair.1)))?)?
                };
                id.to_string()
            }
            // So many writes of a buffer, one after the other.
            "writes" => {
                let (pair, connection) = ((self.whole(n(2), n(3)), item_of(words[4])), self.connection(n(1)));
                for _ in 0..n(5) {
                    let id = connection.transfer(Direction::Write, std::iter::once(pair))?;
                    assert!(connection.wait(id, None)?.complete);
                }
                "written".to_owned()
            }
            "send" => self.connection(n(1)).send(std::iter::once(self.whole(n(2), n(3))))?.to_string(),
            "recv" => self.connection(n(1)).recv(self.whole(n(2), n(3)))?.to_string(),
            "wait" => match self.connection(n(1)).wait(n(2) as u64, Some(Duration::from_millis(n(3) as u64))) {
                Ok(state) if state.complete => format!("done {}", state.bytes_total),
                Ok(_) => "pending".to_owned(),
                Err(e) => format!("error {e}"),
            },
            "status" => self.connection(n(1)).status().map_or_else(|e| format!("error {e}"), |()| "up".to_owned()),
            "close" => {
                drop(self.connections.lock().unwrap()[n(1)].take());
                "closed".to_owned()
            }
            "notify" => {
                self.connection(n(1)).notify(b"victim", &vec![7; n(2)])?;
                "queued".to_owned()
            }
            "drain" => std::iter::from_fn(|| self.engine.next_notification()).count().to_string(),
            // Whether the first bytes of a buffer are all of this value.
            "holds" => {
                let buffer = &self.buffers[n(1)];
                let bytes = buffer.bytes.as_deref().or(buffer.last.as_deref()).unwrap_or(&[]);
                bytes[..n(2).min(bytes.len())].iter().all(|&b| b == n(3) as u8).to_string()
            }
            give_back @ ("destroy" | "free") => {
                let buffer = &mut self.buffers[n(1)];
                self.engine.deregister(buffer.mr)?;
                buffer.last = buffer.bytes.as_deref().map(<[u8]>::to_vec);
                if give_back == "free" {
                    buffer.bytes = None;
                }
                "given back".to_owned()
            }
            "hold-log" => {
                self.held = Some(hold_the_log());
                "held".to_owned()
            }
            "let-log-go" => {
                if let Some(held) = self.held.take() {
                    let_the_log_go(held);
                }
                "let go".to_owned()
            }
            // New memory at a buffer's address, registered again.
            "replace" => {
                let buffer = &mut self.buffers[n(1)];
                self.engine.deregister(buffer.mr)?;
                let Some(bytes) = &mut buffer.bytes else { panic!("a buffer that was freed") };
                bytes.replace(n(2) as u8);
                buffer.mr = self.engine.register(bytes.as_ptr() as usize, bytes.len())?;
                text_of(&self.engine.fifo_item(buffer.mr, bytes.as_ptr() as usize, bytes.len())?)
            }
            // Separate allocations in one memory file.
            "allocations" => {
                for bytes in Bytes::many(n(1), n(2), n(3) as u8) {
                    let mr = self.engine.register(bytes.as_ptr() as usize, bytes.len())?;
                    self.buffers.push(Buffer { mr, bytes: Some(bytes), last: None });
                }
                self.buffers.len().to_string()
            }
            "item" => {
                let Buffer { mr, bytes: Some(bytes), .. } = &self.buffers[n(1)] else { panic!("a buffer that was freed") };
                text_of(&self.engine.fifo_item(*mr, bytes.as_ptr() as usize, bytes.len())?)
            }
            // A buffer that this process reads and writes, and that the kernel gives to no other one.
            "secret" => {
                let Some(bytes) = Bytes::secret(n(1), n(2) as u8) else { return Ok("none".to_owned()) };
                let mr = self.engine.register(bytes.as_ptr() as usize, bytes.len())?;
                let item = self.engine.fifo_item(mr, bytes.as_ptr() as usize, bytes.len())?;
                self.buffers.push(Buffer { mr, bytes: Some(bytes), last: None });
                format!("{} {}", self.buffers.len() - 1, text_of(&item))
            }
            // A buffer whose middle page is not there until "let-page-come": the kernel waits where it reads that for another process.
            "absent-page" => {
                let bytes = Bytes::shared(n(1), n(2) as u8);
                let mr = self.engine.register(bytes.as_ptr() as usize, bytes.len())?;
                let Some(keeper) = bytes.keep_from(n(1) / 2) else { return Ok("none".to_owned()) };
                self.keeper = Some(keeper);
                self.buffers.push(Buffer { mr, bytes: Some(bytes), last: None });
                (self.buffers.len() - 1).to_string()
            }
            "let-page-come" => {
                self.keeper = None;
                "let come".to_owned()
            }
            // The application takes all descriptors that there are, and gives them back.
            "exhaust" => {
                self.taken.extend(std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()));
                self.taken.len().to_string()
            }
            "relent" => {
                self.taken.clear();
                "given back".to_owned()
            }
            // Channels that were lost, and that came back.
            "losses" => {
                let totals = self.connection(n(1)).stats()?.totals;
                format!("{} {}", totals.lost_channels, totals.restored_channels)
            }
            "descriptors" => descriptors(std::process::id()).to_string(),
            // Bytes and chunks that each kind of channel has sent and received: "NIC sent received".
            "carried" => {
                let stats = self.connection(n(1)).stats()?;
                let local = stats.channels.iter().filter(|c| c.nic == "local");
                let (sent, received) = local.fold((0, 0), |(s, r), c| (s + c.sent_bytes, r + c.received_bytes));
                let all = |f: fn(&uccl_p2p::stats::ChannelStats) -> u64| stats.channels.iter().map(f).sum::<u64>();
                let (out, inn) = (all(|c| c.sent_bytes) - sent, all(|c| c.received_bytes) - received);
                format!("{sent} {received} {out} {inn}")
            }
            // What the allocator keeps for itself goes back to the system.
            "trim" => {
                // SAFETY: touches free memory only.
                #[cfg(target_env = "gnu")]
                unsafe {
                    libc::malloc_trim(0)
                };
                "trimmed".to_owned()
            }
            "mappings" => mappings().to_string(),
            // Mappings of buffers of staged transfers: this process's own, and other processes'.
            "areas" => {
                let maps = std::fs::read_to_string("/proc/self/maps")?;
                maps.lines().filter(|line| line.contains("/memfd:uccl-area")).count().to_string()
            }
            // How many buffers have changed since they were given back.
            "changed" => {
                self.buffers.iter().filter(|b| given_back(b) && b.bytes.as_deref() != b.last.as_deref()).count().to_string()
            }
            // The same, and nothing is kept of them.
            "forget" => {
                let changed = self.buffers.iter().filter(|b| given_back(b) && b.bytes.as_deref() != b.last.as_deref()).count();
                for buffer in self.buffers.iter_mut().filter(|b| given_back(b)) {
                    (buffer.bytes, buffer.last) = (None, None);
                }
                changed.to_string()
            }
            other => panic!("{other}"),
        })
    }
}
