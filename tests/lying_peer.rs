//! A victim in its own process against a malicious peer that does the real handshake and set-up and then sends valid frames in wrong orders,
//! false ids, lengths, tags and verdicts, or floods. The victim may lose the connection. It never reports OK for bytes that did
//! not come, never lets memory be touched that it has given back, ends every transfer by its deadline, and stays small.

mod victim;

use std::time::{Duration, Instant};
use uccl_p2p::config::Config;
use uccl_p2p::engine::attack::{self, FifoItem, Frame, Grant, Liar, WireRegion, WireSegment};
use uccl_p2p::engine::Engine;
use uccl_p2p::status::{ErrorKind, UCCL_ERR_PROTOCOL};
use uccl_p2p::types::Place;
use victim::{descriptors, resident, text_of, threads, until, Outcome, Rng, Victim};

/// The bytes that the malicious peer sends, and those of the victim's memory before.
const LIE: u8 = 0x11;
const BEFORE: u8 = 0xEE;
/// The victim's limits, and what a loaded machine may add to them.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(1);
const PEER_TIMEOUT: Duration = Duration::from_secs(3);
const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn victim_process() {
    victim::serve("victim_process", |config| Config {
        num_channels: Some(2),
        transfer_timeout: TRANSFER_TIMEOUT,
        peer_timeout: PEER_TIMEOUT,
        match_timeout: 2 * TRANSFER_TIMEOUT,
        close_timeout: TRANSFER_TIMEOUT,
        ..config
    });
}

struct Scene {
    victim: Victim,
    engine: std::sync::Arc<Engine>,
    liar: Liar,
}

fn region(item: &FifoItem) -> WireRegion {
    attack::access(item).unwrap()
}

fn segment(addr: u64, len: usize) -> WireSegment {
    WireSegment { addr, len: len as u32, region: 0, initiator: Place::HOST, owner: Place::HOST }
}

fn write_of(id: u64, item: &FifoItem, len: usize) -> Frame<'static> {
    let segments = std::iter::once(segment(item.addr, len)).collect();
    Frame::Write { id, regions: vec![region(item)], segments, eager: None }
}

fn read_of(id: u64, item: &FifoItem, len: usize) -> Frame<'static> {
    let segments = std::iter::once(segment(item.addr, len)).collect();
    Frame::Read { id, regions: vec![region(item)], segments }
}

fn chunk(id: u64, by_initiator: bool, len: usize, channel: usize) -> Frame<'static> {
    chunk_at(id, by_initiator, 0, len, channel)
}

fn chunk_at(id: u64, by_initiator: bool, offset: u64, len: usize, channel: usize) -> Frame<'static> {
    Frame::Chunks { id, by_initiator, offset, grants: vec![Grant { len: len as u32, channel: channel as u16 }] }
}

fn arrived(channel: u16, chunks: u64) -> Frame<'static> {
    Frame::Arrived { channel, chunks }
}

fn lost(channel: u16, chunks: u64) -> Frame<'static> {
    Frame::Lost { channel, chunks, text: "so I say" }
}

fn own_engine() -> std::sync::Arc<Engine> {
    Engine::new(Config { num_channels: Some(2), ..victim::config() }).unwrap()
}

impl Scene {
    fn new() -> Scene {
        let engine = own_engine();
        let mut victim = Victim::start("victim_process", &[("UCCL_TCPX_EAGER_BYTES", "2000")]);
        victim.ask("accept");
        let liar = Liar::connect(&engine, victim.port, LIE).unwrap();
        assert!(until(LIMIT, || victim.number("connections") == 1));
        Scene { victim, engine, liar }
    }

    /// A FIFO item of memory that the malicious peer claims to have, for the victim's own transfers.
    fn bait(&self) -> String {
        static MEMORY: [u8; 1 << 20] = [LIE; 1 << 20];
        let mr = self.engine.register(MEMORY.as_ptr() as usize, MEMORY.len()).unwrap();
        text_of(&self.engine.fifo_item(mr, MEMORY.as_ptr() as usize, MEMORY.len()).unwrap())
    }

