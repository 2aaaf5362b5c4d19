//! A malicious peer that speaks the protocol over its own socket: every violation ends in an error of the comm, never in wrong bytes.
#![allow(missing_docs)]

mod common;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::*;
use nccl_net_abi::*;

fn start() {
    setup(&[("UCCL_TCPX_SOFT_THREADS", "2")]);
}

/// The malicious peer of a receive comm, after a valid hello.
fn malicious_sender() -> (TcpStream, Receiver) {
    let (listener, handle) = listen();
    let mut peer = TcpStream::connect((Ipv4Addr::LOCALHOST, u16::from_le_bytes([handle[12], handle[13]]))).unwrap();
    peer.set_nodelay(true).unwrap();
    let mut hello = b"SFTHELLO".to_vec();
    hello.extend_from_slice(&handle[8..12]);
    hello.extend_from_slice(&[0; 4]);
    hello.extend_from_slice(&handle[36..52]);
    peer.write_all(&hello).unwrap();
    let receiver = accept(listener);
    close_listen(listener);
    (peer, receiver)
}

fn header(len: u32, seq: u32, tag: i32) -> Vec<u8> {
    [len.to_le_bytes(), (seq ^ 0x7C9A_51E3).to_le_bytes(), tag.to_le_bytes()].concat()
}

fn message(seq: u32, tag: i32, payload: &[u8]) -> Vec<u8> {
    [header(payload.len() as u32, seq, tag), payload.to_vec()].concat()
}

/// Posts three receives of ten bytes with tags 7, 8 and 9, lets the peer send `bad`, and expects the first `good` to be done and the
/// others to fail, with nothing written beyond the good ones and the doorbell rung.
fn expect_failure(what: &str, bad: &[u8], end: bool, good: usize, code: ncclResult_t) {
    start();
    let (mut peer, receiver) = malicious_sender();
    let bell = Doorbell::new();
    bell.attach(receiver.comm);
    let mut landing = [[0xEEu8; 10]; 3];
    let requests: Vec<_> =
        landing.iter_mut().zip(7..).map(|(place, tag)| receiver.irecvv_tagged(&mut [place], tag).unwrap()).collect();
    bell.armed.store(1, Ordering::SeqCst);
    peer.write_all(bad).unwrap();
    if end {
        drop(peer);
    } else {
        std::mem::forget(peer);
    }
    for (k, request) in requests.iter().enumerate() {
        let expected = if k < good { Ok(10) } else { Err(code) };
        assert_eq!(wait(*request), expected, "{what}: request {k}");
    }
    // Where a good message had rung, the failure leaves its mark.
    until("bell", || (bell.armed.load(Ordering::SeqCst) != 1).then_some(()));
    for (k, place) in landing.iter().enumerate() {
        let written = place.iter().any(|b| *b != 0xEE);
        // A truncated message may have begun to arrive.
        assert!(k < good || !written || (end && k == good), "{what}: receive {k} was written: {place:?}");
    }
    assert_eq!(progress(receiver.comm), Err(code), "{what}: progress reports the failure");
    assert_eq!(receiver.irecvv(&mut [&mut [0; 4]]), Err(code), "{what}: the comm is finished");
}

#[test]
fn valid_messages_pass() {
    let all = [message(0, 7, &[1; 10]), message(1, 8, &[2; 10]), message(2, 9, &[3; 10])].concat();
    start();
    let (mut peer, receiver) = malicious_sender();
    let mut landing = [[0u8; 10]; 3];
    let requests: Vec<_> =
        landing.iter_mut().zip(7..).map(|(place, tag)| receiver.irecvv_tagged(&mut [place], tag).unwrap()).collect();
    for byte in all {
        peer.write_all(&[byte]).unwrap();
    }
    assert!(requests.iter().all(|r| wait(*r) == Ok(10)));
    assert_eq!(landing, [[1; 10], [2; 10], [3; 10]]);
    assert_eq!(progress(receiver.comm), Ok(3 * 22));
}

#[test]
fn a_wrong_tag() {
    expect_failure("tag of another message", &message(0, 8, &[1; 10]), false, 0, NCCL_INTERNAL_ERROR);
    let second = [message(0, 7, &[1; 10]), message(1, -8, &[1; 10])].concat();
    expect_failure("second tag", &second, false, 1, NCCL_INTERNAL_ERROR);
}

