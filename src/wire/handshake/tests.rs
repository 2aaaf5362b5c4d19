//! Two handshakes joined by the test, so that it can change, cut, repeat and reflect what passes between them; and once over a
//! socket.

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

/// Takes all output.
fn take(side: &mut Handshake) -> Vec<u8> {
    let out = side.output().to_vec();
    side.sent(out.len());
    out
}

/// The error of a failed handshake.
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
        (None, None) => Err((error(&mut c).expect("the connector waits"), error(&mut s).expect("the listener waits"))),
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
fn both_engines_learn_the_same_and_can_talk() {
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

#[test]
fn keys_must_match() {
    for (c, s) in [(A, B), (A, ""), ("", A), ("one:0123456789abcdef\n", "one:0123456789abcdeF\n")] {
        let (ce, se) = run(c, s).unwrap_err();
        assert_eq!((ce.kind(), se.kind()), (ErrorKind::Auth, ErrorKind::Auth), "{c} {s}: {ce}, {se}");
    }
}

#[test]
fn any_key_of_the_listener_is_accepted_and_its_name_reported() {
    let both = "# rotation\nnew:0123456789abcdeF\n\nold: 0123456789abcdef \n";
    let named = |n: &str| Proof::Named(n.into());
    for (file, name) in [(A, "old"), (B, "new"), ("mine:0123456789abcdef\n", "old"), (both, "new")] {
        let (mut c, mut s) = run(file, both).unwrap();
        assert_eq!(s.peer.proof, named(name), "{file}");
        talk(&mut c.session, &mut s.session);
    }
    let (c, s) = run("mine:0123456789abcdef\n", A).unwrap();
    assert_eq!((c.peer.proof, s.peer.proof), (named("mine"), Proof::Key));
    // A connector proves its first key only, and a removed key is no longer accepted.
    for (c, s) in [(both, A), (A, "new:0123456789abcdeF\n")] {
        assert_eq!(run(c, s).unwrap_err().0.kind(), ErrorKind::Auth);
    }
}

/// The lengths of the flights of an undisturbed handshake.
fn flights(file: &str) -> Vec<usize> {
    let mut lens = Vec::new();
    join(&mut client(file), &mut server(file), |_, bytes| lens.push(bytes.len()));
    lens.retain(|&n| n > 0);
    lens
}

#[test]
fn no_changed_byte_of_any_message_goes_unnoticed() {
    for file in ["", A] {
        let lens = flights(file);
        assert_eq!(lens.len(), 4);
        for (flight, at, flip) in (0..4).flat_map(|f| (0..lens[f]).flat_map(move |at| [(f, at, 1), (f, at, 0x80)])) {
            let (mut c, mut s) = (client(file), server(file));
            join(&mut c, &mut s, |f, bytes| {
                if f == flight {
                    bytes[at] ^= flip;
                }
            });
            let what = format!("flight {flight}, byte {at}, {flip:#x}");
            assert!(c.outcome().is_none(), "{what}");
            // The listener is done before the last flight, so the connector's output is what is left.
            assert_eq!(s.outcome().is_some(), flight == 3, "{what}");
        }
    }
}

#[test]
fn messages_cut_anywhere_wait_and_then_go_on() {
    let lens = flights(A);
    for (flight, cut) in (0..4).flat_map(|f| (0..lens[f]).step_by(7).map(move |cut| (f, cut))) {
        let (mut c, mut s) = (client(A), server(A));
        for f in 0..4 {
            let (from, to) = if f % 2 == 0 { (&mut c, &mut s) } else { (&mut s, &mut c) };
            let bytes = take(from);
            let split = if f == flight { cut } else { 0 };
            assert_eq!(to.input(&bytes[..split]).unwrap(), split);
            assert!(to.outcome().is_none() && to.output().is_empty());
            assert_eq!(to.input(&bytes[split..]).unwrap(), bytes.len() - split);
        }
        assert!(c.outcome().is_some() && s.outcome().is_some());
    }
}

#[test]
fn single_bytes_work_and_what_follows_the_handshake_is_left() {
    let (mut c, mut s) = (client(A), server(A));
    for f in 0..4 {
        let (from, to) = if f % 2 == 0 { (&mut c, &mut s) } else { (&mut s, &mut c) };
        for byte in take(from) {
            assert_eq!(to.input(&[byte]).unwrap(), 1);
        }
    }
    let (mut c1, s1) = (c.outcome().unwrap(), s.outcome());
    assert_eq!(c.input(b"more").unwrap(), 0);
    drop(s1);
    // The first sealed bytes may arrive with the last message.
    let (mut c, mut s) = (client(A), server(A));
    for f in 0..3 {
        let (from, to) = if f % 2 == 0 { (&mut c, &mut s) } else { (&mut s, &mut c) };
        to.input(&take(from)).unwrap();
    }
    let mut last = take(&mut s);
    let mut outcome = s.outcome().unwrap();
    let end = last.len();
    outcome.session.seal(b"frame", &mut last).unwrap();
    assert_eq!(c.input(&last).unwrap(), end);
    let mut theirs = c.outcome().unwrap();
    assert!(c1.session.open(&mut last.clone()[end..]).is_err(), "another session's record");
    assert!(matches!(theirs.session.open(&mut last[end..]), Ok(Opened::Record { plain: 5, .. })));
}

#[test]
fn a_recorded_client_cannot_be_played_again() {
    for file in ["", A] {
        let (mut c, mut s) = (client(file), server(file));
        let mut recorded = Vec::new();
        join(&mut c, &mut s, |f, bytes| {
            if f % 2 == 0 {
                recorded.push(bytes.clone());
            }
        });
        assert!(s.outcome().is_some());
        let mut again = server(file);
        again.input(&recorded[0]).unwrap();
        assert!(!again.output().is_empty());
        assert!(again.input(&recorded[1]).is_err());
        assert!(again.outcome().is_none());
    }
}

#[test]
fn an_engine_does_not_accept_itself_as_its_peer() {
    // A relay sends each engine its own messages, relabelled as those that it waits for.
    for file in ["", A] {
        let mut c = client(file);
        let mut opening = take(&mut c);
        assert!(client(file).input(&opening).is_err());
        opening[10] = Kind::Answer as u8;
        opening[12..14].copy_from_slice(&(ANSWER as u16).to_le_bytes());
        assert!(c.input(&opening[..HEADER_BYTES + ANSWER]).is_err());
        let mut s = server(file);
        s.input(client(file).output()).unwrap();
        let mut answer = take(&mut s);
        answer[10] = Kind::Proof as u8;
        let body = *Kind::Proof.body().start();
        answer.resize(HEADER_BYTES + body, 0);
        answer[12..14].copy_from_slice(&(body as u16).to_le_bytes());
        assert!(s.input(&answer).is_err() && s.outcome().is_none());
    }
}

#[test]
fn other_versions_are_refused_with_a_text() {
    for version in [0u16, VERSION - 1, VERSION + 1, 0xffff] {
        // A client of that version.
        let (mut c, mut s) = (client(A), server(A));
        let mut opening = take(&mut c);
        opening[8..10].copy_from_slice(&version.to_le_bytes());
        let refused = s.input(&opening).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Protocol);
        assert!(refused.to_string().contains(&format!("version {version} ")), "{refused}");
        let heard = c.input(&take(&mut s)).unwrap_err();
        assert!(heard.to_string().starts_with("refused by the peer: the peer speaks version"), "{heard}");
        // A listener of that version says so in the form that all versions share.
        let mut refusal = Header { version, kind: 255, flags: 0, body: 12, zero: 7 }.encode().to_vec();
        refusal.extend_from_slice(&(-14i32).to_le_bytes());
        refusal.extend_from_slice(&version.to_le_bytes());
        refusal.extend_from_slice(&version.to_le_bytes());
        refusal.extend_from_slice(b"\n\x1b\xff\0");
        let heard = client(A).input(&refusal).unwrap_err();
        assert_eq!(
            heard.to_string(),
            format!("the peer speaks version {version} of the control protocol, this library {VERSION}")
        );
    }
}

