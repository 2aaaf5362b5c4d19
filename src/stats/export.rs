//! Exports the statistics of a process's engines: over HTTP on a socket, or in a file that is replaced every second.
//! Knows nothing of engines beyond a function that gives their statistics.

use super::prometheus::{exposition, Format};
use super::EngineStats;
use crate::addresses::Target;
use process::{Mutex, PerProcess};
use reactor::Waker;
use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often a file is rewritten.
const REWRITE: Duration = Duration::from_secs(1);
/// How long a client may take for its request and the answer.
const REQUEST_DEADLINE: Duration = Duration::from_secs(1);
/// Clients at once; the oldest gives way.
const GUESTS: usize = 64;
/// Largest request that is read.
const MAX_REQUEST: usize = 8 << 10;

/// Gives the statistics of an engine while it lives.
pub(crate) type Source = Box<dyn Fn() -> Option<EngineStats> + Send + Sync>;

/// Engines with their numbers, which count up from 1 and stay with an engine for as long as it lives.
#[derive(Default)]
struct Numbered {
    given: u64,
    engines: Vec<(u64, Source)>,
}

impl Numbered {
    fn push(&mut self, source: Source) {
        self.given += 1;
        self.engines.push((self.given, source));
    }
}

type Sources = Arc<Mutex<Numbered>>;

/// Offers statistics until it is dropped.
pub(crate) struct Exporter {
    sources: Sources,
    ending: Arc<Waker>,
    thread: Option<JoinHandle<()>>,
}

static EXPORTERS: PerProcess<Mutex<HashMap<Target, Weak<Exporter>>>> = PerProcess::new(Mutex::default);

/// Offers the statistics of one more engine.
///
/// # Errors
/// When the socket cannot be opened, or the file cannot be written.
pub(crate) fn offer(target: &Target, source: Source) -> io::Result<Arc<Exporter>> {
    let mut exporters = EXPORTERS.get().lock();
    if let Some(exporter) = exporters.get(target).and_then(Weak::upgrade) {
        exporter.sources.lock().push(source);
        return Ok(exporter);
    }
    let exporter = Arc::new(Exporter::start(target, source)?);
    exporters.retain(|_, known| known.strong_count() > 0);
    exporters.insert(target.clone(), Arc::downgrade(&exporter));
    Ok(exporter)
}

impl Exporter {
    fn start(target: &Target, source: Source) -> io::Result<Exporter> {
        let sources = Sources::default();
        sources.lock().push(source);
        let ending = Arc::new(Waker::new()?);
        let (gives, ends) = (sources.clone(), ending.clone());
        let work: Box<dyn FnOnce() + Send> = match target.clone() {
            Target::File(path) => {
                rewrite(&path, "# EOF\n")?;
                Box::new(move || write_each_second(&path, &gives, &ends))
            }
            Target::Unix(path) => {
                let listener = listen_unix(&path)?;
                Box::new(move || {
                    serve(&Listener::Unix(listener), &gives, &ends);
                    let _ = std::fs::remove_file(&path);
                })
            }
            Target::Tcp(address) => {
                let listener = Listener::Tcp(TcpListener::bind(address)?);
                Box::new(move || serve(&listener, &gives, &ends))
            }
        };
        let thread = process::thread::spawn("uccl-metrics", move || {
            // A defect in statistics must not end the process.
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err() {
                log::error!("the thread that offers statistics panicked; it has ended");
            }
        })?;
        Ok(Exporter { sources, ending, thread: Some(thread) })
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        self.ending.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The statistics of all engines.
fn gather(sources: &Sources, format: Format) -> String {
    let mut engines = Vec::new();
    sources.lock().engines.retain(|(number, source)| match source() {
        Some(stats) => {
            engines.push((*number, stats));
            true
        }
        None => false,
    });
    exposition(engines, format)
}

/// Waits for the end, or until `fd` is readable; whether it is the end.
fn wait(ending: &Waker, fd: RawFd, timeout: Duration) -> bool {
    let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut fds = [poll(ending.fd()), poll(fd)];
    // SAFETY: an array and its length; a negative descriptor is passed over.
    unsafe { libc::poll(fds.as_mut_ptr(), 2, timeout.as_millis() as libc::c_int) };
    fds[0].revents != 0
}

// ---- the file ----

fn write_each_second(path: &Path, sources: &Sources, ending: &Waker) {
    let mut warned = false;
    loop {
        match rewrite(path, &gather(sources, Format::Plain)) {
            Ok(()) => warned = false,
            Err(e) if !warned => {
                warned = true;
                log::warn!("cannot write statistics to {}: {e}", path.display());
            }
            Err(_) => {}
        }
        if wait(ending, -1, REWRITE) {
            return;
        }
    }
}

/// Replaces the file at once: a reader sees the old contents or the new ones. Nothing else is replaced, a device least of all, and what lies
/// where the new contents are written first is not written through.
fn rewrite(path: &Path, text: &str) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.is_file() => return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file")),
        _ => {}
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let fresh = path.with_file_name(name);
    // Of a process of the same number that ended in the middle of it.
    let _ = std::fs::remove_file(&fresh);
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).open(&fresh)?;
    let written = file.write_all(text.as_bytes()).and_then(|()| std::fs::rename(&fresh, path));
    written.inspect_err(|_| drop(std::fs::remove_file(&fresh)))
}