    /// Sends frames, and gives the victim time to act on them. Its answers are lost.
    fn say(&mut self, frames: &[Frame<'_>]) {
        self.tell(frames);
        self.settle();
    }

    /// Sends frames.
    fn tell(&mut self, frames: &[Frame<'_>]) {
        frames.iter().for_each(|frame| drop(self.liar.say(frame)));
    }

    fn settle(&mut self) {
        for _ in 0..20 {
            let _ = self.liar.flush();
            let _ = self.liar.hear(|_| {});
            let _ = self.liar.look();
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Frames of the victim until one of them is what `find` looks for.
    fn find<T>(&mut self, what: &str, mut find: impl FnMut(&Frame<'_>) -> Option<T>) -> T {
        let mut found = None;
        let came = until(LIMIT, || {
            let _ = self.liar.flush();
            let _ = self.liar.hear(|frame| {
                if found.is_none() {
                    found = find(frame);
                }
            });
            found.is_some()
        });
        assert!(came, "{what} never came");
        found.unwrap()
    }

    /// The victim has closed a channel; how many chunks it says are in place.
    fn loses(&mut self, channel: u16) -> u64 {
        self.find("Lost", |frame| match frame {
            Frame::Lost { channel: lost, chunks, .. } if *lost == channel => Some(*chunks),
            _ => None,
        })
    }

    /// The victim ends the connection because of a violation.
    fn says_protocol(&mut self, what: &str) {
        let status = self.find(what, |frame| match frame {
            Frame::Bye { status, .. } => Some(*status),
            _ => None,
        });
        assert_eq!(status, UCCL_ERR_PROTOCOL, "{what}");
        self.violated();
    }

    fn violated(&mut self) {
        let mut status = String::new();
        let ended = until(LIMIT, || {
            let _ = self.liar.hear(|_| {});
            status = self.victim.ask("status 0");
            status.starts_with("error")
        });
        assert!(ended, "the connection lives on");
    }

    /// Nothing that was given back has changed, and the victim ends well.
    fn close(mut self) {
        assert_eq!(self.victim.number("changed"), 0, "memory was written after it had been given back");
        drop(self.liar);
        let log = self.victim.log();
        assert!(!log.contains("AddressSanitizer"), "{log}");
        assert!(self.victim.end(LIMIT), "the victim did not end well");
    }
}

/// A write into the victim's memory with one chunk granted and not sent; then a frame that would end it early. Afterwards the victim
/// gives the memory back, and the data comes.
fn ends_early(what: &str, after: impl Fn(&FifoItem) -> Vec<Frame<'static>>) {
    let mut scene = Scene::new();
    const LEN: usize = 256 << 10;
    let (buffer, item) = scene.victim.buffer(LEN, BEFORE);
    scene.say(&[write_of(5, &item, LEN), chunk(5, true, LEN, 0)]);
    scene.say(&after(&item));
    let start = Instant::now();
    scene.victim.ask(&format!("destroy {buffer}"));
    assert!(start.elapsed() < LIMIT, "{what}: destroy took {:?}", start.elapsed());
    let _ = scene.liar.fly(0, attack::tag(5, true, 0), LEN);
    scene.settle();
    assert_eq!(scene.victim.ask(&format!("holds {buffer} {LEN} {BEFORE}")), "true", "{what}");
    scene.close();
}

#[test]
fn no_frame_ends_a_posted_chunks_use_of_memory() {
    ends_early("nothing more", |_| vec![]);
    ends_early("withdrawn", |_| vec![Frame::Withdraw { id: 5, status: -31 }]);
    ends_early("announced again", |item| vec![write_of(5, item, 100)]);
    ends_early("a message of the same id", |_| vec![Frame::Message { id: 5, len: 10, from: None }]);
    ends_early("cancelled", |_| vec![Frame::Cancel { id: 5 }]);
    ends_early("a verdict", |_| vec![Frame::Done { id: 5, status: -12, text: "over" }]);
}

#[test]
fn a_read_refused_after_its_first_chunk_leaves_no_late_write() {
    const LEN: usize = 256 << 10;
    for status in [0, -12] {
        let mut scene = Scene::new();
        let bait = scene.bait();
        let (buffer, _) = scene.victim.buffer(LEN, BEFORE);
        let id = scene.victim.start_transfer(&format!("read 0 {buffer} {LEN} {bait}")).unwrap();
        scene.say(&[chunk(id, false, LEN / 2, 0), Frame::Done { id, status, text: "no" }]);
        let outcome = scene.victim.wait(0, id, LIMIT);
        assert!(matches!(outcome, Outcome::Failed(_)), "status {status}: {outcome:?}");
        scene.victim.ask(&format!("destroy {buffer}"));
        let _ = scene.liar.fly(0, attack::tag(id, false, 0), LEN / 2);
        scene.settle();
        assert_eq!(scene.victim.ask(&format!("holds {buffer} {LEN} {BEFORE}")), "true", "status {status}");
        scene.violated();
        scene.close();
    }
}

#[test]
fn lies_are_not_taken_for_completion() {
    const LEN: usize = 64 << 10;
    let mut scene = Scene::new();
    // OK for a receive that got nothing.
    let (buffer, _) = scene.victim.buffer(LEN, BEFORE);
    let id = scene.victim.start_transfer(&format!("recv 0 {buffer} {LEN}")).unwrap();
    scene.say(&[Frame::Message { id: 3, len: LEN as u64, from: None }, Frame::Done { id, status: 0, text: "" }]);
    let outcome = scene.victim.wait(0, id, LIMIT);
    assert!(matches!(outcome, Outcome::Failed(_)), "{outcome:?}");
    scene.close();
    // A chunk that is shorter, or longer, than announced; one of another stream, or of another place in it; two of the wrong channel.
    let lies: [(&str, usize, i32); 5] = [
        ("short", 100, attack::tag(1, false, 0)),
        ("long", LEN + 1, attack::tag(1, false, 0)),
        ("another stream's", LEN, attack::tag(2, false, 0)),
        ("another place's", LEN, attack::tag(1, false, 4096)),
        ("without a name", LEN, 0),
    ];
    for (what, len, tag) in lies {
        let mut scene = Scene::new();
        let bait = scene.bait();
        let (buffer, _) = scene.victim.buffer(LEN, BEFORE);
        let id = scene.victim.start_transfer(&format!("read 0 {buffer} {LEN} {bait}")).unwrap();
        assert_eq!(id, 1);
        scene.say(&[chunk(id, false, LEN, 0)]);
        let _ = scene.liar.fly(0, tag, len);
        scene.settle();
        let outcome = scene.victim.wait(0, id, LIMIT);
        assert!(matches!(outcome, Outcome::Failed(_)), "{what}: {outcome:?}");
        scene.close();
    }
    // A write that is done before anything of it can have arrived.
    let mut scene = Scene::new();
    let bait = scene.bait();
    let (buffer, _) = scene.victim.buffer(64 << 20, BEFORE);
    let bait_of_all = { text_of(&FifoItem { size: 64 << 20, ..victim::item_of(&bait) }) };
    let id = scene.victim.start_transfer(&format!("write 0 {buffer} {} {bait_of_all}", 64 << 20)).unwrap();
    scene.say(&[Frame::Done { id, status: 0, text: "" }]);
    let outcome = scene.victim.wait(0, id, LIMIT);
    assert!(matches!(outcome, Outcome::Failed(_)), "{outcome:?}");
    scene.close();
}

// ---- lost channels ----

const CHUNK: usize = 4096;
const WRITE: usize = 64 << 10;

/// Frames before the victim has lost channel 1, whether the liar loses it, and frames after that; in all a violation. The write of the victim's
/// memory is 5, and has its token if `granted`. None of its data was sent before the violation, and none that comes later may arrive.
fn violates(what: &str, granted: bool, before: &[Frame<'static>], lose: bool, after: &[Frame<'static>]) {
    let mut scene = Scene::new();
    let (buffer, item) = scene.victim.buffer(WRITE, BEFORE);
    let token = if granted { region(&item).token } else { [9; 16] };
    let segments = std::iter::once(segment(item.addr, WRITE)).collect();
    let write = Frame::Write { id: 5, regions: vec![WireRegion { token, ..region(&item) }], segments, eager: None };
    scene.tell(&[write]);
    scene.tell(before);
    if lose {
        scene.tell(&[lost(1, 0)]);
        assert_eq!(scene.loses(1), 0, "{what}: chunks in place");
        assert_eq!(scene.victim.ask("status 0"), "up", "{what}: the loss alone");
    }
    scene.tell(after);
    scene.says_protocol(what);
    scene.victim.ask(&format!("destroy {buffer}"));
    for channel in 0..2 {
        for offset in 0..4 {
            let _ = scene.liar.fly(channel, attack::tag(5, true, offset * CHUNK as u64), CHUNK);
        }
    }
    scene.settle();
    assert_eq!(scene.victim.ask(&format!("holds {buffer} {WRITE} {BEFORE}")), "true", "{what}");
    scene.close();
}

#[test]
fn lies_about_lost_channels_end_the_connection() {
    let at = |offset: usize, len, channel| chunk_at(5, true, offset as u64, len, channel);
    let first = || at(0, CHUNK, 1);
    let cancel = || Frame::Cancel { id: 5 };
    violates("a channel lost twice", true, &[], true, &[lost(1, 0)]);
    violates("a channel lost twice at once", true, &[lost(1, 0), lost(1, 0)], false, &[]);
    violates("a channel that does not exist is lost", true, &[lost(2, 0)], false, &[]);
    violates("chunks that were never announced are in place", true, &[lost(1, 1)], false, &[]);
    violates("very many chunks are in place", true, &[lost(1, u64::MAX)], false, &[]);
    violates("a report of a lost channel", true, &[], true, &[arrived(1, 0)]);
    violates("a report of a channel that does not exist", true, &[arrived(2, 0)], false, &[]);
    violates("a report of chunks that were never announced", true, &[arrived(0, 1)], false, &[]);
    violates("a chunk on a lost channel", true, &[lost(1, 0), first()], false, &[]);
    violates("a chunk on a channel that both have lost", true, &[], true, &[first()]);
    violates("a chunk left out", true, &[at(CHUNK, CHUNK, 0)], false, &[]);
    violates("a chunk announced twice", true, &[first(), first()], false, &[]);
    violates("a chunk announced on two channels", true, &[first(), at(0, CHUNK, 0)], false, &[]);
    violates("a part of a chunk announced twice", true, &[first(), at(CHUNK - 1, 2, 0)], false, &[]);
    violates("a chunk far behind the end", true, &[at(usize::MAX, CHUNK, 0)], false, &[]);
    violates("a chunk longer than its hole", true, &[first(), at(CHUNK, CHUNK, 0)], true, &[at(0, CHUNK + 1, 0)]);
    violates("a chunk behind a hole", true, &[first(), at(CHUNK, CHUNK, 0)], true, &[at(CHUNK, 1, 0)]);
    violates("a chunk across two holes", true, &[first(), at(CHUNK, CHUNK, 1)], true, &[at(CHUNK / 2, CHUNK, 0)]);
    violates("a hole filled twice", true, &[first()], true, &[at(0, CHUNK, 0), at(0, CHUNK, 0)]);
    violates("a part of a hole filled twice", true, &[first()], true, &[at(10, 10, 0), at(5, 6, 0)]);
    violates("a hole of another transfer", true, &[first()], true, &[chunk_at(4, true, 0, CHUNK, 0)]);
    violates("a hole of a write that is not refused is given up", true, &[at(0, WRITE, 1)], true, &[cancel()]);
    violates("holes of a refused write are given up twice", false, &[at(0, WRITE, 1)], true, &[cancel(), cancel()]);
    violates("a hole that was given up is filled", false, &[at(0, WRITE, 1)], true, &[cancel(), at(0, CHUNK, 0)]);
    violates("a chunk longer than its hole, refused", false, &[first(), at(CHUNK, CHUNK, 0)], true, &[at(0, CHUNK + 1, 0)]);
}

#[test]
fn lies_about_the_victims_chunks_end_the_connection() {
    // Frames that lie about channel `channel`, on which the victim has announced `n` chunks.
    type Lie = fn(channel: u16, n: u64) -> Vec<Frame<'static>>;
    let lies: [(&str, Lie); 5] = [
        ("one chunk too many", |channel, n| vec![arrived(channel, n + 1)]),
        ("one chunk too many on a lost channel", |channel, n| vec![lost(channel, n + 1)]),
        ("fewer than before", |channel, n| vec![arrived(channel, n), arrived(channel, n - 1)]),
        ("fewer than before on a lost channel", |channel, n| vec![arrived(channel, n), lost(channel, n - 1)]),
        ("all of them, twice", |channel, n| vec![lost(channel, n), lost(channel, n)]),
    ];
    for (what, lie) in lies {
        let mut scene = Scene::new();
        let bait = scene.bait();
        let (buffer, _) = scene.victim.buffer(WRITE, BEFORE);
        let id = scene.victim.start_transfer(&format!("write 0 {buffer} {WRITE} {bait}")).unwrap();
        let (mut counts, mut bytes) = ([0u64; 2], 0);
        scene.find("announcements", |frame| {
            if let Frame::Chunks { grants, .. } = frame {
                grants.iter().for_each(|grant| counts[usize::from(grant.channel)] += 1);
                bytes += grants.iter().map(|grant| grant.len as usize).sum::<usize>();
            }
            (bytes == WRITE).then_some(())
        });
        let channel = u16::from(counts[0] == 0);
        scene.tell(&lie(channel, counts[usize::from(channel)]));
        scene.says_protocol(what);
        let outcome = scene.victim.wait(0, id, LIMIT);
        assert!(matches!(outcome, Outcome::Failed(_)), "{what}: {outcome:?}");
        scene.close();
    }
}

#[test]
fn a_lost_channel_writes_nothing_any_more() {
    let mut scene = Scene::new();
    let (buffer, item) = scene.victim.buffer(WRITE, BEFORE);
    scene.tell(&[write_of(5, &item, WRITE), chunk(5, true, WRITE, 1), lost(1, 0)]);
    assert_eq!(scene.loses(1), 0);
    let _ = scene.liar.fly(1, attack::tag(5, true, 0), WRITE);
    scene.settle();
    assert_eq!(scene.victim.ask(&format!("holds {buffer} {WRITE} {BEFORE}")), "true", "data of a lost channel is in place");
    // On the other channel, the rear half first.
    for offset in [WRITE / 2, 0] {
        scene.tell(&[chunk_at(5, true, offset as u64, WRITE / 2, 0)]);
        assert!(scene.liar.fly(0, attack::tag(5, true, offset as u64), WRITE / 2).unwrap());
    }
    let status = scene.find("Done", |frame| match frame {
        Frame::Done { id: 5, status, .. } => Some(*status),
        _ => None,
    });
    assert_eq!(status, 0);
    assert_eq!(scene.victim.ask(&format!("holds {buffer} {WRITE} {LIE}")), "true", "the chunks that were announced again");
    scene.close();

    // What is in place is no hole.
    let mut scene = Scene::new();
    let (buffer, item) = scene.victim.buffer(WRITE, BEFORE);
    scene.say(&[write_of(5, &item, WRITE), chunk(5, true, CHUNK, 1)]);
    assert!(scene.liar.fly(1, attack::tag(5, true, 0), CHUNK).unwrap());
    let placed = until(LIMIT, || scene.victim.ask(&format!("holds {buffer} {CHUNK} {LIE}")) == "true");
    assert!(placed, "the chunk never came");
    scene.settle();
    scene.tell(&[lost(1, 0)]);
    assert_eq!(scene.loses(1), 1);
    scene.tell(&[chunk(5, true, CHUNK, 0)]);
    scene.says_protocol("a chunk that is in place announced again");
    scene.close();
}

#[test]
fn only_the_peer_of_a_connection_joins_it_and_only_where_channels_are_lost() {
    let mut scene = Scene::new();
    let (buffer, item) = scene.victim.buffer(WRITE, BEFORE);
    let me = scene.engine.clone();
    let refused = |scene: &mut Scene, what: &str, engine: &Engine, generation, channels: &[u16], kind| {
        let error = scene.liar.join(engine, generation, channels).unwrap_err();
        assert_eq!(error.kind(), kind, "{what}: {error}");
    };
    refused(&mut scene, "no channel is lost", &me, 1, &[1], ErrorKind::Unsupported);
    scene.tell(&[lost(1, 0)]);
    assert_eq!(scene.loses(1), 0);
    refused(&mut scene, "another engine", &own_engine(), 2, &[1], ErrorKind::Auth);
    refused(&mut scene, "one of them is not lost", &me, 3, &[0, 1], ErrorKind::Unsupported);
    refused(&mut scene, "no such channel", &me, 4, &[1, 2], ErrorKind::Protocol);
    refused(&mut scene, "no generation", &me, 0, &[1], ErrorKind::Unsupported);
    let mut second = Liar::connect(&me, scene.victim.port, LIE).unwrap();
    second.say(&Frame::Bye { status: 0, text: "" }).unwrap();
    assert!(until(LIMIT, || second.hear(|_| {}).is_err()), "the victim keeps a connection that has ended");
    assert_eq!(second.join(&me, 1, &[1]).unwrap_err().kind(), ErrorKind::NotFound, "a connection that has ended");
    scene.liar.join(&me, 7, &[1]).unwrap();
    let generation = scene.find("Up", |frame| match frame {
        Frame::Up { channel: 1, generation } => Some(*generation),
        _ => None,
    });
    assert_eq!(generation, 7);
    refused(&mut scene, "it is back already", &me, 8, &[1], ErrorKind::Unsupported);
    scene.tell(&[Frame::Up { channel: 1, generation }, write_of(5, &item, WRITE), chunk(5, true, WRITE, 1)]);
    assert!(scene.liar.fly(1, attack::tag(5, true, 0), WRITE).unwrap());
    let status = scene.find("Done", |frame| match frame {
        Frame::Done { id: 5, status, .. } => Some(*status),
        _ => None,
    });
    assert_eq!((status, scene.victim.ask(&format!("holds {buffer} {WRITE} {LIE}")).as_str()), (0, "true"));
    // And once more: the same generation never serves twice.
    scene.tell(&[lost(1, 0)]);
    assert_eq!(scene.loses(1), 1);
    refused(&mut scene, "an old generation", &me, 7, &[1], ErrorKind::Unsupported);
    scene.liar.join(&me, 9, &[1]).unwrap();
    // The first chunk counts from 0 again.
    scene.tell(&[Frame::Up { channel: 1, generation: 9 }, arrived(1, 1)]);
    scene.says_protocol("a report of a chunk before the channel came back");
    scene.close();
}

#[test]
fn lies_about_restored_channels_end_the_connection() {
    let lies: [(&str, &[Frame<'static>]); 4] = [
        ("another generation", &[Frame::Up { channel: 1, generation: 2 }]),
        ("twice", &[Frame::Up { channel: 1, generation: 1 }, Frame::Up { channel: 1, generation: 1 }]),
        ("a channel that does not exist", &[Frame::Up { channel: 2, generation: 1 }]),
        ("a channel that is open", &[Frame::Up { channel: 0, generation: 1 }]),
    ];
    for (what, lie) in lies {
        let mut scene = Scene::new();
        scene.tell(&[lost(1, 0)]);
        assert_eq!(scene.loses(1), 0);
        let me = scene.engine.clone();
        scene.liar.join(&me, 1, &[1]).unwrap();
        scene.tell(lie);
        scene.says_protocol(what);
        scene.close();
    }
}

#[test]
fn a_transfer_with_a_hole_is_not_complete() {
    let mut scene = Scene::new();
    let bait = scene.bait();
    let (buffer, _) = scene.victim.buffer(WRITE, BEFORE);
    let id = scene.victim.start_transfer(&format!("read 0 {buffer} {WRITE} {bait}")).unwrap();
    scene.tell(&[chunk(id, false, CHUNK, 1), chunk_at(id, false, CHUNK as u64, WRITE - CHUNK, 0), lost(1, 0)]);
    assert_eq!(scene.loses(1), 0);
    let _ = scene.liar.fly(0, attack::tag(id, false, CHUNK as u64), WRITE - CHUNK);
    // All of the hole but its last byte.
    scene.say(&[chunk(id, false, CHUNK - 1, 0)]);
    let _ = scene.liar.fly(0, attack::tag(id, false, 0), CHUNK - 1);
    let outcome = scene.victim.wait(0, id, LIMIT);
    assert!(matches!(outcome, Outcome::Failed(_)), "{outcome:?}");
    scene.close();
}

#[test]
fn refused_chunks_do_not_count_for_a_later_write() {
    const LEN: usize = 64 << 10;
    let mut scene = Scene::new();
    let (buffer, item) = scene.victim.buffer(LEN, BEFORE);
    let wrong = Frame::Write {
        id: 5,
        regions: vec![WireRegion { token: [9; 16], ..region(&item) }],
        segments: std::iter::once(segment(item.addr, LEN)).collect(),
        eager: None,
    };
    let (mut oks, mut bad) = (0, 0);
    for frame in [wrong, chunk(5, true, LEN, 0), write_of(5, &item, LEN), chunk(5, true, LEN, 0)] {
        let _ = scene.liar.say(&frame);
    }
    let _ = scene.liar.fly(0, attack::tag(5, true, 0), LEN);
    let start = Instant::now();
    while start.elapsed() < 2 * TRANSFER_TIMEOUT {
        let _ = scene.liar.hear(|frame| match frame {
            Frame::Done { status: 0, .. } => oks += 1,
            Frame::Done { .. } => bad += 1,
            _ => {}
        });
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!((oks, bad), (0, 1));
    assert_eq!(scene.victim.ask(&format!("holds {buffer} {LEN} {BEFORE}")), "true");
    scene.close();
}

#[test]
fn every_transfer_ends_while_the_attacker_sends_only_notifications() {
    const LEN: usize = 1 << 20;
    let mut scene = Scene::new();
    let bait = scene.bait();
    let (buffer, item) = scene.victim.buffer(LEN, BEFORE);
    // The peer's own write, which never continues, and one transfer of each kind by the victim.
    let _ = scene.liar.say(&write_of(1, &item, LEN));
    let _ = scene.liar.say(&chunk(1, true, 4096, 1));
    let ids: Vec<(String, u64)> = [
        format!("write 0 {buffer} {LEN} {bait}"),
        format!("read 0 {buffer} {LEN} {bait}"),
        format!("send 0 {buffer} 100"),
        format!("recv 0 {buffer} 100"),
    ]
    .into_iter()
    .map(|command| (command.clone(), scene.victim.start_transfer(&command).unwrap()))
    .collect();
    let start = Instant::now();
    let mut open = ids;
    while !open.is_empty() {
        let _ = scene.liar.say(&Frame::Notify { name: b"", message: b"still here" });
        let _ = scene.liar.say(&Frame::Ping { received: 0 });
        let _ = scene.liar.hear(|_| {});
        let victim = &mut scene.victim;
        open.retain(|(what, id)| match victim.wait(0, *id, Duration::from_millis(10)) {
            Outcome::Pending => true,
            Outcome::Failed(_) => false,
            Outcome::Done(_) => panic!("{what} is OK"),
        });
        assert!(start.elapsed() < LIMIT, "{open:?} never end");
    }
    scene.close();
}

// ---- floods ----

/// AddressSanitizer keeps freed memory for a while.
fn slack() -> usize {
    if std::env::var_os("UCCL_TEST_SANITIZED").is_some() {
        4
    } else {
        1
    }
}

/// Lets the liar go on until the victim ends the connection, or the time is over, or memory beyond the limit is taken. `true`: it was ended.
fn flood(scene: &mut Scene, what: &str, megabytes: usize, mut step: impl FnMut(&mut Liar, u64) -> bool) -> bool {
    let process = scene.victim.id();
    let (before, began) = (resident(process), (descriptors(process), threads(process)));
    let start = Instant::now();
    let mut n = 0;
    let mut most = 0;
    let mut ended = false;
    while start.elapsed() < Duration::from_secs(6) && !ended {
        for _ in 0..200 {
            n += 1;
            if !step(&mut scene.liar, n) {
                break;
            }
        }
        ended = scene.victim.ask("status 0").starts_with("error");
        most = most.max(resident(process).saturating_sub(before) / 1024);
        assert!(most < megabytes * slack(), "{what}: the victim has grown by {most} MB after {n} steps");
    }
    let now = (descriptors(process), threads(process));
    assert!(now.0 <= began.0 + 4 && now.1 <= began.1 + 2, "{what}: descriptors and threads {began:?} -> {now:?}");
    println!("{what}: {n} steps, {most} MB more at most, ended: {ended}");
    ended
}

/// Says a frame where little waits; whether the connection lives.
fn say_if_room(liar: &mut Liar, frame: impl FnOnce() -> Frame<'static>) -> bool {
    match liar.flush() {
        Ok(waiting) if waiting < 1 << 20 => liar.say(&frame()).is_ok(),
        Ok(_) => {
            std::thread::sleep(Duration::from_millis(1));
            true
        }
        Err(_) => false,
    }
}

#[test]
fn replies_that_are_not_read_end_the_connection() {
    for len in [1500, 1 << 20] {
        let mut scene = Scene::new();
        let (_, item) = scene.victim.buffer(1 << 20, BEFORE);
        let ended = flood(&mut scene, &format!("reads of {len} bytes, nothing is read"), 400, |liar, n| {
            say_if_room(liar, || read_of(n, &item, len))
        });
        assert!(ended, "the victim still answers reads of {len} bytes");
        scene.close();
    }
}

#[test]
fn announcements_without_data_end_the_connection() {
    let mut scene = Scene::new();
    let (_, item) = scene.victim.buffer(1 << 20, BEFORE);
    let segments: Vec<WireSegment> = (0..1 << 18).map(|i| segment(item.addr + i % 1000, 1)).collect();
    let ended = flood(&mut scene, "announcements of 262,144 segments", 1200, |liar, n| {
        let _ = liar.hear(|_| {});
        say_if_room(liar, || {
            let segments = segments.iter().copied().collect();
            Frame::Write { id: n, regions: vec![region(&item)], segments, eager: None }
        })
    });
    assert!(ended);
    scene.close();
    // Small ones: as many as the liar likes.
    let mut scene = Scene::new();
    let (_, item) = scene.victim.buffer(1 << 20, BEFORE);
    let ended = flood(&mut scene, "announcements of one segment", 400, |liar, n| {
        let _ = liar.hear(|_| {});
        say_if_room(liar, || write_of(n, &item, 1000))
    });
    assert!(ended);
    scene.close();
}

#[test]
fn untaken_notifications_end_the_connection_or_stop() {
    let mut scene = Scene::new();
    let mut full = 0;
    let ended = flood(&mut scene, "empty notifications", 700, |liar, _| {
        full += 1;
        let _ = if full % 100 == 0 { liar.hear(|_| {}) } else { Ok(0) };
        say_if_room(liar, || Frame::Notify { name: b"", message: b"" })
    });
    println!("ended: {ended}");
    let taken = scene.victim.number("drain");
    assert!(taken > 0);
    scene.close();
}

#[test]
fn notifications_to_a_peer_that_pings_and_does_not_read_end() {
    let mut scene = Scene::new();
    let start = Instant::now();
    let victim = &mut scene.victim;
    let liar = &mut scene.liar;
    let refused = std::thread::scope(|s| {
        let asks = s.spawn(move || (0..200).map(|_| victim.ask("notify 0 8000000")).find(|answer| answer.starts_with("error")));
        while !asks.is_finished() {
            let _ = liar.say(&Frame::Ping { received: 0 });
            std::thread::sleep(Duration::from_millis(100));
            assert!(start.elapsed() < LIMIT, "a notification never ends");
        }
        asks.join().unwrap()
    });
    let grown = resident(scene.victim.id()) / 1024;
    assert!(refused.is_some(), "1.6 GB of notifications were taken");
    assert!(grown < 700 * slack(), "{grown} MB");
    println!("{refused:?} after {:?}; {grown} MB", start.elapsed());
    scene.close();
}

#[test]
fn refusals_are_cheap_and_quiet() {
    let mut scene = Scene::new();
    let (_, item) = scene.victim.buffer(1 << 20, BEFORE);
    let wrong = WireRegion { token: [9; 16], ..region(&item) };
    let mut refused = 0u64;
    flood(&mut scene, "reads with a wrong token", 100, |liar, n| {
        let heard = liar.hear(|frame| refused += u64::from(matches!(frame, Frame::Done { .. })));
        let segments = || std::iter::once(segment(item.addr, 100)).collect();
        heard.is_ok() && say_if_room(liar, || Frame::Read { id: n, regions: vec![wrong], segments: segments() })
    });
    assert!(refused > 100, "{refused} refusals");
    let log = scene.victim.log_len();
    assert!(log < 64 << 10, "{refused} refusals wrote {log} bytes of log");
    scene.close();
}

#[test]
fn unaccepted_connections_are_bounded() {
    let engine = own_engine();
    let mut victim = Victim::start("victim_process", &[]);
    victim.ask("connections");
    let (process, before) = (victim.id(), resident(victim.id()));
    let mut most = 0;
    for _ in 0..150 {
        drop(Liar::connect(&engine, victim.port, LIE));
        most = most.max(descriptors(process));
    }
    let mut left = 0;
    let given_back = until(LIMIT, || {
        left = descriptors(process);
        left < 60
    });
    assert!(given_back, "{left} descriptors are still open, {most} at most");
    let grown = resident(process).saturating_sub(before) / 1024;
    assert!(grown < 300, "grown by {grown} MB");
    assert!(victim.end(LIMIT));
}

// ---- at random ----

struct Own {
    id: u64,
    buffer: Option<usize>,
    what: String,
}

/// Random frames, data, own transfers and ends of regions, all well-formed and mostly wrong.
fn storm(victim: &mut Victim, engine: &std::sync::Arc<Engine>, bait: &str, number: usize, seed: u64) {
    let mut rng = Rng(seed | 1);
    let mut liar = Liar::connect(engine, victim.port, LIE).unwrap();
    assert!(until(LIMIT, || victim.number("connections") == number + 1));
    let mut buffers: Vec<(usize, FifoItem, usize)> = Vec::new();
    let mut own: Vec<Own> = Vec::new();
    let mut last = 0u64;
    let mut offsets: std::collections::HashMap<(u64, bool), u64> = std::collections::HashMap::new();
    for _ in 0..60 {
        let pick = rng.below(100);
        let id = match rng.below(8) {
            0..=3 => 1 + rng.below(own.len() + 1) as u64,
            4..=6 => 1 + rng.below(last as usize + 1) as u64,
            _ => rng.next() >> rng.below(64),
        };
        if pick < 12 || buffers.is_empty() {
            let len = 1 + rng.below(100_000);
            let (buffer, item) = victim.buffer(len, BEFORE);
            buffers.push((buffer, item, len));
        } else if pick < 27 {
            let (buffer, _, len) = buffers[rng.below(buffers.len())];
            let command = match rng.below(4) {
                0 => format!("write {number} {buffer} {len} {bait}"),
                1 => format!("read {number} {buffer} {len} {bait}"),
                2 => format!("send {number} {buffer} {len}"),
                _ => format!("recv {number} {buffer} {len}"),
            };
            if let Ok(id) = victim.start_transfer(&command) {
                let target = command.starts_with("re").then_some(buffer);
                own.push(Own { id, buffer: target, what: command });
            }
        } else if pick < 34 {
            let at = rng.below(buffers.len());
            let (buffer, ..) = buffers.swap_remove(at);
            victim.ask(&format!("{} {buffer}", if rng.below(2) == 0 { "destroy" } else { "free" }));
        } else if pick < 55 {
            let by_initiator = rng.below(2) == 0;
            let (len, channel) = (1 + rng.below(9000), rng.below(2));
            let next = offsets.entry((id, by_initiator)).or_default();
            // Now and then bytes that a lost channel may not have delivered.
            let offset = if rng.below(20) == 0 { rng.below(*next as usize + 1) as u64 } else { *next };
            *next = (*next).max(offset + len as u64);
            let _ = liar.say(&chunk_at(id, by_initiator, offset, len, channel));
            let tag = attack::tag(id, by_initiator, offset);
            let len = if rng.below(12) == 0 { len / 2 + 1 } else { len };
            let _ = liar.fly(channel, if rng.below(15) == 0 { 7 } else { tag }, len);
        } else {
            let (_, item, len) = buffers[rng.below(buffers.len())];
            last += 1;
            let new = if rng.below(8) == 0 { id } else { last };
            let status = [0, 0, -31, -12, 7][rng.below(5)];
            let frame = match rng.below(12) {
                0..=2 => write_of(new, &item, 1 + rng.below(len)),
                3 => read_of(new, &item, 1 + rng.below(len)),
                4 => Frame::Done { id, status, text: "so I say" },
                5 => Frame::Message { id: new, len: rng.below(50_000) as u64, from: None },
                6 => Frame::Pull { id, status, receiver: Place::HOST, landing: None },
                7 => Frame::Withdraw { id, status: -31 },
                8 => Frame::Cancel { id },
                9 => arrived(rng.below(2) as u16, 0),
                10 => lost(rng.below(8) as u16 / 7, 0),
                _ => Frame::ReadInline { id, data: &[LIE; 100] },
            };
            let _ = liar.say(&frame);
        }
        let _ = liar.hear(|_| {});
        let _ = liar.catch(rng.below(2), 0, 1);
    }
    finish(victim, &mut liar, number, own, seed);
}

/// The malicious peer continues with only notifications: everything ends, and transfers reported OK have their bytes.
fn finish(victim: &mut Victim, liar: &mut Liar, number: usize, mut own: Vec<Own>, seed: u64) {
    let start = Instant::now();
    while !own.is_empty() {
        let _ = liar.say(&Frame::Notify { name: b"", message: b"still here" });
        let _ = liar.hear(|_| {});
        let _ = liar.look();
        own.retain(|own| match victim.wait(number, own.id, Duration::from_millis(5)) {
            Outcome::Pending => true,
            Outcome::Failed(_) => false,
            Outcome::Done(total) => {
                if let Some(buffer) = own.buffer {
                    // A buffer that several transfers share may hold the victim's own bytes nowhere: all that writes to it is the liar.
                    let holds = victim.ask(&format!("holds {buffer} {total} {LIE}"));
                    let freed = victim.ask(&format!("holds {buffer} {total} {BEFORE}")) == "true" && total == 0;
                    assert!(holds == "true" || freed, "seed {seed}: {} is OK, and its bytes never came", own.what);
                }
                false
            }
        });
        assert!(start.elapsed() < LIMIT, "seed {seed}: {:?} never end", own.iter().map(|o| &o.what).collect::<Vec<_>>());
    }
    assert_eq!(victim.number("changed"), 0, "seed {seed}: memory was written after it had been given back");
    victim.ask(&format!("close {number}"));
}

#[test]
fn storms_of_lies() {
    let rounds: u64 = std::env::var("UCCL_TEST_STORMS").ok().and_then(|n| n.parse().ok()).unwrap_or(25);
    let mut scene = Scene::new();
    let bait = scene.bait();
    let process = scene.victim.id();
    let mut first = (0, 0, 0);
    for round in 0..rounds {
        let seed = 0x9E37_79B9_7F4A_7C15u64.wrapping_mul(round + 1);
        storm(&mut scene.victim, &scene.engine, &bait, round as usize + 1, seed);
        if round == 4 {
            first = (descriptors(process), threads(process), resident(process));
        }
    }
    let last = (descriptors(process), threads(process), resident(process));
    println!("{rounds} storms; descriptors, threads, KiB: {first:?} -> {last:?}");
    assert!(last.0 <= first.0 + 8 && last.1 <= first.1 + 2, "{first:?} -> {last:?}");
    scene.close();
}
