//! Protected comms: which peers are accepted, and the fate of messages that a relay alters, repeats, drops or truncates.
#![allow(missing_docs)]

mod common;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::ptr;

use common::*;
use nccl_net_abi::*;

const KEY: [u8; 32] = [0x5A; 32];
const LEVELS: [i32; 2] = [UCCL_PROTECT_CHECKSUM, UCCL_PROTECT_SEAL];

fn start() {
    setup(&[("UCCL_TCPX_SOFT_THREADS", "2"), ("UCCL_TCPX_EMULATE_DEVICE", "1"), ("UCCL_TCPX_SOFT_FRAGMENT", "random")]);
}

fn protect(comm: Opaque, level: i32, key: &[u8; 32]) -> ncclResult_t {
    // SAFETY: a live comm and key.
    unsafe { soft_plugin::ext().protect.unwrap()(comm, level, key.as_ptr()) }
}

fn key_listen(listener: Opaque, key: &[u8; 32]) {
    // SAFETY: a live listen comm and key.
    assert_eq!(unsafe { soft_plugin::ext().keyListen.unwrap()(listener, key.as_ptr()) }, NCCL_SUCCESS);
}

fn key_connect(handle: &mut Handle, key: &[u8; 32]) {
    // SAFETY: a live buffer and key.
    assert_eq!(unsafe { soft_plugin::ext().keyConnect.unwrap()(handle.as_mut_ptr().cast(), key.as_ptr()) }, NCCL_SUCCESS);
}

fn port(handle: &Handle) -> u16 {
    u16::from_le_bytes([handle[12], handle[13]])
}

/// A comm pair whose bytes pass `relay`, which gets the sender's stream and the receiver's.
fn through(relay: impl FnOnce(TcpStream, TcpStream) + Send + 'static) -> (Sender, Receiver) {
    let (listener, mut handle) = listen();
    let between = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let target = port(&handle);
    handle[12..14].copy_from_slice(&between.local_addr().unwrap().port().to_le_bytes());
    key_listen(listener, &KEY);
    key_connect(&mut handle, &KEY);
    std::thread::spawn(move || {
        let from = between.accept().unwrap().0;
        let to = TcpStream::connect((Ipv4Addr::LOCALHOST, target)).unwrap();
        to.set_nodelay(true).unwrap();
        relay(from, to);
    });
    let sender = connect(&mut handle);
    let receiver = accept(listener);
    close_listen(listener);
    (sender, receiver)
}

const HELLO: usize = 48;

/// Forwards `n` bytes.
fn pass(from: &mut TcpStream, to: &mut TcpStream, n: usize) -> bool {
    let mut bytes = vec![0; n];
    from.read_exact(&mut bytes).is_ok() && to.write_all(&bytes).is_ok()
}

/// Forwards all bytes, with the lowest bit of byte number `at` (after the hello) flipped.
fn damage(at: usize) -> impl FnOnce(TcpStream, TcpStream) + Send + 'static {
    move |mut from, mut to| {
        let mut byte = [0];
        if pass(&mut from, &mut to, HELLO) && pass(&mut from, &mut to, at) && from.read_exact(&mut byte).is_ok() {
            let _ = to.write_all(&[byte[0] ^ 1]);
            let _ = std::io::copy(&mut from, &mut to);
        }
    }
}

/// The fate of a 64-byte message through `relay`.
#[derive(Debug, PartialEq)]
enum Fate {
    Right,
    Wrong,
    Failed,
}

fn fate(level: i32, relay: impl FnOnce(TcpStream, TcpStream) + Send + 'static) -> Fate {
    let (sender, receiver) = through(relay);
    if level > 0 {
        assert_eq!((protect(sender.0, level, &KEY), protect(receiver.comm, level, &KEY)), (NCCL_SUCCESS, NCCL_SUCCESS));
    }
    let (good, more) = (pattern(1, 64), pattern(2, 4096));
    let (mut landing, mut behind) = ([0u8; 64], vec![0u8; 4096]);
    let request = receiver.irecvv(&mut [&mut landing]).unwrap();
    let second = receiver.irecvv(&mut [&mut behind]).unwrap();
    sender.isendv(&[&good]).unwrap();
    // More bytes follow, so that a forged greater length is detected.
    sender.isendv(&[&more]).unwrap();
    match (wait(request), wait(second)) {
        (Ok(64), Ok(4096)) if landing[..] == good && behind == more => Fate::Right,
        (Ok(_), Ok(_)) => Fate::Wrong,
        (Ok(64), Err(_)) if landing[..] == good => Fate::Failed,
        (Ok(_), Err(_)) => Fate::Wrong,
        (Err(_), _) => Fate::Failed,
    }
}

