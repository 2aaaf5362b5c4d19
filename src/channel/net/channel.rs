//! One channel: a send comm and a receive comm with their queues. Chunks are sent in the order they were announced; receives are posted,
//! unpacked and consumed in the order of the peer's announcements. Every chunk holds its regions until it is done
//! or the channel is closed. Knows nothing of transfers.

use super::staging::{Staging, STAGED_WINDOW};
use super::Usage;
use crate::channel::device::{DeviceCopier, StagingMemory, Ticket, View};
use crate::channel::memory::HostBlock;
use crate::channel::path::{Arrival, Copier, Line};
use crate::channel::stripe::{Load, Rate};
use crate::direct::{Event, Way};
use crate::net::comm::{Doorbell, MHandle, RecvComm, SendComm};
use crate::net::registrations::Registration;
use crate::net::signals::Quiet;
use crate::region::Hold;
use crate::stats::{ChannelStats, Network};
use crate::status::{bail, Error, Result};
use crate::types::{Key, Part, Place};
use nccl_net_abi::{ucclCommInfo, ucclIoVec, MAX_REQUESTS};
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

/// The copier, which chunks of device memory need.
pub(super) fn device(copier: &mut Copier) -> Result<&mut dyn DeviceCopier> {
    match copier {
        Some(copier) => Ok(&mut **copier),
        None => bail!(Gpu, "a chunk of device memory on a connection without a device"),
    }
}

/// Runs a plugin call with the GPU of `place` current.
pub(super) fn within(copier: &mut Copier, place: Place, body: &mut dyn FnMut() -> Result<bool>) -> Result<bool> {
    if place.is_device() {
        device(copier)?.within(place, body)
    } else {
        body()
    }
}

/// Registers memory with the GPU of `place` current.
pub(super) fn register<R>(copier: &mut Copier, place: Place, mut register: impl FnMut() -> Result<R>) -> Result<R> {
    let mut registered = None;
    within(copier, place, &mut || {
        registered = Some(register()?);
        Ok(true)
    })?;
    registered.ok_or_else(|| crate::status::err!(Internal, "the registration did not run"))
}

/// Most window slots for chunks of large transfers, so that small ones find a slot soon.
const BULK_WINDOW: usize = MAX_REQUESTS / 2;
/// At this many bytes of large transfers a channel takes no more of them: a small one on the same channel waits for all of them.
const BULK_BYTES: u64 = 2 << 20;

/// How many free window slots the next chunk may use. `bulk`: for a chunk of a large transfer, the chunks and bytes of large
/// transfers in flight.
fn free(free: usize, bulk: Option<(usize, u64)>) -> usize {
    match bulk {
        None => free,
        Some((_, bytes)) if bytes >= BULK_BYTES => 0,
        // Slots of small transfers do not count against large ones, which would otherwise starve.
        Some((chunks, _)) => free.min(BULK_WINDOW.saturating_sub(chunks)),
    }
}

/// A chunk being sent; dropped when its memory may change.
pub(super) struct Leaving {
    pub key: Key,
    pub len: usize,
    pub bulk: bool,
    pub _hold: Hold,
}

/// A chunk announced and not yet taken by the plugin.
pub(super) struct ToPost {
    pub source: Source,
    pub len: usize,
    pub tag: i32,
}

pub(super) enum Source {
    Contiguous { data: *mut u8, mhandle: MHandle, packing: Copying, place: Place },
    Vectored(Vec<ucclIoVec>),
}

/// A receive that is posted.
pub(super) struct Posted {
    pub arrival: Arrival,
    /// Staging buffer of a host receive without the extension.
    pub staged: Option<*mut u8>,
}

/// A chunk that has arrived but is not yet in place.
pub(super) struct Finishing {
    pub arrival: Arrival,
    pub copying: Copying,
}

/// A copy by the device, if one is needed.
pub(super) struct Copying {
    ticket: Ticket,
    /// When it was submitted; none once its time was counted.
    since: Option<Instant>,
}

impl Copying {
    /// No copy is needed.
    pub(super) fn none() -> Copying {
        Copying { ticket: Ticket::Done, since: None }
    }

    /// The device job.
    pub(super) fn begin(hand_over: impl FnOnce() -> Result<Ticket>) -> Result<Copying> {
        let since = Some(Instant::now());
        Ok(Copying { ticket: hand_over()?, since })
    }

    /// Whether it is complete; its time is then added to `spent`.
    pub(super) fn over(&mut self, copier: &mut Copier, spent: &mut Duration) -> Result<bool> {
        if self.ticket != Ticket::Done && !device(copier)?.poll(self.ticket)? {
            return Ok(false);
        }
        self.ticket = Ticket::Done;
        *spent += self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
        Ok(true)
    }
}

