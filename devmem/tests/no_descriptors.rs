//! An agent that can open no descriptor rests, refuses, and goes on; its clients stay. Alone in its process, whose descriptors it uses up.

use devmem::agent::{Agent, Allowed, Privileges, Server};
use devmem::Refused;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

struct Nothing;

impl Privileges for Nothing {
    type Bound = ();
    type Steered = ();

    fn bind(&self, _: &Allowed, _: BorrowedFd<'_>) -> Result<(u32, u32, ()), Refused> {
        Ok((1, 1, ()))
    }

    fn steer(&self, _: &Allowed, _: u32, _: BorrowedFd<'_>) -> Result<(), Refused> {
        Ok(())
    }
}

#[test]
fn an_agent_without_descriptors_rests_and_goes_on() {
    let path = std::env::temp_dir().join(format!("uccl-agent-descriptors-{}", std::process::id()));
    let nics = vec![Allowed { nic: "eth1".into(), queues: Vec::new() }];
    let mut server = Server::open(&path, None, nics, Nothing).unwrap();
    let mut serve = |client: Box<dyn FnOnce() -> Agent + Send>| {
        let thread = std::thread::spawn(client);
        while !thread.is_finished() {
            server.serve(Duration::from_millis(1)).unwrap();
        }
        (thread.join().unwrap(), server.clients())
    };
    let (agent, passed) = (Agent::connect(&path).unwrap(), File::open("/dev/null").unwrap());
    let copy = passed.try_clone().unwrap();
    let (mut agent, _) = serve(Box::new(move || {
        let mut agent = agent;
        agent.bind("eth1", copy.as_fd()).unwrap();
        agent
    }));
    // The next client waits in the queue of the listener.
    let waiting = Agent::connect(&path).unwrap();
    let few = libc::rlimit { rlim_cur: 128, rlim_max: 128 };
    // SAFETY: the limit is read during the call.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &few) }, 0);
    let hoard: Vec<File> = std::iter::repeat_with(|| File::open("/dev/null")).map_while(Result::ok).collect();
    let (mut agent, clients) = serve(Box::new(move || {
        let refused = agent.steer(passed.as_fd()).unwrap_err();
        assert_eq!((refused.error.raw_os_error(), agent.has_failed()), (Some(libc::EMFILE), false));
        agent
    }));
    assert_eq!(clients, 1);
    let (begun, mut rounds) = (Instant::now(), 0);
    while begun.elapsed() < Duration::from_millis(500) {
        server.serve(Duration::from_secs(1)).unwrap();
        rounds += 1;
    }
    assert!(rounds < 20, "{rounds} rounds in half a second");
    drop(hoard);
    while server.clients() < 2 {
        server.serve(Duration::from_millis(1)).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
    let thread = std::thread::spawn(move || agent.steer(File::open("/dev/null").unwrap().as_fd()).unwrap());
    while !thread.is_finished() {
        server.serve(Duration::from_millis(1)).unwrap();
    }
    thread.join().unwrap();
    drop(waiting);
}
