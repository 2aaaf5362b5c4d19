//! The handshake of a control connection: the protocol version, proof of identity and of the pre-shared key, and the keys of
//! everything after. Bytes in, bytes out: it knows no sockets and no clocks. docs/protocol.md shows the messages.
//!
//! The cryptography is Noise XXpsk3 (`snow`): ephemeral keys first, then the two engines' own keys, and the pre-shared key in the
//! connector's proof. The listener sends nothing that depends on a key before it has checked that proof, and an eavesdropper gets
//! nothing to test a guessed key with. Without a key the same messages run with a public constant.

use super::hello::{Hello, Terms, MAX_HELLO};
use super::keys::{KeySecrets, Keys, Proof};
use super::primitives::{self, Primitives, KEY, TAG};
use super::secret::{apart, guard, zeroed, Guarded};
use super::session::{Direction, Opened, Session, RECORD_OVERHEAD};
use super::setup::{self, Verdict};
use super::text;
use crate::status::{bail, err, Error, ErrorKind, Result, StatusCode, UCCL_OK};
use ring::hmac;
use snow::HandshakeState;
use std::sync::Arc;
use zeroize::{Zeroize, Zeroizing};

/// Version of the control protocol. Engines of different versions refuse each other.
pub(crate) const VERSION: u16 = 3;
const MAGIC: [u8; 8] = *b"UCCLTCPX";
const PATTERN: &str = "Noise_XXpsk3_25519_AESGCM_SHA256";
/// Position of the pre-shared key in the pattern.
const PSK: usize = 3;
const HEADER_BYTES: usize = 16;
const SELECTOR: usize = 32;
/// Pads the opening to the length of a version 1 hello, since listeners of version 1 answer only after that many bytes.
const PADDING: usize = 72;
const OPENING: usize = KEY + PADDING + TAG;
const ANSWER: usize = KEY + KEY + TAG + TAG;
const MAX_REFUSAL_TEXT: usize = 240;
const FLAG_KEY: u8 = 1;
/// Most bytes of one message, and so the memory that a peer can use before it has proved itself.
pub(crate) const MAX_MESSAGE: usize = HEADER_BYTES + 1024;

/// The messages, in order. Openings and refusals have the same numbers in all versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Opening = 1,
    Answer = 2,
    Proof = 3,
    Welcome = 4,
    Refusal = 255,
}

impl Kind {
    /// Bytes of the body.
    fn body(self) -> std::ops::RangeInclusive<usize> {
        match self {
            Kind::Opening => OPENING..=OPENING,
            Kind::Answer => ANSWER..=ANSWER,
            Kind::Proof => SELECTOR + KEY + TAG + TAG..=SELECTOR + KEY + TAG + MAX_HELLO + TAG,
            Kind::Welcome => RECORD_OVERHEAD + 4..=RECORD_OVERHEAD + 4 + setup::MAX_TEXT,
            Kind::Refusal => 8..=8 + MAX_REFUSAL_TEXT,
        }
    }
}

/// The plaintext header in front of each message. Magic, version, kind and length have the same position in all versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    version: u16,
    kind: u8,
    flags: u8,
    body: u16,
    zero: u16,
}

impl Header {
    fn new(kind: Kind, keyed: bool, body: usize) -> Header {
        Header { version: VERSION, kind: kind as u8, flags: if keyed { FLAG_KEY } else { 0 }, body: body as u16, zero: 0 }
    }

    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[..8].copy_from_slice(&MAGIC);
        out[8..10].copy_from_slice(&self.version.to_le_bytes());
        out[10] = self.kind;
        out[11] = self.flags;
        out[12..14].copy_from_slice(&self.body.to_le_bytes());
        out[14..].copy_from_slice(&self.zero.to_le_bytes());
        out
    }

    /// Decodes the header in these bytes, whose magic was checked.
    fn decode(b: &[u8; HEADER_BYTES]) -> Header {
        let u16_at = |at: usize| u16::from_le_bytes([b[at], b[at + 1]]);
        Header { version: u16_at(8), kind: b[10], flags: b[11], body: u16_at(12), zero: u16_at(14) }
    }
}

/// Whether a stream that starts with these bytes can be an opening. Lets a listener drop other clients early.
pub(crate) fn plausible(prefix: &[u8]) -> bool {
    prefix.iter().zip(&MAGIC).all(|(a, b)| a == b)
}

