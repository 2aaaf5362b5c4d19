//! Asks the receive manager of GPUDirect-TCPX for a GPU's receive memory before the plugin does. The plugin asks at the first accept for
//! a GPU, and waits for the answer without a limit: it computes for ever if the manager hangs up, and ends the process if there is none.
//! Knows of the answer only its form.

use crate::status::{bail, Result};
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
    path: PathBuf,
    socket: Option<Socket>,
    message: Vec<u8>,
    sent: usize,
    answer: Vec<u8>,
    /// The answer is a descriptor.
    descriptor: bool,
    over: bool,
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
        let questions = OF_GPU.map(|name| Question::new(folder.join(format!("{name}{gpu}")), &gpu, name == OF_GPU[0]));
        Ok(Asking { gpu, questions: questions.into(), until })
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
            let path = question.path.display();
            bail!(Plugin, "the receive manager does not serve GPU {}: {path}: {what} (see docs/tcpx.md)", self.gpu);
        }
        Ok(self.questions.iter().all(|question| question.over))
    }
}

/// Connects to a socket without waiting, and closes it.
pub(super) fn knock(address: &SockAddr) -> io::Result<()> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None)?;
    match socket.connect(address) {
        // The backlog is full, so a process listens.
        Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(()),
        result => result,
    }
}

impl Question {
    fn new(path: PathBuf, gpu: &str, descriptor: bool) -> Question {
        let payload = [&[RAW_BYTES, gpu.len() as u8], gpu.as_bytes()].concat();
        let message = [&(payload.len() as u16).to_be_bytes(), &*payload].concat();
        Question { path, socket: None, message, sent: 0, answer: Vec::new(), descriptor, over: false }
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
                socket.connect(&SockAddr::unix(&self.path)?)?;
                self.socket.insert(socket)
            }
        };
        while self.sent < self.message.len() {
            self.sent += socket.send_with_flags(&self.message[self.sent..], libc::MSG_NOSIGNAL)?;
        }
        while !self.over {
            let (bytes, descriptor) = receive(socket)?;
            self.answer.extend(&bytes);
            let complete = match self.answer.first_chunk() {
                Some(&len) => self.answer.len() >= 2 + usize::from(u16::from_be_bytes(len)),
                None => false,
            };
            self.over = match (self.descriptor, descriptor) {
                (true, Some(_)) => true,
                (true, None) if complete => return Err(io::Error::other("the answer has no descriptor")),
                (false, None) if complete && !is_metadata(&self.answer[2..]) => {
                    return Err(io::Error::other("the answer is none"))
                }
                (false, None) => complete,
                (false, Some(_)) => return Err(io::Error::other("the answer is a descriptor")),
                (true, None) => false,
            };
            if !self.over && bytes.is_empty() {
                return Err(io::Error::other("it closed the connection without an answer"));
            }
        }
        self.socket = None;
        Ok(())
    }
}

/// Whether a message holds as many bytes as the plugin has room for.
fn is_metadata(message: &[u8]) -> bool {
    matches!(message, [RAW_BYTES, len, rest @ ..] if (1..=METADATA).contains(&usize::from(*len)) && rest.len() == usize::from(*len))
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
