//! The handshake of a control connection: who speaks, which protocol, which plugin, how many channels, and, with a pre-shared
//! key, proof of it from both sides. Blocking, on its own thread, with a deadline on every read; lengths are fixed or limited.

use crate::status::{bail, err, ErrorKind, Result};
use hmac::{Hmac, Mac};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

const MAGIC: &[u8; 8] = b"UCCLTCPX";
/// Version of the control protocol. Peers of different versions refuse each other.
pub(crate) const VERSION: u16 = 2;
/// Bytes of a [`Hello`] on the wire.
pub(crate) const HELLO_BYTES: usize = 8 + 2 + 2 + 4 + 4 + 4 + 16 + 32 + 16 + 16 + 32;
const HANDLE_BYTES: usize = nccl_net_abi::NCCL_NET_HANDLE_MAXSIZE;
const MAX_HANDLES: usize = 256;

/// What each side tells first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    /// Channels of each kind this side wants.
    pub channels: u16,
    /// Largest chunk, bytes.
    pub chunk_bytes: u32,
    /// CUDA index of this side's GPU, -1 without one.
    pub gpu_index: i32,
    /// A key is configured here.
    pub authenticated: bool,
    /// Random id of the engine instance.
    pub engine: [u8; 16],
    /// Fresh random bytes for the proof.
    pub nonce: [u8; 32],
    /// Plugin that carries device memory.
    pub plugin: String,
    /// PCI address of this side's GPU, or "-1".
    pub gpu: String,
    /// GPU that the connecting side asked for, as it was given; informative.
    pub wanted_gpu: String,
}

pub(crate) fn put_text(out: &mut Vec<u8>, text: &str, width: usize) {
    let mut bytes: Vec<u8> = text.bytes().take(width).collect();
    bytes.resize(width, 0);
    out.extend_from_slice(&bytes);
}

pub(crate) fn get_text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

impl Hello {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HELLO_BYTES);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&self.channels.to_le_bytes());
        out.extend_from_slice(&self.chunk_bytes.to_le_bytes());
        out.extend_from_slice(&self.gpu_index.to_le_bytes());
        out.extend_from_slice(&u32::from(self.authenticated).to_le_bytes());
        out.extend_from_slice(&self.engine);
        out.extend_from_slice(&self.nonce);
        put_text(&mut out, &self.plugin, 16);
        put_text(&mut out, &self.gpu, 16);
        put_text(&mut out, &self.wanted_gpu, 32);
        debug_assert_eq!(out.len(), HELLO_BYTES);
        out
    }

    /// Decodes a whole hello.
    pub(crate) fn decode(b: &[u8; HELLO_BYTES]) -> Result<Hello> {
        if !Hello::plausible(b) {
            bail!(Protocol, "not a UCCL engine");
        }
        let u16_at = |at: usize| u16::from_le_bytes([b[at], b[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        let version = u16_at(8);
        if version != VERSION {
            bail!(Protocol, "the peer speaks version {version} of the control protocol, this library {VERSION}");
        }
        Ok(Hello {
            channels: u16_at(10),
            chunk_bytes: u32_at(12),
            gpu_index: u32_at(16) as i32,
            authenticated: u32_at(20) != 0,
            engine: std::array::from_fn(|i| b[24 + i]),
            nonce: std::array::from_fn(|i| b[40 + i]),
            plugin: get_text(&b[72..88]),
            gpu: get_text(&b[88..104]),
            wanted_gpu: get_text(&b[104..136]),
        })
    }

    /// Whether the first bytes of a stream can be a hello. For a listener that drops strangers early.
    pub(crate) fn plausible(prefix: &[u8]) -> bool {
        prefix.iter().zip(MAGIC).all(|(a, b)| a == b)
    }
}

/// A blocking socket with one deadline for everything.
pub(crate) struct Blocking<'a> {
    pub sock: &'a TcpStream,
    pub deadline: Instant,
}

impl Blocking<'_> {
    fn remaining(&self) -> Result<Duration> {
        match self.deadline.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => Ok(left),
            _ => Err(err!(TimedOut, "the handshake's deadline passed")),
        }
    }

    fn io_error(e: &std::io::Error) -> crate::status::Error {
        match e.kind() {
            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => {
                err!(TimedOut, "the peer did not answer the handshake in time")
            }
            std::io::ErrorKind::UnexpectedEof => err!(RemoteDisconnect, "the peer closed the connection during the handshake"),
            _ => err!(RemoteDisconnect, "handshake: {e}"),
        }
    }

    pub(crate) fn read<const N: usize>(&self) -> Result<[u8; N]> {
        let mut buf = [0; N];
        let mut at = 0;
        while at < N {
            let timeout = self.remaining()?;
            self.sock.set_read_timeout(Some(timeout)).map_err(|e| Self::io_error(&e))?;
            match (&mut &*self.sock).read(&mut buf[at..]) {
                Ok(0) => return Err(Self::io_error(&std::io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => at += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Self::io_error(&e)),
            }
        }
        Ok(buf)
    }

    pub(crate) fn write(&self, bytes: &[u8]) -> Result<()> {
        let timeout = self.remaining()?;
        self.sock.set_write_timeout(Some(timeout)).map_err(|e| Self::io_error(&e))?;
        (&mut &*self.sock).write_all(bytes).map_err(|e| Self::io_error(&e))
    }
}

