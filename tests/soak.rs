//! A kill storm with everything at random: configurations, sizes, operations, and how a peer goes. One process of an arena survives its
//! peers; all that it promised is checked after each of them. scripts/soak runs it.

mod victim;

use std::collections::BTreeMap;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use victim::{descriptors, resident, text_of, threads, until, Outcome, Rng, Victim};

/// All deadlines of the processes, and how much longer a loaded machine may take.
const TIMEOUT_MS: &str = "1500";
const LIMIT: Duration = Duration::from_secs(20);
/// Rounds that one survivor lives for.
const LIFE: usize = 12;
/// What the survivor may hold more at its end than after its first rounds.
const DESCRIPTORS: usize = 6;
const THREADS: usize = 2;
const MEGABYTES: usize = 48;

#[test]
fn soak_process() {
    victim::serve("soak_process", |config| config);
}

/// 1 byte to 8 MiB, each size class as often.
fn size(rng: &mut Rng) -> usize {
    let most = 1usize << rng.below(24);
    1 + rng.below(most)
}

#[derive(Default)]
struct Counts(BTreeMap<&'static str, u64>);

/// Anything else than 0 of these is a failure.
const BAD: [&str; 7] =
    ["hangs", "wrong bytes", "late writes", "leaked descriptors", "leaked threads", "leaked memory", "processes that broke"];

impl Counts {
    fn add(&mut self, what: &'static str, n: u64) {
        *self.0.entry(what).or_default() += n;
    }
}

static COUNTS: Mutex<Counts> = Mutex::new(Counts(BTreeMap::new()));

fn count(what: &'static str, n: u64) {
    COUNTS.lock().unwrap_or_else(|e| e.into_inner()).add(what, n);
}

fn bad(what: &'static str, why: &str) {
    println!("{what}: {why}");
    count(what, 1);
}

/// The contract of the strict foreign plugin: the given one, else either. It draws in any case, for a seed to repeat all other choices.
fn contract(rng: &mut Rng, given: Option<String>) -> &'static str {
    let drawn = *rng.pick(&["tcpx", "tcpxo"]);
    match given.as_deref() {
        None => drawn,
        Some("tcpx") => "tcpx",
        Some("tcpxo") => "tcpxo",
        Some(other) => panic!("STRICT_FOREIGN_CONTRACT={other}: expected tcpx or tcpxo"),
    }
}

#[test]
fn a_given_contract_is_kept() {
    let mut rng = Rng(1);
    let mut drawn = |given: Option<&str>| (0..64).map(|_| contract(&mut rng, given.map(str::to_owned))).collect::<Vec<_>>();
    for given in ["tcpx", "tcpxo"] {
        assert!(drawn(Some(given)).iter().all(|&one| one == given));
    }
    let either = drawn(None);
    assert!(either.contains(&"tcpx") && either.contains(&"tcpxo"));
}

