//! What two engines send each other inside the handshake, and what they agree on. Pure; every value of the peer is checked
//! against its range here.

use super::text;
use crate::config::MAX_CHUNK_BYTES;
use crate::status::{bail, Result};
use crate::types::{Protect, DEVMEM, SOFT};
use std::time::Duration;

/// Most channels of one kind.
pub(crate) const MAX_CHANNELS: u16 = 64;
const MIN_CHUNK_BYTES: u32 = 4096;
const MIN_PEER_TIMEOUT_MS: u32 = 100;
const MAX_PEER_TIMEOUT_MS: u32 = 86_400_000;
const MAX_GPU_INDEX: i32 = 1023;
const MAX_PLUGIN: usize = 16;
const MAX_GPU: usize = 32;
const MAX_WANTED_GPU: usize = 64;
/// Most further GPUs that a hello names.
pub(crate) const MAX_FURTHER: usize = 7;
/// Most bytes of an encoded hello.
pub(crate) const MAX_HELLO: usize = 2 + 4 + 4 + 4 + 1 + 1 + MAX_PLUGIN + 1 + MAX_GPU + 1 + MAX_WANTED_GPU + 1 + MAX_FURTHER + 1;

/// An engine's hello.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    /// Channels of each kind that the engine wants, 1 to [`MAX_CHANNELS`].
    pub channels: u16,
    /// Largest chunk, bytes.
    pub chunk_bytes: u32,
    /// CUDA index of the engine's GPU, -1 without one.
    pub gpu_index: i32,
    /// Silence after which the engine takes its peer for lost.
    pub peer_timeout_ms: u32,
    /// How much the engine wants the data protected.
    pub protect: Protect,
    /// The plugin that carries device memory.
    pub plugin: String,
    /// PCI address of the engine's GPU, or "-1".
    pub gpu: String,
    /// The GPU that the connector asked for, as it was given; informative.
    pub wanted_gpu: String,
    /// CUDA indexes of further GPUs whose memory the engine has registered, rising.
    pub further_gpus: Vec<u8>,
    /// The connector sets up channels of a connection that the two engines have, and no other one.
    pub joins: bool,
}

/// What the two engines agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Terms {
    /// Channels of each kind.
    pub channels: u16,
    /// Largest chunk, bytes.
    pub chunk_bytes: u32,
    /// Silence after which each engine takes its peer for lost; heartbeats are sent to suit.
    pub peer_timeout: Duration,
    /// How much the data is protected.
    pub protect: Protect,
}

fn put_text(out: &mut Vec<u8>, value: &str, max: usize) {
    let value = text::printable(value, max);
    out.push(value.len() as u8);
    out.extend_from_slice(value.as_bytes());
}

fn get_text(rest: &mut &[u8], max: usize, what: &str) -> Result<String> {
    let Some((&len, tail)) = rest.split_first() else { bail!(Protocol, "a hello ends before the {what}") };
    let Some((bytes, tail)) = tail.split_at_checked(usize::from(len)) else { bail!(Protocol, "a hello ends inside the {what}") };
    *rest = tail;
    Ok(text::checked(bytes, max, what)?.to_owned())
}

fn get<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N]> {
    let Some((head, tail)) = rest.split_first_chunk() else { bail!(Protocol, "a hello ends early") };
    *rest = tail;
    Ok(*head)
}

fn get_further(rest: &mut &[u8]) -> Result<Vec<u8>> {
    let [n] = get(rest)?;
    if usize::from(n) > MAX_FURTHER {
        bail!(Protocol, "a hello names {n} further GPUs");
    }
    let Some((further, tail)) = rest.split_at_checked(usize::from(n)) else { bail!(Protocol, "a hello ends inside the GPUs") };
    *rest = tail;
    Ok(further.to_vec())
}

fn protect([level]: [u8; 1]) -> Result<Protect> {
    let known = [Protect::Off, Protect::Integrity, Protect::Encrypt];
    match known.into_iter().find(|&p| p as u8 == level) {
        Some(protect) => Ok(protect),
        None => bail!(Protocol, "a hello asks for protection {level}, which is not known"),
    }
}

fn joins([flag]: [u8; 1]) -> Result<bool> {
    match flag {
        0 | 1 => Ok(flag == 1),
        _ => bail!(Protocol, "a hello asks for set-up {flag}, which is not known"),
    }
}

