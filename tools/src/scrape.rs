//! Reads the statistics that a process exports (UCCL_TCPX_METRICS), from a Unix socket, an HTTP address or a file, and parses
//! them.

use crate::error::{Context, Result};
use crate::fail;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A source must have sent everything within this time.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// The file is replaced every second; older than this it is stale.
const STALE: Duration = Duration::from_secs(10);
/// More than any process exports.
const MOST: usize = 64 << 20;

/// A named number with labels.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Name, without the library's prefix.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// The number.
    pub value: f64,
}

/// Fetches the text from unix:PATH, ADDRESS:PORT, PORT or a file.
pub fn fetch(source: &str) -> Result<String> {
    let text;
    if let Some(path) = source.strip_prefix("unix:") {
        let stream = UnixStream::connect(path).context(format_args!("cannot connect to {path}"))?;
        text = ask(&stream, |left| stream.set_read_timeout(left)).context(format_args!("{path} does not answer"))?;
    } else if source.contains('/') {
        return read(source);
    } else {
        let address = if source.contains(':') { source.to_owned() } else { format!("127.0.0.1:{source}") };
        let stream = connect(&address).context(format_args!("cannot connect to {address}"))?;
        text = ask(&stream, |left| stream.set_read_timeout(left)).context(format_args!("{address} does not answer"))?;
    }
    match text.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200") => Ok(body.to_owned()),
        _ => fail!("{source} provides no statistics"),
    }
}

/// Reads a file that a process replaces every second.
fn read(path: &str) -> Result<String> {
    if std::fs::metadata(path).context(format_args!("cannot read {path}"))?.file_type().is_fifo() {
        // Opening a FIFO blocks until its other end is opened.
        fail!("{path} is a FIFO");
    }
    let file = std::fs::File::open(path).context(format_args!("cannot read {path}"))?;
    let written = file.metadata().and_then(|about| about.modified()).context(format_args!("cannot read {path}"))?;
    let mut text = String::new();
    file.take(MOST as u64).read_to_string(&mut text).context(format_args!("cannot read {path}"))?;
    if !text.ends_with("# EOF\n") {
        fail!("{path} provides no statistics");
    }
    // After the clock was set back, no file counts as old.
    match written.elapsed().unwrap_or_default() {
        age if age > STALE => fail!("{path} was written {} s ago: its process has ended, or hangs", age.as_secs()),
        _ => Ok(text),
    }
}

/// Like TcpStream::connect, with a timeout.
fn connect(address: &str) -> std::io::Result<TcpStream> {
    let mut last = std::io::Error::from(std::io::ErrorKind::NotFound);
    for to in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&to, ANSWER_TIMEOUT) {
            Ok(stream) => return Ok(stream),
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// Sends the request and reads to the end. `limit` sets the timeout of one read: the deadline covers all reads, so a source that
/// sends slowly is given up as well.
fn ask(mut stream: impl Read + Write, limit: impl Fn(Option<Duration>) -> std::io::Result<()>) -> std::io::Result<String> {
    use std::io::ErrorKind::{InvalidData, TimedOut};
    let deadline = Instant::now() + ANSWER_TIMEOUT;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let (mut bytes, mut buffer) = (Vec::new(), [0; 64 << 10]);
    while bytes.len() < MOST {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(TimedOut.into());
        }
        limit(Some(left))?;
        match stream.read(&mut buffer)? {
            0 => break,
            n => bytes.extend_from_slice(&buffer[..n]),
        }
    }
    String::from_utf8(bytes).map_err(|_| InvalidData.into())
}

/// Parses the text; lines that are not samples of the library are skipped.
pub fn parse(text: &str) -> Vec<Sample> {
    text.lines().filter_map(sample).collect()
}

fn sample(line: &str) -> Option<Sample> {
    let line = line.strip_prefix("uccl_tcpx_")?;
    let (name, mut rest) = line.split_at(line.find(['{', ' '])?);
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while !rest.starts_with('}') {
            let (label, after) = rest.split_once("=\"")?;
            let (value, after) = quoted(after)?;
            labels.insert(label.to_owned(), value);
            rest = after.strip_prefix(',').unwrap_or(after);
        }
        rest = &rest[1..];
    }
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some(Sample { name: name.to_owned(), labels, value })
}

/// A quoted text up to its closing quote, and the rest of the line.
fn quoted(text: &str) -> Option<(String, &str)> {
    let (mut out, mut chars) = (String::new(), text.char_indices());
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((out, &text[at + 1..])),
            '\\' => match chars.next()?.1 {
                'n' => out.push('\n'),
                other => out.push(other),
            },
            other => out.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_sends_too_slowly_is_given_up() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let drips = std::thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            let mut said = 0;
            // Until the reader gives up, or this limit is reached.
            while said < 200 && stream.write_all(b"H").is_ok() {
                said += 1;
                std::thread::sleep(ANSWER_TIMEOUT / 40);
            }
            said
        });
        let error = fetch(&address).unwrap_err().to_string();
        assert!(error.contains("does not answer"), "{error}");
        assert!(drips.join().unwrap() < 200, "the reader waited to the end");
    }

    #[test]
    fn samples_are_parsed() {
        let text = "# TYPE uccl_tcpx_channel_slow gauge\nuccl_tcpx_channel_slow{engine=\"a:1?-1\",peer=\"x\\\"y\\\\\\n,}\",channel=\"0\"} 1.0\n\
                    uccl_tcpx_uptime_seconds 2.5\nother 3\nuccl_tcpx_bad{x 1\nuccl_tcpx_none{} 4\n# EOF\n";
        let samples = parse(text);
        assert_eq!(samples.len(), 3, "{samples:?}");
        assert_eq!((samples[0].labels["peer"].as_str(), samples[0].value), ("x\"y\\\n,}", 1.0));
        assert_eq!((samples[1].name.as_str(), samples[1].value), ("uptime_seconds", 2.5));
    }
}
