//! Two-sided messages: sends wait for receives and receives for sends, in order; who waits too long ends in time.

use super::{Ending, InStream, State};
use crate::channel::plan::Stream;
use crate::status::{err, Error, ErrorKind, Result, UCCL_OK};
use crate::types::Key;
use crate::types::Place;
use crate::types::Segment;
use crate::wire::frame::Frame;
use std::time::{Duration, Instant};

impl State {
    pub(super) fn match_receives(&mut self) {
        while let (Some(&(message, len)), Some(_)) = (self.messages.front(), self.waiting_receives.front()) {
            self.messages.pop_front();
            let Some(receive) = self.waiting_receives.pop_front() else { return };
            self.outcomes.set_total(receive.id, len);
            if len > receive.segment.len {
                let error = err!(Truncated, "a message of {len} bytes met a receive of {}", receive.segment.len);
                log::error!("{}: {error}", self.setting.peer);
                self.outcomes.finish(receive.id, Err(error));
                self.push(&Frame::Pull { id: message, status: ErrorKind::Truncated.code(), receiver: Place::HOST });
                continue;
            }
            self.push(&Frame::Pull { id: message, status: UCCL_OK, receiver: receive.segment.place });
            if len == 0 {
                self.outcomes.finish(receive.id, Ok(()));
                self.push(&Frame::Done { id: message, status: UCCL_OK, text: "" });
                continue;
            }
            let segment = Segment { len, ..receive.segment };
            let stream = InStream {
                stream: Stream::new(vec![segment]),
                uses: vec![receive.region],
                missing: len,
                ending: Ending::Receive(receive.id),
            };
            self.incoming.insert(Key { id: message, mine: false }, stream);
        }
    }

    pub(super) fn on_pull(&mut self, id: u64, status: i32, receiver: Place) -> Result<()> {
        let Some(send) = self.waiting_sends.remove(&id) else {
            // The send timed out here, and its withdrawal is on the way to the peer.
            return Ok(());
        };
        if status != UCCL_OK {
            let error = Error::new(
                ErrorKind::from_code(status),
                format_args!("{}: the peer's receive is smaller than message {id}", self.setting.peer),
            );
            log::error!("{error}");
            self.outcomes.finish(id, Err(error));
            return Ok(());
        }
        let mut segments = send.segments;
        segments.iter_mut().for_each(|s| s.peer = receiver);
        if !segments.is_empty() {
            self.start_stream(Key { id, mine: true }, segments, send.uses);
        }
        Ok(())
    }

    /// The peer gave up a message: it waits here no more, and a receive that it was matched with fails.
    pub(super) fn on_withdraw(&mut self, id: u64) {
        self.messages.retain(|&(message, _)| message != id);
        let key = Key { id, mine: false };
        if let Some(InStream { ending: Ending::Receive(receive), .. }) = self.incoming.get(&key) {
            let error = err!(TimedOut, "message {id} was withdrawn: its send had waited too long for this receive");
            self.outcomes.finish(*receive, Err(error));
            self.incoming.remove(&key);
        }
    }

    pub(super) fn expire_matches(&mut self, now: Instant, timeout: Duration) {
        let late: Vec<u64> = self
            .waiting_sends
            .iter()
            .filter(|(_, s)| now.saturating_duration_since(s.since) > timeout)
            .map(|(&id, _)| id)
            .collect();
        for id in late {
            self.waiting_sends.remove(&id);
            self.push(&Frame::Withdraw { id });
            self.outcomes.finish(id, Err(err!(TimedOut, "no receive was posted for message {id} within {timeout:?}")));
        }
        while self.waiting_receives.front().is_some_and(|r| now.saturating_duration_since(r.since) > timeout) {
            if let Some(receive) = self.waiting_receives.pop_front() {
                self.outcomes
                    .finish(receive.id, Err(err!(TimedOut, "no message came for receive {} within {timeout:?}", receive.id)));
            }
        }
    }
}
