//! The encrypted control connection after the handshake: bytes in, records out, and back. Each record is encrypted and
//! authenticated with AES-256-GCM under a key of its direction, and numbered, so that none can be changed, repeated, reordered or
//! left out. Knows nothing of sockets, frames or how the keys were agreed.
//!
//! A record is a 2-byte little-endian length of the plaintext, that many sealed bytes, and a 16-byte tag. The tag covers the
//! length.

use super::secret::{apart, guard, zeroed, Cleared, Guarded, Secret};
use crate::status::{bail, err, Error, Result};
use ring::aead::{Aad, LessSafeKey, Nonce, UnboundKey, AES_256_GCM};
use ring::hkdf;

/// Bytes of a record in front of the sealed ones.
pub(crate) const RECORD_HEADER: usize = 2;
const TAG: usize = 16;
/// Bytes that a record adds to its plaintext.
pub(crate) const RECORD_OVERHEAD: usize = RECORD_HEADER + TAG;
/// Most bytes of a record.
pub(crate) const MAX_RECORD: usize = 64 << 10;
/// Most plaintext bytes of a record.
pub(crate) const MAX_PLAIN: usize = MAX_RECORD - RECORD_OVERHEAD;
/// Records that one key seals: 4 GiB at most, far below the limits of AES-GCM.
const KEY_RECORDS: u64 = 1 << 16;

/// The direction of a stream, by the roles in the set-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the connector to the listener.
    ToListening,
    /// From the listener to the connector.
    ToConnecting,
}

impl Direction {
    /// The opposite direction.
    pub(crate) fn other(self) -> Direction {
        match self {
            Direction::ToListening => Direction::ToConnecting,
            Direction::ToConnecting => Direction::ToListening,
        }
    }

    pub(super) fn label(self) -> &'static [u8] {
        match self {
            Direction::ToListening => b"to listening",
            Direction::ToConnecting => b"to connecting",
        }
    }
}

/// Derives the keys of the connection's other streams from the handshake's secret.
#[derive(Debug)]
pub(crate) struct Exporter {
    prk: Guarded<hkdf::Prk>,
}

impl Exporter {
    fn derive(&self, parts: &[&[u8]]) -> Result<Secret> {
        let mut key = zeroed()?;
        apart(|| {
            let filled = self.prk.expand(parts, hkdf::HKDF_SHA256).and_then(|okm| okm.fill(&mut *key));
            filled.map_err(|_| err!(Internal, "a key could not be derived"))
        })?;
        Ok(key)
    }

    /// The key that authenticates the first bytes of a data channel.
    ///
    /// `set`: number of the plugin set; `index`: channel in it.
    pub(crate) fn channel_mac_key(&self, set: u8, index: u16, direction: Direction) -> Result<Secret> {
        self.derive(&[b"uccl channel mac", direction.label(), &[set], &index.to_le_bytes()])
    }

    /// The key that proves the session to a process on the same host.
    pub(crate) fn local_key(&self, direction: Direction) -> Result<Secret> {
        self.derive(&[b"uccl local", direction.label()])
    }

    /// Names the connection, to its two engines.
    pub(super) fn connection(&self) -> Result<[u8; 16]> {
        let name = self.derive(&[b"uccl connection"])?;
        Ok(std::array::from_fn(|i| name[i]))
    }

    /// The key that proves in a later session that its engines are those of this one.
    pub(super) fn join_key(&self) -> Result<Secret> {
        self.derive(&[b"uccl join key"])
    }

    /// Stands for the handshake in what is proved; not secret.
    pub(super) fn binding(&self) -> Result<[u8; 32]> {
        Ok(*self.derive(&[b"uccl join binding"])?)
    }

    /// The key that protects the data of a data channel (AES-256-GCM). Never use it for two streams.
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
        let key = apart(|| {
            let key = UnboundKey::new(&AES_256_GCM, &*key).map_err(|_| err!(Internal, "a key of the wrong length"))?;
            guard(LessSafeKey::new(key))
        })?;
        Ok(Numbered { key, next: 0 })
    }

    /// The next record's number as a nonce; each is given out once. Switches to the next key when it is due.
    fn nonce(&mut self) -> Result<Nonce> {
        if self.next > 0 && self.next % KEY_RECORDS == 0 {
            self.renew()?;
        }
        let Some(after) = self.next.checked_add(1) else {
            bail!(Resource, "the control connection has used up its record numbers")
        };
        let nonce = numbered(0, self.next);
        self.next = after;
        Ok(nonce)
    }

    /// Replaces the key by the encryption of zeros under a nonce that no record uses.
    fn renew(&mut self) -> Result<()> {
        let nonce = numbered(1, self.next);
        let key = &mut *self.key;
        apart(|| {
            let mut next = [0; 32];
            let sealed = key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut next);
            let made = sealed.and_then(|_| UnboundKey::new(&AES_256_GCM, &next));
            *key =
                LessSafeKey::new(made.map_err(|_| err!(Internal, "the next key of the control connection could not be made"))?);
            Ok(())
        })
    }
}

