//! The control connection during set-up, as bytes in and bytes out: the handshake, then sealed messages. Knows nothing about
//! sockets.

use crate::host::ProofKeys;
use crate::net::secure::{ChannelKeys, Guard, HalfKeys};
use crate::net::setup::Offer;
use crate::status::{bail, err, Error, Result};
use crate::types::Protect;
use crate::wire::handshake::{Handshake, Outcome, Peer};
use crate::wire::hello::{Hello, Terms};
use crate::wire::join::{Join, Ticket};
use crate::wire::keys::Proof;
use crate::wire::secret::apart;
use crate::wire::session::{Opened, Session, MAX_RECORD};
use crate::wire::setup::{self, Decoded, Invitation, Offered, Verdict};
use std::collections::VecDeque;
use std::net::SocketAddr;

/// Most channels of a set.
pub(crate) const PER_SET: usize = crate::wire::hello::MAX_CHANNELS as usize;
/// Messages decoded ahead: an offer and its outcome.
const AHEAD: usize = 2;

/// The number of a channel in messages: combines its set and its index there.
pub(crate) fn number(set: usize, index: usize) -> u16 {
    (set * PER_SET + index) as u16
}

/// What an engine offers: listen comms by set, and the meeting point for a peer on its host.
#[derive(Clone, Debug, Default)]
pub(crate) struct Offers {
    pub sets: Vec<Vec<Offer>>,
    pub local: Option<Invitation>,
    /// Where a connector may look for this engine once it has lost it.
    pub addresses: Vec<SocketAddr>,
    /// The connection that the set-up joins.
    pub join: Option<Join>,
}

/// The numbers of the channels that are up, and whether the engine has met its peer on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ready {
    pub numbers: Vec<u16>,
    pub local: bool,
}

/// Messages between the engines after the handshake.
#[derive(Clone, Debug)]
pub(crate) enum Message {
    /// The sender's offer.
    Offer(Offers),
    /// The sender's channels that are up.
    Ready(Ready),
    /// The sender gives up.
    Abort(Error),
}

/// What the handshake has proved and agreed.
#[derive(Clone, Debug)]
pub(crate) struct Agreed {
    pub peer: Peer,
    /// The hello that this engine sent.
    pub own: Hello,
    /// This engine is the connector.
    pub connecting: bool,
    pub terms: Terms,
}

/// The part of the wire protocol that a set-up needs.
pub(crate) trait Link {
    /// How many bytes may be read from the peer now; 0 once its last message has arrived.
    fn wants(&self) -> usize;
    /// Takes bytes from the peer.
    ///
    /// # Errors
    /// `Protocol`, `Auth`, or the peer's refusal.
    fn input(&mut self, bytes: &[u8]) -> Result<()>;
    /// Appends the bytes to send.
    fn output(&mut self, out: &mut Vec<u8>);
    /// The authenticated peer, once the handshake is complete.
    fn proved(&self) -> Option<&Agreed>;
    /// Queues a message. Before authentication only a failure is sent, with no more detail than an unauthenticated peer may see.
    fn send(&mut self, message: &Message);
    /// The peer's next message.
    fn receive(&mut self) -> Option<Message>;
}

/// The encrypted connection after the last message of a set-up.
pub(crate) struct Sealed {
    pub session: Session,
    /// Received bytes that are not decrypted yet.
    pub raw: Vec<u8>,
}

/// The handshake of `wire`, and its session.
pub(crate) struct SealedLink {
    /// Until it is complete and its bytes are sent.
    handshake: Option<Handshake>,
    agreed: Option<Agreed>,
    session: Option<Session>,
    raw: Vec<u8>,
    plain: Vec<u8>,
    out: Vec<u8>,
    messages: VecDeque<Message>,
    /// The last message has arrived; only frames follow.
    received_all: bool,
}

impl SealedLink {
    /// Whether the peer speaks another version of the protocol.
    pub(crate) fn is_of_another_version(&self) -> bool {
        self.handshake.as_ref().is_some_and(Handshake::is_of_another_version)
    }

