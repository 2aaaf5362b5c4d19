//! Host memory in the default configuration: connecting, order and integrity, vectors, doorbells, dead peers, closing.
#![allow(missing_docs)]

mod common;

use std::collections::VecDeque;
use std::io::Write;
use std::net::{Ipv4Addr, TcpStream};
use std::ptr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::*;
use nccl_net_abi::*;

const LIMIT: usize = 512 << 10;

fn start() {
    setup(&[("UCCL_TCPX_SOFT_THREADS", "3")]);
}

fn port(handle: &Handle) -> u16 {
    u16::from_le_bytes([handle[12], handle[13]])
}

#[test]
fn device_properties() {
    start();
    let net = soft_plugin::table();
    let mut count = 0;
    // SAFETY: live out parameters of the right types; zeroed properties are valid.
    unsafe {
        assert_eq!(net.devices.unwrap()(&mut count), 0);
        assert_eq!(count, 1);
        let mut v7: ncclNetProperties_v7 = std::mem::zeroed();
        assert_eq!(net.getProperties.unwrap()(0, &mut v7), 0);
        assert_eq!(std::ffi::CStr::from_ptr(v7.name), c"lo");
        assert_eq!((v7.ptrSupport, v7.netDeviceType, v7.maxRecvs, v7.port), (NCCL_PTR_HOST, NCCL_NET_DEVICE_HOST, 1, 1));
        let mut v8: ncclNetProperties_v8 = std::mem::zeroed();
        assert_eq!(soft_plugin::table_v8().getProperties.unwrap()(0, &mut v8), 0);
        assert_eq!((v8.speed, v8.guid, v8.netDeviceVersion), (v7.speed, v7.guid, NCCL_NET_DEVICE_UNPACK_VERSION));
        assert_eq!(net.getProperties.unwrap()(1, &mut v7), NCCL_INVALID_ARGUMENT);
        assert_eq!(net.getProperties.unwrap()(-1, &mut v7), NCCL_INVALID_ARGUMENT);
    }
}

#[test]
fn nulls_are_refused() {
    start();
    let (net, ext, null) = (soft_plugin::table(), soft_plugin::ext(), ptr::null_mut());
    let (mut out, mut handle) = (ptr::null_mut(), [0u8; 128]);
    // SAFETY: nulls are the test; the rest is live.
    let codes = unsafe {
        [
            net.devices.unwrap()(ptr::null_mut()),
            net.getProperties.unwrap()(0, ptr::null_mut()),
            net.listen.unwrap()(0, null, &mut out),
            net.listen.unwrap()(0, handle.as_mut_ptr().cast(), ptr::null_mut()),
            net.connect.unwrap()(0, null, &mut out, ptr::null_mut()),
            net.connect.unwrap()(0, handle.as_mut_ptr().cast(), &mut out, ptr::null_mut()),
            net.accept.unwrap()(null, &mut out, ptr::null_mut()),
            net.regMr.unwrap()(null, null, 1, NCCL_PTR_HOST, &mut out),
            net.deregMr.unwrap()(null, null),
            net.isend.unwrap()(null, null, 1, 0, null, &mut out),
            net.irecv.unwrap()(null, 1, ptr::null_mut(), ptr::null_mut(), ptr::null_mut(), ptr::null_mut(), &mut out),
            net.iflush.unwrap()(null, 1, ptr::null_mut(), ptr::null_mut(), ptr::null_mut(), &mut out),
            net.test.unwrap()(null, ptr::null_mut(), ptr::null_mut()),
            net.irecvConsumed.unwrap()(null, 1, null),
            net.closeSend.unwrap()(null),
            net.closeRecv.unwrap()(null),
            net.closeListen.unwrap()(null),
            net.getDeviceMr.unwrap()(null, null, &mut out),
            ext.isendv.unwrap()(null, 1, ptr::null(), 0, &mut out),
            ext.irecvv.unwrap()(null, 1, ptr::null(), 0, &mut out),
            ext.setDoorbell.unwrap()(null, ptr::null_mut(), 0),
            ext.progress.unwrap()(null, ptr::null_mut()),
            ext.abandonConnect.unwrap()(null),
            ext.describe.unwrap()(null, ptr::null_mut(), 0),
        ]
    };
    assert!(codes.iter().all(|c| *c == NCCL_INVALID_ARGUMENT), "{codes:?}");
    assert!(net.regMrDmaBuf.is_none());
}

