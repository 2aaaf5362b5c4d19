//! The budgets of peers: memory, transfers and connections that all peers of an engine, the peers at one address, and each
//! connection may use. Pure counting, shared by connections; knows nothing of what is counted.

use crate::status::{bail, Result};
use process::Mutex;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

/// A shared counter with a limit.
#[derive(Debug)]
struct Shared {
    used: AtomicUsize,
    limit: usize,
}

impl Shared {
    fn new(limit: usize) -> Shared {
        Shared { used: AtomicUsize::new(0), limit }
    }

    /// Takes `more` if it fits; returns whether it did.
    fn take(&self, more: usize) -> bool {
        let took = self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| used.checked_add(more).filter(|&sum| sum <= self.limit));
        took.is_ok()
    }

    fn give(&self, less: usize) {
        self.used.fetch_sub(less, Ordering::Relaxed);
    }
}

/// The part of a budget that one address may use: a quarter is always left to the others.
pub(crate) fn part_of_address(all: usize) -> usize {
    (all - all / 4).max(1)
}

/// The budget of all peers of an engine.
#[derive(Debug)]
pub(crate) struct Pool {
    bytes: Shared,
    transfers: Shared,
    /// Most bytes of one connection.
    of_one: usize,
    accounts: Mutex<HashMap<IpAddr, Weak<Account>>>,
}

impl Pool {
    /// `bytes` and `transfers` of all peers, and the bytes `of_one` connection.
    pub(crate) fn new(bytes: usize, of_one: usize, transfers: usize) -> Arc<Pool> {
        let (bytes, transfers, of_one) = (Shared::new(bytes), Shared::new(transfers), of_one.min(bytes));
        Arc::new(Pool { bytes, transfers, of_one, accounts: Mutex::default() })
    }

    /// A budget without limits.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn endless() -> Arc<Pool> {
        Pool::new(usize::MAX, usize::MAX, usize::MAX)
    }

    /// The account of the connections from an address.
    pub(crate) fn account(self: &Arc<Pool>, ip: IpAddr) -> Arc<Account> {
        let mut accounts = self.accounts.lock();
        if let Some(account) = accounts.get(&ip).and_then(Weak::upgrade) {
            return account;
        }
        let account = Arc::new(Account {
            bytes: Shared::new(part_of_address(self.bytes.limit).max(self.of_one)),
            transfers: Shared::new(part_of_address(self.transfers.limit)),
            notifications: AtomicUsize::new(0),
            pool: self.clone(),
            ip,
        });
        accounts.insert(ip, Arc::downgrade(&account));
        account
    }

    /// Bytes and transfers in use.
    #[cfg(test)]
    pub(crate) fn used(&self) -> (usize, usize) {
        (self.bytes.used.load(Ordering::Relaxed), self.transfers.used.load(Ordering::Relaxed))
    }
}

/// What the connections from one address use of the pool. It lives as long as one of them.
#[derive(Debug)]
pub(crate) struct Account {
    pool: Arc<Pool>,
    ip: IpAddr,
    bytes: Shared,
    transfers: Shared,
    /// Bytes of notifications that wait for the application; their queue has the limit.
    pub notifications: AtomicUsize,
}

impl Account {
    fn take_bytes(&self, more: usize) -> Result<()> {
        if !self.bytes.take(more) {
            bail!(Resource, "peers at this address already use {} bytes of memory", self.bytes.limit);
        }
        if !self.pool.bytes.take(more) {
            self.bytes.give(more);
            bail!(Resource, "the peers of this engine already use {} bytes of memory", self.pool.bytes.limit);
        }
        Ok(())
    }

    fn give_bytes(&self, less: usize) {
        self.pool.bytes.give(less);
        self.bytes.give(less);
    }

    fn take_transfer(&self) -> Result<()> {
        if !self.transfers.take(1) {
            bail!(Resource, "peers at this address already have {} transfers in flight", self.transfers.limit);
        }
        if !self.pool.transfers.take(1) {
            self.transfers.give(1);
            bail!(Resource, "the peers of this engine already have {} transfers in flight", self.pool.transfers.limit);
        }
        Ok(())
    }

    fn give_transfers(&self, less: usize) {
        self.pool.transfers.give(less);
        self.transfers.give(less);
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let mut accounts = self.pool.accounts.lock();
        // A new account of the same address may be in its place already.
        if accounts.get(&self.ip).is_some_and(|account| account.strong_count() == 0) {
            accounts.remove(&self.ip);
        }
    }
}

/// What a connection uses memory for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part {
    /// Lists of transfers that the peer has started.
    Lists,
    /// Answers that the peer has not read.
    Answers,
    /// The frame that is arriving.
    Frame,
    /// Chunks that were announced and have not arrived.
    Chunks,
}

/// A connection's share of the pool; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    account: Arc<Account>,
    bytes: [usize; 4],
    transfers: usize,
}

impl Share {
    pub(crate) fn new(account: &Arc<Account>) -> Share {
        Share { account: account.clone(), bytes: [0; 4], transfers: 0 }
    }