    pub(crate) fn new(handshake: Handshake) -> SealedLink {
        SealedLink {
            handshake: Some(handshake),
            agreed: None,
            session: None,
            raw: Vec::new(),
            plain: Vec::new(),
            out: Vec::new(),
            messages: VecDeque::new(),
            received_all: false,
        }
    }

    /// Whether the peer's first message is complete and valid.
    pub(crate) fn was_opened(&self) -> bool {
        self.handshake.as_ref().is_none_or(Handshake::was_opened)
    }

    /// Passes bytes to the handshake; returns how many it took.
    fn feed_handshake(&mut self, bytes: &[u8]) -> Result<usize> {
        let Some(handshake) = &mut self.handshake else { return Ok(0) };
        let taken = handshake.input(bytes)?;
        if let Some(Outcome { peer, terms, session }) = handshake.outcome() {
            let (own, connecting) = (handshake.hello().clone(), handshake.connects());
            self.agreed = Some(Agreed { peer, own, connecting, terms });
            self.session = Some(session);
        }
        Ok(taken)
    }

    /// Decrypts and decodes received bytes, a few messages ahead.
    fn open(&mut self) -> Result<()> {
        let Some(session) = &mut self.session else { return Ok(()) };
        while !self.received_all && self.messages.len() < AHEAD {
            match setup::decode(&self.plain)? {
                Decoded::Message(message, n) => {
                    self.plain.drain(..n);
                    self.received_all = !matches!(message, setup::Message::Offer(..));
                    if self.received_all && !self.plain.is_empty() {
                        bail!(Protocol, "{} bytes in the record of the set-up's last message", self.plain.len());
                    }
                    self.messages.push_back(from_wire(message)?);
                }
                Decoded::Need(_) => match session.open(&mut self.raw)? {
                    Opened::Record { plain, consumed } => {
                        self.plain.extend_from_slice(&self.raw[..plain]);
                        self.raw.drain(..consumed);
                    }
                    Opened::Need(_) => break,
                },
            }
        }
        Ok(())
    }

    /// The keys of a channel, by its set and its index there: one for each direction and purpose.
    ///
    /// # Errors
    /// Before authentication.
    pub(crate) fn channel_keys(&self, set: usize, index: usize) -> Result<ChannelKeys> {
        let (Some(session), Some(agreed)) = (&self.session, &self.agreed) else {
            bail!(Internal, "channel keys before the proof")
        };
        let number = |n: usize| u8::try_from(n).map_err(|_| err!(Internal, "channel {index} of set {set}"));
        let (set, index) = (number(set)?, number(index)?);
        let half = |direction| -> Result<HalfKeys> {
            let hello = session.exporter.channel_mac_key(set, index.into(), direction)?;
            let guard = match (agreed.terms.protect, &agreed.peer.proof) {
                (Protect::Off, _) => Guard::None,
                (Protect::Integrity, Proof::Nothing) => Guard::Checksum,
                // A tag alone would cost as much as encryption.
                _ => Guard::Seal(session.exporter.channel_data_key(set, index.into(), direction)?),
            };
            Ok(HalfKeys { hello, guard })
        };
        // One stack for all of them.
        apart(|| Ok(ChannelKeys { send: half(session.ours)?, recv: half(session.ours.other())? }))
    }

    /// The keys that prove this session to a peer on this host.
    ///
    /// # Errors
    /// Before authentication.
    pub(crate) fn local_keys(&self) -> Result<ProofKeys> {
        let session = self.session()?;
        let key = |direction| session.exporter.local_key(direction);
        Ok(ProofKeys { send: key(session.ours)?, recv: key(session.ours.other())? })
    }

    fn session(&self) -> Result<&Session> {
        self.session.as_ref().ok_or_else(|| err!(Internal, "keys before the proof"))
    }

    /// What this engine says of the connection that the set-up joins.
    ///
    /// # Errors
    /// Before authentication.
    pub(crate) fn join(&self, ticket: &Ticket, number: u32, channels: Vec<u16>, opened: Option<u64>) -> Result<Join> {
        ticket.join(self.session()?, number, channels, opened)
    }

