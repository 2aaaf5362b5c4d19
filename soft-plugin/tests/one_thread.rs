//! All comms on one I/O thread, small socket buffers, no inline sends, polling before sleep: partial reads and writes, turns
//! and wake-ups under load.
#![allow(missing_docs)]

mod common;

use std::collections::VecDeque;
use std::time::Instant;

use common::*;
use nccl_net_abi::*;

const LIMIT: usize = 128 << 10;

fn start() {
    setup(&[
        ("UCCL_TCPX_SOFT_THREADS", "1"),
        ("UCCL_TCPX_SOFT_INLINE", "0"),
        ("UCCL_TCPX_SOFT_SPIN_US", "50"),
        ("UCCL_TCPX_SOFT_SOCKBUF", "65536"),
        ("UCCL_TCPX_SOFT_FRAGMENT", "random"),
        ("UCCL_TCPX_EMULATE_DEVICE", "1"),
        ("NCCL_DYNAMIC_CHUNK_SIZE", "131072"),
    ]);
}

struct Channel {
    landing: Vec<Vec<u8>>,
    messages: Vec<Vec<u8>>,
    sends: VecDeque<Opaque>,
    receives: VecDeque<(Opaque, bool)>,
    sent: usize,
    posted: usize,
    got: usize,
    sender: Sender,
    receiver: Receiver,
    device: Opaque,
}

impl Channel {
    fn new(number: usize, count: usize) -> Channel {
        let mut rng = Rng(number as u64 + 40);
        let message = |i: usize| {
            let size = 1 + if rng.below(3) == 0 { rng.below(LIMIT) } else { rng.below(3000) };
            pattern(number * 10_000 + i, size)
        };
        let messages = (0..count).map(message).collect();
        let landing = vec![vec![0; LIMIT]; MAX_REQUESTS];
        let (sender, receiver) = pair();
        let device = receiver.reg(&landing[0], NCCL_PTR_CUDA);
        Channel {
            landing,
            messages,
            sends: VecDeque::new(),
            receives: VecDeque::new(),
            sent: 0,
            posted: 0,
            got: 0,
            sender,
            receiver,
            device,
        }
    }

    fn finished(&self) -> bool {
        self.got == self.messages.len() && self.sends.is_empty()
    }

    /// Polls everything once; true when something moved.
    fn step(&mut self) -> bool {
        let mut moved = false;
        if self.sent < self.messages.len() && self.sends.len() < MAX_REQUESTS {
            let (head, tail) = self.messages[self.sent].split_at(self.messages[self.sent].len() / 3);
            self.sends.push_back(self.sender.isendv(&[head, tail]).unwrap());
            self.sent += 1;
            moved = true;
        }
        if self.posted < self.messages.len() && self.receives.len() < MAX_REQUESTS {
            let on_device = self.posted % 3 == 0;
            let target = &mut self.landing[self.posted % MAX_REQUESTS];
            let request = if on_device {
                self.receiver.irecv(std::ptr::null_mut(), LIMIT, self.device).unwrap()
            } else {
                let target = &mut target[..self.messages[self.posted].len()];
                let (a, b) = target.split_at_mut(target.len() / 4);
                self.receiver.irecvv(&mut [a, b]).unwrap()
            };
            self.receives.push_back((request, on_device));
            self.posted += 1;
            moved = true;
        }
        if self.sends.front().is_some_and(|r| test(*r).unwrap().is_some()) {
            self.sends.pop_front();
            moved = true;
        }
        let Some(&(request, on_device)) = self.receives.front() else { return moved };
        let Some(size) = test(request).unwrap() else { return moved };
        let (slot, expected) = (self.got % MAX_REQUESTS, &self.messages[self.got]);
        assert_eq!(size, expected.len());
        if on_device {
            assert!(self.receiver.unpack(slot, size) == *expected);
        } else {
            assert!(self.landing[slot][..size] == **expected);
        }
        self.receiver.consumed(request).unwrap();
        self.receives.pop_front();
        self.got += 1;
        true
    }
}

#[test]
fn eight_comms_share_a_thread_and_a_doorbell() {
    start();
    let mut channels: Vec<_> = (0..8).map(|i| Channel::new(i, 400)).collect();
    let bell = Doorbell::new();
    for channel in &channels {
        bell.attach(channel.sender.0);
        bell.attach(channel.receiver.comm);
    }
    let start = Instant::now();
    while !channels.iter().all(Channel::finished) {
        assert!(start.elapsed() < HANG, "hang");
        let mut step = || channels.iter_mut().fold(false, |moved, channel| channel.step() | moved);
        if !step() {
            bell.sleep_unless(step);
        }
    }
    for channel in channels {
        dereg(channel.receiver.comm, channel.device);
    }
}

#[test]
fn a_stalled_comm_does_not_stop_the_others() {
    start();
    let data = vec![1u8; LIMIT];
    let stalled = pair();
    for _ in 0..16 {
        stalled.0.isendv(&[&data]).unwrap();
    }
    let mut channel = Channel::new(99, 200);
    let start = Instant::now();
    while !channel.finished() {
        assert!(start.elapsed() < HANG, "hang");
        channel.step();
    }
    dereg(channel.receiver.comm, channel.device);
    drop(stalled);
}
