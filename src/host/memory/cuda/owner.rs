//! For tests: a process that owns GPU memory and exports it, and this engine's grip on it. Kinds of memory as applications allocate them.

use super::*;
use cuda_driver::{sys, Context, Stream};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Command, Stdio};

/// How memory is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// `cuMemAlloc`.
    Malloc,
    /// `cuMemCreate` in steps of 2 MiB side by side, each with a handle that can be shared, as PyTorch's expandable segments.
    Segments,
    /// The same without a handle type.
    Closed,
    /// `cuMemAllocAsync` from the default pool.
    Pool,
    /// `cuMemAllocManaged`.
    Managed,
}

impl Kind {
    const ALL: [Kind; 5] = [Kind::Malloc, Kind::Segments, Kind::Closed, Kind::Pool, Kind::Managed];

    fn number(self) -> u64 {
        Kind::ALL.iter().position(|&k| k == self).unwrap_or(0) as u64
    }
}

const LIMIT: Duration = Duration::from_secs(60);
const STEP: usize = 2 << 20;

/// Byte `i` of a pattern.
pub(super) fn byte(i: u64, seed: u64) -> u8 {
    ((i ^ seed).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8
}

pub(super) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    (0..len as u64).map(|i| byte(i, seed)).collect()
}

/// GPU memory, allocated in any way.
pub(super) struct Block {
    pub(super) stream: Stream,
    pub(super) at: u64,
    pub(super) len: usize,
    kind: Kind,
    physical: Vec<u64>,
}

/// One step of mapped memory.
unsafe fn map_step(cuda: &sys::Functions, at: u64, ordinal: i32, handle_types: u32) -> u64 {
    let location = sys::CUmemLocation { kind: sys::LOCATION_DEVICE, id: ordinal };
    // SAFETY: plain data, for which zeros are valid.
    let prop = sys::CUmemAllocationProp { kind: 1, location, handle_types, ..unsafe { std::mem::zeroed() } };
    let access = sys::CUmemAccessDesc { location, flags: sys::ACCESS_READ_WRITE };
    let mut handle = 0;
    // SAFETY: the range is reserved by the caller, the output writable.
    unsafe {
        cuda.cuMemCreate(&mut handle, STEP, &prop, 0).expect("physical memory");
        cuda.cuMemMap(at, STEP, 0, handle, 0).expect("mapping");
        cuda.cuMemSetAccess(at, STEP, &access, 1).expect("access");
    }
    handle
}

impl Block {
    pub(super) fn new(kind: Kind, ordinal: i32, len: usize) -> Block {
        let context = Context::retain(ordinal).expect("context");
        let stream = Stream::new(&context).expect("stream");
        let cuda = context.enter().expect("context");
        let (mut at, mut physical) = (0, Vec::new());
        // SAFETY: a context is current, outputs are writable; freed in drop.
        unsafe {
            match kind {
                Kind::Malloc => cuda.cuMemAlloc(&mut at, len).expect("memory"),
                Kind::Pool => cuda.cuMemAllocAsync(&mut at, len, stream.raw()).expect("memory"),
                Kind::Managed => cuda.cuMemAllocManaged(&mut at, len, sys::MEM_ATTACH_GLOBAL).expect("memory"),
                Kind::Segments | Kind::Closed => {
                    let steps = len.div_ceil(STEP);
                    cuda.cuMemAddressReserve(&mut at, steps * STEP, 0, 0, 0).expect("addresses");
                    let types = if kind == Kind::Segments { sys::HANDLE_POSIX } else { 0 };
                    physical = (0..steps).map(|i| map_step(&cuda, at + (i * STEP) as u64, ordinal, types)).collect();
                }
            }
        }
        drop(cuda);
        stream.finish(LIMIT).expect("idle");
        Block { stream, at, len, kind, physical }
    }

    pub(super) fn filled(kind: Kind, ordinal: i32, bytes: &[u8]) -> Block {
        let block = Block::new(kind, ordinal, bytes.len());
        block.store(bytes);
        block
    }

    pub(super) fn store(&self, bytes: &[u8]) {
        // SAFETY: the block holds the bytes; the copy is waited for.
        unsafe { self.stream.host_to_device(self.at, bytes.as_ptr(), bytes.len()) }.expect("copy");
        self.stream.finish(LIMIT).expect("copy");
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        // SAFETY: as in store.
        unsafe { self.stream.device_to_host(bytes.as_mut_ptr(), self.at, self.len) }.expect("copy");
        self.stream.finish(LIMIT).expect("copy");
        bytes
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let Ok(cuda) = self.stream.context().enter() else { return };
        // SAFETY: allocated in new, freed once, by the function that belongs to the kind.
        unsafe {
            match self.kind {
                Kind::Malloc | Kind::Managed => drop(cuda.cuMemFree(self.at)),
                Kind::Pool => drop(cuda.cuMemFreeAsync(self.at, self.stream.raw())),
                Kind::Segments | Kind::Closed => {
                    for (i, &handle) in self.physical.iter().enumerate() {
                        let _ = cuda.cuMemUnmap(self.at + (i * STEP) as u64, STEP).and_then(|()| cuda.cuMemRelease(handle));
                    }
                    let _ = cuda.cuMemAddressFree(self.at, self.physical.len() * STEP);
                }
            }
        }
    }
}