fn numbered(what: u32, number: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&what.to_be_bytes());
    bytes[4..].copy_from_slice(&number.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// The sending half.
#[derive(Debug)]
pub(crate) struct Sealer(Numbered);

impl Sealer {
    /// The number of the next record.
    pub(crate) fn number(&self) -> u64 {
        self.0.next
    }

    /// Appends `plain` to `out` as sealed records, each as long as possible. Appends nothing for no bytes.
    ///
    /// # Errors
    /// Only after 2^64 records. After an error the stream must not be used.
    pub(crate) fn seal(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Result<()> {
        out.reserve(Sealer::sealed_len(plain.len()));
        let _cleared = Cleared;
        for piece in plain.chunks(MAX_PLAIN) {
            let nonce = self.0.nonce()?;
            let header = (piece.len() as u16).to_le_bytes();
            out.extend_from_slice(&header);
            let start = out.len();
            out.extend_from_slice(piece);
            let sealed = self.0.key.seal_in_place_separate_tag(nonce, Aad::from(header), &mut out[start..]);
            match sealed {
                Ok(tag) => out.extend_from_slice(tag.as_ref()),
                Err(_) => {
                    // No plaintext may be sent.
                    out.truncate(start - RECORD_HEADER);
                    bail!(Internal, "{} bytes could not be sealed", piece.len());
                }
            }
        }
        Ok(())
    }

    /// Seals a record in place, behind [`RECORD_HEADER`] bytes of room. There must be 1 to [`MAX_PLAIN`] bytes of plaintext.
    ///
    /// # Errors
    /// As [`Sealer::seal`]; `record` is then empty.
    pub(crate) fn seal_in_place(&mut self, record: &mut Vec<u8>) -> Result<()> {
        let sealed = self.try_seal_in_place(record);
        if sealed.is_err() {
            // No plaintext may be sent.
            record.clear();
        }
        sealed
    }

    fn try_seal_in_place(&mut self, record: &mut Vec<u8>) -> Result<()> {
        let Some((header, plain)) = record.split_first_chunk_mut::<RECORD_HEADER>() else {
            bail!(Internal, "a record without room")
        };
        if plain.is_empty() || plain.len() > MAX_PLAIN {
            bail!(Internal, "a record of {} bytes", plain.len());
        }
        *header = (plain.len() as u16).to_le_bytes();
        let nonce = self.0.nonce()?;
        let _cleared = Cleared;
        match self.0.key.seal_in_place_separate_tag(nonce, Aad::from(*header), plain) {
            Ok(tag) => record.extend_from_slice(tag.as_ref()),
            Err(_) => bail!(Internal, "{} bytes could not be sealed", plain.len()),
        }
        Ok(())
    }

    /// The sealed length of `plain` bytes.
    pub(crate) fn sealed_len(plain: usize) -> usize {
        plain + plain.div_ceil(MAX_PLAIN) * RECORD_OVERHEAD
    }
}

/// What [`Opener::open`] found at the front of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opened {
    /// More bytes are needed: the size of the whole record, or of the header.
    Need(usize),
    /// A record: its `plain` bytes are at the front of the buffer, and it took `consumed` bytes of the stream.
    Record {
        /// Plaintext bytes.
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
    /// The number of the next record: how many were opened.
    pub(crate) fn number(&self) -> u64 {
        self.numbered.next
    }

    /// Opens the record at the front of `buf` and replaces it by its plaintext.
    ///
    /// # Errors
    /// `Protocol` when the bytes are not the stream's next record. Every later call repeats the error.
    pub(crate) fn open(&mut self, buf: &mut [u8]) -> Result<Opened> {
        self.open_within(buf, 0)
    }

    /// Opens the record at `buf[at..]` and puts its plaintext at the front of `buf`. If the plaintext of the previous record ends
    /// there, several records become one piece without a copy.
    ///
    /// # Errors
    /// As [`Opener::open`]; the content of `buf` is then lost.
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
            bail!(Protocol, "a record of {plain} bytes on the control connection");
        }
        let consumed = plain + RECORD_OVERHEAD;
        let Some(record) = buf.get_mut(..at + consumed) else { return Ok(Opened::Need(consumed)) };
        let nonce = self.numbered.nonce()?;
        let _cleared = Cleared;
        match self.numbered.key.open_within(nonce, Aad::from(header), record, at + RECORD_HEADER..) {
            Ok(_) => Ok(Opened::Record { plain, consumed }),
            Err(_) => bail!(Protocol, "the control connection's data was changed in transit"),
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
    /// The direction in which this engine sends.
    pub ours: Direction,
}

impl Session {
    /// The session of the engine that sends in direction `ours`.
    ///
    /// `secret`: known to the two engines alone, at least 32 bytes of full entropy; `context`: what both saw of the handshake.
    pub(crate) fn new(ours: Direction, secret: &[u8], context: &[u8]) -> Result<Session> {
        let exporter = Exporter { prk: apart(|| guard(hkdf::Salt::new(hkdf::HKDF_SHA256, context).extract(secret)))? };
        Ok(Session {
            sealer: Sealer(Numbered::new(&exporter, ours)?),
            opener: Opener { numbered: Numbered::new(&exporter, ours.other())?, failed: None },
            exporter,
            ours,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::ErrorKind;
    use proptest::prelude::*;

    fn pair() -> (Session, Session) {
        let new = |ours| Session::new(ours, &[7; 64], b"test").unwrap();
        (new(Direction::ToListening), new(Direction::ToConnecting))
    }

    fn sealed(from: &mut Session, plain: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        from.seal(plain, &mut out).unwrap();
        assert_eq!(out.len(), Sealer::sealed_len(plain.len()));
        out
    }

    /// Opens a stream of records so that their plaintext becomes one piece at the front of the buffer.
    fn open_all(to: &mut Session, buf: &mut [u8]) -> Result<usize> {
        let (mut end, mut at) = (0, 0);
        while at < buf.len() {
            match to.opener.open_within(&mut buf[end..], at - end)? {
                Opened::Record { plain, consumed } => {
                    end += plain;
                    at += consumed;
                }
                Opened::Need(_) => break,
            }
        }
        Ok(end)
    }

    proptest! {
        #[test]
        fn any_split_of_the_stream_comes_out_whole(sizes in proptest::collection::vec(0usize..200_000, 0..6)) {
            let (mut a, mut b) = pair();
            let all: Vec<u8> = (0..sizes.iter().sum()).map(|i: usize| (i * 7 + i / 251) as u8).collect();
            let (mut out, mut at) = (Vec::new(), 0);
            for size in sizes {
                a.seal(&all[at..at + size], &mut out).unwrap();
                at += size;
            }
            let end = open_all(&mut b, &mut out).unwrap();
            prop_assert!(out[..end] == all[..]);
        }

        #[test]
        fn random_bytes_never_open(mut bytes in proptest::collection::vec(any::<u8>(), 0..3000), at in 0usize..40) {
            let (mut a, _) = pair();
            let opened = !matches!(a.opener.open_within(&mut bytes, at), Err(_) | Ok(Opened::Need(_)));
            prop_assert!(!opened);
        }
    }

    #[test]
    fn a_record_sealed_in_place_is_the_same_record() {
        for len in [1, 100, MAX_PLAIN] {
            let ((mut a, mut b), plain) = (pair(), vec![7; len]);
            let mut record = [&[0; RECORD_HEADER], &plain[..]].concat();
            a.sealer.seal_in_place(&mut record).unwrap();
            assert_eq!(record, sealed(&mut pair().0, &plain));
            assert_eq!(b.open(&mut record), Ok(Opened::Record { plain: len, consumed: len + RECORD_OVERHEAD }));
            assert!(record.starts_with(&plain));
        }
        let (mut a, _) = pair();
        for len in [0, 1, RECORD_HEADER, RECORD_HEADER + MAX_PLAIN + 1] {
            let mut record = vec![7; len];
            assert!(a.sealer.seal_in_place(&mut record).is_err() && record.is_empty(), "{len} bytes of room and plain bytes");
        }
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let (mut a, _) = pair();
        let good = sealed(&mut a, b"attack at dawn");
        for (at, flip) in (0..good.len()).flat_map(|at| [(at, 1), (at, 0x80)]) {
            let (_, mut b) = pair();
            let mut bad = good.clone();
            bad[at] ^= flip;
            bad.resize(bad.len() + MAX_RECORD, 0);
            assert_eq!(b.open(&mut bad).unwrap_err().kind(), ErrorKind::Protocol, "byte {at}");
            // Nothing opens afterwards.
            assert!(b.open(&mut good.clone()).is_err());
        }
    }

    #[test]
    fn records_cannot_be_repeated_reordered_left_out_or_sent_back() {
        let (mut a, _) = pair();
        let records: Vec<_> = (0..3).map(|i| sealed(&mut a, &[i; 10])).collect();
        for order in [[0, 0, 1], [1, 0, 2], [0, 2, 1], [2, 1, 0]] {
            let (_, mut b) = pair();
            let opened: Vec<bool> = order.iter().map(|&i| b.open(&mut records[i].clone()).is_ok()).collect();
            assert!(!opened.iter().all(|&ok| ok), "{order:?}");
            assert!(!opened[2], "{order:?}");
        }
        assert!(a.open(&mut records[0].clone()).is_err(), "an engine took its own record for its peer's");
        let mut other = Session::new(Direction::ToConnecting, &[7; 64], b"another context").unwrap();
        assert!(other.open(&mut records[0].clone()).is_err());
    }

    #[test]
    fn a_cut_record_waits_for_the_rest() {
        let (mut a, mut b) = pair();
        let mut good = sealed(&mut a, b"plain");
        let len = good.len();
        for cut in 0..len {
            let need = if cut < RECORD_HEADER { RECORD_HEADER } else { len };
            assert_eq!(b.open(&mut good[..cut]), Ok(Opened::Need(need)));
        }
        assert_eq!(b.open(&mut good), Ok(Opened::Record { plain: 5, consumed: len }));
        assert_eq!(&good[..5], b"plain");
        assert_eq!(b.opener.open_within(&mut [], 3), Ok(Opened::Need(RECORD_HEADER)));
    }

    #[test]
    fn lengths_are_refused_from_the_header_alone() {
        for plain in [0u16, MAX_PLAIN as u16 + 1, u16::MAX] {
            let (_, mut b) = pair();
            assert!(b.open(&mut plain.to_le_bytes()).is_err(), "{plain}");
        }
    }

    #[test]
    fn record_numbers_never_start_again() {
        let (mut a, mut b) = pair();
        a.sealer.0.next = u64::MAX - 1;
        b.opener.numbered.next = u64::MAX - 1;
        let mut last = sealed(&mut a, b"last");
        assert!(b.open(&mut last).is_ok());
        let mut out = Vec::new();
        assert_eq!(a.seal(b"one more", &mut out).unwrap_err().kind(), ErrorKind::Resource);
        assert!(!out.windows(3).any(|w| w == b"one"), "plain bytes were left in the output");
    }

    #[test]
    fn a_key_seals_so_many_records_and_the_next_one_goes_on() {
        let (mut a, mut b) = pair();
        let first = Numbered::new(&a.exporter, Direction::ToListening).unwrap();
        let under_first = |number: u64, plain: &[u8]| {
            let mut bytes = plain.to_vec();
            let header = (plain.len() as u16).to_le_bytes();
            let nonce = [&[0; 4][..], &number.to_be_bytes()].concat();
            let nonce = Nonce::try_assume_unique_for_key(&nonce).unwrap();
            first.key.seal_in_place_append_tag(nonce, Aad::from(header), &mut bytes).unwrap();
            [&header[..], &bytes].concat()
        };
        for number in 0..2 * KEY_RECORDS + 2 {
            let mut record = sealed(&mut a, b"plain");
            if [0, 1, KEY_RECORDS - 1, KEY_RECORDS, 2 * KEY_RECORDS].contains(&number) {
                assert_eq!(record == under_first(number, b"plain"), number < KEY_RECORDS, "record {number}");
            }
            assert!(b.open(&mut record).is_ok() && record.starts_with(b"plain"), "record {number}");
        }
    }

    #[test]
    fn exported_keys_are_shared_by_the_two_engines_alone() {
        let (a, b) = pair();
        let mut seen = std::collections::HashSet::new();
        for set in 0..2 {
            for index in [0, 1, 256] {
                for direction in [Direction::ToListening, Direction::ToConnecting] {
                    let key = a.exporter.channel_mac_key(set, index, direction).unwrap();
                    assert_eq!(*key, *b.exporter.channel_mac_key(set, index, direction).unwrap());
                    assert!(seen.insert(*key));
                    assert!(seen.insert(*a.exporter.channel_data_key(set, index, direction).unwrap()));
                }
            }
        }
    }
}
