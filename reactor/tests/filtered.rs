//! Waiting under a system call filter that forbids `epoll_pwait2`, as in old container runtimes.
#![cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]

use std::io;
use std::time::{Duration, Instant};

use reactor::{Events, Interest, Poller, Waker};

/// From now on `epoll_pwait2` fails in this thread with `errno`; every other call is allowed.
fn forbid_pwait2(errno: i32) -> io::Result<()> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let mut program = [
        // The number of the call is the first word of seccomp_data.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter { jf: 1, ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, libc::SYS_epoll_pwait2 as u32) },
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno as u32),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: both calls change this thread only; the program lives through the call.
    let installed = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) == 0
    };
    if installed {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// CPU time of the calling thread.
fn cpu() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is writable.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn waits_with_the_older_call() {
    let (poller, waker) = (Poller::new().unwrap(), Waker::new().unwrap());
    poller.add(waker.fd(), 5, Interest::READ).unwrap();
    let mut events = Events::with_capacity(4);
    let (start, before) = (Instant::now(), cpu());
    let mut waits = 0;
    while start.elapsed() < Duration::from_millis(200) {
        poller.wait(&mut events, Some(Duration::from_micros(1500))).unwrap();
        assert!(events.is_empty());
        waits += 1;
    }
    assert!(waits <= 200, "{waits} waits of 1.5 ms in 200 ms: they do not wait");
    assert!(cpu() - before < Duration::from_millis(100), "waiting burns CPU");
    waker.wake();
    poller.wait(&mut events, Some(Duration::from_micros(1500))).unwrap();
    assert_eq!(events.iter().map(|e| e.token()).collect::<Vec<_>>(), [5]);
}

#[test]
fn any_error_of_the_newer_call_selects_the_older_one() {
    // A filter holds for its thread, and a poller remembers for itself.
    for errno in [libc::EPERM, libc::ENOSYS, libc::EACCES, libc::EINVAL] {
        let checked = std::thread::spawn(move || match forbid_pwait2(errno) {
            Ok(()) => waits_with_the_older_call(),
            Err(error) => eprintln!("SKIPPED: no seccomp filter can be installed here: {error}"),
        });
        assert!(checked.join().is_ok(), "errno {errno}");
    }
}