/// A configuration that both processes share.
fn configuration(rng: &mut Rng) -> Vec<(&'static str, String)> {
    let mut all = vec![
        ("UCCL_TCPX_TRANSFER_TIMEOUT_MS", TIMEOUT_MS.to_owned()),
        ("UCCL_TCPX_PEER_TIMEOUT_MS", TIMEOUT_MS.to_owned()),
        ("UCCL_TCPX_MATCH_TIMEOUT_MS", TIMEOUT_MS.to_owned()),
        ("UCCL_TCPX_CLOSE_TIMEOUT_MS", TIMEOUT_MS.to_owned()),
        ("UCCL_TCPX_NUM_CHANNELS", (1 + rng.below(16)).to_string()),
        ("UCCL_TCPX_VECTORED", rng.below(2).to_string()),
        ("UCCL_TCPX_CHUNK_BYTES", rng.pick(&["4096", "65536", "524288"]).to_string()),
        ("UCCL_TCPX_EAGER_BYTES", rng.pick(&["0", "8192", "65536"]).to_string()),
        ("UCCL_P2P_LOG_LEVEL", "error".to_owned()),
        ("UCCL_P2P_DISABLE_IPC", u8::from(rng.below(4) == 0).to_string()),
        (victim::SHARED_MEMORY, rng.below(2).to_string()),
    ];
    if rng.below(2) == 0 {
        all.push(("UCCL_TCPX_EMULATE_DEVICE", "1".to_owned()));
        all.push(("UCCL_TCPX_STAGE_SENDS", rng.below(2).to_string()));
        all.push(("UCCL_TCPX_LOCAL_GPU", rng.pick(&["pull", "push"]).to_string()));
        all.push(("UCCL_TCPX_SOFT_FRAGMENT", "random".to_owned()));
    }
    match std::env::var("UCCL_SOAK_PLUGIN") {
        Ok(path) if rng.below(3) == 0 => all.push(("UCCL_TCPX_PLUGIN_PATH", path)),
        _ => {}
    }
    // The strict foreign plugin, as TCPX or as TCPXO, which end the process at a breach of their contract.
    match std::env::var("UCCL_SOAK_FOREIGN") {
        Ok(path) if rng.below(3) == 0 => {
            let set = [("UCCL_TCPX_EMULATE_DEVICE", "1"), ("UCCL_P2P_DISABLE_IPC", "1"), ("UCCL_TCPX_PLUGIN_PATH", &path)];
            let quick = [("STRICT_FOREIGN_CONNECT_MS", "1"), ("STRICT_FOREIGN_ACCEPT_MS", "2")];
            let drawn = contract(rng, std::env::var("STRICT_FOREIGN_CONTRACT").ok());
            let given = set.into_iter().chain(quick).chain([("STRICT_FOREIGN_CONTRACT", drawn)]);
            all.retain(|(name, _)| !set.iter().any(|(given, _)| given == name));
            all.extend(given.map(|(name, value)| (name, value.to_owned())));
            count(if drawn == "tcpxo" { "configurations with simulated TCPXO" } else { "configurations with simulated TCPX" }, 1);
        }
        _ => {}
    }
    all
}

struct Running {
    id: u64,
    /// The buffer whose first bytes are then full of this, and whether it is the survivor's.
    target: Option<(usize, u8, bool)>,
    len: usize,
    what: String,
}

struct Arena {
    rng: Rng,
    survivor: Victim,
    /// Connections of the survivor so far.
    connections: usize,
    /// Its buffers that a peer may still write to.
    exposed: Vec<usize>,
}

impl Arena {
    /// Transfers of one process; `mine`: of the survivor, over its newest connection.
    fn start(&mut self, peer: &mut Victim, mine: bool) -> Vec<Running> {
        let mut all = Vec::new();
        for _ in 0..1 + self.rng.below(6) {
            let (len, fill) = (size(&mut self.rng), 1 + self.rng.below(250) as u8);
            let connection = if mine { self.connections - 1 } else { 0 };
            let (here, there) = if mine { (&mut self.survivor, &mut *peer) } else { (&mut *peer, &mut self.survivor) };
            let write = self.rng.below(2) == 0;
            let (local, _) = here.buffer(len, if write { fill } else { 0 });
            let (remote, item) = there.buffer(len, if write { 0 } else { fill });
            self.exposed.push(if mine { local } else { remote });
            let command = format!("{} {connection} {local} {len} {}", if write { "write" } else { "read" }, text_of(&item));
            if let Ok(id) = here.start_transfer(&command) {
                let target = if write { (remote, fill, !mine) } else { (local, fill, mine) };
                let what = format!("{} of {len} bytes by the {}", &command[..4], if mine { "survivor" } else { "peer" });
                all.push(Running { id, target: Some(target), len, what });
            }
        }
        if mine && self.rng.below(3) == 0 {
            let len = size(&mut self.rng);
            let (local, _) = self.survivor.buffer(len, 0);
            self.exposed.push(local);
            if let Ok(id) = self.survivor.start_transfer(&format!("recv {} {local} {len}", self.connections - 1)) {
                all.push(Running { id, target: None, len, what: "a receive".to_owned() });
            }
        }
        all
    }

