//! Many peers at once in a process with few descriptors: their connections are accepted before their hello.
#![allow(missing_docs)]

mod common;

use common::*;
use nccl_net_abi::*;

/// More listeners than the shared limit of connections without a hello.
const LISTENERS: usize = 24;

#[test]
fn peers_that_are_silent_for_a_moment_do_not_displace_each_other() {
    setup(&[("UCCL_TCPX_SOFT_THREADS", "1")]);
    drop(pair());
    let limits = libc::rlimit { rlim_cur: 256, rlim_max: 256 };
    // SAFETY: this process' own limit.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limits) }, 0);
    let mut channels: Vec<_> = (0..LISTENERS)
        .map(|_| {
            let (listener, handle) = listen();
            assert_eq!(listen_both(listener, None), NCCL_SUCCESS);
            (listener, handle, handle)
        })
        .collect();
    // Connected, without a hello.
    for (_, forth, back) in &mut channels {
        assert!(connect_step(forth).expect("connect").is_null());
        assert!(connect_recv_step(back, &mut { NO_DEVICE }).expect("connect").is_null());
    }
    for (listener, ..) in &channels {
        assert!(accept_step(*listener, &mut { NO_DEVICE }).expect("accept").is_null());
    }
    for (listener, forth, back) in &mut channels {
        let (out, inc) = (connect(forth), connect_recv(back));
        let (recv, send) = (accept(*listener), accept_send(*listener));
        close_listen(*listener);
        for (sender, receiver) in [(&out, &recv), (&send, &inc)] {
            let mut landing = [0u8; 3];
            let request = receiver.irecvv(&mut [&mut landing]).expect("receive");
            sender.isendv(&[&[1, 2, 3]]).expect("send");
            assert_eq!(wait(request), Ok(3));
        }
    }
}