/// An engine's own key pair. The public half names the engine instance, and only the holder of the private half can prove the
/// name.
#[derive(Debug)]
pub(crate) struct Identity {
    private: Guarded<[u8; KEY]>,
    public: [u8; KEY],
    engine: [u8; 16],
}

impl Identity {
    /// Generates the identity of one engine instance.
    pub(crate) fn generate() -> Result<Identity> {
        let mut private = zeroed::<KEY>()?;
        getrandom::fill(&mut *private).map_err(|e| err!(Resource, "no random bytes: {e}"))?;
        let public = apart(|| Ok(primitives::public_key(&private)))?;
        Ok(Identity { private, public, engine: engine_id(&public) })
    }

    /// The name of the engine instance.
    pub(crate) fn engine(&self) -> [u8; 16] {
        self.engine
    }
}

fn engine_id(public: &[u8]) -> [u8; 16] {
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    context.update(b"uccl engine");
    context.update(public);
    let digest = context.finish();
    std::array::from_fn(|i| digest.as_ref()[i])
}

/// An error of the library, not of the peer.
fn broken(e: &snow::Error) -> Error {
    err!(Internal, "handshake: {e}")
}

fn damaged() -> Error {
    err!(Protocol, "the handshake was changed in transit")
}

/// The peer, as far as it has proved itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    /// The peer's hello.
    pub hello: Hello,
    /// The peer's engine instance, proved.
    pub engine: [u8; 16],
    /// The key that the peer proved.
    pub proof: Proof,
}

/// The result of a completed handshake.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// The peer.
    pub peer: Peer,
    /// What both engines agreed on.
    pub terms: Terms,
    /// The encrypted stream that follows.
    pub session: Session,
}

/// What this engine waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Opening,
    Answer,
    Proof,
    Welcome,
    Done,
}

/// One engine's part in a handshake.
pub(crate) struct Handshake {
    step: Step,
    connecting: bool,
    hello: Hello,
    keys: Arc<Keys>,
    identity: Arc<Identity>,
    /// Made once the opening's header is known, since it covers that header.
    noise: Option<Guarded<HandshakeState>>,
    /// The message that is arriving.
    rx: Vec<u8>,
    tx: Vec<u8>,
    sent: usize,
    /// The plaintext headers of opening and answer.
    context: Vec<u8>,
    /// The connector's, between proof and welcome.
    session: Option<(Session, Proof, [u8; 16])>,
    outcome: Option<Outcome>,
    failed: Option<Error>,
}

impl std::fmt::Debug for Handshake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handshake").field("step", &self.step).field("failed", &self.failed).finish_non_exhaustive()
    }
}

impl Handshake {
    /// The connector's part; its first bytes are ready to be sent.
    ///
    /// # Errors
    /// When the hello is out of range, or memory or random bytes are missing.
    pub(crate) fn connecting(identity: &Arc<Identity>, hello: Hello, keys: Arc<Keys>) -> Result<Handshake> {
        let mut handshake = Handshake::new(Step::Answer, identity, hello, keys)?;
        apart(|| handshake.open())?;
        Ok(handshake)
    }

    /// The listener's part. It costs next to nothing until a whole opening has arrived.
    ///
    /// # Errors
    /// When the hello is out of range.
    pub(crate) fn listening(identity: &Arc<Identity>, hello: Hello, keys: Arc<Keys>) -> Result<Handshake> {
        Handshake::new(Step::Opening, identity, hello, keys)
    }

    fn new(step: Step, identity: &Arc<Identity>, hello: Hello, keys: Arc<Keys>) -> Result<Handshake> {
        hello.check()?;
        Ok(Handshake {
            connecting: matches!(step, Step::Answer),
            step,
            hello,
            keys,
            identity: identity.clone(),
            noise: None,
            rx: Vec::new(),
            tx: Vec::new(),
            sent: 0,
            context: Vec::new(),
            session: None,
            outcome: None,
            failed: None,
        })
    }

    /// Whether this is the connector.
    pub(crate) fn connects(&self) -> bool {
        self.connecting
    }

