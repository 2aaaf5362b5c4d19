//! Data channels under attack on the network path, between real engines over real sockets. This binary's own `connect` leads each data
//! connection over a relay that damages some of its bytes; the control connection stays as it is.

mod local;

use local::port;
use std::cell::Cell;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use uccl_p2p::config::Config;
use uccl_p2p::engine::{Connection, Direction, Engine, LocalSegment};
use uccl_p2p::status::ErrorKind;
use uccl_p2p::types::{Protect, RemoteAccess};

/// Ports that are not relayed: those of control connections.
static CONTROL: Mutex<Vec<u16>> = Mutex::new(Vec::new());
/// Whether relays change bytes, and how many they have changed.
static DAMAGE: AtomicBool = AtomicBool::new(false);
static DAMAGED: AtomicU64 = AtomicU64::new(0);
/// All bytes that passed relays, while a test records them.
static SEEN: Mutex<Option<Vec<u8>>> = Mutex::new(None);
/// The tests share all of this: one at a time.
static ONE: Mutex<()> = Mutex::new(());

thread_local! {
    /// This thread's connects go where they say.
    static DIRECT: Cell<bool> = const { Cell::new(false) };
}

/// Stands before the C library's `connect` for all code of this process.
///
/// # Safety
/// As `connect` of the C library.
#[no_mangle]
pub unsafe extern "C" fn connect(fd: libc::c_int, address: *const libc::sockaddr, len: libc::socklen_t) -> libc::c_int {
    // SAFETY: the caller's address of `len` bytes, read as its family says.
    let mut target = unsafe {
        if len as usize >= size_of::<libc::sockaddr_in>() && i32::from((*address).sa_family) == libc::AF_INET {
            Some(*address.cast::<libc::sockaddr_in>())
        } else {
            None
        }
    };
    if let Some(target) = &mut target {
        let port = u16::from_be(target.sin_port);
        let control = CONTROL.lock().unwrap().contains(&port);
        if !DIRECT.get() && !control && port != 0 {
            target.sin_port = relay(port).to_be();
        }
    }
    let address = target.as_ref().map_or(address, |t| std::ptr::from_ref(t).cast());
    // SAFETY: as the caller's, or a copy of it with another port.
    unsafe { libc::syscall(libc::SYS_connect, fd, address, len) as libc::c_int }
}

/// A relay for one connection to this port.
fn relay(port: u16) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let own = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        DIRECT.set(true);
        let near = listener.accept().unwrap().0;
        let Ok(far) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else { return };
        // Data goes one way on a channel's connection, whichever engine dialled it.
        let (back, end) = (far.try_clone().unwrap(), near.try_clone().unwrap());
        std::thread::spawn(move || pass(&back, &end, u64::from(port) << 1));
        pass(&near, &far, u64::from(port) | 1);
    });
    own
}

/// Passes bytes on until the end of either stream, damaged or not.
fn pass(mut from: &TcpStream, mut to: &TcpStream, mut seed: u64) {
    let (mut buffer, mut passed) = (vec![0; 64 << 10], 0u64);
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        if let Some(seen) = &mut *SEEN.lock().unwrap() {
            seen.extend_from_slice(&buffer[..n]);
        }
        // The hello passes: without it there is no channel.
        if DAMAGE.load(Ordering::Relaxed) && passed > 0 && n > 1000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            if (seed >> 60) == 0 {
                buffer[(seed >> 20) as usize % n] ^= 1 << ((seed >> 17) & 7);
                DAMAGED.fetch_add(1, Ordering::Relaxed);
            }
        }
        passed += n as u64;
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

fn config(protect: Protect) -> Config {
    Config { num_channels: Some(2), eager_bytes: 0, protect, ..local::config() }
}

/// A key file that stays for the life of the test.
fn with_key(config: Config) -> Config {
    static FILE: OnceLock<std::path::PathBuf> = OnceLock::new();
    let file = FILE.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("uccl-protect-{}", std::process::id()));
        std::fs::write(&path, "node-a:0123456789abcdef0123456789abcdef").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        path
    });
    Config { auth_key_file: Some(file.clone()), ..config }
}

fn engine(config: Config) -> Arc<Engine> {
    let engine = Engine::new(config).unwrap();
    CONTROL.lock().unwrap().push(port(&engine));
    engine
}

fn pair(a: &Engine, b: &Engine) -> Result<(Arc<Connection>, Arc<Connection>), ErrorKind> {
    let out = a.connect("127.0.0.1", "", port(b)).map_err(|e| e.kind())?;
    Ok((out, b.accept().map_err(|e| e.kind())?))
}