// ---- sockets ----

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

trait Stream: Read + Write + AsRawFd {}
impl<T: Read + Write + AsRawFd> Stream for T {}

impl Listener {
    fn fd(&self) -> RawFd {
        match self {
            Listener::Unix(listener) => listener.as_raw_fd(),
            Listener::Tcp(listener) => listener.as_raw_fd(),
        }
    }

    fn nonblocking(&self) -> io::Result<()> {
        match self {
            Listener::Unix(listener) => listener.set_nonblocking(true),
            Listener::Tcp(listener) => listener.set_nonblocking(true),
        }
    }

    fn accept(&self) -> io::Result<Guest> {
        let stream: Box<dyn Stream> = match self {
            Listener::Unix(listener) => {
                let (client, _) = listener.accept()?;
                client.set_nonblocking(true)?;
                Box::new(client)
            }
            Listener::Tcp(listener) => {
                let (client, _) = listener.accept()?;
                client.set_nonblocking(true)?;
                Box::new(client)
            }
        };
        Ok(Guest { stream, request: Vec::new(), answer: Vec::new(), sent: 0, until: Instant::now() + REQUEST_DEADLINE })
    }
}

/// Opens a Unix socket. Replaces one whose process has ended.
fn listen_unix(path: &Path) -> io::Result<UnixListener> {
    let left_over =
        std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket()) && UnixStream::connect(path).is_err();
    if left_over {
        std::fs::remove_file(path)?;
    }
    UnixListener::bind(path)
}

/// A client with its request, or the rest of its answer.
struct Guest {
    stream: Box<dyn Stream>,
    request: Vec<u8>,
    answer: Vec<u8>,
    sent: usize,
    until: Instant,
}

impl Guest {
    fn poll(&self) -> libc::pollfd {
        let events = if self.answer.is_empty() { libc::POLLIN } else { libc::POLLOUT };
        libc::pollfd { fd: self.stream.as_raw_fd(), events, revents: 0 }
    }

    /// Reads or writes until the socket would block. `false` when it has ended: answered, closed, no valid request, or too slow.
    fn advance(&mut self, sources: &Sources, now: Instant) -> bool {
        match self.try_advance(sources) {
            Ok(over) => !over && now < self.until,
            Err(e) => matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) && now < self.until,
        }
    }

    /// Whether it is over.
    fn try_advance(&mut self, sources: &Sources) -> io::Result<bool> {
        let mut piece = [0; 1024];
        while self.answer.is_empty() {
            let n = self.stream.read(&mut piece)?;
            self.request.extend_from_slice(&piece[..n]);
            if n == 0 || self.request.len() > MAX_REQUEST {
                return Ok(true);
            }
            if self.request.windows(4).any(|end| end == b"\r\n\r\n") {
                self.answer = answer(&self.request, sources);
            }
        }
        while self.sent < self.answer.len() {
            self.sent += self.stream.write(&self.answer[self.sent..])?;
        }
        Ok(true)
    }
}

/// Serves all clients concurrently. Each has a deadline, so that no client keeps the others from their answers.
fn serve(listener: &Listener, sources: &Sources, ending: &Waker) {
    if let Err(e) = listener.nonblocking() {
        return log::warn!("statistics are not offered: {e}");
    }
    let mut guests: VecDeque<Guest> = VecDeque::new();
    loop {
        let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut fds = vec![poll(ending.fd()), poll(listener.fd())];
        fds.extend(guests.iter().map(Guest::poll));
        let wait = guests.iter().map(|guest| guest.until).min().map_or(-1, |until| {
            // A millisecond more, so that the time is over then.
            until.saturating_duration_since(Instant::now()).as_millis() as libc::c_int + 1
        });
        // SAFETY: an array and its length.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, wait) };
        if fds[0].revents != 0 {
            return;
        }
        if let Err(e) = welcome(listener, &mut guests) {
            // Out of descriptors, perhaps.
            if !matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
                && self::wait(ending, -1, Duration::from_millis(100))
            {
                return;
            }
        }
        let now = Instant::now();
        guests.retain_mut(|guest| guest.advance(sources, now));
    }
}

