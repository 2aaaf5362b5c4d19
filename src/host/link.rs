//! How two engines that may share a host find out that they do: one connects to the other's Unix socket, both prove the session of
//! their control connection, list what they have, try what they can reach, and report it. Polled, never blocking; until the peer is
//! authenticated, nothing that it sent is opened. Knows nothing of chunks.
//!
//! Messages, little-endian. Introduction: magic, version, place and GPU of each kind of memory, address and contents of a few bytes of
//! the process, MAC; with it comes the descriptor of the ring. Findings: the pairs of places that the sender can copy between, and how.

use super::memory::host::{self, HostMemory};
use super::memory::probe::Probe;
use super::memory::witness::Witness;
use super::memory::{GpuId, LocalMemory, Manner};
use super::ring::{RingIn, RingOut};
use super::socket::{Listener, Name, Place as Where, Received, Socket, Who, MAX_MESSAGE};
use crate::status::{bail, Error, ErrorKind, Result};
use crate::types::Place;
use crate::wire::secret::{self, Secret};
use crate::wire::setup::Invitation;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

const MAGIC: u32 = 0x4C43_4355;
const VERSION: u16 = 4;
const MAC: usize = 32;
/// GPUs of a process at most.
pub(crate) const MAX_GPUS: usize = 32;
/// How long the two engines look for each other.
const MEETING_TIMEOUT: Duration = Duration::from_secs(5);
/// Processes that may be at a listening socket and have not proved themselves.
const MAX_CANDIDATES: usize = 8;
/// How often a connector that was dropped tries again.
const CUTS: usize = 8;

/// Why a message came without its descriptor.
const CUT: &str = "this process has no file descriptor left for the peer's ring (ulimit -n)";

/// Keys that prove the session, for what this engine sends and what it receives.
pub(crate) struct ProofKeys {
    pub send: Secret,
    pub recv: Secret,
}

/// What this engine has to share.
pub(crate) struct Have {
    /// GPUs whose memory can be shared, by place.
    pub gpus: Vec<(Place, GpuId)>,
    /// Shares and pulls GPU memory.
    pub device: Option<Box<dyn LocalMemory>>,
    /// Bytes that areas of host memory may have, those of all connections of this process together.
    pub area_bytes: u64,
}

/// A directory that processes share which have no network namespace in common.
pub(crate) type Directory = Option<PathBuf>;

/// A name for the host as it runs now.
///
/// # Errors
/// `Unsupported` without a boot id of the kernel.
pub(crate) fn host_name() -> Result<[u8; 16]> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    let Ok(boot) = boot else { bail!(Unsupported, "the kernel's boot id cannot be read (/proc/sys/kernel/random/boot_id)") };
    let digest = ring::digest::digest(&ring::digest::SHA256, format!("uccl-p2p host {}", boot.trim()).as_bytes());
    let mut name = [0; 16];
    name.copy_from_slice(&digest.as_ref()[..16]);
    Ok(name)
}

/// This engine before it knows the peer's invitation.
pub(crate) struct Opening {
    invitation: Invitation,
    listeners: Vec<Listener>,
    directory: Directory,
}

impl Opening {
    /// `connecting`: the connector of the connection connects here, too.
    ///
    /// # Errors
    /// Why this engine takes no part.
    pub(crate) fn new(connecting: bool, directory: Directory) -> Result<Opening> {
        let mut name = Name::default();
        if let Err(e) = getrandom::fill(&mut name) {
            bail!(System, "random bytes for the name of a socket: {e}");
        }
        let invitation = Invitation { host: host_name()?, name };
        let mut listeners = Vec::new();
        if !connecting {
            listeners.push(Listener::open(&name, Where::Abstract)?);
            if let Some(directory) = &directory {
                listeners.push(Listener::open(&name, Where::Directory(directory))?);
            }
        }
        Ok(Opening { invitation, listeners, directory })
    }

    /// What the peer receives in the Offer.
    pub(crate) fn invitation(&self) -> Invitation {
        self.invitation
    }

    /// Goes on with the peer's invitation.
    ///
    /// # Errors
    /// `Unsupported` on another host.
    pub(crate) fn meet(self, peer: &Invitation, keys: ProofKeys, have: Have, now: Instant) -> Result<Meeting> {
        if peer.host != self.invitation.host {
            bail!(Unsupported, "the peer is on another host");
        }
        let outbox = RingOut::new()?;
        let connecting = self.listeners.is_empty();
        Ok(Meeting {
            id: if connecting { peer.name } else { self.invitation.name },
            connecting,
            directory: self.directory,
            listeners: self.listeners,
            candidates: Vec::new(),
            cut: None,
            cuts: 0,
            keys,
            have: Some(have),
            outbox: Some(outbox),
            met: None,
            deadline: now + MEETING_TIMEOUT,
        })
    }
}

