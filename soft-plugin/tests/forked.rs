//! A child of `fork`: its own comms work, calls on its parent's fail, and closing its copies does not affect the parent.
#![allow(missing_docs)]

mod common;

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::{Duration, Instant};

use common::*;
use nccl_net_abi::*;

/// Moves a few messages, some of which need the I/O threads.
fn exchange(sender: &Sender, receiver: &Receiver, first: usize) {
    for number in first..first + 20 {
        let data = pattern(number, 1 + number * 9000 % 400_000);
        let mut landing = vec![0u8; data.len()];
        let request = receiver.irecvv(&mut [&mut landing]).unwrap();
        let send = sender.isendv(&[&data]).unwrap();
        assert_eq!(wait(request), Ok(data.len()));
        wait(send).unwrap();
        assert!(landing == data, "message {number} is damaged");
        receiver.consumed(request).unwrap();
    }
}

struct Inherited {
    sender: Sender,
    receiver: Receiver,
    listener: Opaque,
    connecting: Handle,
    request: Opaque,
}

fn live_as_a_child(mut inherited: Inherited) {
    let Inherited { sender, receiver, .. } = &inherited;
    let no = Err(NCCL_INVALID_USAGE);
    assert_eq!(sender.isendv(&[&[1; 8]]), no);
    assert_eq!(receiver.irecvv(&mut [&mut [1; 8]]), no);
    assert_eq!(test(inherited.request).map(drop), Err(NCCL_INVALID_USAGE));
    assert_eq!(progress(sender.0).map(drop), Err(NCCL_INVALID_USAGE));
    assert_eq!(reg(sender.0, [0u8; 8].as_ptr(), 8, NCCL_PTR_HOST), no);
    assert_eq!(accept_step(inherited.listener, &mut { NO_DEVICE }), no);
    assert!(connect_step(&mut inherited.connecting).is_err());
    let open = descriptors();
    close_listen(inherited.listener);
    drop((inherited.sender, inherited.receiver));
    assert_eq!(descriptors(), open - 3, "the child keeps its copies");
    let (sender, receiver) = pair();
    exchange(&sender, &receiver, 500);
}

fn wait_for(child: libc::pid_t) -> i32 {
    let (start, mut status) = (Instant::now(), 0);
    // SAFETY: our own child.
    while unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) } == 0 {
        if start.elapsed() > HANG {
            // SAFETY: as above.
            unsafe { libc::kill(child, libc::SIGKILL) };
            panic!("hang: the child does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    status
}

#[test]
fn parent_and_child_do_not_disturb_each_other() {
    setup(&[("UCCL_TCPX_SOFT_THREADS", "2")]);
    let (sender, receiver) = pair();
    exchange(&sender, &receiver, 0);
    let (listener, mut connecting) = listen();
    assert!(connect_step(&mut connecting).unwrap().is_null());
    let mut landing = [0u8; 4];
    let request = receiver.irecvv(&mut [&mut landing]).unwrap();
    for _ in 0..3 {
        // SAFETY: the child uses only what a child may use, and ends with _exit.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child == 0 {
            let copy = Inherited { sender: Sender(sender.0), receiver: receiver_copy(&receiver), listener, connecting, request };
            let outcome = catch_unwind(AssertUnwindSafe(|| live_as_a_child(copy)));
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(i32::from(outcome.is_err())) };
        }
        let status = wait_for(child);
        assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "the child failed: {status:x}");
    }
    // Everything of the parent still works.
    wait(sender.isendv(&[&[5; 4]]).unwrap()).unwrap();
    assert_eq!(wait(request), Ok(4));
    receiver.consumed(request).unwrap();
    exchange(&sender, &receiver, 100);
    let late = connect(&mut connecting);
    let last = accept(listener);
    exchange(&late, &last, 200);
    close_listen(listener);
}

fn receiver_copy(receiver: &Receiver) -> Receiver {
    Receiver { comm: receiver.comm, unpack: receiver.unpack }
}
