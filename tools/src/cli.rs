//! The command lines of the programs, and the manual pages generated from them.

use clap::{CommandFactory, Parser};
use std::path::PathBuf;
use std::time::Duration;
use uccl_p2p::require::Requirement;

/// Shows the connections of a running process: rate, window, round-trip time and retransmits of every channel, with slow ones
/// marked. The process needs UCCL_TCPX_METRICS in its environment.
#[derive(Parser)]
#[command(version, name = "tcpx-top")]
pub struct Top {
    /// The value of UCCL_TCPX_METRICS in the process: unix:PATH, ADDRESS:PORT, PORT (of the loopback address), or the path of
    /// a file.
    #[arg(required = true, value_name = "SOURCE")]
    pub sources: Vec<String>,
    /// Seconds between two readings.
    #[arg(long, default_value = "1", value_parser = parse_interval)]
    pub interval: Duration,
    /// Print one reading as text and exit; the default if standard output is not a terminal.
    #[arg(long)]
    pub once: bool,
    /// Draw one reading into this file, as a picture for a report, and exit.
    #[arg(long, value_name = "FILE.svg", conflicts_with = "once")]
    pub svg: Option<PathBuf>,
}

/// Parses what must have carried the bytes.
pub fn parse_requirement(text: &str) -> Result<Requirement, String> {
    Requirement::parse(text).map_err(|e| e.to_str().to_owned())
}

/// Seconds between two readings, with fractions.
fn parse_interval(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("expected a number of seconds from 0.1 to 3600".to_owned()),
    }
}

/// Parses the command line. `--manual-page` prints the manual page of the program and its commands instead, for docs/man.
pub fn parse<C: Parser + CommandFactory>() -> C {
    if std::env::args_os().nth(1).is_some_and(|arg| arg == "--manual-page") {
        crate::say!("{}", manual_page(C::command()).trim_end());
        std::process::exit(0);
    }
    C::parse()
}

fn manual_page(mut command: clap::Command) -> String {
    command.build();
    let mut page = Vec::new();
    // Writing to memory does not fail.
    let _ = clap_mangen::Man::new(command.clone()).render(&mut page);
    page.extend_from_slice(sections(command.get_name()).as_bytes());
    for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
        let _ = clap_mangen::Man::new(sub.clone()).render(&mut page);
    }
    String::from_utf8_lossy(&page).into_owned()
}

/// The sections of a program's manual page that are not generated from its options.
fn sections(program: &str) -> &'static str {
    match program {
        "tcpx-info" => include_str!("man/tcpx-info.roff"),
        "tcpx-perf" => include_str!("man/tcpx-perf.roff"),
        _ => include_str!("man/tcpx-top.roff"),
    }
}
