//! The channels of a connection over all its paths: which path carries a chunk, which channel takes the next one, and the device
//! copier that they share; also the direct transport on one host, if any. Both engines have the same paths in the same order and
//! number the channels over them. Knows nothing of plugins, and of transfers only the keys of chunks.

use super::device::spread;
use super::path::{Arrival, Carries, Change, Copier, Departure, Outbound, Path};
use super::plan::{Chunk, ChunkLimits};
use super::stillness::{Silent, Stillness};
use super::stripe::{self, Loads, Want};
use crate::direct::{Activity, Direct, Event, Way};
use crate::net::setup::Pair;
use crate::stats::ChannelStats;
use crate::status::{bail, err, Error, Result};
use crate::types::{Part, Place, Segment};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Bytes moved by the channels so far, in whole chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    /// Taken by channels for sending.
    pub submitted: u64,
    /// Sent.
    pub sent: u64,
    /// Announced by the peer.
    pub expected: u64,
    /// In place, or drained.
    pub received: u64,
    /// Of what was submitted or expected: on channels that were lost first.
    pub lost: u64,
}

/// All channels of a connection.
///
/// - An outgoing stream calls [`Channels::route`] once. For each chunk it calls [`Channels::pick`], then [`Channels::submit`]
///   with what it cut to the given length, and [`Channels::flush`] after a burst.
/// - An incoming stream calls [`Channels::expect`] for each announced chunk, in the order of the announcements on its channel.
/// - [`Channels::progress`] reports what has moved, in order for each channel. An error of it, of `submit` or of `expect` ends
///   the connection.
/// - [`Channels::close`] comes last. Until it returns, memory of chunks in flight may still be touched; afterwards never.
/// - The getters, such as [`Channels::count`], [`Channels::busy`], [`Channels::totals`] and [`Channels::stats`], never change
///   anything.
pub(crate) struct Channels {
    // The direct transport and the paths close before the copier is dropped (field order).
    direct: Option<Box<dyn Direct>>,
    paths: Vec<Box<dyn Path>>,
    /// The number of each path's first channel, and at the end that of all channels.
    first: Vec<usize>,
    copier: Copier,
    loads: Loads,
    totals: Totals,
    stillness: Stillness,
    /// Faults of NICs that the kernel of this host has announced.
    faults: Vec<String>,
    /// When a NIC was last given up for its silence.
    silent: Option<Instant>,
}

impl Channels {
    /// Channels over `paths`; the first path that carries a pair of places is used.
    pub(crate) fn new(direct: Option<Box<dyn Direct>>, paths: Vec<Box<dyn Path>>, copier: Copier) -> Channels {
        let ends = paths.iter().scan(0, |end, path| {
            *end += path.channels();
            Some(*end)
        });
        let first = std::iter::once(0).chain(ends).collect();
        Channels {
            direct,
            paths,
            first,
            copier,
            loads: Loads::default(),
            totals: Totals::default(),
            stillness: Stillness::default(),
            faults: Vec::new(),
            silent: None,
        }
    }

    /// Number of paths: each route blocks on its own.
    pub(crate) fn routes(&self) -> usize {
        self.paths.len()
    }

    /// The path for chunks between memory of these places. While all channels of those that carry them are lost: the first of these, where
    /// chunks wait for one to come back.
    pub(crate) fn route(&self, local: Place, peer: Place) -> Option<usize> {
        let first = |how| self.paths.iter().position(|path| path.carries(local, peer) == how);
        first(Carries::Now).or_else(|| first(Carries::Later))
    }

    /// The first of these pairs of places, here and at the peer, that no path connects. Neighbours in a list of blocks are mostly of one pair.
    pub(crate) fn unreachable(&self, pairs: impl IntoIterator<Item = (Place, Place)>) -> Option<(Place, Place)> {
        let mut last = None;
        let mut changes = pairs.into_iter().filter(|pair| last.replace(*pair) != Some(*pair));
        changes.find(|&(local, peer)| self.route(local, peer).is_none())
    }

    /// The direct transport, if any.
    pub(crate) fn direct(&mut self) -> Option<&mut (dyn Direct + 'static)> {
        self.direct.as_deref_mut()
    }

    /// The state of the direct transport.
    pub(crate) fn activity(&self) -> Activity {
        self.direct.as_ref().map_or_else(Activity::default, |direct| direct.activity())
    }

