//! Where values come from: the settings of one engine, else the environment. Refuses invalid values.

use super::table::{Kind, Variable, VARIABLES};
use crate::status::{bail, Error, Result};
use std::time::Duration;

/// Settings by name and value; the last one of a name counts.
#[derive(Clone, Copy, Default)]
pub(super) struct Source<'a>(pub &'a [(&'a str, &'a str)]);

impl Source<'_> {
    /// The value, if one is set.
    pub(super) fn get(self, variable: &Variable) -> Result<Option<String>> {
        let name = variable.name;
        let given = self.0.iter().rev().find(|(n, _)| *n == name).map(|(_, value)| Ok((*value).to_owned()));
        match given.unwrap_or_else(|| std::env::var(name)) {
            Ok(value) if value.trim().is_empty() => Ok(None),
            Ok(value) => Ok(Some(value.trim().to_owned())),
            Err(std::env::VarError::NotPresent) => Ok(None),
            Err(std::env::VarError::NotUnicode(_)) => bail!(InvalidArgument, "{name} is not UTF-8"),
        }
    }

    /// A number, if one is set.
    pub(super) fn number(self, variable: &Variable) -> Result<Option<u64>> {
        let Some(text) = self.get(variable)? else { return Ok(None) };
        match (parse_number(&text), variable.kind) {
            (Some(n), Kind::Number(from, to)) if (from..=to).contains(&n) => Ok(Some(n)),
            _ => bail!(InvalidArgument, "{}={text}: expected a number from {}", variable.name, variable.kind),
        }
    }

    /// A number, or the default.
    pub(super) fn number_or_default(self, variable: &Variable) -> Result<u64> {
        Ok(self.number(variable)?.or(variable.number).unwrap_or(0))
    }

    /// A flag, or the default.
    pub(super) fn flag(self, variable: &Variable) -> Result<bool> {
        match self.get(variable)?.map(|v| v.to_ascii_lowercase()).as_deref() {
            None => Ok(variable.number == Some(1)),
            Some("1" | "true" | "yes" | "on") => Ok(true),
            Some("0" | "false" | "no" | "off") => Ok(false),
            Some(other) => bail!(InvalidArgument, "{}={other}: expected 0 or 1", variable.name),
        }
    }

    /// One of the variable's words, if one is set.
    pub(super) fn word(self, variable: &Variable) -> Result<Option<&'static str>> {
        let Some(text) = self.get(variable)? else { return Ok(None) };
        let Kind::Word(words) = variable.kind else { bail!(Internal, "{} takes no words", variable.name) };
        match words.iter().find(|word| word.eq_ignore_ascii_case(&text)) {
            Some(word) => Ok(Some(word)),
            None => bail!(InvalidArgument, "{}={text}: expected one of {}", variable.name, variable.kind),
        }
    }

    /// A number of milliseconds, or the default.
    pub(super) fn millis(self, variable: &Variable) -> Result<Duration> {
        Ok(Duration::from_millis(self.number_or_default(variable)?))
    }

    /// A value that `parse` reads.
    pub(super) fn parsed<T>(self, variable: &Variable, parse: impl FnOnce(&str) -> Result<T>) -> Result<Option<T>> {
        let Some(text) = self.get(variable)? else { return Ok(None) };
        match parse(&text) {
            Ok(value) => Ok(Some(value)),
            Err(e) => Err(Error::new(e.kind(), format_args!("{}={text}: {e}", variable.name))),
        }
    }
}

/// A number with an optional suffix K, M or G (powers of 1024).
pub(super) fn parse_number(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'k' | b'K' => (&text[..text.len() - 1], 10),
        b'm' | b'M' => (&text[..text.len() - 1], 20),
        b'g' | b'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// The leading number of a text, as C's strtoll reads it with base 0, and what follows it.
pub(super) fn strtoll(text: &str) -> (i64, &str) {
    let (negative, rest) = match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    };
    let hex = rest.strip_prefix("0x").or_else(|| rest.strip_prefix("0X"));
    let (base, digits) = match hex {
        Some(digits) if digits.starts_with(|c: char| c.is_ascii_hexdigit()) => (16, digits),
        _ if rest.starts_with('0') => (8, rest),
        _ => (10, rest),
    };
    let end = digits.find(|c: char| !c.is_digit(base)).unwrap_or(digits.len());
    let number = match i64::from_str_radix(&digits[..end], base) {
        Ok(n) => n,
        Err(_) if end == 0 => 0,
        Err(_) => i64::MAX,
    };
    (if negative { -number } else { number }, &digits[end..])
}

