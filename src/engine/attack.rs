//! A peer that breaks every rule, for tests/lying_peer.rs: it does the real handshake and set-up with real channels, then sends
//! any frames and data in any order. Not part of the API: it changes whenever the protocol does.

use super::connection::Begun;
use super::setup::lineage::{Lineage, Seat};
use super::setup::{build, connect, dial};
use super::Engine;
use crate::engine::setup::driver::SetupDriver;
use crate::engine::setup::machine::Setup;
use crate::net::comm::{RecvComm, SendComm};
use crate::status::{bail, err, Error, Result};
use crate::types::Key;
use crate::wire::control::ControlStream;
use crate::wire::queue::{RxBuffer, TxQueue};
use nccl_net_abi::{ucclIoVec, MAX_REQUESTS};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use crate::engine::fifo::FifoItem;
pub use crate::wire::frame::{Frame, Grant, WireRegion, WireSegment, WireSegments};

/// Most bytes that a liar sends in one message.
pub const MOST: usize = 16 << 20;
const SET_UP: Duration = Duration::from_secs(30);

/// The tag of a chunk at `offset` of a stream, as an honest engine computes it. `by_initiator`: the sender chose the id.
pub fn tag(id: u64, by_initiator: bool, offset: u64) -> i32 {
    crate::proto::tag(Key { id, mine: by_initiator }, true, offset)
}

/// The id and the token of the region that an item names.
///
/// # Errors
/// `InvalidArgument` for an item that no engine made.
pub fn access(item: &FifoItem) -> Result<WireRegion> {
    let access = item.access()?;
    Ok(WireRegion { id: access.region, token: access.token })
}

struct Pair {
    send: SendComm,
    recv: RecvComm,
    /// Receives any data; never read.
    sink: &'static mut [u8],
}

impl Pair {
    fn new(pair: crate::net::setup::Pair) -> Pair {
        Pair { send: pair.send, recv: pair.recv, sink: vec![0; MOST].leak() }
    }
}

/// One connection to a victim.
pub struct Liar {
    // The comms are dropped before the memory that they use; that memory is never freed.
    channels: Vec<Pair>,
    control: ControlStream,
    tx: TxQueue,
    rx: RxBuffer,
    data: &'static [u8],
    lineage: Arc<Lineage>,
    port: u16,
    /// The id of the victim's engine.
    pub victim: [u8; 16],
    /// Largest chunk.
    pub chunk_bytes: usize,
}

impl Liar {
    /// Connects to a victim on this host with the identity, the keys and the NICs of `engine`. All data that it sends consists of
    /// the byte `lie`.
    ///
    /// # Errors
    /// As for [`Engine::connect`].
    pub fn connect(engine: &Engine, port: u16, lie: u8) -> Result<Liar> {
        let context = &engine.parts.context;
        let now = Instant::now();
        let deadline = now + SET_UP;
        let addresses = [std::net::SocketAddr::from(([127, 0, 0, 1], port))];
        let (sock, address) = dial::connect(&addresses, deadline, &context.shutdown)?;
        let mut driver = SetupDriver::new(sock, address, Setup::new(context.link(Some(""))?, now, deadline, deadline), now);
        connect::drive(context, &mut driver)?;
        let up = driver.parts()?;
        let lineage = Arc::new(build::lineage(context, &up)?.0);
        let (victim, chunk_bytes) = (up.agreed.peer.engine, up.agreed.terms.chunk_bytes as usize);
        Ok(Liar {
            channels: up.sets.into_iter().flat_map(|set| set.pairs).map(Pair::new).collect(),
            control: ControlStream::new(up.sock, up.sealed.session, up.sealed.raw)?,
            tx: TxQueue::default(),
            rx: RxBuffer::default(),
            data: vec![lie; MOST].leak(),
            lineage,
            port,
            victim,
            chunk_bytes,
        })
    }

