//! uccl-devmem-agent: binds NIC queues to GPU memory and steers connections for processes without privileges. Experimental.

use devmem::agent::{allow_descriptors, Allowed, Kernel, Server};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

const USAGE: &str = "usage: uccl-devmem-agent [--socket PATH] [--group GID] [--queues-of-one N] NIC[=QUEUE,QUEUE...]...
       uccl-devmem-agent --split-headers NIC

Binds queues of these NICs to GPU memory, and steers connections to them, for processes that may use its socket
(default: /run/uccl-devmem/agent.sock, mode 660). Without queues: those that ordinary connections do not use
(ethtool -X NIC equal N). With --queues-of-one a user gets at most N queues of each NIC; otherwise as many as there are. Needs CAP_NET_ADMIN and nothing else; touches no data.
With --split-headers it only sets header split on, for packets of every size, and ends. Experimental: see docs/devmem.md.";

struct Options {
    socket: PathBuf,
    group: Option<u32>,
    share: Option<usize>,
    nics: Vec<Allowed>,
}

fn options(mut words: impl Iterator<Item = String>) -> Option<Options> {
    let mut options = Options { socket: devmem::agent::SOCKET.into(), group: None, share: None, nics: Vec::new() };
    while let Some(word) = words.next() {
        match word.as_str() {
            "--socket" => options.socket = words.next()?.into(),
            "--group" => options.group = Some(words.next()?.parse().ok()?),
            "--queues-of-one" => options.share = Some(words.next()?.parse().ok().filter(|queues| *queues > 0)?),
            word if word.starts_with('-') => return None,
            nic => options.nics.push(Allowed::parse(nic)?),
        }
    }
    (!options.nics.is_empty()).then_some(options)
}

fn split_headers(nic: &str) -> ExitCode {
    match devmem::Nic::named(nic).map_err(devmem::Refused::from).and_then(|nic| nic.split_headers()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(refused) => {
            eprintln!("uccl-devmem-agent: header split of {nic} cannot be set on: {refused}");
            ExitCode::FAILURE
        }
    }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [word, nic] = &words[..] {
        if word == "--split-headers" {
            return split_headers(nic);
        }
    }
    let Some(options) = options(words.into_iter()) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let opened = Kernel::new().and_then(|kernel| Server::open(&options.socket, options.group, options.nics, kernel));
    let mut server = match opened {
        Ok(server) => server,
        Err(e) => {
            eprintln!("uccl-devmem-agent: {}: {e}", options.socket.display());
            return ExitCode::FAILURE;
        }
    };
    if let Some(queues) = options.share {
        server.share(queues);
    }
    if let Err((few, enough)) = allow_descriptors() {
        eprintln!("uccl-devmem-agent: this process may open {few} descriptors; with many clients it needs {enough} (LimitNOFILE, ulimit -n)");
    }
    println!("uccl-devmem-agent (experimental): serving at {}", options.socket.display());
    loop {
        if let Err(e) = server.serve(Duration::from_secs(1)) {
            eprintln!("uccl-devmem-agent: {e}");
            return ExitCode::FAILURE;
        }
    }
}
