//! Parsing and printing of sizes and times. Pure.

/// Parses bytes: a whole number with an optional suffix K, M or G (powers of 1024; `KiB`, `kb` and the like mean the same).
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, suffix) = text.split_at(digits);
    let shift = match suffix.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        _ => return Err(format!("'{text}' is not a size: write a whole number with an optional suffix K, M or G, such as 64M")),
    };
    let number: u64 =
        number.parse().map_err(|_| format!("'{text}' is not a size: it must start with a whole number that fits 64 bits"))?;
    let bytes = number.checked_mul(1 << shift).ok_or_else(|| format!("'{text}' is too large"))?;
    if bytes == 0 {
        return Err("a size must be larger than 0".to_string());
    }
    Ok(bytes)
}

/// Bytes in the largest binary unit that divides them: `64 MiB`, `4 KiB`, `1000 B`.
pub fn show_size(bytes: u64) -> String {
    for (shift, unit) in [(30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes >= 1 << shift && bytes % (1 << shift) == 0 {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} B")
}

/// Microseconds with a precision that suits their magnitude.
pub fn show_us(us: f64) -> String {
    match us {
        us if us < 100.0 => format!("{us:.2}"),
        us if us < 10_000.0 => format!("{us:.1}"),
        us => format!("{us:.0}"),
    }
}

/// A number per second, with decimals where it is small.
pub fn show_rate(per_second: f64) -> String {
    match per_second {
        few if few < 1000.0 => format!("{few:.2}"),
        many => format!("{many:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse() {
        for (text, bytes) in [
            ("1", 1),
            ("4096", 4096),
            ("4K", 4096),
            ("4k", 4096),
            ("64M", 64 << 20),
            ("64 MiB", 64 << 20),
            (" 2G ", 2 << 30),
            ("7B", 7),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "K", "-1", "1.5M", "4X", "0", "0K", "99999999999999999999", "18446744073709551615K"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_show_and_parse_back() {
        for bytes in [1, 1000, 1024, 4096, 1 << 20, (1 << 20) + 1, 64 << 20, 3 << 30] {
            assert_eq!(parse_size(&show_size(bytes)), Ok(bytes));
        }
        assert_eq!(show_size(64 << 20), "64 MiB");
        assert_eq!(show_size(1000), "1000 B");
    }

    #[test]
    fn times_show() {
        assert_eq!(show_us(7.456), "7.46");
        assert_eq!(show_us(123.456), "123.5");
        assert_eq!(show_us(12345.6), "12346");
    }
}
