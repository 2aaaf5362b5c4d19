//! The two ends of a control stream as bytes in memory: frames that wait to leave, and bytes that have arrived and are not yet
//! decoded. Pure; sockets and sealing are `control`'s business.

use super::envelope::HEADER_BYTES;
use super::frame::{self, Frame};
use crate::status::Result;
use std::collections::VecDeque;

/// A block takes more frames until it has this many bytes.
const BLOCK: usize = 32 << 10;
/// A buffer that grew beyond this is given back once it is empty.
const KEEP_BYTES: usize = 1 << 20;
const READ_STEP: usize = 64 << 10;

/// Frames that wait to leave, in order, in blocks: no byte is moved twice however long the queue is.
#[derive(Default)]
pub(crate) struct TxQueue {
    blocks: VecDeque<Block>,
    bytes: usize,
    /// Bytes of frames that were pushed as answers to the peer, and whether the next ones are.
    answers: usize,
    answering: bool,
    /// Memory of a block that has left.
    spare: Vec<u8>,
}

#[derive(Default)]
struct Block {
    frames: Vec<u8>,
    answers: usize,
}

impl TxQueue {
    /// The frames pushed from now on are answers to the peer, or not.
    pub(crate) fn answering(&mut self, on: bool) {
        self.answering = on;
    }

    /// Bytes of answers that wait.
    pub(crate) fn answers(&self) -> usize {
        self.answers
    }

    /// Appends a frame.
    pub(crate) fn push(&mut self, frame: &Frame<'_>) {
        if self.blocks.back().is_none_or(|block| block.frames.len() >= BLOCK) {
            self.blocks.push_back(Block { frames: std::mem::take(&mut self.spare), answers: 0 });
        }
        if let Some(block) = self.blocks.back_mut() {
            let before = block.frames.len();
            frame::encode(frame, &mut block.frames);
            let len = block.frames.len() - before;
            self.bytes += len;
            if self.answering {
                block.answers += len;
                self.answers += len;
            }
        }
    }

    /// Bytes that wait.
    pub(crate) fn pending(&self) -> usize {
        self.bytes
    }

    /// Takes the oldest block of whole frames.
    pub(crate) fn take(&mut self) -> Option<Vec<u8>> {
        let Block { frames, answers } = self.blocks.pop_front()?;
        self.bytes -= frames.len();
        self.answers -= answers;
        Some(frames)
    }

    /// Gives a block's memory back.
    pub(crate) fn recycle(&mut self, mut block: Vec<u8>) {
        if block.capacity() <= KEEP_BYTES {
            block.clear();
            self.spare = block;
        }
    }
}

/// Bytes received and not yet decoded.
#[derive(Default)]
pub(crate) struct RxBuffer {
    bytes: Vec<u8>,
    filled: usize,
    consumed: usize,
    need: usize,
}

impl RxBuffer {
    /// The next whole frame's bytes as a decoded frame, if there is one. The caller consumes it with [`RxBuffer::consume`].
    pub(crate) fn next(&mut self) -> Result<Option<(Frame<'_>, usize)>> {
        if self.filled - self.consumed < self.need.max(HEADER_BYTES) {
            return Ok(None);
        }
        match frame::decode(&self.bytes[self.consumed..self.filled])? {
            frame::Decoded::Frame(frame, len) => Ok(Some((frame, len))),
            frame::Decoded::Need(need) => {
                self.need = need;
                Ok(None)
            }
        }
    }

    /// The frame of `len` bytes at the front has been handled.
    pub(crate) fn consume(&mut self, len: usize) {
        self.consumed += len;
        self.need = 0;
        if self.consumed == self.filled {
            self.consumed = 0;
            self.filled = 0;
            if self.bytes.len() > KEEP_BYTES {
                self.bytes = Vec::new();
            }
        }
    }

    /// Bytes of memory that are kept.
    pub(crate) fn kept(&self) -> usize {
        self.bytes.len()
    }

    /// Bytes of the frame that is arriving, 0 while its header is not here.
    pub(crate) fn arriving(&self) -> usize {
        self.need
    }

    /// Room for more: grows by what has arrived, so that an announced length alone costs no memory.
    fn room(&mut self) -> &mut [u8] {
        if self.consumed > 0 {
            self.bytes.copy_within(self.consumed..self.filled, 0);
            self.filled -= self.consumed;
            self.consumed = 0;
        }
        let want = (self.filled * 2).clamp(READ_STEP, self.need.max(READ_STEP)).max(self.filled + READ_STEP);
        if self.bytes.len() < want {
            self.bytes.resize(want, 0);
        }
        &mut self.bytes[self.filled..]
    }

    /// Appends bytes.
    pub(crate) fn extend(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = self.room();
            let n = room.len().min(bytes.len());
            room[..n].copy_from_slice(&bytes[..n]);
            self.filled += n;
            bytes = &bytes[n..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever the sizes and however the bytes are cut on their way, the same frames come out in order, and nothing is left.
        #[test]
        fn frames_survive_any_cut(sizes in proptest::collection::vec(prop_oneof![0usize..200, 60_000usize..70_000], 1..20), cut in 1usize..100_000) {
            let bodies: Vec<Vec<u8>> = sizes.iter().map(|&n| (0..n).map(|i| (i * 31 + n) as u8).collect()).collect();
            let (mut tx, mut rx, mut wire) = (TxQueue::default(), RxBuffer::default(), Vec::new());
            let mut queued = 0;
            for body in &bodies {
                tx.push(&Frame::Notify { name: b"n", message: body });
                prop_assert!(tx.pending() > queued);
                queued = tx.pending();
            }
            while let Some(block) = tx.take() {
                wire.extend_from_slice(&block);
                tx.recycle(block);
            }
            prop_assert_eq!((tx.pending(), wire.len()), (0, queued));
            let mut got = 0;
            for piece in wire.chunks(cut) {
                rx.extend(piece);
                while let Some((frame, len)) = rx.next().unwrap() {
                    prop_assert_eq!(frame, Frame::Notify { name: b"n", message: &bodies[got] });
                    rx.consume(len);
                    got += 1;
                }
            }
            prop_assert_eq!((got, rx.filled, rx.consumed), (bodies.len(), 0, 0));
        }
    }
}
