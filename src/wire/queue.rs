//! The two ends of a control connection as bytes in memory: frames that wait to be sent, and bytes that have arrived and are not
//! yet decoded. Pure; sockets and sealing are in `control`, except for the room that a record needs in front of them.

use super::envelope::HEADER_BYTES;
use super::frame::{self, Frame};
use super::session::{MAX_PLAIN, RECORD_HEADER};
use crate::status::{bail, Result};
use std::collections::VecDeque;

/// Bytes in front of the frames of a record: how many records of the peer were opened.
pub(crate) const OPENED: usize = 8;
/// Room in front of a block's frames: the record's header, and that number.
pub(crate) const ROOM: usize = RECORD_HEADER + OPENED;
/// Most bytes of frames in a record.
pub(crate) const MAX_FRAMES: usize = MAX_PLAIN - OPENED;
/// A block takes more frames until it has this many bytes.
const BLOCK: usize = 32 << 10;
/// A buffer that grew beyond this is freed once it is empty.
const KEEP_BYTES: usize = 1 << 20;

/// Makes room for more bytes.
///
/// # Errors
/// `Resource` if there is no memory.
fn make_room(bytes: &mut Vec<u8>, more: usize) -> Result<()> {
    match bytes.try_reserve(more).or_else(|_| bytes.try_reserve_exact(more)) {
        Ok(()) => Ok(()),
        Err(_) => bail!(Resource, "no memory for {} bytes of a control connection", bytes.len() + more),
    }
}

/// Frames that wait to be sent, in order, in blocks: no byte is moved twice however long the queue is.
#[derive(Default)]
pub(crate) struct TxQueue {
    blocks: VecDeque<Block>,
    bytes: usize,
    /// Bytes of frames that were pushed as answers to the peer, and whether the next ones are answers.
    answers: usize,
    answering: bool,
    /// Memory of a block that was sent, to be used again.
    spare: Vec<u8>,
}

/// Complete frames, behind [`ROOM`]: a block that fits into one record is sealed in place.
#[derive(Default)]
pub(crate) struct Block {
    bytes: Vec<u8>,
    answers: usize,
    /// The content of the last heartbeat among its frames: see [`Frame::Ping`].
    reported: Option<u64>,
}

impl Block {
    /// A block that uses the memory of `bytes`.
    fn new(mut bytes: Vec<u8>) -> Block {
        bytes.clear();
        bytes.resize(ROOM, 0);
        Block { bytes, answers: 0, reported: None }
    }

    /// The frames.
    pub(crate) fn frames(&self) -> &[u8] {
        self.bytes.get(ROOM..).unwrap_or_default()
    }

    /// The content of the last heartbeat among them.
    pub(crate) fn reported(&self) -> Option<u64> {
        self.reported
    }

    /// [`ROOM`] bytes, then the frames.
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

impl TxQueue {
    /// Sets whether the frames pushed from now on are answers to the peer.
    pub(crate) fn answering(&mut self, on: bool) {
        self.answering = on;
    }

    /// Bytes of answers that wait.
    pub(crate) fn answers(&self) -> usize {
        self.answers
    }

    /// Makes room for a frame with so many bytes of the application.
    ///
    /// # Errors
    /// `Resource` if there is no memory; nothing has changed then.
    pub(crate) fn make_room(&mut self, bytes: usize) -> Result<()> {
        let more = HEADER_BYTES + size_of::<u32>() + bytes;
        match self.blocks.back_mut().filter(|block| block.bytes.len() < BLOCK) {
            Some(block) => make_room(&mut block.bytes, more),
            None => {
                self.spare.clear();
                make_room(&mut self.spare, ROOM + more)
            }
        }
    }

