//! The test of tcpx-info: a transfer between two engines of this process through the network stack, with contents checked.

use crate::api::{Direction, Link, Node};
use crate::carried::Carried;
use crate::error::{Context, Failure, Result};
use crate::fail;
use crate::measure::{carried, random_seed};
use crate::memory::{Kind, Region};
use crate::pattern::{compare, Shape, Side};
use std::sync::Arc;
use std::time::{Duration, Instant};

const BYTES: u64 = 1 << 20;
/// Notifications arrive quickly or not at all.
const NOTIFICATION_DEADLINE: Duration = Duration::from_secs(10);
const NOTE: (&[u8], &[u8]) = (b"tcpx-info", b"all data of the write is here");

/// The result of the transfer.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Proof {
    /// Bytes compared.
    pub verified_bytes: u64,
    /// Data channels of the connection over plugins.
    pub channels: usize,
    /// What carried the bytes.
    pub path: String,
    /// From the start of the write to the end of the read, us.
    pub elapsed_us: f64,
}

/// Writes 1 MiB from `node` to a second engine in scattered blocks, reads it back, and compares both. `memory` is the kind of
/// memory that this process registers.
pub fn loopback(node: &Arc<Node>, memory: Kind) -> Result<(Proof, Carried)> {
    // This tests the network: no direct transfers.
    let peer = Arc::new(Node::start_for_the_network().context("cannot start a second engine")?);
    between(node, &peer, memory)
}

/// The same with direct transfers, as between two processes on one host. Returns what carried the bytes.
pub fn within_host(node: &Arc<Node>, memory: Kind) -> Result<Carried> {
    let peer = Arc::new(Node::start().context("cannot start a second engine")?);
    between(node, &peer, memory).map(|(_, carried)| carried)
}

fn between(node: &Arc<Node>, peer: &Arc<Node>, memory: Kind) -> Result<(Proof, Carried)> {
    let link = node.connect(&peer.metadata())?;
    // Kept until the end: dropping it would close the connection.
    let _accepted: Link = peer.accept().context("the connection was not accepted")?;

    let seed = random_seed()?;
    let shape = Shape { total: BYTES, block: 12_345, inflight: 1, order: Some(seed) };
    let mut source = Region::new(node, memory, BYTES)?;
    let target = Region::new(peer, memory, BYTES)?;
    let back = Region::new(node, memory, BYTES)?;
    source.buffer_mut().fill(seed);

    let started = Instant::now();
    let item = target.item()?;
    let pieces = shape.pieces().map_err(Failure::new)?;
    let segments = |region: &Region| {
        let segment = |p: &crate::pattern::Piece| {
            let mut item = item;
            item.addr += p.remote;
            item.size = p.len as u32;
            (region.segment(p.local, p.len), item)
        };
        pieces.iter().map(segment).collect::<Vec<_>>()
    };
    run(&link, Direction::Write, &segments(&source)).context("the write failed")?;
    link.notify(NOTE.0, NOTE.1).context("the notification failed")?;
    run(&link, Direction::Read, &segments(&back)).context("the read failed")?;
    let elapsed_us = started.elapsed().as_secs_f64() * 1e6;

    let mut verified_bytes = compare(&target.buffer().contents(), &shape, Side::Remote, seed)
        .map_err(|e| Failure::new(format_args!("the write delivered WRONG DATA: {e}")))?;
    // The read uses the order of the write, so the bytes must be back in place.
    let in_order = Shape { order: None, ..shape };
    verified_bytes += compare(&back.buffer().contents(), &in_order, Side::Local, seed)
        .map_err(|e| Failure::new(format_args!("the read delivered WRONG DATA: {e}")))?;
    let waited = Instant::now();
    let (name, msg) = loop {
        if let Some(note) = peer.next_notification() {
            break note;
        }
        if waited.elapsed() > NOTIFICATION_DEADLINE {
            fail!("the notification did not arrive within {} s", NOTIFICATION_DEADLINE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    if (&name[..], &msg[..]) != NOTE {
        fail!("the notification arrived with wrong contents");
    }
    let carried = carried(&link, &Carried::default(), 2 * BYTES);
    Ok((Proof { verified_bytes, channels: link.channels(), path: carried.to_string(), elapsed_us }, carried))
}

fn run(link: &Link, direction: Direction, segments: &[(crate::api::LocalSegment, crate::api::FifoItem)]) -> Result<()> {
    let id = link.transfer(direction, segments)?;
    if !link.wait(id, None)? {
        fail!("waiting without a time limit returned before the transfer had ended");
    }
    Ok(())
}
