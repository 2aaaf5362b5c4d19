//! The agent itself. One thread serves all clients; no client can make it wait, and what a client may take is bounded.

use super::client::socket_for;
use super::closer::Closer;
use super::passing::{self, Datagram};
use super::protocol::{Answer, Request, REQUEST_BYTES};
use crate::binding::{Binding, Refused};
use crate::nic::{Nic, Rule};
use crate::rules::Flow;
use crate::socket::returned;
use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

const CLIENTS: usize = 64;
/// Of one user.
const CLIENTS_OF_ONE: usize = 32;
/// Rules of a client: each keeps a descriptor.
const RULES: usize = 128;
/// A client that has bound nothing after this time is let go.
const IDLE: Duration = Duration::from_secs(10);
/// Requests of a client that are served in a row, and in a second.
const IN_A_ROW: usize = 8;
const IN_A_SECOND: u32 = 256;
const SECOND: Duration = Duration::from_secs(1);
/// A user whose descriptors do not close is not read from with so many of them waiting.
const UNCLOSED: usize = 32;
/// How long no client is accepted once the agent can open no descriptor.
const FULL: Duration = Duration::from_millis(200);
/// Descriptors that all clients together may take: of each a connection, a binding, rules, and some that are being closed.
const DESCRIPTORS: u64 = (CLIENTS * (RULES + 2 + UNCLOSED) + 256) as u64;
const NETNS_COOKIE: i32 = 71;
const ESTABLISHED: u8 = 1;

/// A NIC that clients may use, and which of its queues; none: the spare ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// Its name.
    pub nic: String,
    /// Its queues.
    pub queues: Vec<u32>,
}

impl Allowed {
    /// `NIC` or `NIC=QUEUE,QUEUE`.
    pub fn parse(text: &str) -> Option<Allowed> {
        let (nic, queues) = text.split_once('=').map_or((text, None), |(nic, queues)| (nic, Some(queues)));
        let queues = queues.map_or(Some(Vec::new()), |list| list.split(',').map(|queue| queue.parse().ok()).collect())?;
        let fine = !nic.is_empty() && nic.len() < 16 && (!text.contains('=') || !queues.is_empty());
        fine.then(|| Allowed { nic: nic.to_owned(), queues })
    }
}

