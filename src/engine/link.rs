//! The control connection while it is set up, as bytes in and bytes out: the handshake, then messages. Knows nothing of sockets.

use crate::status::{bail, Error, ErrorKind, Result};
use crate::wire::handshake_v1::{compatible, get_text, prove, put_text, verify, Handle, Hello, Proof, HELLO_BYTES};
use std::collections::VecDeque;

/// Longest text of a verdict.
const TEXT: usize = 1024;
const VERDICT: usize = 256;
const HEADER: usize = 5;
/// Longest message: 64 channels of two plugins with names.
const MAX_MESSAGE: usize = 64 << 10;
const OFFER: u8 = 1;
const READY: u8 = 2;
const NIC_NAME: usize = 32;

/// A channel's listen comm, as the peer is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Offer {
    pub nic: String,
    pub handle: Handle,
}

/// What the sides tell each other after the handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// A side's listen comms; those of one plugin after those of the other.
    Offer(Vec<Offer>),
    /// A side's channels are up, or the set-up has failed there.
    Ready(Result<()>),
}

/// The part of the wire protocol that a set-up needs.
pub(crate) trait Link {
    /// Most bytes that may be read from the peer now; none once everything was heard.
    fn wants(&self) -> usize;
    /// Takes bytes of the peer, at most as many as wanted.
    ///
    /// # Errors
    /// `Protocol`, `Auth`, or the peer's refusal.
    fn input(&mut self, bytes: &[u8]) -> Result<()>;
    /// Appends what is to be sent.
    fn output(&mut self, out: &mut Vec<u8>);
    /// The peer's hello, once the handshake has proved it.
    fn proved(&self) -> Option<&Hello>;
    /// Queues a message. Before the proof only a failure can be told.
    fn send(&mut self, message: &Message);
    /// The peer's next message.
    fn receive(&mut self) -> Option<Message>;
}

enum Expect {
    Hello,
    Verdict,
    TheirHello,
    TheirProof,
    ProofVerdict,
    Messages,
    Nothing,
}

/// The handshake in clear with a proof of the key, then messages in clear.
pub(crate) struct ClearLink {
    ours: Hello,
    key: Option<Vec<u8>>,
    connecting: bool,
    expect: Expect,
    theirs: Option<Hello>,
    proved: bool,
    input: Vec<u8>,
    out: Vec<u8>,
    messages: VecDeque<Message>,
}

fn verdict(outcome: &Result<()>) -> Vec<u8> {
    let (code, text) = match outcome {
        Ok(()) => (0, String::new()),
        Err(e) => (e.code(), e.to_string()),
    };
    let mut out = code.to_le_bytes().to_vec();
    put_text(&mut out, &text, VERDICT - 4);
    out
}

fn read_verdict(b: &[u8]) -> Result<()> {
    let Some((code, text)) = b.split_first_chunk::<4>() else { bail!(Protocol, "a verdict of {} bytes", b.len()) };
    match i32::from_le_bytes(*code) {
        0 => Ok(()),
        code => Err(Error::new(ErrorKind::from_code(code), format_args!("refused by the peer: {}", printable(&get_text(text))))),
    }
}

/// What a peer says goes to the log: no control characters.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

impl ClearLink {
    pub(crate) fn new(ours: Hello, key: Option<Vec<u8>>, connecting: bool) -> ClearLink {
        let out = if connecting { ours.encode() } else { Vec::new() };
        let expect = if connecting { Expect::Verdict } else { Expect::Hello };
        ClearLink {
            ours,
            key,
            connecting,
            expect,
            theirs: None,
            proved: false,
            input: Vec::new(),
            out,
            messages: VecDeque::new(),
        }
    }

    /// Bytes of the next piece that makes sense as a whole.
    fn piece(&self) -> usize {
        match self.expect {
            Expect::Hello | Expect::TheirHello => HELLO_BYTES,
            Expect::Verdict | Expect::ProofVerdict => VERDICT,
            Expect::TheirProof => size_of::<Proof>(),
            Expect::Messages if self.messages.len() >= 2 => 0,
            Expect::Messages => match self.input.first_chunk::<HEADER>() {
                Some([_, len @ ..]) => HEADER + u32::from_le_bytes(*len) as usize,
                None => HEADER,
            },
            Expect::Nothing => 0,
        }
    }

    fn finished(&mut self) {
        self.proved = true;
        self.expect = Expect::Messages;
    }

    fn take(&mut self, piece: &[u8]) -> Result<()> {
        match self.expect {
            Expect::Hello => self.listening_hello(piece),
            Expect::Verdict => {
                read_verdict(piece)?;
                self.expect = Expect::TheirHello;
                Ok(())
            }
            Expect::TheirHello => {
                let theirs = Hello::decode(&piece.try_into().map_err(|_| short())?)?;
                compatible(&self.ours, &theirs)?;
                self.theirs = Some(theirs);
                match self.key {
                    Some(_) => self.expect = Expect::TheirProof,
                    None => self.finished(),
                }
                Ok(())
            }
            Expect::TheirProof => self.check_proof(&piece.try_into().map_err(|_| short())?),
            Expect::ProofVerdict => {
                read_verdict(piece)?;
                match self.connecting {
                    true => self.finished(),
                    false => self.expect = Expect::TheirProof,
                }
                Ok(())
            }
            Expect::Messages => self.message(piece),
            Expect::Nothing => Ok(()),
        }
    }

