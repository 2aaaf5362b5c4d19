//! A later set-up brings lost channels of a connection up again, or makes its control connection again. Knows nothing about how it runs.

use super::core::Core;
use super::shared::{Held, Shared};
use crate::engine::setup::lineage::{Joining, Seat};
use crate::net::setup::Pair;
use crate::status::{bail, err, Error, Result};
use crate::wire::control::reset_at_close;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long the set-up thread waits for a connection that another thread drives.
const TURN: Duration = Duration::from_millis(50);

/// A connection's part in a set-up that joins it.
pub(crate) struct Begun {
    pub joining: Joining,
    /// Its number.
    pub number: u32,
    /// The channels that it shall bring up.
    pub seats: Vec<Seat>,
    /// The control connection shall go on over its socket.
    pub control: Option<Counts>,
}

/// How much of a control connection has arrived.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counts {
    /// How many records of the peer this engine has opened.
    pub ours: u64,
    /// How many of this engine's the peer has opened, once it has said so.
    pub theirs: Option<u64>,
}

/// The socket of such a set-up.
pub(crate) struct Socket {
    pub sock: TcpStream,
    /// The peer's end of it.
    pub address: SocketAddr,
    /// The records that have arrived behind the set-up.
    pub raw: Vec<u8>,
}

/// A connection, for the set-up thread.
pub(crate) struct Restorer<'a>(pub(super) &'a Shared);