    /// For a listener: whether the peer's first message was complete.
    pub(crate) fn was_opened(&self) -> bool {
        self.step != Step::Opening
    }

    /// The hello of this engine.
    pub(crate) fn hello(&self) -> &Hello {
        &self.hello
    }

    fn keyed(&self) -> bool {
        !self.keys.is_empty()
    }

    fn open(&mut self) -> Result<()> {
        let header = Header::new(Kind::Opening, self.keyed(), OPENING).encode();
        let mut noise = self.start(&header, true)?;
        self.context.extend_from_slice(&header);
        write(&mut noise, &header, &[0; PADDING], &mut self.tx)?;
        self.noise = Some(noise);
        Ok(())
    }

    fn start(&self, opening: &[u8; HEADER_BYTES], initiator: bool) -> Result<Guarded<HandshakeState>> {
        let params = PATTERN.parse().map_err(|e| broken(&e))?;
        let ready = snow::Builder::with_resolver(params, Box::new(Primitives { own: self.identity.public }))
            .local_private_key(&*self.identity.private)
            .and_then(|b| b.prologue(opening))
            .and_then(|b| if initiator { b.build_initiator() } else { b.build_responder() });
        guard(ready.map_err(|e| broken(&e))?)
    }

    /// Takes bytes of the peer. Returns how many of them belonged to the handshake; the rest, after its end, belongs to the
    /// session.
    ///
    /// # Errors
    /// When the handshake failed, here or at the peer. Send what [`Handshake::output`] then holds before closing the connection:
    /// it gives the peer the reason. Every later call repeats the error.
    pub(crate) fn input(&mut self, bytes: &[u8]) -> Result<usize> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let mut at = 0;
        while at < bytes.len() && self.step != Step::Done {
            let n = self.wants().min(bytes.len() - at);
            self.rx.extend_from_slice(&bytes[at..at + n]);
            at += n;
            if let Err(error) = self.advance() {
                self.fail(&error);
                return Err(error);
            }
        }
        Ok(at)
    }

    /// Bytes of the peer that are missing from its next message or header; 0 after the end.
    pub(crate) fn wants(&self) -> usize {
        if self.failed.is_some() || self.step == Step::Done {
            return 0;
        }
        let whole = match self.rx.first_chunk() {
            Some(header) => HEADER_BYTES + usize::from(Header::decode(header).body),
            None => HEADER_BYTES,
        };
        whole - self.rx.len()
    }

    /// Whether the peer's last message is of another version of this protocol.
    pub(crate) fn is_of_another_version(&self) -> bool {
        plausible(&self.rx) && self.rx.first_chunk().is_some_and(|header| Header::decode(header).version != VERSION)
    }

    /// Bytes to send before anything of the session.
    pub(crate) fn output(&self) -> &[u8] {
        &self.tx[self.sent..]
    }

    /// The first `n` bytes of the output were sent.
    pub(crate) fn sent(&mut self, n: usize) {
        self.sent = (self.sent + n).min(self.tx.len());
    }

    /// The result, once, when the peer has proved itself and both hellos fit. There may still be output.
    pub(crate) fn outcome(&mut self) -> Option<Outcome> {
        self.outcome.take()
    }

    /// Ends the handshake; a listener sends the peer the reason. For limits of the caller; the text must reveal nothing to
    /// unauthenticated peers.
    pub(crate) fn refuse(&mut self, error: &Error) {
        if self.failed.is_none() && self.step != Step::Done {
            self.fail(error);
        }
    }

    /// Remembers the failure. Before the peer's proof, a listener sends it in plaintext to peers that speak this protocol.
    fn fail(&mut self, error: &Error) {
        if matches!(self.step, Step::Opening | Step::Proof) && plausible(&self.rx) {
            self.put_refusal(error);
        }
        self.noise = None;
        self.session = None;
        self.failed = Some(error.clone());
    }

    fn put_refusal(&mut self, error: &Error) {
        let text = match error.kind() {
            ErrorKind::Auth | ErrorKind::Protocol | ErrorKind::Resource | ErrorKind::TimedOut => error.to_string(),
            ErrorKind::Canceled => "the engine is shutting down".to_owned(),
            _ => "internal error".to_owned(),
        };
        let text = text::printable(&text, MAX_REFUSAL_TEXT);
        if self.rx.first_chunk().map(|b| Header::decode(b).version) == Some(1) {
            // The form of version 1: the status and 252 bytes of text.
            let start = self.tx.len();
            self.tx.extend_from_slice(&error.code().to_le_bytes());
            self.tx.extend_from_slice(text.as_bytes());
            self.tx.resize(start + 256, 0);
            return;
        }
        let header = Header::new(Kind::Refusal, self.keyed(), 8 + text.len());
        self.tx.extend_from_slice(&header.encode());
        self.tx.extend_from_slice(&error.code().to_le_bytes());
        // The oldest and the newest supported version.
        self.tx.extend_from_slice(&VERSION.to_le_bytes());
        self.tx.extend_from_slice(&VERSION.to_le_bytes());
        self.tx.extend_from_slice(text.as_bytes());
    }

    /// Handles the incoming message as soon as enough of it has arrived.
    fn advance(&mut self) -> Result<()> {
        if !plausible(&self.rx) {
            return self.other_protocol();
        }
        let Some(bytes) = self.rx.first_chunk() else { return Ok(()) };
        let header = Header::decode(bytes);
        let kind = self.admit(&header)?;
        if self.rx.len() < HEADER_BYTES + usize::from(header.body) {
            return Ok(());
        }
        let message = std::mem::take(&mut self.rx);
        let (head, body) = message.split_at(HEADER_BYTES);
        // Kept because the refusal depends on it.
        self.rx.extend_from_slice(head);
        let handle = || match kind {
            Kind::Opening => self.on_opening(head, body),
            Kind::Answer => self.on_answer(head, body),
            Kind::Proof => self.on_proof(body),
            Kind::Welcome => self.on_welcome(body),
            Kind::Refusal => Err(refused(&header, body)),
        };
        apart(handle)?;
        self.rx.clear();
        Ok(())
    }

    /// Handles first bytes that are not those of this protocol.
    fn other_protocol(&self) -> Result<()> {
        let verdict = self.rx.first_chunk().map(|b| StatusCode::from_le_bytes(*b));
        match verdict {
            // The connector may be talking to version 1, which answers with a bare status.
            None if self.step == Step::Answer => Ok(()),
            Some(code) if self.step == Step::Answer && ErrorKind::ALL.iter().any(|k| k.code() == code) => {
                bail!(Protocol, "the peer speaks version 1 of the control protocol, this library {VERSION}")
            }
            _ => bail!(Protocol, "the peer does not speak this protocol"),
        }
    }

    /// Whether a message with this header is allowed now.
    fn admit(&self, header: &Header) -> Result<Kind> {
        let expected = match self.step {
            Step::Opening => Kind::Opening,
            Step::Answer => Kind::Answer,
            Step::Proof => Kind::Proof,
            Step::Welcome | Step::Done => Kind::Welcome,
        };
        let connecting = matches!(self.step, Step::Answer | Step::Welcome);
        if connecting && header.kind == Kind::Refusal as u8 {
            return match Kind::Refusal.body().contains(&header.body.into()) {
                true => Ok(Kind::Refusal),
                false => bail!(Protocol, "a refusal of {} bytes", header.body),
            };
        }
        if header.version != VERSION {
            bail!(Protocol, "the peer speaks version {} of the control protocol, this library {VERSION}", header.version);
        }
        if header.kind != expected as u8 || header.flags & !FLAG_KEY != 0 || header.zero != 0 {
            bail!(Protocol, "the peer's {expected:?} is malformed");
        }
        if (header.flags & FLAG_KEY != 0) != self.keyed() {
            bail!(Auth, "only one engine has a pre-shared key (UCCL_TCPX_AUTH_KEY_FILE)");
        }
        if !expected.body().contains(&header.body.into()) {
            bail!(Protocol, "the peer's {expected:?} is {} bytes long", header.body);
        }
        Ok(expected)
    }

    fn on_opening(&mut self, head: &[u8], body: &[u8]) -> Result<()> {
        let Some(opening) = head.first_chunk() else { bail!(Internal, "a short header") };
        let mut noise = self.start(opening, false)?;
        read(&mut noise, body)?;
        let header = Header::new(Kind::Answer, self.keyed(), ANSWER).encode();
        self.context.extend_from_slice(opening);
        self.context.extend_from_slice(&header);
        write(&mut noise, &header, &[], &mut self.tx)?;
        self.noise = Some(noise);
        self.step = Step::Proof;
        Ok(())
    }

    fn on_answer(&mut self, head: &[u8], body: &[u8]) -> Result<()> {
        let Some(mut noise) = self.noise.take() else { bail!(Internal, "an answer without an opening") };
        read(&mut noise, body)?;
        self.context.extend_from_slice(head);
        let public = (&Proof::Nothing, &NO_KEY);
        let (proof, key) = self.keys.iter().next().unwrap_or(public);
        let selector = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &key.selector), &*selected(&mut noise));
        noise.set_psk(PSK, &key.psk).map_err(|e| broken(&e))?;
        let mut hello = Vec::with_capacity(MAX_HELLO);
        self.hello.encode(&mut hello);
        let header = Header::new(Kind::Proof, self.keyed(), SELECTOR + KEY + TAG + hello.len() + TAG);
        write(&mut noise, &[&header.encode()[..], selector.as_ref()].concat(), &hello, &mut self.tx)?;
        let session = session(&mut noise, Direction::ToListening, &self.context)?;
        self.session = Some((session, proof.clone(), remote(&noise)?));
        self.step = Step::Welcome;
        Ok(())
    }

    fn on_proof(&mut self, body: &[u8]) -> Result<()> {
        let Some(mut noise) = self.noise.take() else { bail!(Internal, "a proof without an opening") };
        let (selector, body) = body.split_at(SELECTOR);
        let selected = selected(&mut noise);
        let fits =
            |key: &KeySecrets| hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, &key.selector), &*selected, selector).is_ok();
        let public = self.keys.is_empty().then_some((&Proof::Nothing, &NO_KEY));
        let Some((proof, key)) = self.keys.iter().chain(public).find(|(_, key)| fits(key)) else {
            match self.keyed() {
                true => bail!(Auth, "the pre-shared keys differ"),
                false => return Err(damaged()),
            }
        };
        noise.set_psk(PSK, &key.psk).map_err(|e| broken(&e))?;
        let hello = read(&mut noise, body)?;
        let mut session = session(&mut noise, Direction::ToConnecting, &self.context)?;
        let engine = remote(&noise)?;
        // The peer has proved itself: from here on it gets full error texts.
        self.step = Step::Done;
        let checked = Hello::decode(&hello).and_then(|theirs| Ok((self.hello.agree(&theirs)?, theirs)));
        let mut welcome = Vec::new();
        match &checked {
            Ok(_) => {
                welcome.extend_from_slice(&UCCL_OK.to_le_bytes());
                self.hello.encode(&mut welcome);
            }
            Err(e) => {
                welcome.extend_from_slice(&e.code().to_le_bytes());
                welcome.extend_from_slice(text::printable(&e.to_string(), setup::MAX_TEXT).as_bytes());
            }
        }
        let header = Header::new(Kind::Welcome, self.keyed(), welcome.len() + RECORD_OVERHEAD);
        self.tx.extend_from_slice(&header.encode());
        session.seal(&welcome, &mut self.tx)?;
        let (terms, hello) = checked?;
        self.outcome = Some(Outcome { peer: Peer { hello, engine, proof: proof.clone() }, terms, session });
        Ok(())
    }

    fn on_welcome(&mut self, body: &[u8]) -> Result<()> {
        let Some((mut session, proof, engine)) = self.session.take() else { bail!(Internal, "a welcome without a proof") };
        let mut body = body.to_vec();
        let len = body.len();
        let plain = match session.open(&mut body) {
            Ok(Opened::Record { plain, consumed }) if consumed == len => &body[..plain],
            _ if self.keyed() => bail!(Auth, "the peer did not prove the pre-shared key"),
            _ => return Err(damaged()),
        };
        let Some((status, rest)) = plain.split_first_chunk() else { bail!(Protocol, "the peer's welcome is empty") };
        let status = StatusCode::from_le_bytes(*status);
        if status != UCCL_OK {
            let text = text::checked(rest, setup::MAX_TEXT, "a refusal's text")?;
            Verdict { status, text: text.to_owned() }.result()?;
        }
        match Hello::decode(rest).and_then(|theirs| Ok((self.hello.agree(&theirs)?, theirs))) {
            Ok((terms, hello)) => {
                self.outcome = Some(Outcome { peer: Peer { hello, engine, proof }, terms, session });
                self.step = Step::Done;
                Ok(())
            }
            Err(e) => {
                // The listener considers the connection open, so the refusal goes through the session.
                let mut abort = Vec::new();
                setup::encode(&setup::Message::Abort(Verdict::from(&e)), &mut abort);
                session.seal(&abort, &mut self.tx)?;
                Err(e)
            }
        }
    }
}

