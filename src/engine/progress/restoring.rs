//! Connections whose lost channels are to be set up again, for the thread that does it, and the names by which peers ask for one. Knows
//! nothing about set-ups.

use process::Mutex;
use reactor::Waker;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::RawFd;
use std::sync::OnceLock;

/// A channel that is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LostChannel {
    pub channel: u16,
    /// Nothing of what was announced on it has arrived since it came up.
    pub useless: bool,
}

/// What the thread is asked for.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    /// Connections that have lost channels: those that are lost now.
    pub connections: BTreeMap<u64, Vec<LostChannel>>,
    /// Connections whose control connection has failed.
    pub urgent: BTreeSet<u64>,
    /// An interface on this host has come back: attempts need not wait.
    pub retry_now: bool,
}

#[derive(Default)]
pub(crate) struct Restoring {
    asked: Mutex<Asked>,
    /// Ids of connections by their names.
    names: Mutex<HashMap<[u8; 16], u64>>,
    waker: OnceLock<Waker>,
}

impl Restoring {
    /// Wakes the thread from now on. Returns what becomes readable.
    pub(crate) fn wakes(&self, waker: Waker) -> RawFd {
        self.waker.get_or_init(|| waker).fd()
    }

    fn wake(&self) {
        self.waker.get().into_iter().for_each(Waker::wake);
    }

    /// A connection has lost channels: those that are lost now.
    pub(crate) fn ask(&self, id: u64, channels: Vec<LostChannel>) {
        self.asked.lock().connections.insert(id, channels);
        self.wake();
    }

    /// The control connection of a connection has failed.
    pub(crate) fn ask_at_once(&self, id: u64) {
        self.asked.lock().urgent.insert(id);
        self.wake();
    }

    /// An interface has come back.
    pub(crate) fn retry_now(&self) {
        self.asked.lock().retry_now = true;
        self.wake();
    }

    /// Takes what was asked for.
    pub(crate) fn take(&self) -> Asked {
        self.waker.get().into_iter().for_each(Waker::drain);
        std::mem::take(&mut *self.asked.lock())
    }

    /// A connection can be joined under this name.
    pub(crate) fn name(&self, name: [u8; 16], id: u64) {
        self.names.lock().insert(name, id);
    }

    pub(crate) fn find(&self, name: &[u8; 16]) -> Option<u64> {
        self.names.lock().get(name).copied()
    }

    pub(crate) fn forget(&self, name: &[u8; 16]) {
        self.names.lock().remove(name);
    }
}
