//! The connector dials both directions of a channel: either order, keys, other connections, and refusals.
#![allow(missing_docs)]

mod common;

use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, TcpStream};

use common::*;
use nccl_net_abi::*;

const KEYS: [[u8; 32]; 2] = [[0x11; 32], [0x22; 32]];

fn start() {
    setup(&[("UCCL_TCPX_SOFT_THREADS", "2"), ("UCCL_TCPX_EMULATE_DEVICE", "1")]);
}

fn key_listen(listener: Opaque, key: &[u8; 32]) -> ncclResult_t {
    // SAFETY: a live listen comm and key.
    unsafe { soft_plugin::ext().keyListen.unwrap()(listener, key.as_ptr()) }
}

/// A copy of the handle with a key, if any.
fn with_key(handle: &Handle, key: Option<&[u8; 32]>) -> Handle {
    let mut copy = *handle;
    if let Some(key) = key {
        // SAFETY: a live buffer and key.
        assert_eq!(unsafe { soft_plugin::ext().keyConnect.unwrap()(copy.as_mut_ptr().cast(), key.as_ptr()) }, NCCL_SUCCESS);
    }
    copy
}

fn port(handle: &Handle) -> u16 {
    u16::from_le_bytes([handle[12], handle[13]])
}

fn moves(sender: &Sender, receiver: &Receiver) {
    for len in [1, 5000, 300_000] {
        let (sent, mut landing) = (pattern(3, len), vec![0u8; len]);
        let request = receiver.irecvv(&mut [&mut landing]).unwrap();
        let sending = sender.isendv(&[&sent]).unwrap();
        assert!(wait(request) == Ok(len) && wait(sending).is_ok());
        receiver.consumed(request).unwrap();
        assert!(landing == sent);
    }
}

#[test]
fn the_connector_dials_both_directions_in_any_order() {
    start();
    for keyed in [false, true] {
        for order in 0..4 {
            let (listener, handle) = listen();
            let [forth, back] = [0, 1].map(|i| keyed.then_some(&KEYS[i]));
            assert!(forth.is_none_or(|key| key_listen(listener, key) == NCCL_SUCCESS));
            assert_eq!(listen_both(listener, back), NCCL_SUCCESS);
            let (mut for_send, mut for_recv) = (with_key(&handle, forth), with_key(&handle, back));
            // The direction that is dialled first, and the one that is accepted first.
            let (here, there) = if order % 2 == 0 {
                let send = connect(&mut for_send);
                (send, connect_recv(&mut for_recv))
            } else {
                let recv = connect_recv(&mut for_recv);
                (connect(&mut for_send), recv)
            };
            let (recv, send) = if order / 2 == 0 {
                let recv = accept(listener);
                (recv, accept_send(listener))
            } else {
                let send = accept_send(listener);
                (accept(listener), send)
            };
            assert_eq!(accept_step(listener, &mut { NO_DEVICE }), Err(NCCL_INVALID_USAGE));
            assert_eq!(accept_send_step(listener), Err(NCCL_INVALID_USAGE));
            assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, port(&handle))).is_err(), "no other connection is expected");
            close_listen(listener);
            moves(&here, &recv);
            moves(&send, &there);
        }
    }
}

#[test]
fn device_memory_travels_back_too() {
    start();
    let (listener, handle) = listen();
    assert_eq!(listen_both(listener, None), NCCL_SUCCESS);
    let receiver = connect_recv(&mut handle.clone());
    let sender = accept_send(listener);
    close_listen(listener);
    let memory = Box::leak(vec![0u8; 3 * PAGE].into_boxed_slice());
    let at = memory.as_ptr().align_offset(PAGE);
    let mhandle = receiver.reg(&memory[at..at + PAGE], NCCL_PTR_CUDA);
    let request = receiver.irecv(memory[at..].as_mut_ptr(), 100, mhandle).unwrap();
    sender.isendv(&[&pattern(1, 100)]).unwrap();
    assert_eq!(wait(request), Ok(100));
    assert_eq!(receiver.entries(0).len(), 1);
    dereg(receiver.comm, mhandle);
}

/// Whether the listen comm accepts anything within a while.
fn comes(listener: Opaque) -> bool {
    (0..50).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(1));
        !accept_send_step(listener).unwrap().is_null() || !accept_step(listener, &mut { NO_DEVICE }).unwrap().is_null()
    })
}

