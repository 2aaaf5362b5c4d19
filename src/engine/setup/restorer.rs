//! When lost channels are set up again: soon after a loss, then less and less often, at once when an interface comes back. A control
//! connection that has failed is made again first, and at once. Dials the peer; what follows is an ordinary set-up. Knows nothing about epoll.

use super::context::SetupContext;
use super::dial;
use super::driver::SetupDriver;
use super::machine::{Setup, JOINED};
use crate::engine::connection::Begun;
use crate::engine::progress::restoring::LostChannel;
use crate::net::topology::has_carrier;
use crate::status::{bail, err, Result};
use socket2::Socket;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// The pause before the first attempt, and the longest while attempts fail.
const FIRST: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_secs(2);
/// A channel that is lost again so soon after it came back costs transfers each time: pauses grow, up to the longest above. Where nothing
/// of what was announced on it has arrived, its NIC lets set-ups pass and nothing else: they go on to grow up to this, slowly, since nothing
/// tells when a link of the peer is back.
const SHORT_LIFE: Duration = Duration::from_secs(10);
const LONGEST_OF_USELESS: Duration = Duration::from_secs(60);
/// How soon an attempt follows the return of an interface: addresses come a little after the link.
const SOON: Duration = Duration::from_millis(50);
/// How long a dial may take, and one for a control connection, which has other addresses.
const DIAL: Duration = Duration::from_secs(2);
const NEXT: Duration = Duration::from_millis(500);

/// The attempts for one connection.
#[derive(Debug, Default)]
struct Backoff {
    /// The pause before the next attempt, and that before the first one since the last loss.
    pause: Duration,
    first: Duration,
    /// When the next one is due; `None` while one is under way or none is needed.
    due: Option<Instant>,
    /// One is under way.
    trying: bool,
    /// Channels were lost during it.
    asked: bool,
    /// Channels that are lost, each with the pause that its last loss took.
    lost: BTreeMap<u16, Duration>,
    /// Channels that came back, when, and that pause.
    back: BTreeMap<u16, (Instant, Duration)>,
}

impl Backoff {
    /// These channels are lost now. The pause before an attempt for those that were not before: the shortest, since a channel that does not
    /// stay must not keep another one waiting.
    fn lost(&mut self, channels: &[LostChannel], now: Instant) -> Option<Duration> {
        let before = std::mem::take(&mut self.lost);
        let mut shortest: Option<Duration> = None;
        for &LostChannel { channel, useless } in channels {
            let pause = before.get(&channel).copied().unwrap_or_else(|| {
                let pause = match self.back.remove(&channel) {
                    Some((at, last)) if now.saturating_duration_since(at) < SHORT_LIFE.max(2 * last) => longer(last, useless),
                    _ => FIRST,
                };
                shortest = Some(shortest.map_or(pause, |other| other.min(pause)));
                pause
            });
            self.lost.insert(channel, pause);
        }
        shortest
    }
}

/// A dial that is under way.
struct Dial {
    connection: u64,
    socket: Socket,
    address: SocketAddr,
    purpose: Purpose,
    until: Instant,
}

enum Purpose {
    Channels(Begun),
    /// The control connection. `rest`: the addresses to dial if this one does not answer; `refused`: all that were dialled have refused.
    Control {
        rest: VecDeque<SocketAddr>,
        refused: bool,
    },
}

/// What follows from a dial that has ended.
pub(super) enum Answer {
    /// The set-up of a connection, or why there is none.
    SetUp(u64, Result<Box<SetupDriver>>),
    /// Another dial under the same number: the socket to wait for.
    Dials(RawFd),
}

/// The attempts of an engine.
#[derive(Default)]
pub(super) struct Restorer {
    connections: HashMap<u64, Backoff>,
    due: BTreeSet<(Instant, u64)>,
    /// By the caller's number.
    dials: BTreeMap<u64, Dial>,
}

/// The pause after a loss that followed one with this pause too soon.
fn longer(last: Duration, useless: bool) -> Duration {
    match useless {
        true if last >= LONGEST => (last * 5 / 4).min(LONGEST_OF_USELESS),
        _ => (2 * last).min(LONGEST),
    }
}

/// A time of about this length: engines whose connections were lost together do not come together.
fn about(time: Duration) -> Duration {
    let mut random = [0; 4];
    let _ = getrandom::fill(&mut random);
    time.mul_f64(0.75 + 0.5 * f64::from(u32::from_le_bytes(random)) / f64::from(u32::MAX))
}