/// A socket whose other end has not proved itself.
struct Candidate {
    socket: Socket,
    who: Who,
    introduced: bool,
}

/// A pair of places between which bytes can go, and how.
type Found = (Place, Place, Manner);

/// An authenticated peer.
struct Met {
    socket: Socket,
    who: Who,
    same_process: bool,
    inbox: RingIn,
    outbox: RingOut,
    have: Have,
    /// The peer's GPUs.
    gpus: Vec<(Place, GpuId)>,
    /// The first look at its host memory, which may take for ever: the peer says where that is.
    probe: Probe<Result<HostMemory>>,
    host: Option<HostMemory>,
    /// Why this engine may not read the peer's host memory.
    unread: Option<String>,
    /// What can be copied here, once that was tried: places here and there, and how.
    ours: Option<Vec<Found>>,
    findings_sent: bool,
}

/// What both engines have agreed on.
pub(crate) struct Linked {
    pub socket: Socket,
    pub who: Who,
    pub host: Option<HostMemory>,
    pub device: Option<Box<dyn LocalMemory>>,
    pub inn: RingIn,
    pub out: RingOut,
    /// Pairs of places, here and there, between which both engines can copy.
    pub pairs: Vec<(Place, Place)>,
    /// Those of them whose bytes are pushed.
    pub pushed: Vec<(Place, Place)>,
    /// Why this engine may not read the peer's host memory.
    pub unread: Option<String>,
    /// Those of them that NVLink joins.
    pub nvlink: Vec<(Place, Place)>,
}

/// Two engines that have not met yet.
pub(crate) struct Meeting {
    id: Name,
    connecting: bool,
    directory: Directory,
    listeners: Vec<Listener>,
    /// The oldest first.
    candidates: Vec<Candidate>,
    /// Why the connector's last socket ended.
    cut: Option<Error>,
    /// How often one has.
    cuts: usize,
    keys: ProofKeys,
    have: Option<Have>,
    outbox: Option<RingOut>,
    met: Option<Met>,
    deadline: Instant,
}

impl Meeting {
    /// Goes as far as it can; both agreed, once they have.
    ///
    /// # Errors
    /// Why they do not meet: other channels carry everything then.
    pub(crate) fn poll(&mut self, now: Instant) -> Result<Option<Linked>> {
        if self.met.is_none() {
            self.approach(now)?;
        }
        if self.met.is_none() {
            self.listen(now)?;
        }
        self.reach(now);
        if let Some(linked) = self.conclude()? {
            return Ok(Some(linked));
        }
        if now >= self.deadline {
            bail!(TimedOut, "the peer's process did not answer on its Unix socket in time");
        }
        Ok(None)
    }

    /// Connects or accepts sockets, and introduces this engine on each.
    fn approach(&mut self, now: Instant) -> Result<()> {
        if self.connecting && self.candidates.is_empty() {
            let socket = self.connect().map_err(|e| self.cut.take().unwrap_or(e))?;
            if let Some(socket) = socket {
                let who = socket.who()?;
                allowed(who)?;
                self.candidates.push(Candidate { socket, who, introduced: false });
            }
        }
        // New ones may connect as fast as others are dropped.
        for _ in 0..2 * MAX_CANDIDATES {
            let Some(socket) = self.listeners.iter().find_map(Listener::accept) else { break };
            // No other process can be the peer.
            if let Some(who) = socket.who().ok().filter(|&who| allowed(who).is_ok()) {
                if self.candidates.len() >= MAX_CANDIDATES {
                    // The oldest silent one makes room. The peer speaks at once; if it was slow, it connects again.
                    self.listen(now)?;
                    if self.met.is_some() {
                        return Ok(());
                    }
                    self.candidates.drain(..(self.candidates.len() + 1).saturating_sub(MAX_CANDIDATES));
                }
                self.candidates.push(Candidate { socket, who, introduced: false });
            }
        }
        // The listener sends nothing before the peer is authenticated: its introduction follows the peer's.
        if self.connecting {
            for i in 0..self.candidates.len() {
                if let Err(e) = self.introduce(i) {
                    return self.cut_off(e);
                }
            }
        }
        Ok(())
    }