/// Replaces the key if none is configured. It is public, so it proves nothing.
const NO_KEY: KeySecrets = KeySecrets { psk: [0; KEY], selector: [0; 32] };

/// The error in a plaintext refusal. Anyone on the network path can have written it.
fn refused(header: &Header, body: &[u8]) -> Error {
    let Some((fixed, text)) = body.split_first_chunk::<8>() else { return err!(Protocol, "a short refusal") };
    if header.version != VERSION {
        let (oldest, newest) = (u16::from_le_bytes([fixed[4], fixed[5]]), u16::from_le_bytes([fixed[6], fixed[7]]));
        let versions = if oldest == newest { format!("version {newest}") } else { format!("versions {oldest} to {newest}") };
        return err!(Protocol, "the peer speaks {versions} of the control protocol, this library {VERSION}");
    }
    let Ok(text) = text::checked(text, MAX_REFUSAL_TEXT, "a refusal's text") else {
        return err!(Protocol, "the peer's refusal is not printable ASCII");
    };
    let kind = match ErrorKind::from_code(StatusCode::from_le_bytes([fixed[0], fixed[1], fixed[2], fixed[3]])) {
        kind @ (ErrorKind::Auth | ErrorKind::Resource | ErrorKind::TimedOut) => kind,
        // The cancellation happened at the peer, not here.
        ErrorKind::Canceled => ErrorKind::RemoteDisconnect,
        _ => ErrorKind::Protocol,
    };
    Error::new(kind, format_args!("refused by the peer: {text}"))
}

