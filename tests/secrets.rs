//! What a core dump of a process with engines tells about its keys. A child process makes two engines with a key file and connects them;
//! this process searches the child's memory, and then its core, for the key, for what is derived from it, and for copies of anything that
//! the child keeps in memory that core dumps leave out.

mod local;

use local::port;
use std::collections::{HashMap, HashSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use uccl_p2p::config::Config;
use uccl_p2p::engine::{Direction, Engine, LocalSegment};
use uccl_p2p::types::Protect;

/// Names the directory of a child process, and is not set in the test's own process.
const CHILD: &str = "UCCL_TEST_CHILD";
/// Bytes that are compared: half of a key, and one round key of AES.
const PART: usize = 16;

// ---- the child ----

fn config(dir: &Path) -> Config {
    Config {
        auth_key_file: Some(dir.join("keys")),
        protect: Protect::Encrypt,
        num_channels: Some(2),
        // Data goes over channels too.
        eager_bytes: 0,
        ..local::config()
    }
}

/// As a test of its own it does nothing. In a child it makes two engines, connects them in both directions and moves data, says so, and
/// waits; at the end of its input it aborts.
#[test]
fn engines_of_a_child() {
    let Some(dir) = std::env::var_os(CHILD).map(PathBuf::from) else { return };
    std::env::set_current_dir(&dir).unwrap();
    let engines = [(); 2].map(|()| Engine::new(config(&dir)).unwrap());
    println!("= created");
    let mut stdin = std::io::stdin().lock();
    let mut line = String::new();
    stdin.read_line(&mut line).unwrap();
    let mut kept = Vec::new();
    for (from, to) in [(&engines[0], &engines[1]), (&engines[1], &engines[0])] {
        let (out, inc) = local::pair(from, to);
        let memory = [vec![7u8; 1 << 20], vec![0u8; 1 << 20]];
        let regions = [(from, &memory[0]), (to, &memory[1])].map(|(e, m)| e.register(m.as_ptr() as usize, m.len()).unwrap());
        let item = to.fifo_item(regions[1], memory[1].as_ptr() as usize, 1 << 20).unwrap();
        let local = LocalSegment { mr: regions[0], addr: memory[0].as_ptr() as usize, len: 1 << 20 };
        let id = out.transfer(Direction::Write, std::iter::once((local, item))).unwrap();
        assert!(out.wait(id, None).unwrap().complete && memory[0] == memory[1]);
        out.notify(b"name", b"text").unwrap();
        assert!(local::until(std::time::Duration::from_secs(10), || to.next_notification().is_some()));
        kept.push((out, inc, memory));
    }
    println!("= connected {}", port(&engines[0]));
    stdin.read_to_string(&mut line).unwrap();
    std::process::abort();
}

struct Subject {
    child: Child,
    /// What its key file holds. Random: a constant would stand in the program.
    key: String,
    input: Option<ChildStdin>,
    output: std::io::Lines<BufReader<std::process::ChildStdout>>,
    dir: PathBuf,
}

impl Subject {
    fn start(name: &str) -> Subject {
        let dir = std::env::temp_dir().join(format!("uccl-secrets-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let mut random = [0u8; 20];
        getrandom::fill(&mut random).unwrap();
        let key: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        std::fs::write(dir.join("keys"), format!("only:{key}\n")).unwrap();
        std::fs::set_permissions(dir.join("keys"), PermissionsExt::from_mode(0o600)).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["engines_of_a_child", "--exact", "--nocapture", "--test-threads=1"]).env(CHILD, &dir);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        Subject { key, input: child.stdin.take(), child, output, dir }
    }

    /// Waits until the child has come so far.
    fn until(&mut self, what: &str) {
        let found = self.output.any(|line| line.unwrap().contains(&format!("= {what}")));
        assert!(found, "the child ended before it was {what}");
    }

    fn go_on(&mut self) {
        self.input.as_mut().unwrap().write_all(b"\n").unwrap();
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        let _ = (self.child.kill(), self.child.wait());
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

// ---- its memory ----

struct Mapping {
    from: u64,
    to: u64,
    name: String,
    /// Core dumps leave it out.
    hidden: bool,
}

fn mappings(process: u32) -> Vec<Mapping> {
    let text = std::fs::read_to_string(format!("/proc/{process}/smaps")).unwrap();
    let mut all: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((from, to)) = first.split_once('-') {
            let address = |hex| u64::from_str_radix(hex, 16);
            if let (Ok(from), Ok(to)) = (address(from), address(to)) {
                let name = words.nth(4).unwrap_or_default().to_owned();
                all.push(Mapping { from, to, name, hidden: false });
            }
        } else if let (Some(flags), Some(mapping)) = (line.strip_prefix("VmFlags:"), all.last_mut()) {
            mapping.hidden = flags.split_whitespace().any(|flag| flag == "dd");
        }
    }
    all
}

/// The readable parts of a process's memory: those that core dumps leave out, or the others.
fn memory(process: u32, hidden: bool) -> Vec<(String, Vec<u8>)> {
    let file = std::fs::File::open(format!("/proc/{process}/mem")).unwrap();
    let wanted = |m: &Mapping| m.hidden == hidden && !m.name.starts_with("[v");
    let read = |m: Mapping| {
        let mut bytes = vec![0; (m.to - m.from) as usize];
        if file.read_exact_at(&mut bytes, m.from).is_err() {
            for (at, page) in (m.from..m.to).step_by(4096).zip(bytes.chunks_mut(4096)) {
                // Pages that cannot be read, guard pages among them, hold nothing.
                if file.read_exact_at(page, at).is_err() {
                    page.fill(0);
                }
            }
        }
        (format!("{:x}-{:x} {}", m.from, m.to, m.name), bytes)
    };
    mappings(process).into_iter().filter(wanted).map(read).collect()
}

/// A set of small numbers.
struct Starts(Vec<bool>);

impl Default for Starts {
    fn default() -> Starts {
        Starts(vec![false; 1 << 16])
    }
}

/// Parts of secrets, with what they are.
#[derive(Default)]
struct Wanted {
    parts: HashMap<[u8; PART], String>,
    /// The first bytes of the parts, as a set.
    starts: Starts,
}

impl Wanted {
    fn add(&mut self, what: &str, part: &[u8]) {
        let part = *part.first_chunk().unwrap();
        self.starts.0[usize::from(u16::from_le_bytes([part[0], part[1]]))] = true;
        self.parts.entry(part).or_insert_with(|| what.to_owned());
    }

    /// A secret, at the offsets where libraries would keep its parts.
    fn secret(&mut self, what: &str, bytes: &[u8]) {
        bytes.chunks_exact(PART).for_each(|part| self.add(what, part));
        // A hash keeps its state as numbers.
        let swapped: Vec<u8> = bytes.chunks_exact(4).flat_map(|w| [w[3], w[2], w[1], w[0]]).collect();
        swapped.chunks_exact(PART).for_each(|part| self.add(&format!("{what}, as a hash keeps it"), part));
    }

    /// What looks random in memory that core dumps leave out.
    fn hidden(&mut self, process: u32) -> usize {
        let before = self.parts.len();
        for (name, bytes) in memory(process, true) {
            for (i, part) in bytes.chunks_exact(PART).enumerate() {
                if part.iter().collect::<HashSet<_>>().len() >= 12 && part.iter().filter(|&&b| b == 0).count() <= 1 {
                    self.add(&format!("hidden memory {name} + {:#x}", i * PART), part);
                }
            }
        }
        self.parts.len() - before
    }

    /// Where parts of secrets stand in these bytes.
    fn found(&self, place: &str, bytes: &[u8]) -> Vec<String> {
        let mut found = Vec::new();
        for (at, part) in bytes.windows(PART).enumerate() {
            if self.starts.0[usize::from(u16::from_le_bytes([part[0], part[1]]))] {
                if let Some(what) = part.first_chunk().and_then(|part| self.parts.get(part)) {
                    found.push(format!("{what}: at {place} + {at:#x}"));
                }
            }
        }
        found
    }
}

/// The key, and what is derived from it.
fn of_the_key(key: &str) -> Wanted {
    use ring::hmac::{sign, Key, HMAC_SHA256};
    let mut wanted = Wanted::default();
    wanted.secret("the key", key.as_bytes());
    let prk = sign(&Key::new(HMAC_SHA256, b"uccl pre-shared key"), key.as_bytes());
    wanted.secret("the pseudo-random key", prk.as_ref());
    for info in ["noise", "selector"] {
        let derived = sign(&Key::new(HMAC_SHA256, prk.as_ref()), &[info.as_bytes(), &[1]].concat());
        wanted.secret(&format!("the key for {info}"), derived.as_ref());
    }
    wanted
}

fn none_found(stage: &str, found: &[String]) {
    let shown = &found[..found.len().min(20)];
    assert!(found.is_empty(), "{stage}: {} parts of secrets, among them\n{}", found.len(), shown.join("\n"));
}

fn search(process: u32, wanted: &Wanted, stage: &str) {
    let dumped = memory(process, false);
    let bytes: usize = dumped.iter().map(|(_, bytes)| bytes.len()).sum();
    println!("{stage}: {} parts of secrets, {} MiB of memory", wanted.parts.len(), bytes >> 20);
    // The search can find something.
    let mut known = Wanted::default();
    known.add("the name of the test", b"engines_of_a_child");
    assert!(dumped.iter().any(|(place, bytes)| !known.found(place, bytes).is_empty()));
    let found: Vec<String> = dumped.iter().flat_map(|(place, bytes)| wanted.found(place, bytes)).collect();
    none_found(stage, &found);
}

#[test]
fn no_secret_lies_in_memory_that_core_dumps_contain() {
    let mut subject = Subject::start("memory");
    let process = subject.child.id();
    let mut wanted = of_the_key(&subject.key);
    subject.until("created");
    assert!(wanted.hidden(process) > 0, "the engines keep their keys somewhere");
    search(process, &wanted, "with engines");
    subject.go_on();
    subject.until("connected");
    assert!(wanted.hidden(process) > 20, "the connections keep their keys somewhere");
    search(process, &wanted, "with connections");
}

/// The core of a child that aborts, if this machine writes one beside it.
fn core(subject: &mut Subject) -> Option<Vec<u8>> {
    subject.input = None;
    let status = subject.child.wait().unwrap();
    assert_eq!(status.signal(), Some(libc::SIGABRT));
    let files = std::fs::read_dir(&subject.dir).unwrap().map(|file| file.unwrap().path());
    let is_core = |path: &PathBuf| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("core"));
    let file = files.into_iter().find(is_core);
    if file.is_none() {
        let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap_or_default();
        println!("SKIPPED: the kernel wrote no core beside the process (ulimit -c, core_pattern {:?})", pattern.trim());
    }
    Some(std::fs::read(file?).unwrap())
}

#[test]
fn no_secret_lies_in_a_core() {
    let unlimited = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: a readable rlimit. Children inherit it.
    unsafe { libc::setrlimit(libc::RLIMIT_CORE, &unlimited) };
    let mut subject = Subject::start("core");
    subject.until("created");
    subject.go_on();
    subject.until("connected");
    let mut wanted = of_the_key(&subject.key);
    assert!(wanted.hidden(subject.child.id()) > 20);
    let Some(core) = core(&mut subject) else { return };
    println!("a core of {} MiB", core.len() >> 20);
    none_found("the core", &wanted.found("core", &core));
}
