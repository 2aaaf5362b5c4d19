//! The control connection under attack on the network path, between real engines over real sockets: a relay that listens, changes and
//! repeats; keys that differ, change and leak by their file modes.

mod local;

use local::port;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use uccl_p2p::config::Config;
use uccl_p2p::engine::{Connection, Engine};
use uccl_p2p::status::ErrorKind;

fn config() -> Config {
    Config { num_channels: Some(1), ..local::config() }
}

/// A key file that only its owner can read, removed at the end.
struct KeyFile(PathBuf);

impl KeyFile {
    fn new(name: &str, text: &str) -> KeyFile {
        let file = KeyFile(std::env::temp_dir().join(format!("uccl-security-{name}-{}", std::process::id())));
        file.replace(text);
        file
    }

    fn replace(&self, text: &str) {
        let next = self.0.with_extension("next");
        std::fs::write(&next, text).unwrap();
        std::fs::set_permissions(&next, PermissionsExt::from_mode(0o600)).unwrap();
        std::fs::rename(next, &self.0).unwrap();
    }

    fn config(&self) -> Config {
        Config { auth_key_file: Some(self.0.clone()), ..config() }
    }
}

impl Drop for KeyFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Relays one control connection, keeps a copy of all bytes, and alters a given byte of the connector.
struct Relay {
    port: u16,
    /// All bytes, and those of the connecting side alone.
    seen: Arc<Mutex<Vec<u8>>>,
    sent: Arc<Mutex<Vec<u8>>>,
    /// How many bytes of the connecting side passed, and the position to change.
    forward: Arc<Mutex<(usize, Option<usize>)>>,
}