/// What takes privileges; the kernel, but in tests.
pub trait Privileges {
    /// A binding, as long as it lives.
    type Bound;
    /// A rule, as long as it lives.
    type Steered;
    /// Binds a dma-buf: the queue, the number of the binding, and the binding.
    ///
    /// # Errors
    /// The kernel's.
    fn bind(&self, nic: &Allowed, dmabuf: BorrowedFd<'_>) -> Result<(u32, u32, Self::Bound), Refused>;
    /// Steers a connection to a queue.
    ///
    /// # Errors
    /// The kernel's; `EPERM` where the connection is none of the agent's network namespace.
    fn steer(&self, nic: &Allowed, queue: u32, connection: BorrowedFd<'_>) -> Result<Self::Steered, Refused>;
    /// The user at the other end of a connection.
    fn user(&self, socket: BorrowedFd<'_>) -> Option<u32> {
        user_of(socket)
    }
}

struct Client<P: Privileges> {
    socket: OwnedFd,
    user: u32,
    since: Instant,
    /// Requests since the beginning of a second.
    asked: (Instant, u32),
    // Rules end before the binding, and each before its connection.
    rules: HashMap<u32, (P::Steered, OwnedFd)>,
    next: u32,
    bound: Option<(Allowed, u32, P::Bound)>,
}

impl<P: Privileges> Client<P> {
    /// Whether it may ask now.
    fn may_ask(&self) -> bool {
        self.asked.1 < IN_A_SECOND || self.asked.0.elapsed() >= SECOND
    }

    fn count(&mut self) {
        if self.asked.0.elapsed() >= SECOND {
            self.asked = (Instant::now(), 0);
        }
        self.asked.1 += 1;
    }

    /// Ends what it has. What is left are descriptors to be closed.
    fn end(self) -> Vec<OwnedFd> {
        let Client { socket, rules, bound, .. } = self;
        // While a connection is open, no other process can have one with the same ends, which the rule would steer.
        let mut left: Vec<OwnedFd> = rules.into_values().map(|(_, connection)| connection).collect();
        drop(bound);
        left.push(socket);
        left
    }
}

/// A `Bind` that was refused, and when: the kernel is not asked the same again at once.
struct Refusal {
    user: u32,
    nic: String,
    at: Instant,
    error: i32,
    text: Option<String>,
}

/// See the file's head.
pub struct Server<P: Privileges> {
    listener: OwnedFd,
    nics: Vec<Allowed>,
    /// Most queues of a NIC for one user.
    share: usize,
    privileges: P,
    clients: Vec<Client<P>>,
    refused: Vec<Refusal>,
    closer: Closer,
    /// Until when no client is accepted.
    full: Option<Instant>,
}

/// Raises the limit of this process's descriptors to what all clients together may take.
///
/// # Errors
/// The system allows fewer: how many there are, and how many are needed.
pub fn allow_descriptors() -> Result<(), (u64, u64)> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit is written during the call.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
    if limit.rlim_cur < DESCRIPTORS {
        limit.rlim_cur = DESCRIPTORS.min(limit.rlim_max);
        // SAFETY: the limit is read during the call.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) };
    }
    match limit.rlim_cur {
        enough if enough >= DESCRIPTORS => Ok(()),
        few => Err((few, DESCRIPTORS)),
    }
}

fn refusal(error: i32, text: &str) -> Refused {
    Refused { error: io::Error::from_raw_os_error(error), text: Some(text.to_owned()) }
}

impl<P: Privileges> Server<P> {
    /// Listens on a socket that its owner and its group may use.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn open(path: &Path, group: Option<u32>, nics: Vec<Allowed>, privileges: P) -> io::Result<Server<P>> {
        let (listener, address) = socket_for(path)?;
        // That of an agent that was killed.
        let _ = std::fs::remove_file(path);
        let size = std::mem::size_of_val(&address) as u32;
        // SAFETY: the address is read during the call.
        returned(unsafe { libc::bind(listener.as_raw_fd(), (&raw const address).cast(), size) } as isize)?;
        std::os::unix::fs::chown(path, None, group)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
        // SAFETY: calls without pointers.
        unsafe {
            returned(libc::listen(listener.as_raw_fd(), CLIENTS as i32) as isize)?;
            returned(libc::fcntl(listener.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) as isize)?;
        }
        Ok(Server {
            listener,
            nics,
            share: usize::MAX,
            privileges,
            clients: Vec::new(),
            refused: Vec::new(),
            closer: Closer::default(),
            full: None,
        })
    }

    /// One user gets at most so many queues of each NIC.
    pub fn share(&mut self, queues: usize) {
        self.share = queues;
    }