impl Restorer {
    /// When to call [`Restorer::next`] or [`Restorer::late`].
    pub(super) fn wake_at(&self) -> Option<Instant> {
        let due = self.due.first().map(|(at, _)| *at);
        self.dials.values().map(|dial| dial.until).chain(due).min()
    }

    /// A connection has lost channels: those that are lost now.
    pub(super) fn lost(&mut self, id: u64, channels: &[LostChannel], now: Instant) {
        let young = |(at, _): &(Instant, Duration)| now.saturating_duration_since(*at) < LONGEST_OF_USELESS;
        self.connections.retain(|_, b| b.due.is_some() || b.trying || b.back.values().any(young));
        let backoff = self.connections.entry(id).or_default();
        let pause = backoff.lost(channels, now);
        if backoff.trying {
            backoff.asked = true;
            return;
        }
        let at = now + about(pause.unwrap_or(FIRST));
        if backoff.due.is_some_and(|due| pause.is_none() || due <= at) {
            return;
        }
        backoff.first = pause.unwrap_or(FIRST);
        backoff.pause = backoff.first;
        self.plan(id, at);
    }

    /// The control connection of a connection has failed.
    pub(super) fn suspended(&mut self, id: u64, now: Instant) {
        let backoff = self.connections.entry(id).or_default();
        // It goes before an attempt that is under way.
        backoff.asked |= backoff.trying;
        self.plan(id, now);
    }

    fn plan(&mut self, id: u64, at: Instant) {
        let Some(backoff) = self.connections.get_mut(&id) else { return };
        backoff.trying = false;
        backoff.due.replace(at).map(|old| self.due.remove(&(old, id)));
        self.due.insert((at, id));
    }

    /// An interface has come back.
    pub(super) fn retry_now(&mut self, now: Instant) {
        let waiting: Vec<(Instant, u64)> = self.due.iter().copied().collect();
        for (at, id) in waiting {
            self.plan(id, at.min(now + about(SOON)));
            // Its address, or the peer's end, may come a little later still.
            self.connections.get_mut(&id).filter(|b| b.pause <= LONGEST).into_iter().for_each(|b| b.pause = FIRST);
        }
        // What is under way may have begun too early.
        self.connections.values_mut().filter(|backoff| backoff.trying).for_each(|backoff| backoff.asked = true);
    }

    /// The next connection whose attempt is due.
    pub(super) fn next(&mut self, now: Instant) -> Option<u64> {
        let &(at, id) = self.due.first().filter(|(at, _)| *at <= now)?;
        self.due.remove(&(at, id));
        let backoff = self.connections.get_mut(&id)?;
        (backoff.due, backoff.trying, backoff.asked) = (None, true, false);
        Some(id)
    }

    /// An attempt has brought channels up. `still`: those that are lost now.
    pub(super) fn restored(&mut self, id: u64, still: &[u16], now: Instant) {
        let Some(backoff) = self.connections.get_mut(&id) else { return };
        let (lost, back) = std::mem::take(&mut backoff.lost).into_iter().partition(|(channel, _)| still.contains(channel));
        let back: BTreeMap<u16, Duration> = back;
        backoff.lost = lost;
        backoff.back.extend(back.into_iter().map(|(channel, pause)| (channel, (now, pause))));
        match !backoff.lost.is_empty() || backoff.asked {
            true => self.ended(id, now),
            false => self.rests(id),
        }
    }

    /// An attempt has ended.
    pub(super) fn ended(&mut self, id: u64, now: Instant) {
        let Some(backoff) = self.connections.get_mut(&id) else { return };
        // With a longest pause that is longer already it stays.
        let longest = LONGEST.max(backoff.first);
        let pause = backoff.pause.max(FIRST);
        backoff.pause = (2 * pause).min(longest);
        let at = if backoff.asked { about(SOON) } else { about(pause) };
        self.plan(id, now + at);
    }

    /// A connection needs no more attempts at present.
    pub(super) fn rests(&mut self, id: u64) {
        if let Some(backoff) = self.connections.get_mut(&id) {
            backoff.trying = false;
            if backoff.back.is_empty() {
                self.connections.remove(&id);
            }
        }
    }