/// One message with at most one descriptor.
fn send(socket: &UnixDatagram, bytes: &[u8], fd: Option<&OwnedFd>) {
    let io = [IoSlice::new(bytes)];
    let mut control = [0u64; 8];
    // SAFETY: plain data, for which zeros are valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = io.as_ptr().cast_mut().cast();
    message.msg_iovlen = 1;
    // SAFETY: the control buffer is large enough for one descriptor and aligned; everything lives until the call returns.
    let sent = unsafe {
        if let Some(fd) = fd {
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(4) as _;
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(4) as _;
            libc::CMSG_DATA(header).cast::<i32>().write_unaligned(fd.as_raw_fd());
        }
        libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL)
    };
    assert_eq!(sent, bytes.len() as isize, "{}", std::io::Error::last_os_error());
}

fn receive(socket: &UnixDatagram, bytes: &mut [u8]) -> (usize, Option<OwnedFd>) {
    let mut io = [IoSliceMut::new(bytes)];
    let mut control = [0u64; 8];
    // SAFETY: plain data, for which zeros are valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = io.as_mut_ptr().cast();
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    // SAFETY: everything lives until the call returns; a descriptor that came is owned from here on.
    unsafe {
        let n = libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC);
        assert!(n >= 0, "{}", std::io::Error::last_os_error());
        let header = libc::CMSG_FIRSTHDR(&message);
        let fd = (!header.is_null()).then(|| OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<i32>().read_unaligned()));
        (n as usize, fd)
    }
}

const ALLOCATE: u64 = 1;
const FREE: u64 = 2;
const AGAIN: u64 = 3;
const OPEN: u64 = 4;
const PUSH: u64 = 5;
const WAIT: u64 = 6;
const WORDS: usize = 6;