/// Version 1 opened with 136 bytes, of which all versions understand the first ten, and answered with a status and 252 bytes of
/// text.
#[test]
fn version_1_gets_the_reason_and_is_understood() {
    let mut verdict = [0; 256];
    let text = b"the peer speaks version 2 of the control protocol, this library 1";
    verdict[..4].copy_from_slice(&ErrorKind::Protocol.code().to_le_bytes());
    verdict[4..4 + text.len()].copy_from_slice(text);
    let mut c = client(A);
    assert_eq!(take(&mut c).len(), 136);
    let heard = c.input(&verdict).unwrap_err();
    assert_eq!((heard.kind(), heard.to_string().contains("version 1 ")), (ErrorKind::Protocol, true), "{heard}");
    // A connector of version 1 gets the refusal in its own form.
    let mut opening = [0; 136];
    opening[..8].copy_from_slice(b"UCCLTCPX");
    opening[8] = 1;
    let mut s = server(A);
    s.input(&opening).unwrap_err();
    let answer = take(&mut s);
    assert_eq!(answer.len(), 256);
    assert_eq!(answer[..4], ErrorKind::Protocol.code().to_le_bytes());
    let end = answer[4..].iter().position(|&b| b == 0).unwrap();
    let said = std::str::from_utf8(&answer[4..4 + end]).unwrap();
    assert!(said.contains(&format!("version 1 of the control protocol, this library {VERSION}")), "{said}");
}