    /// Begins an attempt: dials the peer, for its control connection or else for the channels whose NIC can be used here. Returns the socket
    /// to wait for under `number`; `None` when nothing is lost.
    ///
    /// # Errors
    /// Why there is nothing to try now.
    pub(super) fn dial(&mut self, context: &SetupContext, id: u64, number: u64, now: Instant) -> Result<Option<RawFd>> {
        let Some(connection) = context.table.connections.get(id) else { return Ok(None) };
        let Some(lineage) = connection.lineage().filter(|_| connection.is_up()) else { return Ok(None) };
        if connection.restorer().is_suspended() {
            let dials = |dial: &Dial| dial.connection == id && matches!(dial.purpose, Purpose::Control { .. });
            if lineage.is_moving() || self.dials.values().any(dials) {
                bail!(Resource, "the control connection is being made again");
            }
            return self.dial_next(id, number, (lineage.elsewhere().into(), true), now).map(Some);
        }
        let lost = connection.restorer().lost()?;
        if lost.is_empty() {
            return Ok(None);
        }
        if self.dials.len() >= context.limits.outgoing {
            bail!(Resource, "too many set-ups are in progress");
        }
        let mut usable = Vec::new();
        for (number, members) in lineage.sets.iter().enumerate() {
            let wanted: Vec<_> = lost.iter().filter(|seat| seat.set == number).collect();
            if wanted.is_empty() {
                continue;
            }
            let devices = members.plan.plugin.current_devices()?;
            let there = |nic: &str| devices.iter().any(|device| device.name == nic) && has_carrier(Path::new("/"), nic);
            usable.extend(wanted.into_iter().filter(|seat| there(&members.nics[seat.index].0)));
        }
        if usable.is_empty() {
            bail!(Unreachable, "the NICs of the lost channels cannot be used here");
        }
        let begun = connection.restorer().begin(usable, None)?;
        let address = lineage.address();
        let socket = dial::begin(address)?;
        let fd = socket.as_raw_fd();
        self.dials.insert(number, Dial { connection: id, socket, address, purpose: Purpose::Channels(begun), until: now + DIAL });
        Ok(Some(fd))
    }

    /// Dials the next of these addresses for a control connection. `refused`: all before have refused.
    ///
    /// # Errors
    /// `NotFound` when all have refused; why none is left.
    fn dial_next(
        &mut self,
        id: u64,
        number: u64,
        (mut rest, mut refused): (VecDeque<SocketAddr>, bool),
        now: Instant,
    ) -> Result<RawFd> {
        let mut last = err!(NotFound, "no engine listens at the addresses of the peer now");
        while let Some(address) = rest.pop_front() {
            match dial::begin(address) {
                Ok(socket) => {
                    let fd = socket.as_raw_fd();
                    let purpose = Purpose::Control { rest, refused };
                    self.dials.insert(number, Dial { connection: id, socket, address, purpose, until: now + NEXT });
                    return Ok(fd);
                }
                Err(e) => (last, refused) = (e, false),
            }
        }
        match refused {
            true => Err(last),
            false => Err(err!(Unreachable, "no address of the peer answers: {last}")),
        }
    }

    /// A dial that takes too long: its number.
    pub(super) fn late(&self, now: Instant) -> Option<u64> {
        self.dials.iter().find(|(_, dial)| dial.until <= now).map(|(&number, _)| number)
    }

    /// Whether a dial has this number.
    pub(super) fn dials(&self, number: u64) -> bool {
        self.dials.contains_key(&number)
    }

    /// Ends a dial whose socket is ready, or whose time is over. Returns its connection, and the socket for what it is for; or what follows.
    fn settle(
        &mut self,
        number: u64,
        now: Instant,
    ) -> Option<std::result::Result<(u64, TcpStream, SocketAddr, Purpose), Answer>> {
        let Dial { connection, socket, address, purpose, until } = self.dials.remove(&number)?;
        let late = || err!(TimedOut, "connect to {address}: no answer in time");
        let ended = if until <= now { Err(late()) } else { dial::end(socket, address) };
        Some(match (ended, purpose) {
            (Ok(sock), purpose) => Ok((connection, sock, address, purpose)),
            (Err(e), Purpose::Channels(_)) => Err(Answer::SetUp(connection, Err(e))),
            (Err(e), Purpose::Control { rest, refused }) => {
                log::debug!("connection {connection}: {e}");
                let next = self.dial_next(connection, number, (rest, refused && dial::is_refusal(&e)), now);
                Err(next.map_or_else(|e| Answer::SetUp(connection, Err(e)), Answer::Dials))
            }
        })
    }

