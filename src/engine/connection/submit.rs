//! Starts transfers, messages and notifications for the application. The first chunks are sent from its thread. Knows nothing
//! about how the rest is driven.

use super::core::Core;
use super::shared::{Held, Shared};
use crate::direct::{Blocks, Way};
use crate::engine::fifo::FifoItem;
use crate::engine::list::List;
use crate::engine::request::{self, Built, RequestBuilder};
use crate::engine::transfer::{Direction, LocalSegment};
use crate::proto::{Sketch, MAX_BACKLOG};
use crate::segment_pool::MANY;
use crate::status::{bail, Result};
use crate::types::{Place, Segment};
use crate::wire::frame::{MAX_NOTIFICATION, MAX_SEGMENTS};
use std::borrow::Borrow;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// A read of host memory of at most this many bytes is copied before the call that starts it returns.
const AT_ONCE: u64 = 128 << 10;

/// A connection as seen by a caller that starts something.
pub(super) struct Submission<'a>(pub &'a Shared);

impl Submission<'_> {
    /// See `Connection::transfer`.
    pub(super) fn transfer<B: Borrow<FifoItem>>(
        &self,
        direction: Direction,
        items: impl ExactSizeIterator<Item = (LocalSegment, B)> + Clone,
    ) -> Result<u64> {
        self.0.core.check("connection")?;
        // Checked before any item is read: with a wrong count the arrays cannot be trusted.
        request::check_count(items.len())?;
        if self.0.one_host.is_some() {
            if let Some((sketch, known)) = request::sketch(items.clone(), &self.0.context.registry, self.0.peer.engine) {
                let way = direction.way();
                let mut feed = request::Feed::new(items.clone(), known, way, sketch.count);
                if let Some(id) = self.transfer_direct(way, sketch, &mut feed)? {
                    return Ok(id);
                }
            }
        }
        self.transfer_request(direction.way(), items.len(), items)
    }

    /// See `Connection::transfer_list`.
    pub(super) fn transfer_list(&self, direction: Direction, list: &List) -> Result<u64> {
        self.0.core.check("connection")?;
        if self.0.one_host.is_some() {
            let way = direction.way();
            if let Some((sketch, mut feed)) = list.sketch(way, &self.0.context.registry, self.0.peer.engine) {
                if let Some(id) = self.transfer_direct(way, sketch, &mut feed)? {
                    return Ok(id);
                }
            }
        }
        self.transfer_request(direction.way(), list.len(), list.iter())
    }

    fn transfer_request<B: Borrow<FifoItem>>(
        &self,
        way: Way,
        n: usize,
        items: impl Iterator<Item = (LocalSegment, B)>,
    ) -> Result<u64> {
        let builder = if n < MANY {
            RequestBuilder::new(n, &self.0.context.registry, self.0.peer.engine, None)
        } else {
            let mut core = self.0.lock();
            let pool = core.machine.segment_pool();
            RequestBuilder::new(n, &self.0.context.registry, self.0.peer.engine, Some(pool))
        }?;
        let built = builder.build(items)?;
        let now = Instant::now();
        let mut core = self.0.lock();
        match built {
            Built::Refused(error) => {
                self.admit(&core, 0, std::iter::empty())?;
                log::error!("{}: {error}", self.0.peer.name);
                Ok(core.machine.start_failed(error))
            }
            Built::Request(request) => {
                self.admit(&core, request.segments.len(), request.pairs.iter().copied())?;
                let Core { machine, channels, .. } = &mut *core;
                let started = machine.start(way, request, channels, now);
                self.started(core, started, now)
            }
        }
    }

    /// Starts a direct transfer if that is possible at once. `None`: the transfer waits for a grant or goes over channels.
    pub(super) fn transfer_direct(&self, way: Way, sketch: Sketch, blocks: &mut dyn Blocks) -> Result<Option<u64>> {
        if sketch.count > MAX_SEGMENTS {
            return Ok(None);
        }
        let now = Instant::now();
        let mut core = self.0.lock();
        self.admit(&core, sketch.count, sketch.places())?;
        // A small read of host memory is complete when this returns.
        let at_once =
            way == Way::In && sketch.total <= AT_ONCE && sketch.pairings.iter().all(|pairing| !pairing.here.is_device());
        let Core { machine, channels, .. } = &mut *core;
        let (id, begun) = match machine.start_direct(sketch, way, blocks, channels, now) {
            Ok(None) => return Ok(None),
            Ok(Some(started)) => started,
            Err(e) => return self.started(core, Err(e), now),
        };
        let before = machine.ended();
        let looked = begun.and_then(|()| if at_once { machine.drive_channels(channels, now).map(drop) } else { Ok(()) });
        self.0.wake_waiters(&core, before);
        let _ = self.leave(core, looked, now);
        Ok(Some(id))
    }

    /// See `Connection::send`.
    pub(super) fn send(&self, items: impl ExactSizeIterator<Item = LocalSegment>) -> Result<u64> {
        self.0.core.check("connection")?;
        let (segments, uses) = request::message(items, &self.0.context.registry)?;
        let now = Instant::now();
        let mut core = self.0.lock();
        self.admit(&core, segments.len(), std::iter::empty())?;
        let Core { machine, channels, .. } = &mut *core;
        let id = machine.start_send(segments, uses, channels, now);
        self.started(core, Ok(id), now)
    }

    /// See `Connection::recv`.
    pub(super) fn recv(&self, local: LocalSegment) -> Result<u64> {
        self.0.core.check("connection")?;
        let region = self.0.context.registry.local(local.mr)?;
        let (addr, len) = (local.addr as u64, local.len as u64);
        region.check(addr, len)?;
        let segment = Segment { addr, len, region: 0, place: region.place, peer: Place::HOST };
        let now = Instant::now();
        let mut core = self.0.lock();
        self.admit(&core, 1, std::iter::empty())?;
        let Core { machine, channels, .. } = &mut *core;
        let id = machine.start_receive(segment, region, channels, now);
        self.started(core, Ok(id), now)
    }

    /// See `Connection::notify`.
    pub(super) fn notify(&self, name: &[u8], message: &[u8]) -> Result<()> {
        self.0.core.check("connection")?;
        let size = name.len().saturating_add(message.len());
        if size > MAX_NOTIFICATION {
            bail!(InvalidArgument, "a notification of {size} bytes, at most {MAX_NOTIFICATION}");
        }
        let mut core = self.0.lock();
        while core.backlog() + size > MAX_BACKLOG && core.machine.dead().is_none() && !core.closing {
            self.0.drive(&mut core, Instant::now());
            core.pause(Duration::from_micros(100));
        }
        self.admit(&core, 0, std::iter::empty())?;
        core.machine.tx().make_room(size)?;
        let now = Instant::now();
        core.machine.notify(name, message, now);
        self.leave(core, Ok(()), now)
    }

    /// Whether a transfer may start. An error here leaves the connection alive; a later one ends it.
    fn admit(&self, core: &Core, segments: usize, pairs: impl Iterator<Item = (Place, Place)>) -> Result<()> {
        if core.closing {
            core.machine.alive()?;
            bail!(Canceled, "the connection is being closed");
        }
        core.machine.admit(segments, pairs, &core.channels).inspect_err(|e| self.0.context.counters.limit(e.kind()))
    }

    /// Finishes a start. From here on a failure is the result of the transfer: bytes may have moved, so it has an id.
    ///
    /// # Errors
    /// The error in `started`, which ends the connection.
    fn started<T>(&self, mut core: Held<'_>, started: Result<T>, now: Instant) -> Result<T> {
        let value = started.map_err(|e| {
            let e = core.prefer_goodbye(e, now);
            self.0.fail_locked(&mut core, e.clone());
            e
        })?;
        let _ = self.leave(core, Ok(()), now);
        Ok(value)
    }

    /// Sends the first chunks, unless `before` failed, and wakes the progress thread if it must poll.
    ///
    /// # Errors
    /// Why the connection has ended, if queued frames could not be sent.
    pub(super) fn leave(&self, mut core: Held<'_>, before: Result<()>, now: Instant) -> Result<()> {
        if let Err(e) = before.and_then(|()| core.pump(now)) {
            let e = core.prefer_goodbye(e, now);
            return if self.0.fail_locked(&mut core, e.clone()) { Ok(()) } else { Err(e) };
        }
        let mut needs_help = core.backlog() > 0 || (core.channels.busy() && !self.0.context.doorbells);
        // A device copy rings no doorbell; an application thread that polls checks for it anyway.
        needs_help |= core.channels.copies_pending() && self.0.driven_by_application().is_none();
        // A note to the peer on this host, such as a claim, is sent by the next drive, and no poll may come.
        needs_help |= self.0.one_host.as_ref().is_some_and(|one_host| one_host.news.load(Ordering::Acquire));
        drop(core);
        if needs_help {
            self.0.context.request_drive(self.0.id);
        }
        Ok(())
    }
}