    /// Serves what is there, waiting at most so long for it.
    ///
    /// # Errors
    /// The kernel's poll fails.
    pub fn serve(&mut self, wait: Duration) -> io::Result<()> {
        self.closer.advance();
        self.full = self.full.filter(|until| *until > Instant::now());
        let entry = |fd: BorrowedFd<'_>, wanted: bool| libc::pollfd {
            fd: if wanted { fd.as_raw_fd() } else { -1 },
            events: libc::POLLIN,
            revents: 0,
        };
        let read = |client: &Client<P>| client.may_ask() && self.closer.waiting_of(client.user) < UNCLOSED;
        let mut polled: Vec<libc::pollfd> =
            self.clients.iter().map(|client| entry(client.socket.as_fd(), read(client))).collect();
        let all = polled.iter().all(|entry| entry.fd >= 0) && self.full.is_none();
        polled.push(entry(self.listener.as_fd(), self.full.is_none()));
        let wait = if all { wait } else { wait.min(FULL) };
        // SAFETY: entries of ours.
        let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as _, wait.as_millis() as i32) };
        match returned(ready as isize) {
            Err(e) if e.kind() != io::ErrorKind::Interrupted => return Err(e),
            _ => {}
        }
        let mut at = 0;
        for entry in &polled[..polled.len() - 1] {
            let client = &self.clients[at];
            // Whatever it says.
            let idle = client.bound.is_none() && client.since.elapsed() >= IDLE;
            match !idle && (entry.revents == 0 || self.serve_client(at)) {
                true => at += 1,
                false => self.end(at),
            }
        }
        while self.full.is_none() && self.accept() {}
        Ok(())
    }

    /// How many clients there are.
    pub fn clients(&self) -> usize {
        self.clients.len()
    }

    fn end(&mut self, at: usize) {
        let client = self.clients.remove(at);
        self.closer.close(client.user, client.end());
    }

    fn accept(&mut self) -> bool {
        // SAFETY: a call that returns a new descriptor.
        let fd = unsafe {
            let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
            libc::accept4(self.listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), flags)
        };
        if fd < 0 {
            let error = io::Error::last_os_error();
            if !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) {
                // Most likely there is no descriptor left; the client stays in the queue.
                self.full = Some(Instant::now() + FULL);
            }
            return false;
        }
        // SAFETY: a descriptor just created, without another owner.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let Some(user) = self.privileges.user(socket.as_fd()) else { return true };
        let of_user = self.clients.iter().filter(|client| client.user == user).count();
        if self.clients.len() < CLIENTS && of_user < CLIENTS_OF_ONE && self.closer.waiting_of(user) < UNCLOSED {
            let since = Instant::now();
            let client = Client { socket, user, since, asked: (since, 0), rules: HashMap::new(), next: 0, bound: None };
            self.clients.push(client);
        } else {
            // With what it may have passed already.
            self.closer.close(user, vec![socket]);
        }
        true
    }

    /// Serves requests of a client: whether it stays.
    fn serve_client(&mut self, at: usize) -> bool {
        for _ in 0..IN_A_ROW {
            if !self.clients[at].may_ask() {
                break;
            }
            let mut buffer = [0; REQUEST_BYTES + 1];
            let Datagram { len, mut with, cut, missing } =
                match passing::receive(self.clients[at].socket.as_fd(), &mut buffer, libc::MSG_DONTWAIT) {
                    Ok(received) => received,
                    Err(e) => return e.kind() == io::ErrorKind::WouldBlock,
                };
            self.clients[at].count();
            let user = self.clients[at].user;
            let request = Request::decode(&buffer[..len]).filter(|_| !cut && with.len() < 2);
            let bind = matches!(request, Some(Request::Bind(_)));
            let answer = match request {
                None => None,
                // One that did not come for lack of room here is not the client's fault.
                Some(_) if missing => Some(Err(refusal(libc::EMFILE, "the agent can open no more descriptors"))),
                Some(request) => Some(self.answer(at, request, &mut with)),
            };
            self.closer.close(user, with);
            let answer = match answer {
                // What is no request ends the client.
                None => return false,
                Some(Ok((one, other))) => Answer::Done(one, other),
                Some(Err(refused)) => Answer::Refused(refused.error.raw_os_error().unwrap_or(libc::EINVAL), refused.text),
            };
            // A client that does not read its answers is let go.
            let sent = passing::send(self.clients[at].socket.as_fd(), &answer.encode(), None, libc::MSG_DONTWAIT);
            // As is one whose binding was refused: another try is another client's.
            if sent.is_err() || (bind && self.clients[at].bound.is_none()) {
                return false;
            }
        }
        true
    }

    /// Does what is asked for. Takes of the descriptors what it keeps.
    fn answer(&mut self, at: usize, request: Request, with: &mut Vec<OwnedFd>) -> Result<(u32, u32), Refused> {
        match (request, with.first()) {
            (Request::Bind(nic), Some(dmabuf)) => self.bind(at, &nic, dmabuf.as_fd()),
            (Request::Steer, Some(connection)) => {
                let client = &mut self.clients[at];
                let Some((nic, queue, _)) = &client.bound else {
                    return Err(refusal(libc::EINVAL, "nothing is bound"));
                };
                if client.rules.len() >= RULES {
                    return Err(refusal(libc::ENOSPC, "the agent has no more rules for one process"));
                }
                let rule = self.privileges.steer(nic, *queue, connection.as_fd())?;
                client.next = client.next.wrapping_add(1);
                client.rules.extend(with.pop().map(|connection| (client.next, (rule, connection))));
                Ok((client.next, 0))
            }
            (Request::Release(number), None) => match self.clients[at].rules.remove(&number) {
                Some((rule, connection)) => {
                    drop(rule);
                    with.push(connection);
                    Ok((0, 0))
                }
                None => Err(refusal(libc::ENOENT, "there is no such rule")),
            },
            _ => Err(refusal(libc::EINVAL, "a descriptor is missing, or not expected")),
        }
    }

    fn bind(&mut self, at: usize, nic: &str, dmabuf: BorrowedFd<'_>) -> Result<(u32, u32), Refused> {
        let Server { clients, nics, share, privileges, refused, .. } = self;
        if clients[at].bound.is_some() {
            return Err(refusal(libc::EBUSY, "this connection to the agent has a binding"));
        }
        let Some(allowed) = nics.iter().find(|allowed| allowed.nic == nic) else {
            return Err(refusal(libc::EPERM, "the agent does not serve this NIC"));
        };
        let user = clients[at].user;
        let of_user =
            |client: &&Client<P>| client.user == user && client.bound.as_ref().is_some_and(|(allowed, ..)| allowed.nic == nic);
        if clients.iter().filter(of_user).count() >= *share {
            return Err(refusal(libc::EDQUOT, "the agent gives one user no more queues of this NIC"));
        }
        refused.retain(|refusal| refusal.at.elapsed() < SECOND);
        if let Some(known) = refused.iter().find(|refusal| refusal.user == user && refusal.nic == nic) {
            return Err(Refused { error: io::Error::from_raw_os_error(known.error), text: known.text.clone() });
        }
        match privileges.bind(allowed, dmabuf) {
            Ok((queue, id, bound)) => {
                clients[at].bound = Some((allowed.clone(), queue, bound));
                Ok((queue, id))
            }
            Err(why) => {
                let error = why.error.raw_os_error().unwrap_or(libc::EINVAL);
                refused.push(Refusal { user, nic: nic.to_owned(), at: Instant::now(), error, text: why.text.clone() });
                Err(why)
            }
        }
    }
}

