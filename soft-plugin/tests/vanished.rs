//! A peer that disappears silently, like a host that loses power: keepalive detects it on idle comms.
#![allow(missing_docs)]

mod common;

use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;

use common::*;
use nccl_net_abi::*;

/// Closes a connection without telling the peer; false if not permitted.
fn vanish(stream: TcpStream) -> bool {
    let on: libc::c_int = 1;
    // SAFETY: a live socket and an int.
    let code = unsafe {
        libc::setsockopt(stream.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_REPAIR, (&raw const on).cast(), size_of_val(&on) as u32)
    };
    code == 0
}

#[test]
fn keepalive_detects_a_vanished_peer_of_an_idle_comm() {
    setup(&[("UCCL_TCPX_SOFT_THREADS", "1"), ("UCCL_TCPX_SOFT_KEEPALIVE_S", "1")]);
    let port = |handle: &Handle| u16::from_le_bytes([handle[12], handle[13]]);
    let (listener, handle) = listen();
    let mut there = TcpStream::connect((Ipv4Addr::LOCALHOST, port(&handle))).unwrap();
    there.write_all(&[b"SFTHELLO", &handle[8..12], &[0; 4], &handle[36..52]].concat()).unwrap();
    let receiver = accept(listener);
    close_listen(listener);

    let (closed, mut handle) = listen();
    close_listen(closed);
    let stand_in = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    handle[12..14].copy_from_slice(&stand_in.local_addr().unwrap().port().to_le_bytes());
    let sender = connect(&mut handle);
    let back = stand_in.accept().unwrap().0;

    let bells = [receiver.comm, sender.0].map(|comm| {
        let bell = Doorbell::new();
        bell.attach(comm);
        bell.armed.store(1, Ordering::SeqCst);
        bell
    });
    if !vanish(there) || !vanish(back) {
        eprintln!("SKIPPED: TCP_REPAIR is not permitted here");
        return;
    }
    for (bell, comm) in bells.iter().zip([receiver.comm, sender.0]) {
        until("bell", || (bell.armed.load(Ordering::SeqCst) == 0).then_some(()));
        assert_eq!(progress(comm), Err(NCCL_SYSTEM_ERROR));
    }
}
