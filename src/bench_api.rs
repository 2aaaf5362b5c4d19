//! Private functions for benches/pure. Not part of the API: it changes whenever they do.

use crate::channel::plan::Walk;
use crate::types::Place;
use crate::types::Segment;
use crate::wire::frame::{self, Decoded, Frame, Grant, WireRegion, WireSegment};

/// A transfer of `count` blocks of `block` bytes, none adjacent to another.
pub struct Plan(Vec<Segment>);

impl Plan {
    /// The segments.
    pub fn scattered(count: u64, block: u64) -> Plan {
        let segment = |i| Segment { addr: 2 * i * block, len: block, region: 0, place: Place::HOST, peer: Place::HOST };
        Plan((0..count).map(segment).collect())
    }

    /// Cuts all chunks and returns their number.
    pub fn cut(&self, chunk_bytes: usize) -> usize {
        let mut stream = Walk::new(self.0.clone());
        std::iter::from_fn(|| stream.take(chunk_bytes)).count()
    }
}

/// A frame of the control connection, with the data that it borrows.
pub struct OwnFrame(Frame<'static>);

impl OwnFrame {
    /// The announcement of a write of `segments` blocks of 4 KiB.
    pub fn write(segments: u64) -> OwnFrame {
        let segment = |i| WireSegment { addr: 8192 * i, len: 4096, region: 0, initiator: Place::HOST, owner: Place::HOST };
        OwnFrame(Frame::Write {
            id: 1,
            regions: vec![WireRegion { id: 7, token: [9; 16] }],
            segments: (0..segments).map(segment).collect(),
            eager: None,
        })
    }

    /// The announcement of `n` chunks.
    pub fn chunks(n: u16) -> OwnFrame {
        OwnFrame(Frame::Chunks {
            id: 1,
            by_initiator: true,
            offset: 0,
            grants: (0..n).map(|i| Grant { len: 512 << 10, channel: i % 8 }).collect(),
        })
    }

    /// Appends the encoded frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        frame::encode(&self.0, out);
    }
}

/// Decodes the frame at the front of `bytes` and returns its length, or `None` if there is no whole, valid frame.
pub fn decode(bytes: &[u8]) -> Option<usize> {
    match frame::decode(bytes) {
        Ok(Decoded::Frame(frame, taken)) => {
            std::hint::black_box(&frame);
            Some(taken)
        }
        _ => None,
    }
}