const LEN: usize = 300_000;

/// What became of transfers.
#[derive(Debug, Default)]
struct Tally {
    right: usize,
    wrong: usize,
    failed: usize,
}

/// Writes and reads over a connection until it fails, at most `n`.
fn transfers(a: &Engine, b: &Engine, n: usize, tally: &mut Tally) {
    let Ok((out, _accepted)) = pair(a, b) else {
        tally.failed += 1;
        return;
    };
    let (mut mine, mut theirs) = (vec![0u8; LEN], vec![0u8; LEN]);
    for round in 0..n {
        let (direction, from, to) = match round % 2 {
            0 => (Direction::Write, &mut mine, &mut theirs),
            _ => (Direction::Read, &mut theirs, &mut mine),
        };
        from.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i * 31 + round * 7 + i / 251) as u8);
        to.fill(0);
        let (here, there) = (mine.as_ptr() as usize, theirs.as_ptr() as usize);
        let (mr, remote) = (a.register(here, LEN).unwrap(), b.register(there, LEN).unwrap());
        let item = b.fifo_item(remote, there, LEN).unwrap();
        let local = LocalSegment { mr, addr: here, len: LEN };
        let ended = out.transfer(direction, std::iter::once((local, item))).and_then(|id| out.wait(id, None));
        let ok = ended.is_ok_and(|s| s.complete);
        a.deregister(mr).unwrap();
        b.deregister(remote).unwrap();
        match ok {
            true if mine == theirs => tally.right += 1,
            true => tally.wrong += 1,
            false => {
                tally.failed += 1;
                return;
            }
        }
    }
}

fn under_damage(config: &Config) -> Tally {
    let (a, b) = (engine(config.clone()), engine(config.clone()));
    let mut tally = Tally::default();
    DAMAGED.store(0, Ordering::Relaxed);
    DAMAGE.store(true, Ordering::Relaxed);
    // Many connections, since the first damage that is noticed ends one.
    for _ in 0..40 {
        transfers(&a, &b, 12, &mut tally);
    }
    DAMAGE.store(false, Ordering::Relaxed);
    println!("{:?}, key {}: {tally:?}, {DAMAGED:?} bytes damaged", config.protect, config.auth_key_file.is_some());
    assert!(DAMAGED.load(Ordering::Relaxed) > 10, "the relays damaged nothing");
    tally
}

#[test]
fn a_damaging_relay_makes_no_transfer_ok_with_wrong_bytes() {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    // The test can fail: without protection it finds wrong bytes.
    assert!(under_damage(&config(Protect::Off)).wrong > 0);
    for config in [config(Protect::Integrity), with_key(config(Protect::Integrity)), config(Protect::Encrypt)] {
        let tally = under_damage(&config);
        assert_eq!(tally.wrong, 0, "{:?}", config.protect);
        assert!(tally.failed > 0 && tally.right > 0);
    }
}

#[test]
fn the_stricter_side_decides_what_a_listener_sees() {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    const MARK: &[u8] = b"a private conversation";
    for (ours, theirs, shown) in [
        (Protect::Off, Protect::Off, true),
        (Protect::Integrity, Protect::Off, true),
        (Protect::Off, Protect::Encrypt, false),
        (Protect::Encrypt, Protect::Integrity, false),
    ] {
        let (a, b) = (engine(config(ours)), engine(config(theirs)));
        let (out, _accepted) = pair(&a, &b).unwrap();
        let (mine, theirs) = (MARK.repeat(4000), vec![0u8; MARK.len() * 4000]);
        let (here, there) = (mine.as_ptr() as usize, theirs.as_ptr() as usize);
        let (mr, remote) = (a.register(here, mine.len()).unwrap(), b.register(there, mine.len()).unwrap());
        let item = b.fifo_item(remote, there, mine.len()).unwrap();
        *SEEN.lock().unwrap() = Some(Vec::new());
        let local = LocalSegment { mr, addr: here, len: mine.len() };
        let id = out.transfer(Direction::Write, std::iter::once((local, item))).unwrap();
        assert!(out.wait(id, None).unwrap().complete && mine == theirs);
        let seen = SEEN.lock().unwrap().take().unwrap();
        assert!(seen.len() > mine.len());
        assert_eq!(seen.windows(MARK.len()).any(|w| w == MARK), shown, "{ours:?}");
        a.deregister(mr).unwrap();
        b.deregister(remote).unwrap();
    }
}

