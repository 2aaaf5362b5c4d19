//! What must carry memory: the words for it, the requirement of UCCL_TCPX_REQUIRE and of the tools' `--require`, and whether what there
//! is meets it. Pure; knows neither connections nor counters.

use crate::status::{bail, Result};
use std::collections::BTreeSet;
use std::fmt;

/// Direct transfers between two processes on one host, over anything but NVLink.
pub const DIRECT: &str = "direct";
/// Direct transfers from GPU to GPU over NVLink.
pub const NVLINK: &str = "nvlink";
/// Channels of the software plugin.
pub const TCP: &str = "tcp";

/// Channels of device memory TCP.
const DEVMEM: &str = "devmem";

/// Words that a requirement names, and whether channels of a plugin carry it.
const WORDS: [(&str, bool); 6] = [("tcpx", true), ("tcpxo", true), (DEVMEM, true), (TCP, true), (DIRECT, false), (NVLINK, false)];
/// What begins a number of NICs.
const NICS: &str = "nics>=";
/// Most NICs that can be required.
const MOST_NICS: usize = 64;

/// The word for what a plugin carries: the plugin's own name for one that is not known here.
pub fn carrier(plugin: &str) -> &str {
    let name = plugin.to_ascii_lowercase();
    match plugin {
        "TCPX-soft" => TCP,
        soft_plugin::DEVICE_MEMORY => DEVMEM,
        _ if name.contains("fastrak") => "tcpxo",
        _ if name.contains("tcpx") => "tcpx",
        other => other,
    }
}

/// What carries some memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Carries {
    /// The memory, for an error text.
    pub memory: String,
    /// The word for what carries it: that of a plugin, [`DIRECT`], [`NVLINK`] or another.
    pub carrier: String,
    /// The NICs of this host in the channels for it.
    pub nics: Vec<String>,
    /// Why no channels of other plugins carry it.
    pub no_plugin: Vec<String>,
    /// Why no direct transfers do.
    pub no_direct: Option<String>,
    /// NICs of this host on which its channels did not come up.
    pub absent: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Term {
    /// One of these carries all of the memory.
    Carriers(Vec<&'static str>),
    /// Channels use at least so many different NICs.
    Nics(usize),
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Term::Carriers(words) => f.write_str(&words.join("|")),
            Term::Nics(least) => write!(f, "{NICS}{least}"),
        }
    }
}

/// Whether `carrier` is what `word` asks for. Transfers over NVLink are direct transfers too.
fn admits(word: &str, carrier: &str) -> bool {
    word == carrier || (word == DIRECT && carrier == NVLINK)
}

/// Whether this is a word for direct transfers.
fn is_host(carrier: &str) -> bool {
    WORDS.contains(&(carrier, false))
}

fn is_network(word: &str) -> bool {
    WORDS.contains(&(word, true))
}

impl Term {
    fn parse(text: &str) -> Result<Term> {
        if let Some(number) = text.strip_prefix(NICS) {
            return match number.trim().parse() {
                Ok(least @ 1..=MOST_NICS) => Ok(Term::Nics(least)),
                _ => bail!(InvalidArgument, "'{text}': expected {NICS} and a number from 1 to {MOST_NICS}"),
            };
        }
        let word = |text: &str| WORDS.iter().map(|(word, _)| *word).find(|word| word.eq_ignore_ascii_case(text.trim()));
        match text.split('|').map(word).collect() {
            Some(words) => Ok(Term::Carriers(words)),
            None => {
                let words: Vec<&str> = WORDS.iter().map(|(word, _)| *word).collect();
                bail!(InvalidArgument, "'{text}': expected {}, several of them joined by |, or {NICS}NUMBER", words.join(", "))
            }
        }
    }

    /// Why this is not met.
    fn unmet(&self, all: &[Carries]) -> Option<String> {
        match self {
            Term::Carriers(words) => {
                let other = all.iter().find(|carries| !words.iter().any(|word| admits(word, &carries.carrier)))?;
                let nics = if is_host(&other.carrier) { String::new() } else { format!(" {}", other.nics.join(" ")) };
                let mut why = Vec::new();
                if words.iter().any(|word| is_network(word)) {
                    why.extend(other.no_plugin.iter().cloned());
                }
                if let Some(no_direct) = other.no_direct.as_ref().filter(|_| words.iter().any(|word| !is_network(word))) {
                    why.push(format!("no direct transfers: {no_direct}"));
                }
                Some(format!("{} takes {}{}{}", other.memory, other.carrier, nics.trim_end(), because(&why)))
            }
            Term::Nics(least) => {
                let nics: BTreeSet<&str> = all.iter().flat_map(|carries| &carries.nics).map(String::as_str).collect();
                let absent: BTreeSet<&str> = all.iter().flat_map(|carries| &carries.absent).map(String::as_str).collect();
                let names = |of: &BTreeSet<&str>| of.iter().copied().collect::<Vec<_>>().join(" ");
                let none: Vec<String> = absent.difference(&nics).map(|nic| format!("none came up over {nic}")).collect();
                let used = if nics.is_empty() { "no NIC".to_owned() } else { names(&nics) };
                (nics.len() < *least).then(|| format!("channels use {used}{}", because(&none)))
            }
        }
    }
}

