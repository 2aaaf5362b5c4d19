//! Frames of the control connection and their codec. Pure: bytes in, frames out. Every length is checked before it is used or
//! allocated, and a decode error is a value, never a panic.
//!
//! A frame is a header (`envelope`) and its payload; numbers are little-endian.

use super::envelope::{Envelope, Opened, Reader};
use crate::status::{bail, err, Result, StatusCode};
use crate::types::{Landing, Place, MAX_EAGER};
use std::borrow::Cow;

const ENVELOPE: Envelope = Envelope { name: "frame", magic: 0xC7, limit: payload_limit };
/// Most segments of one transfer.
pub const MAX_SEGMENTS: usize = 1 << 20;
/// Most distinct regions of one transfer.
pub const MAX_REGIONS: usize = 1 << 16;
/// Most bytes of a notification, name and message together.
pub const MAX_NOTIFICATION: usize = 64 << 20;
/// Most bytes of one wire segment; longer ones are split.
pub const MAX_SEGMENT_BYTES: u64 = 1 << 30;
const MAX_GRANTS: usize = 1 << 12;
const MAX_TEXT: usize = 512;
const REGION_BYTES: usize = 24;
const SEGMENT_BYTES: usize = 16;
const GRANT_BYTES: usize = 8;

/// A region of the frame's receiver, with the token that proves access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireRegion {
    /// The region's id at its owner.
    pub id: u64,
    /// Its token.
    pub token: [u8; 16],
}

/// One segment of the target's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireSegment {
    /// First byte at the owner.
    pub addr: u64,
    /// Bytes, 1 to [`MAX_SEGMENT_BYTES`].
    pub len: u32,
    /// Index into the frame's regions.
    pub region: u16,
    /// Where the initiator's memory of this segment lies.
    pub initiator: Place,
    /// Where the target's memory lies, as the FIFO item says; the target checks it.
    pub owner: Place,
}

impl WireSegment {
    /// Out of 16 bytes, little-endian, in one load: a list of small blocks has thousands.
    #[inline(always)]
    fn read(bytes: &[u8]) -> WireSegment {
        let word = u128::from_le_bytes(bytes.first_chunk().copied().unwrap_or_default());
        WireSegment {
            addr: word as u64,
            len: (word >> 64) as u32,
            region: (word >> 96) as u16,
            initiator: Place((word >> 112) as u8),
            owner: Place((word >> 120) as u8),
        }
    }
}

/// The segments of a transfer in their encoded form. A transfer may have many thousands, and each copy of the list would cost as
/// much as the rest of its handling.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WireSegments<'a>(Cow<'a, [u8]>);

impl<'a> WireSegments<'a> {
    /// Makes room for `n` more segments.
    pub fn reserve(&mut self, n: usize) {
        self.0.to_mut().reserve(n * SEGMENT_BYTES);
    }

    /// Drops the segments and keeps the memory.
    pub fn clear(&mut self) {
        self.0.to_mut().clear();
    }

    /// How many segments fit the memory.
    pub fn room(&self) -> usize {
        match &self.0 {
            Cow::Borrowed(_) => 0,
            Cow::Owned(bytes) => bytes.capacity() / SEGMENT_BYTES,
        }
    }

    /// The number of segments.
    pub fn count(&self) -> usize {
        self.0.len() / SEGMENT_BYTES
    }

    /// Appends a segment.
    #[inline]
    pub fn push(&mut self, segment: WireSegment) {
        let mut b = [0; SEGMENT_BYTES];
        b[..8].copy_from_slice(&segment.addr.to_le_bytes());
        b[8..12].copy_from_slice(&segment.len.to_le_bytes());
        b[12..14].copy_from_slice(&segment.region.to_le_bytes());
        b[14] = segment.initiator.0;
        b[15] = segment.owner.0;
        self.0.to_mut().extend_from_slice(&b);
    }

