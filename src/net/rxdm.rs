//! Asks Google's receive managers what a plugin is about to ask. GPUDirect-TCPX asks at the first accept for a GPU's receive memory, and
//! waits for the answer without a limit: it computes for ever if the manager hangs up, and ends the process if there is none. For
//! GPUDirect-TCPXO see `tcpxo`. Knows of an answer little more than its form.

use crate::status::{bail, err, Result};
use process::{Mutex, PerProcess};
use socket2::{Domain, SockAddr, Socket, Type};
use std::collections::HashSet;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The variable that names the folder of its sockets, and its default in the plugin.
const FOLDER: (&str, &str) = ("NCCL_GPUDIRECTTCPX_UNIX_CLIENT_PREFIX", "/tmp");
/// Its socket for flow rules. The plugin asks there first, and fails cleanly if it does not exist.
const RULES: &str = "rx_rule_manager";
/// Prefixes of its sockets for a GPU, before the GPU's PCI address: the memory as a descriptor, and its size.
const OF_GPU: [&str; 2] = ["get_gpu_fd_", "get_gpu_metadata_"];

/// How long it may take to answer.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);
/// The tag of field 1, of bytes, in a message, and the most bytes that the plugin has room for.
const RAW_BYTES: u8 = 0x0A;
const METADATA: usize = 24;

/// The GPUs whose memory the plugin has: it does not ask again.
static IMPORTED: PerProcess<Mutex<HashSet<String>>> = PerProcess::new(Mutex::default);

/// What the plugin will ask for a GPU.
pub(super) struct Asking {
    gpu: String,
    questions: Vec<Question>,
    until: Instant,
}

/// A message to the manager and its answer, without waiting.
struct Question {
    /// The socket, for messages.
    name: String,
    address: SockAddr,
    socket: Option<Socket>,
    message: Vec<u8>,
    sent: usize,
    answer: Vec<u8>,
    wants: Wants,
    over: bool,
}

/// What an answer must be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Wants {
    /// A descriptor.
    Descriptor,
    /// The size of a GPU's memory.
    Metadata,
    /// Any bytes.
    Text,
}

impl Asking {
    /// For the receive memory of a GPU, by PCI address; of any GPU if the address is unknown.
    ///
    /// # Errors
    /// When the manager serves no such GPU. The plugin must not accept then.
    pub(super) fn new(gpu: Option<&str>) -> Result<Asking> {
        let folder = std::env::var_os(FOLDER.0).map_or(PathBuf::from(FOLDER.1), PathBuf::from);
        Asking::of(&folder, gpu, ANSWERS_WITHIN)
    }

    fn of(folder: &Path, gpu: Option<&str>, within: Duration) -> Result<Asking> {
        let until = Instant::now() + within;
        let gpu = gpu.map(str::to_ascii_lowercase);
        let known = gpu.as_ref().is_some_and(|gpu| IMPORTED.get().lock().contains(gpu));
        if known || !folder.join(RULES).exists() {
            return Ok(Asking { gpu: String::new(), questions: Vec::new(), until });
        }
        let first = || {
            let entries = std::fs::read_dir(folder).ok()?;
            entries.flatten().find_map(|e| Some(e.file_name().to_str()?.strip_prefix(OF_GPU[0])?.to_owned()))
        };
        let Some(gpu) = gpu.or_else(first) else {
            bail!(
                Plugin,
                "the receive manager in {} serves no GPU: there is no {}* (see docs/tcpx.md)",
                folder.display(),
                OF_GPU[0]
            )
        };
        let payload = [&[RAW_BYTES, gpu.len() as u8], gpu.as_bytes()].concat();
        let message = [&(payload.len() as u16).to_be_bytes(), &*payload].concat();
        let mut questions = Vec::new();
        for (prefix, wants) in OF_GPU.into_iter().zip([Wants::Descriptor, Wants::Metadata]) {
            let path = folder.join(format!("{prefix}{gpu}"));
            let name = path.display().to_string();
            let address = SockAddr::unix(&path).map_err(|e| err!(Plugin, "the receive manager's socket {name}: {e}"))?;
            questions.push(Question::new(name, address, message.clone(), wants));
        }
        Ok(Asking { gpu, questions, until })
    }

    /// The plugin has accepted, and has the memory.
    pub(super) fn imported(&self) {
        if !self.questions.is_empty() {
            IMPORTED.get().lock().insert(self.gpu.clone());
        }
    }

