//! Channels that were lost. An engine that loses a channel closes its end of it, then says how many of the peer's chunks are in place.
//! Only when both engines have closed it can nothing of it be read or written any more; then what it did not deliver is sent again. Pure.

use crate::status::{bail, Error, Result};

/// A channel as far as it is lost.
#[derive(Debug, Default)]
struct Loss {
    /// Why this engine has closed it.
    ours: Option<Error>,
    /// How many chunks of this engine have arrived at the peer, which has closed it, and why.
    theirs: Option<(u64, String)>,
}

/// A channel that both engines have closed.
#[derive(Debug)]
pub(super) struct Closed {
    /// How many chunks of this engine have arrived.
    pub chunks: u64,
    /// What each engine says.
    pub ours: Error,
    pub theirs: String,
}

#[derive(Debug, Default)]
pub(super) struct Losses(Vec<Loss>);

impl Losses {
    fn of(&mut self, channel: u16) -> &mut Loss {
        super::lanes::lane(&mut self.0, channel)
    }

    /// This engine has closed a channel.
    pub(super) fn ours(&mut self, channel: u16, why: Error) {
        self.of(channel).ours.get_or_insert(why);
    }

    /// The peer has closed a channel. Whether this engine has yet to close it.
    ///
    /// # Errors
    /// `Protocol` when it had done so before.
    pub(super) fn theirs(&mut self, channel: u16, chunks: u64, why: String) -> Result<bool> {
        let loss = self.of(channel);
        if loss.theirs.replace((chunks, why)).is_some() {
            bail!(Protocol, "channel {channel} is lost twice");
        }
        Ok(loss.ours.is_none())
    }

    /// Whether the peer has closed a channel: it announces no more chunks on it.
    pub(super) fn is_theirs(&self, channel: u16) -> bool {
        self.0.get(usize::from(channel)).is_some_and(|loss| loss.theirs.is_some())
    }

    /// Whether this engine has closed a channel.
    pub(super) fn is_ours(&self, channel: u16) -> bool {
        self.0.get(usize::from(channel)).is_some_and(|loss| loss.ours.is_some())
    }

    /// How many channels this engine has closed.
    pub(super) fn closed(&self) -> usize {
        self.0.iter().filter(|loss| loss.ours.is_some()).count()
    }

    /// What is known of a channel that both engines have closed.
    pub(super) fn both(&self, channel: u16) -> Option<Closed> {
        let Loss { ours: Some(ours), theirs: Some((chunks, theirs)) } = self.0.get(usize::from(channel))? else { return None };
        Some(Closed { chunks: *chunks, ours: ours.clone(), theirs: theirs.clone() })
    }
}
