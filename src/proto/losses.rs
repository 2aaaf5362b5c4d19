//! Channels that were lost, and that came back. An engine that loses a channel closes its end of it, then says how many of the peer's
//! chunks are in place. Only when both engines have closed it can nothing of it be read or written any more; then what it did not deliver is
//! sent again, and the channel may be set up again. Each set-up has a generation, so that what crosses on the way is distinguished. Pure.

use super::lanes::lane;
use crate::status::{bail, err, Error, Result};
use std::time::{Duration, Instant};

/// How long this engine waits for the peer to open a channel that came back.
const UP_TIMEOUT: Duration = Duration::from_secs(5);

/// The two ends of a channel, as far as they differ from those of one that was never lost.
#[derive(Debug)]
struct Ends {
    /// Why this engine has closed its end, while it is closed.
    ours: Option<Error>,
    /// How many chunks of this engine have arrived at the peer, which has closed its end, and why.
    theirs: Option<(u64, String)>,
    /// The generations of the ends that were opened last.
    our_generation: u32,
    their_generation: u32,
    /// The last set-up that this engine has taken part in.
    begun: u32,
    /// Both ends of a generation are open, or this engine has yet to recover from the loss of one.
    live: bool,
    /// Since when the end of this engine waits for the peer's.
    waits: Option<Instant>,
    /// When it was lost.
    lost: Option<Instant>,
    /// A chunk was announced between the ends that were opened last, and one has arrived.
    tried: bool,
    carried: bool,
}

impl Default for Ends {
    fn default() -> Ends {
        Ends {
            ours: None,
            theirs: None,
            our_generation: 0,
            their_generation: 0,
            begun: 0,
            live: true,
            waits: None,
            lost: None,
            tried: false,
            carried: false,
        }
    }
}

impl Ends {
    fn same(&self) -> bool {
        self.our_generation == self.their_generation
    }

    fn is_open(&self) -> bool {
        self.ours.is_none() && self.theirs.is_none() && self.same()
    }
}

/// What follows from the peer's Lost.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// This engine has to close its end.
    Close,
    /// Both ends are closed.
    Recover,
}

/// A channel that both engines have closed.
#[derive(Debug)]
pub(super) struct Closed {
    /// How many chunks of this engine have arrived.
    pub chunks: u64,
    /// What each engine says; `None` if the channel carried nothing.
    pub said: Option<(Error, String)>,
}

/// Channels that came back together.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Back {
    pub channels: Vec<u16>,
    /// For how long the first of them was lost.
    pub after: Duration,
}

/// Channels of one NIC that are lost within this time have one line of the log.
const TOGETHER: Duration = Duration::from_secs(1);

/// How a cause begins that the peer has given: it needs no answer.
const BY_PEER: &str = "the peer has closed it: ";

#[derive(Debug, Default)]
pub(super) struct Losses {
    ends: Vec<Ends>,
    /// The generation of the last set-up.
    generation: u32,
    /// Channels that came back, until all of their set-up have.
    back: Vec<(u16, Duration)>,
    /// A channel may be set up again that could not before.
    news: bool,
    /// NICs whose loss the log has, and when each was written.
    named: Vec<(String, Instant)>,
}

/// The cause of a loss that the peer gives as this text.
pub(super) fn by_peer(text: &str) -> Error {
    err!(RemoteDisconnect, "{BY_PEER}{text}")
}

/// What the peer must learn of a loss: nothing that it has sent itself.
pub(super) fn for_peer(why: &Error) -> &str {
    if why.to_str().contains(BY_PEER) {
        ""
    } else {
        why.to_str()
    }
}

/// Why a channel was lost, from what each engine says.
pub(super) fn cause(ours: &Error, theirs: &str) -> String {
    if theirs.is_empty() || for_peer(ours).is_empty() {
        ours.to_string()
    } else {
        format!("{ours}; the peer says: {theirs}")
    }
}

impl Losses {
    fn of(&mut self, channel: u16) -> &mut Ends {
        lane(&mut self.ends, channel)
    }

    /// Whether the loss of a channel on a NIC is worth a line of the log: the channels of a NIC are lost together.
    pub(super) fn names(&mut self, nic: &str, now: Instant) -> bool {
        self.named.retain(|(_, at)| now.saturating_duration_since(*at) < TOGETHER);
        let known = self.named.iter().any(|(known, _)| known == nic);
        if !known {
            self.named.push((nic.to_owned(), now));
        }
        !known
    }