#[test]
fn flags_cannot_be_talked_down() {
    // Without the flag, a listener with a key refuses. A listener without a key cannot confirm what the connector proves.
    for (file, other) in [(A, A), (A, ""), ("", A), ("", "")] {
        let (mut c, mut s) = (client(file), server(other));
        join(&mut c, &mut s, |f, bytes| {
            if f < 4 && bytes.len() > 11 {
                bytes[11] ^= FLAG_KEY;
            }
        });
        assert!(c.outcome().is_none() && s.outcome().is_none(), "{file} {other}");
    }
}

#[test]
fn other_protocols_are_dropped_at_the_first_wrong_byte() {
    let mut s = server(A);
    assert_eq!(s.input(b"UCCL").unwrap(), 4);
    assert!(s.input(b"GET / HTTP/1.1\r\n").is_err());
    assert!(s.output().is_empty());
    // The length in the header decides; the body need not arrive.
    for body in [0, 1, OPENING as u16 - 1, OPENING as u16 + 1, u16::MAX] {
        let mut s = server(A);
        let header = Header { version: VERSION, kind: 1, flags: FLAG_KEY, body, zero: 0 };
        assert!(s.input(&header.encode()).is_err(), "{body}");
    }
}

type Change = fn(&mut Hello);

/// A handshake whose hello was changed after the check.
fn unchecked(mut side: Handshake, change: Change) -> Handshake {
    change(&mut side.hello);
    side
}

#[test]
fn both_engines_check_hellos_and_learn_the_reason() {
    let cases: [(Change, ErrorKind, &str); 4] = [
        (|h| h.channels = 0, ErrorKind::Protocol, "0 channels"),
        (|h| h.chunk_bytes = 0, ErrorKind::Protocol, "chunks of 0 bytes"),
        (|h| h.peer_timeout_ms = 1, ErrorKind::Protocol, "peer timeout of 1 ms"),
        (|h| h.plugin = "other".into(), ErrorKind::Unsupported, "different network plugins"),
    ];
    for (change, kind, text) in cases {
        assert!(Handshake::listening(&identity(), Hello { channels: 0, ..sample() }, keys(A)).is_err());
        // The listener refuses, in the session.
        let (mut c, mut s) = (unchecked(client(A), change), server(A));
        join(&mut c, &mut s, |_, bytes| assert!(!String::from_utf8_lossy(bytes).contains(text)));
        let (ce, se) = (error(&mut c).unwrap(), error(&mut s).unwrap());
        assert_eq!((ce.kind(), se.kind()), (kind, kind));
        assert!(se.to_string().contains(text) && ce.to_string() == format!("refused by the peer: {se}"), "{ce}, {se}");
    }
    for (change, kind, text) in &cases[..3] {
        // The connector refuses: the listener finds an Abort in its session.
        let (mut c, mut s) = (client(A), unchecked(server(A), *change));
        for f in 0..3 {
            let (from, to) = if f % 2 == 0 { (&mut c, &mut s) } else { (&mut s, &mut c) };
            to.input(&take(from)).unwrap();
        }
        let refused = c.input(&take(&mut s)).unwrap_err();
        assert_eq!((refused.kind(), refused.to_string().contains(text)), (*kind, true), "{refused}");
        let mut sealed = take(&mut c);
        let mut outcome = s.outcome().unwrap();
        let Opened::Record { plain, .. } = outcome.session.open(&mut sealed).unwrap() else { panic!("no record") };
        let setup::Decoded::Message(setup::Message::Abort(verdict), _) = setup::decode(&sealed[..plain]).unwrap() else {
            panic!("no abort")
        };
        assert!(verdict.text.contains(text));
    }
}