impl Restorer<'_> {
    /// The connection while it is open.
    fn open(&self) -> Result<Held<'_>> {
        self.0.core.check("connection")?;
        let Some(core) = self.0.lock_unless_preparing(Instant::now() + TURN) else {
            bail!(Resource, "the connection is busy");
        };
        core.machine.alive()?;
        if core.closing {
            bail!(Canceled, "the connection is being closed");
        }
        Ok(core)
    }

    /// The channels that may be set up again; none at a listener, which waits for its peer.
    ///
    /// # Errors
    /// The connection has ended, or another thread keeps it.
    pub(crate) fn lost(&self) -> Result<Vec<Seat>> {
        let Some(lineage) = self.0.peer.lineage.as_ref().filter(|lineage| lineage.agreed.connecting) else {
            return Ok(Vec::new());
        };
        let core = self.open()?;
        Ok(lineage.seats().filter(|seat| core.machine.is_lost(seat.channel)).collect())
    }

    /// Takes part in a set-up of these channels. `number`: the peer's for it.
    ///
    /// # Errors
    /// `Resource` while another is under way; why the connection cannot take part.
    pub(crate) fn begin(&self, seats: Vec<Seat>, number: Option<u32>) -> Result<Begun> {
        let Some(lineage) = &self.0.peer.lineage else { bail!(Internal, "a connection without a set-up") };
        let Some(joining) = lineage.begin() else { bail!(Resource, "another set-up joins this connection already") };
        let channels: Vec<u16> = seats.iter().map(|seat| seat.channel).collect();
        let number = self.open()?.machine.begin_restore(&channels, number)?;
        Ok(Begun { joining, number, seats, control: None })
    }

    /// Whether the control connection has failed, and this engine is the one to make it again.
    pub(crate) fn is_suspended(&self) -> bool {
        self.0.moves.suspended.load(Ordering::SeqCst)
            && self.0.peer.lineage.as_ref().is_some_and(|lineage| lineage.agreed.connecting)
    }

    /// Takes part in a set-up over whose socket the control connection goes on, in place of any other that joins the connection. The socket
    /// that it has is given up, even one that seems to work: the peer has noticed first. `number`: the peer's for it; `theirs`: how many
    /// records of this engine the peer has opened.
    ///
    /// # Errors
    /// Why the connection cannot take part.
    pub(crate) fn begin_move(&self, number: Option<u32>, theirs: Option<u64>) -> Result<Begun> {
        let Some(lineage) = &self.0.peer.lineage else { bail!(Internal, "a connection without a set-up") };
        let mut core = self.open()?;
        let number = core.machine.begin_restore(&[], number)?;
        let ours = core.control.suspend(err!(RemoteDisconnect, "control connection: the peer has lost it"));
        // It can be: the peer does it.
        core.movable = true;
        core.check_control(Instant::now())?;
        self.0.note_suspended(&core);
        let control = Some(Counts { ours, theirs });
        Ok(Begun { joining: lineage.begin_instead(), number, seats: Vec::new(), control })
    }

    /// The control connection goes on over another socket.
    ///
    /// # Errors
    /// Why it could not.
    pub(crate) fn finish_move(&self, begun: &Begun, socket: Socket) -> Result<()> {
        let now = Instant::now();
        // The peer may go on over it already.
        reset_at_close(&socket.sock);
        let mut core = self.open()?;
        let Some(Counts { theirs: Some(opened), .. }) = begun.control else { bail!(Internal, "no count of the peer") };
        if !begun.joining.holds() {
            bail!(Canceled, "another set-up has taken the place of this one");
        }
        let moved = self.resume(&mut core, socket, opened, now).and_then(|address| core.pump(now).map(|_| address));
        match moved {
            Ok(address) => begun.joining.moved(address),
            Err(e) => {
                self.0.fail_locked(&mut core, e.clone());
                return Err(e);
            }
        }
        drop(core);
        self.0.context.request_drive(self.0.id);
        Ok(())
    }

    /// Returns the new address of the peer.
    fn resume(&self, core: &mut Core, socket: Socket, opened: u64, now: Instant) -> Result<SocketAddr> {
        let Some(since) = core.suspended.take() else { bail!(Internal, "a control connection that works is made again") };
        let why = core.control.lost().map_or_else(String::new, |why| why.to_str().to_owned());
        let to = ends(&socket.sock, socket.address);
        let from = std::mem::replace(&mut core.at, to.clone());
        core.control.resume(&socket.sock, opened, socket.raw)?;
        core.machine.on_moved(core.control.pending(), now);
        self.0.moves.sockets.fetch_add(1, Ordering::SeqCst);
        self.0.moves.suspended.store(false, Ordering::SeqCst);
        self.0.context.queue.bell.watch(self.0.fd, self.0.id)?;
        let (name, after) = (&self.0.peer.name, now.saturating_duration_since(since));
        let line = format_args!("the control connection with {name} moved from {from} to {to} after {after:.1?}: {why}");
        self.0.context.lines.log(log::Level::Info, now, line);
        Ok(socket.address)
    }

    /// The control connection will not be made again: the peer has ended.
    pub(crate) fn give_up_control(&self, why: &Error) {
        // The next attempt has the same result.
        let Ok(mut core) = self.open() else { return };
        if let (Some(_), Some(lost)) = (core.suspended, core.control.lost()) {
            let error = err!(RemoteDisconnect, "{lost}, and it could not be made again: {why}");
            self.0.fail_locked(&mut core, error);
        }
    }

    /// Takes over the channels that came up.
    ///
    /// # Errors
    /// Why it could not; the pairs are closed.
    pub(crate) fn finish(&self, begun: &Begun, pairs: Vec<(usize, Pair)>) -> Result<()> {
        let now = Instant::now();
        let mut core = self.open()?;
        if !begun.joining.holds() {
            bail!(Canceled, "another set-up has taken the place of this one");
        }
        for (set, pair) in &pairs {
            let members = self.0.peer.lineage.as_ref().and_then(|lineage| lineage.sets.get(*set));
            pair.join(&self.0.slot.doorbell(), members.and_then(|members| members.pace))?;
        }
        let Core { machine, channels, .. } = &mut *core;
        let restored = pairs.into_iter().try_for_each(|(set, pair)| {
            let seat = begun.seats.iter().find(|seat| (seat.set, seat.index) == (set, pair.index));
            let channel = seat.ok_or_else(|| err!(Internal, "a channel that was not asked for"))?.channel;
            channels.restore(channel, pair)?;
            machine.restore(channel, begun.number, channels, now)
        });
        if let Err(e) = restored.and_then(|()| core.pump(now).map(drop)) {
            self.0.fail_locked(&mut core, e.clone());
            return Err(e);
        }
        drop(core);
        self.0.context.request_drive(self.0.id);
        Ok(())
    }
}

/// The two ends of a control connection, for the log.
pub(crate) fn ends(sock: &TcpStream, peer: SocketAddr) -> String {
    match sock.local_addr() {
        Ok(here) => format!("{} ({})", peer.ip(), crate::net::topology::name_of(crate::addresses::plain(here.ip()))),
        Err(_) => peer.ip().to_string(),
    }
}