    fn look(&self, channel: u16) -> Option<&Ends> {
        self.ends.get(usize::from(channel))
    }

    /// A channel did not come up at all.
    pub(super) fn never_up(&mut self, channel: u16, now: Instant) {
        let why = || "it did not come up".to_owned();
        *self.of(channel) = Ends {
            ours: Some(err!(Unreachable, "{}", why())),
            theirs: Some((0, why())),
            live: false,
            lost: Some(now),
            ..Ends::default()
        };
        self.news = true;
    }

    /// This engine has closed its end of a channel, over which so many chunks have arrived here. `tried`: chunks were announced on it.
    pub(super) fn ours(&mut self, channel: u16, chunks: u64, tried: bool, why: Error) {
        let ends = self.of(channel);
        ends.ours.get_or_insert(why);
        ends.waits = None;
        ends.tried |= tried;
        ends.carried |= chunks > 0;
        // An end that the peer's never joined may come back at once.
        self.news |= self.is_lost(channel);
    }

    /// The peer has closed its end of a channel.
    ///
    /// # Errors
    /// `Protocol` when it is not open.
    pub(super) fn theirs(&mut self, channel: u16, chunks: u64, why: String) -> Result<Next> {
        let ends = self.of(channel);
        if ends.theirs.replace((chunks, why)).is_some() {
            bail!(Protocol, "channel {channel} is lost twice");
        }
        ends.carried |= chunks > 0 && ends.same();
        Ok(if ends.ours.is_none() && ends.same() { Next::Close } else { Next::Recover })
    }

    /// Whether the peer has closed its end: it announces no more chunks there.
    pub(super) fn is_theirs(&self, channel: u16) -> bool {
        self.look(channel).is_some_and(|ends| ends.theirs.is_some())
    }

    /// Whether the peer may announce chunks: its end is open, and this engine has opened its own.
    pub(super) fn may_announce(&self, channel: u16) -> bool {
        self.look(channel).is_none_or(|ends| ends.theirs.is_none() && ends.their_generation <= ends.our_generation)
    }

    /// Whether chunks that the peer announces reach this engine.
    pub(super) fn delivers(&self, channel: u16) -> bool {
        self.look(channel).is_none_or(|ends| ends.ours.is_none() && ends.same())
    }

    /// Whether the end that this engine closes is the one to which the peer's announcements belong.
    pub(super) fn expects(&self, channel: u16) -> bool {
        self.look(channel).is_none_or(Ends::same)
    }

    /// How many of `count` channels are open.
    pub(super) fn open(&self, count: usize) -> usize {
        count - self.ends.iter().filter(|ends| !ends.is_open()).count()
    }

