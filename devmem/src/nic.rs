//! A NIC as ethtool sees it: rings, queues, the table that spreads connections, and rules that steer one connection.

use crate::binding::{is_taken, Binding, Family, Refused};
use crate::netlink::Request;
use crate::rules::{self, Flow, RULE_BYTES};
use crate::socket::returned;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const HEADER: u16 = 1;
const HEADER_INTERFACE: u16 = 1;
const RINGS_GET: u8 = 15;
const RINGS_SET: u8 = 16;
const RINGS_RX: u16 = 6;
const RINGS_SPLIT: u16 = 11;
const RINGS_THRESHOLD: u16 = 17;
const SPLIT_ON: u32 = 2;
const CHANNELS_GET: u8 = 17;
const CHANNELS_RX: u16 = 6;
const CHANNELS_COMBINED: u16 = 9;
const RSS_GET: u8 = 38;
const RSS_TABLE: u16 = 4;
const IOCTL: u64 = 0x8946;
const NAME: usize = 16;

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    name: String,
    interface: u32,
}

/// How the receive rings of a NIC are set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rings {
    /// Header split is on; `None` if the driver does not say.
    pub split: Option<bool>,
    /// Smaller payload is not split.
    pub threshold: u32,
    /// Entries of a receive ring.
    pub entries: u32,
}

impl Nic {
    /// The interface of this name.
    ///
    /// # Errors
    /// There is none.
    pub fn named(name: &str) -> io::Result<Nic> {
        let text = CString::new(name).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: a string that ends in a zero byte.
        match unsafe { libc::if_nametoindex(text.as_ptr()) } {
            0 => Err(io::Error::last_os_error()),
            interface if name.len() < NAME => Ok(Nic { name: name.to_owned(), interface }),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its number.
    pub fn interface(&self) -> u32 {
        self.interface
    }

    fn ask(&self, command: u8) -> Result<crate::Outcome, Refused> {
        Family::open("ethtool")?.ask(command, 1, |request| request.nested(HEADER, &[(HEADER_INTERFACE, self.interface)]))
    }

    /// Its receive rings.
    ///
    /// # Errors
    /// The driver does not tell.
    pub fn rings(&self) -> Result<Rings, Refused> {
        let answer = self.ask(RINGS_GET)?;
        Ok(Rings {
            split: answer.number(RINGS_SPLIT).filter(|split| *split > 0).map(|split| split == SPLIT_ON),
            threshold: answer.number(RINGS_THRESHOLD).unwrap_or(0),
            entries: answer.number(RINGS_RX).unwrap_or(0),
        })
    }

    /// Has the NIC split every packet's headers from its payload. Needs CAP_NET_ADMIN.
    ///
    /// # Errors
    /// The driver cannot.
    pub fn split_headers(&self) -> Result<(), Refused> {
        let now = self.rings()?;
        if now.split == Some(true) && now.threshold == 0 {
            return Ok(());
        }
        let set = |request: Request| {
            let request = request.nested(HEADER, &[(HEADER_INTERFACE, self.interface)]).byte(RINGS_SPLIT, SPLIT_ON as u8);
            // Drivers without a threshold, which split every packet, refuse to have one set.
            if now.threshold == 0 {
                request
            } else {
                request.number(RINGS_THRESHOLD, 0)
            }
        };
        Family::open("ethtool")?.ask(RINGS_SET, 1, set).map(drop)
    }

    /// How many receive queues it has.
    ///
    /// # Errors
    /// The driver does not tell.
    pub fn queues(&self) -> Result<u32, Refused> {
        let answer = self.ask(CHANNELS_GET)?;
        Ok(answer.number(CHANNELS_RX).unwrap_or(0) + answer.number(CHANNELS_COMBINED).unwrap_or(0))
    }

    /// The queues that ordinary connections are spread over, in rising order.
    ///
    /// # Errors
    /// The driver does not tell.
    pub fn spread(&self) -> Result<Vec<u32>, Refused> {
        let answer = self.ask(RSS_GET)?;
        let table = answer.bytes(RSS_TABLE).ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))?;
        let mut queues: Vec<u32> =
            table.chunks_exact(4).filter_map(|entry| entry.try_into().ok()).map(u32::from_ne_bytes).collect();
        queues.sort_unstable();
        queues.dedup();
        Ok(queues)
    }

    /// Queues that no ordinary connection uses, the last first.
    ///
    /// # Errors
    /// The driver does not tell.
    pub fn spare_queues(&self) -> Result<Vec<u32>, Refused> {
        let (all, spread) = (self.queues()?, self.spread()?);
        Ok((0..all).rev().filter(|queue| !spread.contains(queue)).collect())
    }