fn user_of(socket: BorrowedFd<'_>) -> Option<u32> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = std::mem::size_of_val(&credentials) as libc::socklen_t;
    // SAFETY: a structure and its length.
    let known = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, (&raw mut credentials).cast(), &mut len)
    };
    (known == 0).then_some(credentials.uid)
}

/// The kernel, asked by a process with CAP_NET_ADMIN.
pub struct Kernel {
    /// Of the agent's network namespace.
    namespace: u64,
}

impl Kernel {
    /// This process's.
    ///
    /// # Errors
    /// The kernel cannot tell network namespaces apart.
    pub fn new() -> io::Result<Kernel> {
        // SAFETY: a call without pointers.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
        returned(fd as isize)?;
        // SAFETY: a descriptor just created, without another owner.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Kernel { namespace: option(socket.as_fd(), libc::SOL_SOCKET, NETNS_COOKIE)? })
    }
}

/// An option of a socket, as plain data.
fn option<T: Default>(socket: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<T> {
    let (mut value, mut len) = (T::default(), std::mem::size_of::<T>() as libc::socklen_t);
    // SAFETY: a value of numbers and its length.
    returned(unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut value).cast(), &mut len) } as isize)?;
    Ok(value)
}

/// The ends of a TCP connection of this network namespace.
fn flow(connection: BorrowedFd<'_>, namespace: u64) -> Result<Flow, Refused> {
    let fine = option::<u64>(connection, libc::SOL_SOCKET, NETNS_COOKIE)? == namespace
        && option::<i32>(connection, libc::SOL_SOCKET, libc::SO_PROTOCOL)? == libc::IPPROTO_TCP
        && option::<i32>(connection, libc::SOL_SOCKET, libc::SO_DOMAIN)? == libc::AF_INET
        && option::<[u8; 8]>(connection, libc::IPPROTO_TCP, libc::TCP_INFO)?[0] == ESTABLISHED;
    if !fine {
        return Err(refusal(libc::EPERM, "this is no TCP connection over IPv4 of the agent's network namespace"));
    }
    type Ask = unsafe extern "C" fn(i32, *mut libc::sockaddr, *mut libc::socklen_t) -> i32;
    let end = |ask: Ask| -> io::Result<SocketAddrV4> {
        // SAFETY: all zeros is an empty address.
        let mut address: libc::sockaddr_in = unsafe { std::mem::zeroed() };
        let mut len = std::mem::size_of_val(&address) as libc::socklen_t;
        // SAFETY: an address and its length.
        returned(unsafe { ask(connection.as_raw_fd(), (&raw mut address).cast(), &mut len) } as isize)?;
        Ok(SocketAddrV4::new(Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr)), u16::from_be(address.sin_port)))
    };
    Ok(Flow { from: end(libc::getpeername)?, to: end(libc::getsockname)? })
}