    /// Appends a frame.
    pub(crate) fn push(&mut self, frame: &Frame<'_>) {
        if self.blocks.back().is_none_or(|block| block.bytes.len() >= BLOCK) {
            self.blocks.push_back(Block::new(std::mem::take(&mut self.spare)));
        }
        if let Some(block) = self.blocks.back_mut() {
            let before = block.bytes.len();
            frame::encode(frame, &mut block.bytes);
            let len = block.bytes.len() - before;
            self.bytes += len;
            if let Frame::Ping { received } = *frame {
                block.reported = Some(received);
            }
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

    /// Takes the oldest block of complete frames.
    pub(crate) fn take(&mut self) -> Option<Block> {
        let block = self.blocks.pop_front()?;
        self.bytes -= block.frames().len();
        self.answers -= block.answers;
        Some(block)
    }

    /// Takes a block's memory to use it again.
    pub(crate) fn recycle(&mut self, bytes: Vec<u8>) {
        if (self.spare.capacity() + 1..=KEEP_BYTES).contains(&bytes.capacity()) {
            self.spare = bytes;
        }
    }
}

/// Bytes received and not yet decoded.
#[derive(Default)]
pub(crate) struct RxBuffer {
    bytes: Vec<u8>,
    /// Bytes at the front that were handled.
    consumed: usize,
    need: usize,
}

impl RxBuffer {
    /// The next complete frame and its length, if there is one. The caller consumes it with [`RxBuffer::consume`].
    pub(crate) fn next(&mut self) -> Result<Option<(Frame<'_>, usize)>> {
        if self.bytes.len() - self.consumed < self.need.max(HEADER_BYTES) {
            return Ok(None);
        }
        match frame::decode(&self.bytes[self.consumed..])? {
            frame::Decoded::Frame(frame, len) => Ok(Some((frame, len))),
            frame::Decoded::Need(need) => {
                self.need = need;
                Ok(None)
            }
        }
    }

    /// The frame of `len` bytes at the front was handled.
    pub(crate) fn consume(&mut self, len: usize) {
        self.consumed += len;
        self.need = 0;
        if self.consumed == self.bytes.len() {
            self.consumed = 0;
            self.bytes.clear();
            if self.bytes.capacity() > KEEP_BYTES {
                self.bytes = Vec::new();
            }
        }
    }

    /// Bytes of memory in use.
    pub(crate) fn kept(&self) -> usize {
        self.bytes.len()
    }

    /// Bytes of the frame that is arriving; 0 until its header has arrived.
    pub(crate) fn arriving(&self) -> usize {
        self.need
    }

    /// Appends bytes. The memory grows with what has arrived, so an announced length or an idle connection costs none.
    ///
    /// # Errors
    /// `Resource` if there is no memory: the peer decides how much it takes.
    pub(crate) fn extend(&mut self, bytes: &[u8]) -> Result<()> {
        if self.consumed > 0 {
            self.bytes.drain(..self.consumed);
            self.consumed = 0;
        }
        make_room(&mut self.bytes, bytes.len())?;
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_heartbeat_costs_no_more_memory_than_it_has_bytes() {
        let (mut tx, mut rx) = (TxQueue::default(), RxBuffer::default());
        for received in 0..100 {
            tx.push(&Frame::Ping { received });
            let block = tx.take().unwrap();
            rx.extend(block.frames()).unwrap();
            tx.recycle(block.into_bytes());
            let len = rx.next().unwrap().map(|(frame, len)| (assert_eq!(frame, Frame::Ping { received }), len)).unwrap().1;
            rx.consume(len);
        }
        assert!(rx.bytes.capacity() + tx.spare.capacity() < 256, "{} and {}", rx.bytes.capacity(), tx.spare.capacity());
    }

    #[test]
    fn a_frame_with_reserved_room_takes_no_more_memory() {
        let mut tx = TxQueue::default();
        for message in [vec![1; 1000], vec![2; 20_000], vec![3; 100_000]] {
            tx.make_room(1 + message.len()).unwrap();
            let room = |tx: &TxQueue| tx.blocks.iter().map(|block| block.bytes.capacity()).sum::<usize>() + tx.spare.capacity();
            let before = room(&tx);
            tx.push(&Frame::Notify { name: b"n", message: &message });
            assert_eq!(room(&tx), before, "{} bytes", message.len());
        }
        assert!(tx.make_room(isize::MAX as usize).is_err());
    }

    proptest! {
        /// Whatever the sizes and however the stream is cut, the same frames come out in order and nothing is left.
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
                wire.extend_from_slice(block.frames());
                tx.recycle(block.into_bytes());
            }
            prop_assert_eq!((tx.pending(), wire.len()), (0, queued));
            let mut got = 0;
            for piece in wire.chunks(cut) {
                rx.extend(piece).unwrap();
                while let Some((frame, len)) = rx.next().unwrap() {
                    prop_assert_eq!(frame, Frame::Notify { name: b"n", message: &bodies[got] });
                    rx.consume(len);
                    got += 1;
                }
            }
            prop_assert_eq!((got, rx.bytes.len(), rx.consumed), (bodies.len(), 0, 0));
        }
    }
}
