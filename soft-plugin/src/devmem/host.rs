//! What takes privileges: binding an area to a queue, and steering connections to it. A process with CAP_NET_ADMIN does it itself;
//! others ask the agent.

use std::io;
use std::net::{SocketAddr, SocketAddrV4};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

use devmem::agent::Agent;
use devmem::{Flow, Nic, Refused};
use process::{Mutex, PerProcess};
use socket2::SockRef;

/// An area that is bound to a queue, as long as this lives.
pub struct Bound {
    /// The number of the binding, which fragments carry.
    pub id: u32,
    /// The queue.
    pub queue: u32,
    _kept: Box<dyn Send + Sync>,
}

/// A rule, as long as this lives.
pub type Steered = Box<dyn Send + Sync>;

/// Who has the privileges.
pub trait Host: Send + Sync {
    /// Binds a dma-buf to a queue that no ordinary connection uses.
    fn bind(&self, nic: &Nic, dmabuf: BorrowedFd<'_>) -> Result<Bound, String>;
    /// Steers a connection to a queue.
    fn steer(&self, nic: &Nic, queue: u32, connection: BorrowedFd<'_>) -> io::Result<Steered>;
}

/// This process.
pub struct Own;

impl Host for Own {
    fn bind(&self, nic: &Nic, dmabuf: BorrowedFd<'_>) -> Result<Bound, String> {
        let _alone = alone().lock();
        let (queue, binding) = nic.bind_spare(&[], dmabuf).map_err(|refused| refused.to_string())?;
        Ok(Bound { id: binding.id(), queue, _kept: Box::new(binding) })
    }

    fn steer(&self, nic: &Nic, queue: u32, connection: BorrowedFd<'_>) -> io::Result<Steered> {
        let _alone = alone().lock();
        Ok(Box::new(nic.steer(&flow_of(connection)?, queue)?))
    }
}

/// Held while queues and rules are looked at and taken: two threads must not take the same one. The agent has a single thread.
fn alone() -> &'static Mutex<()> {
    static ALONE: PerProcess<Mutex<()>> = PerProcess::new(Mutex::default);
    ALONE.get()
}

/// The agent. It serves one binding on a connection, so each area has its own. An agent that does not answer is not asked again: nothing is to
/// wait for it twice.
pub struct Asked(Arc<Mutex<Option<Agent>>>);

impl Asked {
    /// Connects to the agent.
    pub fn connect(path: &Path) -> io::Result<Asked> {
        Ok(Asked(Arc::new(Mutex::new(Some(Agent::connect(path)?)))))
    }
}

fn ask<T>(agent: &Mutex<Option<Agent>>, call: impl FnOnce(&mut Agent) -> Result<T, Refused>) -> Result<T, Refused> {
    let mut agent = agent.lock();
    let Some(asked) = agent.as_mut() else {
        return Err(io::Error::new(io::ErrorKind::NotConnected, "it has ended, or did not answer").into());
    };
    let outcome = call(asked);
    if asked.has_failed() {
        *agent = None;
    }
    outcome
}

/// A rule that the agent has set.
struct Rule {
    agent: Arc<Mutex<Option<Agent>>>,
    number: u32,
}

impl Drop for Rule {
    fn drop(&mut self) {
        let _ = ask(&self.agent, |agent| agent.release(self.number));
    }
}

impl Host for Asked {
    fn bind(&self, nic: &Nic, dmabuf: BorrowedFd<'_>) -> Result<Bound, String> {
        let bound = ask(&self.0, |agent| agent.bind(nic.name(), dmabuf));
        let (queue, id) = bound.map_err(|refused| format!("the agent: {refused}"))?;
        Ok(Bound { id, queue, _kept: Box::new(self.0.clone()) })
    }

    fn steer(&self, _nic: &Nic, _queue: u32, connection: BorrowedFd<'_>) -> io::Result<Steered> {
        let steered = ask(&self.0, |agent| agent.steer(connection));
        let number = steered.map_err(|refused| io::Error::new(refused.error.kind(), format!("the agent: {refused}")))?;
        Ok(Box::new(Rule { agent: self.0.clone(), number }))
    }
}

/// The packets that a connection receives.
pub fn flow_of(connection: BorrowedFd<'_>) -> io::Result<Flow> {
    let socket = SockRef::from(&connection);
    let ends = (socket.peer_addr()?.as_socket().and_then(v4), socket.local_addr()?.as_socket().and_then(v4));
    match ends {
        (Some(from), Some(to)) => Ok(Flow { from, to }),
        _ => Err(io::Error::new(io::ErrorKind::Unsupported, "steering needs IPv4")),
    }
}

fn v4(address: SocketAddr) -> Option<SocketAddrV4> {
    match address {
        SocketAddr::V4(address) => Some(address),
        SocketAddr::V6(address) => Some(SocketAddrV4::new(address.ip().to_ipv4_mapped()?, address.port())),
    }
}

/// Allows sends that the kernel takes from the dma-buf.
pub fn allow_zerocopy(connection: BorrowedFd<'_>) -> io::Result<()> {
    let yes: libc::c_int = 1;
    // SAFETY: an int of that size.
    let set = unsafe {
        libc::setsockopt(
            connection.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ZEROCOPY,
            (&raw const yes).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