    fn listening_hello(&mut self, piece: &[u8]) -> Result<()> {
        let theirs = Hello::decode(&piece.try_into().map_err(|_| short())?);
        let outcome = theirs.as_ref().map_err(Error::clone).and_then(|theirs| compatible(&self.ours, theirs));
        self.out.extend(verdict(&outcome));
        outcome?;
        let theirs = theirs?;
        self.out.extend(self.ours.encode());
        if let Some(key) = &self.key {
            self.out.extend(prove(key, b"listening", &theirs, &self.ours)?);
            self.expect = Expect::ProofVerdict;
        }
        self.theirs = Some(theirs);
        if self.key.is_none() {
            self.finished();
        }
        Ok(())
    }

    fn check_proof(&mut self, proof: &Proof) -> Result<()> {
        let (Some(key), Some(theirs)) = (&self.key, &self.theirs) else { bail!(Internal, "a proof without a key") };
        let outcome = match self.connecting {
            true => verify(key, b"listening", &self.ours, theirs, proof),
            false => verify(key, b"connecting", theirs, &self.ours, proof),
        };
        self.out.extend(verdict(&outcome));
        outcome?;
        if self.connecting {
            let own = prove(key, b"connecting", &self.ours, theirs)?;
            self.out.extend(own);
            self.expect = Expect::ProofVerdict;
        } else {
            self.finished();
        }
        Ok(())
    }

    fn message(&mut self, piece: &[u8]) -> Result<()> {
        let Some(([kind, ..], body)) = piece.split_first_chunk::<HEADER>() else { return Err(short()) };
        let message = match *kind {
            OFFER => Message::Offer(read_offers(body)?),
            READY => {
                self.expect = Expect::Nothing;
                Message::Ready(read_verdict(body))
            }
            other => bail!(Protocol, "message {other} during the set-up"),
        };
        self.messages.push_back(message);
        Ok(())
    }
}

fn short() -> Error {
    crate::status::err!(Protocol, "a message that is too short")
}

fn read_offers(body: &[u8]) -> Result<Vec<Offer>> {
    let one = NIC_NAME + size_of::<Handle>();
    if body.len() % one != 0 {
        bail!(Protocol, "an offer of {} bytes", body.len());
    }
    let read = |b: &[u8]| -> Result<Offer> {
        let handle = b[NIC_NAME..].try_into().map_err(|_| short())?;
        Ok(Offer { nic: printable(&get_text(&b[..NIC_NAME])), handle })
    };
    body.chunks_exact(one).map(read).collect()
}

impl Link for ClearLink {
    fn wants(&self) -> usize {
        self.piece().saturating_sub(self.input.len())
    }

    fn input(&mut self, bytes: &[u8]) -> Result<()> {
        self.input.extend_from_slice(bytes);
        if matches!(self.expect, Expect::Hello) && !Hello::plausible(&self.input[..self.input.len().min(8)]) {
            bail!(Protocol, "does not speak this protocol");
        }
        let piece = self.piece();
        if piece > MAX_MESSAGE {
            bail!(Protocol, "a message of {piece} bytes during the set-up");
        }
        // The header of a message says how much more belongs to it.
        if piece == 0 || self.input.len() < piece {
            return Ok(());
        }
        let whole = std::mem::take(&mut self.input);
        self.take(&whole)
    }

    fn output(&mut self, out: &mut Vec<u8>) {
        out.append(&mut self.out);
    }

    fn proved(&self) -> Option<&Hello> {
        self.theirs.as_ref().filter(|_| self.proved)
    }

    fn send(&mut self, message: &Message) {
        let (kind, body) = match message {
            _ if !self.proved => return,
            Message::Offer(offers) => {
                let mut body = Vec::new();
                for offer in offers {
                    put_text(&mut body, &offer.nic, NIC_NAME);
                    body.extend_from_slice(&offer.handle);
                }
                (OFFER, body)
            }
            Message::Ready(outcome) => {
                let (code, text) = outcome.as_ref().map_or_else(|e| (e.code(), e.to_string()), |()| (0, String::new()));
                let mut body = code.to_le_bytes().to_vec();
                body.extend(text.bytes().take(TEXT));
                (READY, body)
            }
        };
        self.out.push(kind);
        self.out.extend((body.len() as u32).to_le_bytes());
        self.out.extend(body);
    }

    fn receive(&mut self) -> Option<Message> {
        self.messages.pop_front()
    }
}
