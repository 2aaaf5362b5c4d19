//! What frames and set-up messages share: the header in front of a payload, and a reader of consecutive fields. Pure: bytes in,
//! fields out. Every length is checked before it is used.
//!
//! A header has 8 bytes: payload length u32, type u8, magic u8, zero u16. All numbers are little-endian.

use crate::status::{bail, Result};

/// Bytes of a header.
pub(crate) const HEADER_BYTES: usize = 8;

/// The messages of one stream.
pub(super) struct Envelope {
    /// The name of the messages in errors.
    pub name: &'static str,
    /// Distinguishes this stream's messages from others.
    pub magic: u8,
    /// Largest payload of a type; `None` for an unknown type.
    pub limit: fn(u8) -> Option<usize>,
}

/// What [`Envelope::open`] found at the front of a buffer.
pub(super) enum Opened<'a> {
    /// A message's type and payload, and the bytes of the whole message.
    Payload(u8, Reader<'a>, usize),
    /// More bytes are needed: the size of the whole message, or at least of the header.
    Need(usize),
}

impl Envelope {
    /// Opens the message at the front of `buf`. Call [`Envelope::end`] once its payload is read.
    ///
    /// # Errors
    /// `Protocol` when the bytes can never become a message.
    pub(super) fn open<'a>(&self, buf: &'a [u8]) -> Result<Opened<'a>> {
        let Some(header) = buf.first_chunk::<HEADER_BYTES>() else { return Ok(Opened::Need(HEADER_BYTES)) };
        let len = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let (name, kind) = (self.name, header[4]);
        if header[5] != self.magic || header[6..8] != [0, 0] {
            bail!(Protocol, "a {name} has the wrong magic number");
        }
        match (self.limit)(kind) {
            None => bail!(Protocol, "unknown {name} {kind}"),
            Some(limit) if len > limit => bail!(Protocol, "{name} {kind} has {len} bytes, more than its limit of {limit}"),
            Some(_) => {}
        }
        let total = HEADER_BYTES + len;
        let Some(payload) = buf.get(HEADER_BYTES..total) else { return Ok(Opened::Need(total)) };
        Ok(Opened::Payload(kind, Reader { left: payload, name }, total))
    }

    /// Checks that the payload of a message of this type was read to its end.
    ///
    /// # Errors
    /// `Protocol` when bytes are left.
    pub(super) fn end(&self, kind: u8, reader: &Reader<'_>) -> Result<()> {
        match reader.left.len() {
            0 => Ok(()),
            n => bail!(Protocol, "{} {kind} has {n} bytes too many", self.name),
        }
    }

    /// Appends a message: `payload` appends the payload and returns its type.
    pub(super) fn seal(&self, out: &mut Vec<u8>, payload: impl FnOnce(&mut Vec<u8>) -> u8) {
        let start = out.len();
        out.extend_from_slice(&[0; HEADER_BYTES]);
        let kind = payload(out);
        let len = out.len() - start - HEADER_BYTES;
        debug_assert!((self.limit)(kind).is_some_and(|limit| len <= limit), "{} {kind} of {len} bytes", self.name);
        out[start..start + 4].copy_from_slice(&(len as u32).to_le_bytes());
        out[start + 4] = kind;
        out[start + 5] = self.magic;
    }
}

/// The fields of a payload, in order.
pub(super) struct Reader<'a> {
    left: &'a [u8],
    name: &'static str,
}

impl<'a> Reader<'a> {
    /// Bytes not yet read.
    pub(super) fn len(&self) -> usize {
        self.left.len()
    }

    pub(super) fn bytes(&mut self, n: usize) -> Result<&'a [u8]> {
        match self.left.split_at_checked(n) {
            Some((head, tail)) => {
                self.left = tail;
                Ok(head)
            }
            None => bail!(Protocol, "a {} ends {} bytes early", self.name, n - self.left.len()),
        }
    }

    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.left)
    }

    pub(super) fn fixed<const N: usize>(&mut self) -> Result<[u8; N]> {
        let bytes = self.bytes(N)?;
        Ok(std::array::from_fn(|i| bytes[i]))
    }

    pub(super) fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_le_bytes(self.fixed()?))
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.fixed()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.fixed()?))
    }

    pub(super) fn array<const N: usize, T>(&mut self, n: usize, item: impl Fn(&[u8; N]) -> T) -> Result<Vec<T>> {
        let Some(bytes) = n.checked_mul(N) else { bail!(Protocol, "{n} items") };
        // Every piece of chunks_exact has N bytes.
        Ok(self.bytes(bytes)?.chunks_exact(N).filter_map(|b| b.first_chunk()).map(item).collect())
    }
}
