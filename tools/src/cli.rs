//! The command lines of the programs, where their manual pages are made from them too.

use clap::{CommandFactory, Parser};
use std::path::PathBuf;
use std::time::Duration;

/// Shows what the connections of a running process do: rates, windows, round trips and retransmits of every channel, the slow ones
/// marked. The process offers its statistics where UCCL_TCPX_METRICS says.
#[derive(Parser)]
#[command(version, name = "tcpx-top")]
pub struct Top {
    /// Where processes offer their statistics: unix:PATH, ADDRESS:PORT, PORT (of the loopback address), or the path of a file.
    #[arg(required = true, value_name = "SOURCE")]
    pub sources: Vec<String>,
    /// Seconds between readings.
    #[arg(long, default_value = "1", value_parser = parse_interval)]
    pub interval: Duration,
    /// Print one reading as text and end; so does a standard output that is no terminal.
    #[arg(long)]
    pub once: bool,
    /// Draw one reading into this file, as a picture for reports, and end.
    #[arg(long, value_name = "FILE.svg", conflicts_with = "once")]
    pub svg: Option<PathBuf>,
}

/// Seconds between two looks, with fractions.
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
    for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
        let _ = clap_mangen::Man::new(sub.clone()).render(&mut page);
    }
    String::from_utf8_lossy(&page).into_owned()
}
