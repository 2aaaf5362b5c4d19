//! The agent itself. One thread serves all clients; no client can make it wait, and what a client may take is bounded.

use super::client::socket_for;
use super::passing;
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
/// Requests of a client that are served in a row.
const IN_A_ROW: usize = 8;
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
}

struct Client<P: Privileges> {
    socket: OwnedFd,
    user: u32,
    since: Instant,
    // Rules end before the binding, and each before its connection.
    rules: HashMap<u32, (P::Steered, OwnedFd)>,
    next: u32,
    bound: Option<(Allowed, u32, P::Bound)>,
}

/// See the file's head.
pub struct Server<P: Privileges> {
    listener: OwnedFd,
    nics: Vec<Allowed>,
    privileges: P,
    clients: Vec<Client<P>>,
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
        Ok(Server { listener, nics, privileges, clients: Vec::new() })
    }

    /// Serves what is there, waiting at most so long for it.
    ///
    /// # Errors
    /// The kernel's poll fails.
    pub fn serve(&mut self, wait: Duration) -> io::Result<()> {
        let entry = |fd: BorrowedFd<'_>| libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let mut polled: Vec<libc::pollfd> = self.clients.iter().map(|client| entry(client.socket.as_fd())).collect();
        polled.push(entry(self.listener.as_fd()));
        // SAFETY: entries of ours.
        let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as _, wait.as_millis() as i32) };
        match returned(ready as isize) {
            Err(e) if e.kind() != io::ErrorKind::Interrupted => return Err(e),
            _ => {}
        }
        let mut at = 0;
        for entry in &polled[..polled.len() - 1] {
            let stays = match entry.revents {
                0 => self.clients[at].bound.is_some() || self.clients[at].since.elapsed() < IDLE,
                _ => self.serve_client(at),
            };
            match stays {
                true => at += 1,
                false => drop(self.clients.remove(at)),
            }
        }
        while self.accept() {}
        Ok(())
    }

    /// How many clients there are.
    pub fn clients(&self) -> usize {
        self.clients.len()
    }

    fn accept(&mut self) -> bool {
        // SAFETY: a call that returns a new descriptor.
        let fd = unsafe {
            let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
            libc::accept4(self.listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), flags)
        };
        if fd < 0 {
            return false;
        }
        // SAFETY: a descriptor just created, without another owner.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let Some(user) = user_of(socket.as_fd()) else { return true };
        let of_user = self.clients.iter().filter(|client| client.user == user).count();
        if self.clients.len() < CLIENTS && of_user < CLIENTS_OF_ONE {
            let client = Client { socket, user, since: Instant::now(), rules: HashMap::new(), next: 0, bound: None };
            self.clients.push(client);
        }
        true
    }

    /// Serves requests of a client: whether it stays.
    fn serve_client(&mut self, at: usize) -> bool {
        for _ in 0..IN_A_ROW {
            let mut buffer = [0; REQUEST_BYTES + 1];
            let (len, with) = match passing::receive(self.clients[at].socket.as_fd(), &mut buffer, libc::MSG_DONTWAIT) {
                Ok(received) => received,
                Err(e) => return e.kind() == io::ErrorKind::WouldBlock,
            };
            // What is no request ends the client.
            let Some(request) = Request::decode(&buffer[..len]) else { return false };
            let answer = match self.answer(at, request, with) {
                Ok((one, other)) => Answer::Done(one, other),
                Err(refused) => Answer::Refused(refused.error.raw_os_error().unwrap_or(libc::EINVAL), refused.text),
            };
            // A client that does not read its answers is let go.
            if passing::send(self.clients[at].socket.as_fd(), &answer.encode(), None, libc::MSG_DONTWAIT).is_err() {
                return false;
            }
        }
        true
    }

    fn answer(&mut self, at: usize, request: Request, with: Option<OwnedFd>) -> Result<(u32, u32), Refused> {
        let Server { clients, nics, privileges, .. } = self;
        let client = &mut clients[at];
        match (request, with) {
            (Request::Bind(nic), Some(dmabuf)) => {
                if client.bound.is_some() {
                    return Err(refusal(libc::EBUSY, "this connection to the agent has a binding"));
                }
                let Some(allowed) = nics.iter().find(|allowed| allowed.nic == nic) else {
                    return Err(refusal(libc::EPERM, "the agent does not serve this NIC"));
                };
                let (queue, id, bound) = privileges.bind(allowed, dmabuf.as_fd())?;
                client.bound = Some((allowed.clone(), queue, bound));
                Ok((queue, id))
            }
            (Request::Steer, Some(connection)) => {
                let Some((nic, queue, _)) = &client.bound else {
                    return Err(refusal(libc::EINVAL, "nothing is bound"));
                };
                if client.rules.len() >= RULES {
                    return Err(refusal(libc::ENOSPC, "the agent has no more rules for one process"));
                }
                let rule = privileges.steer(nic, *queue, connection.as_fd())?;
                client.next = client.next.wrapping_add(1);
                client.rules.insert(client.next, (rule, connection));
                Ok((client.next, 0))
            }
            (Request::Release(number), None) => match client.rules.remove(&number) {
                Some((rule, connection)) => {
                    // While it is open, no other process can have a connection with the same ends, which the rule would steer.
                    drop(rule);
                    drop(connection);
                    Ok((0, 0))
                }
                None => Err(refusal(libc::ENOENT, "there is no such rule")),
            },
            _ => Err(refusal(libc::EINVAL, "a descriptor is missing, or not expected")),
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
    use std::path::PathBuf;
    use std::rc::Rc;

    /// Counts what is bound and steered.
    #[derive(Clone, Default)]
    struct Fake(Rc<RefCell<(usize, usize)>>);

    struct Counted(Rc<RefCell<(usize, usize)>>, bool);

    impl Drop for Counted {
        fn drop(&mut self) {
            let mut counts = self.0.borrow_mut();
            *(if self.1 { &mut counts.0 } else { &mut counts.1 }) -= 1;
        }
    }

    impl Privileges for Fake {
        type Bound = Counted;
        type Steered = Counted;

        fn bind(&self, _: &Allowed, _: BorrowedFd<'_>) -> Result<(u32, u32, Counted), Refused> {
            if self.0.borrow().0 == 2 {
                return Err(refusal(libc::EEXIST, "queue already in use"));
            }
            self.0.borrow_mut().0 += 1;
            Ok((7, 70, Counted(self.0.clone(), true)))
        }

        fn steer(&self, _: &Allowed, _: u32, _: BorrowedFd<'_>) -> Result<Counted, Refused> {
            self.0.borrow_mut().1 += 1;
            Ok(Counted(self.0.clone(), false))
        }
    }

    struct Served {
        server: Server<Fake>,
        counts: Rc<RefCell<(usize, usize)>>,
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
            assert_eq!(agent.bind("eth0", fd.as_fd()).unwrap_err().text.unwrap(), "the agent does not serve this NIC");
            assert_eq!(agent.steer(fd.as_fd()).unwrap_err().text.unwrap(), "nothing is bound");
            assert_eq!(agent.bind("eth1", fd.as_fd()).unwrap(), (7, 70));
            assert!(agent.bind("eth1", fd.as_fd()).is_err());
            let (one, other) = (agent.steer(fd.as_fd()).unwrap(), agent.steer(fd.as_fd()).unwrap());
            agent.release(one).unwrap();
            assert!(agent.release(one).is_err() && one != other);
            agent
        });
        assert_eq!(*served.counts.borrow(), (1, 1));
        drop(agent);
        served.server.serve(Duration::from_millis(100)).unwrap();
        assert_eq!((*served.counts.borrow(), served.server.clients()), ((0, 0), 0));
    }

    #[test]
    fn the_kernels_words_reach_the_client() {
        let mut served = serve("words");
        let (agents, refused) = served.run(|path| {
            let fd = any_descriptor();
            let mut agents: Vec<Agent> = (0..3).map(|_| Agent::connect(&path).unwrap()).collect();
            let bound: Vec<_> = agents.iter_mut().map(|agent| agent.bind("eth1", fd.as_fd())).collect();
            (agents, bound.into_iter().find_map(Result::err).unwrap().to_string())
        });
        assert!(refused.starts_with("queue already in use (File exists"), "{refused}");
        drop(agents);
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
                assert!(!matches!(passing::receive(liar.socket.as_fd(), &mut buffer, 0), Ok((1.., _))), "{bytes:?}");
            }
            // A request without its descriptor is answered.
            assert!(Agent::connect(&path).unwrap().ask(&Request::Steer, None).is_err());
            honest.steer(fd.as_fd()).unwrap();
            honest
        });
        assert_eq!((*served.counts.borrow(), served.server.clients()), ((1, 1), 1));
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
        for _ in 0..4 {
            served.server.serve(Duration::from_millis(1)).unwrap();
        }
        assert_eq!((served.counts.borrow().1, served.server.clients()), (RULES, CLIENTS_OF_ONE));
        // One that never binds anything is let go.
        for client in &mut served.server.clients {
            client.since -= IDLE;
        }
        drop(served.server.clients.split_off(2));
        served.server.serve(Duration::from_millis(1)).unwrap();
        assert_eq!(served.server.clients(), 1);
        drop((agent, all));
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