    /// Whether a direct transfer that the peer has started uses a region.
    pub(crate) fn uses_region(&self, id: u64) -> bool {
        self.direct.as_ref().is_some_and(|direct| direct.uses_region(id))
    }

    /// The chunk limits of a channel; `None` if it does not exist.
    pub(crate) fn limits(&self, channel: u16) -> Option<ChunkLimits> {
        let (path, _) = self.locate(channel.into())?;
        Some(self.paths.get(path)?.limits(u64::MAX))
    }

    /// The limits for the next chunk of a transfer of `total` bytes on a route.
    pub(crate) fn cut(&self, route: usize, total: u64) -> ChunkLimits {
        match self.paths.get(route) {
            Some(path) => path.limits(total),
            None => ChunkLimits { bytes: 0, pieces: 0, crossed: 0 },
        }
    }

    /// Number of channels.
    pub(crate) fn count(&self) -> usize {
        self.first.last().copied().unwrap_or(0)
    }

    /// The channel for the next chunk from `place` on a route, and the chunk's maximum bytes; `None` when none should take one now.
    pub(crate) fn pick(&mut self, route: usize, place: Place, want: Want, bulk: bool, now: Instant) -> Option<(u16, usize)> {
        let first = *self.first.get(route)?;
        self.loads.channels.clear();
        self.loads.nics.clear();
        self.loads.numbers.clear();
        (self.loads.alone, self.loads.first) = (0, 0);
        self.paths.get_mut(route)?.loads(place, bulk, now, &mut self.loads);
        let pick = stripe::pick(&self.loads, want)?;
        let channel = self.loads.numbers.get(pick.channel).copied().unwrap_or(pick.channel);
        Some((u16::try_from(first + channel).ok()?, pick.len as usize))
    }

    /// The number of a channel's path, and the channel's number there; `None` if it does not exist.
    fn locate(&self, channel: usize) -> Option<(usize, usize)> {
        let path = self.first.partition_point(|&first| first <= channel).checked_sub(1)?;
        (channel < self.count()).then(|| (path, channel - self.first[path]))
    }

    fn path(&mut self, channel: u16) -> Option<(&mut Box<dyn Path>, usize, &mut Copier)> {
        let (path, index) = self.locate(channel.into())?;
        Some((self.paths.get_mut(path)?, index, &mut self.copier))
    }

    /// Sends a chunk on a channel that [`Channels::pick`] named.
    pub(crate) fn submit(&mut self, channel: u16, departure: Departure, now: Instant) -> Result<()> {
        let len = departure.chunk.len as u64;
        let Some((path, index, copier)) = self.path(channel) else { bail!(Internal, "channel {channel} does not exist") };
        path.submit(index, departure, copier, now)?;
        self.totals.submitted += len;
        Ok(())
    }

    /// Expects a chunk that the peer announced. A channel that does not exist, or that cannot carry the chunk's destination, is a
    /// violation.
    pub(crate) fn expect(&mut self, channel: u16, arrival: Arrival) -> Result<()> {
        let Some((path, index, _)) = self.path(channel) else { bail!(Protocol, "channel {channel} does not exist") };
        let len = arrival.len as u64;
        path.expect(index, arrival)?;
        self.totals.expected += len;
        Ok(())
    }

    /// Bytes of chunks in flight in both directions.
    pub(crate) fn under_way(&self) -> u64 {
        let Totals { submitted, sent, expected, received, lost } = self.totals;
        (submitted + expected).saturating_sub(sent + received + lost)
    }

    /// Advances all channels; returns their events.
    pub(crate) fn progress(&mut self, now: Instant, events: &mut Vec<Event>) -> Result<bool> {
        let mut any = false;
        if let Some(direct) = self.direct.as_mut().filter(|direct| direct.activity().active) {
            any |= direct.progress(now, events)?;
        }
        for (path, &first) in self.paths.iter_mut().zip(&self.first) {
            let first = first as u16;
            let from = events.len();
            if path.busy() {
                any |= path.progress(&mut self.copier, now, events)?;
            }
            for event in &mut events[from..] {
                match event {
                    Event::Sent(channel, _, len) => (*channel, self.totals.sent) = (*channel + first, self.totals.sent + *len),
                    Event::Received(channel, _, len) => {
                        (*channel, self.totals.received) = (*channel + first, self.totals.received + *len);
                    }
                    Event::Closed(channel, _) => *channel += first,
                    _ => {}
                }
            }
        }
        self.flush()?;
        Ok(any)
    }

