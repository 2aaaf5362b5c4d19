//! Deterministic simulation of engines and the connections between them (`cluster`), in virtual time. Two engines are driven by a script of
//! random steps (`pair`), or one runs against a peer that speaks correct frames in wrong orders and lies about ids, lengths and
//! verdicts (`liar`): after every step the invariants of the protocol are checked with real bytes, and a failing script is minimised
//! and printed. Or the network moves what engines send, at its speed: between two (`paced`), or among a thousand (`scenarios`).
//!
//! UCCL_TCPX_SIMULATION_SEEDS: how many seeds (default 20,000); UCCL_TCPX_SIMULATION_FIRST: the first one (default 0).

mod cluster;
mod direct;
#[cfg(test)]
mod edges;
mod fabric;
mod liar;
mod net;
#[cfg(test)]
mod paced;
mod pair;
mod positions;
#[cfg(test)]
mod scenarios;
mod tcp;
mod world;

use pair::Faults;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, Ordering};

/// A step of a script: its kind, and numbers that each kind of step uses as it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Action {
    kind: u8,
    a: u32,
    b: u32,
}

/// A small generator that gives the same numbers for the same seed on every machine.
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
}

/// The kind of run that a seed selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Play {
    /// Two honest sides, no faults: everything succeeds.
    Healthy,
    /// Two honest sides, with faults.
    Faulty,
    /// Two honest sides that lose channels, but never the last one, and get them back, and whose control connection fails and is made
    /// again: everything succeeds.
    Lossy,
    /// A machine against a liar.
    Liar,
}

fn play_of(seed: u64) -> Play {
    match seed % 5 {
        0 => Play::Healthy,
        1 | 2 => Play::Faulty,
        3 => Play::Lossy,
        _ => Play::Liar,
    }
}

fn script_of(seed: u64) -> Vec<Action> {
    let mut rng = Rng::new(seed);
    let steps = 20 + rng.below(220);
    (0..steps).map(|_| Action { kind: rng.next() as u8, a: rng.next() as u32, b: rng.next() as u32 }).collect()
}

/// Plays a script; the error says what went wrong.
fn play(seed: u64, script: &[Action]) -> Result<(), String> {
    let result = catch_unwind(AssertUnwindSafe(|| match play_of(seed) {
        Play::Healthy => pair::play(seed, script, Faults::None),
        Play::Lossy => pair::play(seed, script, Faults::Channels),
        Play::Faulty => pair::play(seed, script, Faults::All),
        Play::Liar => liar::play(seed, script),
    }));
    result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(format!("panic: {}", text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default()))
    })
}

/// A machine with transfers of its own against a peer that `data` directs, either as a script of the liar's steps or as its raw
/// control connection. The error says what went wrong.
///
/// `data`: which of the two, the seed, then 9 bytes a step or the stream.
#[cfg(fuzzing)]
pub(crate) fn attacked(data: &[u8]) -> Result<(), String> {
    let Some((&[raw, seed], rest)) = data.split_first_chunk::<2>() else { return Ok(()) };
    if raw % 2 == 1 {
        return liar::recite(seed.into(), rest);
    }
    let word = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    let script: Vec<Action> = rest.chunks_exact(9).map(|b| Action { kind: b[0], a: word(&b[1..]), b: word(&b[5..]) }).collect();
    liar::play(seed.into(), &script)
}

/// Drops every step that the script does not need to fail.
fn minimise(seed: u64, mut script: Vec<Action>) -> Vec<Action> {
    let mut size = script.len() / 2;
    while size > 0 {
        let mut at = 0;
        while at < script.len() {
            let mut shorter = script.clone();
            shorter.drain(at..(at + size).min(script.len()));
            if play(seed, &shorter).is_err() {
                script = shorter;
            } else {
                at += size;
            }
        }
        size /= 2;
    }
    script
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

#[test]
fn no_seed_breaks_an_invariant() {
    let first = number("UCCL_TCPX_SIMULATION_FIRST", 0);
    let end = first + number("UCCL_TCPX_SIMULATION_SEEDS", 20_000);
    let next = AtomicU64::new(first);
    let failed = AtomicU64::new(u64::MAX);
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= end || failed.load(Ordering::Relaxed) != u64::MAX {
                    return;
                }
                if play(seed, &script_of(seed)).is_err() {
                    failed.fetch_min(seed, Ordering::Relaxed);
                }
            });
        }
    });
    let seed = failed.load(Ordering::Relaxed);
    if seed == u64::MAX {
        std::panic::set_hook(quiet);
        return;
    }
    let script = minimise(seed, script_of(seed));
    let why = play(seed, &script).unwrap_err();
    std::panic::set_hook(quiet);
    panic!("seed {seed} ({:?}): {why}\nscript of {} steps: {script:#?}", play_of(seed), script.len());
}

/// A check that cannot fail proves nothing: it must detect a network that swaps two messages of a channel.
#[test]
fn the_simulation_finds_a_network_that_reorders() {
    let found = (0..2000u64)
        .filter(|&seed| play_of(seed) == Play::Healthy)
        .any(|seed| pair::play_reordering(seed, &script_of(seed)).is_err());
    assert!(found, "messages of one channel were swapped, and no check failed");
}

/// Runs that lose channels must find chunks in flight on them, else they prove nothing.
#[test]
fn lost_channels_had_chunks_in_flight() {
    let lossy = (0..5000u64).filter(|&seed| play_of(seed) == Play::Lossy);
    let all = lossy.map(|seed| pair::losses(seed, &script_of(seed)));
    let [resent, restored, carried, again] = all.fold([0; 4], |sum, run| std::array::from_fn(|i| sum[i] + run[i]));
    assert!(resent > 1000, "only {resent} chunks were sent again");
    assert!(restored > 300 && carried > 500, "only {restored} channels came back, and carried {carried} chunks");
    assert!(again > 100, "only {again} times were records of the control connection sent again");
}

/// Runs with a liar must bring lost channels up again, else they prove nothing about them.
#[test]
fn liars_joined_connections() {
    let liars = (0..5000u64).filter(|&seed| play_of(seed) == Play::Liar);
    let joins: u64 = liars.map(|seed| liar::joins(seed, &script_of(seed))).sum();
    assert!(joins > 50, "only {joins} channels came up again");
}

/// Runs with a liar must lie about claims, else they prove nothing about them.
#[test]
fn liars_lied_about_claims() {
    let liars = (0..5000u64).filter(|&seed| play_of(seed) == Play::Liar);
    let all: Vec<_> = liars.map(|seed| liar::lies(seed, &script_of(seed))).collect();
    let sum = |of: fn(&direct::Lies) -> u64| all.iter().map(of).sum::<u64>();
    let (granted, refused, claimed) = (sum(|l| l.granted), sum(|l| l.refused), sum(|l| l.claimed));
    let (blocks, landings) = (sum(|l| l.blocks), sum(|l| l.landings));
    println!("{granted} claims granted, {refused} not, {claimed} false claims, {blocks} blocks, {landings} writes into buffers");
    assert!(granted > 20 && refused > 50, "only {granted} claims were granted, and {refused} not");
    assert!(claimed > 300, "only {claimed} claims had a false token");
}