    /// The channels that are not open at both engines, and why.
    pub(super) fn closed(&self) -> impl Iterator<Item = (u16, String)> + '_ {
        let why = |ends: &Ends| {
            let theirs = ends.theirs.as_ref().map_or("", |(_, text)| text);
            let why = || ends.ours.as_ref().map_or_else(|| "the peer has yet to open it".to_owned(), |ours| cause(ours, theirs));
            (!ends.is_open()).then(why)
        };
        self.ends.iter().enumerate().filter_map(move |(channel, ends)| Some((channel as u16, why(ends)?)))
    }

    /// Both ends are closed, or the peer's is and belonged to an end of this engine that is closed: what is known of the channel, if there
    /// is something to recover from.
    pub(super) fn recover(&mut self, channel: u16, now: Instant) -> Option<Closed> {
        let ends = self.of(channel);
        let Some((chunks, theirs)) = &mut ends.theirs else { return None };
        // It is final, and was not more than this: a later end begins again.
        let (chunks, theirs) = (std::mem::take(chunks), theirs.clone());
        let live = ends.ours.is_some() && ends.our_generation == ends.their_generation && std::mem::take(&mut ends.live);
        if live {
            ends.lost = Some(now);
        }
        let said = ends.ours.clone().filter(|_| live).map(|ours| (ours, theirs));
        self.news |= self.is_lost(channel);
        Some(Closed { chunks, said })
    }

    // ---- coming back ----

    /// Whether a channel is closed at both engines.
    pub(super) fn is_lost(&self, channel: u16) -> bool {
        self.look(channel).is_some_and(|ends| ends.ours.is_some() && ends.theirs.is_some())
    }

    /// Whether a lost channel was of no use since it came up: of the chunks announced on it none has arrived, at either engine.
    pub(super) fn was_useless(&self, channel: u16) -> bool {
        self.look(channel).is_some_and(|ends| ends.tried && !ends.carried)
    }

    /// Whether a channel can be set up again that could not before; says so once.
    pub(super) fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.news)
    }

    /// This engine takes part in a set-up of channels that are lost: the next one, or the one that the peer has numbered.
    ///
    /// # Errors
    /// `Unsupported` when one of them is not lost, or the number was used before.
    pub(super) fn begin(&mut self, channels: &[u16], number: Option<u32>) -> Result<u32> {
        if let Some(channel) = channels.iter().find(|&&channel| !self.is_lost(channel)) {
            bail!(Unsupported, "channel {channel} is not lost at this engine");
        }
        let next = self.generation.checked_add(1);
        let Some(generation) = number.filter(|&number| number > self.generation).or(next.filter(|_| number.is_none())) else {
            bail!(Unsupported, "a set-up of this number was before");
        };
        self.generation = generation;
        channels.iter().for_each(|&channel| self.of(channel).begun = generation);
        Ok(generation)
    }

    /// This engine has opened its end of a channel that has come up. Whether both ends are open.
    ///
    /// # Errors
    /// `Internal` when that is not the last set-up of a lost channel.
    pub(super) fn up_here(&mut self, channel: u16, generation: u32, now: Instant) -> Result<bool> {
        let ends = self.of(channel);
        if ends.ours.is_none() || ends.begun != generation || ends.our_generation >= generation {
            bail!(Internal, "channel {channel} was not being set up");
        }
        (ends.ours, ends.our_generation, ends.waits) = (None, generation, Some(now));
        (ends.tried, ends.carried) = (false, false);
        Ok(self.joined(channel, now))
    }

    /// The peer has opened its end of a channel. Whether both ends are open.
    ///
    /// # Errors
    /// `Protocol` when it was open, or there was no such set-up.
    pub(super) fn up_there(&mut self, channel: u16, generation: u32, now: Instant) -> Result<bool> {
        let ends = self.of(channel);
        if ends.theirs.is_none() || generation <= ends.their_generation || generation > ends.begun {
            bail!(Protocol, "channel {channel} is up in generation {generation}, which cannot be");
        }
        (ends.theirs, ends.their_generation) = (None, generation);
        Ok(self.joined(channel, now))
    }

    fn joined(&mut self, channel: u16, now: Instant) -> bool {
        let ends = self.of(channel);
        if !ends.is_open() {
            return false;
        }
        (ends.live, ends.waits) = (true, None);
        let after = ends.lost.take().map_or(Duration::ZERO, |lost| now.saturating_duration_since(lost));
        self.back.push((channel, after));
        true
    }

    /// The channels that have come back, once no other waits.
    pub(super) fn take_back(&mut self) -> Option<Back> {
        if self.back.is_empty() || self.ends.iter().any(|ends| ends.waits.is_some()) {
            return None;
        }
        let back = std::mem::take(&mut self.back);
        let after = back.iter().map(|(_, after)| *after).max().unwrap_or_default();
        Some(Back { channels: back.into_iter().map(|(channel, _)| channel).collect(), after })
    }

    /// Channels that came back at this engine alone.
    pub(super) fn overdue(&self, now: Instant) -> impl Iterator<Item = u16> + '_ {
        let late = move |ends: &Ends| ends.waits.is_some_and(|since| now.saturating_duration_since(since) > UP_TIMEOUT);
        self.ends.iter().enumerate().filter(move |(_, ends)| late(ends)).map(|(channel, _)| channel as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why() -> Error {
        err!(RemoteDisconnect, "cut")
    }

    fn lost() -> Losses {
        let mut losses = Losses::default();
        losses.ours(0, 0, false, why());
        assert_eq!(losses.theirs(0, 0, String::new()).unwrap(), Next::Recover);
        assert!(losses.recover(0, Instant::now()).unwrap().said.is_some());
        losses
    }

    #[test]
    fn a_channel_comes_back_once_both_engines_say_so() {
        let now = Instant::now();
        for here_first in [true, false] {
            let mut losses = lost();
            assert!(losses.take_news() && losses.is_lost(0) && !losses.take_news());
            assert_eq!(losses.begin(&[0], None).unwrap(), 1);
            let first = if here_first { losses.up_here(0, 1, now) } else { losses.up_there(0, 1, now) };
            assert!(!first.unwrap() && losses.open(3) == 2 && losses.closed().count() == 1 && losses.take_back().is_none());
            assert!(!losses.may_announce(0), "the peer waits for this engine's Up, or has not said its own");
            let second = if here_first { losses.up_there(0, 1, now) } else { losses.up_here(0, 1, now) };
            assert!(second.unwrap() && losses.open(3) == 3 && losses.may_announce(0) && losses.delivers(0));
            assert_eq!(losses.take_back().unwrap().channels, [0]);
            losses.theirs(0, 0, String::new()).unwrap();
        }
    }

    #[test]
    fn a_channel_is_useless_if_chunks_were_announced_between_the_ends_that_were_opened_last_and_none_has_arrived() {
        let now = Instant::now();
        for (tried, here, there) in [(true, 1, 0), (true, 0, 1), (true, 0, 0), (false, 0, 0)] {
            let mut losses = Losses::default();
            losses.ours(0, 1, true, why());
            losses.theirs(0, 1, String::new()).unwrap();
            losses.recover(0, now);
            assert!(!losses.was_useless(0) && !losses.was_useless(1));
            losses.begin(&[0], None).unwrap();
            losses.up_there(0, 1, now).unwrap();
            losses.up_here(0, 1, now).unwrap();
            losses.ours(0, here, tried, why());
            losses.theirs(0, there, String::new()).unwrap();
            assert_eq!(losses.was_useless(0), tried && here + there == 0, "an idle one is none");
        }
    }

    #[test]
    fn only_a_set_up_brings_a_channel_back() {
        let now = Instant::now();
        let mut losses = lost();
        assert!(losses.up_there(0, 1, now).is_err(), "no set-up has begun");
        assert_eq!(losses.begin(&[0], Some(7)).unwrap(), 7);
        for wrong in [0, 8] {
            assert!(losses.up_there(0, wrong, now).is_err(), "{wrong}");
        }
        assert!(losses.up_here(0, 6, now).is_err());
        losses.up_there(0, 7, now).unwrap();
        assert!(losses.up_there(0, 7, now).is_err(), "twice");
        for number in [None, Some(8)] {
            assert!(losses.begin(&[0], number).is_err(), "the peer has opened its end");
        }
        losses.theirs(0, 0, String::new()).unwrap();
        assert!(losses.begin(&[0], Some(7)).is_err() && losses.begin(&[0, 1], None).is_err() && losses.begin(&[0], None).is_ok());
    }

    #[test]
    fn an_end_that_the_peer_does_not_join_closes_again_and_late_frames_of_the_peer_belong_to_the_old_one() {
        let now = Instant::now();
        let mut losses = lost();
        losses.begin(&[0], None).unwrap();
        losses.up_here(0, 1, now).unwrap();
        assert_eq!(losses.overdue(now + UP_TIMEOUT).count(), 0);
        assert_eq!(losses.overdue(now + 2 * UP_TIMEOUT).collect::<Vec<_>>(), [0]);
        losses.ours(0, 0, false, why());
        assert!(losses.is_lost(0), "the next attempt may follow");
        losses.begin(&[0], None).unwrap();
        losses.up_here(0, 2, now).unwrap();
        // The peer had opened the first one, announced chunks on it, and lost it.
        assert!(!losses.up_there(0, 1, now).unwrap());
        assert!(losses.may_announce(0) && !losses.delivers(0) && !losses.expects(0));
        assert_eq!(losses.theirs(0, 0, String::new()).unwrap(), Next::Recover);
        assert!(losses.recover(0, now).unwrap().said.is_none() && !losses.is_theirs(1));
        assert!(losses.up_there(0, 2, now).unwrap() && losses.delivers(0));
    }

    #[test]
    fn the_loss_of_a_nic_is_said_once_and_of_each() {
        let (mut losses, now) = (Losses::default(), Instant::now());
        let nics = || (0..40).map(|n| format!("eth{}", n % 20));
        assert_eq!(nics().filter(|nic| losses.names(nic, now)).count(), 20);
        assert_eq!(nics().filter(|nic| losses.names(nic, now + TOGETHER)).count(), 20);
    }

    #[test]
    fn a_cause_is_said_once() {
        let (down, reset) = (err!(RemoteDisconnect, "eth2 is down"), err!(RemoteDisconnect, "reset"));
        assert_eq!(cause(&down, ""), "eth2 is down");
        assert_eq!(cause(&reset, "eth2 is down"), "reset; the peer says: eth2 is down");
        let from_peer = by_peer("eth2 is down");
        assert_eq!((for_peer(&from_peer), for_peer(&down)), ("", "eth2 is down"));
        assert_eq!(cause(&from_peer, "eth2 is down"), "the peer has closed it: eth2 is down");
    }
}
