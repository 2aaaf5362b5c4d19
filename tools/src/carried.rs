//! What carried bytes: plugins and their NICs, direct transfers, control messages. Made from the counters of a connection. Pure.

use std::collections::BTreeMap;
use std::fmt;
use uccl_p2p::require::{Carries, Requirement};

pub use uccl_p2p::require::{carrier, DIRECT, NVLINK};

/// Bytes inside control messages.
pub const EAGER: &str = "eager";
/// Bytes that no counter has.
const UNCOUNTED: &str = "uncounted";

/// Bytes by carrier and NIC; the NIC is empty where there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Carried(BTreeMap<(String, String), u64>);

impl Carried {
    /// Adds bytes.
    pub fn add(&mut self, carrier: &str, nic: &str, bytes: u64) {
        if bytes > 0 {
            *self.0.entry((carrier.to_owned(), nic.to_owned())).or_default() += bytes;
        }
    }

    /// Adds all of another one.
    pub fn merge(&mut self, other: &Carried) {
        other.0.iter().for_each(|((carrier, nic), bytes)| self.add(carrier, nic, *bytes));
    }

    /// What was carried since `before`.
    pub fn since(&self, before: &Carried) -> Carried {
        let mut out = Carried::default();
        for (key, bytes) in &self.0 {
            out.add(&key.0, &key.1, bytes.saturating_sub(before.0.get(key).copied().unwrap_or(0)));
        }
        out
    }

    /// All bytes.
    pub fn sum(&self) -> u64 {
        self.0.values().sum()
    }

    /// With what the counters lack of the bytes that have moved.
    pub fn out_of(mut self, moved: u64) -> Carried {
        let missing = moved.saturating_sub(self.sum());
        self.add(UNCOUNTED, "", missing);
        self
    }

    /// Whether channels carried bytes.
    pub fn has_channels(&self) -> bool {
        self.0.keys().any(|(_, nic)| !nic.is_empty())
    }

    /// Whether it carried bytes: the word of a plugin, [`DIRECT`] or another.
    pub fn has(&self, carrier: &str) -> bool {
        self.0.keys().any(|(known, _)| known == carrier)
    }

    /// Whether there are bytes, and this carried all of them: the word of a plugin, [`DIRECT`] or another.
    pub fn is_all(&self, carrier: &str) -> bool {
        !self.0.is_empty() && self.0.keys().all(|(known, _)| known == carrier)
    }

    /// Whether there are bytes, and all of them took what is required.
    pub fn meets(&self, required: &Requirement) -> bool {
        // Behind '>' stands the NIC of the peer.
        let nic = |nic: &str| nic.split('>').next().filter(|nic| !nic.is_empty()).map(str::to_owned);
        let carries = |(carrier, name): &(String, String)| Carries {
            carrier: carrier.clone(),
            nics: nic(name).into_iter().collect(),
            ..Carries::default()
        };
        let all: Vec<Carries> = self.0.keys().map(carries).collect();
        !all.is_empty() && required.check(&all).is_ok()
    }

    /// Every carrier and NIC with its bytes, for programs: "tcp eth1 6000, tcp eth2 4000, eager 10".
    pub fn bytes(&self) -> String {
        let part = |((carrier, nic), bytes): (&(String, String), &u64)| match nic.is_empty() {
            true => format!("{carrier} {bytes}"),
            false => format!("{carrier} {nic} {bytes}"),
        };
        self.0.iter().map(part).collect::<Vec<_>>().join(", ")
    }
}

/// For people: "tcp eth1 60% eth2 40%"; without percents where one has all.
impl fmt::Display for Carried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("nothing");
        }
        let sum = self.sum() as f64;
        let mut last = None;
        for ((carrier, nic), &bytes) in &self.0 {
            if last != Some(carrier) {
                let comma = if last.is_some() { ", " } else { "" };
                let name = match &**carrier {
                    DIRECT => "direct (one host)",
                    EAGER => "eager (control message)",
                    other => other,
                };
                write!(f, "{comma}{name}")?;
            }
            if !nic.is_empty() {
                write!(f, " {nic}")?;
            }
            match 100.0 * bytes as f64 / sum {
                _ if self.0.len() == 1 => {}
                percent if percent < 0.5 => write!(f, " <1%")?,
                percent => write!(f, " {percent:.0}%")?,
            }
            last = Some(carrier);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn carried(parts: &[(&str, &str, u64)]) -> Carried {
        let mut out = Carried::default();
        parts.iter().for_each(|(carrier, nic, bytes)| out.add(carrier, nic, *bytes));
        out
    }

    #[test]
    fn shares_are_told_by_carrier_and_nic() {
        let text = |parts| carried(parts).to_string();
        assert_eq!(text(&[]), "nothing");
        assert_eq!(text(&[("tcp", "eth1", 7)]), "tcp eth1");
        assert_eq!(text(&[("tcp", "eth2", 40), ("tcp", "eth1", 60)]), "tcp eth1 60% eth2 40%");
        assert_eq!(
            text(&[("tcpx", "eth1", 750), ("tcp", "eth0", 249), ("eager", "", 1)]),
            "eager (control message) <1%, tcp eth0 25%, tcpx eth1 75%"
        );
        assert_eq!(text(&[("nvlink", "", 5)]), "nvlink");
        assert_eq!(text(&[("direct", "", 0), ("direct", "", 5)]), "direct (one host)");
        assert_eq!(carried(&[("tcp", "eth1", 6), ("direct", "", 4)]).bytes(), "direct 4, tcp eth1 6");
        assert!(
            carried(&[("tcp", "eth1", 6), ("direct", "", 4)]).has_channels() && !carried(&[("direct", "", 4)]).has_channels()
        );
    }

    #[test]
    fn differences_and_sums() {
        let before = carried(&[("tcp", "eth1", 10), ("eager", "", 3)]);
        let after = carried(&[("tcp", "eth1", 15), ("eager", "", 3), ("tcp", "eth2", 1)]);
        let between = after.since(&before);
        assert_eq!(between, carried(&[("tcp", "eth1", 5), ("tcp", "eth2", 1)]));
        let mut twice = between.clone();
        twice.merge(&between);
        assert_eq!((twice.sum(), twice.bytes()), (12, "tcp eth1 10, tcp eth2 2".to_owned()));
    }

    #[test]
    fn only_bytes_that_were_counted_prove_a_carrier() {
        let tcp = carried(&[("tcp", "eth1", 5), ("tcp", "eth2", 5)]);
        let meets = |carried: &Carried, text: &str| carried.meets(&Requirement::parse(text).unwrap());
        assert!(meets(&tcp, "tcp") && !meets(&tcp, "tcpx") && !meets(&Carried::default(), "tcp"));
        assert!(meets(&tcp.clone().out_of(10), "tcp") && meets(&tcp.clone().out_of(9), "tcp"));
        assert!(meets(&tcp, "tcpx|tcp,nics>=2") && !meets(&tcp, "nics>=3"));
        assert!(!meets(&carried(&[("tcp", "eth1>eth2", 5), ("tcp", "eth1>eth3", 5)]), "nics>=2"), "one NIC here");
        let less = tcp.out_of(20);
        assert!(!meets(&less, "tcp"));
        assert_eq!(less.to_string(), "tcp eth1 25% eth2 25%, uncounted 50%");
    }
}