    /// The socket of a dial is ready, or its time is over.
    pub(super) fn answered(&mut self, context: &SetupContext, number: u64, now: Instant) -> Option<Answer> {
        let (connection, sock, address, purpose) = match self.settle(number, now)? {
            Ok(settled) => settled,
            Err(answer) => return Some(answer),
        };
        let made = || -> Result<SetupDriver> {
            let deadline = now + JOINED;
            let begun = match purpose {
                Purpose::Channels(begun) => begun,
                Purpose::Control { .. } => match context.table.connections.get(connection) {
                    Some(connection) => connection.restorer().begin_move(None, None)?,
                    None => bail!(Canceled, "the connection has ended"),
                },
            };
            let setup = Setup::new(context.joining_link()?, now, deadline, deadline);
            Ok(SetupDriver::joining(sock, address, setup, connection, begun, now))
        };
        Some(Answer::SetUp(connection, made().map(Box::new)))
    }

    /// Ends all dials.
    pub(super) fn end(&mut self) {
        *self = Restorer::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::ErrorKind;
    use std::net::TcpListener;

    /// Channels that were lost, and nothing of what was announced on them has arrived.
    fn useless(channels: &[u16]) -> Vec<LostChannel> {
        channels.iter().map(|&channel| LostChannel { channel, useless: true }).collect()
    }

    /// The time until the next attempt.
    fn pause(restorer: &Restorer, now: Instant) -> Duration {
        restorer.wake_at().unwrap().saturating_duration_since(now)
    }

    #[test]
    fn attempts_follow_soon_then_less_often_and_at_once_when_an_interface_is_back() {
        let (mut restorer, mut now) = (Restorer::default(), Instant::now());
        restorer.lost(1, &useless(&[0]), now);
        let mut pauses = Vec::new();
        for _ in 0..8 {
            pauses.push(pause(&restorer, now));
            now = restorer.wake_at().unwrap();
            assert_eq!((restorer.next(now), restorer.next(now)), (Some(1), None));
            restorer.ended(1, now);
        }
        assert!(
            pauses[0] <= FIRST * 5 / 4 && pauses.iter().all(|&p| p <= LONGEST * 5 / 4) && pauses[7] >= LONGEST / 2,
            "{pauses:?}"
        );
        restorer.retry_now(now);
        assert!(pause(&restorer, now) <= 2 * SOON);
    }

    #[test]
    fn a_channel_that_does_not_stay_comes_back_less_and_less_often() {
        let (mut restorer, mut now) = (Restorer::default(), Instant::now());
        let (mut last, start) = (Duration::ZERO, now);
        for _ in 0..24 {
            restorer.lost(1, &useless(&[0]), now);
            last = pause(&restorer, now);
            assert!(
                now >= start + Duration::from_secs(20) || last < Duration::from_secs(4),
                "the peer's link may be back: {last:?}"
            );
            now = restorer.wake_at().unwrap();
            restorer.next(now);
            restorer.restored(1, &[], now);
            assert!(restorer.wake_at().is_none());
            now += Duration::from_secs(2);
        }
        assert!(last >= LONGEST_OF_USELESS / 2, "{last:?}");
        now += 4 * LONGEST_OF_USELESS;
        restorer.lost(1, &useless(&[0]), now);
        assert!(pause(&restorer, now) <= FIRST * 5 / 4, "it has stayed");
    }

    #[test]
    fn a_channel_that_carried_data_comes_back_soon_however_often_it_was_lost() {
        let (mut restorer, mut now) = (Restorer::default(), Instant::now());
        let mut pauses = Vec::new();
        for _ in 0..12 {
            restorer.lost(1, &[LostChannel { channel: 0, useless: false }], now);
            pauses.push(pause(&restorer, now));
            now = restorer.wake_at().unwrap();
            restorer.next(now);
            restorer.restored(1, &[], now);
            now += Duration::from_secs(2);
        }
        assert!(pauses[0] <= FIRST * 5 / 4 && pauses[11] >= LONGEST * 3 / 4, "{pauses:?}");
        assert!(pauses.iter().all(|&pause| pause <= LONGEST * 5 / 4), "{pauses:?}");
    }

    #[test]
    fn only_the_channel_that_does_not_stay_waits() {
        let (mut restorer, mut now) = (Restorer::default(), Instant::now());
        for _ in 0..6 {
            restorer.lost(1, &useless(&[0]), now);
            now = restorer.wake_at().unwrap();
            restorer.next(now);
            restorer.restored(1, &[], now);
        }
        restorer.lost(1, &useless(&[0]), now);
        assert!(pause(&restorer, now) >= 8 * FIRST);
        restorer.lost(1, &useless(&[0, 1]), now);
        assert!(pause(&restorer, now) <= FIRST * 5 / 4, "another channel is lost for the first time");
        now = restorer.wake_at().unwrap();
        restorer.next(now);
        restorer.restored(1, &[0], now);
        now = restorer.wake_at().unwrap();
        restorer.next(now);
        restorer.restored(1, &[], now);
        restorer.lost(1, &useless(&[2]), now);
        assert!(pause(&restorer, now) <= FIRST * 5 / 4, "others came back a moment ago");
        now = restorer.wake_at().unwrap();
        restorer.next(now);
        restorer.restored(1, &[], now);
        restorer.lost(1, &useless(&[2]), now);
        assert!(pause(&restorer, now) <= 5 * FIRST * 5 / 4, "how often others did not stay does not count");
    }

    #[test]
    fn attempts_that_failed_do_not_count_once_a_channel_is_back() {
        let (mut restorer, mut now) = (Restorer::default(), Instant::now());
        restorer.lost(1, &useless(&[0]), now);
        for _ in 0..6 {
            now = restorer.wake_at().unwrap();
            restorer.next(now);
            restorer.ended(1, now);
        }
        now = restorer.wake_at().unwrap();
        restorer.next(now);
        restorer.restored(1, &[], now);
        restorer.lost(1, &useless(&[0]), now);
        assert!(pause(&restorer, now) <= 5 * FIRST * 5 / 4, "it was lost once more");
    }

    #[test]
    fn a_connection_that_has_ended_is_forgotten() {
        let (mut restorer, now) = (Restorer::default(), Instant::now());
        restorer.lost(1, &useless(&[0]), now);
        restorer.next(now + FIRST * 2);
        restorer.rests(1);
        assert!(restorer.connections.is_empty() && restorer.wake_at().is_none());
    }

    /// Dials these addresses until one answers; returns it, or why none does.
    fn look_for(addresses: &[SocketAddr]) -> std::result::Result<SocketAddr, ErrorKind> {
        let (mut restorer, now) = (Restorer::default(), Instant::now());
        let mut dialled = restorer.dial_next(1, 7, (addresses.iter().copied().collect(), true), now);
        loop {
            let fd = dialled.map_err(|e| e.kind())?;
            assert!(restorer.dials(7) && restorer.late(now).is_none());
            assert_eq!(dial::poll(&[(fd, libc::POLLOUT)], Duration::from_secs(10)).unwrap(), [true]);
            dialled = match restorer.settle(7, now).unwrap() {
                Ok((1, _, address, Purpose::Control { .. })) => return Ok(address),
                Err(Answer::Dials(fd)) => Ok(fd),
                Err(Answer::SetUp(1, Err(e))) => Err(e),
                _ => panic!("another connection"),
            };
        }
    }

    #[test]
    fn a_control_connection_is_looked_for_at_one_address_after_the_other() {
        let open = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [first, second] = open.each_ref().map(|listener| listener.local_addr().unwrap());
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert_eq!(look_for(&[closed, first, second]), Ok(first));
        assert!(
            matches!(open[1].set_nonblocking(true).and_then(|()| open[1].accept()), Err(e) if e.kind() == std::io::ErrorKind::WouldBlock)
        );
        // The peer's process has ended.
        assert_eq!(look_for(&[closed, closed]), Err(ErrorKind::NotFound));
        // An address that does not answer says nothing about the peer.
        let mut restorer = Restorer::default();
        let now = Instant::now();
        restorer.dial_next(1, 7, ([first].into(), true), now).unwrap();
        assert_eq!(restorer.late(now + NEXT), Some(7));
        assert!(
            matches!(restorer.settle(7, now + NEXT), Some(Err(Answer::SetUp(1, Err(e)))) if e.kind() == ErrorKind::Unreachable)
        );
    }
}
