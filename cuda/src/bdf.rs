//! PCI addresses in the forms of users, the driver and sysfs: "0000:4a:00.0", any case, domain of 4 or 8 digits. Pure.

use std::fmt;

/// A PCI address; prints in lower case with a domain of four digits (more only if needed).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Bdf {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl Bdf {
    /// Parses `[domain:]bus:device[.function]`, hexadecimal; `None` when it is anything else.
    pub fn parse(text: &str) -> Option<Bdf> {
        let (place, function) = match text.trim().split_once('.') {
            Some((place, function)) => (place, hex(function, 1)?),
            None => (text.trim(), 0),
        };
        let mut parts = place.split(':').rev();
        let (device, bus) = (hex(parts.next()?, 2)?, hex(parts.next()?, 2)?);
        let domain = parts.next().map_or(Some(0), |d| hex(d, 8))?;
        if parts.next().is_some() || device > 0x1f || function > 7 {
            return None;
        }
        Some(Bdf { domain, bus: bus as u8, device: device as u8, function: function as u8 })
    }
}

fn hex(text: &str, digits: usize) -> Option<u32> {
    let fits = (1..=digits).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
    if fits {
        u32::from_str_radix(text, 16).ok()
    } else {
        None
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_one_device() {
        for text in ["0000:4a:00.0", "00000000:4A:00.0", "0000:4A:00.0", "4a:00.0", "4a:00", " 0:4a:0.0\n"] {
            assert_eq!(Bdf::parse(text).map(|b| b.to_string()).as_deref(), Some("0000:4a:00.0"), "{text:?}");
        }
        assert_ne!(Bdf::parse("0000:4a:00.0"), Bdf::parse("0001:4a:00.0"));
        assert_eq!(Bdf::parse("00010000:01:1f.7").map(|b| b.to_string()).as_deref(), Some("10000:01:1f.7"));
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            ":",
            "-1",
            "GPU-1234",
            "0000:4a:20.0",
            "0000:4a:00.8",
            "0:0:4a:00.0",
            "0000:4aa:00.0",
            "+000:4a:00.0",
            "000000000:4a:00.0",
            "4a",
        ] {
            assert_eq!(Bdf::parse(text), None, "{text:?}");
        }
    }
}
