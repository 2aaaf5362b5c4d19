//! Brings channels up in a blocking way, for set-ups that own a thread.

use super::lane::Lane;
use crate::gpu::Gpu;
use crate::net::setup::{Listening, Offer};
use crate::net::OnGpu;
use crate::status::{err, Result};
use crate::wire::handshake::Handle;
use std::time::Instant;

impl OnGpu for Gpu {
    fn on(&self, body: &mut dyn FnMut()) -> Result<()> {
        self.with(|| {
            body();
            Ok(())
        })
    }
}

/// Connects to the peer's handles and accepts the peer's connects until all channels are up. `alive` says whether to go on.
pub(crate) fn establish(
    listening: Listening,
    peers: &[Handle],
    deadline: Instant,
    alive: &dyn Fn() -> bool,
) -> Result<Vec<Lane>> {
    // Handles travel without names; channels are joined by their place in the list.
    let ours = listening.offers();
    let offers: Vec<Offer> = ours.iter().zip(peers).map(|(o, &handle)| Offer { nic: o.nic.clone(), handle }).collect();
    let mut establishing = listening.establish(&offers);
    let pairs = loop {
        if let Some(pairs) = establishing.poll()? {
            break pairs;
        }
        if !alive() {
            return Err(err!(Canceled, "closed while channels were set up"));
        }
        if Instant::now() >= deadline {
            return Err(establishing.missing());
        }
        std::thread::sleep(establishing.retry_in());
    };
    if pairs.len() < offers.len() {
        return Err(err!(Plugin, "{} of {} channels came up", pairs.len(), offers.len()));
    }
    Ok(pairs.into_iter().map(|p| Lane::new(p.send, p.recv)).collect())
}
