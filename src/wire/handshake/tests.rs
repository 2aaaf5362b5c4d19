//! Two sides joined by the test itself, so that it can change, cut, repeat and reflect what goes between them; and once over a socket.

use super::*;
use crate::wire::hello::tests::sample;
use proptest::prelude::*;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

fn keys(file: &str) -> Arc<Keys> {
    Arc::new(if file.is_empty() { Keys::none() } else { Keys::parse(file.as_bytes()).unwrap() })
}

fn identity() -> Arc<Identity> {
    Arc::new(Identity::generate().unwrap())
}

fn client(file: &str) -> Handshake {
    Handshake::connecting(&identity(), Hello { gpu_index: 1, ..sample() }, keys(file)).unwrap()
}

fn server(file: &str) -> Handshake {
    Handshake::listening(&identity(), Hello { gpu_index: 2, channels: 3, ..sample() }, keys(file)).unwrap()
}

/// All output, taken.
fn take(side: &mut Handshake) -> Vec<u8> {
    let out = side.output().to_vec();
    side.sent(out.len());
    out
}

/// The error of a side that failed.
fn error(side: &mut Handshake) -> Option<Error> {
    side.input(&[]).err()
}

/// Passes bytes both ways until none are left; `relay` may change each flight (numbered from 0).
fn join(client: &mut Handshake, server: &mut Handshake, mut relay: impl FnMut(usize, &mut Vec<u8>)) {
    for flight in 0..8 {
        let (from, to) = if flight % 2 == 0 { (&mut *client, &mut *server) } else { (&mut *server, &mut *client) };
        let mut bytes = take(from);
        relay(flight, &mut bytes);
        let _ = to.input(&bytes);
    }
}

const A: &str = "0123456789abcdef";
const B: &str = "0123456789abcdeF";

/// Both outcomes, or both errors.
fn run(client_file: &str, server_file: &str) -> std::result::Result<(Outcome, Outcome), (Error, Error)> {
    let (mut c, mut s) = (client(client_file), server(server_file));
    join(&mut c, &mut s, |_, _| {});
    match (c.outcome(), s.outcome()) {
        (Some(c), Some(s)) => Ok((c, s)),
        (None, None) => {
            Err((error(&mut c).expect("the connecting side waits"), error(&mut s).expect("the listening side waits")))
        }
        (c, s) => panic!("one side is done: {} {}", c.is_some(), s.is_some()),
    }
}

fn talk(c: &mut Session, s: &mut Session) {
    for (from, to) in [(0, 1), (1, 0)] {
        let both = [&mut *c, &mut *s];
        let mut out = Vec::new();
        both[from].sealer.seal(b"hello", &mut out).unwrap();
        assert!(!out.windows(5).any(|w| w == b"hello"));
        let both = [&mut *c, &mut *s];
        assert_eq!(both[to].opener.open(&mut out).unwrap(), Opened::Record { plain: 5, consumed: 5 + RECORD_OVERHEAD });
        assert_eq!(&out[..5], b"hello");
    }
}

#[test]
fn both_sides_learn_the_same_and_can_talk() {
    for file in ["", A] {
        let (me, you) = (identity(), identity());
        let mut c = Handshake::connecting(&me, Hello { gpu_index: 1, ..sample() }, keys(file)).unwrap();
        let mut s = Handshake::listening(&you, Hello { gpu_index: 2, channels: 3, ..sample() }, keys(file)).unwrap();
        join(&mut c, &mut s, |_, _| {});
        let (mut c, mut s) = (c.outcome().unwrap(), s.outcome().unwrap());
        assert_eq!((c.peer.engine, s.peer.engine), (you.engine(), me.engine()));
        assert_eq!((c.peer.hello.gpu_index, s.peer.hello.gpu_index), (2, 1));
        assert_eq!(c.terms, s.terms);
        assert_eq!(c.terms.channels, 3);
        let proof = if file.is_empty() { Proof::Nothing } else { Proof::Key };
        assert_eq!((&c.peer.proof, &s.peer.proof), (&proof, &proof));
        talk(&mut c.session, &mut s.session);
    }
}