#[test]
fn limits_of_the_caller_reach_the_peer() {
    for openings in [0, 1] {
        let (mut c, mut s) = (client(A), server(A));
        if openings == 1 {
            s.input(c.output()).unwrap();
            take(&mut s);
        }
        s.refuse(&err!(Resource, "too many connections are being set up"));
        let heard = c.input(&take(&mut s)).unwrap_err();
        assert_eq!(
            (heard.kind(), heard.to_string()),
            (ErrorKind::Resource, "refused by the peer: too many connections are being set up".into())
        );
    }
    // An engine that is being destroyed looks like a closed peer.
    let mut s = server(A);
    s.refuse(&err!(Canceled, "the engine is being destroyed"));
    let heard = client(A).input(&take(&mut s)).unwrap_err();
    assert_eq!(
        (heard.kind(), heard.to_string()),
        (ErrorKind::RemoteDisconnect, "refused by the peer: the engine is shutting down".into())
    );
    // The texts of internal errors are not sent.
    let mut s = server(A);
    s.refuse(&err!(System, "mmap at 0x7f0000000000"));
    assert_eq!(client(A).input(&take(&mut s)).unwrap_err().to_string(), "refused by the peer: internal error");
}

#[test]
fn an_answer_reveals_nothing_before_the_proof() {
    // With another key, plugin or numbers, the answers have the same length and the same plaintext bytes.
    let answer = |file: &str, change: Change| {
        let mut s = unchecked(server(file), change);
        s.input(client(A).output()).unwrap();
        take(&mut s)
    };
    let (one, two) = (answer(A, |_| {}), answer(B, |h| h.plugin = "another".into()));
    assert_eq!((one.len(), &one[..HEADER_BYTES]), (two.len(), &two[..HEADER_BYTES]));
    assert!(one.len() < HEADER_BYTES + OPENING, "an answer is no amplifier");
}

#[test]
fn keys_of_low_order_are_refused() {
    use snow::resolvers::CryptoResolver;
    let dh = snow::params::DHChoice::Curve25519;
    let mut mine = Primitives { own: [0; KEY] }.resolve_dh(&dh).unwrap();
    mine.set(&[7; KEY]);
    for public in LOW_ORDER {
        assert!(mine.dh(&public, &mut [0; 64]).is_err());
    }
}

const LOW_ORDER: [[u8; KEY]; 2] = {
    let mut one = [0; KEY];
    one[0] = 1;
    [[0; KEY], one]
};

/// A key exchange that generates this public key.
struct Forged([u8; KEY]);

impl snow::types::Dh for Forged {
    fn name(&self) -> &'static str {
        "25519"
    }
    fn pub_len(&self) -> usize {
        KEY
    }
    fn priv_len(&self) -> usize {
        KEY
    }
    fn set(&mut self, _private: &[u8]) {}
    fn generate(&mut self, _rng: &mut dyn snow::types::Random) -> std::result::Result<(), snow::Error> {
        Ok(())
    }
    fn pubkey(&self) -> &[u8] {
        &self.0
    }
    fn privkey(&self) -> &[u8] {
        &[7; KEY]
    }
    fn dh(&self, _public: &[u8], _out: &mut [u8]) -> std::result::Result<(), snow::Error> {
        Err(snow::Error::Dh)
    }
}

impl snow::resolvers::CryptoResolver for Forged {
    fn resolve_rng(&self) -> Option<Box<dyn snow::types::Random>> {
        Primitives { own: self.0 }.resolve_rng()
    }
    fn resolve_dh(&self, _choice: &snow::params::DHChoice) -> Option<Box<dyn snow::types::Dh>> {
        Some(Box::new(Forged(self.0)))
    }
    fn resolve_hash(&self, choice: &snow::params::HashChoice) -> Option<Box<dyn snow::types::Hash>> {
        Primitives { own: self.0 }.resolve_hash(choice)
    }
    fn resolve_cipher(&self, choice: &snow::params::CipherChoice) -> Option<Box<dyn snow::types::Cipher>> {
        Primitives { own: self.0 }.resolve_cipher(choice)
    }
}

