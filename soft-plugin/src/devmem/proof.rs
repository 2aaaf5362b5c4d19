//! Proves a new payload connection before anything passes over it: the receiver has it steered and says so, the sender's GPU writes a
//! pattern and its NIC sends it, and the receiver's GPU reads what the receiver's NIC has written. Steps that never wait.

use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use devmem::{Calls, Piece, Received, Tokens};

use super::area::{Area, Block};
use super::host::{allow_zerocopy, flow_of};
use super::layout::PATTERN;
use super::lent::Lent;
use super::pattern;

/// What the receiver says once its connection is steered.
const STEERED: u8 = 0x53;
/// Most pieces that one call takes.
const PIECES: usize = 64;

/// A payload connection that was proved.
pub enum Payload {
    /// Of a send comm: with the calls that the kernel has counted.
    Sends(OwnedFd, Arc<Area>, Calls),
    /// Of a receive comm.
    Receives(Arc<Lent>),
}

enum State {
    /// Waits for the receiver's word.
    Asked {
        connection: OwnedFd,
    },
    /// So many bytes of the pattern in the block are with the kernel, by these calls.
    Sending {
        connection: OwnedFd,
        block: Block,
        sent: usize,
        calls: Calls,
    },
    /// So many bytes of the pattern have come.
    Receiving {
        lent: Arc<Lent>,
        got: usize,
        in_device: usize,
    },
    Done(Payload),
    Failed,
}

/// A proof under way.
pub struct Proof {
    area: Arc<Area>,
    pattern: Vec<u8>,
    state: State,
}

impl Proof {
    /// Begins. `secret`: what only the two ends know of this connection.
    ///
    /// # Errors
    /// The area does not admit the connection, or it cannot be steered.
    pub fn begin(
        area: &Arc<Area>,
        receives: bool,
        heads: BorrowedFd<'_>,
        connection: OwnedFd,
        secret: &[u8],
    ) -> io::Result<Proof> {
        let mut bytes = vec![0; PATTERN];
        pattern::fill(secret, &mut bytes);
        let state = if receives {
            let seat = area.admit(IpAddr::V4(*flow_of(connection.as_fd())?.from.ip()))?;
            let rule = area.steer(connection.as_fd()).map_err(|e| {
                io::Error::new(e.kind(), format!("steering a connection to queue {} of {}: {e}", area.queue(), area.nic().name()))
            })?;
            say(heads, STEERED)?;
            let lent = Arc::new(Lent::new(connection, rule, seat, area.clone()));
            State::Receiving { lent, got: 0, in_device: 0 }
        } else {
            allow_zerocopy(connection.as_fd())?;
            State::Asked { connection }
        };
        Ok(Proof { area: area.clone(), pattern: bytes, state })
    }

    /// The payload connection, once it is proved. `heads`: the other connection of the comm.
    ///
    /// # Errors
    /// It cannot be: why.
    pub fn step(&mut self, heads: BorrowedFd<'_>) -> io::Result<Option<Payload>> {
        loop {
            self.state = match std::mem::replace(&mut self.state, State::Failed) {
                State::Asked { connection } => match hear(heads)? {
                    None => State::Asked { connection },
                    Some(STEERED) => self.start(connection)?,
                    Some(_) => return Err(io::Error::other("the peer says something else than that it is steered")),
                },
                State::Sending { connection, block, sent, calls } => self.send(connection, block, sent, calls)?,
                State::Receiving { lent, got, in_device } => self.receive(lent, got, in_device)?,
                State::Done(payload) => return Ok(Some(payload)),
                State::Failed => return Err(ErrorKind::InvalidInput.into()),
            };
            if !matches!(self.state, State::Done(_)) {
                return Ok(None);
            }
        }
    }

    fn start(&self, connection: OwnedFd) -> io::Result<State> {
        let Some(block) = self.area.block() else {
            return Err(io::Error::other("too many patterns are on their way"));
        };
        self.area.memory().write(block.at(), &self.pattern)?;
        self.send(connection, block, 0, Calls::default())
    }

