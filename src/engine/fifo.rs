//! The FIFO item: what a peer needs to reach a region. 64 bytes in memory order, as upstream's clients exchange them. Knows
//! nothing about regions but what an item says about one.

use crate::status::{bail, Result};
use crate::types::Place;
use std::ffi::c_char;

/// Access to a range of a peer's region. Exchanged between hosts of the same byte order (little-endian: x86-64, aarch64).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FifoItem {
    /// First byte, in the address space of the region's owner.
    pub addr: u64,
    /// Bytes; informative: transfers take their length from their own argument.
    pub size: u32,
    /// Where the region lies: 1 host memory, 2 + n memory of the owner's GPU n. Set by uccl_engine_prepare_fifo.
    pub rkey: u32,
    /// For users of the structure; not read by this library.
    pub nmsgs: u32,
    /// Layout version of the opaque bytes.
    pub rid: u32,
    /// Id of the region at its owner.
    pub idx: u64,
    /// Opaque: the region's token and the id of the owning engine.
    pub padding: [c_char; 32],
}

const _: () = {
    assert!(std::mem::size_of::<FifoItem>() == 64);
    assert!(std::mem::offset_of!(FifoItem, size) == 8);
    assert!(std::mem::offset_of!(FifoItem, idx) == 24);
    assert!(std::mem::offset_of!(FifoItem, padding) == 32);
};

/// Version of the opaque bytes, in `rid`.
const LAYOUT: u32 = 0x7C_01;
/// `rkey` of host memory; GPU n is `RKEY_HOST + 1 + n`.
const RKEY_HOST: u32 = 1;

/// The content of the opaque bytes, and of `rkey`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    pub region: u64,
    pub token: [u8; 16],
    pub engine: [u8; 16],
    pub place: Place,
}

impl FifoItem {
    pub(crate) fn new(addr: u64, len: u64, access: &Access) -> FifoItem {
        let bytes: [u8; 32] = std::array::from_fn(|i| if i < 16 { access.token[i] } else { access.engine[i - 16] });
        FifoItem {
            addr,
            size: u32::try_from(len).unwrap_or(u32::MAX),
            rkey: RKEY_HOST + u32::from(access.place.0),
            nmsgs: 0,
            rid: LAYOUT,
            idx: access.region,
            padding: bytes.map(|b| b as c_char),
        }
    }

    /// Whether both items describe the same region, whatever the range.
    #[inline]
    pub(crate) fn same_region(&self, other: &FifoItem) -> bool {
        self.idx == other.idx && self.rkey == other.rkey && self.rid == other.rid && self.padding == other.padding
    }

    /// An item for no region.
    pub(crate) const EMPTY: FifoItem = FifoItem { addr: 0, size: 0, rkey: 0, nmsgs: 0, rid: 0, idx: 0, padding: [0; 32] };

    pub(crate) fn access(&self) -> Result<Access> {
        let place = self.rkey.checked_sub(RKEY_HOST).and_then(|p| u8::try_from(p).ok());
        let (LAYOUT, Some(place)) = (self.rid, place) else {
            bail!(InvalidArgument, "not a FIFO item of uccl_engine_prepare_fifo (rid {:#x}, rkey {})", self.rid, self.rkey);
        };
        Ok(Access {
            region: self.idx,
            token: std::array::from_fn(|i| self.padding[i] as u8),
            engine: std::array::from_fn(|i| self.padding[16 + i] as u8),
            place: Place(place),
        })
    }

    /// The 64 bytes to send to a peer.
    pub fn to_bytes(&self) -> [u8; 64] {
        // SAFETY: 64 bytes of plain integers without padding.
        unsafe { std::mem::transmute(*self) }
    }

    /// An item from a peer's 64 bytes.
    pub fn from_bytes(bytes: &[u8; 64]) -> FifoItem {
        // SAFETY: 64 bytes of plain integers without padding; every bit pattern is valid.
        unsafe { std::mem::transmute(*bytes) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_round_trip_and_foreign_bytes_are_refused() {
        let access = Access { region: 7, token: [1; 16], engine: [2; 16], place: Place::gpu(3) };
        let item = FifoItem::new(0x1234, 5 << 30, &access);
        assert_eq!(item.size, u32::MAX);
        assert_eq!(FifoItem::from_bytes(&item.to_bytes()), item);
        assert_eq!(item.access(), Ok(access));
        assert!(FifoItem::from_bytes(&[0; 64]).access().is_err());
        assert!(FifoItem::from_bytes(&[0xFF; 64]).access().is_err());
    }
}
