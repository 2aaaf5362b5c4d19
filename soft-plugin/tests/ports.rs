//! Listen comms take their ports from UCCL_TCPX_PORT_RANGE, reuse them, and report when none is free.
#![allow(missing_docs)]

mod common;

use std::collections::HashSet;
use std::net::{Ipv4Addr, TcpListener};

use common::*;
use nccl_net_abi::*;

/// Below the system's ephemeral ports.
const RANGE: std::ops::RangeInclusive<u16> = 21_700..=21_715;

fn port(handle: &Handle) -> u16 {
    u16::from_le_bytes([handle[12], handle[13]])
}

/// A listen comm, or the result and the cause.
fn try_listen() -> Result<(Opaque, Handle), (ncclResult_t, Option<i32>)> {
    let (mut comm, mut handle) = (std::ptr::null_mut(), [0u8; NCCL_NET_HANDLE_MAXSIZE]);
    // SAFETY: live buffers.
    match unsafe { soft_plugin::table().listen.unwrap()(0, handle.as_mut_ptr().cast(), &mut comm) } {
        NCCL_SUCCESS => Ok((comm, handle)),
        code => Err((code, std::io::Error::last_os_error().raw_os_error())),
    }
}

#[test]
fn every_port_of_the_range_serves_and_no_other() {
    let range = format!("{}-{}", RANGE.start(), RANGE.end());
    setup(&[("UCCL_TCPX_SOFT_THREADS", "1"), ("UCCL_TCPX_PORT_RANGE", &range)]);
    assert_eq!(soft_plugin::port_range(), Some(RANGE));
    // Another program uses one of them.
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, *RANGE.start() + 3)).unwrap();
    let mut all: Vec<_> = (1..RANGE.len()).map(|_| try_listen().expect("a free port")).collect();
    let ports: HashSet<u16> = all.iter().map(|(_, handle)| port(handle)).collect();
    assert_eq!(ports.len(), RANGE.len() - 1);
    assert!(ports.iter().all(|port| RANGE.contains(port) && *port != RANGE.start() + 3));
    assert_eq!(try_listen().map(|_| ()), Err((NCCL_SYSTEM_ERROR, Some(libc::EADDRINUSE))));
    // A port is free again once its channel is up, closed or not.
    let (listener, mut handle) = all.pop().unwrap();
    let sender = connect(&mut handle);
    let receiver = accept(listener);
    close_listen(listener);
    for _ in 0..3 {
        let (again, mut same) = try_listen().expect("the port of a channel that is up");
        assert_eq!(port(&same), port(&handle));
        let pair = (connect(&mut same), accept(again));
        close_listen(again);
        // The listener closes first: its connections stay in TIME_WAIT for a minute.
        drop(pair.1);
        drop(pair.0);
    }
    drop((sender, receiver));
    drop(taken);
    all.into_iter().for_each(|(listener, _)| close_listen(listener));
}