    /// The connector's socket has ended. If the listener dropped it among many candidates, the next attempt succeeds.
    fn cut_off(&mut self, error: Error) -> Result<()> {
        self.candidates.clear();
        self.cuts += 1;
        if self.cuts > CUTS || !matches!(error.kind(), ErrorKind::RemoteDisconnect | ErrorKind::System) {
            return Err(error);
        }
        self.cut = Some(error);
        Ok(())
    }

    fn connect(&self) -> Result<Option<Socket>> {
        let first = match Socket::connect(&self.id, Where::Abstract) {
            Ok(found) => return Ok(found),
            Err(e) => e,
        };
        match &self.directory {
            Some(directory) => Socket::connect(&self.id, Where::Directory(directory)),
            None if first.to_str().contains("refused") => {
                bail!(Unsupported, "the peer has another network namespace, and UCCL_TCPX_LOCAL_DIR names no directory")
            }
            None => Err(first),
        }
    }

    fn introduce(&mut self, index: usize) -> Result<()> {
        let (Some(have), Some(outbox), Some(candidate)) = (&self.have, &self.outbox, self.candidates.get_mut(index)) else {
            return Ok(());
        };
        if !candidate.introduced {
            let message = introduction(&have.gpus, &self.keys.send)?;
            candidate.introduced = candidate.socket.send(&message, Some(outbox.fd()))?;
        }
        Ok(())
    }

    /// Reads what candidates send. The first that proves itself is the peer; others are dropped at their first wrong byte.
    fn listen(&mut self, now: Instant) -> Result<()> {
        let mut i = 0;
        while let Some(candidate) = self.candidates.get(i) {
            let mut buffer = [0; MAX_MESSAGE];
            let received = match candidate.socket.receive(&mut buffer) {
                Ok(Received::Nothing) => {
                    i += 1;
                    continue;
                }
                Ok(Received::Message(n, fds)) => proved(&buffer[..n], &self.keys.recv).map(|intro| (intro, fds)),
                Ok(Received::Cut(_)) => Err(crate::status::err!(Resource, "{CUT}")),
                Ok(Received::End) => Err(crate::status::err!(RemoteDisconnect, "the peer's process closed its Unix socket")),
                Err(e) => Err(e),
            };
            match received {
                Ok((introduction, fds)) => return self.meet(i, introduction, fds, now),
                Err(e) if self.connecting => return self.cut_off(e),
                Err(e) => {
                    log::debug!("a process on this host connected and did not prove that it is the peer: {e}");
                    self.candidates.remove(i);
                }
            }
        }
        Ok(())
    }

    /// The peer is authenticated: looks at what it sent.
    fn meet(&mut self, index: usize, intro: Introduction, mut fds: Vec<OwnedFd>, now: Instant) -> Result<()> {
        self.introduce(index)?;
        let (Some(fd), true) = (fds.pop(), fds.is_empty()) else { bail!(Protocol, "the peer's process sent no ring") };
        let Candidate { socket, who, introduced } = self.candidates.swap_remove(index);
        let (Some(have), Some(outbox), true) = (self.have.take(), self.outbox.take(), introduced) else {
            bail!(Resource, "the peer's Unix socket has no room");
        };
        let inbox = RingIn::open(fd.as_fd())?;
        self.listeners.clear();
        self.candidates.clear();
        let same_process = is_this_process(who.pid, intro.witness)?;
        let probe = Probe::new("the first read of its memory", now, move || HostMemory::new(who.pid, intro.witness));
        let gpus = intro.gpus;
        let (host, unread, ours, findings_sent) = (None, None, None, false);
        self.met = Some(Met { socket, who, same_process, inbox, outbox, have, gpus, probe, host, unread, ours, findings_sent });
        Ok(())
    }

    /// Tries what can be reached.
    fn reach(&mut self, now: Instant) {
        let Some(met) = self.met.as_mut().filter(|met| met.ours.is_none()) else { return };
        let mut ours = Vec::new();
        match met.probe.poll(now).and_then(Option::transpose) {
            Ok(None) => return,
            Ok(Some(host)) => {
                met.host = Some(host);
                ours.push((Place::HOST, Place::HOST, Manner::Pull));
            }
            Err(e) => {
                met.unread = Some(format!("{}; {}", e.to_str(), host::hint()));
                ours.push((Place::HOST, Place::HOST, Manner::Push));
            }
        }
        // A process's own memory is mapped a second time where its kind allows that, else channels carry it.
        let same = met.same_process;
        if let Some(device) = met.have.device.as_mut().filter(|device| !same || device.maps_own()) {
            for &(here, _) in &met.have.gpus {
                ours.extend(met.gpus.iter().filter_map(|(there, id)| Some((here, *there, device.reaches(here, id)?))));
            }
        }
        met.ours = Some(ours);
    }