    /// Goes on. Whether all is answered.
    ///
    /// # Errors
    /// The manager does not serve the GPU, hangs up, or does not answer in time.
    pub(super) fn poll(&mut self) -> Result<bool> {
        let late = Instant::now() >= self.until;
        for question in self.questions.iter_mut().filter(|question| !question.over) {
            let what = match question.advance() {
                Ok(()) if question.over || !late => continue,
                Ok(()) => format!("no answer in {ANSWERS_WITHIN:.0?}"),
                Err(e) => e.to_string(),
            };
            let name = &question.name;
            bail!(Plugin, "the receive manager does not serve GPU {}: {name}: {what} (see docs/tcpx.md)", self.gpu);
        }
        Ok(self.questions.iter().all(|question| question.over))
    }
}

/// Connects to a socket without waiting, and closes it.
///
/// # Errors
/// `WouldBlock` where a process listens that does not accept, and the backlog is full.
pub(super) fn knock(address: &SockAddr) -> io::Result<()> {
    Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None)?.connect(address)
}

/// Asks one question; gives the content of the answer.
///
/// # Errors
/// `TimedOut` if there is none in time, or why there is none.
pub(super) fn ask(address: SockAddr, message: &[u8], wants: Wants, within: Duration) -> io::Result<Vec<u8>> {
    let (mut question, until) = (Question::new(String::new(), address, message.to_vec(), wants), Instant::now() + within);
    loop {
        question.advance()?;
        if question.over {
            return Ok(content_of(&question.answer).map_or(Vec::new(), <[u8]>::to_vec));
        }
        if Instant::now() >= until {
            return Err(io::Error::new(ErrorKind::TimedOut, format!("no answer in {within:.0?}")));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Question {
    fn new(name: String, address: SockAddr, message: Vec<u8>, wants: Wants) -> Question {
        Question { name, address, socket: None, message, sent: 0, answer: Vec::new(), wants, over: false }
    }

    fn advance(&mut self) -> io::Result<()> {
        match self.try_advance() {
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(()),
            result => result,
        }
    }

    fn try_advance(&mut self) -> io::Result<()> {
        let socket = match &self.socket {
            Some(socket) => socket,
            None => {
                let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None)?;
                socket.connect(&self.address)?;
                self.socket.insert(socket)
            }
        };
        while self.sent < self.message.len() {
            self.sent += socket.send_with_flags(&self.message[self.sent..], libc::MSG_NOSIGNAL)?;
        }
        while !self.over {
            let (bytes, descriptor) = receive(socket)?;
            self.answer.extend(&bytes);
            self.over = match (self.wants, descriptor, content_of(&self.answer)) {
                (Wants::Descriptor, Some(_), _) => true,
                (Wants::Descriptor, None, Some(_)) => return Err(io::Error::other("the answer has no descriptor")),
                (_, Some(_), _) => return Err(io::Error::other("the answer is a descriptor")),
                (Wants::Metadata, None, Some(content)) if !is_metadata(content) => {
                    return Err(io::Error::other("the answer is none"))
                }
                (_, None, content) => content.is_some(),
            };
            if !self.over && bytes.is_empty() {
                return Err(io::Error::other("it closed the connection without an answer"));
            }
        }
        self.socket = None;
        Ok(())
    }
}

/// A message without its length, once it is complete.
fn content_of(message: &[u8]) -> Option<&[u8]> {
    let (len, rest) = message.split_first_chunk()?;
    rest.get(..usize::from(u16::from_be_bytes(*len)))
}

/// Whether a message holds as many bytes as the plugin has room for.
fn is_metadata(message: &[u8]) -> bool {
    matches!(message, [RAW_BYTES, len, rest @ ..] if (1..=METADATA).contains(&usize::from(*len)) && rest.len() == usize::from(*len))
}

/// The GPUs in a message of TCPXO's manager, by PCI address, with the addresses of their closest NICs: a map in field 1, whose values are
/// lists of strings in field 1. `None` if the message is another.
pub(super) fn closest_nics(message: &[u8]) -> Option<Vec<(String, Vec<String>)>> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mut all = Vec::new();
    fields(message, &mut |number, entry| {
        let (mut gpu, mut nics) = (String::new(), Vec::new());
        if number != 1 {
            return Some(());
        }
        fields(entry, &mut |number, value| match number {
            1 => {
                gpu = text(value);
                Some(())
            }
            2 => fields(value, &mut |number, nic| {
                nics.extend((number == 1).then(|| text(nic)));
                Some(())
            }),
            _ => Some(()),
        })?;
        all.push((gpu, nics));
        Some(())
    })?;
    Some(all)
}

/// Calls `take` with the number and the bytes of each field that has bytes. `None` for a message of another form.
fn fields(mut message: &[u8], take: &mut dyn FnMut(u64, &[u8]) -> Option<()>) -> Option<()> {
    while !message.is_empty() {
        let tag = varint(&mut message)?;
        let len = match (tag >> 3, tag & 7) {
            (0, _) => return None,
            (_, 0) => {
                varint(&mut message)?;
                continue;
            }
            (_, 1) => 8,
            (_, 5) => 4,
            (_, 2) => usize::try_from(varint(&mut message)?).ok()?,
            _ => return None,
        };
        let (bytes, rest) = message.split_at_checked(len)?;
        message = rest;
        if tag & 7 == 2 {
            take(tag >> 3, bytes)?;
        }
    }
    Some(())
}

fn varint(message: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = message.split_first()?;
        *message = rest;
        value |= u64::from(byte & 0x7F) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// Receives bytes, and a descriptor if one comes with them. No bytes: the end.
fn receive(socket: &Socket) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let (mut bytes, mut control) = ([0u8; 256], [0u64; 4]);
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: plain data for which zeros are valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&mut part, 1);
    (message.msg_control, message.msg_controllen) = (control.as_mut_ptr().cast(), size_of_val(&control) as _);
    // SAFETY: a message with buffers of the given lengths.
    let n = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) };
    let Ok(n) = usize::try_from(n) else { return Err(io::Error::last_os_error()) };
    // SAFETY: the message that recvmsg filled.
    let header = unsafe { libc::CMSG_FIRSTHDR(&message).as_ref() };
    let rights = header.filter(|h| {
        // SAFETY: plain arithmetic.
        let one = unsafe { libc::CMSG_LEN(size_of::<libc::c_int>() as u32) } as usize;
        (h.cmsg_level, h.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) && h.cmsg_len >= one as _
    });
    // SAFETY: the header has room for a descriptor, which belongs to this process from here on.
    let descriptor = rights.map(|h| unsafe { OwnedFd::from_raw_fd(libc::CMSG_DATA(h).cast::<libc::c_int>().read_unaligned()) });
    Ok((bytes[..n].to_vec(), descriptor))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::{UnixListener, UnixStream};

    /// A folder with the sockets of a manager.
    struct Manager(PathBuf);

    impl Manager {
        fn new(name: &str) -> Manager {
            let folder = std::env::temp_dir().join(format!("uccl-manager-{name}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&folder);
            std::fs::create_dir_all(&folder).expect("folder");
            Manager(folder)
        }

        fn listen(&self, name: &str) -> UnixListener {
            UnixListener::bind(self.0.join(name)).expect("socket")
        }

        /// Answers at a socket for `GPU`.
        fn serve(&self, prefix: &str, answer: fn(&mut UnixStream)) {
            let listener = self.listen(&format!("{prefix}{}", GPU.to_lowercase()));
            std::thread::spawn(move || {
                for mut stream in listener.incoming().flatten() {
                    let mut question = [0; 16];
                    let asked = [&[0, 14, RAW_BYTES, 12], GPU.to_lowercase().as_bytes()].concat();
                    // Others may have given up.
                    if stream.read_exact(&mut question).is_ok() && question == *asked {
                        answer(&mut stream);
                    }
                }
            });
        }

        fn ask(&self, gpu: Option<&str>) -> Result<()> {
            let mut asking = Asking::of(&self.0, gpu, Duration::from_millis(300))?;
            while !asking.poll()? {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        }

        fn fails(&self, gpu: Option<&str>, word: &str) {
            let error = self.ask(gpu).expect_err(word).to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    impl Drop for Manager {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    const GPU: &str = "0000:0A:00.0";

    fn give_descriptor(stream: &mut UnixStream) {
        let file = std::fs::File::open("/dev/null").expect("file");
        let (mut byte, mut control) = ([0u8], [0u64; 3]);
        let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
        // SAFETY: plain data; a message with one descriptor.
        unsafe {
            let mut message: libc::msghdr = std::mem::zeroed();
            (message.msg_iov, message.msg_iovlen) = (&mut part, 1);
            (message.msg_control, message.msg_controllen) = (control.as_mut_ptr().cast(), libc::CMSG_SPACE(4) as _);
            let header = &mut *libc::CMSG_FIRSTHDR(&message);
            (header.cmsg_level, header.cmsg_type) = (libc::SOL_SOCKET, libc::SCM_RIGHTS);
            header.cmsg_len = libc::CMSG_LEN(4) as _;
            libc::CMSG_DATA(header).cast::<libc::c_int>().write_unaligned(file.as_fd().as_raw_fd());
            libc::sendmsg(stream.as_raw_fd(), &message, libc::MSG_NOSIGNAL);
        }
    }

    fn give(stream: &mut UnixStream, bytes: &[u8]) {
        let _ = stream.write_all(bytes);
    }

    fn give_metadata(stream: &mut UnixStream) {
        let message = [&[0, 26, RAW_BYTES, 24][..], &[7; 24]].concat();
        // In two parts.
        give(stream, &message[..3]);
        std::thread::sleep(Duration::from_millis(5));
        give(stream, &message[3..]);
    }

    #[test]
    fn a_manager_without_a_gpus_sockets_differs_from_none() {
        let manager = Manager::new("sockets");
        assert_eq!(manager.ask(Some(GPU)), Ok(()), "no manager: the plugin says so by itself");
        let _rules = manager.listen(RULES);
        manager.fails(None, "serves no GPU");
        manager.fails(Some(GPU), "get_gpu_fd_0000:0a:00.0");
        manager.serve(OF_GPU[0], give_descriptor);
        manager.fails(Some(GPU), "get_gpu_metadata_0000:0a:00.0");
        // The file exists, but no process listens.
        drop(manager.listen("get_gpu_metadata_0000:0a:00.0"));
        manager.fails(Some(GPU), "refused");
        std::fs::remove_file(manager.0.join("get_gpu_metadata_0000:0a:00.0")).expect("file");
        manager.serve(OF_GPU[1], give_metadata);
        assert_eq!((manager.ask(Some(GPU)), manager.ask(None)), (Ok(()), Ok(())));
    }

    #[test]
    fn the_nics_of_gpus_are_read_as_the_plugin_reads_them() {
        let field = |tag: u8, bytes: &[u8]| [&[tag, bytes.len() as u8], bytes].concat();
        let nics = |all: &[&str]| all.iter().flat_map(|ip| field(0x0A, ip.as_bytes())).collect::<Vec<u8>>();
        let entry = |gpu: &str, ips: &[&str]| field(0x0A, &[field(0x0A, gpu.as_bytes()), field(0x12, &nics(ips))].concat());
        let named = |gpu: &str, ips: &[&str]| (gpu.to_owned(), ips.iter().map(|ip| (*ip).to_owned()).collect());
        assert_eq!(closest_nics(&[]), Some(Vec::new()));
        let two = [entry("0000:04:00.0", &["10.0.1.2"]), entry("0000:05:00.0", &["10.0.2.2", "10.0.3.2"])].concat();
        let expected = vec![named("0000:04:00.0", &["10.0.1.2"]), named("0000:05:00.0", &["10.0.2.2", "10.0.3.2"])];
        assert_eq!(closest_nics(&two), Some(expected.clone()));
        // What a later version may add: a number, eight and four bytes, text.
        let more = [&two[..], &[0x18, 0x85, 0x01], &[0x21], &[7; 8], &[0x2D], &[7; 4], &field(0x32, b"new")].concat();
        assert_eq!(closest_nics(&more), Some(expected));
        assert_eq!(closest_nics(&field(0x0A, &field(0x0A, b"gpu"))), Some(vec![named("gpu", &[])]));
        for cut in 1..two.len() {
            let whole = cut == entry("0000:04:00.0", &["10.0.1.2"]).len();
            assert_eq!(closest_nics(&two[..cut]).is_some(), whole, "{cut} bytes");
        }
        for bad in [
            &[0x02, 0x00][..],
            &[0x0B],
            &[0x0A, 0x05, 0x0A],
            &[0x80; 11],
            &[0x0A, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x01],
        ] {
            assert_eq!(closest_nics(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_manager_that_hangs_up_or_is_silent_or_talks_nonsense_serves_nothing() {
        type Answer = fn(&mut UnixStream);
        let cases: [(&str, [Answer; 2], &str); 7] = [
            ("hangs-up", [|_| (), give_metadata], "closed the connection"),
            ("hangs-up-later", [give_descriptor, |_| ()], "closed the connection"),
            ("hangs-up-within", [give_descriptor, |s| give(s, &[0, 26, 10])], "closed the connection"),
            ("silent", [|_| std::thread::sleep(Duration::from_secs(60)), give_metadata], "no answer"),
            ("bytes", [give_metadata, give_metadata], "no descriptor"),
            ("garbage", [give_descriptor, |s| give(s, &[0, 3, 9, 9, 9])], "the answer is none"),
            ("too-long", [give_descriptor, |s| give(s, &[&[0, 27, 10, 25][..], &[7; 25]].concat())], "none"),
        ];
        for (name, [memory, size], why) in cases {
            let manager = Manager::new(name);
            let _rules = manager.listen(RULES);
            manager.serve(OF_GPU[0], memory);
            manager.serve(OF_GPU[1], size);
            manager.fails(Some(GPU), why);
        }
    }
}