    /// Steers the packets of a connection to a queue, as long as the rule lives. Needs CAP_NET_ADMIN.
    ///
    /// # Errors
    /// Those of the driver: no room, no such rules, steering is off.
    pub fn steer(&self, flow: &Flow, queue: u32) -> io::Result<Rule> {
        let socket = socket()?;
        let (counted, all) = self.list_rules(&socket)?;
        let place = rules::free(&counted, &all).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
        let mut rule = rules::insert(flow, queue, place);
        self.request(&socket, &mut rule)?;
        Ok(Rule { nic: self.clone(), place: rules::place(&rule) })
    }

    fn list_rules(&self, socket: &OwnedFd) -> io::Result<([u8; RULE_BYTES], Vec<u8>)> {
        let mut counted = rules::count();
        self.request(socket, &mut counted)?;
        let mut all = rules::all(rules::counted(&counted));
        self.request(socket, &mut all)?;
        Ok((counted, all))
    }

    /// Its steering rules, and for how many there is room; 0 if the driver does not say.
    ///
    /// # Errors
    /// It has none.
    pub fn rules(&self) -> io::Result<(u32, u32)> {
        let (counted, all) = self.list_rules(&socket()?)?;
        Ok((rules::counted(&counted), rules::room(&counted, &all)))
    }

    /// Binds a dma-buf to the first of these queues that is not taken; without queues, to a spare one. First deletes the rules that a process
    /// which was killed has left for it: they would bring other connections here.
    ///
    /// # Errors
    /// The kernel's words about the queue. Other queues are tried only where another process was faster.
    pub fn bind_spare(&self, queues: &[u32], dmabuf: BorrowedFd<'_>) -> Result<(u32, Binding), Refused> {
        let spare = self.spare_queues()?;
        let mut queues = spare.into_iter().filter(|queue| queues.is_empty() || queues.contains(queue)).peekable();
        let text = match queues.peek() {
            None => "ordinary connections use every queue (`ethtool -X NIC equal N` keeps some free)",
            Some(_) => "other processes have every spare queue (`ethtool -X NIC equal N` keeps more of them)",
        };
        for queue in queues {
            if is_taken(self.interface, queue)? {
                continue;
            }
            self.clear(queue)?;
            match Binding::receiving(self.interface, queue, dmabuf) {
                Ok(binding) => return Ok((queue, binding)),
                Err(refused) if matches!(refused.error.raw_os_error(), Some(libc::EEXIST | libc::EBUSY)) => {}
                Err(Refused { error, text }) => {
                    return Err(Refused { error, text: text.map(|text| format!("queue {queue}: {text}")) });
                }
            }
        }
        Err(Refused { error: io::Error::from_raw_os_error(libc::EBUSY), text: Some(text.to_owned()) })
    }

    /// Deletes the rules for a queue.
    fn clear(&self, queue: u32) -> io::Result<()> {
        let socket = socket()?;
        let (_, all) = self.list_rules(&socket)?;
        for place in rules::places(&all) {
            let mut rule = rules::get_rule(place);
            self.request(&socket, &mut rule)?;
            if rules::queue_of(&rule) == u64::from(queue) {
                self.request(&socket, &mut rules::delete(place))?;
            }
        }
        Ok(())
    }

    fn request(&self, socket: &OwnedFd, bytes: &mut [u8]) -> io::Result<()> {
        debug_assert!(bytes.len() >= RULE_BYTES);
        #[repr(C)]
        struct Request {
            name: [u8; NAME],
            data: *mut u8,
            rest: [u8; 16],
        }
        let mut request = Request { name: [0; NAME], data: bytes.as_mut_ptr(), rest: [0; 16] };
        request.name[..self.name.len()].copy_from_slice(self.name.as_bytes());
        // SAFETY: the kernel reads and writes the request and the bytes that it points to, which are as long as they say.
        returned(unsafe { libc::ioctl(socket.as_raw_fd(), IOCTL as _, &raw mut request) } as isize).map(drop)
    }
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: a call without pointers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    returned(fd as isize)?;
    // SAFETY: a descriptor just created, without another owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A steering rule. Dropping it deletes it; a process that is killed leaves it behind.
#[derive(Debug)]
pub struct Rule {
    nic: Nic,
    place: u32,
}

impl Rule {
    /// Its place in the NIC's table.
    pub fn place(&self) -> u32 {
        self.place
    }
}

impl Drop for Rule {
    fn drop(&mut self) {
        if let Ok(socket) = socket() {
            let _ = self.nic.request(&socket, &mut rules::delete(self.place));
        }
    }
}