#[test]
fn a_wrong_length() {
    for len in [0, 1, 9, 11, 512 << 10, u32::MAX] {
        let bad = [header(len, 0, 7), vec![1; 64]].concat();
        expect_failure(&format!("length {len}"), &bad, false, 0, NCCL_INTERNAL_ERROR);
    }
    let second = [message(0, 7, &[1; 10]), header(9, 1, 8), vec![1; 64]].concat();
    expect_failure("second length", &second, false, 1, NCCL_INTERNAL_ERROR);
}

#[test]
fn a_wrong_sequence() {
    for seq in [1, 16, u32::MAX, 0x7C9A_51E3] {
        expect_failure(&format!("sequence {seq}"), &message(seq, 7, &[1; 10]), false, 0, NCCL_INTERNAL_ERROR);
    }
    let twice = [message(0, 7, &[1; 10]), message(0, 7, &[1; 10])].concat();
    expect_failure("the same message twice", &twice, false, 1, NCCL_INTERNAL_ERROR);
    let skipped = [message(0, 7, &[1; 10]), message(2, 9, &[1; 10])].concat();
    expect_failure("a missing message", &skipped, false, 1, NCCL_INTERNAL_ERROR);
}

#[test]
fn a_truncated_message() {
    let whole = message(0, 7, &[1; 10]);
    for cut in 0..whole.len() {
        expect_failure(&format!("cut at {cut}"), &whole[..cut], true, 0, NCCL_SYSTEM_ERROR);
    }
    let second = [&whole[..], &message(1, 8, &[2; 10])[..15]].concat();
    expect_failure("second message cut", &second, true, 1, NCCL_SYSTEM_ERROR);
}

#[test]
fn garbage() {
    expect_failure("garbage", &[0x47; 4096], false, 0, NCCL_INTERNAL_ERROR);
}

#[test]
fn a_shorter_message_is_an_error_for_a_vectored_receive_only() {
    start();
    let (mut peer, receiver) = malicious_sender();
    let mut landing = [0xEEu8; 10];
    let mhandle = receiver.reg(&landing, NCCL_PTR_HOST);
    let request = receiver.irecv(landing.as_mut_ptr(), 10, mhandle).unwrap();
    peer.write_all(&message(0, 0, &[1; 6])).unwrap();
    assert_eq!(wait(request), Ok(6), "test reports the received size");
    assert_eq!(landing, [1, 1, 1, 1, 1, 1, 0xEE, 0xEE, 0xEE, 0xEE]);
    dereg(receiver.comm, mhandle);
}

#[test]
fn tags_travel_between_our_own_comms() {
    start();
    let (sender, receiver) = pair();
    let mut landing = [0u8; 4];
    for tag in [0, 1, -1, i32::MAX, i32::MIN] {
        let request = receiver.irecvv_tagged(&mut [&mut landing], tag).unwrap();
        wait(sender.isendv_tagged(&[&[9; 4]], tag).unwrap()).unwrap();
        assert_eq!(wait(request), Ok(4));
        receiver.consumed(request).unwrap();
    }
    let request = receiver.irecvv_tagged(&mut [&mut landing], 5).unwrap();
    sender.isendv_tagged(&[&[9; 4]], 6).unwrap();
    assert_eq!(wait(request), Err(NCCL_INTERNAL_ERROR));
}

/// The malicious peer of a send comm.
fn malicious_receiver() -> (TcpStream, Sender) {
    start();
    let (listener, mut handle) = listen();
    close_listen(listener);
    let stand_in = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    handle[12..14].copy_from_slice(&stand_in.local_addr().unwrap().port().to_le_bytes());
    let sender = connect(&mut handle);
    let mut peer = stand_in.accept().unwrap().0;
    peer.read_exact(&mut [0; 28]).unwrap();
    (peer, sender)
}

/// Ends a connection with a reset.
fn reset(stream: TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    // SAFETY: a live socket and a struct of that size.
    let set = unsafe {
        libc::setsockopt(
            std::os::fd::AsRawFd::as_raw_fd(&stream),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size_of_val(&linger) as libc::socklen_t,
        )
    };
    assert_eq!(set, 0);
}

