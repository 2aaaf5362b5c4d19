//! Circumstances of a measurement: host name, date and processor time.

/// Name of this host.
pub fn name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map_or("unknown".to_owned(), |name| name.trim().to_owned())
}

/// The current time in UTC, such as 2026-01-31T23:59:58Z.
pub fn date() -> String {
    // SAFETY: a null argument is allowed.
    let now = unsafe { libc::time(std::ptr::null_mut()) };
    // SAFETY: plain numbers; zero is a value of each.
    let mut t: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: two locals.
    unsafe { libc::gmtime_r(&now, &mut t) };
    format!("{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z", t.tm_year + 1900, t.tm_mon + 1, t.tm_mday, t.tm_hour, t.tm_min, t.tm_sec)
}

/// Processor time used by this process, in seconds.
pub fn cpu_seconds() -> f64 {
    // SAFETY: plain numbers; zero is a value of each.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: a local.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_sort_as_text_and_time_passes() {
        let date = date();
        assert!(date.len() == 20 && date.starts_with("20") && date.ends_with('Z'), "{date}");
        assert!(!name().is_empty());
        let before = cpu_seconds();
        let mut n = 1u64;
        while cpu_seconds() <= before {
            n = std::hint::black_box(n.wrapping_mul(3));
        }
    }
}