/// Takes in who waits, a few at a time; where there is no place the oldest gives way.
fn welcome(listener: &Listener, guests: &mut VecDeque<Guest>) -> io::Result<()> {
    for _ in 0..GUESTS / 2 {
        guests.push_back(listener.accept()?);
        if guests.len() > GUESTS {
            guests.pop_front();
        }
    }
    Ok(())
}

/// The format that a request asks for: of those that it accepts the one of the highest quality, and the older one if they are equal, if
/// the request accepts anything, or if it accepts nothing that there is. So do the client libraries of Prometheus.
fn format_of(request: &[u8]) -> Format {
    let head = String::from_utf8_lossy(request).to_ascii_lowercase();
    let accepts = head.lines().filter_map(|line| line.strip_prefix("accept:")).flat_map(|list| list.split(','));
    let (mut plain, mut open) = (0.0f32, 0.0f32);
    for range in accepts {
        let mut parts = range.split(';').map(str::trim);
        let kind = parts.next().unwrap_or_default();
        let parameters: Vec<(&str, &str)> = parts.filter_map(|part| part.split_once('=')).collect();
        let of = |name: &str| parameters.iter().find(|(known, _)| *known == name).map(|&(_, value)| value);
        let quality = of("q").map_or(1.0, |q| q.parse::<f32>().unwrap_or(0.0));
        match (kind, of("version")) {
            ("application/openmetrics-text", None | Some("1.0.0")) => open = open.max(quality),
            ("text/plain", None | Some("0.0.4")) | ("text/*" | "*/*", _) => plain = plain.max(quality),
            _ => {}
        }
    }
    if open > plain {
        Format::OpenMetrics
    } else {
        Format::Plain
    }
}