#[test]
fn connect_polls_in_place_and_listen_serves_one_accept() {
    start();
    let (listener, mut handle) = listen();
    let mut device = NO_DEVICE;
    assert!(accept_step(listener, &mut device).unwrap().is_null(), "no peer has connected");
    let sender = connect(&mut handle);
    let receiver = accept(listener);
    assert_eq!(accept_step(listener, &mut device), Err(NCCL_INVALID_USAGE));
    assert_eq!(reg(sender.0, [0u8; 8].as_ptr(), 8, NCCL_PTR_CUDA), Err(NCCL_INVALID_ARGUMENT), "no device memory here");
    close_listen(listener);
    drop((sender, receiver));
}

#[test]
fn connect_to_a_closed_listener_is_an_error() {
    start();
    let (listener, mut handle) = listen();
    close_listen(listener);
    let code = until("refusal", || match connect_step(&mut handle) {
        Ok(comm) => {
            assert!(comm.is_null());
            None
        }
        Err(code) => Some(code),
    });
    assert_eq!(code, NCCL_SYSTEM_ERROR);
}

#[test]
fn a_forged_connect_state_is_refused() {
    start();
    let (listener, mut handle) = listen();
    handle[64..72].copy_from_slice(&0x4141_4141_4141_4141u64.to_le_bytes());
    assert_eq!(connect_step(&mut handle), Err(NCCL_INVALID_ARGUMENT));
    close_listen(listener);
}

#[test]
fn other_connections_do_not_block_the_peer() {
    start();
    let (listener, mut handle) = listen();
    let address = (Ipv4Addr::LOCALHOST, port(&handle));
    let silent: Vec<_> = (0..200).map(|_| TcpStream::connect(address).unwrap()).collect();
    let mut rude = TcpStream::connect(address).unwrap();
    rude.write_all(&[0x47; 300]).unwrap();
    let mut hasty = TcpStream::connect(address).unwrap();
    hasty.write_all(b"GE").unwrap();
    drop(hasty);
    let mut device = NO_DEVICE;
    for _ in 0..20 {
        assert!(accept_step(listener, &mut device).unwrap().is_null());
    }
    let sender = connect(&mut handle);
    let receiver = accept(listener);
    let data = pattern(1, 1000);
    let mut landing = vec![0; 1000];
    let request = receiver.irecvv(&mut [&mut landing]).unwrap();
    sender.isendv(&[&data]).unwrap();
    assert_eq!(wait(request), Ok(1000));
    assert_eq!(landing, data);
    close_listen(listener);
    drop((sender, receiver, silent, rude));
}

/// Sends `messages` and checks them at the receiver, with full windows at both ends.
fn exchange(messages: &[Vec<u8>], mut post: impl FnMut(&Sender, &[u8]) -> Opaque) {
    let (sender, receiver) = pair();
    let mut landing = vec![vec![0u8; LIMIT]; MAX_REQUESTS];
    let mhandle = receiver.reg(&landing[0], NCCL_PTR_HOST);
    let (mut sends, mut receives) = (VecDeque::new(), VecDeque::new());
    let (mut sent, mut posted, mut got) = (0, 0, 0);
    let start = Instant::now();
    while got < messages.len() {
        assert!(start.elapsed() < HANG, "hang: {got} messages received");
        if sent < messages.len() && sends.len() < MAX_REQUESTS {
            sends.push_back(post(&sender, &messages[sent]));
            sent += 1;
        }
        if posted < messages.len() && receives.len() < MAX_REQUESTS {
            let buffer = &mut landing[posted % MAX_REQUESTS];
            receives.push_back(receiver.irecv(buffer.as_mut_ptr(), LIMIT, mhandle).unwrap());
            posted += 1;
        }
        if sends.front().is_some_and(|r| test(*r).unwrap().is_some()) {
            sends.pop_front();
        }
        if let Some(size) = receives.front().and_then(|r| test(*r).unwrap()) {
            assert_eq!(size, messages[got].len());
            assert!(landing[got % MAX_REQUESTS][..size] == messages[got], "message {got} is damaged");
            receiver.consumed(receives.pop_front().unwrap()).unwrap();
            got += 1;
        }
    }
    sends.into_iter().for_each(|r| assert!(wait(r).is_ok()));
    dereg(receiver.comm, mhandle);
}