    /// Closes a channel, because of `why`. [`Channels::progress`] reports that it is closed.
    pub(crate) fn close_channel(&mut self, channel: u16, why: Error) {
        // Nothing is left to close where it does not exist.
        let _ = self.change(channel, Change::Close(why));
    }

    /// Takes a channel in place of one that is closed. It is not chosen before [`Channels::open_channel`].
    ///
    /// # Errors
    /// `Internal` when the channel is not closed.
    pub(crate) fn restore(&mut self, channel: u16, pair: Pair) -> Result<()> {
        self.change(channel, Change::Restore(Box::new(pair)))
    }

    /// A restored channel is open at both engines.
    pub(crate) fn open_channel(&mut self, channel: u16) {
        // It exists: the peer's frame was checked.
        let _ = self.change(channel, Change::Open);
    }

    fn change(&mut self, channel: u16, change: Change) -> Result<()> {
        let Some((path, index, _)) = self.path(channel) else { bail!(Internal, "channel {channel} does not exist") };
        path.change(index, change)
    }

    /// The NIC of a channel.
    pub(crate) fn nic(&self, channel: u16) -> String {
        let direct = usize::from(self.direct.is_some());
        let mut all = self.stats(false, Instant::now());
        all.get_mut(direct + usize::from(channel)).map_or_else(String::new, |stats| std::mem::take(&mut stats.nic))
    }

    /// So many bytes that were submitted or expected are no longer in flight, since their channel is closed.
    pub(crate) fn lose(&mut self, bytes: u64) {
        self.totals.lost += bytes;
    }

    /// Starts the copies submitted since the last flush.
    pub(crate) fn flush(&mut self) -> Result<()> {
        match &mut self.copier {
            Some(copier) => copier.flush(),
            None => Ok(()),
        }
    }

    /// Whether chunks are announced, in flight or expected, or direct transfers are running.
    pub(crate) fn busy(&self) -> bool {
        self.paths.iter().any(|path| path.busy()) || self.activity().busy
    }

    /// Whether [`Channels::progress`] has work, chunks or not.
    pub(crate) fn is_active(&self) -> bool {
        self.paths.iter().any(|path| path.busy()) || self.activity().active
    }

    /// Whether a device is copying for this connection; its completion rings no doorbell.
    pub(crate) fn copies_pending(&self) -> bool {
        self.copier.as_ref().is_some_and(|copier| copier.busy()) || self.activity().copying
    }

    /// Bytes in whole chunks.
    pub(crate) fn totals(&self) -> Totals {
        self.totals
    }

    /// Samples the network's progress: bytes sent and received if all plugins report them, otherwise whole chunks. Call it
    /// several times in each timeout while something must move.
    ///
    /// # Errors
    /// When the connection must end.
    pub(crate) fn look(&mut self, now: Instant) -> Result<(u64, u64)> {
        let (mut sum, mut number) = (Some((0, 0)), 0);
        let stillness = &mut self.stillness;
        for path in &mut self.paths {
            path.network(&mut |line| {
                sum = sum.zip(line.moved).map(|((a, b), (c, d))| (a + c, b + d));
                stillness.note(number, &line, now);
                number += 1;
            })?;
        }
        let (out, incoming) = sum.unwrap_or((self.totals.sent, self.totals.received));
        let (more_out, more_in) = self.direct.as_ref().map_or((0, 0), |direct| direct.flowed());
        Ok((out.saturating_add(more_out), incoming.saturating_add(more_in)))
    }

    /// Closes the channels that have a fault, as far as others without one carry what they do. `fault`: why a NIC, by its name and the
    /// address that the channel has, cannot be used.
    pub(crate) fn close_faulty(&mut self, fault: &dyn Fn(&str, Option<IpAddr>) -> Option<String>) -> Result<()> {
        let mut faults: Vec<String> = Vec::new();
        for path in &mut self.paths {
            path.network(&mut |line| {
                let text = fault(line.nic, line.local).map(|why| format!("{} {why}", line.nic));
                faults.extend(text.filter(|text| !faults.contains(text)));
            })?;
        }
        // Most changes of a host's interfaces concern no NIC of a connection.
        self.faults = faults;
        if self.faults.is_empty() {
            return Ok(());
        }
        self.close_nics(fault).map(drop)
    }

