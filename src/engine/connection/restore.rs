//! A later set-up brings lost channels of a connection up again. Knows nothing about how it runs.

use super::core::Core;
use super::shared::{Held, Shared};
use crate::engine::setup::lineage::{Joining, Seat};
use crate::net::setup::Pair;
use crate::status::{bail, err, Result};
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
        Ok(Begun { joining, number, seats })
    }

    /// Takes over the channels that came up.
    ///
    /// # Errors
    /// Why it could not; the pairs are closed.
    pub(crate) fn finish(&self, begun: &Begun, pairs: Vec<(usize, Pair)>) -> Result<()> {
        let now = Instant::now();
        let mut core = self.open()?;
        for (_, pair) in &pairs {
            pair.set_doorbell(&self.0.slot.doorbell())?;
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