#[test]
fn ten_thousand_messages_arrive_intact_and_in_order() {
    start();
    let mut rng = Rng(5);
    let size = |rng: &mut Rng| match rng.below(100) {
        0 => 1 + rng.below(LIMIT),
        1..10 => 1 + rng.below(64 << 10),
        _ => 1 + rng.below(2000),
    };
    let messages: Vec<_> = (0..10_000).map(|i| pattern(i, size(&mut rng))).collect();
    let mut mhandle: Opaque = ptr::null_mut();
    exchange(&messages, |sender, message| {
        if mhandle.is_null() {
            mhandle = sender.reg(&messages[0], NCCL_PTR_HOST);
        }
        sender.isend(message.as_ptr(), message.len(), mhandle).unwrap()
    });
}

#[test]
fn full_size_messages_arrive_intact() {
    start();
    let messages: Vec<_> = (0..100).map(|i| pattern(i, LIMIT)).collect();
    exchange(&messages, |sender, message| sender.isendv(&[message]).unwrap());
}

#[test]
fn vectors_of_two_thousand_segments() {
    start();
    let (sender, receiver) = pair();
    let mut rng = Rng(9);
    for total in [2000, 100_000, LIMIT] {
        let data = pattern(total, total);
        let (mut source, mut rest) = (Vec::new(), &data[..]);
        for left in (1..=2000).rev() {
            let len = if left == 1 { rest.len() } else { (rng.below(2 * total / 2000) + 1).min(rest.len() - (left - 1)) };
            let (head, tail) = rest.split_at(len);
            source.push(head);
            rest = tail;
        }
        source.insert(1000, &[]);
        let mut landing = vec![0u8; total];
        let mut target: Vec<&mut [u8]> = landing.chunks_mut(total.div_ceil(2000)).collect();
        let recv = receiver.irecvv(&mut target).unwrap();
        let send = sender.isendv(&source).unwrap();
        assert_eq!(wait(recv), Ok(total));
        wait(send).unwrap();
        receiver.consumed(recv).unwrap();
        assert!(landing == data);
    }
}

#[test]
fn a_shorter_message_than_posted_is_fine() {
    start();
    let (sender, receiver) = pair();
    let mut landing = vec![0xEE; 100];
    let mhandle = receiver.reg(&landing, NCCL_PTR_HOST);
    let request = receiver.irecv(landing.as_mut_ptr(), 100, mhandle).unwrap();
    sender.isendv(&[&[1; 60]]).unwrap();
    assert_eq!(wait(request), Ok(60));
    dereg(receiver.comm, mhandle);
    assert!(landing[..60].iter().all(|b| *b == 1) && landing[60..].iter().all(|b| *b == 0xEE));
}

#[test]
fn a_larger_message_than_posted_fails_the_receiver() {
    start();
    let (sender, receiver) = pair();
    let mut landing = [0xEE; 200];
    let (posted, guard) = landing.split_at_mut(100);
    let request = receiver.irecvv(&mut [posted]).unwrap();
    sender.isendv(&[&[1; 101]]).unwrap();
    assert_eq!(wait(request), Err(NCCL_INTERNAL_ERROR));
    assert!(guard.iter().all(|b| *b == 0xEE));
    assert_eq!(receiver.irecvv(&mut [guard]), Err(NCCL_INTERNAL_ERROR), "the comm is finished");
}

#[test]
fn the_seventeenth_request_is_a_retry() {
    start();
    let (sender, receiver) = pair();
    let data = vec![3u8; LIMIT];
    let mut requests: Vec<_> = (0..16).map(|_| sender.isendv(&[&data]).unwrap()).collect();
    assert!(requests.iter().all(|r| !r.is_null()));
    assert!(sender.isendv(&[&data]).unwrap().is_null());
    let mut landing = vec![vec![0u8; LIMIT]; 16];
    let receives: Vec<_> = landing.iter_mut().map(|l| receiver.irecvv(&mut [l]).unwrap()).collect();
    let mut extra = [0u8; 8];
    assert!(receiver.irecvv(&mut [&mut extra]).unwrap().is_null());
    for (send, recv) in requests.drain(..).zip(&receives) {
        wait(send).unwrap();
        assert_eq!(wait(*recv), Ok(LIMIT));
    }
    assert!(receiver.irecvv(&mut [&mut extra]).unwrap().is_null(), "done but not consumed");
    receiver.consumed(receives[0]).unwrap();
    assert!(!receiver.irecvv(&mut [&mut extra]).unwrap().is_null());
}