    /// Sends what this engine can reach, and receives the peer's.
    fn conclude(&mut self) -> Result<Option<Linked>> {
        let Some(met) = &mut self.met else { return Ok(None) };
        let Some(ours) = &met.ours else { return Ok(None) };
        if !met.findings_sent {
            met.findings_sent = met.socket.send(&findings(ours), None)?;
        }
        let mut buffer = [0; MAX_MESSAGE];
        let theirs = match met.socket.receive(&mut buffer)? {
            Received::Message(n, fds) if fds.is_empty() => found(&buffer[..n])?,
            Received::Message(..) => bail!(Protocol, "the peer's process sent an extra descriptor"),
            Received::Cut(_) => bail!(Resource, "{CUT}"),
            Received::Nothing => return Ok(None),
            Received::End => bail!(RemoteDisconnect, "the peer's process closed its Unix socket"),
        };
        let Some(met) = self.met.take() else { return Ok(None) };
        if !met.findings_sent {
            bail!(Resource, "the peer's Unix socket has no room");
        }
        let Met { socket, who, mut host, unread, inbox, outbox, have, gpus, ours, .. } = met;
        let ours = ours.unwrap_or_default();
        let (mut pairs, mut pushed) = (Vec::new(), Vec::new());
        for &(here, there, own) in &ours {
            let Some((.., other)) = theirs.iter().find(|&&(from, to, _)| (from, to) == (there, here)) else { continue };
            pairs.push((here, there));
            if own == Manner::Push || *other == Manner::Push {
                pushed.push((here, there));
            }
        }
        if pairs.is_empty() {
            bail!(Unsupported, "the peer's process shares no memory that this one can use");
        }
        if pushed.contains(&(Place::HOST, Place::HOST)) {
            host = Some(HostMemory::staged(have.area_bytes)?);
        }
        let joined = |(here, there): &(Place, Place)| {
            let gpu = gpus.iter().find(|(place, _)| place == there).map(|(_, gpu)| gpu);
            gpu.zip(have.device.as_ref()).is_some_and(|(gpu, device)| device.by_nvlink(*here, gpu))
        };
        let nvlink = pairs.iter().copied().filter(joined).collect();
        Ok(Some(Linked { socket, who, host, device: have.device, inn: inbox, out: outbox, pairs, pushed, unread, nvlink }))
    }
}

/// Only processes of the same user may connect.
fn allowed(who: Who) -> Result<()> {
    // SAFETY: a plain system call.
    let own = unsafe { libc::geteuid() };
    if who.uid != own {
        bail!(Unsupported, "the peer's process belongs to user {}, this one to {own}", who.uid);
    }
    Ok(())
}

/// What the peer says of itself.
struct Introduction {
    gpus: Vec<(Place, GpuId)>,
    witness: Witness,
}

fn introduction(gpus: &[(Place, GpuId)], key: &Secret) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(1024);
    let witness = Witness::own()?;
    out.extend_from_slice(&MAGIC.to_le_bytes());
    out.extend_from_slice(&VERSION.to_le_bytes());
    let gpus = &gpus[..gpus.len().min(MAX_GPUS)];
    out.extend_from_slice(&(gpus.len() as u16).to_le_bytes());
    for (place, id) in gpus {
        out.push(place.0);
        out.extend_from_slice(id);
    }
    out.extend_from_slice(&witness.addr.to_le_bytes());
    out.extend_from_slice(&witness.bytes);
    let mac = secret::sign(key, &out)?;
    out.extend_from_slice(&mac);
    Ok(out)
}

/// Reads a message front to back.
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let Some((head, tail)) = self.0.split_first_chunk() else {
            bail!(Protocol, "a message of the peer's process ends early")
        };
        self.0 = tail;
        Ok(*head)
    }

    fn head(&mut self) -> Result<u16> {
        let (magic, version) = (u32::from_le_bytes(self.take()?), u16::from_le_bytes(self.take()?));
        if (magic, version) != (MAGIC, VERSION) {
            bail!(Protocol, "a message of the peer's process has another magic or version");
        }
        Ok(u16::from_le_bytes(self.take()?))
    }

    fn end(&self) -> Result<()> {
        match self.0.is_empty() {
            true => Ok(()),
            false => bail!(Protocol, "a message of the peer's process is too long"),
        }
    }
}

