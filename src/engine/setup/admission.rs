//! The order in which authenticated peers are admitted: by arrival, and no address gets more than its share. Pure; every step
//! takes logarithmic time.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

/// Set-ups from one address: waiting, and admitted.
#[derive(Debug, Default)]
struct Address {
    waiting: BTreeSet<u64>,
    admitted: usize,
}

/// All set-ups, by ids that rise in the order of arrival.
#[derive(Debug)]
pub(crate) struct Admission {
    /// How many may be admitted at once, and how many of them from one address.
    most: usize,
    share: usize,
    addresses: HashMap<IpAddr, Address>,
    /// The oldest of each address below its share.
    next: BTreeSet<(u64, IpAddr)>,
    waiting: usize,
    admitted: usize,
}

impl Admission {
    /// Admits at most `most` at once, `share` of them from one address.
    pub(crate) fn new(most: usize, share: usize) -> Admission {
        Admission { most, share, addresses: HashMap::new(), next: BTreeSet::new(), waiting: 0, admitted: 0 }
    }

    /// How many wait.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting
    }

    pub(crate) fn admitted(&self) -> usize {
        self.admitted
    }

    /// Changes the entry of an address, and its place in `next`.
    fn change<T>(&mut self, ip: IpAddr, change: impl FnOnce(&mut Address) -> T) -> T {
        let address = self.addresses.entry(ip).or_default();
        if let Some(&oldest) = address.waiting.first() {
            self.next.remove(&(oldest, ip));
        }
        let value = change(address);
        match address.waiting.first() {
            Some(&oldest) if address.admitted < self.share => {
                self.next.insert((oldest, ip));
            }
            None if address.admitted == 0 => {
                self.addresses.remove(&ip);
            }
            _ => {}
        }
        value
    }

    /// Adds a waiting set-up.
    pub(crate) fn wait(&mut self, id: u64, ip: IpAddr) {
        self.waiting += usize::from(self.change(ip, |address| address.waiting.insert(id)));
    }

    /// Removes a waiting set-up.
    pub(crate) fn leave(&mut self, id: u64, ip: IpAddr) {
        self.waiting -= usize::from(self.change(ip, |address| address.waiting.remove(&id)));
    }

    /// Admits the next set-up, if there is room.
    pub(crate) fn admit(&mut self) -> Option<u64> {
        if self.admitted >= self.most {
            return None;
        }
        let &(id, ip) = self.next.first()?;
        self.change(ip, |address| {
            address.waiting.remove(&id);
            address.admitted += 1;
        });
        (self.waiting, self.admitted) = (self.waiting - 1, self.admitted + 1);
        Some(id)
    }

    /// An admitted set-up from this address is up or has failed.
    pub(crate) fn done(&mut self, ip: IpAddr) {
        self.change(ip, |address| address.admitted = address.admitted.saturating_sub(1));
        self.admitted = self.admitted.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ip(n: u8) -> IpAddr {
        [10, 0, 0, n].into()
    }

    #[test]
    fn no_address_gets_more_than_its_share_and_others_do_not_wait_for_it() {
        let mut admission = Admission::new(4, 2);
        (1..=5).for_each(|id| admission.wait(id, ip(1)));
        admission.wait(6, ip(2));
        assert_eq!(
            [admission.admit(), admission.admit(), admission.admit(), admission.admit()],
            [Some(1), Some(2), Some(6), None]
        );
        assert_eq!((admission.waiting(), admission.admitted()), (3, 3));
        admission.leave(3, ip(1));
        admission.done(ip(1));
        assert_eq!([admission.admit(), admission.admit()], [Some(4), None]);
        admission.done(ip(2));
        assert_eq!(admission.admit(), None);
        admission.done(ip(1));
        assert_eq!([admission.admit(), admission.admit()], [Some(5), None]);
        admission.done(ip(1));
        admission.done(ip(1));
        assert_eq!((admission.addresses.len(), admission.next.len(), admission.waiting(), admission.admitted()), (0, 0, 0, 0));
    }

    proptest! {
        /// It behaves like a linear search through a list.
        #[test]
        fn it_is_the_order_of_arrival(steps in proptest::collection::vec((0u8..4, 0u8..5), 1..300)) {
            let (most, share) = (5, 2);
            let mut admission = Admission::new(most, share);
            let (mut list, mut admitted, mut last) = (Vec::new(), Vec::<u8>::new(), 0u64);
            for (step, a) in steps {
                match step {
                    0 => {
                        last += 1;
                        admission.wait(last, ip(a));
                        list.push((last, a));
                    }
                    1 => {
                        if let Some(&(id, of)) = list.get(usize::from(a)) {
                            admission.leave(id, ip(of));
                            list.retain(|&(other, _)| other != id);
                        }
                    }
                    2 => {
                        let fits = |of: u8| admitted.iter().filter(|&&x| x == of).count() < share && admitted.len() < most;
                        let at = list.iter().position(|&(_, of)| fits(of));
                        let expected = at.map(|at| list.remove(at));
                        prop_assert_eq!(admission.admit(), expected.map(|(id, _)| id));
                        admitted.extend(expected.map(|(_, of)| of));
                    }
                    _ => {
                        if let Some(at) = admitted.iter().position(|&of| of == a) {
                            admitted.swap_remove(at);
                            admission.done(ip(a));
                        }
                    }
                }
                prop_assert_eq!((admission.waiting(), admission.admitted()), (list.len(), admitted.len()));
            }
        }
    }
}
