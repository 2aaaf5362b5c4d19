//! The server of tcpx-perf: holds buffers for clients, checks their contents, and is the peer of two-sided messages. It measures
//! nothing itself.

use crate::api::{Link, Node};
use crate::error::{Context, Result};
use crate::fail;
use crate::memory::{Kind, Region};
use crate::pattern::{self, Shape};
use crate::proto::{item_to_hex, Channel, Reply, Request, PROTOCOL};
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Interval of the keep-alives between client and server; a lost connection is noticed within it.
pub const ALIVE_EVERY: Duration = Duration::from_secs(1);
/// Receives posted ahead of a client that sends one message at a time.
const RECEIVES_AHEAD: u64 = 16;

enum Incoming {
    Request(Vec<u8>),
    Echo(Vec<u8>),
}

type Inboxes = Arc<Mutex<HashMap<u64, Sender<Incoming>>>>;

/// Serves clients until `stopping` is set (with [`Node::stop_accept`]), or, with `once`, until the first client has left.
/// Returns how many clients were served.
pub fn serve(node: &Arc<Node>, memory: Kind, once: bool, stopping: &AtomicBool) -> Result<u64> {
    let inboxes = Inboxes::default();
    let finished = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| deliver(node, &inboxes, &finished));
        let result = accept_clients(node, memory, once, stopping, &inboxes);
        finished.store(true, Ordering::Release);
        result
    })
}

fn accept_clients(node: &Arc<Node>, memory: Kind, once: bool, stopping: &AtomicBool, inboxes: &Inboxes) -> Result<u64> {
    let mut clients = 0;
    loop {
        let link = match node.accept() {
            Ok(link) => link,
            Err(_) if stopping.load(Ordering::Acquire) => return Ok(clients),
            Err(e) => return Err(e).context("cannot accept connections"),
        };
        clients += 1;
        let (inbox_of_client, inbox) = mpsc::channel();
        inboxes.lock().expect("no holder panics").insert(clients, inbox_of_client);
        let mut session = Session { node: node.clone(), link, memory, inbox, number: clients, buffers: HashMap::new() };
        if once {
            return session.run().map(|()| clients);
        }
        let (inboxes, peer) = (inboxes.clone(), session.link.peer());
        std::thread::spawn(move || {
            eprintln!("client {} from {peer}: connected, {} channels", session.number, session.link.channels());
            match session.run() {
                Ok(()) => eprintln!("client {} from {peer}: done", session.number),
                Err(e) => eprintln!("client {} from {peer}: {e}", session.number),
            }
            inboxes.lock().expect("no holder panics").remove(&session.number);
        });
    }
}

/// Passes notifications of the engine to their sessions.
fn deliver(node: &Node, inboxes: &Inboxes, finished: &AtomicBool) {
    // Each poll takes a core for a moment while a client on this host may be measuring: poll rarely while nothing arrives.
    const PAUSE: [Duration; 2] = [Duration::from_micros(100), Duration::from_millis(5)];
    let mut pause = PAUSE[0];
    while !finished.load(Ordering::Acquire) {
        let Some((name, msg)) = node.next_notification() else {
            std::thread::sleep(pause);
            pause = (pause * 2).min(PAUSE[1]);
            continue;
        };
        pause = PAUSE[0];
        let (number, incoming) = match Channel::parse(&name) {
            Some(Channel::Control(n)) => (n, Incoming::Request(msg)),
            Some(Channel::Echo(n)) => (n, Incoming::Echo(msg)),
            None => {
                eprintln!("ignored a notification of another program, named '{}'", String::from_utf8_lossy(&name));
                continue;
            }
        };
        if let Some(inbox) = inboxes.lock().expect("no holder panics").get(&number) {
            // The session may have ended.
            let _ = inbox.send(incoming);
        }
    }
}

struct Session {
    node: Arc<Node>,
    link: Link,
    memory: Kind,
    inbox: Receiver<Incoming>,
    number: u64,
    buffers: HashMap<u32, Region>,
}