#[test]
fn peers_learn_the_name_of_the_proved_key_and_keep_to_a_regions_limits() {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    let (a, b) = (engine(with_key(config(Protect::Encrypt))), engine(with_key(config(Protect::Off))));
    let (out, accepted) = pair(&a, &b).unwrap();
    assert_eq!((out.peer_key(), accepted.peer_key()), (Some("node-a"), Some("node-a")));
    let (mine, theirs) = (vec![1u8; 4096], vec![2u8; 4096]);
    let (here, there) = (mine.as_ptr() as usize, theirs.as_ptr() as usize);
    let mr = a.register(here, 4096).unwrap();
    let local = LocalSegment { mr, addr: here, len: 4096 };
    for (access, write) in [(RemoteAccess::READ, false), (RemoteAccess::WRITE, true)] {
        let remote = b.register_with(there, 4096, access).unwrap();
        let item = b.fifo_item(remote, there, 4096).unwrap();
        for (direction, allowed) in [(Direction::Write, write), (Direction::Read, !write)] {
            let id = out.transfer(direction, std::iter::once((local, item))).unwrap();
            let ended = out.wait(id, None).map(|_| ()).map_err(|e| e.kind());
            assert_eq!(ended, if allowed { Ok(()) } else { Err(ErrorKind::RemoteAccess) }, "{access:?} {direction:?}");
        }
        b.deregister(remote).unwrap();
    }
    a.deregister(mr).unwrap();
}

/// More messages of a channel and more records of the control stream than one key seals.
#[test]
fn a_connection_outlives_its_keys() {
    let _one = ONE.lock().unwrap();
    const LEN: usize = 96 << 20;
    const NOTES: usize = 70_000;
    let own = || with_key(Config { num_channels: Some(1), chunk_bytes: 4096, ..config(Protect::Encrypt) });
    let (a, b) = (engine(own()), engine(own()));
    let (out, inc) = pair(&a, &b).unwrap();
    let (source, mut target) = (vec![0x5au8; LEN], vec![0u8; LEN]);
    let (from, to) = (a.register(source.as_ptr() as usize, LEN).unwrap(), b.register(target.as_mut_ptr() as usize, LEN).unwrap());
    let item = b.fifo_item(to, target.as_ptr() as usize, LEN).unwrap();
    let local = LocalSegment { mr: from, addr: source.as_ptr() as usize, len: LEN };
    let id = out.transfer(Direction::Write, std::iter::once((local, item))).unwrap();
    assert!(out.wait(id, None).unwrap().complete);
    assert!(source == target);
    // One record each, since each is taken before the next is sent.
    for n in 0..NOTES {
        inc.notify(b"n", &n.to_le_bytes()).unwrap();
        let note = std::iter::repeat_with(|| a.next_notification()).flatten().next().unwrap();
        assert_eq!(note.msg, n.to_le_bytes());
    }
    assert!(out.status().is_ok() && inc.status().is_ok());
}

/// Bytes where destinations overlap are undefined, and nothing else: no message was altered in transit.
#[test]
fn destinations_that_overlap_spoil_no_connection() {
    let _one = ONE.lock().unwrap();
    const LEN: usize = 512 << 10;
    for protect in [Protect::Off, Protect::Integrity, Protect::Encrypt] {
        let (a, b) = (engine(config(protect)), engine(config(protect)));
        let (out, _inc) = pair(&a, &b).unwrap();
        let (mut mine, theirs) = (vec![0x5au8; LEN], vec![0x5au8; LEN]);
        let (here, there) = (mine.as_mut_ptr() as usize, theirs.as_ptr() as usize);
        let (from, to) = (a.register(here, LEN).unwrap(), b.register(there, LEN).unwrap());
        let item = b.fifo_item(to, there, LEN).unwrap();
        let segment = (LocalSegment { mr: from, addr: here, len: LEN }, item);
        for direction in [Direction::Write, Direction::Read] {
            for round in 0..20 {
                // Chunks of one transfer, and of several at once.
                let ids = [16, 1, 1, 1].map(|n| out.transfer(direction, std::iter::repeat_n(segment, n)).unwrap());
                for id in ids {
                    let ended = out.wait(id, None);
                    assert!(ended.as_ref().is_ok_and(|state| state.complete), "{protect:?} {direction:?} {round}: {ended:?}");
                }
            }
        }
        assert!(mine == theirs && mine.iter().all(|&byte| byte == 0x5a), "all wrote the same");
    }
}