    fn send(&self, connection: OwnedFd, block: Block, mut sent: usize, mut calls: Calls) -> io::Result<State> {
        if let Err(error) = self.push(connection.as_fd(), &block, &mut sent, &mut calls) {
            self.area.settle(connection, block, calls);
            return Err(error);
        }
        // Not when it has arrived, which the peer says by the end of its own proof, but when the block may be used again.
        Ok(match sent == PATTERN && calls.all_ended() {
            true => State::Done(Payload::Sends(connection, self.area.clone(), calls)),
            false => State::Sending { connection, block, sent, calls },
        })
    }

    fn push(&self, connection: BorrowedFd<'_>, block: &Block, sent: &mut usize, calls: &mut Calls) -> io::Result<()> {
        devmem::completed(connection, calls)?;
        while *sent < PATTERN {
            match devmem::send(connection, self.area.sends(), block.offset() + *sent, PATTERN - *sent) {
                Ok(taken) => {
                    *sent += taken;
                    calls.add();
                }
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => break,
                Err(e) => return Err(io::Error::new(e.kind(), format!("sending a pattern from device memory: {e}"))),
            }
        }
        Ok(())
    }

    fn receive(&self, lent: Arc<Lent>, mut got: usize, mut in_device: usize) -> io::Result<State> {
        let mut buffer = vec![0; PATTERN];
        while got < PATTERN {
            let pieces = match devmem::receive(lent.connection(), &mut buffer[..PATTERN - got], PIECES) {
                Ok(Received::End) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(Received::Plain(len)) => vec![Piece::Linear(len as u32)],
                Ok(Received::Pieces(pieces)) => pieces,
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    return Ok(State::Receiving { lent, got, in_device })
                }
                Err(e) => return Err(io::Error::new(e.kind(), format!("receiving a pattern into device memory: {e}"))),
            };
            let mut tokens = Tokens::default();
            for piece in &pieces {
                if let Piece::Device(fragment) = piece {
                    tokens.add(fragment.token);
                }
            }
            lent.keep(tokens);
            let mut copied = 0;
            for piece in pieces {
                let len = match piece {
                    Piece::Linear(len) => {
                        self.compare(&lent, got, &buffer[copied..copied + len as usize])?;
                        copied += len as usize;
                        len as usize
                    }
                    Piece::Device(fragment) => {
                        self.area.check(&fragment).map_err(io::Error::other)?;
                        let mut bytes = vec![0; fragment.length as usize];
                        self.area.memory().read(fragment.offset as usize, &mut bytes)?;
                        self.compare(&lent, got, &bytes)?;
                        in_device += bytes.len();
                        bytes.len()
                    }
                };
                got += len;
            }
        }
        lent.give_back()?;
        if in_device < PATTERN / 2 {
            let (nic, queue) = (self.area.nic().name(), self.area.queue());
            return Err(io::Error::other(format!(
                "the NIC wrote {in_device} of {PATTERN} bytes of a pattern into device memory: {nic} does not steer to queue {queue}"
            )));
        }
        Ok(State::Done(Payload::Receives(lent)))
    }

    fn compare(&self, lent: &Lent, at: usize, found: &[u8]) -> io::Result<()> {
        let Some(place) = pattern::difference(&self.pattern, at, found) else { return Ok(()) };
        lent.seat().distrust();
        Err(io::Error::other(format!(
            "a pattern through {} came out wrong at byte {place}: the platform loses what a NIC and a GPU write to each other (IOMMU?)",
            self.area.nic().name()
        )))
    }
}

impl Drop for Proof {
    fn drop(&mut self) {
        if let State::Sending { connection, block, calls, .. } = std::mem::replace(&mut self.state, State::Failed) {
            self.area.settle(connection, block, calls);
        }
    }
}

fn say(heads: BorrowedFd<'_>, word: u8) -> io::Result<()> {
    // SAFETY: one byte, read during the call. The connection is new: it takes a byte.
    match unsafe { libc::send(heads.as_raw_fd(), (&raw const word).cast(), 1, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) } {
        1 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn hear(heads: BorrowedFd<'_>) -> io::Result<Option<u8>> {
    let mut word = 0u8;
    // SAFETY: one byte of room.
    match unsafe { libc::recv(heads.as_raw_fd(), (&raw mut word).cast(), 1, libc::MSG_DONTWAIT) } {
        1 => Ok(Some(word)),
        0 => Err(ErrorKind::UnexpectedEof.into()),
        _ => match io::Error::last_os_error() {
            e if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
            e => Err(e),
        },
    }
}