    /// Sets up `channels` of this connection again, with the identity of `engine` and with this generation. They take the places of the lost
    /// ones.
    ///
    /// # Errors
    /// The victim's refusal.
    pub fn join(&mut self, engine: &Engine, generation: u32, channels: &[u16]) -> Result<()> {
        let context = &engine.parts.context;
        let now = Instant::now();
        let deadline = now + SET_UP;
        let seats = channels.iter().map(|&channel| Seat { channel, set: 0, index: channel.into() }).collect();
        let Some(joining) = self.lineage.begin() else { bail!(Internal, "one at a time") };
        let begun = Begun { joining, number: generation, seats, control: None };
        let addresses = [std::net::SocketAddr::from(([127, 0, 0, 1], self.port))];
        let (sock, address) = dial::connect(&addresses, deadline, &context.shutdown)?;
        let setup = Setup::new(context.joining_link()?, now, deadline, deadline);
        let mut driver = SetupDriver::joining(sock, address, setup, 0, begun, now);
        connect::drive(context, &mut driver)?;
        for pair in driver.parts()?.sets.into_iter().flat_map(|set| set.pairs) {
            let index = pair.index;
            *self.channel(index)? = Pair::new(pair);
        }
        Ok(())
    }

    /// The number of channels that came up.
    pub fn channels(&self) -> usize {
        self.channels.len()
    }

    /// Queues a frame and sends what the socket takes; returns the bytes left.
    ///
    /// # Errors
    /// When the victim has ended the connection.
    pub fn say(&mut self, frame: &Frame<'_>) -> Result<usize> {
        self.tx.push(frame);
        self.flush()
    }

    /// Sends what the socket takes; returns the bytes left.
    ///
    /// # Errors
    /// As for [`Liar::say`].
    pub fn flush(&mut self) -> Result<usize> {
        self.control.flush(&mut self.tx, usize::MAX)?;
        self.alive()?;
        Ok(self.tx.pending() + self.control.pending())
    }

    /// Reads the available bytes and passes the frames to `each`.
    ///
    /// # Errors
    /// As for [`Liar::say`].
    pub fn hear(&mut self, mut each: impl FnMut(&Frame<'_>)) -> Result<usize> {
        let (n, _) = self.control.read(&mut self.rx)?;
        self.alive()?;
        while let Some((frame, len)) = self.rx.next()? {
            each(&frame);
            self.rx.consume(len);
        }
        Ok(n)
    }

    fn alive(&self) -> Result<()> {
        self.control.lost().cloned().map_or(Ok(()), Err)
    }

    fn channel(&mut self, channel: usize) -> Result<&mut Pair> {
        let n = self.channels.len();
        self.channels.get_mut(channel).ok_or_else(|| err!(InvalidArgument, "channel {channel} of {n}"))
    }

    /// Sends a message of `len` bytes on a channel. `false`: its window is full.
    ///
    /// # Errors
    /// When the victim has closed the channel.
    pub fn fly(&mut self, channel: usize, tag: i32, len: usize) -> Result<bool> {
        if len == 0 || len > MOST {
            bail!(InvalidArgument, "a message of {len} bytes");
        }
        let data = self.data.as_ptr();
        let pair = self.channel(channel)?;
        while pair.send.test_oldest()? {}
        if pair.send.inflight() >= MAX_REQUESTS {
            return Ok(false);
        }
        let iov = [ucclIoVec { base: data.cast_mut().cast(), len }];
        // SAFETY: the data is never freed and never changes.
        unsafe { pair.send.send_vectored(&iov, len, tag) }
    }

    /// Posts a receive of `len` bytes on a channel. `false`: its window is full.
    ///
    /// # Errors
    /// When the victim has closed the channel, or sent something else.
    pub fn catch(&mut self, channel: usize, tag: i32, len: usize) -> Result<bool> {
        let pair = self.channel(channel)?;
        while pair.recv.test_oldest()?.is_some() {
            pair.recv.consume_oldest()?;
        }
        if pair.recv.window_free() == 0 || len == 0 || len > MOST {
            return Ok(false);
        }
        let iov = [ucclIoVec { base: pair.sink.as_mut_ptr().cast(), len }];
        // SAFETY: the sink is never freed, and never read.
        unsafe { pair.recv.recv_vectored(&iov, len, tag) }
    }

    /// Checks the channels for failures.
    ///
    /// # Errors
    /// Why a channel has ended.
    pub fn look(&mut self) -> Result<()> {
        for pair in &mut self.channels {
            while pair.send.test_oldest()? {}
            pair.send.network_bytes()?;
        }
        Ok(())
    }
}

impl std::fmt::Debug for Liar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Liar with {} channels", self.channels.len())
    }
}

/// The reason that the victim gives in its goodbye.
pub fn reason(frame: &Frame<'_>) -> Option<Error> {
    match frame {
        Frame::Bye { text, .. } => Some(err!(RemoteDisconnect, "{text}")),
        _ => None,
    }
}
