//! What has carried bytes of a transfer: a set of channels, direct copies, frames of the control connection. Pure.

/// Highest channel with a place of its own; later ones share it.
const LAST_CHANNEL: u16 = 60;
const EAGER: u64 = 1 << 61;
const DIRECT: u64 = 1 << 62;
const NVLINK: u64 = 1 << 63;

/// A set of carriers. Empty before the first byte has moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carriers(u64);

impl Carriers {
    /// A frame of the control connection carried the bytes.
    pub(crate) const EAGER: Carriers = Carriers(EAGER);

    /// A direct copy, over NVLink or not.
    pub(crate) fn direct(nvlink: bool) -> Carriers {
        Carriers(if nvlink { NVLINK } else { DIRECT })
    }

    /// A channel.
    pub(crate) fn channel(channel: u16) -> Carriers {
        Carriers(1 << channel.min(LAST_CHANNEL))
    }

    /// Both sets.
    pub(crate) fn and(self, other: Carriers) -> Carriers {
        Carriers(self.0 | other.0)
    }

    /// Whether bytes went in frames of the control connection.
    pub fn has_eager(self) -> bool {
        self.0 & EAGER != 0
    }

    /// Whether bytes were copied directly, over anything but NVLink.
    pub fn has_direct(self) -> bool {
        self.0 & DIRECT != 0
    }

    /// Whether bytes were copied directly over NVLink.
    pub fn has_nvlink(self) -> bool {
        self.0 & NVLINK != 0
    }

    /// Channels that moved bytes, one bit each, counted as the connection counts its channels; the bit of channel 60 also stands for
    /// all later ones.
    pub fn channels(self) -> u64 {
        self.0 & (EAGER - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_carrier_has_its_place_and_late_channels_share_one() {
        let all = [Carriers::EAGER, Carriers::direct(false), Carriers::direct(true)];
        let says = |c: Carriers| (c.has_eager(), c.has_direct(), c.has_nvlink(), c.channels());
        assert_eq!(all.map(says), [(true, false, false, 0), (false, true, false, 0), (false, false, true, 0)]);
        for (channel, bit) in [(0, 0), (59, 59), (60, 60), (61, 60), (u16::MAX, 60)] {
            assert_eq!(says(Carriers::channel(channel)), (false, false, false, 1 << bit));
        }
        let both = Carriers::channel(3).and(Carriers::channel(5)).and(Carriers::EAGER);
        assert_eq!(says(both), (true, false, false, 0b10_1000));
        assert_eq!(says(Carriers::default()), (false, false, false, 0));
    }
}