    /// Sets how many bytes a part uses.
    ///
    /// # Errors
    /// `Resource` when there are too many, of this connection, of its address or of all; the part is unchanged then.
    pub(crate) fn set(&mut self, part: Part, bytes: usize) -> Result<()> {
        let before = self.bytes[part as usize];
        if bytes <= before {
            self.account.give_bytes(before - bytes);
        } else {
            let (sum, of_one) = (self.bytes.iter().sum::<usize>() - before, self.account.pool.of_one);
            if sum.saturating_add(bytes) > of_one {
                bail!(
                    Resource,
                    "the peer would take {bytes} more bytes of memory than the {sum} that it has; {of_one} are allowed"
                );
            }
            self.account.take_bytes(bytes - before)?;
        }
        self.bytes[part as usize] = bytes;
        Ok(())
    }

    /// The peer starts one more transfer, whose list uses so many bytes.
    ///
    /// # Errors
    /// `Resource` when all peers, or those at this address, have too many; nothing is taken then.
    pub(crate) fn begin(&mut self, bytes: usize) -> Result<()> {
        self.account.take_transfer()?;
        self.transfers += 1;
        let lists = self.bytes[Part::Lists as usize];
        self.set(Part::Lists, lists.saturating_add(bytes)).inspect_err(|_| self.end(0))
    }

    /// A transfer has ended, whose list used so many bytes.
    pub(crate) fn end(&mut self, bytes: usize) {
        if self.transfers > 0 {
            self.transfers -= 1;
            self.account.give_transfers(1);
        }
        self.shrink(bytes);
    }

    /// The list of a transfer is no longer kept, although the transfer goes on.
    pub(crate) fn shrink(&mut self, bytes: usize) {
        let lists = self.bytes[Part::Lists as usize];
        // A decrease never fails.
        let _ = self.set(Part::Lists, lists.saturating_sub(bytes));
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.account.give_bytes(self.bytes.iter().sum());
        self.account.give_transfers(self.transfers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::ErrorKind;

    fn ip(n: u8) -> IpAddr {
        [10, 0, 0, n].into()
    }

    #[test]
    fn a_hundred_peers_together_stay_below_the_total() {
        let pool = Pool::new(10_000, 1000, 500);
        let mut shares: Vec<Share> = (0..100).map(|n| Share::new(&pool.account(ip(n)))).collect();
        let (mut taken, mut refused) = (0, 0);
        for _ in 0..20 {
            for share in &mut shares {
                match share.begin(90) {
                    Ok(()) => taken += 1,
                    Err(e) => {
                        assert_eq!(e.kind(), ErrorKind::Resource);
                        refused += 1;
                    }
                }
            }
        }
        assert!(pool.used().0 <= 10_000 && taken == 111 && refused == 1889, "{taken}, {refused}, {:?}", pool.used());
        // When one ends, another one fits, from whichever address.
        shares[0].end(90);
        assert!(shares[99].begin(90).is_ok() && shares[50].begin(90).is_err());
        assert!(shares[3].set(Part::Answers, 901).is_err() && shares[3].set(Part::Frame, 5).is_ok());
        drop(shares);
        assert_eq!(pool.used(), (0, 0));
    }

    #[test]
    fn one_connection_has_its_own_limit_and_few_bytes_many_transfers() {
        let pool = Pool::new(10_000, 1000, 5);
        let (mut a, mut b) = (Share::new(&pool.account(ip(1))), Share::new(&pool.account(ip(2))));
        a.set(Part::Answers, 600).unwrap();
        assert!(a.set(Part::Frame, 401).is_err() && a.set(Part::Frame, 400).is_ok());
        assert_eq!(a.set(Part::Answers, 601).unwrap_err().kind(), ErrorKind::Resource);
        a.set(Part::Answers, 0).unwrap();
        assert_eq!(pool.used().0, 400);
        (0..4).for_each(|_| b.begin(1).unwrap());
        a.begin(0).unwrap();
        assert!(a.begin(1).is_err());
        b.shrink(1);
        b.end(0);
        a.begin(1).unwrap();
        assert_eq!(pool.used(), (404, 5));
    }

    #[test]
    fn an_address_has_three_quarters_however_many_connections() {
        let pool = Pool::new(10_000, 1000, 100);
        let mut greedy: Vec<Share> = (0..50).map(|_| Share::new(&pool.account(ip(1)))).collect();
        let taken = (0..4).flat_map(|_| 0..50).filter(|&i| greedy[i].begin(1).is_ok()).count();
        let bytes = greedy.iter_mut().filter_map(|share| share.set(Part::Frame, 800).ok()).count();
        assert_eq!((taken, bytes, pool.used()), (75, 9, (7275, 75)));
        let mut other = Share::new(&pool.account(ip(2)));
        assert!((0..25).all(|_| other.begin(1).is_ok()) && other.set(Part::Frame, 900).is_ok());
        assert!(other.begin(1).is_err());
        // An address without connections is forgotten, and starts anew when it comes back.
        drop(greedy);
        assert_eq!((pool.used(), pool.accounts.lock().len()), ((925, 25), 1));
        let mut back = Share::new(&pool.account(ip(1)));
        assert_eq!((0..100).filter(|_| back.begin(1).is_ok()).count(), 75);
        // One connection may use its whole limit.
        let pool = Pool::new(1000, 1000, 1);
        assert!(Share::new(&pool.account(ip(1))).set(Part::Frame, 1000).is_ok());
    }
}