fn because(why: &[String]) -> String {
    if why.is_empty() {
        String::new()
    } else {
        format!(" ({})", why.join("; "))
    }
}

/// What must carry memory: terms that must all be met. Without terms everything meets it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Requirement(Vec<Term>);

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let terms: Vec<String> = self.0.iter().map(Term::to_string).collect();
        f.write_str(&terms.join(","))
    }
}

impl Requirement {
    /// Terms separated by commas: words of carriers, joined by `|` where one of them is enough, or `nics>=N`.
    ///
    /// # Errors
    /// `InvalidArgument` names the term that is none, and what is one.
    pub fn parse(text: &str) -> Result<Requirement> {
        Ok(Requirement(text.split(',').map(|term| Term::parse(term.trim())).collect::<Result<_>>()?))
    }

    /// This, and other terms.
    ///
    /// # Errors
    /// As for [`Requirement::parse`].
    pub fn and(mut self, terms: &str) -> Result<Requirement> {
        self.0.extend(Requirement::parse(terms)?.0);
        Ok(self)
    }

    /// Whether nothing is required.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether all that carries memory meets it.
    ///
    /// # Errors
    /// The term that is not met, and what is there in its place.
    pub fn check(&self, all: &[Carries]) -> std::result::Result<(), String> {
        match self.0.iter().find_map(|term| Some((term, term.unmet(all)?))) {
            Some((term, unmet)) => Err(format!("{term} is required, but {unmet}")),
            None => Ok(()),
        }
    }

    /// The same, before there is a connection: whether one of an engine with these channels can ever meet it. `direct`: the engine takes
    /// part in direct transfers.
    ///
    /// # Errors
    /// As for [`Requirement::check`].
    pub fn forecast(&self, channels: &Carries, direct: bool) -> std::result::Result<(), String> {
        let may_be_direct = |term: &&Term| match term {
            Term::Carriers(words) => direct && words.iter().any(|word| !is_network(word)),
            Term::Nics(_) => false,
        };
        Requirement(self.0.iter().filter(|term| !may_be_direct(term)).cloned().collect()).check(std::slice::from_ref(channels))
    }

    /// Whether a term can be met with GPU memory alone.
    pub fn needs_gpus(&self) -> bool {
        let of_gpus = |word: &&str| matches!(*word, "tcpx" | "tcpxo" | DEVMEM | NVLINK);
        self.0.iter().any(|term| matches!(term, Term::Carriers(words) if words.iter().all(of_gpus)))
    }