    /// What this host knows to be wrong with NICs of the connection, open or not: for an error text, behind its end.
    pub(crate) fn faults(&self) -> String {
        self.faults.iter().map(|fault| format!("; {fault}")).collect()
    }

    /// Returns whether it has closed any.
    fn close_nics(&mut self, fault: &dyn Fn(&str, Option<IpAddr>) -> Option<String>) -> Result<bool> {
        // The last path carries everything, each other one only memory of its pair of GPUs.
        let (mut general, mut any) = (None, false);
        for path in self.paths.iter_mut().rev() {
            let (mut faulty, mut sound, mut number) = (Vec::new(), false, 0);
            path.network(&mut |line| {
                match fault(line.nic, line.local) {
                    Some(why) if line.open => faulty.push((number, err!(RemoteDisconnect, "{} {why}", line.nic))),
                    Some(_) => {}
                    None => sound |= line.open,
                }
                number += 1;
            })?;
            if sound || *general.get_or_insert(sound) {
                any |= !faulty.is_empty();
                faulty.into_iter().try_for_each(|(number, why)| path.change(number, Change::Close(why)))?;
            }
        }
        Ok(any)
    }

    /// Closes the channels of a NIC on which the peer's kernel has acknowledged nothing for `timeout` although it should have, if the
    /// peer lives: `received` is when its control connection last brought something. Over a plugin that does not report bytes a NIC must
    /// finish a chunk within `chunk_timeout`. Another NIC must have done so meanwhile, or have nothing to do. Channels of other NICs must carry
    /// what they do.
    pub(crate) fn close_silent(
        &mut self,
        [timeout, chunk_timeout]: [Duration; 2],
        received: Instant,
        now: Instant,
    ) -> Result<()> {
        let Some(Silent { nic, still, reports_moved, too_large }) = self.stillness.silent_nic(timeout, chunk_timeout, now) else {
            return Ok(());
        };
        let limit = if reports_moved { timeout } else { chunk_timeout };
        let Some(since) = now.checked_sub(still) else { return Ok(()) };
        // A NIC does not go unless the last loss helped.
        let helped = self.silent.is_none_or(|at| self.stillness.moved_beside(nic, at));
        let moved = self.stillness.moved_beside(nic, since + limit / 2);
        let alone = received >= since + limit / 2 && self.stillness.is_free_beside(nic);
        if !helped || !(moved || alone) {
            return Ok(());
        }
        let what = if reports_moved { "the peer has acknowledged nothing" } else { "no chunk was finished" };
        let (nic, why) = (nic.to_owned(), format!("is silent: {what} for {still:.1?}, though it lives{}", size_text(too_large)));
        if self.close_nics(&|name, _| (name == nic).then(|| why.clone()))? {
            self.silent = Some(now);
        }
        Ok(())
    }

    /// Closes channels of NICs that have become slow, if others deliver sooner what they hold. Returns whether to call it again soon.
    pub(crate) fn relieve(&mut self, now: Instant) -> bool {
        self.paths.iter_mut().fold(false, |again, path| path.relieve(now) | again)
    }

    /// Describes a NIC that has received nothing for `timeout` although chunks are announced on it, even if other NICs receive.
    pub(crate) fn dead_nic(&self, timeout: Duration, now: Instant) -> Option<String> {
        let (nic, still, channels) = self.stillness.dead_nic(timeout, now)?;
        Some(format!("nothing has arrived over {nic} for {still:.1?}; in flight: {}", self.describe(&channels, Way::In, now)))
    }

    /// The statistics of the direct transport, then of each channel in the order of their numbers; none after the close.
    /// `kernel`: including the kernel's.
    pub(crate) fn stats(&self, kernel: bool, now: Instant) -> Vec<ChannelStats> {
        let mut out: Vec<ChannelStats> = self.direct.iter().map(|direct| direct.stats(kernel)).collect();
        self.paths.iter().for_each(|path| path.stats(kernel, now, &mut out));
        out
    }

