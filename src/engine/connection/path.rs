//! What carried the bytes of a transfer, in the words of UCCL_TCPX_REQUIRE. Pure.

use crate::proto::Carriers;
use crate::require::{carrier, DIRECT, NVLINK};
use crate::stats::ChannelStats;

/// The word for frames of the control connection, in which small transfers travel.
const EAGER: &str = "eager";

/// What carried the bytes of a transfer. Empty before the first byte has moved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TransferPath {
    /// Channels that moved bytes, one bit each, numbered as in the connection's statistics. Channels after the 61st share its bit.
    pub channels: u64,
    /// The words for what carried bytes, each once: "eager", "direct", "nvlink", and the carriers of the channels in their order.
    pub carriers: Vec<String>,
    /// This host's NICs of those channels, each once, in the order of the channels.
    pub nics: Vec<String>,
}

impl TransferPath {
    /// Names `carriers`, given the connection's channels, of which direct transfers are the first where there are any.
    pub(super) fn new(carriers: Carriers, channels: &[ChannelStats]) -> TransferPath {
        let direct = channels.first().is_some_and(|first| first.plugin == DIRECT);
        let mut path = TransferPath { channels: carriers.channels() << u32::from(direct), ..TransferPath::default() };
        let means = [(carriers.has_eager(), EAGER), (carriers.has_direct(), DIRECT), (carriers.has_nvlink(), NVLINK)];
        path.carriers.extend(means.iter().filter(|(used, _)| *used).map(|(_, word)| (*word).to_owned()));
        for (_, channel) in channels.iter().enumerate().filter(|&(n, _)| n < 64 && path.channels >> n & 1 == 1) {
            add(&mut path.carriers, carrier(&channel.plugin));
            add(&mut path.nics, &channel.nic);
        }
        if direct && (carriers.has_direct() || carriers.has_nvlink()) {
            path.channels |= 1;
        }
        path
    }
}

fn add(words: &mut Vec<String>, word: &str) {
    if !word.is_empty() && !words.iter().any(|known| known == word) {
        words.push(word.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn channels(of: &[(&str, &str)]) -> Vec<ChannelStats> {
        let stats =
            |&(plugin, nic): &(&str, &str)| ChannelStats { plugin: plugin.into(), nic: nic.into(), ..ChannelStats::default() };
        of.iter().map(stats).collect()
    }

    #[test]
    fn each_word_and_nic_occurs_once_in_the_order_of_the_channels() {
        let all =
            [("GPUDirectTCPX_v7", "eth1"), ("GPUDirectTCPX_v7", "eth2"), ("GPUDirectTCPX_v7", "eth1"), ("TCPX-soft", "eth0")];
        let by = [0, 2, 3].map(Carriers::channel).into_iter().fold(Carriers::EAGER, Carriers::and);
        let path = TransferPath::new(by, &channels(&all));
        assert_eq!(
            (path.channels, path.carriers, path.nics),
            (0b1101, words(&["eager", "tcpx", "tcp"]), words(&["eth1", "eth0"]))
        );
        assert_eq!(TransferPath::new(Carriers::default(), &channels(&all)), TransferPath::default());
    }

    #[test]
    fn direct_transfers_are_the_first_channel_where_there_are_any() {
        let all = channels(&[(DIRECT, ""), ("TCPX-soft", "lo")]);
        let path = |by| TransferPath::new(by, &all);
        assert_eq!((path(Carriers::direct(false)).channels, path(Carriers::direct(false)).carriers), (1, words(&["direct"])));
        assert_eq!((path(Carriers::direct(true)).channels, path(Carriers::direct(true)).carriers), (1, words(&["nvlink"])));
        assert_eq!((path(Carriers::channel(0)).channels, path(Carriers::channel(0)).carriers), (2, words(&["tcp"])));
    }

    fn words(of: &[&str]) -> Vec<String> {
        of.iter().map(|&word| word.to_owned()).collect()
    }
}