    /// Whether it asks for channels of a plugin; `Some(false)`: for direct transfers alone; `None` where both may do.
    pub fn wants_network(&self) -> Option<bool> {
        let wants = |term: &Term| match term {
            Term::Carriers(words) if words.iter().all(|word| is_network(word)) => Some(true),
            Term::Carriers(words) => words.iter().all(|word| !is_network(word)).then_some(false),
            Term::Nics(_) => Some(true),
        };
        let all: Vec<bool> = self.0.iter().filter_map(wants).collect();
        let first = *all.first()?;
        all.iter().all(|&one| one == first).then_some(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn carries(memory: &str, carrier: &str, nics: &[&str]) -> Carries {
        let nics = nics.iter().map(|&nic| nic.to_owned()).collect();
        Carries { memory: memory.to_owned(), carrier: carrier.to_owned(), nics, ..Carries::default() }
    }

    fn parsed(text: &str) -> Requirement {
        Requirement::parse(text).unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    #[test]
    fn plugins_have_words() {
        let words = ["TCPX-soft", "GPUDirectTCPX_v7", "FasTrak", "Socket", "direct"].map(carrier);
        assert_eq!(words, ["tcp", "tcpx", "tcpxo", "Socket", "direct"]);
    }

    #[test]
    fn terms_are_words_alternatives_and_numbers_of_nics() {
        for (text, same) in [
            ("tcpx", "tcpx"),
            (" TCPXO , nics>= 4", "tcpxo,nics>=4"),
            ("tcpx|nvlink,nics>=64", "tcpx|nvlink,nics>=64"),
            ("tcp|direct", "tcp|direct"),
        ] {
            assert_eq!(parsed(text).to_string(), same);
        }
        for (bad, named) in [
            ("", "''"),
            ("tcpx,", "''"),
            ("tcpx|", "'tcpx|'"),
            ("rdma", "'rdma': expected tcpx, tcpxo, devmem, tcp, direct, nvlink"),
            ("tcpx,nics>=0", "'nics>=0': expected nics>= and a number from 1 to 64"),
            ("nics>=65", "'nics>=65'"),
            ("nics>4", "'nics>4'"),
            ("nics>=4|tcp", "'nics>=4|tcp'"),
            ("tcpx nvlink", "'tcpx nvlink'"),
        ] {
            let error = Requirement::parse(bad).unwrap_err();
            assert!(error.to_str().contains(named), "{bad}: {error}");
        }
    }

    #[test]
    fn every_memory_must_take_what_is_required() {
        let good = carries("GPU 0", "tcpx", &["eth1"]);
        let bad = Carries {
            no_plugin: vec!["not over GPUDirectTCPX_v7: no channels came up".to_owned()],
            no_direct: Some("the peer is on another host".to_owned()),
            absent: vec!["eth1".to_owned(), "eth3".to_owned()],
            ..carries("GPU 1", "tcp", &["eth0", "eth2"])
        };
        let both = [good.clone(), bad];
        assert_eq!(parsed("tcpx").check(&[good]), Ok(()));
        for (text, why) in [
            ("tcpx", "tcpx is required, but GPU 1 takes tcp eth0 eth2 (not over GPUDirectTCPX_v7: no channels came up)"),
            ("nvlink", "nvlink is required, but GPU 0 takes tcpx eth1"),
            (
                "tcpx|nvlink",
                "tcpx|nvlink is required, but GPU 1 takes tcp eth0 eth2 (not over GPUDirectTCPX_v7: no channels came up; \
                 no direct transfers: the peer is on another host)",
            ),
            ("tcpx|tcp,nics>=4", "nics>=4 is required, but channels use eth0 eth1 eth2 (none came up over eth3)"),
        ] {
            assert_eq!(parsed(text).check(&both).unwrap_err(), why);
        }
        assert_eq!(parsed("tcpx|tcp,nics>=3").check(&both), Ok(()));
        assert_eq!(Requirement::default().check(&[]), Ok(()));
    }

    #[test]
    fn nvlink_is_direct_and_direct_is_not_nvlink() {
        let [nvlink, direct] = [NVLINK, DIRECT].map(|word| carries("GPU 0", word, &["eth0"]));
        assert_eq!(parsed("direct").check(&[nvlink.clone(), direct.clone()]), Ok(()));
        assert_eq!(parsed("nvlink").check(std::slice::from_ref(&nvlink)), Ok(()));
        assert_eq!(parsed("nvlink").check(&[nvlink, direct]).unwrap_err(), "nvlink is required, but GPU 0 takes direct");
    }

    #[test]
    fn what_can_never_be_met_is_known_without_a_connection() {
        let channels = carries("memory", "tcp", &["eth0", "eth1"]);
        let can = |text: &str, direct| parsed(text).forecast(&channels, direct);
        for (text, direct) in [("tcp", true), ("direct", true), ("tcpx|nvlink", true), ("nics>=2,tcp", false)] {
            assert_eq!(can(text, direct), Ok(()), "{text}");
        }
        for (text, direct, why) in [
            ("tcpx", true, "tcpx is required, but memory takes tcp eth0 eth1"),
            ("direct", false, "direct is required, but memory takes tcp eth0 eth1"),
            ("nics>=3", true, "nics>=3 is required, but channels use eth0 eth1"),
        ] {
            assert_eq!(can(text, direct).unwrap_err(), why);
        }
    }

    #[test]
    fn a_requirement_may_leave_only_the_network_or_only_the_host() {
        let wants = ["tcp", "nvlink", "tcpx|direct", "direct|nvlink", "nics>=2", "tcpx,nics>=2", "direct,nics>=2"]
            .map(|text| parsed(text).wants_network());
        assert_eq!(wants, [Some(true), Some(false), None, Some(false), Some(true), Some(true), None]);
        assert_eq!(Requirement::default().wants_network(), None);
        let needs = ["tcpx|nvlink,nics>=2", "tcpx|direct", "nics>=2"].map(|text| parsed(text).needs_gpus());
        assert_eq!(needs, [true, false, false]);
    }
}
