//! Entry points for the targets in fuzz/. Each takes any bytes and panics if a property does not hold. Built with `--cfg fuzzing`
//! only, as cargo-fuzz does; not part of the API.

use crate::wire::frame;
use crate::wire::handshake::{Handshake, Identity, MAX_MESSAGE};
use crate::wire::hello::Hello;
use crate::wire::keys::Keys;
use crate::wire::session::{Direction, Opened, Session, MAX_PLAIN};
use crate::wire::setup::{self, Decoded};
use crate::wire::text;
use std::sync::{Arc, OnceLock};

/// Every hello that is accepted is in range, printable, and means the same when it is sent on.
pub fn hello(data: &[u8]) {
    let Ok(hello) = Hello::decode(data) else { return };
    assert!((1..=64).contains(&hello.channels) && (4096..=16 << 20).contains(&hello.chunk_bytes));
    for t in [&hello.plugin, &hello.gpu, &hello.wanted_gpu] {
        assert!(t.bytes().all(text::is_printable));
    }
    let mut out = Vec::new();
    hello.encode(&mut out);
    assert_eq!(out, data);
}

/// Every set-up message that is accepted means the same when it is sent on; a prefix asks for more or is refused.
pub fn setup(data: &[u8]) {
    match setup::decode(data) {
        Ok(Decoded::Message(message, taken)) => {
            let mut out = Vec::new();
            setup::encode(&message, &mut out);
            assert_eq!(out, &data[..taken]);
            assert!(matches!(setup::decode(&data[..taken / 2]), Ok(Decoded::Need(n)) if n > taken / 2));
        }
        Ok(Decoded::Need(n)) => assert!(n > data.len() && n < 1 << 20),
        Err(e) => assert!(e.to_string().bytes().all(text::is_printable)),
    }
}

/// Every frame that is accepted means the same when it is sent on; a prefix asks for more.
pub fn frames(data: &[u8]) {
    let mut rest = data;
    loop {
        match frame::decode(rest) {
            Ok(frame::Decoded::Frame(found, taken)) => {
                let mut out = Vec::new();
                frame::encode(&found, &mut out);
                match frame::decode(&out) {
                    Ok(frame::Decoded::Frame(again, n)) => assert!(n == out.len() && again == found),
                    other => panic!("{found:?} became {other:?}"),
                }
                assert!(matches!(frame::decode(&rest[..taken - 1]), Ok(frame::Decoded::Need(n)) if n >= taken.min(n)));
                rest = &rest[taken..];
            }
            Ok(frame::Decoded::Need(n)) => return assert!(n > rest.len()),
            Err(e) => return assert!(e.to_string().bytes().all(text::is_printable)),
        }
    }
}

/// A whole machine keeps its invariants against a peer that the bytes direct.
pub fn stream(data: &[u8]) {
    if let Err(e) = crate::proto::attacked(data) {
        panic!("{e}");
    }
}

/// The contents of a key file never appear in an error or in debug output.
pub fn keys(data: &[u8]) {
    match Keys::parse(data) {
        Ok(keys) => assert!(!keys.is_empty() && keys.iter().count() <= 16),
        Err(e) => assert!(e.to_string().bytes().all(text::is_printable)),
    }
}

fn start() -> (Handshake, Handshake, bool) {
    static ONCE: OnceLock<(Arc<Identity>, Arc<Keys>)> = OnceLock::new();
    let (identity, keys) = ONCE.get_or_init(|| {
        let identity = Identity::generate().expect("an identity");
        (Arc::new(identity), Arc::new(Keys::parse(b"a:0123456789abcdef\nb:fedcba9876543210").expect("keys")))
    });
    let hello = || Hello {
        channels: 4,
        chunk_bytes: 4096,
        gpu_index: -1,
        peer_timeout_ms: 10_000,
        protect: crate::types::Protect::Off,
        plugin: "soft".into(),
        gpu: "-1".into(),
        wanted_gpu: String::new(),
        further_gpus: Vec::new(),
        joins: false,
    };
    let connecting = Handshake::connecting(identity, hello(), keys.clone()).expect("a connector");
    (connecting, Handshake::listening(identity, hello(), keys.clone()).expect("a listener"), true)
}

/// A real handshake up to a step, then part of the real message with some bytes replaced, and more bytes.
///
/// `data`: step, bytes kept, offset of the replaced bytes, size of pieces, and the bytes.
pub fn handshake(data: &[u8]) {
    let Some((&[step, keep, offset, piece], bytes)) = data.split_first_chunk::<4>() else { return };
    let (mut c, mut s, mut to_server) = start();
    let mut message = Vec::new();
    for _ in 0..=step % 4 {
        let (from, to) = if to_server { (&mut c, &mut s) } else { (&mut s, &mut c) };
        if !message.is_empty() {
            let taken = from.input(&message).expect("an undisturbed handshake goes on");
            assert_eq!(taken, message.len());
        }
        message = from.output().to_vec();
        from.sent(message.len());
        let _ = to;
        to_server = !to_server;
    }
    let honest = message.clone();
    message.truncate(keep.into());
    for (i, byte) in bytes.iter().enumerate() {
        match message.get_mut(usize::from(offset) + i) {
            Some(slot) => *slot = *byte,
            None => message.push(*byte),
        }
    }
    let to = if to_server { &mut c } else { &mut s };
    for piece in message.chunks(usize::from(piece) + 1) {
        match to.input(piece) {
            Ok(taken) => assert!(taken <= piece.len()),
            Err(e) => {
                assert!(e.to_string().bytes().all(text::is_printable));
                break;
            }
        }
    }
    assert!(to.output().len() <= 2 * MAX_MESSAGE);
    assert!(to.outcome().is_none() || message.starts_with(&honest));
}

/// Honest records with some bytes replaced: only what was sealed opens, in its order.
///
/// `data`: length of the records, offset of the replaced bytes (2 bytes), and the bytes.
pub fn session(data: &[u8]) {
    let Some((&[len, low, high], bytes)) = data.split_first_chunk::<3>() else { return };
    let new = |direction| Session::new(direction, &[7; 64], b"fuzz").expect("a session");
    let (mut from, mut to) = (new(Direction::ToListening), new(Direction::ToConnecting));
    let mut stream = Vec::new();
    for i in 0..4u8 {
        from.seal(&vec![i; usize::from(len)], &mut stream).expect("sealed");
    }
    let honest = stream.clone();
    let offset = usize::from(u16::from_le_bytes([low, high]));
    for (i, byte) in bytes.iter().enumerate() {
        match stream.get_mut(offset + i) {
            Some(slot) => *slot = *byte,
            None => stream.push(*byte),
        }
    }
    let same = stream.iter().zip(&honest).take_while(|(a, b)| a == b).count();
    let (mut end, mut at) = (0, 0);
    while at < stream.len() {
        match to.opener.open_within(&mut stream[end..], at - end) {
            Ok(Opened::Record { plain, consumed }) => {
                assert!(plain <= MAX_PLAIN && at + consumed <= same, "a changed record opened");
                (end, at) = (end + plain, at + consumed);
            }
            Ok(Opened::Need(n)) => {
                assert!(n > stream.len() - at);
                break;
            }
            Err(_) => break,
        }
    }
    let expected: Vec<u8> = (0..4u8).flat_map(|i| vec![i; usize::from(len)]).collect();
    assert!(expected.starts_with(&stream[..end]));
}