    /// Describes the chunks in flight in a direction, for an error text: the channels that have been stalled the longest.
    pub(crate) fn describe_busy(&self, way: Way, now: Instant) -> String {
        let channels = self.describe(&self.stillness.stillest(way, now), way, now);
        let direct = self.direct.as_ref().map_or(String::new(), |direct| direct.describe(way));
        match (channels.is_empty(), direct.is_empty()) {
            (_, true) => channels,
            (true, false) => direct,
            (false, false) => format!("{direct}; {channels}"),
        }
    }

    /// Describes the plugin's control connection that has had no answer for longest, for an error text. Without it no data moves, and
    /// nothing of it shows on the channels.
    pub(crate) fn describe_control(&self, way: Way) -> String {
        self.stillness.silent_control().map_or_else(String::new, |(number, time)| {
            let ends = self.ends(number, way);
            format!("the plugin's control connection of channel {number} on {ends} has had no answer for {time:.1?}")
        })
    }

    fn describe(&self, channels: &[usize], way: Way, now: Instant) -> String {
        const MOST: usize = 4;
        let words = |&number: &usize| {
            let (chunks, still) = self.stillness.of(number, way, now);
            let (direction, outbound) = match way {
                Way::Out => ("out", self.stillness.outbound(number)),
                Way::In => ("in", Outbound::default()),
            };
            let what = match (chunks, outbound.waiting) {
                (0, bytes @ 1..) => format!("{bytes} bytes that the peer has not acknowledged"),
                _ => format!("{chunks} chunks"),
            };
            let (ends, size) = (self.ends(number, way), size_text(outbound.too_large));
            format!("channel {number}: {what} {direction} on {ends}, stalled for {still:.1?}{size}")
        };
        let named: Vec<String> = channels.iter().take(MOST).map(words).collect();
        let more = if channels.len() > MOST { format!(" and {} more", channels.len() - MOST) } else { String::new() };
        format!("{}{more}", named.join("; "))
    }

    fn ends(&self, channel: usize, way: Way) -> String {
        self.locate(channel).map_or_else(String::new, |(path, index)| self.paths[path].describe(index, way))
    }

    /// The largest transfer of these segments that should be eager, in bytes.
    pub(crate) fn eager_bytes(&self, segments: &[Segment]) -> usize {
        let device = segments.iter().any(|s| s.place.is_device());
        match &self.copier {
            Some(copier) if device => copier.eager_bytes(),
            _ if device => 0,
            _ => usize::MAX,
        }
    }

    /// Appends the bytes of a small chunk to `out`.
    ///
    /// # Safety
    /// Its parts lie in registered regions that the caller holds.
    pub(crate) unsafe fn fetch(&mut self, chunk: &Chunk, out: &mut Vec<u8>) -> Result<()> {
        match &mut self.copier {
            // SAFETY: by the caller's contract.
            Some(copier) if chunk.place.is_device() => unsafe { copier.fetch(&chunk.parts, chunk.place, out) },
            _ if chunk.place.is_device() => bail!(Gpu, "device memory on a connection without a device"),
            _ => {
                for part in &chunk.parts {
                    // SAFETY: by the caller's contract.
                    out.extend_from_slice(unsafe { std::slice::from_raw_parts(part.addr as *const u8, part.len as usize) });
                }
                Ok(())
            }
        }
    }

    /// Writes bytes to a few pieces of one place.
    ///
    /// # Safety
    /// The parts lie in registered regions that the caller holds.
    pub(crate) unsafe fn store(&mut self, parts: &[Part], place: Place, bytes: &[u8]) -> Result<()> {
        let len: u64 = parts.iter().map(|part| part.len).sum();
        if bytes.len() as u64 != len {
            bail!(Internal, "{} bytes for pieces of {len} bytes", bytes.len());
        }
        match &mut self.copier {
            // SAFETY: by the caller's contract.
            Some(copier) if place.is_device() => unsafe { copier.store(bytes, parts, place) },
            _ if place.is_device() => bail!(Gpu, "device memory on a connection without a device"),
            _ => {
                // SAFETY: by the caller's contract; the parts hold as many bytes as there are.
                unsafe { spread(bytes.as_ptr(), parts) };
                Ok(())
            }
        }
    }

    /// Drops the registrations of a region that is no longer used.
    pub(crate) fn forget_region(&mut self, id: u64) {
        self.direct.iter_mut().for_each(|direct| direct.forget(id));
        self.paths.iter_mut().for_each(|p| p.forget_region(id));
    }