fn answer(request: &[u8], sources: &Sources) -> Vec<u8> {
    let format = format_of(request);
    let (status, body) = if request.starts_with(b"GET ") {
        ("200 OK", gather(sources, format))
    } else {
        ("405 Method Not Allowed", String::new())
    };
    let (kind, len) = (format.content_type(), body.len());
    let head = format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n");
    (head + &body).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn engine(name: &'static str) -> Source {
        Box::new(move || Some(EngineStats { metadata: name.into(), ..EngineStats::default() }))
    }

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("uccl-metrics-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn get(client: &mut dyn Stream) -> String {
        client.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn nothing_but_a_file_is_replaced_and_no_link_is_followed() {
        let folder = folder("special");
        let (victim, link, pipe, plain) = (folder.join("victim"), folder.join("link"), folder.join("pipe"), folder.join("plain"));
        std::fs::write(&victim, "kept").unwrap();
        std::os::unix::fs::symlink(&victim, &link).unwrap();
        let name = std::ffi::CString::new(pipe.to_str().unwrap()).unwrap();
        // SAFETY: a path that ends in zero.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        for path in [&link, &pipe, &folder] {
            let refused = offer(&Target::File(path.clone()), engine("x")).err().unwrap();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput, "{}", path.display());
        }
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
        assert!(std::fs::symlink_metadata(&pipe).unwrap().file_type().is_fifo());
        // Another process made the name first under which the contents are written.
        std::os::unix::fs::symlink(&victim, folder.join(format!("plain.{}.tmp", std::process::id()))).unwrap();
        rewrite(&plain, "new").unwrap();
        assert_eq!(std::fs::read_to_string(&plain).unwrap(), "new");
        assert_eq!(std::fs::read_to_string(&victim).unwrap(), "kept");
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_socket_serves_all_engines_of_the_process_and_goes_with_the_last() {
        let folder = folder("unix");
        let path = folder.join("metrics.sock");
        let target = Target::Unix(path.clone());
        let first = offer(&target, engine("first")).unwrap();
        let second = offer(&target, engine("second")).unwrap();
        assert!(Arc::ptr_eq(&first, &second));
        let text = get(&mut UnixStream::connect(&path).unwrap());
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.ends_with("# EOF\n"), "{text}");
        assert!(text.contains("address=\"first\"") && text.contains("address=\"second\""), "{text}");
        // A client that sends nothing, or leaves, does not keep others from their answer for long.
        let _silent = UnixStream::connect(&path).unwrap();
        drop(UnixStream::connect(&path).unwrap());
        assert!(get(&mut UnixStream::connect(&path).unwrap()).contains("first"));
        let mut other = UnixStream::connect(&path).unwrap();
        other.write_all(b"POST / HTTP/1.1\r\n\r\n").unwrap();
        let mut text = String::new();
        other.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("HTTP/1.1 405"), "{text}");
        drop((first, second));
        assert!(!path.exists());
        // Takes over a socket that a killed process left, but not one that is served.
        drop(UnixListener::bind(&path).unwrap());
        let third = offer(&target, engine("third")).unwrap();
        assert_eq!(listen_unix(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(third);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_file_is_whole_at_any_time() {
        let folder = folder("file");
        let path = folder.join("metrics.prom");
        let exporter = offer(&Target::File(path.clone()), engine("mine")).unwrap();
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.ends_with("# EOF\n"), "{text}");
            if text.contains("address=\"mine\"") {
                break;
            }
            assert!(Instant::now() < until);
        }
        drop(exporter);
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "nothing but the file is left");
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(offer(&Target::File("/nonexistent/x".into()), engine("none")).is_err());
    }

    #[test]
    fn silent_clients_do_not_keep_others_from_an_answer() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let _exporter = offer(&Target::parse(&port.to_string()).unwrap(), engine("mine")).unwrap();
        let connect = || std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        let held: Vec<_> = (0..3 * GUESTS).map(|_| connect()).collect();
        // Bytes that never form a request, and answers that the client does not read.
        held.iter().step_by(2).for_each(|mut stream| drop(stream.write_all(b"G")));
        held.iter().skip(1).step_by(2).for_each(|mut stream| drop(stream.write_all(b"GET / HTTP/1.1\r\n\r\n")));
        let begun = Instant::now();
        assert!(get(&mut connect()).contains("address=\"mine\""));
        // One after the other they would take half a minute.
        assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
        drop(held);
    }

    #[test]
    fn a_reader_gets_the_format_that_it_asks_for() {
        let request = |accept: &str| format!("GET /metrics HTTP/1.1\r\nHost: x\r\n{accept}\r\n\r\n").into_bytes();
        let sources = Sources::default();
        sources.lock().push(engine("mine"));
        // As Prometheus 2 and 3, curl, browsers and programs ask.
        for (accept, plain) in [
            ("User-Agent: application/openmetrics-text", true),
            ("Accept: */*", true),
            ("Accept: application/openmetrics-text", false),
            ("Accept: application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.4,*/*;q=0.1", false),
            ("Accept: application/openmetrics-text;version=1.0.0;q=0.4, text/plain;version=0.0.4;q=0.5", true),
            ("Accept: application/openmetrics-text; version=1.0.0; q=0, text/plain; q=0.1", true),
            ("Accept: application/openmetrics-text;version=0.0.1,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", true),
            ("Accept: application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;q=0.3", false),
            ("accept: Text/Plain; version=0.0.4", true),
            ("ACCEPT:text/html\r\nAccept: text/plain", true),
            ("ACCEPT:text/html\r\nAccept: application/openmetrics-text", false),
            ("Accept: image/png", true),
            ("Accept: application/openmetrics-text;q=nan", true),
        ] {
            let text = String::from_utf8(answer(&request(accept), &sources)).unwrap();
            let kind = if plain { Format::Plain } else { Format::OpenMetrics }.content_type();
            assert!(text.contains(&format!("\r\nContent-Type: {kind}\r\n")), "{accept}: {text}");
            assert_eq!(text.contains("# TYPE uccl_tcpx_limits_hit_total counter\n"), plain, "{accept}: {text}");
            assert!(text.ends_with("# EOF\n"), "{accept}: {text}");
        }
    }

    #[test]
    fn engines_keep_their_numbers() {
        let living = Arc::new(Mutex::new(true));
        let sources = Sources::default();
        let first = living.clone();
        sources.lock().push(Box::new(move || first.lock().then(EngineStats::default)));
        sources.lock().push(engine("second"));
        let has =
            |number: u64| gather(&sources, Format::Plain).contains(&format!("uccl_tcpx_connections{{engine=\"{number}\"}}"));
        assert!(has(1) && has(2));
        *living.lock() = false;
        assert!(!has(1) && has(2));
        sources.lock().push(engine("third"));
        assert!(!has(1) && has(2) && has(3));
    }

    #[test]
    fn a_port_is_served() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let target = Target::parse(&port.to_string()).unwrap();
        let _exporter = offer(&target, engine("mine")).unwrap();
        let text = get(&mut std::net::TcpStream::connect(("127.0.0.1", port)).unwrap());
        assert!(text.contains("address=\"mine\""), "{text}");
    }
}