    /// A peer comes, works, and goes in some way.
    fn round(&mut self, environment: &[(&str, &str)]) {
        let mut peer = Victim::start("soak_process", environment);
        peer.ask("accept");
        let theirs = self.rng.below(2) == 0;
        let (answer, connected) = if theirs {
            let answer = peer.ask(&format!("connect 127.0.0.1 {}", self.survivor.port));
            let connected = answer == "0" && until(LIMIT, || self.survivor.number("connections") > self.connections);
            (answer, connected)
        } else {
            let answer = self.survivor.ask(&format!("connect 127.0.0.1 {}", peer.port));
            let connected = !answer.starts_with("error") && until(LIMIT, || peer.number("connections") > 0);
            (answer, connected)
        };
        if !connected {
            let who = if theirs { "peer" } else { "survivor" };
            return bad("processes that broke", &format!("two healthy processes could not connect: the {who} got {answer:?}"));
        }
        self.connections += 1;
        let mut running = self.start(&mut peer, true);
        let theirs = self.start(&mut peer, false);
        if self.rng.below(3) > 0 {
            std::thread::sleep(Duration::from_micros(self.rng.below(20_000) as u64));
        }
        // Whether the peer can be asked about its memory, and about its transfers; whether nothing went wrong.
        let (mut alive, mut connected, mut undisturbed) = (false, false, false);
        match self.rng.below(10) {
            0..=5 => {
                peer.signal(libc::SIGKILL);
                count("kills", 1);
            }
            6 => {
                peer.signal(libc::SIGSTOP);
                count("freezes", 1);
            }
            7 => {
                peer.ask("close 0");
                count("closes by the peer", 1);
                alive = true;
            }
            8 => {
                // Memory goes while transfers use it.
                for buffer in self.exposed.drain(..) {
                    self.survivor.ask(&format!("destroy {buffer}"));
                }
                count("deregistrations in flight", 1);
                (alive, connected) = (true, true);
            }
            _ => {
                count("undisturbed", 1);
                (alive, connected, undisturbed) = (true, true, true);
            }
        }
        let start = Instant::now();
        let failed = self.settle(&mut running, alive.then_some(&mut peer), start);
        if undisturbed {
            count("undisturbed transfers that failed", failed);
        }
        if connected {
            self.theirs(theirs, &mut peer);
        }
        peer.signal(libc::SIGKILL);
        self.end_of_round(start);
    }

    /// All of the survivor's transfers end, with their bytes where they say so. How many failed that had a partner.
    fn settle(&mut self, running: &mut Vec<Running>, mut peer: Option<&mut Victim>, start: Instant) -> u64 {
        let mut failed = 0;
        let connection = self.connections - 1;
        for one in running.drain(..) {
            match self.survivor.wait(connection, one.id, LIMIT) {
                Outcome::Pending => bad("hangs", &format!("{} after {:?}", one.what, start.elapsed())),
                Outcome::Failed(_) => {
                    count("transfers that failed", 1);
                    failed += u64::from(one.target.is_some());
                }
                Outcome::Done(_) => {
                    count("transfers that were OK", 1);
                    let Some((buffer, fill, at_survivor)) = one.target else { continue };
                    let question = format!("holds {buffer} {} {fill}", one.len);
                    let holder = if at_survivor { Some(&mut self.survivor) } else { peer.as_deref_mut() };
                    check(holder, &question, &one);
                }
            }
        }
        failed
    }

    /// The peer's transfers, where it lives.
    fn theirs(&mut self, running: Vec<Running>, peer: &mut Victim) {
        for one in running {
            match peer.wait(0, one.id, LIMIT) {
                Outcome::Pending => bad("hangs", &format!("{} at the peer", one.what)),
                Outcome::Failed(_) => count("transfers that failed", 1),
                Outcome::Done(_) => {
                    count("transfers that were OK", 1);
                    let Some((buffer, fill, at_survivor)) = one.target else { continue };
                    let question = format!("holds {buffer} {} {fill}", one.len);
                    check(Some(if at_survivor { &mut self.survivor } else { peer }), &question, &one);
                }
            }
        }
    }

