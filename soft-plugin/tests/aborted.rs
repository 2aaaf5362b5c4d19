//! Abandoned set-ups, by `abandonConnect` and by a caller that simply stops polling: no descriptor leaks.
#![allow(missing_docs)]

mod common;

use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use common::*;

/// One test, since it counts the descriptors of the process.
#[test]
fn aborted_setups_leak_no_descriptors() {
    setup(&[("UCCL_TCPX_SOFT_THREADS", "2")]);
    drop(pair());
    let before = descriptors();
    for round in 0..300 {
        abort_a_setup(round);
    }
    assert_eq!(descriptors(), before, "300 set-ups were aborted");
    an_accept_closes_everything_but_the_comm(before);
    forgotten_connects_are_swept(before);
    unauthenticated_connections_cost_a_bounded_number(before);
}

/// Two listeners and two pending connects, in a different state each round, and unauthenticated connections; then all are abandoned.
fn abort_a_setup(round: usize) {
    let mut halves: Vec<_> = (0..2).map(|_| listen()).collect();
    let others: Vec<_> = halves.iter().map(|(_, handle)| unauthenticated(handle)).collect();
    for (listener, handle) in &mut halves {
        for _ in 0..round % 3 {
            // Null, or connected after the second step: then it is closed like any other.
            let comm = connect_step(handle).unwrap();
            if !comm.is_null() {
                drop(Sender(comm));
                break;
            }
        }
        if round % 2 == 0 {
            accept_step(*listener, &mut { NO_DEVICE })
                .map(|c| {
                    if !c.is_null() {
                        drop(accepted(c))
                    }
                })
                .unwrap_or_default();
        }
    }
    for (listener, mut handle) in halves {
        abandon(&mut handle);
        abandon(&mut handle);
        if round % 3 != 0 {
            assert!(connect_step(&mut handle).is_err(), "an abandoned connect is over");
        }
        close_listen(listener);
    }
    drop(others);
}

fn accepted(comm: Opaque) -> Receiver {
    let unpack = nccl_net_abi::unpackNetDeviceHandle { meta: std::ptr::null_mut(), bounce_buf: std::ptr::null_mut(), head: 0 };
    Receiver { comm, unpack }
}

fn unauthenticated(handle: &Handle) -> TcpStream {
    TcpStream::connect((Ipv4Addr::LOCALHOST, u16::from_le_bytes([handle[12], handle[13]]))).unwrap()
}

fn an_accept_closes_everything_but_the_comm(before: usize) {
    let (listener, mut handle) = listen();
    let others: Vec<_> = (0..40).map(|_| unauthenticated(&handle)).collect();
    assert!(accept_step(listener, &mut { NO_DEVICE }).unwrap().is_null());
    let sender = connect(&mut handle);
    let receiver = accept(listener);
    assert_eq!(descriptors(), before + others.len() + 2, "the listener still holds other connections, or its own socket");
    close_listen(listener);
    drop((sender, receiver, others));
    assert_eq!(descriptors(), before);
}

fn forgotten_connects_are_swept(before: usize) {
    let mut halves: Vec<_> = (0..5).map(|_| listen()).collect();
    for (_, handle) in &mut halves {
        assert!(connect_step(handle).unwrap().is_null());
    }
    halves.into_iter().for_each(|(listener, _)| close_listen(listener));
    assert_eq!(descriptors(), before + 5);
    // The plugin is not called again.
    until("the forgotten connects", || {
        std::thread::sleep(Duration::from_millis(100));
        (descriptors() == before).then_some(())
    });
}

fn unauthenticated_connections_cost_a_bounded_number(before: usize) {
    let listeners: Vec<_> = (0..4).map(|_| listen()).collect();
    let mut held = Vec::new();
    for (listener, handle) in &listeners {
        held.extend((0..200).map(|_| unauthenticated(handle)));
        for _ in 0..10 {
            assert!(accept_step(*listener, &mut { NO_DEVICE }).unwrap().is_null());
        }
    }
    let kept = descriptors() - before - listeners.len() - held.len();
    assert!(kept <= 4 * 64, "{kept} unauthenticated connections are kept");
    listeners.into_iter().for_each(|(listener, _)| close_listen(listener));
    assert_eq!(descriptors(), before + held.len());
}