    /// Checks what the peer says of it.
    ///
    /// # Errors
    /// `Auth`.
    pub(crate) fn check_join(&self, ticket: &Ticket, join: &Join) -> Result<()> {
        ticket.check(self.session()?, join)
    }

    /// The parts that the connection takes over.
    pub(crate) fn finish(self) -> Option<(Agreed, Sealed)> {
        Some((self.agreed?, Sealed { session: self.session?, raw: self.raw }))
    }
}

fn from_wire(message: setup::Message) -> Result<Message> {
    let offer = |o: Offered| Offer { nic: o.nic, handle: o.handle };
    Ok(match message {
        setup::Message::Offer(sets, local, addresses, join) => {
            let sets = sets.into_iter().map(|s| s.into_iter().map(offer).collect()).collect();
            Message::Offer(Offers { sets, local, addresses, join })
        }
        setup::Message::Ready(verdict, numbers, local) => match verdict.result() {
            Ok(()) => Message::Ready(Ready { numbers, local }),
            Err(e) => Message::Abort(e),
        },
        setup::Message::Abort(verdict) => match verdict.result() {
            Err(e) => Message::Abort(e),
            Ok(()) => bail!(Protocol, "the peer gave up without a reason"),
        },
    })
}

fn to_wire(message: &Message) -> setup::Message {
    let offered = |o: &Offer| Offered { nic: o.nic.clone(), handle: o.handle };
    match message {
        Message::Offer(Offers { sets, local, addresses, join }) => {
            let sets = sets.iter().map(|s| s.iter().map(offered).collect()).collect();
            setup::Message::Offer(sets, *local, addresses.clone(), join.clone())
        }
        Message::Ready(Ready { numbers, local }) => setup::Message::Ready(Verdict::ok(), numbers.clone(), *local),
        Message::Abort(e) => setup::Message::Abort(Verdict::from(e)),
    }
}

impl Link for SealedLink {
    fn wants(&self) -> usize {
        match self.received_all || self.messages.len() >= AHEAD {
            true => 0,
            false => MAX_RECORD.saturating_sub(self.raw.len()),
        }
    }

    fn input(&mut self, bytes: &[u8]) -> Result<()> {
        let taken = if self.session.is_none() { self.feed_handshake(bytes)? } else { 0 };
        self.raw.extend_from_slice(&bytes[taken..]);
        self.open()
    }

    fn output(&mut self, out: &mut Vec<u8>) {
        if let Some(handshake) = &mut self.handshake {
            let bytes = handshake.output();
            let n = bytes.len();
            out.extend_from_slice(bytes);
            handshake.sent(n);
            if self.session.is_some() {
                self.handshake = None;
            }
        }
        out.append(&mut self.out);
    }

    fn proved(&self) -> Option<&Agreed> {
        self.agreed.as_ref()
    }

    fn send(&mut self, message: &Message) {
        match (&mut self.session, &mut self.handshake, message) {
            (Some(session), _, message) => {
                let mut plain = Vec::new();
                setup::encode(&to_wire(message), &mut plain);
                // Nothing is sent unencrypted; the set-up then ends at its deadline.
                if let Err(e) = session.seal(&plain, &mut self.out) {
                    log::error!("a message of a set-up was not sent: {e}");
                }
            }
            (None, Some(handshake), Message::Abort(e)) => handshake.refuse(e),
            _ => {}
        }
    }