/// The introduction in these bytes, if its sender has the session's key.
fn proved(bytes: &[u8], key: &Secret) -> Result<Introduction> {
    let Some((body, mac)) = bytes.split_last_chunk::<MAC>() else { bail!(Auth, "a process on this host sent no proof") };
    if !secret::verify(key, body, mac)? {
        bail!(Auth, "a process on this host sent a wrong proof");
    }
    let mut rest = Rest(body);
    let n = usize::from(rest.head()?);
    if n > MAX_GPUS {
        bail!(Protocol, "a process reports {n} GPUs");
    }
    let gpus = (0..n).map(|_| Ok((Place(u8::from_le_bytes(rest.take()?)), rest.take()?))).collect::<Result<Vec<_>>>()?;
    if gpus.iter().any(|(place, _)| !place.is_device()) {
        bail!(Protocol, "a process reports a GPU at the place of host memory");
    }
    let witness = Witness { addr: u64::from_le_bytes(rest.take()?), bytes: rest.take()? };
    rest.end()?;
    Ok(Introduction { gpus, witness })
}

fn findings(pairs: &[Found]) -> Vec<u8> {
    let mut out = Vec::new();
    let pairs = &pairs[..pairs.len().min(MAX_GPUS * MAX_GPUS + 1)];
    out.extend_from_slice(&MAGIC.to_le_bytes());
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&(pairs.len() as u16).to_le_bytes());
    pairs.iter().for_each(|(here, there, manner)| out.extend_from_slice(&[here.0, there.0, *manner as u8]));
    out
}

/// The pairs between which bytes can come to the peer: places there and here.
fn found(bytes: &[u8]) -> Result<Vec<Found>> {
    let mut rest = Rest(bytes);
    let n = usize::from(rest.head()?);
    if n > MAX_GPUS * MAX_GPUS + 1 {
        bail!(Protocol, "a process reports {n} pairs of places");
    }
    let mut pairs = Vec::with_capacity(n);
    for _ in 0..n {
        let [there, here, manner] = rest.take()?;
        let (there, here) = (Place(there), Place(here));
        if there.is_device() != here.is_device() {
            bail!(Protocol, "a process reports a pair of host and GPU memory");
        }
        match Manner::from_number(manner) {
            Some(manner) => pairs.push((there, here, manner)),
            None => bail!(Protocol, "a process reports a pair of manner {manner}"),
        }
    }
    rest.end()?;
    Ok(pairs)
}

