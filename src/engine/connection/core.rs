//! The state behind a connection's lock: the protocol machine, its channels and its control socket, and one round that moves them
//! on. Knows nothing about threads, about who drives, or about the application.

use crate::channel::router::Channels;
use crate::engine::progress::health::Health;
use crate::proto::{is_farewell, Machine, Scheduled};
use crate::stats::{ChannelStats, Totals};
use crate::status::{Error, ErrorKind, Result};
use crate::wire::control::ControlStream;
use crate::wire::frame::Frame;
use crate::wire::queue::RxBuffer;
use std::time::{Duration, Instant};

/// Chunks scheduled before their announcements are flushed: the receiver can post nothing until it knows of them.
const BURST: usize = 8;
/// During a direct transfer, which is polled continuously, the control connection is read only this often.
const READ_PAUSE: Duration = Duration::from_micros(10);
/// Reads of the control connection in one round, so that a peer that floods it does not starve the channels.
const READS: usize = 16;
/// Bytes of the control connection sent under one hold of the lock: a large notification is sealed piece by piece, and other
/// threads get the lock in between.
pub(super) const FLUSH: usize = 1 << 20;

/// What the connection's lock guards.
pub(crate) struct Core {
    pub(super) machine: Machine,
    pub(super) channels: Channels,
    pub(super) control: ControlStream,
    rx: RxBuffer,
    /// Where its two ends are, and whether it may be made again elsewhere when it fails.
    pub(super) at: String,
    pub(super) movable: bool,
    /// Since when it waits for that.
    pub(super) suspended: Option<Instant>,
    /// When the control connection was last read.
    read: Instant,
    /// This engine has sent its goodbye: nothing is read or started any more.
    pub(super) closing: bool,
    /// When the channels were last checked for a failure.
    pub(super) looked: Instant,
    pub(super) health: Health,
    pub(super) born: Instant,
    /// The totals at the end of the connection, once it has ended.
    pub(super) past: Option<Totals>,
}

impl Core {
    /// `at`: where the two ends of the control connection are; `movable`: it may be made again elsewhere when it fails.
    pub(crate) fn new(machine: Machine, channels: Channels, mut control: ControlStream, at: String, movable: bool) -> Core {
        let now = Instant::now();
        if movable {
            control.fail_after(machine.nic_timeout());
        }
        Core {
            machine,
            channels,
            control,
            rx: RxBuffer::default(),
            at,
            movable,
            suspended: None,
            read: now,
            closing: false,
            looked: now,
            health: Health::new(),
            born: now,
            past: None,
        }
    }

    /// One round: reads the control connection, advances the channels, schedules chunks, flushes, checks deadlines. `true` when
    /// something moved; an error means that the connection must end.
    pub(super) fn round(&mut self, now: Instant) -> Result<bool> {
        let wants_polling = self.channels.activity().wants_polling && now.saturating_duration_since(self.read) < READ_PAUSE;
        let received = !wants_polling && self.read(now)?;
        let moved = self.advance(now).map_err(|e| self.prefer_goodbye(e, now)).map_err(|e| self.say_suspended(e))?;
        Ok(received || moved)
    }

    /// A control connection that has failed waits to be made again, if it can be. The silence of the peer goes on meanwhile, and ends the
    /// connection as ever.
    pub(super) fn check_control(&mut self, now: Instant) -> Result<()> {
        match self.control.lost() {
            Some(why) if !self.movable => return Err(why.clone()),
            Some(_) => self.suspended = self.suspended.or(Some(now)),
            None => {}
        }
        Ok(())
    }

    /// While neither the control connection nor a channel works, nothing shows that the process of the peer lives. It has a moment to
    /// make the control connection again.
    fn check_cut_off(&self, now: Instant) -> Result<()> {
        let late = |since| now.saturating_duration_since(since) > self.machine.nic_timeout();
        match self.machine.without_channels(&self.channels) {
            Some(why) if self.suspended.is_some_and(late) => Err(why),
            _ => Ok(()),
        }
    }

    /// Adds to the error that ends the connection that the control connection had failed before.
    fn say_suspended(&self, error: Error) -> Error {
        match (self.suspended, self.control.lost()) {
            (Some(_), Some(why)) => Error::new(error.kind(), format_args!("{error}; before, {why}, and it was not made again")),
            _ => error,
        }
    }

    /// A round without the read.
    fn advance(&mut self, now: Instant) -> Result<bool> {
        let any = self.channels.is_active() && self.machine.drive_channels(&mut self.channels, now)?;
        let more = self.pump(now)?;
        self.tick(now)?;
        Ok(any || more)
    }

