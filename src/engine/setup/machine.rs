//! One connection set-up as a state machine: what it waits for, what comes next, when it has taken too long. Time is passed in,
//! bytes go through its link; no sockets, plugins or threads.

use super::control::{Link, Message, Offers, Ready};
use crate::status::{bail, err, Error, Result};
use crate::wire::join::Join;
use std::time::{Duration, Instant};

/// How long a set-up that joins a connection may take.
pub(super) const JOINED: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The handshake is in progress; no message of the peer is acted on.
    Proving,
    /// Authenticated; waits to be admitted.
    Proved,
    /// Our offer is sent; waits for the peer's.
    Offered,
    /// Channels are coming up.
    Raising,
    /// Our channels are up; waits for the peer's.
    Raised,
    Ended,
}

/// What the owner of a set-up has to do next.
#[derive(Debug)]
pub(crate) enum Next {
    /// Nothing, until the peer sends more or time passes.
    Wait,
    /// The peer is authenticated: open listen comms and call [`Setup::offer`], or [`Setup::fail`].
    Admit,
    /// Bring up channels to these offers, and call [`Setup::raised`].
    Raise(Offers),
    /// The peer's channels that are up, while ours still come up: stop waiting for any others.
    PeerHas(Ready),
    /// Both engines are done; these channels of the peer are up. Send what is left and build the connection.
    Finish(Ready),
}

/// The state machine.
pub(crate) struct Setup<L> {
    pub link: L,
    stage: Stage,
    /// Deadline of the handshake.
    proof_by: Instant,
    /// Deadline of the set-up.
    deadline: Instant,
    /// When bytes last arrived.
    received: Instant,
    /// Some bytes have arrived.
    spoke: bool,
    /// The peer's offer, if it came before ours was sent.
    early: Option<Offers>,
    /// The peer's channels that are up, once it has said so.
    theirs: Option<Ready>,
    /// They were returned as [`Next::PeerHas`].
    announced: bool,
}

impl<L: Link> Setup<L> {
    pub(crate) fn new(link: L, now: Instant, proof_by: Instant, deadline: Instant) -> Setup<L> {
        Setup {
            link,
            stage: Stage::Proving,
            proof_by: proof_by.min(deadline),
            deadline,
            received: now,
            spoke: false,
            early: None,
            theirs: None,
            announced: false,
        }
    }

    /// Whether the handshake is not complete.
    pub(crate) fn is_unauthenticated(&self) -> bool {
        self.stage == Stage::Proving
    }

    /// Whether the peer has sent nothing at all.
    pub(crate) fn is_silent(&self) -> bool {
        !self.spoke
    }

    /// Since when it has waited for the peer alone; `None` while this engine has work to do.
    pub(crate) fn waits_since(&self) -> Option<Instant> {
        matches!(self.stage, Stage::Offered | Stage::Raised | Stage::Raising).then_some(self.received)
    }

    /// The next deadline.
    pub(crate) fn deadline(&self) -> Instant {
        if self.is_unauthenticated() {
            self.proof_by
        } else {
            self.deadline
        }
    }

    /// Takes bytes from the peer.
    ///
    /// # Errors
    /// `Protocol`, `Auth`, or the peer's refusal.
    pub(crate) fn received(&mut self, bytes: &[u8], now: Instant) -> Result<()> {
        self.received = now;
        self.spoke = true;
        self.link.input(bytes)
    }

    /// The error when the peer closes the connection.
    pub(crate) fn hung_up(&self) -> Error {
        err!(RemoteDisconnect, "the peer closed the connection {}", self.doing())
    }