    /// The segments, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = WireSegment> + '_ {
        self.0.chunks_exact(SEGMENT_BYTES).map(WireSegment::read)
    }

    /// The list in `bytes`; checks each segment's length and region.
    fn decode(bytes: &'a [u8], regions: usize) -> Result<WireSegments<'a>> {
        let segments = WireSegments(Cow::Borrowed(bytes));
        let wrong = |s: &WireSegment| s.len == 0 || u64::from(s.len) > MAX_SEGMENT_BYTES || usize::from(s.region) >= regions;
        if let Some(s) = segments.iter().find(wrong) {
            bail!(Protocol, "a segment of {} bytes in region {} of {regions}", s.len, s.region);
        }
        Ok(segments)
    }
}

impl FromIterator<WireSegment> for WireSegments<'_> {
    fn from_iter<I: IntoIterator<Item = WireSegment>>(iter: I) -> Self {
        let mut all = WireSegments::default();
        iter.into_iter().for_each(|s| all.push(s));
        all
    }
}

/// The next chunk of a stream. The sender announces channel and length, in the order of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Bytes.
    pub len: u32,
    /// The channel that carries it.
    pub channel: u16,
}

/// A frame. Ids are the initiator's transfer ids.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // fields are named after what they are; units are bytes
pub enum Frame<'a> {
    /// The initiator announces a write; with `eager`, the frame contains the data and no chunk follows.
    Write { id: u64, regions: Vec<WireRegion>, segments: WireSegments<'a>, eager: Option<&'a [u8]> },
    /// The initiator asks for a read.
    Read { id: u64, regions: Vec<WireRegion>, segments: WireSegments<'a> },
    /// The target's whole answer to a small read.
    ReadInline { id: u64, data: &'a [u8] },
    /// The sender of data announces chunks, the first of which begins at `offset` of the stream: the next ones, or again some that a
    /// lost channel did not deliver. `by_initiator`: the sender chose the id.
    Chunks { id: u64, by_initiator: bool, offset: u64, grants: Vec<Grant> },
    /// The peer's verdict on a transfer that the receiver of this frame started.
    Done { id: u64, status: StatusCode, text: &'a str },
    /// A two-sided message waits for a receive. `from`: where it lies, if it can be sent directly.
    Message { id: u64, len: u64, from: Option<Place> },
    /// The one answer to message `id`: a receive was matched with it (status 0: send it), or why none was. With a `landing` it is
    /// sent directly, otherwise in chunks.
    Pull { id: u64, status: StatusCode, receiver: Place, landing: Option<Landing> },
    /// The sender of message `id` withdraws it, and why.
    Withdraw { id: u64, status: StatusCode },
    /// A notification.
    Notify { name: &'a [u8], message: &'a [u8] },
    /// The initiator of refused write `id` announces no more chunks of it.
    Cancel { id: u64 },
    /// Heartbeat. `received`: bytes of data that have arrived over the channels so far.
    Ping { received: u64 },
    /// So many of the chunks announced on `channel` are in place.
    Arrived { channel: u16, chunks: u64 },
    /// The sender of the frame has lost `channel`, and closed its end of it. So many of the chunks announced on it are in place.
    Lost { channel: u16, chunks: u64, text: &'a str },
    /// The sender of the frame has opened its end of `channel`, which was lost, in this set-up of it.
    Up { channel: u16, generation: u32 },
    /// The goodbye: orderly with status 0, otherwise why the sender of the frame ends the connection.
    Bye { status: StatusCode, text: &'a str },
}

/// Declares the frame types in one table: number and largest payload.
macro_rules! kinds {
    ($($name:ident = $number:literal, $limit:expr;)*) => {
        $(const $name: u8 = $number;)*

        /// The largest payload of a frame type; `None` for an unknown type.
        fn payload_limit(kind: u8) -> Option<usize> {
            match kind {
                $($name => Some($limit),)*
                _ => None,
            }
        }
    };
}

kinds! {
    T_WRITE = 1, 16 + MAX_REGIONS * REGION_BYTES + MAX_SEGMENTS * SEGMENT_BYTES;
    T_WRITE_EAGER = 2, 16 + (REGION_BYTES + SEGMENT_BYTES) * MAX_EAGER + MAX_EAGER;
    T_READ = 3, 16 + MAX_REGIONS * REGION_BYTES + MAX_SEGMENTS * SEGMENT_BYTES;
    T_READ_INLINE = 4, 8 + MAX_EAGER;
    T_CHUNKS = 5, 24 + MAX_GRANTS * GRANT_BYTES;
    T_DONE = 6, 12 + MAX_TEXT;
    T_MESSAGE = 7, 20;
    T_PULL = 8, 36;
    T_NOTIFY = 9, 4 + MAX_NOTIFICATION;
    T_PING = 10, 8;
    T_BYE = 11, 4 + MAX_TEXT;
    T_WITHDRAW = 12, 12;
    T_CANCEL = 13, 8;
    T_ARRIVED = 14, 12;
    T_LOST = 15, 12 + MAX_TEXT;
    T_UP = 16, 8;
}

/// What [`decode`] found at the front of a buffer.
#[derive(Debug, PartialEq, Eq)]
pub enum Decoded<'a> {
    /// A frame and its number of bytes.
    Frame(Frame<'a>, usize),
    /// More bytes are needed: the size of the whole frame, or at least of the header.
    Need(usize),
}

/// Decodes the frame at the front of `buf`.
///
/// # Errors
/// `Protocol` when the bytes can never become a frame.
pub fn decode(buf: &[u8]) -> Result<Decoded<'_>> {
    let (kind, mut reader, total) = match ENVELOPE.open(buf)? {
        Opened::Payload(kind, reader, total) => (kind, reader, total),
        Opened::Need(n) => return Ok(Decoded::Need(n)),
    };
    let frame = decode_payload(kind, &mut reader)?;
    ENVELOPE.end(kind, &reader)?;
    Ok(Decoded::Frame(frame, total))
}

fn decode_payload<'a>(kind: u8, r: &mut Reader<'a>) -> Result<Frame<'a>> {
    Ok(match kind {
        T_WRITE | T_WRITE_EAGER | T_READ => {
            let id = r.u64()?;
            let n_regions = r.u32()? as usize;
            let n_segments = r.u32()? as usize;
            if n_regions > MAX_REGIONS || n_segments > MAX_SEGMENTS {
                bail!(Protocol, "{n_regions} regions, {n_segments} segments");
            }
            let regions = r.array(n_regions, |b: &[u8; REGION_BYTES]| WireRegion { id: le64(b, 0), token: sub(b, 8) })?;
            let segments = WireSegments::decode(r.bytes(n_segments * SEGMENT_BYTES)?, n_regions)?;
            match kind {
                T_READ => Frame::Read { id, regions, segments },
                T_WRITE => Frame::Write { id, regions, segments, eager: None },
                _ => {
                    let total: u64 = segments.iter().map(|s| u64::from(s.len)).sum();
                    if total > MAX_EAGER as u64 {
                        bail!(Protocol, "an eager write of {total} bytes, {MAX_EAGER} at most");
                    }
                    if total != r.len() as u64 {
                        bail!(Protocol, "an eager write of {total} bytes carries {} bytes", r.len());
                    }
                    Frame::Write { id, regions, segments, eager: Some(r.rest()) }
                }
            }
        }
        T_READ_INLINE => Frame::ReadInline { id: r.u64()?, data: r.rest() },
        T_CHUNKS => {
            let id = r.u64()?;
            let by_initiator = r.u32()? != 0;
            let n = r.u32()? as usize;
            let offset = r.u64()?;
            if n > MAX_GRANTS {
                bail!(Protocol, "{n} chunks in one frame");
            }
            let grants = r.array(n, |b: &[u8; GRANT_BYTES]| Grant { len: le32(b, 0), channel: u16::from_le_bytes(sub(b, 4)) })?;
            Frame::Chunks { id, by_initiator, offset, grants }
        }
        T_DONE => {
            let id = r.u64()?;
            let status = r.u32()? as StatusCode;
            Frame::Done { id, status, text: text(r)? }
        }
        T_MESSAGE => Frame::Message { id: r.u64()?, len: r.u64()?, from: place(r.u32()?)? },
        T_PULL => decode_pull(r)?,
        T_NOTIFY => {
            let name_len = r.u32()? as usize;
            let name = r.bytes(name_len)?;
            Frame::Notify { name, message: r.rest() }
        }
        T_WITHDRAW => Frame::Withdraw { id: r.u64()?, status: r.u32()? as StatusCode },
        T_CANCEL => Frame::Cancel { id: r.u64()? },
        T_PING => Frame::Ping { received: r.u64()? },
        T_ARRIVED => Frame::Arrived { chunks: r.u64()?, channel: channel(r)? },
        T_LOST => Frame::Lost { chunks: r.u64()?, channel: channel(r)?, text: text(r)? },
        T_UP => Frame::Up { generation: r.u32()?, channel: channel(r)? },
        T_BYE => Frame::Bye { status: r.u32()? as StatusCode, text: text(r)? },
        _ => bail!(Protocol, "unknown frame type {kind}"),
    })
}

fn channel(r: &mut Reader<'_>) -> Result<u16> {
    let number = r.u32()?;
    u16::try_from(number).map_err(|_| err!(Protocol, "channel {number}"))
}

fn decode_pull(r: &mut Reader<'_>) -> Result<Frame<'static>> {
    let (id, status, receiver) = (r.u64()?, r.u32()? as StatusCode, r.u32()?);
    let Some(receiver) = place(receiver)? else { bail!(Protocol, "a matched receive has no place") };
    let landing = match r.len() {
        0 => None,
        _ => Some(Landing { slot: r.u32()?, generation: r.u64()?, addr: r.u64()? }),
    };
    Ok(Frame::Pull { id, status, receiver, landing })
}

/// The number that stands for no place.
const NOWHERE: u32 = u32::MAX;

fn place(number: u32) -> Result<Option<Place>> {
    match (number, u8::try_from(number)) {
        (NOWHERE, _) => Ok(None),
        (_, Ok(number)) => Ok(Some(Place(number))),
        _ => bail!(Protocol, "place {number} does not exist"),
    }
}

fn sub<const N: usize, const M: usize>(b: &[u8; M], at: usize) -> [u8; N] {
    std::array::from_fn(|i| b[at + i])
}
fn le64<const M: usize>(b: &[u8; M], at: usize) -> u64 {
    u64::from_le_bytes(sub(b, at))
}
fn le32<const M: usize>(b: &[u8; M], at: usize) -> u32 {
    u32::from_le_bytes(sub(b, at))
}

/// Appends `frame` to `out`.
pub fn encode(frame: &Frame<'_>, out: &mut Vec<u8>) {
    ENVELOPE.seal(out, |out| encode_payload(frame, out));
}

/// Appends fields one after another.
fn put(out: &mut Vec<u8>, fields: &[&[u8]]) {
    fields.iter().for_each(|field| out.extend_from_slice(field));
}

/// Appends the payload and returns its type.
fn encode_payload(frame: &Frame<'_>, out: &mut Vec<u8>) -> u8 {
    match frame {
        Frame::Write { id, regions, segments, eager } => {
            encode_segments(*id, regions, segments, out);
            put(out, &[eager.unwrap_or_default()]);
            return if eager.is_some() { T_WRITE_EAGER } else { T_WRITE };
        }
        Frame::Read { id, regions, segments } => encode_segments(*id, regions, segments, out),
        Frame::ReadInline { id, data } => put(out, &[&id.to_le_bytes(), data]),
        Frame::Chunks { id, by_initiator, offset, grants } => {
            let (flags, count) = (u32::from(*by_initiator), grants.len() as u32);
            put(out, &[&id.to_le_bytes(), &flags.to_le_bytes(), &count.to_le_bytes(), &offset.to_le_bytes()]);
            for grant in grants {
                put(out, &[&grant.len.to_le_bytes(), &grant.channel.to_le_bytes(), &[0, 0]]);
            }
        }
        Frame::Done { id, status, text } => put(out, &[&id.to_le_bytes(), &status.to_le_bytes(), cut_text(text).as_bytes()]),
        Frame::Message { id, len, from } => {
            let from = from.map_or(NOWHERE, |place| place.0.into());
            put(out, &[&id.to_le_bytes(), &len.to_le_bytes(), &from.to_le_bytes()]);
        }
        Frame::Pull { id, status, receiver, landing } => {
            put(out, &[&id.to_le_bytes(), &status.to_le_bytes(), &u32::from(receiver.0).to_le_bytes()]);
            if let Some(Landing { slot, generation, addr }) = landing {
                put(out, &[&slot.to_le_bytes(), &generation.to_le_bytes(), &addr.to_le_bytes()]);
            }
        }
        Frame::Notify { name, message } => put(out, &[&(name.len() as u32).to_le_bytes(), name, message]),
        Frame::Withdraw { id, status } => put(out, &[&id.to_le_bytes(), &status.to_le_bytes()]),
        Frame::Cancel { id } => put(out, &[&id.to_le_bytes()]),
        Frame::Ping { received } => put(out, &[&received.to_le_bytes()]),
        Frame::Arrived { channel, chunks } => put(out, &[&chunks.to_le_bytes(), &u32::from(*channel).to_le_bytes()]),
        Frame::Lost { channel, chunks, text } => {
            put(out, &[&chunks.to_le_bytes(), &u32::from(*channel).to_le_bytes(), cut_text(text).as_bytes()]);
        }
        Frame::Up { channel, generation } => put(out, &[&generation.to_le_bytes(), &u32::from(*channel).to_le_bytes()]),
        Frame::Bye { status, text } => put(out, &[&status.to_le_bytes(), cut_text(text).as_bytes()]),
    }
    type_of(frame)
}

/// The type of a frame; for a write the type without data.
fn type_of(frame: &Frame<'_>) -> u8 {
    match frame {
        Frame::Write { .. } => T_WRITE,
        Frame::Read { .. } => T_READ,
        Frame::ReadInline { .. } => T_READ_INLINE,
        Frame::Chunks { .. } => T_CHUNKS,
        Frame::Done { .. } => T_DONE,
        Frame::Message { .. } => T_MESSAGE,
        Frame::Pull { .. } => T_PULL,
        Frame::Notify { .. } => T_NOTIFY,
        Frame::Withdraw { .. } => T_WITHDRAW,
        Frame::Cancel { .. } => T_CANCEL,
        Frame::Ping { .. } => T_PING,
        Frame::Arrived { .. } => T_ARRIVED,
        Frame::Lost { .. } => T_LOST,
        Frame::Up { .. } => T_UP,
        Frame::Bye { .. } => T_BYE,
    }
}

/// As much of a text as a frame can carry.
fn cut_text(text: &str) -> &str {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

fn encode_segments(id: u64, regions: &[WireRegion], segments: &WireSegments<'_>, out: &mut Vec<u8>) {
    out.reserve(16 + regions.len() * REGION_BYTES + segments.0.len());
    out.extend_from_slice(&id.to_le_bytes());
    out.extend_from_slice(&(regions.len() as u32).to_le_bytes());
    out.extend_from_slice(&(segments.count() as u32).to_le_bytes());
    for region in regions {
        out.extend_from_slice(&region.id.to_le_bytes());
        out.extend_from_slice(&region.token);
    }
    out.extend_from_slice(&segments.0);
}

fn text<'a>(r: &mut Reader<'a>) -> Result<&'a str> {
    match std::str::from_utf8(r.rest()) {
        Ok(text) => Ok(text),
        Err(_) => bail!(Protocol, "text is not UTF-8"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::envelope::HEADER_BYTES;
    use super::*;
    use proptest::prelude::*;

    /// Name, message, id, status, segments.
    type Parts = (Vec<u8>, Vec<u8>, u64, i32, Vec<(u64, u32, bool)>);

    fn frames() -> impl Strategy<Value = Parts> {
        (
            proptest::collection::vec(any::<u8>(), 0..300),
            proptest::collection::vec(any::<u8>(), 0..3000),
            any::<u64>(),
            any::<i32>(),
            proptest::collection::vec((any::<u64>(), 1u32..=MAX_SEGMENT_BYTES as u32, any::<bool>()), 1..40),
        )
    }

    proptest! {
        #[test]
        fn every_frame_round_trips((name, message, id, status, segs) in frames()) {
            let regions = vec![WireRegion { id, token: [7; 16] }, WireRegion { id: !id, token: [9; 16] }];
            let segments: WireSegments<'_> = segs.iter().enumerate().map(|(i, s)| WireSegment { addr: s.0, len: s.1, region: (i % 2) as u16, initiator: Place(u8::from(s.2)), owner: Place(i as u8) }).collect();
            let small: WireSegments<'_> = segments.iter().map(|s| WireSegment { len: s.len % 5 + 1, ..s }).collect();
            let eager = vec![3u8; small.iter().map(|s| s.len as usize).sum()];
            let grants: Vec<_> = segs.iter().map(|s| Grant { len: s.1, channel: s.0 as u16 }).collect();
            let all = [
                Frame::Write { id, regions: regions.clone(), segments: segments.clone(), eager: None },
                Frame::Write { id, regions: regions.clone(), segments: small, eager: Some(&eager) },
                Frame::Read { id, regions, segments },
                Frame::ReadInline { id, data: &message },
                Frame::Chunks { id, by_initiator: id % 2 == 0, offset: !id, grants },
                Frame::Done { id, status, text: "why" },
                Frame::Message { id, len: !id, from: None },
                Frame::Message { id, len: !id, from: Some(Place(id as u8)) },
                Frame::Pull { id, status, receiver: Place(id as u8), landing: None },
                Frame::Pull { id, status, receiver: Place(0), landing: Some(Landing { slot: 7, generation: !id, addr: id }) },
                Frame::Notify { name: &name, message: &message },
                Frame::Withdraw { id, status },
                Frame::Cancel { id },
                Frame::Ping { received: !id },
                Frame::Arrived { channel: id as u16, chunks: !id },
                Frame::Lost { channel: id as u16, chunks: id, text: "why" },
                Frame::Up { channel: id as u16, generation: id as u32 },
                Frame::Bye { status, text: "end" },
            ];
            let mut buf = Vec::new();
            for frame in &all {
                encode(frame, &mut buf);
            }
            let mut at = 0;
            for frame in &all {
                // Every proper prefix asks for more and never fails.
                if let Decoded::Frame(_, n) = decode(&buf[at..]).unwrap() {
                    for cut in [0, 1, HEADER_BYTES - 1, HEADER_BYTES, n / 2, n - 1] {
                        if cut < n {
                            prop_assert!(matches!(decode(&buf[at..at + cut]).unwrap(), Decoded::Need(need) if need > cut));
                        }
                    }
                }
                match decode(&buf[at..]).unwrap() {
                    Decoded::Frame(got, n) => {
                        prop_assert_eq!(&got, frame);
                        at += n;
                    }
                    Decoded::Need(_) => prop_assert!(false, "incomplete"),
                }
            }
            prop_assert_eq!(at, buf.len());
        }

        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = decode(&bytes);
        }

        #[test]
        fn a_damaged_payload_never_panics(kind in 1u8..=15, payload in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut buf = (payload.len() as u32).to_le_bytes().to_vec();
            buf.extend_from_slice(&[kind, ENVELOPE.magic, 0, 0]);
            buf.extend_from_slice(&payload);
            let _ = decode(&buf);
        }
    }

    #[test]
    fn a_write_carries_its_data_up_to_the_limit_and_no_byte_more() {
        let write = |bytes: usize| {
            let segment = WireSegment { addr: 4096, len: bytes as u32, region: 0, initiator: Place::HOST, owner: Place::HOST };
            let regions = vec![WireRegion { id: 1, token: [7; 16] }];
            let data = vec![3; bytes];
            let mut out = Vec::new();
            encode(&Frame::Write { id: 1, regions, segments: std::iter::once(segment).collect(), eager: Some(&data) }, &mut out);
            decode(&out).map(|_| ())
        };
        assert_eq!(write(MAX_EAGER), Ok(()));
        for bytes in [MAX_EAGER + 1, 1 << 20] {
            assert!(write(bytes).unwrap_err().to_string().contains("65536 at most"), "{bytes}");
        }
    }

    #[test]
    fn lengths_over_the_limit_are_refused_from_the_header_alone() {
        for kind in 0..=255u8 {
            let mut header = u32::MAX.to_le_bytes().to_vec();
            header.extend_from_slice(&[kind, ENVELOPE.magic, 0, 0]);
            assert!(decode(&header).is_err(), "type {kind}");
        }
    }
}
