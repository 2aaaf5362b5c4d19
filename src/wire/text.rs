//! Text that crosses the wire: printable ASCII and nothing else, so that a peer's text can appear in a log line or an error.
//! Pure.

use crate::status::{bail, Result};

/// Whether `byte` may appear in a text of the wire.
pub(crate) fn is_printable(byte: u8) -> bool {
    matches!(byte, b' '..=b'~')
}

/// `text` in the form that may be sent or logged: anything but printable ASCII is escaped, and it has at most `max` bytes.
pub(crate) fn printable(text: &str, max: usize) -> String {
    let mut out = String::with_capacity(text.len().min(max));
    for c in text.chars() {
        let start = out.len();
        match c {
            ' '..='~' => out.push(c),
            _ => out.extend(c.escape_default()),
        }
        if out.len() > max {
            out.truncate(start);
            break;
        }
    }
    out
}

/// Checks a text that the peer sent.
///
/// # Errors
/// `Protocol` when it is longer than `max` or contains anything but printable ASCII.
pub(crate) fn checked<'a>(bytes: &'a [u8], max: usize, what: &str) -> Result<&'a str> {
    if bytes.len() > max {
        bail!(Protocol, "{what} of {} bytes, {max} at most", bytes.len());
    }
    match std::str::from_utf8(bytes) {
        Ok(text) if bytes.iter().copied().all(is_printable) => Ok(text),
        _ => bail!(Protocol, "{what} is not printable ASCII"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn escapes_and_newlines_never_pass() {
        assert_eq!(printable("a\n\x1b[2Jb\u{e9}", 99), "a\\n\\u{1b}[2Jb\\u{e9}");
        assert_eq!(printable("abc\n", 4), "abc");
        assert_eq!(printable("a\u{202e}b\u{200b}c\u{2028}d", 99), "a\\u{202e}b\\u{200b}c\\u{2028}d");
        let unseen = ["\u{202e}", "a\u{200b}", "\u{2028}b", "\u{2029}", "\u{feff}", "\u{85}"].map(str::as_bytes);
        for bad in [&b"a\nb"[..], b"\x1b[0m", b"\xff", b"\0"].into_iter().chain(unseen) {
            assert!(checked(bad, 99, "text").is_err(), "{bad:?}");
        }
        assert!(checked(b"abcd", 3, "text").is_err());
        assert_eq!(checked(b"a b~", 4, "text").unwrap(), "a b~");
    }

    proptest! {
        #[test]
        fn what_is_printed_is_accepted(text in ".{0,80}", max in 0usize..100) {
            let out = printable(&text, max);
            prop_assert_eq!(checked(out.as_bytes(), max, "text").unwrap(), out.as_str());
        }
    }
}
