//! Helpers for the unit tests that measure: they print and assert no times. Knows nothing of what is measured.

/// Whether measurements were asked for; prints a line if not.
pub(crate) fn wanted(test: &str) -> bool {
    let wanted = std::env::var_os("UCCL_TEST_BENCH").is_some();
    if !wanted {
        eprintln!("SKIPPED: {test} needs UCCL_TEST_BENCH=1");
    }
    wanted
}

/// The median and the smallest of some times.
pub(crate) fn median_and_least(mut times: Vec<f64>) -> (f64, f64) {
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2], times[0])
}

/// A line about the nanoseconds that each block took.
pub(crate) fn line_of_blocks(what: &str, times: Vec<f64>) {
    let (median, least) = median_and_least(times);
    println!("{what:<8} {median:>6.1} ns a block, median; {least:.1} least");
}