/// One channel.
pub(crate) struct Channel {
    // Field order is drop order: each comm closes before the memory of its requests is freed. The receive comm comes last: the
    // registrations of sends are dropped through it.
    pub(super) send: SendComm,
    pub(super) host_out: Option<Staging>,
    pub(super) device_out: HashMap<Place, Staging>,
    pub(super) outgoing: VecDeque<Leaving>,
    pub(super) to_post: VecDeque<ToPost>,
    pub(super) queued: u64,
    /// Chunks of large transfers among the outgoing ones.
    pub(super) bulk: usize,
    pub(super) bulk_bytes: u64,
    pub(super) rate: Rate,
    pub(super) recv: RecvComm,
    pub(super) expected: VecDeque<Arrival>,
    pub(super) posted: VecDeque<Posted>,
    pub(super) finishing: VecDeque<Finishing>,
    pub(super) view: Option<View>,
    pub(super) host_in: Option<Staging>,
    pub(super) device_in: Option<(Registration, Box<dyn StagingMemory>)>,
    pub(super) discard: Option<HostBlock>,
    /// The names of its NICs, here and at the peer, and its counters, for statistics.
    nic: String,
    peer_nic: String,
    pub(super) counts: Counts,
}

/// A channel's counters.
#[derive(Clone, Copy, Default)]
pub(super) struct Counts {
    pub sent_bytes: u64,
    pub sent_chunks: u64,
    pub received_bytes: u64,
    pub received_chunks: u64,
    pub packed: u64,
    pub unpacked: u64,
    pub packing: Duration,
    pub unpacking: Duration,
}
// SAFETY: raw pointers inside point to memory that this channel or a held region owns; a channel is used by one thread at a time.
unsafe impl Send for Channel {}

impl Channel {
    pub(crate) fn new(send: SendComm, recv: RecvComm, nic: String, peer_nic: String) -> Channel {
        Channel {
            send,
            recv,
            outgoing: VecDeque::new(),
            to_post: VecDeque::new(),
            queued: 0,
            bulk: 0,
            bulk_bytes: 0,
            rate: Rate::default(),
            expected: VecDeque::new(),
            posted: VecDeque::new(),
            finishing: VecDeque::new(),
            view: None,
            host_out: None,
            device_out: HashMap::new(),
            host_in: None,
            device_in: None,
            discard: None,
            nic,
            peer_nic,
            counts: Counts::default(),
        }
    }

    /// Sets a doorbell; `false` when the plugin has none and must be polled.
    pub(crate) fn set_doorbell(&self, doorbell: &Doorbell) -> Result<bool> {
        Ok(self.send.set_doorbell(doorbell)? && self.recv.set_doorbell(doorbell)?)
    }

    /// See [`SendComm::quiet`].
    pub(super) fn quiet(&self) -> Option<Quiet> {
        self.send.quiet()
    }

    /// Whether chunks are announced, in flight or expected.
    pub(super) fn busy(&self) -> bool {
        !self.outgoing.is_empty() || !self.expected.is_empty() || !self.posted.is_empty() || !self.finishing.is_empty()
    }

    /// Its NIC here and the peer's: channels of one pair are measured together.
    pub(super) fn nics(&self) -> (&str, &str) {
        (&self.nic, &self.peer_nic)
    }

    /// Bytes that the peer has acknowledged, bytes still in flight, and the round trip, as far as the plugin reports them; `None`
    /// when it cannot now.
    pub(super) fn flow(&self) -> Option<(u64, u64, Duration)> {
        match self.send.flow() {
            Some(flow) if flow.stale != 0 => None,
            Some(flow) => Some((flow.acknowledged, self.queued + flow.waiting, Duration::from_micros(flow.min_rtt_us.into()))),
            None => Some((self.counts.sent_bytes, self.queued, Duration::ZERO)),
        }
    }

    /// For a chunk from `place`; `nic`: the number of its NIC.
    pub(super) fn load(&self, place: Place, bulk: bool, usage: &Usage, nic: usize, now: Instant) -> Load {
        let oldest = self.outgoing.front().map_or(0, |o| o.len as u64);
        let window = if place.is_device() && usage.stage_sends { STAGED_WINDOW } else { MAX_REQUESTS };
        let free = free(window.saturating_sub(self.outgoing.len()), bulk.then_some((self.bulk, self.bulk_bytes)));
        Load { free, queued: self.queued, rate: self.rate.get(oldest, now), nic }
    }

    /// See `Path::ready`.
    pub(super) fn ready(&mut self, place: Place, copier: &mut Copier, usage: &Usage) -> Result<()> {
        self.device_out(place, copier, usage)?;
        self.device_in(place, copier)?;
        self.view(copier, place)?;
        Ok(())
    }

    /// The peer announced a chunk on this channel.
    pub(super) fn expect(&mut self, arrival: Arrival) {
        self.expected.push_back(arrival);
    }

    /// Advances sends and receives. Returns whether anything advanced.
    pub(super) fn progress(&mut self, copier: &mut Copier, usage: &Usage, now: Instant, events: &mut Vec<Event>) -> Result<bool> {
        let mut any = false;
        if !self.outgoing.is_empty() {
            any |= self.progress_sends(copier, now, events).map_err(|e| self.blame(Way::Out, &e))?;
        }
        if !self.expected.is_empty() || !self.posted.is_empty() || !self.finishing.is_empty() {
            any |= self.progress_receives(copier, usage, events).map_err(|e| self.blame(Way::In, &e))?;
        }
        Ok(any)
    }