    /// Allocates and registers everything that copies and chunks of `place` need.
    pub(crate) fn ready(&mut self, place: Place) -> Result<()> {
        self.direct.iter_mut().try_for_each(|direct| direct.ready(place))?;
        self.paths.iter_mut().try_for_each(|p| p.ready(place, &mut self.copier))
    }

    /// Ends all copies and closes all channels. Nothing touches registered memory for this connection afterwards. If a GPU does
    /// not end its copies, channels and regions are leaked until the process ends.
    pub(crate) fn close(&mut self) {
        if let Some(Err(e)) = self.copier.as_mut().map(|copier| copier.quiesce()) {
            log::error!("GPU copies have not ended, so the connection's channels stay open and its regions in use: {e}");
            std::mem::forget((std::mem::take(&mut self.paths), self.copier.take()));
        }
        self.direct = None;
        self.paths.clear();
        self.first.clear();
        self.copier = None;
    }
}

/// The likely cause where no packet of full size has passed.
fn size_text(packet: Option<u32>) -> String {
    packet.map_or_else(String::new, |bytes| format!(" (no packet of {bytes} bytes has passed yet: MTU?)"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::path::{Dest, Line};
    use crate::channel::stripe::Load;
    use crate::region::Hold;
    use crate::status::ErrorKind;
    use crate::types::Key;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::Arc;

    /// The calls that a stub path received, shared with the test.
    #[derive(Default)]
    struct Asked {
        submitted: AtomicU64,
        expected: AtomicU64,
        forgotten: AtomicU64,
        dropped: AtomicU64,
    }

    /// A path that moves nothing.
    struct StubPath {
        channels: usize,
        device: bool,
        full: bool,
        lost: bool,
        bytes: Option<(u64, u64)>,
        happens: Vec<Event>,
        asked: Arc<Asked>,
    }

    impl Path for StubPath {
        fn channels(&self) -> usize {
            self.channels
        }
        fn limits(&self, total: u64) -> ChunkLimits {
            ChunkLimits { bytes: (100 * self.channels).min(total as usize), pieces: 1, crossed: 1 }
        }
        fn carries(&self, local: Place, peer: Place) -> Carries {
            Carries::of(!self.device || (local.is_device() && peer.is_device()), !self.lost)
        }
        fn loads(&mut self, _place: Place, bulk: bool, _now: Instant, out: &mut Loads) {
            // The last channel is free; large transfers do not use it.
            let free = |i| usize::from(i + 1 == self.channels && !self.full && !bulk);
            out.channels.extend((0..self.channels).map(|i| Load { free: free(i), queued: 0, rate: 0.0, nic: 0 }));
        }
        fn submit(&mut self, channel: usize, _departure: Departure, _copier: &mut Copier, _now: Instant) -> Result<()> {
            self.asked.submitted.store(channel as u64 + 1, Ordering::Relaxed);
            Ok(())
        }
        fn expect(&mut self, channel: usize, arrival: Arrival) -> Result<()> {
            if matches!(&arrival.dest, Dest::Memory { place, .. } if self.device && !place.is_device()) {
                bail!(Protocol, "not here");
            }
            self.asked.expected.store(channel as u64 + 1, Ordering::Relaxed);
            Ok(())
        }
        fn progress(&mut self, _copier: &mut Copier, _now: Instant, events: &mut Vec<Event>) -> Result<bool> {
            events.append(&mut self.happens);
            Ok(true)
        }
        fn busy(&self) -> bool {
            !self.happens.is_empty()
        }
        fn change(&mut self, _channel: usize, _change: Change) -> Result<()> {
            Ok(())
        }
        fn network(&mut self, each: &mut dyn FnMut(Line<'_>)) -> Result<()> {
            for channel in 0..self.channels {
                let moved = self.bytes.map(|bytes| if channel == 0 { bytes } else { (0, 0) });
                each(Line {
                    local: None,
                    nic: "stub",
                    moved,
                    arrived: 0,
                    outbound: Outbound::default(),
                    under_way: (1, 1),
                    posted: 1,
                    open: true,
                });
            }
            Ok(())
        }
        fn stats(&self, _kernel: bool, _now: Instant, out: &mut Vec<ChannelStats>) {
            out.extend((0..self.channels).map(|_| ChannelStats::default()));
        }
        fn describe(&self, channel: usize, _way: Way) -> String {
            format!("{}{channel}", if self.device { "d" } else { "h" })
        }
        fn forget_region(&mut self, id: u64) {
            self.asked.forgotten.store(id, Ordering::Relaxed);
        }
    }

    impl Drop for StubPath {
        fn drop(&mut self) {
            self.asked.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    const KEY: Key = Key { id: 1, mine: true };

    fn stub(device: bool, channels: usize) -> (Box<StubPath>, Arc<Asked>) {
        let asked = Arc::new(Asked::default());
        let path = StubPath {
            channels,
            device,
            full: false,
            lost: false,
            bytes: Some((1, 2)),
            happens: Vec::new(),
            asked: asked.clone(),
        };
        (Box::new(path), asked)
    }

    fn departure(len: usize) -> Departure {
        let chunk = Chunk { parts: Vec::new(), len, place: Place::HOST, peer: Place::HOST };
        Departure { key: KEY, chunk, hold: Hold::new(Vec::new()), bulk: false, tag: 0 }
    }

    fn arrival(place: Place) -> Arrival {
        Arrival { key: KEY, len: 1, tag: 0, dest: Dest::Memory { place, parts: Vec::new(), hold: Hold::new(Vec::new()) } }
    }

    #[test]
    fn the_first_path_that_carries_a_pair_takes_it_and_channels_are_numbered_over_all() {
        let ((device, d), (host, h)) = (stub(true, 3), stub(false, 2));
        let mut channels = Channels::new(None, vec![device, host], None);
        let (gpu, now, want) = (Place::gpu(0), Instant::now(), Want { len: 1, rest: 1, total: 1 });
        assert_eq!((channels.route(gpu, gpu), channels.route(gpu, Place::HOST)), (Some(0), Some(1)));
        assert_eq!((channels.routes(), channels.count()), (2, 5));
        assert_eq!([0, 1, 2].map(|route| channels.cut(route, 1 << 20).bytes), [300, 200, 0]);
        assert_eq!(
            [2, 3, 4, 5].map(|channel| channels.limits(channel).map(|l| l.bytes)),
            [Some(300), Some(200), Some(200), None]
        );
        assert_eq!([0, 1, 2].map(|route| channels.pick(route, gpu, want, false, now)), [Some((2, 1)), Some((4, 1)), None]);
        assert_eq!(channels.pick(0, gpu, want, true, now), None, "no room for large transfers");
        channels.submit(4, departure(10), now).unwrap();
        channels.submit(2, departure(5), now).unwrap();
        assert_eq!((d.submitted.load(Ordering::Relaxed), h.submitted.load(Ordering::Relaxed)), (3, 2));
        assert_eq!(channels.totals(), Totals { submitted: 15, sent: 0, received: 0, ..Totals::default() });
        assert!(channels.submit(5, departure(1), now).is_err());
        channels.expect(0, arrival(gpu)).unwrap();
        channels.expect(3, arrival(Place::HOST)).unwrap();
        assert_eq!((d.expected.load(Ordering::Relaxed), h.expected.load(Ordering::Relaxed)), (1, 1));
        for (channel, place) in [(0, Place::HOST), (5, gpu)] {
            assert_eq!(channels.expect(channel, arrival(place)).unwrap_err().kind(), ErrorKind::Protocol);
        }
        channels.forget_region(77);
        assert_eq!((d.forgotten.load(Ordering::Relaxed), h.forgotten.load(Ordering::Relaxed)), (77, 77));
        channels.look(now).unwrap();
        let text = channels.describe_busy(Way::Out, now + Duration::from_secs(2));
        assert!(
            text.starts_with("channel 0: 1 chunks out on d0, stalled for 2.0s; channel 1: ") && text.ends_with(" and 1 more"),
            "{text}"
        );
        let later = now + Duration::from_secs(11);
        assert_eq!(channels.dead_nic(Duration::from_secs(11), later), None);
        let dead = channels.dead_nic(Duration::from_secs(10), later).expect("nothing moves");
        assert!(dead.starts_with("nothing has arrived over stub for 11.0s; in flight: channel 0: 1 chunks in on d0"), "{dead}");
        channels.close();
        assert_eq!((d.dropped.load(Ordering::Relaxed), h.dropped.load(Ordering::Relaxed), channels.routes()), (1, 1, 0));
    }

    #[test]
    fn chunks_wait_for_a_path_whose_channels_are_lost_if_no_other_carries_them() {
        let (gpu, host) = (Place::gpu(0), Place::HOST);
        let routes = |device_lost, host_lost| {
            let ((mut device, _), (mut general, _)) = (stub(true, 1), stub(false, 1));
            (device.lost, general.lost) = (device_lost, host_lost);
            let channels = Channels::new(None, vec![device, general], None);
            (channels.route(gpu, gpu), channels.route(gpu, host))
        };
        assert_eq!(routes(true, false), (Some(1), Some(1)));
        assert_eq!(routes(false, true), (Some(0), Some(1)));
        assert_eq!(routes(true, true), (Some(0), Some(1)));
        assert_eq!(Channels::new(None, vec![stub(true, 1).0], None).route(gpu, host), None);
        let channels = Channels::new(None, vec![stub(true, 1).0], None);
        assert_eq!(channels.unreachable([(gpu, gpu); 3]), None);
        assert_eq!(channels.unreachable([(gpu, gpu), (gpu, gpu), (host, gpu), (gpu, gpu), (gpu, host)]), Some((host, gpu)));
        assert_eq!(channels.unreachable([(gpu, host); 3]), Some((gpu, host)));
    }

    #[test]
    fn progress_is_counted() {
        let ((mut device, _), (mut host, _)) = (stub(true, 1), stub(false, 1));
        device.happens = vec![Event::Sent(0, KEY, 7), Event::Received(0, KEY, 11)];
        host.happens = vec![Event::Received(0, KEY, 100)];
        let (device_bytes, host_bytes) = (Some((10, 20)), Some((1, 2)));
        (device.bytes, host.bytes) = (device_bytes, host_bytes);
        let mut channels = Channels::new(None, vec![device, host], None);
        assert!(channels.busy());
        let mut events = Vec::new();
        assert!(channels.progress(Instant::now(), &mut events).unwrap());
        assert_eq!((events.len(), channels.busy()), (3, false));
        assert_eq!(channels.totals(), Totals { submitted: 0, sent: 7, received: 111, ..Totals::default() });
        assert_eq!(channels.look(Instant::now()).unwrap(), (11, 22));
        // If one plugin does not report bytes, only whole chunks count.
        let (mut silent, _) = stub(false, 1);
        (silent.bytes, silent.happens) = (None, vec![Event::Sent(0, KEY, 3)]);
        let mut channels = Channels::new(None, vec![stub(true, 1).0, silent], None);
        channels.progress(Instant::now(), &mut Vec::new()).unwrap();
        assert_eq!(channels.look(Instant::now()).unwrap(), (3, 0));
    }

    #[test]
    fn without_a_copier_only_host_memory_is_eager() {
        let mut channels = Channels::new(None, Vec::new(), None);
        let eager = |place| {
            let segment = Segment { addr: 1, len: 1, region: 0, place, peer: Place::HOST };
            channels.eager_bytes(&[segment])
        };
        assert_eq!((eager(Place::HOST), eager(Place::gpu(0))), (usize::MAX, 0));
        assert!(!channels.copies_pending());
        let mut memory = *b"0123456789";
        let part = |at: usize, len| crate::types::Part { addr: memory.as_ptr() as u64 + at as u64, len, region: 0 };
        let parts = vec![part(2, 3), part(7, 1)];
        let chunk = |place| Chunk { parts: parts.clone(), len: 4, place, peer: Place::HOST };
        let mut out = Vec::new();
        // SAFETY: memory of this test.
        unsafe {
            channels.fetch(&chunk(Place::HOST), &mut out).unwrap();
            channels.store(&chunk(Place::HOST).parts, Place::HOST, b"abcd").unwrap();
            assert!(channels.store(&chunk(Place::HOST).parts, Place::HOST, b"abc").is_err());
            assert!(channels.fetch(&chunk(Place::gpu(0)), &mut out).is_err());
            assert!(channels.store(&chunk(Place::gpu(0)).parts, Place::gpu(0), b"abcd").is_err());
        }
        assert_eq!(out, b"2347");
        assert_eq!(std::hint::black_box(&mut memory), b"01abc56d89");
        channels.flush().unwrap();
    }
}