    fn end_of_round(&mut self, start: Instant) {
        // Memory released in the previous round has had time for a late write.
        self.late_writes();
        for buffer in self.exposed.drain(..) {
            self.survivor.ask(&format!("destroy {buffer}"));
        }
        let connection = self.connections - 1;
        self.survivor.ask(&format!("close {connection}"));
        if start.elapsed() > 3 * LIMIT {
            bad("hangs", &format!("the end of a round took {:?}", start.elapsed()));
        }
        count("rounds", 1);
    }

    fn late_writes(&mut self) {
        let late = self.survivor.number("forget");
        if late > 0 {
            bad("late writes", &format!("{late} buffers"));
        }
    }

    /// What the survivor holds: descriptors, threads, MB.
    fn holds(&mut self) -> (usize, usize, usize) {
        self.survivor.ask("trim");
        let process = self.survivor.id();
        (descriptors(process), threads(process), resident(process) / 1024)
    }
}

fn check(holder: Option<&mut Victim>, question: &str, one: &Running) {
    let Some(holder) = holder else { return };
    if holder.ask(question) == "true" {
        count("KiB compared", one.len as u64 / 1024);
    } else {
        bad("wrong bytes", &one.what);
    }
}

/// One survivor with its peers.
fn life(seed: u64, end: Instant) {
    let mut rng = Rng(seed | 1);
    for _ in 0..4 {
        rng.next();
    }
    let configuration = configuration(&mut rng);
    let environment: Vec<(&str, &str)> = configuration.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let mut survivor = Victim::start("soak_process", &environment);
    survivor.ask("accept");
    let mut arena = Arena { rng, survivor, connections: 0, exposed: Vec::new() };
    count("configurations", 1);
    let mut first = None;
    for round in 0..LIFE {
        if Instant::now() > end {
            break;
        }
        arena.round(&environment);
        if round == 2 {
            arena.late_writes();
            first = Some(arena.holds());
        }
    }
    arena.late_writes();
    if let Some(first) = first {
        let mut last = arena.holds();
        let small = until(Duration::from_secs(5), || {
            last = arena.holds();
            last.0 <= first.0 + DESCRIPTORS && last.1 <= first.1 + THREADS && last.2 <= first.2 + MEGABYTES
        });
        if !small && last.0 > first.0 + DESCRIPTORS {
            bad("leaked descriptors", &format!("{first:?} -> {last:?}, {configuration:?}"));
        }
        if !small && last.1 > first.1 + THREADS {
            bad("leaked threads", &format!("{first:?} -> {last:?}, {configuration:?}"));
        }
        if !small && last.2 > first.2 + MEGABYTES {
            bad("leaked memory", &format!("{first:?} -> {last:?}, {configuration:?}"));
        }
    }
    if !arena.survivor.end(LIMIT) {
        bad("hangs", "the survivor did not end well");
    }
}

#[test]
#[ignore = "scripts/soak runs it"]
fn kill_storm() {
    let number = |name: &str, default: u64| std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default);
    let (seconds, arenas) = (number("UCCL_SOAK_SECONDS", 20), number("UCCL_SOAK_ARENAS", 2));
    let seed = number("UCCL_SOAK_SEED", std::time::UNIX_EPOCH.elapsed().map_or(1, |t| t.as_nanos() as u64));
    println!("seed {seed}, {seconds} s, {arenas} arenas");
    let end = Instant::now() + Duration::from_secs(seconds);
    std::thread::scope(|s| {
        for arena in 0..arenas {
            s.spawn(move || {
                let mut number = arena + 1;
                while Instant::now() < end {
                    let seed = (seed ^ (number << 8)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                    if catch_unwind(AssertUnwindSafe(|| life(seed, end))).is_err() {
                        bad("processes that broke", "see above");
                    }
                    number += arenas;
                }
            });
        }
    });
    let counts = COUNTS.lock().unwrap_or_else(|e| e.into_inner());
    println!("| what | number |\n|---|---|");
    for (what, n) in counts.0.iter().filter(|(what, _)| !BAD.contains(what)) {
        println!("| {what} | {n} |");
    }
    let mut all = 0;
    for what in BAD {
        let n = counts.0.get(what).copied().unwrap_or(0);
        println!("| **{what}** | {n} |");
        all += n;
    }
    assert_eq!(all, 0, "something went wrong");
}
