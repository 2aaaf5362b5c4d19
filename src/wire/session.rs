//! The sealed control stream after the handshake: bytes in, records out, and back. Each record is encrypted and authenticated with
//! AES-256-GCM under a key of its direction and numbered, so that nothing can be changed, repeated, reordered or left out. Knows
//! nothing of sockets, frames or how the keys were agreed.
//!
//! A record is a 2-byte little-endian length of the plain bytes, that many sealed bytes, and a 16-byte tag. The length is covered by
//! the tag.

use super::guarded::Guarded;
use crate::status::{bail, err, Error, Result};
use ring::aead::{Aad, LessSafeKey, Nonce, UnboundKey, AES_256_GCM};
use ring::hkdf;
use zeroize::Zeroizing;

/// Bytes of a record in front of the sealed ones.
pub(crate) const RECORD_HEADER: usize = 2;
const TAG: usize = 16;
/// Bytes that a record adds.
pub(crate) const RECORD_OVERHEAD: usize = RECORD_HEADER + TAG;
/// Bytes of a record at most.
pub(crate) const MAX_RECORD: usize = 64 << 10;
/// Plain bytes of a record at most.
pub(crate) const MAX_PLAIN: usize = MAX_RECORD - RECORD_OVERHEAD;

/// Who sends, seen from the set-up of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the side that connected to the side that listened.
    ToListening,
    /// The other way.
    ToConnecting,
}

impl Direction {
    fn label(self) -> &'static [u8] {
        match self {
            Direction::ToListening => b"to listening",
            Direction::ToConnecting => b"to connecting",
        }
    }
}

/// 32 secret bytes, wiped when dropped.
pub(crate) type Secret = Zeroizing<[u8; 32]>;

/// Keys of the connection's other streams, derived from the handshake's secret.
#[derive(Debug)]
pub(crate) struct Exporter {
    prk: Guarded<hkdf::Prk>,
}

impl Exporter {
    fn derive(&self, parts: &[&[u8]]) -> Result<Secret> {
        let mut key = Secret::default();
        let filled = self.prk.expand(parts, hkdf::HKDF_SHA256).and_then(|okm| okm.fill(&mut *key));
        filled.map_err(|_| err!(Internal, "a key could not be derived"))?;
        Ok(key)
    }

    /// Key that authenticates the first bytes of a data channel.
    ///
    /// `set`: number of the plugin set; `index`: channel in it.
    pub(crate) fn channel_mac_key(&self, set: u8, index: u16, direction: Direction) -> Result<Secret> {
        self.derive(&[b"uccl channel mac", direction.label(), &[set], &index.to_le_bytes()])
    }

    /// Key that protects the data of a data channel (AES-256-GCM). Never use it for two streams.
    pub(crate) fn channel_data_key(&self, set: u8, index: u16, direction: Direction) -> Result<Secret> {
        self.derive(&[b"uccl channel data", direction.label(), &[set], &index.to_le_bytes()])
    }
}

/// One direction's key and the number of the next record.
#[derive(Debug)]
struct Numbered {
    key: Guarded<LessSafeKey>,
    next: u64,
}

impl Numbered {
    fn new(exporter: &Exporter, direction: Direction) -> Result<Numbered> {
        let key = exporter.derive(&[b"uccl control", direction.label()])?;
        let key = UnboundKey::new(&AES_256_GCM, &*key).map_err(|_| err!(Internal, "a key of the wrong length"))?;
        Ok(Numbered { key: Guarded::new(LessSafeKey::new(key))?, next: 0 })
    }

    /// The next record's number as a nonce; each is given out once.
    fn nonce(&mut self) -> Result<Nonce> {
        let Some(after) = self.next.checked_add(1) else { bail!(Resource, "the control stream has used up its record numbers") };
        let mut bytes = [0; 12];
        bytes[4..].copy_from_slice(&self.next.to_be_bytes());
        self.next = after;
        Ok(Nonce::assume_unique_for_key(bytes))
    }
}

/// The sending half.
#[derive(Debug)]
pub(crate) struct Sealer(Numbered);

