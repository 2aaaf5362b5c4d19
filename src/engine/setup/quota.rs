//! How many incoming connections are up, in total and by address. Knows nothing about what they do.

use crate::status::{bail, Result};
use process::Mutex;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

/// Incoming connections that are up, in total and by address.
#[derive(Debug)]
pub(crate) struct ConnectionQuota {
    most: usize,
    of_one: usize,
    up: Mutex<(usize, HashMap<IpAddr, usize>)>,
}

/// A counted connection; dropping it frees its place.
#[derive(Debug)]
pub(crate) struct Counted {
    quota: Arc<ConnectionQuota>,
    ip: IpAddr,
}

impl ConnectionQuota {
    /// At most `most`, `of_one` of them from one address.
    pub(crate) fn new(most: usize, of_one: usize) -> Arc<ConnectionQuota> {
        Arc::new(ConnectionQuota { most, of_one, up: Mutex::default() })
    }

    /// Counts one more connection.
    ///
    /// # Errors
    /// `Resource`, sent to the peer.
    pub(crate) fn count(self: &Arc<ConnectionQuota>, ip: IpAddr) -> Result<Counted> {
        let mut up = self.up.lock();
        let (all, by_address) = &mut *up;
        if *all >= self.most {
            bail!(Resource, "{} connections of peers are up, as many as UCCL_TCPX_MAX_CONNECTIONS allows", self.most);
        }
        let of_this = by_address.entry(ip).or_default();
        if *of_this >= self.of_one {
            bail!(
                Resource,
                "{} connections of this address are up, as many as UCCL_TCPX_MAX_CONNECTIONS_OF_PEER allows",
                self.of_one
            );
        }
        *of_this += 1;
        *all += 1;
        Ok(Counted { quota: self.clone(), ip })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut up = self.quota.up.lock();
        let (all, by_address) = &mut *up;
        *all = all.saturating_sub(1);
        if let Some(of_this) = by_address.get_mut(&self.ip) {
            *of_this = of_this.saturating_sub(1);
            if *of_this == 0 {
                by_address.remove(&self.ip);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(n: u8) -> IpAddr {
        [10, 0, 0, n].into()
    }

    #[test]
    fn connections_are_counted_by_address_and_in_total() {
        let quota = ConnectionQuota::new(3, 2);
        let first = quota.count(ip(1)).unwrap();
        let _second = quota.count(ip(1)).unwrap();
        assert!(quota.count(ip(1)).unwrap_err().to_str().contains("OF_PEER"));
        let _third = quota.count(ip(2)).unwrap();
        assert!(quota.count(ip(3)).unwrap_err().to_str().contains("MAX_CONNECTIONS allows"));
        drop(first);
        quota.count(ip(1)).unwrap();
        assert_eq!(quota.up.lock().1.len(), 2);
    }
}