#[test]
fn a_connection_of_the_other_direction_or_key_is_dropped() {
    start();
    // A hello of one direction with the key of the other, none, or another: not accepted.
    let (listener, handle) = listen();
    assert_eq!((key_listen(listener, &KEYS[0]), listen_both(listener, Some(&KEYS[1]))), (NCCL_SUCCESS, NCCL_SUCCESS));
    let others: [Option<&[u8; 32]>; 3] = [Some(&[9; 32]), None, Some(&KEYS[1])];
    let _forth: Vec<Sender> = others.map(|key| connect(&mut with_key(&handle, key))).into();
    let others: [Option<&[u8; 32]>; 3] = [Some(&[9; 32]), None, Some(&KEYS[0])];
    let _back: Vec<Receiver> = others.map(|key| connect_recv(&mut with_key(&handle, key))).into();
    assert!(!comes(listener), "a wrong connection was accepted");
    // A second valid one of a direction is too many, and does not block the other direction.
    let recv = connect_recv(&mut with_key(&handle, Some(&KEYS[1])));
    let _late = connect_recv(&mut with_key(&handle, Some(&KEYS[1])));
    let back = accept_send(listener);
    assert_eq!(accept_send_step(listener), Err(NCCL_INVALID_USAGE));
    let send = connect(&mut with_key(&handle, Some(&KEYS[0])));
    let forth = accept(listener);
    moves(&send, &forth);
    moves(&back, &recv);
    close_listen(listener);
    // Without `listenBoth` the other direction is not accepted.
    let (listener, handle) = listen();
    let _uninvited = connect_recv(&mut handle.clone());
    for _ in 0..20 {
        assert!(accept_step(listener, &mut { NO_DEVICE }).unwrap().is_null());
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(accept_send_step(listener), Err(NCCL_INVALID_USAGE));
    close_listen(listener);
}

#[test]
fn the_direction_of_a_hello_cannot_be_altered() {
    start();
    let (listener, mut handle) = listen();
    // Even with one key for both directions (a misuse) the direction is part of the proof.
    assert_eq!((key_listen(listener, &KEYS[0]), listen_both(listener, Some(&KEYS[0]))), (NCCL_SUCCESS, NCCL_SUCCESS));
    let (target, between) = (port(&handle), TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    handle[12..14].copy_from_slice(&between.local_addr().unwrap().port().to_le_bytes());
    let _sender = connect(&mut with_key(&handle, Some(&KEYS[0])));
    let mut hello = [0; 48];
    std::io::Read::read_exact(&mut between.accept().unwrap().0, &mut hello).unwrap();
    assert_eq!(hello[12..16], [0; 4]);
    hello[12] = 1;
    let mut to = TcpStream::connect((Ipv4Addr::LOCALHOST, target)).unwrap();
    to.write_all(&hello).unwrap();
    assert!(!comes(listener));
    close_listen(listener);
}

#[test]
fn invalid_calls_are_refused() {
    start();
    let ext = soft_plugin::ext();
    let (null, mut out) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: null pointers and invalid device numbers are refused.
    unsafe {
        assert_eq!(ext.listenBoth.unwrap()(null, std::ptr::null()), NCCL_INVALID_ARGUMENT);
        assert_eq!(ext.acceptSend.unwrap()(null, &mut out), NCCL_INVALID_ARGUMENT);
        assert_eq!(ext.connectRecv.unwrap()(0, null, &mut out, std::ptr::null_mut()), NCCL_INVALID_ARGUMENT);
        assert_eq!(ext.ready.unwrap()(-1), NCCL_INVALID_ARGUMENT);
        assert_eq!(ext.ready.unwrap()(0), NCCL_SUCCESS);
        assert_eq!(ext.flow.unwrap()(null, &mut ucclFlow::default()), NCCL_INVALID_ARGUMENT);
    }
    let (listener, handle) = listen();
    assert_eq!(key_listen(listener, &KEYS[0]), NCCL_SUCCESS);
    assert_eq!(listen_both(listener, None), NCCL_INVALID_USAGE, "one direction with a key and one without");
    close_listen(listener);
    // A connect that was begun in one direction does not end in the other.
    let mut begun = handle;
    assert!(connect_step(&mut begun).unwrap().is_null());
    assert!(connect_recv_step(&mut begun, &mut { NO_DEVICE }).is_err());
    let (sender, receiver) = pair();
    // SAFETY: live comms and structures.
    unsafe {
        assert_eq!(ext.flow.unwrap()(receiver.comm, &mut ucclFlow { size: 32, ..Default::default() }), NCCL_INVALID_ARGUMENT);
        assert_eq!(ext.flow.unwrap()(sender.0, &mut ucclFlow { size: 8, ..Default::default() }), NCCL_INVALID_ARGUMENT);
    }
}

#[test]
fn the_flow_of_a_comm_reports_what_the_peer_has() {
    start();
    let (sender, receiver) = pair();
    let flow = || {
        let mut flow = ucclFlow { size: size_of::<ucclFlow>(), ..Default::default() };
        // SAFETY: a live comm and structure.
        assert_eq!(unsafe { soft_plugin::ext().flow.unwrap()(sender.0, &mut flow) }, NCCL_SUCCESS);
        flow
    };
    let (sent, mut landing) = (pattern(3, 400_000), vec![0u8; 400_000]);
    let sending = sender.isendv(&[&sent]).unwrap();
    let request = receiver.irecvv(&mut [&mut landing]).unwrap();
    assert!(wait(request) == Ok(400_000) && wait(sending).is_ok());
    let after = until("all is acknowledged", || Some(flow()).filter(|flow| flow.waiting == 0 && flow.acknowledged >= 400_000));
    assert!(after.acknowledged < 401_000 && after.min_rtt_us < 1_000_000, "{after:?}");
    assert!(after.unanswered == 0 && after.retries == 0 && after.packet > 500, "{after:?}");
}