    /// Sends a heartbeat and checks deadlines, when due.
    pub(super) fn tick(&mut self, now: Instant) -> Result<()> {
        if now >= self.machine.next_tick() {
            self.check_cut_off(now)?;
            self.machine.tick(&mut self.channels, now)?;
            self.flush(now, FLUSH)?;
            self.control.look(now);
            self.check_control(now)?;
            self.check_health(now);
        }
        Ok(())
    }

    /// Whether work is in progress or data waits to be sent.
    pub(super) fn is_active(&self) -> bool {
        self.machine.busy() || self.channels.is_active() || self.wants_room()
    }

    /// Whether data waits for room in the control socket.
    pub(super) fn wants_room(&self) -> bool {
        self.backlog() > 0 && !self.control.is_stuck()
    }

    /// When a channel fails because the peer closed it, the peer's goodbye, which may have arrived, gives the better cause.
    pub(super) fn prefer_goodbye(&mut self, error: Error, now: Instant) -> Error {
        if !matches!(error.kind(), ErrorKind::RemoteDisconnect | ErrorKind::Plugin) {
            return error;
        }
        match self.read(now) {
            // An error from a plugin says more than a bare end of the connection.
            Err(e) if is_farewell(&e) || error.kind() == ErrorKind::RemoteDisconnect => match e.kind() {
                ErrorKind::RemoteDisconnect | ErrorKind::TimedOut => e,
                _ => error,
            },
            _ => error,
        }
    }

    fn read(&mut self, now: Instant) -> Result<bool> {
        self.read = now;
        let mut any = false;
        for _ in 0..READS {
            let (n, more) = self.control.read(&mut self.rx)?;
            if n > 0 {
                self.machine.on_received(n, self.rx.arriving(), now);
                // A large frame has arrived in part.
                any |= self.rx.arriving() > 0;
            }
            // The buffer may hold frames that arrived with the end of the set-up.
            while let Some((frame, len)) = self.rx.next()? {
                // After a heartbeat no further frame is expected soon.
                any |= !matches!(frame, Frame::Ping { .. });
                self.machine.handle(frame, &mut self.channels, now)?;
                self.rx.consume(len);
            }
            self.machine.keeps(self.rx.kept())?;
            if !more {
                break;
            }
        }
        Ok(any)
    }

    /// Schedules chunks as far as the windows allow, and flushes. `true` when a backlog is left that the socket would take.
    pub(super) fn pump(&mut self, now: Instant) -> Result<bool> {
        let mut room = FLUSH;
        loop {
            let scheduled = self.machine.schedule(&mut self.channels, BURST, now)?;
            room = room.saturating_sub(self.flush(now, room)?);
            if self.control.is_failing() {
                // What had arrived may say why.
                self.read(now)?;
            }
            if scheduled == Scheduled::Blocked {
                self.check_control(now)?;
                return Ok(room == 0 && self.backlog() > 0);
            }
        }
    }

    /// Sends what the socket takes of the control connection, about `most` bytes. Returns the bytes sent.
    pub(super) fn flush(&mut self, now: Instant, most: usize) -> Result<usize> {
        if self.backlog() == 0 || most == 0 {
            return Ok(0);
        }
        let sent = self.control.flush(self.machine.tx(), most)?;
        self.machine.on_sent(sent, self.control.pending(), now);
        Ok(sent)
    }

    /// Checks the connection's health, at most once a second, and logs what is worth a line.
    fn check_health(&mut self, now: Instant) {
        if !self.health.due(now) {
            return;
        }
        let mut lines = match self.health.worth_a_look(self.channels.totals(), self.channels.busy()) {
            true => self.health.look(&self.channels.stats(true, now), now),
            false => Vec::new(),
        };
        let (silent, limit) = self.machine.silence(now);
        lines.extend(self.health.answers(silent, limit, self.machine.standstill(&self.channels, now)));
        self.health.log(self.machine.peer(), &lines, now);
    }

    /// The totals up to now.
    pub(super) fn totals(&self, channels: &[ChannelStats]) -> Totals {
        let mut totals = self.machine.counts();
        for c in channels {
            totals.sent_bytes += c.sent_bytes;
            totals.sent_chunks += c.sent_chunks;
            totals.received_bytes += c.received_bytes;
            totals.received_chunks += c.received_chunks;
            totals.packed_chunks += c.packed_chunks;
            totals.unpacked_chunks += c.unpacked_chunks;
            totals.pack_us += c.pack_us;
            totals.unpack_us += c.unpack_us;
        }
        (totals.stalls, totals.slow_answers) = self.health.counts();
        totals
    }

    /// Bytes of the control connection that wait to be sent.
    pub(super) fn backlog(&self) -> usize {
        self.machine.unsent() + self.control.pending()
    }
}