    fn doing(&self) -> &'static str {
        match self.stage {
            Stage::Proving => "during the handshake",
            Stage::Proved | Stage::Offered => "before it offered channels",
            Stage::Raising => "while channels were coming up",
            Stage::Raised | Stage::Ended => "before its channels were up",
        }
    }

    /// The next action. Call it after every input and whenever time has passed.
    ///
    /// # Errors
    /// `TimedOut`, `Protocol`, or why the peer gave up.
    pub(crate) fn next(&mut self, now: Instant) -> Result<Next> {
        if self.stage == Stage::Proving && self.link.proved().is_some() {
            self.stage = Stage::Proved;
        }
        while let Some(message) = self.link.receive() {
            match message {
                Message::Abort(e) => return Err(e),
                Message::Ready(up) => self.theirs = Some(up),
                Message::Offer(offers) if self.early.is_none() && matches!(self.stage, Stage::Proved | Stage::Offered) => {
                    self.early = Some(offers);
                }
                Message::Offer(_) => {
                    bail!(
                        Protocol,
                        "the peer offered channels {}",
                        if self.is_unauthenticated() { "before its proof" } else { "twice" }
                    )
                }
            }
        }
        if self.theirs.is_some() && !matches!(self.stage, Stage::Raising | Stage::Raised | Stage::Ended) {
            // It cannot have connected to channels that it does not know of, or without offering its own.
            if self.stage == Stage::Proved || self.early.is_none() {
                bail!(Protocol, "the peer says that its channels are up before they can be");
            }
        }
        if now >= self.deadline() {
            let what = self.waiting_for();
            bail!(TimedOut, "{what} in time");
        }
        Ok(match self.stage {
            Stage::Proved if self.waits_for_join() => Next::Wait,
            Stage::Proved => Next::Admit,
            Stage::Offered => match self.early.take() {
                Some(offers) => {
                    self.stage = Stage::Raising;
                    Next::Raise(offers)
                }
                None => Next::Wait,
            },
            Stage::Raising if !self.announced => match &self.theirs {
                Some(theirs) => {
                    self.announced = true;
                    Next::PeerHas(theirs.clone())
                }
                None => Next::Wait,
            },
            Stage::Raised => match self.theirs.take() {
                Some(theirs) => {
                    self.stage = Stage::Ended;
                    Next::Finish(theirs)
                }
                None => Next::Wait,
            },
            Stage::Proving | Stage::Raising | Stage::Ended => Next::Wait,
        })
    }

    /// The peer wants to join a connection, and has not said which one.
    fn waits_for_join(&self) -> bool {
        self.early.is_none() && self.link.proved().is_some_and(|agreed| !agreed.connecting && agreed.peer.hello.joins)
    }

    /// What the peer says of the connection that it wants to join; [`Next::Admit`] comes after it.
    pub(crate) fn join(&self) -> Option<&Join> {
        self.early.as_ref().and_then(|offers| offers.join.as_ref())
    }

    /// Brings the deadline forward.
    pub(crate) fn end_by(&mut self, deadline: Instant) {
        self.deadline = self.deadline.min(deadline);
    }

    fn waiting_for(&self) -> &'static str {
        match self.stage {
            Stage::Proving if !self.spoke => "the peer said nothing",
            Stage::Proving => "the peer did not complete the handshake",
            Stage::Proved if self.waits_for_join() => "the peer did not say what it joins",
            Stage::Proved => "too many other set-ups were in progress: this one was not started",
            Stage::Offered => "the peer did not offer channels",
            Stage::Raising => "channels did not come up",
            Stage::Raised | Stage::Ended => "the peer's channels did not come up",
        }
    }

    /// Sends our offer once the listen comms are open.
    pub(crate) fn offer(&mut self, offers: Offers) {
        if self.stage == Stage::Proved {
            self.stage = Stage::Offered;
            self.link.send(&Message::Offer(offers));
        }
    }

    /// Reports which of our channels are up.
    pub(crate) fn raised(&mut self, up: Ready) {
        if self.stage == Stage::Raising {
            self.stage = Stage::Raised;
            self.link.send(&Message::Ready(up));
        }
    }

    /// Reports a failure in this engine to the peer.
    pub(crate) fn fail(&mut self, error: &Error) {
        if self.stage != Stage::Ended {
            self.stage = Stage::Ended;
            self.link.send(&Message::Abort(error.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::setup::control::Agreed;
    use crate::net::setup::Offer;
    use crate::status::ErrorKind;
    use crate::wire::handshake::Peer;
    use crate::wire::hello::tests::sample;
    use crate::wire::keys::Proof;
    use std::collections::VecDeque;
    use std::time::Duration;

    /// Messages without a wire; authenticated after the given number of input bytes.
    struct SimulatedLink {
        agreed: Agreed,
        missing: usize,
        inbox: VecDeque<Message>,
        sent: Vec<Message>,
    }

    impl Link for SimulatedLink {
        fn wants(&self) -> usize {
            1
        }
        fn input(&mut self, bytes: &[u8]) -> Result<()> {
            self.missing = self.missing.saturating_sub(bytes.len());
            Ok(())
        }
        fn output(&mut self, _: &mut Vec<u8>) {}
        fn proved(&self) -> Option<&Agreed> {
            (self.missing == 0).then_some(&self.agreed)
        }
        fn send(&mut self, message: &Message) {
            self.sent.push(message.clone());
        }
        fn receive(&mut self) -> Option<Message> {
            self.inbox.pop_front()
        }
    }

    fn agreed() -> Agreed {
        let terms = sample().agree(&sample()).unwrap();
        let peer = Peer { hello: sample(), engine: [1; 16], proof: Proof::Nothing };
        Agreed { peer, own: sample(), connecting: true, terms }
    }

    fn up(numbers: &[u16]) -> Ready {
        Ready { numbers: numbers.to_vec(), local: true }
    }

    fn offer(n: u8) -> Offers {
        Offers { sets: vec![vec![Offer { nic: "eth0".into(), handle: [n; 128] }]], ..Offers::default() }
    }

    /// The variant's name.
    fn short(x: impl std::fmt::Debug) -> String {
        let text = format!("{x:?}");
        text.split(['(', ' ']).next().unwrap_or_default().to_owned()
    }

    struct World {
        start: Instant,
        setup: Setup<SimulatedLink>,
    }

    impl World {
        fn new() -> World {
            let start = Instant::now();
            let link = SimulatedLink { agreed: agreed(), missing: 3, inbox: VecDeque::new(), sent: Vec::new() };
            let setup = Setup::new(link, start, start + Duration::from_secs(5), start + Duration::from_secs(30));
            World { start, setup }
        }
        fn next(&mut self, millis: u64) -> Result<Next> {
            self.setup.next(self.start + Duration::from_millis(millis))
        }
        fn say(&mut self, message: Message) {
            self.setup.link.inbox.push_back(message);
        }
        fn prove(&mut self) {
            self.setup.received(b"abc", self.start).unwrap();
        }
        fn raise(&mut self) {
            self.prove();
            assert_eq!(short(self.next(1).unwrap()), "Admit");
            self.setup.offer(offer(1));
            self.say(Message::Offer(offer(2)));
            assert!(matches!(self.next(2).unwrap(), Next::Raise(o) if o.sets[0][0].handle == [2; 128]));
        }
    }

    #[test]
    fn it_goes_up_step_by_step() {
        let mut w = World::new();
        assert_eq!(short(w.next(0).unwrap()), "Wait");
        assert!(w.setup.is_unauthenticated() && w.setup.is_silent());
        w.setup.received(b"a", w.start).unwrap();
        assert_eq!(short(w.next(1).unwrap()), "Wait");
        assert!(w.setup.is_unauthenticated() && !w.setup.is_silent());
        w.raise();
        assert_eq!(short(w.next(3).unwrap()), "Wait");
        w.setup.raised(up(&[0]));
        assert_eq!(w.setup.link.sent.iter().map(short).collect::<Vec<_>>(), ["Offer", "Ready"]);
        assert_eq!(short(w.next(4).unwrap()), "Wait");
        w.say(Message::Ready(up(&[0])));
        assert!(matches!(w.next(5).unwrap(), Next::Finish(theirs) if theirs == up(&[0])));
    }

    #[test]
    fn a_faster_peer_is_not_lost() {
        let mut w = World::new();
        w.prove();
        // Its offer arrives while ours waits for admission, its `Ready` while our channels come up.
        w.say(Message::Offer(offer(2)));
        assert_eq!(short(w.next(1).unwrap()), "Admit");
        assert_eq!(short(w.next(2).unwrap()), "Admit");
        w.setup.offer(offer(1));
        assert!(matches!(w.next(3).unwrap(), Next::Raise(o) if o.sets[0][0].handle == [2; 128]));
        w.say(Message::Ready(up(&[0])));
        assert!(matches!(w.next(4).unwrap(), Next::PeerHas(theirs) if theirs == up(&[0])));
        assert_eq!(short(w.next(4).unwrap()), "Wait");
        w.setup.raised(up(&[0]));
        assert!(matches!(w.next(5).unwrap(), Next::Finish(theirs) if theirs == up(&[0])));
    }

    #[test]
    fn a_failure_at_the_peer_ends_it_at_once() {
        let mut w = World::new();
        w.raise();
        w.say(Message::Abort(err!(Plugin, "eth1 is down")));
        let error = w.next(3).unwrap_err();
        assert!(error.kind() == ErrorKind::Plugin && error.to_string().contains("eth1 is down"), "{error}");
    }

    #[test]
    fn a_failure_here_is_sent_once() {
        let mut w = World::new();
        w.raise();
        let error = err!(Plugin, "eth0 is down");
        w.setup.fail(&error);
        w.setup.fail(&error);
        assert_eq!(w.setup.link.sent.iter().map(short).collect::<Vec<_>>(), ["Offer", "Abort"]);
    }

    #[test]
    fn the_handshake_timeout_holds_until_the_proof() {
        let mut w = World::new();
        w.setup.received(b"a", w.start + Duration::from_secs(4)).unwrap();
        assert_eq!(short(w.next(4999).unwrap()), "Wait");
        assert_eq!(w.next(5000).unwrap_err().kind(), ErrorKind::TimedOut);
        let mut w = World::new();
        w.raise();
        assert_eq!(short(w.next(29_999).unwrap()), "Wait");
        assert_eq!(w.next(30_000).unwrap_err().kind(), ErrorKind::TimedOut);
    }

    #[test]
    fn messages_out_of_order_are_violations() {
        let violates = |prepare: &dyn Fn(&mut World)| {
            let mut w = World::new();
            prepare(&mut w);
            assert_eq!(w.next(9).unwrap_err().kind(), ErrorKind::Protocol);
        };
        violates(&|w| {
            w.prove();
            w.say(Message::Ready(up(&[0])));
        });
        // Nothing is accepted from an unauthenticated peer.
        violates(&|w| w.say(Message::Offer(offer(2))));
        violates(&|w| {
            w.raise();
            w.say(Message::Offer(offer(3)));
        });
        violates(&|w| {
            w.prove();
            w.say(Message::Offer(offer(2)));
            w.say(Message::Offer(offer(3)));
        });
        violates(&|w| {
            w.prove();
            w.next(1).unwrap();
            w.setup.offer(offer(1));
            w.say(Message::Ready(up(&[0])));
        });
    }

    #[test]
    fn an_end_of_the_connection_names_the_stage() {
        let mut w = World::new();
        assert!(w.setup.hung_up().to_string().contains("handshake"));
        w.raise();
        assert!(w.setup.hung_up().to_string().contains("while channels were coming up"));
    }
}
