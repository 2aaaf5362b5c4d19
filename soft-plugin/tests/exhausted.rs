//! A process without descriptors: one line names the cause, unlike that of a lost peer, and everything works afterwards.
#![allow(missing_docs)]

mod common;
#[path = "common/lines.rs"]
mod log_lines;

use std::time::Instant;

use common::*;
use log_lines::{collect, lines};
use nccl_net_abi::*;

fn limit(most: libc::rlim_t) -> libc::rlim_t {
    let mut limits = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limits` is valid for both calls.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limits), 0);
        let before = std::mem::replace(&mut limits.rlim_cur, most);
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &limits), 0);
        before
    }
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap()
}

#[test]
fn running_out_of_descriptors_is_reported_as_such() {
    collect();
    setup(&[("UCCL_TCPX_SOFT_THREADS", "1")]);
    drop(pair());
    let (listener, handle) = listen();
    let mut early = handle;
    assert!(connect_step(&mut early).unwrap().is_null());
    let before = limit(descriptors() as libc::rlim_t + 20);
    let hoard: Vec<_> = std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()).collect();
    let start = Instant::now();
    let net = soft_plugin::table();
    for _ in 0..200 {
        let (mut comm, mut own, mut fresh) = (std::ptr::null_mut(), [0u8; 128], handle);
        // SAFETY: live buffers.
        let code = unsafe { net.listen.unwrap()(0, own.as_mut_ptr().cast(), &mut comm) };
        assert_eq!((code, errno()), (NCCL_SYSTEM_ERROR, libc::EMFILE));
        assert_eq!((connect_step(&mut fresh), errno()), (Err(NCCL_SYSTEM_ERROR), libc::EMFILE));
        assert_eq!((accept_step(listener, &mut { NO_DEVICE }), errno()), (Err(NCCL_SYSTEM_ERROR), libc::EMFILE));
    }
    limit(before);
    drop(hoard);
    let lines = lines().iter().filter(|l| l.contains("out of file descriptors")).count();
    assert!(lines >= 1 && lines <= 1 + start.elapsed().as_secs() as usize, "{lines} lines for 600 calls");
    // A lost peer has another cause.
    let (gone, mut closed) = listen();
    close_listen(gone);
    let refused = until("refusal", || connect_step(&mut closed).err());
    assert_eq!((refused, errno()), (NCCL_SYSTEM_ERROR, libc::ECONNREFUSED));
    let (sender, receiver) = (connect(&mut early), accept(listener));
    let mut landing = [0u8; 3];
    let request = receiver.irecvv(&mut [&mut landing]).unwrap();
    sender.isendv(&[&[1, 2, 3]]).unwrap();
    assert_eq!(wait(request), Ok(3));
    close_listen(listener);
}
