//! Protects the messages of a comm: a checksum against damage, or AES-256-GCM against everyone without the key.
//! Knows memory and message numbers; knows nothing of sockets or of the origin of keys.
//!
//! A protected message has a longer head in place of the plain header; the payload keeps its length:
//! - checksum: header (12), CRC-32C of the payload (4), CRC-32C of these 16 bytes (4);
//! - sealed: header and the payload's tag (12 + 16) encrypted, their own tag (16), then the encrypted payload.
//!
//! Head and payload of message k have the nonces (0, k) and (1, k). A key belongs to one comm in one direction, and numbers only rise: no
//! nonce repeats, and a message that is repeated, missing or out of order fails to open. After `KEY_MESSAGES` messages the key
//! derives the next one, under the nonce (2, k) of its first message.

use std::collections::VecDeque;
use std::ffi::c_int;

use libc::iovec;
use nccl_net_abi::{UCCL_PROTECT_CHECKSUM, UCCL_PROTECT_SEAL};
use process::guarded::{apart, Cleared, Guarded};
use ring::aead::{Aad, LessSafeKey, Nonce, Tag, UnboundKey, AES_256_GCM};

use crate::slot::{Body, Header, HEADER};

const CRC: usize = 4;
const TAG: usize = 16;
const CHECKED_HEAD: usize = HEADER + 2 * CRC;
const SEALED_HEAD: usize = HEADER + 2 * TAG;
/// Bytes of the longest head.
pub const MAX_HEAD: usize = SEALED_HEAD;

/// The key of a comm.
pub type Key = [u8; 32];

/// How the messages of a comm are protected.
pub enum Guard {
    /// Against damage.
    Checksum,
    /// Against everyone without the key.
    Sealed(Box<Sealing>),
}

/// Messages per key: 256 GiB at most, before AES-GCM weakens.
const KEY_MESSAGES: u64 = 1 << 14;

/// The key of the messages from `KEY_MESSAGES * generation` on.
pub struct Sealing {
    key: Guarded<LessSafeKey>,
    generation: u64,
}

fn sealing_key(key: &Key) -> Option<LessSafeKey> {
    Some(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).ok()?))
}

impl Sealing {
    fn new(key: &Key, generation: u64) -> Option<Sealing> {
        let key = apart(|| Guarded::new(sealing_key(key)?).ok()).ok()??;
        Some(Sealing { key, generation })
    }

    /// Advances to the key of message `seq`, which is this one or the next.
    fn advance_to(&mut self, seq: u64) -> Option<()> {
        let generation = seq / KEY_MESSAGES;
        if generation == self.generation {
            return Some(());
        }
        if generation.checked_sub(1)? != self.generation {
            return None;
        }
        let key = &mut *self.key;
        apart(|| {
            let mut next = Key::default();
            let _tag = key.seal_in_place_separate_tag(nonce(Part::NextKey, seq), Aad::empty(), &mut next).ok()?;
            *key = sealing_key(&next)?;
            Some(())
        })
        .ok()??;
        self.generation = generation;
        Some(())
    }
}

/// What the payload of a message must match.
#[derive(Clone, Copy)]
pub enum Proof {
    /// Its checksum.
    Checksum(u32),
    /// Its tag.
    Sealed([u8; TAG]),
}

/// The part of a message that a nonce is for.
#[derive(Clone, Copy)]
enum Part {
    Head = 0,
    Payload = 1,
    NextKey = 2,
}