    fn receive(&mut self) -> Option<Message> {
        let message = self.messages.pop_front();
        // There is room again for bytes that waited.
        if let Err(e) = self.open() {
            self.messages.push_back(Message::Abort(e));
            self.received_all = true;
        }
        message
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{err, ErrorKind};
    use crate::wire::handshake::Identity;
    use crate::wire::hello::tests::sample;
    use crate::wire::keys::Keys;
    use std::sync::Arc;

    fn both(keys: [Keys; 2]) -> [SealedLink; 2] {
        let identity = || Arc::new(Identity::generate().unwrap());
        let [a, b] = keys.map(Arc::new);
        [
            SealedLink::new(Handshake::connecting(&identity(), sample(), a).unwrap()),
            SealedLink::new(Handshake::listening(&identity(), sample(), b).unwrap()),
        ]
    }

    /// Passes bytes in pieces of `cut` until nothing moves; returns the error of each engine.
    fn run(links: &mut [SealedLink; 2], cut: usize) -> [Result<()>; 2] {
        let mut outcome = [Ok(()), Ok(())];
        loop {
            let mut moved = false;
            for from in 0..2 {
                let mut bytes = Vec::new();
                links[from].output(&mut bytes);
                for piece in bytes.chunks(cut) {
                    moved = true;
                    if outcome[1 - from].is_ok() {
                        outcome[1 - from] = links[1 - from].input(piece);
                    }
                }
            }
            if !moved {
                return outcome;
            }
        }
    }

    fn offers(n: usize) -> Offers {
        let offer = |i| Offer { nic: format!("eth{i}"), handle: [i as u8; 128] };
        let local = Some(Invitation { host: [7; 16], name: [8; 16] });
        Offers { sets: vec![(0..n).map(offer).collect(), Vec::new()], local, ..Offers::default() }
    }

    #[test]
    fn messages_arrive_whatever_the_pieces_and_later_bytes_are_kept() {
        for cut in [1, 7, 1000, 1 << 20] {
            let mut links = both([Keys::none(), Keys::none()]);
            assert_eq!(run(&mut links, cut), [Ok(()), Ok(())]);
            assert!(links.iter().all(|l| l.proved().is_some()));
            links[0].send(&Message::Offer(offers(64)));
            links[0].send(&Message::Ready(Ready { numbers: vec![0, 63, 64], local: true }));
            if let Some(session) = &mut links[0].session {
                session.seal(b"a frame", &mut links[0].out).unwrap();
            }
            assert_eq!(run(&mut links, cut), [Ok(()), Ok(())]);
            let [_, mut link] = links;
            assert!(
                matches!(link.receive(), Some(Message::Offer(o)) if o.sets[0].len() == 64 && o.sets[0][63].nic == "eth63" && o.local.is_some())
            );
            assert!(matches!(link.receive(), Some(Message::Ready(up)) if up == Ready { numbers: vec![0, 63, 64], local: true }));
            assert_eq!(link.wants(), 0);
            let mut rest = link.finish().unwrap().1;
            assert!(matches!(rest.session.open(&mut rest.raw), Ok(Opened::Record { plain: 7, .. })));
            assert!(rest.raw.starts_with(b"a frame"));
        }
    }

    #[test]
    fn without_the_key_nothing_is_proved() {
        let key = |text: &str| Keys::parse(text.as_bytes()).unwrap();
        let mut links = both([key("0123456789abcdef"), key("fedcba9876543210")]);
        let outcome = run(&mut links, 100);
        assert!(outcome.iter().all(|o| o.as_ref().is_err_and(|e| e.kind() == ErrorKind::Auth)), "{outcome:?}");
        assert!(links.iter().all(|l| l.proved().is_none()));
    }

    #[test]
    fn a_flood_of_messages_is_not_read() {
        let mut links = both([Keys::none(), Keys::none()]);
        assert_eq!(run(&mut links, 4096), [Ok(()), Ok(())]);
        let mut bytes = Vec::new();
        for _ in 0..100 {
            links[0].send(&Message::Offer(offers(64)));
        }
        links[0].output(&mut bytes);
        let link = &mut links[1];
        let mut at = 0;
        while link.wants() > 0 {
            let n = link.wants().min(4096);
            link.input(&bytes[at..at + n]).unwrap();
            at += n;
        }
        assert!(link.messages.len() <= AHEAD && link.raw.len() <= MAX_RECORD && at < bytes.len() / 4, "{at} of {}", bytes.len());
    }

    #[test]
    fn a_refusal_before_the_proof_reaches_the_peer() {
        let mut links = both([Keys::none(), Keys::none()]);
        let mut bytes = Vec::new();
        links[0].output(&mut bytes);
        links[1].input(&bytes).unwrap();
        links[1].send(&Message::Abort(err!(Resource, "too many")));
        let outcome = run(&mut links, 4096);
        assert!(outcome[0].as_ref().is_err_and(|e| e.kind() == ErrorKind::Resource), "{outcome:?}");
    }
}