impl Sealer {
    /// Appends `plain` to `out` as sealed records, each as long as possible. Nothing for no bytes.
    ///
    /// # Errors
    /// Never below 2^64 records. After an error the stream must not be used.
    pub(crate) fn seal(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Result<()> {
        out.reserve(Sealer::sealed_len(plain.len()));
        for piece in plain.chunks(MAX_PLAIN) {
            let header = (piece.len() as u16).to_le_bytes();
            out.extend_from_slice(&header);
            let start = out.len();
            out.extend_from_slice(piece);
            let nonce = self.0.nonce()?;
            let sealed = self.0.key.seal_in_place_separate_tag(nonce, Aad::from(header), &mut out[start..]);
            match sealed {
                Ok(tag) => out.extend_from_slice(tag.as_ref()),
                Err(_) => {
                    // No plain byte may leave.
                    out.truncate(start - RECORD_HEADER);
                    bail!(Internal, "{} bytes could not be sealed", piece.len());
                }
            }
        }
        Ok(())
    }

    /// Bytes that `plain` bytes become.
    pub(crate) fn sealed_len(plain: usize) -> usize {
        plain + plain.div_ceil(MAX_PLAIN) * RECORD_OVERHEAD
    }
}

/// What [`Opener::open`] found at the front of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opened {
    /// More bytes are needed: the whole record's size, or the header's.
    Need(usize),
    /// A record: its `plain` bytes lie at the front of the buffer; `consumed` bytes of the stream are done with.
    Record {
        /// Plain bytes.
        plain: usize,
        /// Bytes of the record.
        consumed: usize,
    },
}

/// The receiving half.
#[derive(Debug)]
pub(crate) struct Opener {
    numbered: Numbered,
    failed: Option<Error>,
}

impl Opener {
    /// Opens the record at the front of `buf`; its plain bytes replace it there.
    ///
    /// # Errors
    /// `Protocol` when the bytes are not the stream's next record. Every later call repeats the error.
    pub(crate) fn open(&mut self, buf: &mut [u8]) -> Result<Opened> {
        self.open_within(buf, 0)
    }

    /// Opens the record at `buf[at..]` and puts its plain bytes at the front of `buf`: with the end of what was opened before at the
    /// front, the plain bytes of several records become one piece without a copy.
    ///
    /// # Errors
    /// As [`Opener::open`]; what `buf` held is then lost.
    pub(crate) fn open_within(&mut self, buf: &mut [u8], at: usize) -> Result<Opened> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let found = self.try_open(buf, at);
        self.failed = found.as_ref().err().cloned();
        found
    }

    fn try_open(&mut self, buf: &mut [u8], at: usize) -> Result<Opened> {
        let Some(&header) = buf.get(at..).and_then(|b| b.first_chunk::<RECORD_HEADER>()) else {
            return Ok(Opened::Need(RECORD_HEADER));
        };
        let plain = usize::from(u16::from_le_bytes(header));
        if plain == 0 || plain > MAX_PLAIN {
            bail!(Protocol, "a record of {plain} bytes on the control stream");
        }
        let consumed = plain + RECORD_OVERHEAD;
        let Some(record) = buf.get_mut(..at + consumed) else { return Ok(Opened::Need(consumed)) };
        let nonce = self.numbered.nonce()?;
        match self.numbered.key.open_within(nonce, Aad::from(header), record, at + RECORD_HEADER..) {
            Ok(_) => Ok(Opened::Record { plain, consumed }),
            Err(_) => bail!(Protocol, "the control stream was changed on its way"),
        }
    }
}

/// Both halves, and the keys of the data channels.
#[derive(Debug)]
pub(crate) struct Session {
    /// The sending half.
    pub sealer: Sealer,
    /// The receiving half.
    pub opener: Opener,
    /// Keys for the data channels.
    pub exporter: Exporter,
}

impl Session {
    /// The session of the side that sends in direction `ours`.
    ///
    /// `secret`: what only the two sides know, at least 32 bytes of full entropy; `context`: what both saw of the handshake.
    pub(crate) fn new(ours: Direction, secret: &[u8], context: &[u8]) -> Result<Session> {
        let exporter = Exporter { prk: Guarded::new(hkdf::Salt::new(hkdf::HKDF_SHA256, context).extract(secret))? };
        let theirs = match ours {
            Direction::ToListening => Direction::ToConnecting,
            Direction::ToConnecting => Direction::ToListening,
        };
        Ok(Session {
            sealer: Sealer(Numbered::new(&exporter, ours)?),
            opener: Opener { numbered: Numbered::new(&exporter, theirs)?, failed: None },
            exporter,
        })
    }

    /// [`Sealer::seal`].
    pub(crate) fn seal(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Result<()> {
        self.sealer.seal(plain, out)
    }

    /// [`Opener::open`].
    pub(crate) fn open(&mut self, buf: &mut [u8]) -> Result<Opened> {
        self.opener.open(buf)
    }
}