/// Beginnings of names that belong to this library, or to UCCL.
const OURS: [&str; 2] = ["UCCL_TCPX_", "UCCL_P2P_"];
/// Variables of this repository's build, tests and NIXL plugin, which are no settings of the library.
const OTHERS: [&str; 8] = [
    "UCCL_P2P_LIBRARY",
    "UCCL_P2P_INCLUDE",
    "UCCL_P2P_PREBUILT",
    "UCCL_P2P_TEST",
    "UCCL_P2P_CARGO",
    "UCCL_TCPX_SIMULATION",
    "UCCL_TCPX_NIXL",
    "UCCL_TCPX_TEST",
];
/// Names less similar than this are not suggested.
const NEAR: f64 = 0.8;

/// Warnings about names in the environment that look like ours and are unknown.
pub(super) fn unknown<'a>(names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let known: Vec<&str> = VARIABLES.iter().map(|v| v.name).chain(soft_plugin::VARIABLES.iter().map(|v| v.name)).collect();
    let ours = |name: &&str| {
        OURS.iter().any(|begin| name.starts_with(begin))
            && !known.contains(name)
            && !OTHERS.iter().any(|begin| name.starts_with(begin))
    };
    let line = |name: &str| {
        let near = |other: &&str| strsim::normalized_damerau_levenshtein(name, other);
        let nearest = known.iter().copied().max_by(|a, b| near(a).total_cmp(&near(b))).filter(|other| near(other) >= NEAR);
        let meant = nearest.map_or(String::new(), |other| format!("; did you mean {other}?"));
        // Escaped, because a terminal may show the name.
        format!("{} is set, but the library has no variable of that name{meant}", name.escape_debug())
    };
    names.filter(ours).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plugins_limit_is_read_as_the_plugin_reads_it() {
        for (text, value, rest) in [
            ("524288", 524_288, ""),
            ("0x80000", 524_288, ""),
            ("0X1f", 31, ""),
            ("1M", 1, "M"),
            ("010", 8, ""),
            ("09", 0, "9"),
            ("0x", 0, "x"),
            ("-5", -5, ""),
            ("", 0, ""),
            ("K", 0, "K"),
            ("512 K", 512, " K"),
            ("99999999999999999999", i64::MAX, ""),
        ] {
            assert_eq!(strtoll(text), (value, rest), "{text}");
        }
    }

    #[test]
    fn numbers_take_suffixes_and_refuse_the_rest() {
        assert_eq!(parse_number("512K"), Some(524288));
        assert_eq!(parse_number("1m"), Some(1 << 20));
        assert_eq!(parse_number("7"), Some(7));
        for bad in ["", "K", "-1", "1.5M", "99999999999999999999G", "18446744073709551615K"] {
            assert_eq!(parse_number(bad), None, "{bad}");
        }
    }

    #[test]
    fn unknown_names_suggest_the_nearest_known_one() {
        let warnings = unknown(
            [
                "UCCL_TCPX_NUM_CHANELS",
                "UCCL_TCPX_SOFT_THREAD",
                "UCCL_TCPX_PLUGIN",
                "UCCL_P2P_FROBNICATE",
                "HOME",
                "UCCL_RDMA_QUIET",
            ]
            .into_iter(),
        );
        assert_eq!(warnings.len(), 3, "{warnings:?}");
        assert!(warnings[0].ends_with("did you mean UCCL_TCPX_NUM_CHANNELS?"), "{}", warnings[0]);
        assert!(warnings[1].ends_with("did you mean UCCL_TCPX_SOFT_THREADS?"), "{}", warnings[1]);
        assert!(warnings[2].starts_with("UCCL_P2P_FROBNICATE") && !warnings[2].contains("mean"), "{}", warnings[2]);
    }
}