/// The listener answers with a refusal that names the reason, and nothing else.
#[test]
fn an_opening_with_a_key_of_low_order_is_refused_before_any_answer() {
    for public in LOW_ORDER {
        let header = Header::new(Kind::Opening, true, OPENING).encode();
        let builder = snow::Builder::with_resolver(PATTERN.parse().unwrap(), Box::new(Forged(public)));
        let builder = builder.local_private_key(&[7; KEY]).unwrap().prologue(&header).unwrap();
        let mut opening = Vec::new();
        write(&mut builder.build_initiator().unwrap(), &header, &[0; PADDING], &mut opening).unwrap();
        let mut s = server(A);
        assert_eq!(s.input(&opening).unwrap_err().kind(), ErrorKind::Protocol);
        let said = take(&mut s);
        let refusal = Header::decode(said.first_chunk().unwrap());
        assert_eq!((refusal.kind, usize::from(refusal.body)), (Kind::Refusal as u8, said.len() - HEADER_BYTES));
        assert!(said.ends_with(b"the peer's key has a low order"), "{said:?}");
    }
}

#[test]
fn only_the_holder_of_an_engines_key_can_use_its_name() {
    let me = identity();
    let name = |identity: &Arc<Identity>| {
        let mut c = Handshake::connecting(identity, sample(), keys(A)).unwrap();
        let mut s = server(A);
        join(&mut c, &mut s, |_, _| {});
        s.outcome().unwrap().peer.engine
    };
    assert_eq!((name(&me), name(&me)), (me.engine(), me.engine()));
    assert_ne!(name(&identity()), me.engine());
}

/// Completes a handshake over a blocking socket. Returns the outcome and the bytes of the session that arrived with its end.
pub(crate) fn drive_blocking(sock: &TcpStream, mut handshake: Handshake, deadline: Instant) -> Result<(Outcome, Vec<u8>)> {
    let io = |e: std::io::Error| err!(RemoteDisconnect, "handshake: {e}");
    let mut buf = [0; 4096];
    loop {
        let out = take(&mut handshake);
        (&mut &*sock).write_all(&out).map_err(io)?;
        if let Some(outcome) = handshake.outcome() {
            return Ok((outcome, Vec::new()));
        }
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        sock.set_read_timeout(Some(left)).map_err(io)?;
        let n = (&mut &*sock).read(&mut buf).map_err(io)?;
        if n == 0 {
            bail!(RemoteDisconnect, "the peer closed the connection during the handshake");
        }
        let taken = match handshake.input(&buf[..n]) {
            Ok(taken) => taken,
            Err(e) => {
                let _ = (&mut &*sock).write_all(&take(&mut handshake));
                return Err(e);
            }
        };
        if let Some(outcome) = handshake.outcome() {
            (&mut &*sock).write_all(&take(&mut handshake)).map_err(io)?;
            return Ok((outcome, buf[taken..n].to_vec()));
        }
    }
}

#[test]
fn it_works_over_a_socket() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    for (file, other) in [(A, A), ("", ""), (A, B)] {
        let sock = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let accepted = listener.accept().unwrap().0;
        let (c, s) = std::thread::scope(|scope| {
            let server = scope.spawn(|| drive_blocking(&accepted, server(other), deadline));
            (drive_blocking(&sock, client(file), deadline), server.join().unwrap())
        });
        assert_eq!((c.is_ok(), s.is_ok()), (file == other, file == other));
        if let (Ok((mut c, _)), Ok((mut s, _))) = (c, s) {
            talk(&mut c.session, &mut s.session);
        }
    }
}

proptest! {
    #[test]
    fn random_bytes_are_survived_in_any_step(step in 0usize..4, keep in 0usize..200, random in proptest::collection::vec(any::<u8>(), 1..2000), piece in 1usize..300) {
        let (mut c, mut s) = (client(A), server(A));
        for f in 0..step {
            let (from, to) = if f % 2 == 0 { (&mut c, &mut s) } else { (&mut s, &mut c) };
            let bytes = take(from);
            to.input(&bytes).unwrap();
        }
        let (from, to) = if step % 2 == 0 { (&mut c, &mut s) } else { (&mut s, &mut c) };
        // A real beginning, so that not only the magic is tested.
        let mut bytes = take(from);
        let whole = keep >= bytes.len();
        bytes.truncate(keep);
        bytes.extend_from_slice(&random);
        for piece in bytes.chunks(piece) {
            if to.input(piece).is_err() {
                break;
            }
            prop_assert!(to.rx.len() <= MAX_MESSAGE && to.tx.len() <= 2 * MAX_MESSAGE);
        }
        prop_assert!(whole || to.outcome().is_none());
    }
}