/// Appends `front` and the next Noise message to `out`, or nothing.
fn write(noise: &mut HandshakeState, front: &[u8], payload: &[u8], out: &mut Vec<u8>) -> Result<()> {
    let mut message = [0; MAX_MESSAGE];
    let len = noise.write_message(payload, &mut message).map_err(|e| match e {
        snow::Error::Dh => err!(Protocol, "the peer's key has a low order"),
        e => broken(&e),
    })?;
    out.extend_from_slice(front);
    out.extend_from_slice(&message[..len]);
    Ok(())
}

/// Reads the next Noise message and returns its payload.
fn read(noise: &mut HandshakeState, message: &[u8]) -> Result<Vec<u8>> {
    let mut payload = vec![0; message.len()];
    let len = noise.read_message(message, &mut payload).map_err(|_| damaged())?;
    payload.truncate(len);
    Ok(payload)
}

/// The input of a selector: a secret that only the two ends of this exchange know, and all that they sent. So a third party
/// cannot test a guessed key on a selector, and no selector fits twice.
fn selected(noise: &mut HandshakeState) -> Zeroizing<[u8; 96]> {
    let (mut a, mut b) = noise.dangerously_get_raw_split();
    let mut out = Zeroizing::new([0; 96]);
    out[..32].copy_from_slice(&a);
    out[32..64].copy_from_slice(&b);
    out[64..].copy_from_slice(&noise.get_handshake_hash()[..32]);
    a.zeroize();
    b.zeroize();
    out
}

/// The session of a completed exchange. Noise's own transport keys are not used; the session derives its own, so that data
/// channels can have keys too.
fn session(noise: &mut HandshakeState, ours: Direction, context: &[u8]) -> Result<Session> {
    if !noise.is_handshake_finished() {
        bail!(Internal, "a session before the end of the handshake");
    }
    Session::new(ours, &*selected(noise), context)
}

/// The peer's engine instance.
fn remote(noise: &HandshakeState) -> Result<[u8; 16]> {
    match noise.get_remote_static() {
        Some(public) => Ok(engine_id(public)),
        None => bail!(Internal, "a handshake without the peer's key"),
    }
}

#[cfg(test)]
pub(crate) mod tests;