impl Privileges for Kernel {
    type Bound = Binding;
    type Steered = Rule;

    fn bind(&self, allowed: &Allowed, dmabuf: BorrowedFd<'_>) -> Result<(u32, u32, Binding), Refused> {
        let nic = Nic::named(&allowed.nic)?;
        let (queue, binding) = nic.bind_spare(&allowed.queues, dmabuf)?;
        Ok((queue, binding.id(), binding))
    }

    fn steer(&self, allowed: &Allowed, queue: u32, connection: BorrowedFd<'_>) -> Result<Rule, Refused> {
        let flow = flow(connection, self.namespace)?;
        Ok(Nic::named(&allowed.nic)?.steer(&flow, queue)?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Agent;
    use super::*;
    use std::cell::RefCell;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::path::PathBuf;
    use std::rc::Rc;

    #[derive(Default)]
    struct Counts {
        bound: usize,
        steered: usize,
        /// How often a binding was tried.
        tried: usize,
        /// Clients of users of their own.
        strangers: u32,
    }

    /// Counts what is bound and steered.
    #[derive(Clone, Default)]
    struct Fake(Rc<RefCell<Counts>>);

    struct Counted(Rc<RefCell<Counts>>, bool);

    impl Drop for Counted {
        fn drop(&mut self) {
            let mut counts = self.0.borrow_mut();
            *(if self.1 { &mut counts.bound } else { &mut counts.steered }) -= 1;
        }
    }

    impl Privileges for Fake {
        type Bound = Counted;
        type Steered = Counted;

        fn bind(&self, _: &Allowed, _: BorrowedFd<'_>) -> Result<(u32, u32, Counted), Refused> {
            self.0.borrow_mut().tried += 1;
            if self.0.borrow().bound == 2 {
                return Err(refusal(libc::EEXIST, "queue already in use"));
            }
            self.0.borrow_mut().bound += 1;
            Ok((7, 70, Counted(self.0.clone(), true)))
        }

        fn steer(&self, _: &Allowed, _: u32, _: BorrowedFd<'_>) -> Result<Counted, Refused> {
            self.0.borrow_mut().steered += 1;
            Ok(Counted(self.0.clone(), false))
        }

        fn user(&self, socket: BorrowedFd<'_>) -> Option<u32> {
            match &mut self.0.borrow_mut().strangers {
                0 => user_of(socket),
                left => {
                    *left -= 1;
                    Some(1 << 20 | *left)
                }
            }
        }
    }

    struct Served {
        server: Server<Fake>,
        counts: Rc<RefCell<Counts>>,
        path: PathBuf,
    }

    fn serve(name: &str) -> Served {
        let path = std::env::temp_dir().join(format!("uccl-agent-{name}-{}", std::process::id()));
        let fake = Fake::default();
        let counts = fake.0.clone();
        let nics = vec![Allowed { nic: "eth1".into(), queues: Vec::new() }];
        Served { server: Server::open(&path, None, nics, fake).unwrap(), counts, path }
    }

    impl Served {
        /// Runs a client's calls in a thread while serving.
        fn run<T: Send + 'static>(&mut self, client: impl FnOnce(PathBuf) -> T + Send + 'static) -> T {
            let path = self.path.clone();
            let thread = std::thread::spawn(move || client(path));
            while !thread.is_finished() {
                self.server.serve(Duration::from_millis(1)).unwrap();
            }
            let result = thread.join().unwrap();
            self.server.serve(Duration::from_millis(1)).unwrap();
            result
        }

        /// Bindings and rules.
        fn held(&self) -> (usize, usize) {
            (self.counts.borrow().bound, self.counts.borrow().steered)
        }

        fn until(&mut self, done: impl Fn(&mut Self) -> bool) {
            let begun = Instant::now();
            while !done(self) {
                assert!(begun.elapsed() < Duration::from_secs(10));
                self.server.serve(Duration::from_millis(1)).unwrap();
            }
        }
    }

    fn any_descriptor() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn a_binding_and_its_rules_last_as_long_as_the_client() {
        let mut served = serve("lasts");
        let agent = served.run(|path| {
            let mut agent = Agent::connect(&path).unwrap();
            let fd = any_descriptor();
            assert_eq!(agent.steer(fd.as_fd()).unwrap_err().text.unwrap(), "nothing is bound");
            assert_eq!(agent.bind("eth1", fd.as_fd()).unwrap(), (7, 70));
            assert!(agent.bind("eth1", fd.as_fd()).is_err());
            let (one, other) = (agent.steer(fd.as_fd()).unwrap(), agent.steer(fd.as_fd()).unwrap());
            agent.release(one).unwrap();
            assert!(agent.release(one).is_err() && one != other);
            agent
        });
        assert_eq!(served.held(), (1, 1));
        drop(agent);
        served.server.serve(Duration::from_millis(100)).unwrap();
        assert_eq!((served.held(), served.server.clients()), ((0, 0), 0));
    }

    #[test]
    fn the_kernels_words_reach_the_client_and_end_it() {
        let mut served = serve("words");
        let agents = served.run(|path| {
            let fd = any_descriptor();
            let mut agents: Vec<Agent> = (0..3).map(|_| Agent::connect(&path).unwrap()).collect();
            let bound: Vec<_> = agents.iter_mut().map(|agent| agent.bind("eth1", fd.as_fd())).collect();
            let refused = bound.into_iter().find_map(Result::err).unwrap().to_string();
            assert!(refused.starts_with("queue already in use (File exists"), "{refused}");
            assert!(!agents[2].has_failed() && agents[2].bind("eth1", fd.as_fd()).is_err() && agents[2].has_failed());
            let mut other = Agent::connect(&path).unwrap();
            assert_eq!(other.bind("eth0", fd.as_fd()).unwrap_err().text.unwrap(), "the agent does not serve this NIC");
            agents
        });
        assert_eq!((served.held(), served.server.clients()), ((2, 0), 2));
        drop(agents);
    }

    #[test]
    fn a_storm_of_bindings_asks_the_kernel_once_a_second() {
        let mut served = serve("storm");
        let (agents, asked, took) = served.run(|path| {
            let fd = any_descriptor();
            let bind = || {
                let mut agent = Agent::connect(&path).unwrap();
                agent.bind("eth1", fd.as_fd()).map(|_| agent)
            };
            let agents = [bind().unwrap(), bind().unwrap()];
            let begun = Instant::now();
            let words: Vec<String> = (0..50).map(|_| bind().unwrap_err().to_string()).collect();
            // One that comes while many of its user are being closed is not let in.
            let known =
                |text: &String| text.starts_with("queue already in use (File exists") || text.starts_with("Connection reset");
            assert!(words.iter().all(known) && words[0].starts_with("queue"), "{words:?}");
            (agents, words.len(), begun.elapsed())
        });
        let tried = served.counts.borrow().tried;
        assert!(tried <= 2 + 1 + took.as_secs() as usize, "{tried} tries for {asked} requests in {took:?}");
        drop(agents);
    }

    #[test]
    fn a_share_leaves_queues_to_other_users() {
        let mut served = serve("share");
        served.server.share(1);
        let agents = served.run(|path| {
            let fd = any_descriptor();
            let mut agents: Vec<Agent> = (0..2).map(|_| Agent::connect(&path).unwrap()).collect();
            agents[0].bind("eth1", fd.as_fd()).unwrap();
            let refused = agents[1].bind("eth1", fd.as_fd()).unwrap_err();
            assert_eq!(refused.error.raw_os_error(), Some(libc::EDQUOT));
            agents
        });
        served.counts.borrow_mut().strangers = 1;
        let other = served.run(|path| {
            let mut agent = Agent::connect(&path).unwrap();
            agent.bind("eth1", any_descriptor().as_fd()).unwrap();
            agent
        });
        assert_eq!(served.held(), (2, 0));
        drop((agents, other));
    }

    #[test]
    fn what_is_no_request_ends_only_its_client() {
        let mut served = serve("hostile");
        let honest = served.run(|path| {
            let fd = any_descriptor();
            let mut honest = Agent::connect(&path).unwrap();
            honest.bind("eth1", fd.as_fd()).unwrap();
            let messages: [(&[u8], bool); 4] =
                [(b"x", false), (&[0; REQUEST_BYTES], true), (&[0x55; 4000], false), (&Request::Steer.encode()[1..], true)];
            for (bytes, with) in messages {
                let liar = Agent::connect(&path).unwrap();
                passing::send(liar.socket.as_fd(), bytes, with.then_some(fd.as_fd()), 0).unwrap();
                let mut buffer = [0; 300];
                let answer = passing::receive(liar.socket.as_fd(), &mut buffer, 0);
                assert!(!matches!(answer, Ok(Datagram { len: 1.., .. })), "{bytes:?}");
            }
            // A request without its descriptor is answered.
            assert!(Agent::connect(&path).unwrap().ask(&Request::Steer, None).is_err());
            honest.steer(fd.as_fd()).unwrap();
            honest
        });
        assert_eq!((served.held(), served.server.clients()), ((1, 1), 1));
        drop(honest);
    }

    #[test]
    fn what_one_client_and_one_user_take_is_bounded() {
        let mut served = serve("bounds");
        let (agent, all) = served.run(|path| {
            let fd = any_descriptor();
            let mut agent = Agent::connect(&path).unwrap();
            agent.bind("eth1", fd.as_fd()).unwrap();
            let refused = (0..2 * RULES).find_map(|_| agent.steer(fd.as_fd()).err()).unwrap();
            assert_eq!(refused.error.raw_os_error(), Some(libc::ENOSPC));
            let all: Vec<_> = (0..2 * CLIENTS).map_while(|_| Agent::connect(&path).ok()).collect();
            (agent, all)
        });
        served.until(|served| served.server.clients() == CLIENTS_OF_ONE);
        for _ in 0..4 {
            served.server.serve(Duration::from_millis(1)).unwrap();
        }
        assert_eq!((served.held().1, served.server.clients()), (RULES, CLIENTS_OF_ONE));
        drop((agent, all));
    }

    #[test]
    fn what_all_users_together_take_is_bounded() {
        let mut served = serve("all");
        served.counts.borrow_mut().strangers = 3 * CLIENTS as u32;
        let all = served.run(|path| (0..3 * CLIENTS).map(|_| Agent::connect(&path).unwrap()).collect::<Vec<_>>());
        served.until(|served| served.counts.borrow().strangers == 0);
        assert_eq!(served.server.clients(), CLIENTS);
        drop(all);
        served.until(|served| served.server.clients() == 0);
    }

    #[test]
    fn a_client_that_binds_nothing_is_let_go_whatever_it_says() {
        let mut served = serve("idle");
        let mut agents = served.run(|path| {
            let fd = any_descriptor();
            let mut agents: Vec<Agent> = (0..3).map(|_| Agent::connect(&path).unwrap()).collect();
            agents[0].bind("eth1", fd.as_fd()).unwrap();
            agents
        });
        served.until(|served| served.server.clients() == 3);
        for client in &mut served.server.clients {
            client.since -= IDLE;
        }
        // The second talks, the third does not.
        passing::send(agents[1].socket.as_fd(), &Request::Release(1).encode(), None, 0).unwrap();
        served.server.serve(Duration::from_millis(1)).unwrap();
        assert_eq!((served.server.clients(), served.held()), (1, (1, 0)));
        assert!(agents[1].release(1).is_err() && agents[1].has_failed());
    }

    #[test]
    fn requests_of_a_second_are_bounded() {
        let mut served = serve("rate");
        let took = served.run(|path| {
            let (mut agent, begun) = (Agent::connect(&path).unwrap(), Instant::now());
            (0..=IN_A_SECOND).for_each(|_| assert!(agent.release(1).is_err() && !agent.has_failed()));
            begun.elapsed()
        });
        assert!(took >= SECOND * 9 / 10, "{took:?}");
    }

    /// A connection whose close waits `seconds`, for bytes that the other end does not read.
    fn lingering(seconds: i32) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (there, _) = listener.accept().unwrap();
        here.set_nonblocking(true).unwrap();
        while here.write(&[0; 1 << 16]).is_ok() {}
        let linger = libc::linger { l_onoff: 1, l_linger: seconds };
        let size = std::mem::size_of_val(&linger) as u32;
        // SAFETY: an option and its size. A close waits on a socket that does not block.
        unsafe {
            libc::setsockopt(here.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), size);
        }
        here.set_nonblocking(false).unwrap();
        (here, there)
    }

    #[test]
    fn a_connection_that_lingers_makes_no_other_client_wait() {
        let mut served = serve("linger");
        let mut kept = Vec::new();
        let begun = Instant::now();
        for steered in [true, false] {
            let (here, there) = lingering(20);
            kept.push(there);
            served.run(move |path| {
                let mut agent = Agent::connect(&path).unwrap();
                if steered {
                    agent.bind("eth1", here.as_fd()).unwrap();
                    let rule = agent.steer(here.as_fd()).unwrap();
                    agent.release(rule).unwrap();
                    agent.steer(here.as_fd()).unwrap();
                } else {
                    // Passed, and not read: the client's end closes it.
                    passing::send(agent.socket.as_fd(), b"no request", None, 0).unwrap();
                    passing::send(agent.socket.as_fd(), &Request::Steer.encode(), Some(here.as_fd()), 0).unwrap();
                }
            });
            served.run(|path| {
                let mut honest = Agent::connect(&path).unwrap();
                assert!(honest.release(1).is_err() && !honest.has_failed(), "the agent does not answer");
            });
        }
        served.until(|served| served.server.clients() == 0);
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        drop(kept);
        served.until(|served| served.server.closer.is_done());
    }

    #[test]
    fn nics_and_their_queues_are_parsed() {
        let allowed = |nic: &str, queues: &[u32]| Some(Allowed { nic: nic.into(), queues: queues.to_vec() });
        assert_eq!(Allowed::parse("eth1"), allowed("eth1", &[]));
        assert_eq!(Allowed::parse("eth1=14,15"), allowed("eth1", &[14, 15]));
        for bad in ["", "=1", "eth1=", "eth1=a", "eth1=1,,2", "a-name-that-is-too-long"] {
            assert_eq!(Allowed::parse(bad), None, "{bad}");
        }
    }
}