    /// The network's progress.
    pub(super) fn network(&self) -> Result<Line<'_>> {
        let sent = self.send.network_bytes().map_err(|e| self.blame(Way::Out, &e))?;
        let received = self.recv.network_bytes().map_err(|e| self.blame(Way::In, &e))?;
        let incoming = self.expected.len() + self.posted.len() + self.finishing.len();
        let under_way = (self.outgoing.len(), incoming);
        Ok(Line { nic: &self.nic, moved: sent.zip(received), under_way, posted: self.posted.len() })
    }

    /// Its statistics; `kernel`: with the kernel's, which takes a system call.
    pub(super) fn stats(&self, kernel: bool, now: Instant) -> ChannelStats {
        let Counts { sent_bytes, sent_chunks, received_bytes, received_chunks, packed, unpacked, packing, unpacking } =
            self.counts;
        let oldest = self.outgoing.front().map_or(0, |o| o.len as u64);
        let network = if kernel { self.send.info().map(network) } else { None };
        // Sends end when the kernel has them: the peer's acknowledgements show the speed of the network.
        let delivered = network.as_ref().map(|n| n.delivery_rate as f64).filter(|&rate| rate > 0.0 && sent_bytes > 0);
        ChannelStats {
            nic: self.nic.clone(),
            route: if kernel { self.describe(Way::Out) } else { String::new() },
            sent_bytes,
            sent_chunks,
            received_bytes,
            received_chunks,
            speed: delivered.unwrap_or_else(|| self.rate.last(oldest, now)),
            queued_bytes: self.queued,
            window_out: self.outgoing.len() as u32,
            window_in: (self.expected.len() + self.posted.len() + self.finishing.len()) as u32,
            window: MAX_REQUESTS as u32,
            packed_chunks: packed,
            unpacked_chunks: unpacked,
            pack_us: packing.as_micros() as u64,
            unpack_us: unpacking.as_micros() as u64,
            network,
            ..ChannelStats::default()
        }
    }

    /// Its addresses in a direction and its NIC, as text.
    pub(super) fn describe(&self, way: Way) -> String {
        self.ends(way).unwrap_or_else(|| format!("NIC {}", self.nic))
    }

    fn ends(&self, way: Way) -> Option<String> {
        match way {
            Way::Out => self.send.describe(),
            Way::In => self.recv.describe(),
        }
    }

    /// An error with the channel's description.
    pub(super) fn blame(&self, way: Way, error: &Error) -> Error {
        let ends = self.ends(way).unwrap_or_else(|| format!("on NIC {}", self.nic));
        Error::new(error.kind(), format_args!("channel {ends}: {error}"))
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // Registrations are dropped while their comm is open, unless its requests may still use them: then after it.
        if !self.busy() {
            (self.host_out, self.host_in, self.device_in) = (None, None, None);
            self.device_out.clear();
        }
    }
}

fn network(info: ucclCommInfo) -> Network {
    let name: Vec<u8> = info.congestion.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
    Network {
        segments: info.segments,
        retransmits: info.retransmits,
        rtt_us: info.rtt_us,
        min_rtt_us: info.min_rtt_us,
        delivery_rate: info.delivery_rate,
        congestion: String::from_utf8_lossy(&name).into_owned(),
    }
}

pub(super) fn iov(parts: &[Part]) -> Vec<ucclIoVec> {
    parts.iter().map(|p| ucclIoVec { base: p.addr as *mut _, len: p.len as usize }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many chunks of large transfers a channel takes, and the bytes that a small one then waits for.
    fn taken(len: u64) -> (usize, u64) {
        let mut chunks = 0;
        while free(MAX_REQUESTS - chunks, Some((chunks, chunks as u64 * len))) > 0 {
            chunks += 1;
        }
        (chunks, chunks as u64 * len)
    }

    #[test]
    fn large_transfers_leave_room_for_small_ones() {
        // Bytes limit large chunks, slots limit smaller ones.
        assert_eq!(taken(512 << 10), (4, BULK_BYTES));
        assert_eq!(taken(1 << 20), (2, BULK_BYTES));
        assert_eq!(taken(4 << 20), (1, 4 << 20));
        assert_eq!(taken(64 << 10), (BULK_WINDOW, 512 << 10));
        // One byte less, and the channel takes another chunk.
        assert_eq!(free(5, Some((1, BULK_BYTES - 1))), 5);
        assert_eq!(free(5, Some((1, BULK_BYTES))), 0);
    }

    #[test]
    fn small_transfers_do_not_count_against_large_ones() {
        for places in 0..=MAX_REQUESTS {
            assert_eq!(free(places, None), places);
            // Small chunks in the window take only their own slots.
            assert_eq!(free(places, Some((0, 0))), places.min(BULK_WINDOW));
            assert_eq!(free(places, Some((BULK_WINDOW, 1))), 0);
        }
    }
}