/// Verdict that the side which checks sends before it gives up, so that the other side can say why.
fn send_verdict(io: &Blocking<'_>, verdict: &Result<()>) -> Result<()> {
    let (code, text) = match verdict {
        Ok(()) => (0, String::new()),
        Err(e) => (e.code(), e.to_string()),
    };
    let mut out = code.to_le_bytes().to_vec();
    put_text(&mut out, &text, 252);
    io.write(&out)
}

fn read_verdict(io: &Blocking<'_>) -> Result<()> {
    let reply: [u8; 256] = io.read()?;
    match i32::from_le_bytes([reply[0], reply[1], reply[2], reply[3]]) {
        0 => Ok(()),
        code => Err(crate::status::Error::new(
            ErrorKind::from_code(code),
            format_args!("refused by the peer: {}", get_text(&reply[4..])),
        )),
    }
}

pub(crate) type Proof = [u8; 32];

/// Proof of the key over both hellos; the role keeps one side's proof from serving as the other's.
pub(crate) fn prove(key: &[u8], role: &[u8], connecting: &Hello, listening: &Hello) -> Result<Proof> {
    let Ok(mut mac) = Hmac::<sha2::Sha256>::new_from_slice(key) else { bail!(Internal, "key of {} bytes", key.len()) };
    mac.update(role);
    mac.update(&connecting.encode());
    mac.update(&listening.encode());
    Ok(mac.finalize().into_bytes().into())
}

pub(crate) fn verify(key: &[u8], role: &[u8], connecting: &Hello, listening: &Hello, proof: &Proof) -> Result<()> {
    // A constant-time comparison of two MACs: compare their MACs under the key.
    let tag = |bytes: &[u8]| -> Result<Vec<u8>> {
        let Ok(mut mac) = Hmac::<sha2::Sha256>::new_from_slice(key) else { bail!(Internal, "key of {} bytes", key.len()) };
        mac.update(bytes);
        Ok(mac.finalize().into_bytes().to_vec())
    };
    if tag(&prove(key, role, connecting, listening)?)? != tag(proof)? {
        bail!(Auth, "the pre-shared keys differ");
    }
    Ok(())
}

pub(crate) fn compatible(ours: &Hello, theirs: &Hello) -> Result<()> {
    if ours.authenticated != theirs.authenticated {
        bail!(Auth, "only one side has a pre-shared key (UCCL_TCPX_AUTH_KEY_FILE)");
    }
    if ours.plugin != theirs.plugin {
        bail!(Unsupported, "the sides use different network plugins: {} and {}", ours.plugin, theirs.plugin);
    }
    if theirs.channels == 0 || theirs.chunk_bytes < 4096 {
        bail!(Protocol, "{} channels, chunks of {} bytes", theirs.channels, theirs.chunk_bytes);
    }
    Ok(())
}

/// The connecting side's part. Returns the listening side's hello.
pub(crate) fn connect(io: &Blocking<'_>, ours: &Hello, key: Option<&[u8]>) -> Result<Hello> {
    io.write(&ours.encode())?;
    read_verdict(io)?;
    let theirs = Hello::decode(&io.read()?)?;
    if let Some(key) = key {
        let proof: Proof = io.read()?;
        let verdict = verify(key, b"listening", ours, &theirs, &proof);
        send_verdict(io, &verdict)?;
        verdict?;
        io.write(&prove(key, b"connecting", ours, &theirs)?)?;
        read_verdict(io)?;
    }
    Ok(theirs)
}

