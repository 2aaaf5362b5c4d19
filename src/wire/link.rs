//! The control connection until its channels are up, as bytes in and bytes out: the handshake, then set-up messages in records. It never
//! asks for bytes beyond the set-up, so that nothing has to be handed on but the session. Knows no sockets and no clocks.

use super::handshake::{Handshake, Outcome};
use super::session::{Opened, RECORD_HEADER};
use super::setup::{self, Decoded, Message};
use crate::status::{bail, Error, Result};
use std::collections::VecDeque;

/// Messages that wait to be taken; no more bytes are asked for meanwhile.
const MAX_WAITING: usize = 2;

enum Stage {
    Proving(Box<Handshake>),
    Proved(Box<Outcome>),
}

/// One side of a set-up.
pub(crate) struct SealedLink {
    stage: Stage,
    /// The record that is coming in.
    record: Vec<u8>,
    /// Bytes of the whole record, or of its header.
    whole: usize,
    /// Opened bytes of a message that is not complete.
    plain: Vec<u8>,
    messages: VecDeque<Message>,
    /// The peer has said its last word of the set-up.
    over: bool,
    out: Vec<u8>,
}

impl SealedLink {
    /// Begins with a fresh handshake.
    pub(crate) fn new(handshake: Handshake) -> SealedLink {
        let mut link = SealedLink {
            stage: Stage::Proving(Box::new(handshake)),
            record: Vec::new(),
            whole: RECORD_HEADER,
            plain: Vec::new(),
            messages: VecDeque::new(),
            over: false,
            out: Vec::new(),
        };
        link.collect();
        link
    }

    /// Moves the handshake's output to the link's.
    fn collect(&mut self) {
        if let Stage::Proving(handshake) = &mut self.stage {
            let n = handshake.output().len();
            self.out.extend_from_slice(handshake.output());
            handshake.sent(n);
        }
    }

    /// Most bytes that may be read from the peer now; none once everything was heard.
    pub(crate) fn wants(&self) -> usize {
        match &self.stage {
            Stage::Proving(handshake) => handshake.wants(),
            Stage::Proved(_) if self.over || self.messages.len() >= MAX_WAITING => 0,
            Stage::Proved(_) => self.whole - self.record.len(),
        }
    }

    /// Takes bytes of the peer, at most as many as wanted.
    ///
    /// # Errors
    /// `Protocol`, `Auth`, or the peer's refusal. What there is to send then tells the peer.
    pub(crate) fn input(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.len() > self.wants() {
            bail!(Internal, "{} bytes for a set-up that wants {}", bytes.len(), self.wants());
        }
        match &mut self.stage {
            Stage::Proving(handshake) => {
                let taken = handshake.input(bytes);
                let outcome = handshake.outcome();
                self.collect();
                if let Some(outcome) = outcome {
                    self.stage = Stage::Proved(Box::new(outcome));
                }
                taken.map(|_| ())
            }
            Stage::Proved(outcome) => {
                self.record.extend_from_slice(bytes);
                if self.record.len() < self.whole {
                    return Ok(());
                }
                match outcome.session.open(&mut self.record)? {
                    Opened::Need(whole) => {
                        self.whole = whole;
                        Ok(())
                    }
                    Opened::Record { plain, .. } => {
                        self.plain.extend_from_slice(&self.record[..plain]);
                        self.record.clear();
                        self.whole = RECORD_HEADER;
                        self.decode()
                    }
                }
            }
        }
    }

    fn decode(&mut self) -> Result<()> {
        let mut at = 0;
        while let Decoded::Message(message, taken) = setup::decode(&self.plain[at..])? {
            at += taken;
            self.over = !matches!(message, Message::Offer(_));
            self.messages.push_back(message);
            if self.over && at < self.plain.len() || self.messages.len() > MAX_WAITING {
                bail!(Protocol, "the peer says more than a set-up has to say");
            }
        }
        self.plain.drain(..at);
        Ok(())
    }

    /// Appends what is to be sent.
    pub(crate) fn output(&mut self, out: &mut Vec<u8>) {
        out.append(&mut self.out);
    }

    /// The handshake's result, once the peer has proved itself.
    pub(crate) fn proved(&self) -> Option<&Outcome> {
        match &self.stage {
            Stage::Proving(_) => None,
            Stage::Proved(outcome) => Some(outcome),
        }
    }

    /// Queues a message. Before the proof nothing but [`SealedLink::refuse`] reaches the peer.
    ///
    /// # Errors
    /// `Internal` when it could not be sealed, or before the proof.
    pub(crate) fn send(&mut self, message: &Message) -> Result<()> {
        let Stage::Proved(outcome) = &mut self.stage else { bail!(Internal, "a set-up message before the proof") };
        let mut plain = Vec::new();
        setup::encode(message, &mut plain);
        outcome.session.seal(&plain, &mut self.out)
    }

    /// Queues this side's failure, in whatever form the peer can read now. Before the proof it hears of few kinds of errors.
    pub(crate) fn refuse(&mut self, error: &Error) {
        match &mut self.stage {
            Stage::Proving(handshake) => {
                handshake.refuse(error);
                self.collect();
            }
            // A session that cannot seal has nothing to say.
            Stage::Proved(_) => drop(self.send(&Message::Abort(error.into()))),
        }
    }

    /// The peer's next message.
    pub(crate) fn receive(&mut self) -> Option<Message> {
        self.messages.pop_front()
    }