#[test]
fn damage_by_a_relay_is_detected_at_every_byte() {
    start();
    let fates = |level| -> Vec<Fate> { (0..130).map(|at| fate(level, damage(at))).collect() };
    // Shows that the test can fail: without protection most of these bytes arrive undetected.
    assert!(fates(0).iter().filter(|f| **f == Fate::Wrong).count() >= 64);
    for level in LEVELS {
        assert!(fates(level).iter().all(|f| *f == Fate::Failed), "level {level}");
        assert_eq!(fate(level, |mut from, mut to| drop(std::io::copy(&mut from, &mut to))), Fate::Right);
    }
}

/// Sends three messages of 100 bytes through a relay that sees each as one piece, and returns how many arrive intact.
fn right(relay: impl FnOnce(Vec<Vec<u8>>, &mut TcpStream) + Send + 'static) -> usize {
    const WIRE: usize = 100 + 44;
    let (sender, receiver) = through(move |mut from, mut to| {
        assert!(pass(&mut from, &mut to, HELLO));
        let mut messages = vec![vec![0; WIRE]; 3];
        messages.iter_mut().for_each(|m| from.read_exact(m).unwrap());
        relay(messages, &mut to);
    });
    assert_eq!((protect(sender.0, 2, &KEY), protect(receiver.comm, 2, &KEY)), (NCCL_SUCCESS, NCCL_SUCCESS));
    let good: Vec<Vec<u8>> = (0..3).map(|k| pattern(k, 100)).collect();
    let mut landing = vec![vec![0u8; 100]; 3];
    let requests: Vec<_> = landing.iter_mut().map(|place| receiver.irecvv(&mut [place]).unwrap()).collect();
    for message in &good {
        sender.isendv(&[message]).unwrap();
    }
    let done = requests.iter().take_while(|r| wait(**r).is_ok()).count();
    assert_eq!(landing[..done], good[..done], "a wrong message was reported done");
    done
}

#[test]
fn sealed_messages_cannot_be_repeated_reordered_dropped_or_truncated() {
    start();
    assert_eq!(right(|m, to| m.iter().for_each(|m| to.write_all(m).unwrap())), 3);
    for (order, good) in [([0, 0, 1], 1), ([1, 0, 2], 0), ([0, 2, 1], 1), ([2, 1, 0], 0)] {
        assert_eq!(right(move |m, to| order.iter().for_each(|&k| drop(to.write_all(&m[k])))), good, "{order:?}");
    }
    for cut in [1, 43, 44, 45, 143] {
        assert_eq!(right(move |m, to| to.write_all(&[&m[0][..], &m[1][..cut]].concat()).unwrap()), 1, "{cut}");
    }
    assert_eq!(right(|m, to| to.write_all(&m[0]).unwrap()), 1);
}