/// The listening side's part, after the connecting side's hello was read.
pub(crate) fn accept(io: &Blocking<'_>, theirs: &Result<Hello>, ours: &Hello, key: Option<&[u8]>) -> Result<()> {
    let theirs = match theirs {
        Ok(theirs) => theirs,
        Err(e) => {
            send_verdict(io, &Err(e.clone()))?;
            return Err(e.clone());
        }
    };
    let verdict = compatible(ours, theirs);
    send_verdict(io, &verdict)?;
    verdict?;
    io.write(&ours.encode())?;
    if let Some(key) = key {
        io.write(&prove(key, b"listening", theirs, ours)?)?;
        read_verdict(io)?;
        let proof: Proof = io.read()?;
        let verdict = verify(key, b"connecting", theirs, ours, &proof);
        send_verdict(io, &verdict)?;
        verdict?;
    }
    Ok(())
}

/// A plugin's connect handle.
pub(crate) type Handle = [u8; HANDLE_BYTES];

/// Exchanges the connect handles of this side's listen comms for the peer's; both sides send as many.
pub(crate) fn exchange_handles(io: &Blocking<'_>, ours: &[Handle]) -> Result<Vec<Handle>> {
    let mut out = (ours.len() as u32).to_le_bytes().to_vec();
    ours.iter().for_each(|h| out.extend_from_slice(h));
    io.write(&out)?;
    let n = u32::from_le_bytes(io.read()?) as usize;
    if n != ours.len() || n > MAX_HANDLES {
        bail!(Protocol, "the peer offers {n} channels, {} were agreed", ours.len());
    }
    (0..n).map(|_| io.read()).collect()
}

/// Tells the peer that this side's channels are up (or why not), and hears the same from it.
pub(crate) fn exchange_ready(io: &Blocking<'_>, outcome: Result<()>) -> Result<()> {
    let sent = send_verdict(io, &outcome);
    outcome?;
    sent?;
    read_verdict(io)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::TcpListener;

    fn hello(channels: u16, authenticated: bool) -> Hello {
        let text = |s: &str| s.to_owned();
        Hello {
            channels,
            chunk_bytes: 524288,
            gpu_index: -1,
            authenticated,
            engine: [1; 16],
            nonce: [2; 32],
            plugin: text("soft"),
            gpu: text("-1"),
            wanted_gpu: text("0000:4a:00.0"),
        }
    }

    fn run(client_key: Option<&'static [u8]>, server_key: Option<&'static [u8]>) -> (Result<Hello>, Result<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let client = std::thread::spawn(move || {
            let sock = TcpStream::connect(addr).unwrap();
            connect(&Blocking { sock: &sock, deadline }, &hello(4, client_key.is_some()), client_key)
        });
        let sock = listener.accept().unwrap().0;
        let io = Blocking { sock: &sock, deadline };
        let theirs = io.read().and_then(|b| Hello::decode(&b));
        let server = accept(&io, &theirs, &hello(2, server_key.is_some()), server_key);
        drop(sock);
        (client.join().unwrap(), server)
    }

    #[test]
    fn keys_must_match_on_both_sides() {
        let (a, b): (&[u8], &[u8]) = (b"0123456789abcdef", b"0123456789abcdeF");
        assert_eq!(run(None, None), (Ok(hello(2, false)), Ok(())));
        assert_eq!(run(Some(a), Some(a)), (Ok(hello(2, true)), Ok(())));
        for (client, server) in [(Some(a), Some(b)), (Some(a), None), (None, Some(a))] {
            let (c, s) = run(client, server);
            assert_eq!(c.unwrap_err().kind(), ErrorKind::Auth);
            assert_eq!(s.unwrap_err().kind(), ErrorKind::Auth);
        }
    }

    proptest! {
        #[test]
        fn a_damaged_hello_never_panics(at in 0..HELLO_BYTES, value in any::<u8>()) {
            let mut bytes: [u8; HELLO_BYTES] = hello(4, true).encode().try_into().unwrap();
            prop_assert_eq!(Hello::decode(&bytes).unwrap(), hello(4, true));
            bytes[at] = value;
            let _ = Hello::decode(&bytes);
        }
    }
}