fn words(values: [u64; WORDS]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// An export as a message, beside its descriptor.
fn bytes_of(e: &Export) -> Vec<u8> {
    let mut bytes = vec![e.kind as u8];
    bytes.extend(e.handle.iter().chain(&e.base.to_le_bytes()).chain(&e.len.to_le_bytes()).chain(&e.gpu));
    bytes
}

/// The export that comes next.
fn export_from(socket: &UnixDatagram) -> Export {
    let mut bytes = [0; 1 + 64 + 16 + 16];
    let (n, fd) = receive(socket, &mut bytes);
    assert_eq!(n, bytes.len());
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    Export {
        kind: ExportKind::from_number(bytes[0]).expect("a kind"),
        handle: bytes[1..65].try_into().expect("a handle"),
        fd,
        base: word(65),
        len: word(73),
        gpu: bytes[81..97].try_into().expect("a UUID"),
    }
}

/// What the other process has of an area to push into.
#[derive(Default)]
struct Pushing {
    target: Option<(Place, Mapping)>,
    under_way: Vec<Pull>,
}

impl Pushing {
    /// Starts `rounds` copies of a block into the area, in pieces of 4 KiB in an order of their own.
    fn start(&mut self, memory: &mut CudaMemory, block: &Block, rounds: u64) {
        let (place, mapping) = self.target.as_ref().expect("an area");
        let (len, count) = (block.len as u64, (block.len as u64).div_ceil(4096));
        let mut pieces: Vec<Piece> = (0..count)
            .map(|i| i * 4096)
            .map(|at| Piece { src: block.at + at, dst: mapping.addr + at, len: 4096.min(len - at) })
            .collect();
        pieces.sort_by_key(|p| p.src.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        // SAFETY: the block is this process's own, the area is mapped, and both stay until the end was seen.
        let mut start = || unsafe { memory.pull(*place, &pieces) }.expect("a push");
        self.under_way.extend((0..rounds).map(|_| start()));
    }

    fn wait(&mut self, memory: &mut CudaMemory) {
        while let Some(&pull) = self.under_way.last() {
            if memory.poll(pull).expect("a push") {
                self.under_way.pop();
            }
        }
    }
}

/// What the other process does: allocates, exports and frees on command, until the socket ends.
pub(super) fn serve() {
    // SAFETY: the parent gave a socket as descriptor 0.
    let socket = unsafe { UnixDatagram::from_raw_fd(0) };
    let mut blocks: Vec<Option<Block>> = Vec::new();
    let mut memory = CudaMemory::new(CudaOptions::default());
    let mut pushing = Pushing::default();
    loop {
        let mut request = [0; WORDS * 8];
        if receive(&socket, &mut request).0 != request.len() {
            return;
        }
        let word = |i: usize| u64::from_le_bytes(request[i * 8..i * 8 + 8].try_into().expect("eight bytes"));
        if word(0) >= OPEN {
            match word(0) {
                OPEN => {
                    let (export, place) = (export_from(&socket), Place::gpu(word(1) as u8));
                    pushing.target = memory.open_area(&export, place).ok().map(|mapping| (place, mapping));
                }
                PUSH => pushing.start(&mut memory, blocks.iter().rev().flatten().next().expect("a block"), word(1)),
                _ => pushing.wait(&mut memory),
            }
            send(&socket, &words([u64::from(pushing.target.is_some()), 0, 0, 0, 0, 0]), None);
            continue;
        }
        if word(0) == FREE {
            blocks[word(1) as usize] = None;
            send(&socket, &words([0; WORDS]), None);
            continue;
        }
        if word(0) == ALLOCATE {
            let (kind, ordinal, len) = (Kind::ALL[word(1) as usize], word(2) as i32, word(3) as usize);
            blocks.push(Some(Block::filled(kind, ordinal, &pattern(len, word(4)))));
        }
        let block = blocks.iter().rev().flatten().next().expect("a block");
        let exports = memory.export(Place::gpu(word(2) as u8), block.at, block.len as u64);
        let (n, exports) = exports.map_or_else(
            |e| (if e.kind() == crate::status::ErrorKind::Unsupported { 0 } else { u64::MAX }, vec![]),
            |e| (e.len() as u64, e),
        );
        send(&socket, &words([n, block.at, blocks.len() as u64 - 1, 0, 0, 0]), None);
        for e in exports {
            let fd = e.kind.has_fd().then(|| memory.descriptor(Place::gpu(word(2) as u8), &e).ok()).flatten();
            send(&socket, &bytes_of(&e), fd.as_ref());
        }
    }
}

/// A process that owns memory; killed when dropped.
pub(super) struct Owner {
    child: Child,
    socket: UnixDatagram,
}

/// Memory of an owner, as it exported it.
pub(super) struct Exported {
    pub(super) at: u64,
    pub(super) number: u64,
    /// None when it was refused.
    pub(super) exports: Vec<Export>,
}

impl Owner {
    pub(super) fn new() -> Owner {
        let (socket, theirs) = UnixDatagram::pair().expect("sockets");
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["--exact", "host::memory::cuda::tests::owner_process", "--nocapture", "--test-threads", "1"]);
        command.env("UCCL_TEST_OWNER", "1").stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
        if let Ok(visible) = std::env::var("UCCL_TEST_OWNER_GPUS") {
            command.env("CUDA_VISIBLE_DEVICES", visible);
        }
        socket.set_read_timeout(Some(LIMIT)).expect("time-out");
        Owner { child: command.spawn().expect("a process"), socket }
    }

    fn ask(&self, request: [u64; WORDS]) -> Exported {
        send(&self.socket, &words(request), None);
        let mut answer = [0; WORDS * 8];
        // A message comes whole.
        assert_eq!(receive(&self.socket, &mut answer).0, answer.len(), "the owner has ended");
        let word = |i: usize| u64::from_le_bytes(answer[i * 8..i * 8 + 8].try_into().expect("eight bytes"));
        assert_ne!(word(0), u64::MAX, "the owner cannot export");
        Exported { at: word(1), number: word(2), exports: (0..word(0)).map(|_| export_from(&self.socket)).collect() }
    }

    /// Memory that holds a pattern.
    pub(super) fn allocate(&self, kind: Kind, ordinal: i32, len: usize, seed: u64) -> Exported {
        self.ask([ALLOCATE, kind.number(), ordinal as u64, len as u64, seed, 0])
    }

    /// The newest memory, exported once more.
    pub(super) fn export_again(&self, ordinal: i32) -> Exported {
        self.ask([AGAIN, 0, ordinal as u64, 0, 0, 0])
    }

    pub(super) fn free(&self, number: u64) {
        send(&self.socket, &words([FREE, number, 0, 0, 0, 0]), None);
        self.answer();
    }

    /// Whether it has an area to push into.
    fn answer(&self) -> bool {
        let mut answer = [0; WORDS * 8];
        assert_eq!(receive(&self.socket, &mut answer).0, answer.len(), "the owner has ended");
        answer[0] == 1
    }

    /// Maps an area of this process for its GPU `ordinal`; whether it could.
    pub(super) fn open_area(&self, ordinal: i32, export: &Export) -> bool {
        send(&self.socket, &words([OPEN, ordinal as u64, 0, 0, 0, 0]), None);
        send(&self.socket, &bytes_of(export), export.fd.as_ref());
        self.answer()
    }

    /// Starts copies of its newest memory into the area.
    pub(super) fn push(&self, rounds: u64) {
        send(&self.socket, &words([PUSH, rounds, 0, 0, 0, 0]), None);
        assert!(self.answer());
    }

    /// They have ended.
    pub(super) fn pushed(&self) {
        send(&self.socket, &words([WAIT, 0, 0, 0, 0, 0]), None);
        assert!(self.answer());
    }

    pub(super) fn signal(&self, signal: i32) {
        // SAFETY: the child is this process's own and has not been waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