#[test]
fn all_kinds_of_messages_pass_a_protected_comm() {
    start();
    for level in LEVELS {
        let (sender, receiver) = pair();
        assert_eq!((protect(sender.0, level, &KEY), protect(receiver.comm, level, &KEY)), (NCCL_SUCCESS, NCCL_SUCCESS));
        let mut rng = Rng(7);
        let device = Box::leak(vec![0u8; 2 << 20].into_boxed_slice());
        let at = device.as_ptr().align_offset(PAGE);
        let device = &device[at..at + (1 << 20)];
        let (from, to) = (sender.reg(device, NCCL_PTR_CUDA), receiver.reg(device, NCCL_PTR_CUDA));
        for round in 0..60 {
            let size = 1 + [rng.below(100), rng.below(20_000), rng.below(500 << 10)][round % 3];
            let good = pattern(round, size);
            if round % 4 == 3 {
                let request = receiver.irecv(device.as_ptr().cast_mut(), size, to).unwrap();
                // SAFETY: the test's own memory, which nothing reads now.
                unsafe { ptr::copy_nonoverlapping(good.as_ptr(), device.as_ptr().cast_mut(), size) };
                wait(sender.isend(device.as_ptr(), size, from).unwrap()).unwrap();
                wait(request).unwrap();
                assert_eq!(receiver.unpack(round % MAX_REQUESTS, size), good, "level {level}, round {round}");
                receiver.consumed(request).unwrap();
                continue;
            }
            let mut landing = vec![0; size];
            let pieces = 1 + round % 3;
            let request = receiver.irecvv(&mut landing.chunks_mut(size.div_ceil(pieces)).collect::<Vec<_>>()).unwrap();
            let sent = sender.isendv(&good.chunks(size.div_ceil(1 + round % 5)).collect::<Vec<_>>()).unwrap();
            assert_eq!(wait(request), Ok(size));
            wait(sent).unwrap();
            receiver.consumed(request).unwrap();
            assert!(landing == good, "level {level}, round {round}");
        }
        dereg(sender.0, from);
        dereg(receiver.comm, to);
    }
}

#[test]
fn windows_full_of_large_messages_pass() {
    start();
    for level in LEVELS {
        let (sender, receiver) = pair();
        assert_eq!((protect(sender.0, level, &KEY), protect(receiver.comm, level, &KEY)), (NCCL_SUCCESS, NCCL_SUCCESS));
        for round in 0..4 {
            let good: Vec<Vec<u8>> = (0..MAX_REQUESTS).map(|k| pattern(round * 100 + k, 300_000 + k)).collect();
            let mut landing: Vec<Vec<u8>> = good.iter().map(|g| vec![0; g.len()]).collect();
            let sends: Vec<_> = good.iter().map(|g| sender.isendv(&[g]).unwrap()).collect();
            let receives: Vec<_> = landing.iter_mut().map(|l| receiver.irecvv(&mut [l]).unwrap()).collect();
            for request in &receives {
                wait(*request).unwrap();
                receiver.consumed(*request).unwrap();
            }
            sends.iter().for_each(|s| assert!(wait(*s).is_ok()));
            assert!(landing == good, "level {level}");
        }
    }
}

/// Another transfer may write to the same bytes at the same time: the application decides on such races; they are not damage.
#[test]
fn a_sealed_message_tolerates_other_writes_to_its_destination() {
    start();
    let (go, gone) = std::sync::mpsc::channel();
    let (sender, receiver) = through(move |mut from, mut to| {
        if pass(&mut from, &mut to, HELLO) && pass(&mut from, &mut to, 50_000) && gone.recv().is_ok() {
            let _ = std::io::copy(&mut from, &mut to);
        }
    });
    let level = UCCL_PROTECT_SEAL;
    assert_eq!((protect(sender.0, level, &KEY), protect(receiver.comm, level, &KEY)), (NCCL_SUCCESS, NCCL_SUCCESS));
    let (good, mut landing) = (pattern(1, 100_000), vec![0u8; 100_000]);
    let request = receiver.irecvv(&mut [&mut landing]).unwrap();
    sender.isendv(&[&good]).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert!(landing.iter().all(|&byte| byte == 0), "unauthenticated bytes were written");
    landing.fill(0xEE);
    go.send(()).unwrap();
    assert_eq!(wait(request), Ok(100_000));
    assert!(landing == good);
}