impl Session {
    fn run(&mut self) -> Result<()> {
        self.reply(&Reply::Welcome { protocol: PROTOCOL, client: self.number, memory: self.memory })?;
        loop {
            let incoming = match self.inbox.recv_timeout(ALIVE_EVERY) {
                Ok(incoming) => incoming,
                Err(RecvTimeoutError::Timeout) => {
                    self.reply(&Reply::Alive)?;
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => fail!("the server is shutting down"),
            };
            match incoming {
                Incoming::Echo(bytes) => self.link.notify(&Channel::Echo(0).name(), &bytes).context("lost the client")?,
                Incoming::Request(text) => match serde_json::from_slice(&text).context("cannot decode a request")? {
                    Request::Bye => return Ok(()),
                    Request::Alive => {}
                    request => {
                        let reply = self.serve(request).unwrap_or_else(|e| {
                            eprintln!("client {}: {e}", self.number);
                            Reply::Failed { message: e.to_string() }
                        });
                        self.reply(&reply)?;
                    }
                },
            }
        }
    }

    fn reply(&self, reply: &Reply) -> Result<()> {
        let text = serde_json::to_vec(reply).context("cannot encode a reply")?;
        self.link.notify(&Channel::Control(0).name(), &text).context("lost the client")
    }

    fn serve(&mut self, request: Request) -> Result<Reply> {
        Ok(match request {
            Request::Open { buffer, bytes } => {
                let region = Region::new(&self.node, self.memory, bytes)?;
                let reply = Reply::Opened { addr: region.buffer().addr() as u64, item: item_to_hex(&region.item()?) };
                self.buffers.insert(buffer, region);
                reply
            }
            Request::Fill { buffer, seed } => {
                self.region(buffer)?.buffer_mut().fill(seed);
                Reply::Done
            }
            Request::Poison { buffer } => {
                self.region(buffer)?.buffer_mut().poison();
                Reply::Done
            }
            Request::Check { buffer, seed, shape, side } => {
                match pattern::compare(&self.region(buffer)?.buffer().contents(), &shape, side, seed) {
                    Ok(bytes) => Reply::Checked { bytes, mismatch: None },
                    Err(mismatch) => Reply::Checked { bytes: 0, mismatch: Some(mismatch) },
                }
            }
            Request::Exchange { receive, send, shape, messages } => {
                self.exchange(receive, send, &shape, messages)?;
                Reply::Done
            }
            Request::Close { buffer } => {
                self.buffers.remove(&buffer);
                Reply::Done
            }
            Request::Alive | Request::Bye => Reply::Done,
        })
    }

    fn region(&mut self, buffer: u32) -> Result<&mut Region> {
        match self.buffers.get_mut(&buffer) {
            Some(region) => Ok(region),
            None => fail!("no buffer {buffer}"),
        }
    }

    fn exchange(&mut self, receive: Option<u32>, send: Option<u32>, shape: &Shape, messages: u64) -> Result<()> {
        for buffer in [receive, send].into_iter().flatten() {
            let len = self.region(buffer)?.buffer().len() as u64;
            if shape.inflight == 0 || shape.buffer_len().is_none_or(|needed| needed > len) {
                fail!("buffer {buffer} is too small for these messages");
            }
        }
        let (link, buffers) = (&self.link, &self.buffers);
        let slice = |buffer: u32, k: u64| buffers[&buffer].segment(shape.slice(k), shape.total);
        let mut receives = Window::new(receive.map_or(0, |_| messages), RECEIVES_AHEAD.max(2 * u64::from(shape.inflight)));
        let mut sends = Window::new(send.map_or(0, |_| messages), u64::from(shape.inflight));
        // The first receives are posted before the client may start.
        let post = |k| link.recv(slice(receive.unwrap_or_default(), k));
        receives.top_up(post)?;
        self.reply(&Reply::Done)?;
        while !receives.is_done() || !sends.is_done() {
            receives.top_up(post)?;
            sends.top_up(|k| link.send(std::iter::once(slice(send.unwrap_or_default(), k))))?;
            // With a single direction there is nothing else to do while waiting.
            let timeout =
                if receives.is_done() || sends.is_done() { Duration::from_millis(100) } else { Duration::from_millis(1) };
            receives.retire(link, timeout).context("a receive failed")?;
            sends.retire(link, timeout).context("a send failed")?;
        }
        Ok(())
    }
}

/// A series of operations with a limited number in flight, oldest first.
struct Window {
    ids: VecDeque<u64>,
    started: u64,
    count: u64,
    limit: u64,
}

impl Window {
    fn new(count: u64, limit: u64) -> Window {
        Window { ids: VecDeque::new(), started: 0, count, limit }
    }

    fn is_done(&self) -> bool {
        self.started == self.count && self.ids.is_empty()
    }

    fn top_up(&mut self, mut start: impl FnMut(u64) -> Result<u64>) -> Result<()> {
        while self.started < self.count && (self.ids.len() as u64) < self.limit {
            self.ids.push_back(start(self.started)?);
            self.started += 1;
        }
        Ok(())
    }

    /// Removes complete operations; waits for the oldest one for at most `timeout`.
    fn retire(&mut self, link: &Link, timeout: Duration) -> Result<()> {
        if let Some(&oldest) = self.ids.front() {
            if link.wait(oldest, Some(timeout))? {
                self.ids.pop_front();
            }
        }
        while let Some(&oldest) = self.ids.front() {
            if !link.poll(oldest)? {
                break;
            }
            self.ids.pop_front();
        }
        Ok(())
    }
}