#[test]
fn a_reset_of_an_idle_comm_rings_and_is_reported() {
    let (peer, sender) = malicious_receiver();
    let bell = Doorbell::new();
    bell.attach(sender.0);
    bell.armed.store(1, Ordering::SeqCst);
    reset(peer);
    until("bell", || (bell.armed.load(Ordering::SeqCst) == 0).then_some(()));
    assert_eq!(progress(sender.0), Err(NCCL_SYSTEM_ERROR));

    let (peer, receiver) = malicious_sender();
    let bell = Doorbell::new();
    bell.attach(receiver.comm);
    bell.armed.store(1, Ordering::SeqCst);
    reset(peer);
    until("bell", || (bell.armed.load(Ordering::SeqCst) == 0).then_some(()));
    assert_eq!(progress(receiver.comm), Err(NCCL_SYSTEM_ERROR));

    // Before the arming it leaves a mark.
    let (peer, receiver) = malicious_sender();
    let bell = Doorbell::new();
    bell.attach(receiver.comm);
    bell.armed.store(0, Ordering::SeqCst);
    reset(peer);
    until("mark", || (bell.armed.load(Ordering::SeqCst) == nccl_net_abi::UCCL_DOORBELL_FAILED).then_some(()));
    assert!(describe(receiver.comm).ends_with("(Connection reset by peer (os error 104))"), "{}", describe(receiver.comm));
}

#[test]
fn a_reset_after_the_last_byte_is_in_the_kernel_is_noticed_without_another_post() {
    let (peer, sender) = malicious_receiver();
    let bell = Doorbell::new();
    bell.attach(sender.0);
    // The send is done, but the peer has not read the message.
    wait(sender.isendv(&[&[7; 4000]]).unwrap()).unwrap();
    bell.armed.store(1, Ordering::SeqCst);
    reset(peer);
    until("bell", || (bell.armed.load(Ordering::SeqCst) == 0).then_some(()));
    assert_eq!(progress(sender.0), Err(NCCL_SYSTEM_ERROR));
    assert_eq!(sender.isendv(&[&[7; 4]]), Err(NCCL_SYSTEM_ERROR));
}

#[test]
fn progress_counts_what_the_peer_has_and_only_that() {
    let (mut peer, sender) = malicious_receiver();
    let before = progress(sender.0).unwrap();
    let data = vec![1u8; 512 << 10];
    let requests: Vec<_> = (0..16).map(|_| sender.isendv(&[&data]).unwrap()).collect();
    // The peer reads nothing: its kernel takes what fits, and then nothing moves.
    let mut last = until("some bytes", || progress(sender.0).ok().filter(|b| *b > before));
    loop {
        std::thread::sleep(Duration::from_millis(300));
        let now = progress(sender.0).unwrap();
        assert!(now >= last);
        if now == last {
            break;
        }
        last = now;
    }
    let total = before + 16 * (12 + data.len() as u64);
    assert!(last < total, "8 MiB fit into the peer's buffer");
    let mut rest = vec![0u8; 16 * (12 + data.len())];
    peer.read_exact(&mut rest).unwrap();
    for request in requests {
        wait(request).unwrap();
    }
    // The connector's kernel counts the SYN as a byte.
    until("all acknowledged", || progress(sender.0).ok().filter(|b| *b >= total - 29 && *b <= total + 29));
}

#[test]
fn a_partial_message_counts_as_progress_of_the_receiver() {
    start();
    let (mut peer, receiver) = malicious_sender();
    let mut landing = vec![0u8; 100_000];
    receiver.irecvv(&mut [&mut landing]).unwrap();
    peer.write_all(&header(100_000, 0, 0)).unwrap();
    for part in 1..=4u64 {
        peer.write_all(&[part as u8; 20_000]).unwrap();
        until("progress", || (progress(receiver.comm).unwrap() == 12 + part * 20_000).then_some(()));
    }
}

#[test]
fn comms_describe_themselves() {
    start();
    let (sender, receiver) = pair();
    let (there, back) = (describe(sender.0), describe(receiver.comm));
    let ends: Vec<&str> = there.strip_suffix(" on lo").unwrap().split(" -> ").collect();
    assert_eq!(back, format!("{} -> {} on lo", ends[1], ends[0]));
    assert!(ends.iter().all(|e| e.starts_with("127.0.0.1:")));
    let mut short = [1u8; 8];
    // SAFETY: a live comm, and room.
    assert_eq!(unsafe { soft_plugin::ext().describe.unwrap()(sender.0, short.as_mut_ptr().cast(), 8) }, NCCL_SUCCESS);
    assert_eq!(&short, b"127.0.0\0");
}