/// Whether the peer is this process: the kernel says so, and the peer knows what lies in its memory. Neither alone is enough: another
/// process may have learnt the bytes, or have the same number in another namespace.
fn is_this_process(pid: i32, witness: Witness) -> Result<bool> {
    Ok(pid == std::process::id() as i32 && witness == Witness::own()?)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::memory::emulated::{gpu, EmulatedMemory};
    use super::super::{shm, socket};
    use super::*;
    use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};

    #[test]
    fn a_process_is_this_one_by_its_number_and_by_what_it_knows() {
        let (me, own) = (std::process::id() as i32, Witness::own().unwrap());
        let mut other = own;
        other.bytes[0] ^= 1;
        let moved = Witness { addr: own.addr + 1, ..own };
        let is = |pid, witness| is_this_process(pid, witness).unwrap();
        assert_eq!([is(me, own), is(me + 1, own), is(0, own), is(me, other), is(me, moved)], [true, false, false, false, false]);
    }

    fn keys(swap: bool) -> ProofKeys {
        let (a, b) = (Secret::new([1; 32]).unwrap(), Secret::new([2; 32]).unwrap());
        match swap {
            false => ProofKeys { send: a, recv: b },
            true => ProofKeys { send: b, recv: a },
        }
    }

    fn have(gpus: u8, push: bool) -> Have {
        let device: Option<Box<dyn LocalMemory>> = if gpus > 0 { Some(Box::new(EmulatedMemory::new(push))) } else { None };
        Have { gpus: (0..gpus).map(|i| (Place::gpu(i), gpu(i))).collect(), device, area_bytes: u64::MAX }
    }

    /// The listener and the connector.
    fn both(gpus: [u8; 2]) -> (Meeting, Meeting) {
        both_with(gpus, [false; 2])
    }

    fn both_with(gpus: [u8; 2], push: [bool; 2]) -> (Meeting, Meeting) {
        let (a, b) = (Opening::new(false, None).unwrap(), Opening::new(true, None).unwrap());
        let (ours, theirs) = (a.invitation(), b.invitation());
        let now = Instant::now();
        let (one, other) = (have(gpus[0], push[0]), have(gpus[1], push[1]));
        (a.meet(&theirs, keys(false), one, now).unwrap(), b.meet(&ours, keys(true), other, now).unwrap())
    }

    fn meet(a: &mut Meeting, b: &mut Meeting) -> Result<(Linked, Linked)> {
        let (mut ours, mut theirs) = (None, None);
        while ours.is_none() || theirs.is_none() {
            if ours.is_none() {
                ours = a.poll(Instant::now())?;
            }
            if theirs.is_none() {
                theirs = b.poll(Instant::now())?;
            }
        }
        ours.zip(theirs).ok_or_else(|| crate::status::err!(Internal, "unreachable"))
    }

    /// Both ends of a link inside this process.
    pub(crate) fn linked(gpus: [u8; 2]) -> (Linked, Linked) {
        let (mut a, mut b) = both(gpus);
        meet(&mut a, &mut b).unwrap()
    }

    /// The same where neither may read the other's host memory. `most`: bytes of areas.
    pub(crate) fn staging(most: [u64; 2]) -> (Linked, Linked) {
        let (a, b) = linked([0, 0]);
        let staged = |linked: Linked, most| {
            let host = Some(HostMemory::staged(most).unwrap());
            Linked { host, pushed: vec![(Place::HOST, Place::HOST)], ..linked }
        };
        (staged(a, most[0]), staged(b, most[1]))
    }

    /// The same; which engine wants to push.
    pub(crate) fn pushing(gpus: [u8; 2], push: [bool; 2]) -> (Linked, Linked) {
        let (mut a, mut b) = both_with(gpus, push);
        meet(&mut a, &mut b).unwrap()
    }

    #[test]
    fn a_pair_is_pushed_where_either_side_wants_it() {
        for (push, pairs) in [([false, false], 0), ([true, false], 2), ([false, true], 2), ([true, true], 2)] {
            let (a, b) = pushing([1, 2], push);
            assert_eq!((a.pushed.len(), b.pushed.len(), a.pairs.len()), (pairs, pairs, 3));
            assert!(a.pushed.iter().all(|&(here, there)| here.is_device() && b.pushed.contains(&(there, here))));
        }
    }

    #[test]
    fn two_sides_meet_and_agree() {
        for gpus in [[0, 0], [1, 1], [2, 3], [0, 2]] {
            let (a, b) = linked(gpus);

            assert_eq!(a.pairs.len(), 1 + usize::from(gpus[0] * gpus[1]));
            let mirrored: Vec<_> = b.pairs.iter().map(|&(x, y)| (y, x)).collect();
            assert!(a.pairs.iter().all(|pair| mirrored.contains(pair)));
        }
    }

    /// Another process connects to the listener's socket and sends this. Afterwards the peer still gets in.
    fn with_candidate(message: &[u8], fds: usize) {
        let (mut a, mut b) = both([1, 1]);
        let candidate = Socket::connect(&a.id, Where::Abstract).unwrap().unwrap();
        let file = shm::create(c"test", super::super::layout::END * 8).unwrap();
        if !message.is_empty() {
            assert!(candidate.send(message, (fds > 0).then(|| file.as_fd())).unwrap());
        }
        assert!(a.poll(Instant::now()).unwrap().is_none());
        let (ours, _theirs) = meet(&mut a, &mut b).unwrap();
        assert_eq!(ours.pairs.len(), 2);
        // It received nothing.
        assert!(matches!(candidate.receive(&mut [0; MAX_MESSAGE]), Ok(Received::End)));
    }

    #[test]
    fn candidates_receive_nothing_and_do_not_keep_the_peer_out() {
        let wrong = introduction(&[(Place::gpu(0), [7; 16])], &Secret::new([9; 32]).unwrap()).unwrap();
        let mut garbled = introduction(&[(Place::gpu(0), [7; 16])], &keys(true).send).unwrap();
        garbled[9] ^= 1;
        let reflected = introduction(&[], &keys(false).send).unwrap();
        for (message, fds) in
            [(&b"x"[..], 0), (&[0; 4000], 1), (&wrong, 1), (&garbled, 1), (&reflected, 1), (&wrong[..40], 0), (&[], 0)]
        {
            with_candidate(message, fds);
        }
    }

    #[test]
    fn a_crowd_of_silent_candidates_ends_in_time() {
        let (mut a, _b) = both([0, 0]);
        let crowd: Vec<_> =
            (0..2 * MAX_CANDIDATES).map_while(|_| Socket::connect(&a.id, Where::Abstract).ok().flatten()).collect();
        for _ in 0..5 {
            assert!(a.poll(Instant::now()).unwrap().is_none());
        }
        assert!(a.candidates.len() <= MAX_CANDIDATES && crowd.len() > MAX_CANDIDATES);
        let error = a.poll(Instant::now() + MEETING_TIMEOUT + Duration::from_secs(1)).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
    }

    #[test]
    fn a_crowd_of_silent_candidates_keeps_the_peer_out_for_no_time() {
        for crowd in [MAX_CANDIDATES, 2 * MAX_CANDIDATES, 4 * MAX_CANDIDATES] {
            let (mut a, mut b) = both([1, 1]);
            let mut silent = Vec::new();
            for _ in 0..crowd {
                silent.extend(Socket::connect(&a.id, Where::Abstract).ok().flatten());
                assert!(a.poll(Instant::now()).unwrap().is_none());
            }
            meet(&mut a, &mut b).unwrap();
            assert!(silent.len() >= MAX_CANDIDATES);
        }
    }

    #[test]
    fn a_peer_that_was_dropped_among_others_connects_again() {
        let (mut a, mut b) = both([1, 1]);
        // Connected, and nothing said yet.
        let who = Who { pid: 1, uid: 0 };
        b.candidates.push(Candidate { socket: Socket::connect(&a.id, Where::Abstract).unwrap().unwrap(), who, introduced: true });
        let mut crowd = Vec::new();
        for _ in 0..2 {
            crowd.extend((0..MAX_CANDIDATES - 1).filter_map(|_| Socket::connect(&a.id, Where::Abstract).ok().flatten()));
            a.poll(Instant::now()).unwrap();
        }
        let (ours, _) = meet(&mut a, &mut b).unwrap();
        assert!(ours.pairs.len() == 2 && b.cuts == 1 && crowd.len() == 2 * (MAX_CANDIDATES - 1));
    }

    /// A peer that proves itself to a listener, with such changes to its introduction and this for its ring.
    fn introduced(to: &Meeting, change: impl Fn(&mut Vec<u8>), ring: Option<BorrowedFd<'_>>) -> Result<Socket> {
        let peer = Socket::connect(&to.id, Where::Abstract)?.unwrap();
        let mut body = introduction(&[(Place::gpu(0), gpu(0))], &keys(true).send)?;
        body.truncate(body.len() - MAC);
        change(&mut body);
        let mac = secret::sign(&keys(true).send, &body).unwrap();
        body.extend_from_slice(mac.as_ref());
        assert!(peer.send(&body, ring)?);
        Ok(peer)
    }

    /// A peer that proves itself, and then says this.
    fn proved_and_then(change: impl Fn(&mut Vec<u8>), fd: Option<OwnedFd>, second: Option<&[u8]>) -> Result<()> {
        let (mut a, b) = both([1, 1]);
        let peer = introduced(&a, change, fd.as_ref().map(AsFd::as_fd))?;
        a.poll(Instant::now())?;
        if let Some(second) = second {
            assert!(peer.send(second, None)?);
        }
        a.poll(Instant::now())?;
        a.poll(Instant::now() + MEETING_TIMEOUT)?;
        drop(b);
        Ok(())
    }

    #[test]
    fn a_proved_peer_that_lies_is_left_to_its_channels() {
        let ring = || Some(RingOut::new().unwrap().fd().try_clone_to_owned().unwrap());
        let same = |_: &mut Vec<u8>| {};
        let fails = |result: Result<()>, words: &str| assert!(result.is_err_and(|e| e.to_str().contains(words)), "{words}");
        fails(proved_and_then(same, None, None), "no ring");
        fails(proved_and_then(same, Some(std::fs::File::open("/dev/zero").unwrap().into()), None), "memory file");
        fails(proved_and_then(same, Some(shm::create(c"short", 4096).unwrap()), None), "bytes of");
        fails(proved_and_then(same, ring(), Some(b"nonsense")), "another magic or version");
        fails(proved_and_then(same, ring(), Some(&findings(&[(Place::HOST, Place::gpu(0), Manner::Pull)]))), "host and GPU");
        let mut strange = findings(&[(Place::gpu(0), Place::gpu(0), Manner::Push)]);
        *strange.last_mut().unwrap() = 3;
        fails(proved_and_then(same, ring(), Some(&strange)), "of manner 3");
        fails(proved_and_then(same, ring(), Some(&findings(&[]))), "shares no memory");
        fails(proved_and_then(same, ring(), None), "in time");
    }

    /// A page whose fault is never resolved; `None` where the kernel has no userfaultfd for this user.
    fn silent_page() -> Option<(OwnedFd, u64)> {
        const API: libc::Ioctl = 0xC018_AA3F_u32 as libc::Ioctl;
        const REGISTER: libc::Ioctl = 0xC020_AA00_u32 as libc::Ioctl;
        // SAFETY: fresh memory, which stays mapped, and structures as the kernel's userfaultfd.h has them.
        unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK);
            if fd < 0 {
                return None;
            }
            let fd = OwnedFd::from_raw_fd(fd as i32);
            let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let page = libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0);
            assert_ne!(page, libc::MAP_FAILED);
            let missing = 1;
            let (mut api, mut range) = ([0xAAu64, 0, 0], [page as u64, 4096, missing, 0]);
            let done = libc::ioctl(fd.as_raw_fd(), API, api.as_mut_ptr()) == 0
                && libc::ioctl(fd.as_raw_fd(), REGISTER, range.as_mut_ptr()) == 0;
            done.then_some((fd, page as u64))
        }
    }

    #[test]
    fn host_memory_of_a_proved_peer_that_never_answers_is_staged() {
        let Some((fd, page)) = silent_page() else {
            eprintln!("SKIPPED: no userfaultfd for this user");
            return;
        };
        let (mut a, b) = both([1, 1]);
        let elsewhere = |body: &mut Vec<u8>| {
            let at = body.len() - 40;
            body[at..at + 8].copy_from_slice(&page.to_le_bytes());
        };
        let peer = introduced(&a, elsewhere, Some(b.outbox.as_ref().unwrap().fd())).unwrap();
        let gpus = (Place::gpu(0), Place::gpu(0));
        let all = [(Place::HOST, Place::HOST, Manner::Pull), (gpus.0, gpus.1, Manner::Pull)];
        assert!(peer.send(&findings(&all), None).unwrap());
        let now = Instant::now();
        for _ in 0..3 {
            assert!(a.poll(now).unwrap().is_none(), "it still looks");
        }
        let linked = a.poll(now + MEETING_TIMEOUT).unwrap().unwrap();
        assert_eq!((linked.pairs, linked.pushed), (vec![(Place::HOST, Place::HOST), gpus], vec![(Place::HOST, Place::HOST)]));
        assert!(linked.unread.is_some_and(|why| why.contains("took longer")));
        drop(fd);
    }

    #[test]
    fn another_host_and_another_namespace_are_told_apart() {
        let (a, b) = (Opening::new(false, None).unwrap(), Opening::new(true, None).unwrap());
        let elsewhere = Invitation { host: [0; 16], ..a.invitation() };
        assert!(b
            .meet(&elsewhere, keys(true), have(0, false), Instant::now())
            .is_err_and(|e| e.to_str().contains("another host")));
        // No socket of this network namespace has the name.
        let b = Opening::new(true, None).unwrap();
        let hidden = Invitation { name: [0xEE; 16], ..a.invitation() };
        let mut b = b.meet(&hidden, keys(true), have(0, false), Instant::now()).unwrap();
        assert!(b.poll(Instant::now()).is_err_and(|e| e.to_str().contains("network namespace")));
    }

    #[test]
    fn a_shared_directory_takes_the_place_of_a_namespace() {
        let directory = std::env::temp_dir().join(format!("uccl-link-test-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let (mut a, b) =
            (Opening::new(false, Some(directory.clone())).unwrap(), Opening::new(true, Some(directory.clone())).unwrap());
        // As in another namespace: only the directory is left.
        a.listeners.remove(0);
        let (ours, theirs) = (a.invitation(), b.invitation());
        let mut a = a.meet(&theirs, keys(false), have(0, false), Instant::now()).unwrap();
        let mut b = b.meet(&ours, keys(true), have(0, false), Instant::now()).unwrap();
        let (ours, _) = meet(&mut a, &mut b).unwrap();
        assert_eq!(ours.pairs, [(Place::HOST, Place::HOST)]);
        assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 0, "the name is gone");
        std::fs::remove_dir(&directory).unwrap();
    }

    #[test]
    fn processes_of_other_users_are_refused() {
        // SAFETY: a plain system call.
        let own = unsafe { libc::geteuid() };
        assert!(allowed(Who { pid: 1, uid: own }).is_ok() && allowed(Who { pid: 1, uid: own + 1 }).is_err());
        let (a, _b) = socket::pair();
        assert_eq!(a.who().unwrap().uid, own);
    }
}