fn nonce(part: Part, seq: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&(part as u32).to_be_bytes());
    bytes[4..].copy_from_slice(&seq.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// A segment as bytes.
///
/// # Safety
/// It is readable memory that is not written while the result is used.
unsafe fn bytes<'a>(segment: &iovec, len: usize) -> &'a [u8] {
    // SAFETY: by contract; `len` is at most the segment's length.
    unsafe { std::slice::from_raw_parts(segment.iov_base.cast_const().cast(), len.min(segment.iov_len)) }
}

/// CRC-32C of the first `len` bytes of the segments.
///
/// # Safety
/// The segments have that many bytes, readable and not written meanwhile.
unsafe fn checksum(segments: &[iovec], mut len: usize) -> u32 {
    let mut sum = 0;
    for segment in segments {
        if len == 0 {
            break;
        }
        // SAFETY: by contract.
        let piece = unsafe { bytes(segment, len) };
        sum = crc32c::crc32c_append(sum, piece);
        len -= piece.len();
    }
    sum
}

impl Guard {
    /// The guard of this level; `None` for an unknown level or a missing key.
    pub fn new(level: c_int, key: Option<&Key>) -> Option<Guard> {
        match level {
            UCCL_PROTECT_CHECKSUM => Some(Guard::Checksum),
            UCCL_PROTECT_SEAL => Some(Guard::Sealed(Box::new(Sealing::new(key?, 0)?))),
            _ => None,
        }
    }

    /// Bytes of a message's head.
    pub fn head(&self) -> usize {
        match self {
            Guard::Checksum => CHECKED_HEAD,
            Guard::Sealed(_) => SEALED_HEAD,
        }
    }

    /// Writes the head of message `seq` into `out`, followed by the payload if it must be encrypted (then true).
    ///
    /// # Safety
    /// The segments are readable and not written meanwhile.
    unsafe fn wrap(&mut self, seq: u64, header: &[u8; HEADER], payload: &[iovec], out: &mut Vec<u8>) -> Result<bool, String> {
        out.clear();
        match self {
            Guard::Checksum => {
                // SAFETY: by contract.
                let sum = unsafe { checksum(payload, usize::MAX) };
                out.extend_from_slice(header);
                out.extend_from_slice(&sum.to_le_bytes());
                let head = crc32c::crc32c(out);
                out.extend_from_slice(&head.to_le_bytes());
                Ok(false)
            }
            Guard::Sealed(sealing) => {
                sealing.advance_to(seq).ok_or_else(|| format!("message {seq} has no key"))?;
                let _cleared = Cleared;
                let key = &sealing.key;
                out.resize(SEALED_HEAD, 0);
                for segment in payload {
                    // SAFETY: by contract.
                    out.extend_from_slice(unsafe { bytes(segment, usize::MAX) });
                }
                let failed = |_| format!("message {seq} could not be sealed");
                let (head, payload) = out.split_at_mut(SEALED_HEAD);
                let tag = key.seal_in_place_separate_tag(nonce(Part::Payload, seq), Aad::empty(), payload).map_err(failed)?;
                head[..HEADER].copy_from_slice(header);
                head[HEADER..HEADER + TAG].copy_from_slice(tag.as_ref());
                let (plain, end) = head.split_at_mut(HEADER + TAG);
                let tag = key.seal_in_place_separate_tag(nonce(Part::Head, seq), Aad::empty(), plain).map_err(failed)?;
                end.copy_from_slice(tag.as_ref());
                Ok(true)
            }
        }
    }

    /// Opens the head of message `seq`, which is [`Guard::head`] bytes, and verifies it before any of it is used. Messages come in
    /// order, each finished before the next.
    pub fn open(&mut self, seq: u64, head: &[u8]) -> Result<(Header, Proof), String> {
        let damaged =
            || format!("expected message {seq}, but the bytes that came were altered in transit or belong to another message");
        let mut plain = [0; SEALED_HEAD];
        let plain = plain.get_mut(..head.len()).ok_or_else(damaged)?;
        plain.copy_from_slice(head);
        let proof = match self {
            Guard::Checksum => {
                let (checked, sum) = plain.split_at(CHECKED_HEAD - CRC);
                if crc32c::crc32c(checked).to_le_bytes() != sum {
                    return Err(damaged());
                }
                let sum = checked.last_chunk::<CRC>().ok_or_else(damaged)?;
                Proof::Checksum(u32::from_le_bytes(*sum))
            }
            Guard::Sealed(sealing) => {
                sealing.advance_to(seq).ok_or_else(damaged)?;
                let _cleared = Cleared;
                sealing.key.open_in_place(nonce(Part::Head, seq), Aad::empty(), plain).map_err(|_| damaged())?;
                let tag = plain.get(HEADER..).and_then(|rest| rest.first_chunk::<TAG>()).ok_or_else(damaged)?;
                Proof::Sealed(*tag)
            }
        };
        let header = plain.first_chunk::<HEADER>().ok_or_else(damaged)?;
        Ok((Header::parse(*header), proof))
    }

    /// Checks the payload of message `seq`, which fills the first `len` bytes of the segments, and decrypts it in place if it is
    /// sealed. A sealed payload has one segment.
    ///
    /// # Safety
    /// The segments have that many bytes, which nothing else uses meanwhile.
    pub unsafe fn finish(&self, seq: u64, proof: Proof, segments: &[iovec], len: usize) -> Result<(), String> {
        let good = match (self, proof) {
            // SAFETY: by contract.
            (Guard::Checksum, Proof::Checksum(sum)) => unsafe { checksum(segments, len) == sum },
            (Guard::Sealed(sealing), Proof::Sealed(tag)) => match segments {
                [segment, ..] if segment.iov_len >= len => {
                    // SAFETY: by contract.
                    let payload = unsafe { std::slice::from_raw_parts_mut(segment.iov_base.cast::<u8>(), len) };
                    let (nonce, tag) = (nonce(Part::Payload, seq), Tag::from(tag));
                    let _cleared = Cleared;
                    sealing.key.open_in_place_separate_tag(nonce, Aad::empty(), tag, payload, 0..).is_ok()
                }
                _ => false,
            },
            _ => false,
        };
        if good {
            Ok(())
        } else {
            Err(format!("message {seq} was altered in transit"))
        }
    }
}

/// An outgoing message.
struct Wrapped {
    seq: u64,
    /// The head, and the payload when that is sealed.
    bytes: Vec<u8>,
    /// All of it; the first segment is `bytes`.
    iov: Vec<iovec>,
    total: usize,
}

/// The guard of a send comm, with its unsent messages. Each is wrapped once, however often the socket is full.
pub struct Outgoing {
    guard: Guard,
    wrapped: VecDeque<Wrapped>,
    spare: Vec<Wrapped>,
}

// SAFETY: the segments point into `bytes` next to them, or at memory that the poster keeps until its message is done.
unsafe impl Send for Outgoing {}

impl Outgoing {
    /// No message is pending.
    pub fn new(guard: Guard) -> Outgoing {
        Outgoing { guard, wrapped: VecDeque::new(), spare: Vec::new() }
    }

    /// The segments of message `seq`, wrapped on first use; messages come in order.
    ///
    /// # Safety
    /// `body` is that message's, whose memory is readable and not written until it is done.
    pub unsafe fn message(&mut self, seq: u64, body: &Body) -> Result<&[iovec], String> {
        let first = self.wrapped.front().map_or(seq, |w| w.seq);
        let at = usize::try_from(seq.wrapping_sub(first)).unwrap_or(usize::MAX);
        if at == self.wrapped.len() {
            let fresh = || Wrapped { seq, bytes: Vec::new(), iov: Vec::new(), total: 0 };
            let mut next = self.spare.pop().unwrap_or_else(fresh);
            next.seq = seq;
            let payload = body.iov.get(1..).unwrap_or_default();
            // SAFETY: by contract.
            let inside = unsafe { self.guard.wrap(seq, &body.header, payload, &mut next.bytes) }?;
            next.iov.clear();
            next.iov.push(iovec { iov_base: next.bytes.as_mut_ptr().cast(), iov_len: next.bytes.len() });
            if !inside {
                next.iov.extend_from_slice(payload);
            }
            next.total = body.total - HEADER + self.guard.head();
            self.wrapped.push_back(next);
        }
        match self.wrapped.get(at) {
            Some(wrapped) => Ok(&wrapped.iov),
            None => Err(format!("message {seq} after message {first}")),
        }
    }

    /// Segments and bytes of the oldest pending message.
    pub fn oldest(&self) -> (&[iovec], usize) {
        self.wrapped.front().map_or((&[], 0), |w| (&w.iov, w.total))
    }

    /// The oldest message was sent.
    pub fn oldest_sent(&mut self) {
        self.spare.extend(self.wrapped.pop_front());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key = [7; 32];

    fn guards() -> [Guard; 2] {
        [UCCL_PROTECT_CHECKSUM, UCCL_PROTECT_SEAL].map(|level| Guard::new(level, Some(&KEY)).unwrap())
    }

    fn segment(bytes: &mut [u8]) -> iovec {
        iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
    }

    /// A message of these bytes on the wire, from pieces of three bytes.
    fn sent(guard: &mut Guard, seq: u64, payload: &[u8]) -> Vec<u8> {
        let mut copy = payload.to_vec();
        let pieces: Vec<iovec> = copy.chunks_mut(3).map(segment).collect();
        let header = Header::new(payload.len(), seq, -5).bytes();
        let mut out = Vec::new();
        // SAFETY: live memory.
        if !unsafe { guard.wrap(seq, &header, &pieces, &mut out) }.unwrap() {
            out.extend_from_slice(payload);
        }
        out
    }

    fn received(guard: &mut Guard, seq: u64, wire: &[u8]) -> Result<Vec<u8>, String> {
        let (head, payload) = wire.split_at(guard.head());
        let (header, proof) = guard.open(seq, head)?;
        assert_eq!(header, Header::new(payload.len(), seq, -5));
        let mut payload = payload.to_vec();
        let len = payload.len();
        // SAFETY: live memory.
        unsafe { guard.finish(seq, proof, &[segment(&mut payload)], len) }?;
        Ok(payload)
    }

    #[test]
    fn a_message_opens_to_what_was_sent() {
        for guard in &mut guards() {
            for len in [1, 3, 10, 4096, 100_003] {
                let payload: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
                let wire = sent(guard, 9, &payload);
                assert_eq!(wire.len(), len + guard.head());
                assert_eq!(received(guard, 9, &wire).unwrap(), payload);
            }
        }
        let sealed = sent(&mut guards()[1], 0, &[0x41; 64]);
        assert!(!sealed.windows(4).any(|w| w == [0x41; 4]), "plain bytes on the wire");
    }

    #[test]
    fn every_changed_bit_is_detected() {
        for guard in &mut guards() {
            let good = sent(guard, 3, b"attack at dawn");
            for bit in 0..good.len() * 8 {
                let mut bad = good.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                assert!(received(guard, 3, &bad).is_err(), "bit {bit}");
            }
        }
    }

    #[test]
    fn a_sealed_message_opens_only_at_its_number() {
        let [_, mut guard] = guards();
        let wire = sent(&mut guard, 3, b"attack at dawn");
        for other in [0, 2, 4, 3 + (1 << 32), u64::MAX] {
            assert!(received(&mut guard, other, &wire).is_err(), "{other}");
        }
        let mut unknown = Guard::new(UCCL_PROTECT_SEAL, Some(&[8; 32])).unwrap();
        assert!(received(&mut unknown, 3, &wire).is_err());
        // The head of one message does not authenticate the payload of another.
        let other = sent(&mut guard, 4, b"attack at noon");
        let mixed = [&wire[..SEALED_HEAD], &other[SEALED_HEAD..]].concat();
        assert!(received(&mut guard, 3, &mixed).is_err());
    }

    #[test]
    fn nonces_never_repeat() {
        let [_, guard] = guards();
        let mut seen = std::collections::HashSet::new();
        for seq in [0, 1, 2, 1 << 32, u64::MAX] {
            // Equal ciphertext of equal plaintext would show a repeated nonce.
            let Guard::Sealed(sealing) = &guard else { panic!() };
            for part in [Part::Head, Part::Payload, Part::NextKey] {
                let mut zeros = [0; 16];
                let _tag = sealing.key.seal_in_place_separate_tag(nonce(part, seq), Aad::empty(), &mut zeros).unwrap();
                assert!(seen.insert(zeros), "{seq}");
            }
        }
    }

    #[test]
    fn keys_change_after_a_fixed_number_of_messages() {
        let [[_, mut from], [_, mut to], [_, mut first]] = [guards(), guards(), guards()];
        for seq in 0..2 * KEY_MESSAGES + 2 {
            let wire = sent(&mut from, seq, b"attack at dawn");
            if seq == KEY_MESSAGES {
                // The same message under the first key.
                let Guard::Sealed(sealing) = &mut first else { panic!() };
                sealing.generation = 1;
                assert_ne!(sent(&mut first, seq, b"attack at dawn"), wire);
            }
            assert_eq!(received(&mut to, seq, &wire).unwrap(), b"attack at dawn", "message {seq}");
        }
        assert!(received(&mut to, 4 * KEY_MESSAGES, &[0; SEALED_HEAD]).is_err(), "a key cannot be skipped");
        assert!(received(&mut to, 0, &[0; SEALED_HEAD]).is_err(), "nor reused");
    }

    #[test]
    fn a_message_is_wrapped_once_and_in_order() {
        let mut outgoing = Outgoing::new(Guard::new(UCCL_PROTECT_SEAL, Some(&KEY)).unwrap());
        let mut payload = *b"0123456789";
        let mut header = [0; HEADER];
        let mut body = Body { header, total: HEADER + 10, ..Body::default() };
        body.iov = vec![segment(&mut header), segment(&mut payload)];
        // SAFETY: live memory.
        unsafe {
            let first = outgoing.message(5, &body).unwrap()[0].iov_base;
            assert_eq!(outgoing.message(5, &body).unwrap()[0].iov_base, first);
            assert!(outgoing.message(7, &body).is_err());
            assert_ne!(outgoing.message(6, &body).unwrap()[0].iov_base, first);
            assert_eq!(outgoing.oldest().1, SEALED_HEAD + 10);
            outgoing.oldest_sent();
            assert!(outgoing.message(5, &body).is_err());
            assert_eq!(outgoing.message(7, &body).unwrap()[0].iov_base, first, "memory is reused");
        }
    }

    #[test]
    fn levels_that_do_not_exist_and_missing_keys_are_refused() {
        assert!(Guard::new(0, Some(&KEY)).is_none() && Guard::new(3, Some(&KEY)).is_none());
        assert!(Guard::new(UCCL_PROTECT_SEAL, None).is_none());
    }
}