impl Relay {
    fn new(target: u16) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let relay = Relay { port, seen: Arc::default(), sent: Arc::default(), forward: Arc::default() };
        let (seen, sent, forward) = (relay.seen.clone(), relay.sent.clone(), relay.forward.clone());
        std::thread::spawn(move || {
            let near = listener.accept().unwrap().0;
            let far = TcpStream::connect(("127.0.0.1", target)).unwrap();
            let back = (far.try_clone().unwrap(), near.try_clone().unwrap(), seen.clone());
            std::thread::spawn(move || pass(back.0, back.1, [&back.2, &Mutex::default()], &Mutex::default()));
            pass(near, far, [&seen, &sent], &forward);
        });
        relay
    }

    fn saw(&self, words: &[u8]) -> bool {
        self.seen.lock().unwrap().windows(words.len()).any(|w| w == words)
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, copies: [&Mutex<Vec<u8>>; 2], state: &Mutex<(usize, Option<usize>)>) {
    let mut buffer = [0; 16384];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        copies.iter().for_each(|copy| copy.lock().unwrap().extend_from_slice(&buffer[..n]));
        let mut state = state.lock().unwrap();
        if let Some(at) = state.1.filter(|at| (state.0..state.0 + n).contains(at)) {
            buffer[at - state.0] ^= 1;
        }
        state.0 += n;
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn pair(client: &Engine, server: &Engine, port: u16) -> (Arc<Connection>, Arc<Connection>) {
    let out = client.connect("127.0.0.1", "", port).expect("connect");
    (out, server.accept().expect("accept"))
}

const WORDS: &[u8] = b"a secret that no relay may read";

#[test]
fn a_relay_reads_nothing_with_or_without_a_key() {
    let key = KeyFile::new("relay", "0123456789abcdef0123456789abcdef\n");
    for config in [config(), key.config()] {
        let (server, client) = (Engine::new(config.clone()).unwrap(), Engine::new(config).unwrap());
        let relay = Relay::new(port(&server));
        let (out, _inc) = pair(&client, &server, relay.port);
        out.notify(b"name", WORDS).unwrap();
        let mut got = None;
        until("a notification", || {
            got = server.next_notification();
            got.is_some()
        });
        assert_eq!(got.unwrap().msg, WORDS);
        assert!(relay.saw(b"UCCLTCPX"), "the relay saw the connection");
        for words in [WORDS, b"soft", b"name"] {
            assert!(!relay.saw(words), "{}", String::from_utf8_lossy(words));
        }
    }
}

#[test]
fn a_relay_that_changes_a_byte_after_the_set_up_ends_the_connection() {
    let key = KeyFile::new("change", "0123456789abcdef0123456789abcdef");
    let (server, client) = (Engine::new(key.config()).unwrap(), Engine::new(key.config()).unwrap());
    let relay = Relay::new(port(&server));
    let (out, inc) = pair(&client, &server, relay.port);
    {
        let mut state = relay.forward.lock().unwrap();
        // Inside the message, behind all that a frame begins with.
        state.1 = Some(state.0 + 30);
    }
    out.notify(b"name", WORDS).unwrap();
    until("the end of the connection", || inc.status().is_err());
    let why = inc.status().unwrap_err();
    assert!(why.kind() == ErrorKind::Protocol && why.to_string().contains("changed in transit"), "{why}");
    assert!(server.next_notification().is_none());
    until("the end at the peer", || out.status().is_err());
}

#[test]
fn a_relay_that_changes_any_part_of_the_set_up_gets_no_connection() {
    let key = KeyFile::new("setup", "0123456789abcdef0123456789abcdef");
    let server = Engine::new(Config { handshake_timeout: Duration::from_millis(500), ..key.config() }).unwrap();
    let client = Engine::new(Config { connect_timeout: Duration::from_secs(2), ..key.config() }).unwrap();
    for at in (0..420).step_by(35) {
        let relay = Relay::new(port(&server));
        relay.forward.lock().unwrap().1 = Some(at);
        assert!(client.connect("127.0.0.1", "", relay.port).is_err(), "byte {at}");
    }
    // The engines are as good as before.
    pair(&client, &server, port(&server));
}

#[test]
fn a_recorded_connection_cannot_be_played_again() {
    let key = KeyFile::new("replay", "0123456789abcdef0123456789abcdef");
    let (server, client) = (Engine::new(key.config()).unwrap(), Engine::new(key.config()).unwrap());
    let relay = Relay::new(port(&server));
    let (out, inc) = pair(&client, &server, relay.port);
    out.notify(b"name", WORDS).unwrap();
    until("a notification", || server.next_notification().is_some());
    let recorded = relay.sent.lock().unwrap().clone();
    let refused = || server.stats().unwrap().setups_in_refused;
    let before = refused();
    let mut sock = TcpStream::connect(("127.0.0.1", port(&server))).unwrap();
    sock.write_all(&recorded).unwrap();
    sock.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut answer = Vec::new();
    let _ = sock.read_to_end(&mut answer);
    assert_eq!(refused(), before + 1, "its proof was taken");
    assert!(server.next_notification().is_none());
    assert!(out.status().is_ok() && inc.status().is_ok());
}

#[test]
fn keys_are_changed_without_a_restart() {
    let (old, new) = ("old:0123456789abcdef0123456789abcdef\n", "new:fedcba9876543210fedcba9876543210\n");
    let file = KeyFile::new("server", old);
    let (with_old, with_new) = (KeyFile::new("old", old), KeyFile::new("new", new));
    let server = Engine::new(file.config()).unwrap();
    let [a, b] = [&with_old, &with_new].map(|f| Engine::new(f.config()).unwrap());
    let connects =
        |client: &Engine| client.connect("127.0.0.1", "", port(&server)).map(|_| drop(server.accept())).map_err(|e| e.kind());
    assert_eq!((connects(&a), connects(&b)), (Ok(()), Err(ErrorKind::Auth)));
    file.replace(&format!("{new}{old}"));
    assert_eq!((connects(&a), connects(&b)), (Ok(()), Ok(())));
    file.replace(new);
    assert_eq!((connects(&a), connects(&b)), (Err(ErrorKind::Auth), Ok(())));
    // The connecting side reads its file again too.
    with_old.replace(new);
    assert_eq!(connects(&a), Ok(()));
}

#[test]
fn a_key_file_that_others_may_read_is_refused_with_the_remedy() {
    let file = KeyFile::new("mode", "0123456789abcdef0123456789abcdef");
    std::fs::set_permissions(&file.0, PermissionsExt::from_mode(0o644)).unwrap();
    let error = Engine::new(file.config()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.to_string().contains(&format!("chmod 600 '{}'", file.0.display())), "{error}");
}