#[test]
fn back_pressure_stops_the_sender_and_loses_nothing() {
    start();
    let (sender, receiver) = pair();
    let mut round = 0;
    let data = pattern(3, LIMIT);
    // Nothing is posted: at some point the kernel's buffers are full and a send stays unfinished.
    loop {
        let request = sender.isendv(&[&data]).unwrap();
        let start = Instant::now();
        let mut done = false;
        while !done && start.elapsed() < Duration::from_millis(300) {
            done = test(request).unwrap().is_some();
        }
        round += 1;
        if !done {
            let mut landing = vec![0u8; LIMIT];
            for _ in 0..round {
                landing.fill(0);
                let recv = receiver.irecvv(&mut [&mut landing]).unwrap();
                assert_eq!(wait(recv), Ok(LIMIT));
                assert!(landing == data);
                receiver.consumed(recv).unwrap();
            }
            assert!(wait(request).is_ok());
            return;
        }
        assert!(round < 4096, "the sender was never blocked");
    }
}

#[test]
fn a_dead_receiver_fails_every_send() {
    start();
    let data = vec![1u8; LIMIT];
    let (sender, receiver) = pair();
    let requests: Vec<_> = (0..16).map(|_| sender.isendv(&[&data]).unwrap()).collect();
    drop(receiver);
    let failed = requests.iter().map(|r| wait(*r)).skip_while(|r| r.is_ok()).collect::<Vec<_>>();
    let late = until("refusal", || match sender.isendv(&[&data]) {
        Err(code) => Some(code),
        Ok(r) if r.is_null() => None,
        Ok(r) => wait(r).err(),
    });
    assert_eq!(late, NCCL_SYSTEM_ERROR);
    assert!(failed.iter().all(|r| *r == Err(NCCL_SYSTEM_ERROR)));
}

#[test]
fn a_dead_sender_fails_receives_after_the_data() {
    start();
    let (sender, receiver) = pair();
    let messages: Vec<_> = (0..5).map(|i| pattern(i, 50_000)).collect();
    for message in &messages {
        wait(sender.isendv(&[message]).unwrap()).unwrap();
    }
    drop(sender);
    std::thread::sleep(Duration::from_millis(20));
    let mut landing = vec![vec![0u8; 50_000]; 7];
    let requests: Vec<_> = landing.iter_mut().map_while(|l| receiver.irecvv(&mut [l]).ok()).collect();
    for i in 0..5 {
        assert_eq!(wait(requests[i]), Ok(50_000), "data that arrived before the end counts");
        assert!(landing[i] == messages[i]);
    }
    for request in &requests[5..] {
        assert_eq!(wait(*request), Err(NCCL_SYSTEM_ERROR));
    }
    let mut extra = [0u8; 8];
    assert_eq!(receiver.irecvv(&mut [&mut extra]), Err(NCCL_SYSTEM_ERROR));
}

#[test]
fn small_messages_before_the_end_arrive_even_if_posted_late() {
    start();
    let (sender, receiver) = pair();
    let bell = Doorbell::new();
    bell.attach(receiver.comm);
    let mut landing = [[0u8; 10]; 3];
    let first = receiver.irecvv(&mut [&mut landing[0]]).unwrap();
    for i in 0..3 {
        wait(sender.isendv(&[&[i; 10]]).unwrap()).unwrap();
    }
    drop(sender);
    assert_eq!(wait(first), Ok(10));
    std::thread::sleep(Duration::from_millis(20));
    for (i, place) in landing.iter_mut().enumerate().skip(1) {
        let request = receiver.irecvv(&mut [place]).unwrap();
        assert_eq!(wait(request), Ok(10));
        assert_eq!(*place, [i as u8; 10]);
    }
    until("end", || receiver.irecvv(&mut [&mut landing[0]]).err());
}

#[test]
fn the_doorbell_rings_for_a_dead_peer_with_nothing_posted() {
    start();
    let (sender, receiver) = pair();
    let bell = Doorbell::new();
    bell.attach(receiver.comm);
    bell.armed.store(1, Ordering::SeqCst);
    drop(sender);
    until("bell", || (bell.armed.load(Ordering::SeqCst) == 0).then_some(()));
    assert_eq!(receiver.irecvv(&mut [&mut [0u8; 4]]), Err(NCCL_SYSTEM_ERROR));
}