#[test]
fn a_damaged_device_receive_publishes_no_descriptors() {
    start();
    for level in LEVELS {
        let (sender, receiver) = through(damage(60));
        assert_eq!((protect(sender.0, level, &KEY), protect(receiver.comm, level, &KEY)), (NCCL_SUCCESS, NCCL_SUCCESS));
        let memory = Box::leak(vec![0u8; 3 * PAGE].into_boxed_slice());
        let at = memory.as_ptr().align_offset(PAGE);
        let mhandle = receiver.reg(&memory[at..at + PAGE], NCCL_PTR_CUDA);
        let request = receiver.irecv(memory[at..].as_mut_ptr(), 100, mhandle).unwrap();
        sender.isendv(&[&pattern(1, 100)]).unwrap();
        assert_eq!(wait(request), Err(NCCL_INTERNAL_ERROR));
        assert!(receiver.entries(0).is_empty(), "level {level}: an unpack could run");
        dereg(receiver.comm, mhandle);
    }
}

#[test]
fn a_stolen_cookie_is_not_accepted() {
    start();
    let (listener, mut handle) = listen();
    key_listen(listener, &KEY);
    let hello = |magic: &[u8], proof: &[u8]| {
        let mut thief = TcpStream::connect((Ipv4Addr::LOCALHOST, port(&handle))).unwrap();
        thief.write_all(&[magic, &handle[8..12], &[0; 4], proof].concat()).unwrap();
        thief
    };
    let cookie = handle[36..52].to_vec();
    let padded = [&cookie[..], &[0; 16]].concat();
    let _thieves = [hello(b"SFTHELLO", &cookie), hello(b"SFTHELLO", &padded), hello(b"SFTKEYED", &padded)];
    let mut stolen = handle;
    key_connect(&mut stolen, &[1; 32]);
    let _thief = connect(&mut stolen);
    let _keyless = connect(&mut handle.clone());
    for _ in 0..50 {
        assert!(accept_step(listener, &mut NO_DEVICE.clone()).unwrap().is_null(), "a thief was accepted");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    key_connect(&mut handle, &KEY);
    let sender = connect(&mut handle);
    let receiver = accept(listener);
    close_listen(listener);
    let mut landing = [0; 4];
    let request = receiver.irecvv(&mut [&mut landing]).unwrap();
    sender.isendv(&[b"mine"]).unwrap();
    assert_eq!((wait(request), &landing), (Ok(4), b"mine"));
}

#[test]
fn a_protected_receiver_takes_nothing_from_another_kind_of_sender() {
    start();
    for (ours, theirs, key) in [(0, 1, KEY), (2, 1, KEY), (1, 2, KEY), (0, 2, KEY), (2, 2, [1; 32])] {
        let (sender, receiver) = pair();
        assert!(ours == 0 || protect(sender.0, ours, &KEY) == NCCL_SUCCESS);
        assert!(theirs == 0 || protect(receiver.comm, theirs, &key) == NCCL_SUCCESS);
        let mut landing = [0; 64];
        let request = receiver.irecvv(&mut [&mut landing]).unwrap();
        sender.isendv(&[&[7; 64]]).unwrap();
        // Enough bytes for any head.
        let _ = sender.isendv(&[&[7; 64]]);
        assert_eq!(wait(request), Err(NCCL_INTERNAL_ERROR), "{ours} and {theirs}");
        assert_eq!(landing, [0; 64]);
    }
}

#[test]
fn protection_is_set_before_the_first_message_or_not_at_all() {
    start();
    let (sender, receiver) = pair();
    for level in [-1, 0, 3] {
        assert_eq!(protect(sender.0, level, &KEY), NCCL_INVALID_ARGUMENT);
    }
    // SAFETY: a live comm; a null key is refused.
    assert_eq!(unsafe { soft_plugin::ext().protect.unwrap()(sender.0, 2, ptr::null()) }, NCCL_INVALID_ARGUMENT);
    // SAFETY: null is refused.
    assert_eq!(unsafe { soft_plugin::ext().protect.unwrap()(ptr::null_mut(), 1, ptr::null()) }, NCCL_INVALID_ARGUMENT);
    let mut landing = [0; 4];
    let request = receiver.irecvv(&mut [&mut landing]).unwrap();
    assert_eq!(protect(receiver.comm, 1, &KEY), NCCL_INVALID_USAGE);
    sender.isendv(&[b"mine"]).unwrap();
    assert_eq!(protect(sender.0, 1, &KEY), NCCL_INVALID_USAGE);
    assert_eq!(wait(request), Ok(4));
}
