//! What the lock of a connection guards: the machine, its channels and its socket, and how a round moves them on. Knows nothing of threads,
//! of who drives, nor of the application.

use crate::channel::router::Channels;
use crate::engine::progress::health::Health;
use crate::proto::{is_farewell, Machine, Scheduled};
use crate::stats::{ChannelStats, Totals};
use crate::status::{Error, ErrorKind, Result};
use crate::wire::control::ControlStream;
use crate::wire::frame::Frame;
use crate::wire::queue::RxBuffer;
use std::time::{Duration, Instant};

/// Chunks handed out before what they announce is flushed: the receiver can post nothing before it knows.
const BURST: usize = 8;
/// While something goes without chunks, its end is looked for in between and the control stream is read this often.
const READ_PAUSE: Duration = Duration::from_micros(10);
/// Reads of the control stream in one round, so that a peer that floods it does not starve the channels.
const READS: usize = 16;
/// Bytes of the control stream that leave in one hold of the lock: a large notification is sealed piece by piece, and others have their
/// turn at the lock meanwhile.
pub(super) const FLUSH: usize = 1 << 20;

/// What the lock guards.
pub(crate) struct Core {
    pub(super) machine: Machine,
    pub(super) channels: Channels,
    pub(super) control: ControlStream,
    rx: RxBuffer,
    /// When it was last read.
    read: Instant,
    /// This side has said goodbye: nothing is read or started any more.
    pub(super) closing: bool,
    pub(super) looked: Instant,
    pub(super) health: Health,
    pub(super) born: Instant,
    /// What was counted, once the connection has ended.
    pub(super) past: Option<Totals>,
}

impl Core {
    pub(crate) fn new(machine: Machine, channels: Channels, control: ControlStream) -> Core {
        let now = Instant::now();
        let (rx, health) = (RxBuffer::default(), Health::new());
        Core { machine, channels, control, rx, read: now, closing: false, looked: now, health, born: now, past: None }
    }

    /// Reads the control stream, advances the channels, hands out chunks, flushes, looks at deadlines. `true` when something moved; an
    /// error means that the connection must end.
    pub(super) fn round(&mut self, now: Instant) -> Result<bool> {
        let hurries = self.channels.activity(now).wants_polling && now.saturating_duration_since(self.read) < READ_PAUSE;
        let heard = !hurries && self.read(now)?;
        let moved = self.advance(now).map_err(|e| self.last_words(e, now))?;
        Ok(heard || moved)
    }

    /// Everything of a round but reading.
    fn advance(&mut self, now: Instant) -> Result<bool> {
        let any = self.channels.is_active(now) && self.machine.drive_channels(&mut self.channels, now)?;
        let more = self.pump(now)?;
        self.tick(now)?;
        Ok(any || more)
    }

    /// Heartbeat and deadlines, where it is time to look at them.
    pub(super) fn tick(&mut self, now: Instant) -> Result<()> {
        if now >= self.machine.next_tick() {
            self.machine.tick(&mut self.channels, now)?;
            self.flush(now, FLUSH)?;
            self.check_health(now);
        }
        Ok(())
    }

    /// Whether something is under way, or waits to leave.
    pub(super) fn is_active(&self) -> bool {
        self.machine.busy() || self.channels.is_active(Instant::now()) || self.backlog() > 0
    }

    /// A channel that the peer has closed tells less than the peer's farewell, which may be here.
    pub(super) fn last_words(&mut self, error: Error, now: Instant) -> Error {
        if !matches!(error.kind(), ErrorKind::RemoteDisconnect | ErrorKind::Plugin) {
            return error;
        }
        match self.read(now) {
            // What a plugin says of a failure counts for more than a bare end of the stream.
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
                // Part of a large frame.
                any |= self.rx.arriving() > 0;
            }
            // Frames may be there that came with the end of the set-up.
            while let Some((frame, len)) = self.rx.next()? {
                // A heartbeat is nothing that more would follow soon.
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

    /// Hands out chunks as far as windows allow, and flushes. `true` when the socket would take more of a backlog.
    pub(super) fn pump(&mut self, now: Instant) -> Result<bool> {
        let mut room = FLUSH;
        loop {
            let scheduled = self.machine.schedule(&mut self.channels, BURST, now)?;
            room = room.saturating_sub(self.flush(now, room)?);
            if scheduled == Scheduled::Blocked {
                return Ok(room == 0 && self.backlog() > 0);
            }
        }
    }

    /// Sends of the control stream what the socket takes, about `most` bytes of it. Returns the bytes that left.
    pub(super) fn flush(&mut self, now: Instant, most: usize) -> Result<usize> {
        if self.backlog() == 0 || most == 0 {
            return Ok(0);
        }
        let sent = self.control.flush(self.machine.tx(), most)?;
        self.machine.on_sent(sent, self.control.pending(), now);
        Ok(sent)
    }

    /// Looks at how the connection fares, once a second at most; what is worth it becomes a line of the log.
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
        self.health.tell(self.machine.peer(), &lines, now);
    }

    /// What is counted up to now.
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

    /// Bytes that wait to leave on the control stream.
    pub(super) fn backlog(&self) -> usize {
        self.machine.unsent() + self.control.pending()
    }
}