#[test]
fn no_wake_up_is_lost() {
    start();
    let (there, here) = pair();
    let (back, home) = pair();
    let rounds = 20_000;
    let echo = std::thread::spawn(move || {
        let bell = Doorbell::new();
        bell.attach(here.comm);
        let mut byte = [0u8; 32];
        for _ in 0..rounds {
            let request = here.irecvv(&mut [&mut byte]).unwrap();
            sleep_until_done(&bell, request);
            here.consumed(request).unwrap();
            wait(back.isendv(&[&byte]).unwrap()).unwrap();
        }
        drop(here);
    });
    let bell = Doorbell::new();
    bell.attach(home.comm);
    bell.attach(there.0);
    let mut answer = [0u8; 32];
    for i in 0..rounds {
        let request = home.irecvv(&mut [&mut answer]).unwrap();
        let question = [i as u8; 32];
        let send = there.isendv(&[&question]).unwrap();
        sleep_until_done(&bell, send);
        sleep_until_done(&bell, request);
        assert_eq!(answer, question);
        home.consumed(request).unwrap();
    }
    echo.join().unwrap();
    drop((there, home));
}

fn sleep_until_done(bell: &Doorbell, request: Opaque) {
    let mut done = false;
    while !done {
        bell.sleep_unless(|| {
            done = test(request).unwrap().is_some();
            done
        });
    }
}

#[test]
fn a_post_while_the_io_thread_goes_to_rest_is_seen() {
    start();
    let (sender, receiver) = pair();
    let mut byte = [0u8; 16];
    for _ in 0..300 {
        // Everything is in the kernel before the first receive, so no arriving data hides a lost wake-up.
        for i in 0..400 {
            wait(sender.isendv(&[&[i as u8; 16]]).unwrap()).unwrap();
        }
        for i in 0..400 {
            let request = receiver.irecvv(&mut [&mut byte]).unwrap();
            let start = Instant::now();
            while test(request).unwrap().is_none() {
                assert!(start.elapsed() < HANG, "hang: a posted receive is not served");
                std::hint::spin_loop();
            }
            assert_eq!(byte, [i as u8; 16]);
            receiver.consumed(request).unwrap();
        }
    }
}

#[test]
fn closing_with_open_requests_is_prompt_and_final() {
    start();
    for _ in 0..50 {
        let (sender, receiver) = pair();
        let data = vec![7u8; LIMIT];
        let mut landing = vec![vec![0u8; LIMIT]; 16];
        for place in &mut landing {
            receiver.irecvv(&mut [place]).unwrap();
            sender.isendv(&[&data]).unwrap();
        }
        drop(receiver);
        // From here on nothing writes to the posted memory.
        let before = landing.clone();
        std::thread::sleep(Duration::from_millis(1));
        assert!(before == landing);
        drop(sender);
    }
}

#[test]
fn closing_the_sender_delivers_what_was_done() {
    start();
    let (sender, receiver) = pair();
    let data = pattern(8, LIMIT);
    let sent = 2;
    for _ in 0..sent {
        wait(sender.isendv(&[&data]).unwrap()).unwrap();
    }
    drop(sender);
    let mut landing = vec![0u8; LIMIT];
    for _ in 0..sent {
        let request = receiver.irecvv(&mut [&mut landing]).unwrap();
        assert_eq!(wait(request), Ok(LIMIT));
        assert!(landing == data);
        receiver.consumed(request).unwrap();
    }
}

#[test]
fn many_comms_come_and_go() {
    start();
    let comms: Vec<_> = (0..40).map(|_| pair()).collect();
    let data: Vec<_> = (0..40).map(|i| pattern(i, 10_000)).collect();
    let mut landing = vec![vec![0u8; 10_000]; 40];
    let requests: Vec<_> = comms.iter().zip(&mut landing).map(|((_, r), l)| r.irecvv(&mut [l]).unwrap()).collect();
    for ((sender, _), message) in comms.iter().zip(&data) {
        sender.isendv(&[message]).unwrap();
    }
    for request in requests {
        assert_eq!(wait(request), Ok(10_000));
    }
    assert!(landing == data);
}