    /// What remains for the connection, at the end of the set-up.
    pub(crate) fn into_outcome(self) -> Option<Outcome> {
        match self.stage {
            Stage::Proving(_) => None,
            Stage::Proved(outcome) => Some(*outcome),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{err, ErrorKind};
    use crate::wire::handshake::Identity;
    use crate::wire::hello::tests::sample;
    use crate::wire::keys::Keys;
    use crate::wire::session::MAX_RECORD;
    use crate::wire::setup::{Offered, Verdict};
    use std::sync::Arc;

    fn sides(client: &str, server: &str) -> (SealedLink, SealedLink) {
        let identity = Arc::new(Identity::generate().unwrap());
        let keys = |text: &str| Arc::new(Keys::parse(text.as_bytes()).unwrap());
        let connecting = Handshake::connecting(&identity, sample(), keys(client)).unwrap();
        let listening = Handshake::listening(&identity, sample(), keys(server)).unwrap();
        (SealedLink::new(connecting), SealedLink::new(listening))
    }

    /// Moves one direction's bytes as a socket that gives no more than is asked for. Returns what nobody asked for.
    fn pump(from: &mut SealedLink, to: &mut SealedLink) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        from.output(&mut bytes);
        let mut at = 0;
        while at < bytes.len() && to.wants() > 0 {
            let n = to.wants().min(bytes.len() - at);
            to.input(&bytes[at..at + n])?;
            at += n;
        }
        Ok(bytes[at..].to_vec())
    }

    const A: &str = "0123456789abcdef";

    fn proved() -> (SealedLink, SealedLink) {
        let (mut c, mut s) = sides(A, A);
        for _ in 0..2 {
            assert_eq!(pump(&mut c, &mut s), Ok(vec![]));
            assert_eq!(pump(&mut s, &mut c), Ok(vec![]));
        }
        assert!(c.proved().is_some() && s.proved().is_some());
        (c, s)
    }

    fn offer(n: usize) -> Message {
        Message::Offer(vec![vec![Offered { nic: "eth0".into(), handle: [n as u8; 128] }; n]; 4])
    }

    #[test]
    fn offers_and_verdicts_cross_and_frames_stay_outside() {
        let (mut c, mut s) = proved();
        // The largest offer takes more than a record.
        for n in [1, 64] {
            c.send(&offer(n)).unwrap();
            assert_eq!(pump(&mut c, &mut s), Ok(vec![]));
            assert_eq!(s.receive(), Some(offer(n)));
        }
        let ready = Message::Ready(Verdict::ok(), vec![0, 3, 64]);
        c.send(&ready).unwrap();
        let (mut bytes, mut frame) = (Vec::new(), Vec::new());
        c.output(&mut bytes);
        let mut theirs = c.into_outcome().unwrap();
        theirs.session.seal(b"frame", &mut frame).unwrap();
        c = sides(A, A).0;
        c.out = [bytes, frame.clone()].concat();
        assert_eq!(pump(&mut c, &mut s), Ok(frame.clone()));
        assert_eq!((s.receive(), s.receive(), s.wants()), (Some(ready), None, 0));
        let mut session = s.into_outcome().unwrap().session;
        assert!(matches!(session.open(&mut frame), Ok(Opened::Record { plain: 5, .. })));
    }

    #[test]
    fn failures_are_told_before_and_after_the_proof() {
        let (mut c, mut s) = sides(A, "fedcba9876543210");
        pump(&mut c, &mut s).unwrap();
        pump(&mut s, &mut c).unwrap();
        assert_eq!(pump(&mut c, &mut s).unwrap_err().kind(), ErrorKind::Auth);
        assert_eq!(pump(&mut s, &mut c).unwrap_err().kind(), ErrorKind::Auth);
        assert!(c.send(&offer(1)).is_err());
        let (mut c, mut s) = sides(A, A);
        s.refuse(&err!(Resource, "busy"));
        assert_eq!(pump(&mut s, &mut c).unwrap_err().kind(), ErrorKind::Resource);
        let (mut c, mut s) = proved();
        s.refuse(&err!(Plugin, "eth0 is down"));
        pump(&mut s, &mut c).unwrap();
        let Some(Message::Abort(verdict)) = c.receive() else { panic!("no abort") };
        assert_eq!(verdict.result().unwrap_err().kind(), ErrorKind::Plugin);
    }

    #[test]
    fn a_proved_peer_that_talks_too_much_is_cut_short() {
        let (mut c, mut s) = proved();
        (0..5).for_each(|_| c.send(&offer(1)).unwrap());
        let left = pump(&mut c, &mut s).unwrap();
        assert!(!left.is_empty() && s.wants() == 0 && s.messages.len() == MAX_WAITING);
        // In one record, and after the last word.
        for messages in [vec![offer(1); 3], vec![Message::Ready(Verdict::ok(), vec![0]), offer(1)]] {
            let (mut c, mut s) = proved();
            let mut plain = Vec::new();
            messages.iter().for_each(|m| setup::encode(m, &mut plain));
            if let Stage::Proved(outcome) = &mut c.stage {
                outcome.session.seal(&plain, &mut c.out).unwrap();
            }
            assert_eq!(pump(&mut c, &mut s).unwrap_err().kind(), ErrorKind::Protocol);
        }
        // Lengths that no message has, and records that nobody sealed.
        let (_, mut s) = proved();
        s.input(&[9, 0]).unwrap();
        assert!(s.wants() <= MAX_RECORD && s.input(&vec![0; s.wants()]).is_err());
    }
}
