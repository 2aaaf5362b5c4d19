//! The client of a tcpx-perf server: requests, replies, echoes. It measures nothing itself.

use crate::api::{FifoItem, Link, Node};
use crate::error::{Context, Result};
use crate::fail;
use crate::memory::Kind;
use crate::pattern;
use crate::proto::{item_from_hex, Channel, Reply, Request, PROTOCOL};
use crate::server::ALIVE_EVERY;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Longest wait for a reply; allocating and checking large buffers takes a while.
const ANSWER_DEADLINE: Duration = Duration::from_secs(120);

/// A connection to a server.
pub struct Client {
    /// The engine of this process.
    pub node: Arc<Node>,
    /// The connection under test.
    pub link: Arc<Link>,
    /// Kind of memory of client and server.
    pub memory: Kind,
    number: u64,
    next_buffer: u32,
    /// Echoes that arrived before a reply.
    echoes: Mutex<VecDeque<Vec<u8>>>,
}

/// A buffer at the server.
pub struct RemoteBuffer {
    /// Its number.
    pub number: u32,
    /// Address of its first byte.
    pub addr: u64,
    /// Grants access to it.
    pub item: FifoItem,
}

impl Client {
    /// Connects to the server at `address` ("ip:port"), and checks that both use the same kind of memory.
    pub fn connect(node: &Arc<Node>, address: &str, memory: Kind) -> Result<Client> {
        let link = Arc::new(node.connect(address)?);
        let mut client = Client { node: node.clone(), link, memory, number: 0, next_buffer: 0, echoes: Mutex::default() };
        let (protocol, theirs) = match client.receive().context(format_args!("{address} does not answer as tcpx-perf server"))? {
            Reply::Welcome { protocol, client: number, memory } => {
                client.number = number;
                (protocol, memory)
            }
            other => fail!("the server's first message is {other:?}, not Welcome"),
        };
        if protocol != PROTOCOL {
            fail!(
                "the server speaks protocol version {protocol}, this program version {PROTOCOL}: use the same release for both"
            );
        }
        if theirs != memory {
            client.bye();
            fail!("the server was started with --memory {theirs}, this program with --memory {memory}: both must use the same");
        }
        Ok(client)
    }

    /// Requests a buffer.
    pub fn open(&mut self, bytes: u64) -> Result<RemoteBuffer> {
        let number = self.next_buffer;
        self.next_buffer += 1;
        match self.ask(&Request::Open { buffer: number, bytes })? {
            Reply::Opened { addr, item } => match item_from_hex(&item) {
                Some(item) => Ok(RemoteBuffer { number, addr, item }),
                None => fail!("the server sent a FIFO item that is not 64 bytes in hexadecimal"),
            },
            other => fail!("the server answered {other:?} to a request for a buffer"),
        }
    }

    /// Sends a request whose reply is `Done`.
    pub fn command(&self, request: &Request) -> Result<()> {
        match self.ask(request)? {
            Reply::Done => Ok(()),
            other => fail!("the server answered {other:?} to {request:?}"),
        }
    }

    /// Waits for the second `Done` of an exchange.
    pub fn finish_exchange(&self) -> Result<()> {
        match self.receive()? {
            Reply::Done => Ok(()),
            other => fail!("the server ended an exchange of messages with {other:?}"),
        }
    }

    /// Sends a request and returns its reply; an error if the server reports a failure.
    pub fn ask(&self, request: &Request) -> Result<Reply> {
        self.send(request)?;
        self.receive()
    }

    /// Tells the server that this client is done.
    pub fn bye(&self) {
        // A server that has ended needs no goodbye.
        let _ = self.send(&Request::Bye);
    }

    fn send(&self, request: &Request) -> Result<()> {
        let text = serde_json::to_vec(request).context("cannot encode a request")?;
        self.link.notify(&Channel::Control(self.number).name(), &text).context("lost the server")
    }

    fn receive(&self) -> Result<Reply> {
        loop {
            let text = self.receive_from(Channel::Control(0))?;
            match serde_json::from_slice(&text).context("cannot decode the server's reply")? {
                Reply::Alive => {}
                Reply::Failed { message } => fail!("the server reports: {message}"),
                reply => return Ok(reply),
            }
        }
    }

    /// The next notification on a channel; `Alive` replies and echoes may come in between.
    fn receive_from(&self, wanted: Channel) -> Result<Vec<u8>> {
        let mut echoes = self.echoes.lock().expect("no holder panics");
        if wanted == Channel::Echo(0) {
            if let Some(echo) = echoes.pop_front() {
                return Ok(echo);
            }
        }
        let started = Instant::now();
        let mut reported = started;
        loop {
            if let Some((name, msg)) = self.node.next_notification() {
                match Channel::parse(&name) {
                    Some(channel) if channel == wanted => return Ok(msg),
                    Some(Channel::Control(0)) if serde_json::from_slice(&msg).is_ok_and(|reply: Reply| reply == Reply::Alive) => {
                    }
                    Some(Channel::Echo(0)) => echoes.push_back(msg),
                    _ => fail!("an unexpected notification named '{}' arrived", String::from_utf8_lossy(&name)),
                }
                continue;
            }
            if reported.elapsed() > ALIVE_EVERY {
                reported = Instant::now();
                self.send(&Request::Alive)?;
            }
            if started.elapsed() > ANSWER_DEADLINE {
                fail!("no reply within {} s", ANSWER_DEADLINE.as_secs());
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Sends notifications and checks that the server's echoes return unchanged and in order. Returns the bytes sent in one direction.
    pub fn echo(&self, lengths: &[usize], seed: u64) -> Result<u64> {
        self.notify(lengths, seed)?;
        self.check_echoes(lengths, seed)
    }

    /// Sends notifications of these lengths with random contents; [`Client::check_echoes`] takes the server's echoes.
    pub fn notify(&self, lengths: &[usize], seed: u64) -> Result<()> {
        let send = |(i, &len)| self.link.notify(&Channel::Echo(self.number).name(), &contents(seed, i, len));
        lengths.iter().enumerate().try_for_each(send).context("cannot send a notification")
    }

    /// Checks that the echoes of [`Client::notify`] return unchanged and in order. Returns their bytes.
    pub fn check_echoes(&self, lengths: &[usize], seed: u64) -> Result<u64> {
        let mut bytes = 0;
        for (i, &len) in lengths.iter().enumerate() {
            let which = format!("notification {} of {}", i + 1, lengths.len());
            let echoed = self.receive_from(Channel::Echo(0)).context(&which)?;
            if echoed != contents(seed, i, len) {
                fail!("{which} ({len} bytes) came back changed or out of order ({} bytes)", echoed.len());
            }
            bytes += len as u64;
        }
        Ok(bytes)
    }
}

/// The bytes of notification `i`.
fn contents(seed: u64, i: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    pattern::fill(seed.wrapping_add(i as u64), 0, &mut bytes);
    bytes
}