impl Hello {
    /// Appends the hello. Texts are escaped and cut to their limits; numbers are sent as they are.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.channels.to_le_bytes());
        out.extend_from_slice(&self.chunk_bytes.to_le_bytes());
        out.extend_from_slice(&self.gpu_index.to_le_bytes());
        out.extend_from_slice(&self.peer_timeout_ms.to_le_bytes());
        out.push(self.protect as u8);
        put_text(out, &self.plugin, MAX_PLUGIN);
        put_text(out, &self.gpu, MAX_GPU);
        put_text(out, &self.wanted_gpu, MAX_WANTED_GPU);
        let further = &self.further_gpus[..self.further_gpus.len().min(MAX_FURTHER)];
        out.push(further.len() as u8);
        out.extend_from_slice(further);
        out.push(u8::from(self.joins));
    }

    /// Decodes the hello in exactly these bytes and checks the range of every value.
    ///
    /// # Errors
    /// `Protocol` names the value.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Hello> {
        let rest = &mut &*bytes;
        let hello = Hello {
            channels: u16::from_le_bytes(get(rest)?),
            chunk_bytes: u32::from_le_bytes(get(rest)?),
            gpu_index: i32::from_le_bytes(get(rest)?),
            peer_timeout_ms: u32::from_le_bytes(get(rest)?),
            protect: protect(get(rest)?)?,
            plugin: get_text(rest, MAX_PLUGIN, "plugin's name")?,
            gpu: get_text(rest, MAX_GPU, "GPU's name")?,
            wanted_gpu: get_text(rest, MAX_WANTED_GPU, "wanted GPU")?,
            further_gpus: get_further(rest)?,
            joins: joins(get(rest)?)?,
        };
        if !rest.is_empty() {
            bail!(Protocol, "a hello has {} bytes too many", rest.len());
        }
        hello.check()?;
        Ok(hello)
    }

    /// Checks that every number is in its range; used for the own hello too, before it is sent.
    pub(crate) fn check(&self) -> Result<()> {
        if !(1..=MAX_CHANNELS).contains(&self.channels) {
            bail!(Protocol, "a hello asks for {} channels, expected 1 to {MAX_CHANNELS}", self.channels);
        }
        if !(MIN_CHUNK_BYTES..=MAX_CHUNK_BYTES as u32).contains(&self.chunk_bytes) {
            bail!(
                Protocol,
                "a hello asks for chunks of {} bytes, expected {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES}",
                self.chunk_bytes
            );
        }
        if !(MIN_PEER_TIMEOUT_MS..=MAX_PEER_TIMEOUT_MS).contains(&self.peer_timeout_ms) {
            bail!(
                Protocol,
                "a hello asks for a peer timeout of {} ms, expected {MIN_PEER_TIMEOUT_MS} to {MAX_PEER_TIMEOUT_MS}",
                self.peer_timeout_ms
            );
        }
        if !(-1..=MAX_GPU_INDEX).contains(&self.gpu_index) {
            bail!(Protocol, "a hello names GPU {}", self.gpu_index);
        }
        let further = &self.further_gpus;
        if further.len() > MAX_FURTHER || further.windows(2).any(|w| w[0] >= w[1]) || further.contains(&u8::MAX) {
            bail!(Protocol, "the further GPUs of a hello are not in rising order");
        }
        if self.plugin.is_empty() {
            bail!(Protocol, "a hello names no plugin");
        }
        Ok(())
    }

    /// The timeout in the range that a hello allows.
    pub(crate) fn peer_timeout_ms(timeout: Duration) -> u32 {
        u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX).clamp(MIN_PEER_TIMEOUT_MS, MAX_PEER_TIMEOUT_MS)
    }

    /// What the two engines agree on.
    ///
    /// # Errors
    /// `Unsupported` when their plugins differ.
    pub(crate) fn agree(&self, theirs: &Hello) -> Result<Terms> {
        let over_tcp = |plugin: &str| plugin == SOFT || plugin == DEVMEM;
        if self.plugin != theirs.plugin && !(over_tcp(&self.plugin) && over_tcp(&theirs.plugin)) {
            bail!(Unsupported, "the engines use different network plugins: {} and {}", self.plugin, theirs.plugin);
        }
        // The stricter engine decides; NICs that write into GPU memory cannot decrypt.
        let protect = self.protect.max(theirs.protect);
        if protect == Protect::Encrypt && !over_tcp(&self.plugin) {
            bail!(Unsupported, "one engine asks for encryption of the data, which network plugin {} cannot do", self.plugin);
        }
        Ok(Terms {
            protect,
            channels: self.channels.min(theirs.channels),
            chunk_bytes: self.chunk_bytes.min(theirs.chunk_bytes),
            peer_timeout: Duration::from_millis(self.peer_timeout_ms.min(theirs.peer_timeout_ms).into()),
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A hello of an ordinary engine.
    pub(crate) fn sample() -> Hello {
        Hello {
            channels: 4,
            chunk_bytes: 512 << 10,
            gpu_index: -1,
            peer_timeout_ms: 10_000,
            protect: Protect::Off,
            plugin: "soft".into(),
            gpu: "-1".into(),
            wanted_gpu: "0000:4a:00.0".into(),
            further_gpus: vec![1, 3],
            joins: false,
        }
    }

    fn encoded(hello: &Hello) -> Vec<u8> {
        let mut out = Vec::new();
        hello.encode(&mut out);
        out
    }

    #[test]
    fn engines_with_and_without_device_memory_tcp_agree() {
        let with = |plugin: &str, protect| Hello { plugin: plugin.into(), protect, ..sample() };
        for (a, b) in [("devmem", "devmem"), ("devmem", "soft"), ("soft", "devmem")] {
            let terms = with(a, Protect::Off).agree(&with(b, Protect::Encrypt)).unwrap();
            assert_eq!(terms.protect, Protect::Encrypt);
        }
        assert!(with("devmem", Protect::Off).agree(&with("tcpx", Protect::Off)).is_err());
    }

    #[test]
    fn every_number_out_of_range_is_refused() {
        let with = |change: fn(&mut Hello)| {
            let mut hello = sample();
            change(&mut hello);
            hello
        };
        for bad in [
            with(|h| h.channels = 0),
            with(|h| h.channels = 65),
            with(|h| h.chunk_bytes = 0),
            with(|h| h.chunk_bytes = 4095),
            with(|h| h.chunk_bytes = (16 << 20) + 1),
            with(|h| h.peer_timeout_ms = 0),
            with(|h| h.peer_timeout_ms = 99),
            with(|h| h.peer_timeout_ms = u32::MAX),
            with(|h| h.gpu_index = -2),
            with(|h| h.gpu_index = i32::MAX),
            with(|h| h.plugin = String::new()),
            with(|h| h.further_gpus = vec![2, 1]),
            with(|h| h.further_gpus = vec![2, 2]),
            with(|h| h.further_gpus = vec![255]),
        ] {
            assert_eq!(Hello::decode(&encoded(&bad)).unwrap_err().kind(), crate::status::ErrorKind::Protocol, "{bad:?}");
        }
        for good in [
            with(|h| h.channels = 1),
            with(|h| h.channels = 64),
            with(|h| h.chunk_bytes = 4096),
            with(|h| h.chunk_bytes = 16 << 20),
            with(|h| h.further_gpus.clear()),
            with(|h| h.further_gpus = (1..8).collect()),
        ] {
            assert_eq!(Hello::decode(&encoded(&good)).unwrap(), good);
        }
    }

    #[test]
    fn the_smaller_value_wins() {
        let other = Hello { channels: 9, chunk_bytes: 4096, peer_timeout_ms: 20_000, ..sample() };
        let terms = Terms { channels: 4, chunk_bytes: 4096, peer_timeout: Duration::from_secs(10), protect: Protect::Off };
        assert_eq!(sample().agree(&other), Ok(terms));
        assert_eq!(other.agree(&sample()), Ok(terms));
        let plugin = Hello { plugin: "tcpx".into(), ..sample() };
        assert_eq!(plugin.agree(&sample()).unwrap_err().kind(), crate::status::ErrorKind::Unsupported);
    }

    #[test]
    fn the_stricter_protection_wins_if_the_plugin_can_do_it() {
        let with = |protect, plugin: &str| Hello { protect, plugin: plugin.into(), ..sample() };
        let levels = [Protect::Off, Protect::Integrity, Protect::Encrypt];
        for (a, b) in levels.into_iter().flat_map(|a| levels.map(|b| (a, b))) {
            let agreed = with(a, "soft").agree(&with(b, "soft")).map(|t| t.protect);
            assert_eq!(agreed, Ok(if a as u8 > b as u8 { a } else { b }));
            let foreign = with(a, "tcpx").agree(&with(b, "tcpx"));
            assert_eq!(foreign.is_err(), a == Protect::Encrypt || b == Protect::Encrypt, "{foreign:?}");
        }
        let mut bytes = encoded(&sample());
        bytes[14] = 3;
        assert!(Hello::decode(&bytes).unwrap_err().to_string().contains("protection 3"));
    }

    #[test]
    fn text_that_is_not_printable_is_refused_and_never_shown() {
        let mut bytes = encoded(&sample());
        let at = bytes.windows(4).position(|w| w == b"soft").unwrap();
        for evil in [b"so\nt", b"\x1b[2J", b"so\0t", b"so\xfft"] {
            bytes[at..at + 4].copy_from_slice(evil);
            let error = Hello::decode(&bytes).unwrap_err().to_string();
            assert!(error.bytes().all(text::is_printable), "{error:?}");
        }
        // Texts of this engine are escaped and cut instead of failing a connect.
        let odd = Hello { wanted_gpu: "\n".repeat(500), ..sample() };
        assert_eq!(Hello::decode(&encoded(&odd)).unwrap().wanted_gpu.len(), 64);
        assert!(encoded(&odd).len() <= MAX_HELLO);
    }

    proptest! {
        #[test]
        fn damaged_and_cut_hellos_never_panic(at in 0..50usize, value in any::<u8>(), cut in 0..60usize, random in proptest::collection::vec(any::<u8>(), 0..200)) {
            let good = encoded(&sample());
            prop_assert_eq!(Hello::decode(&good).unwrap(), sample());
            let mut bytes = good.clone();
            let at = at % bytes.len();
            bytes[at] = value;
            let _ = Hello::decode(&bytes);
            prop_assert!(cut >= good.len() || Hello::decode(&good[..cut]).is_err());
            bytes = good;
            bytes.push(value);
            prop_assert!(Hello::decode(&bytes).is_err());
            let _ = Hello::decode(&random);
        }
    }
}
