//! The ledger of a comm: sixteen slots, the counters that order caller and I/O thread, and the failure.
//! `send` and `recv` move bytes, `comm` wakes threads; nothing here knows sockets or threads.

use std::sync::atomic::{fence, AtomicBool, AtomicI32, AtomicU64, Ordering};

use nccl_net_abi::{ncclResult_t, MAX_REQUESTS, NCCL_INTERNAL_ERROR, NCCL_SUCCESS};
use process::Mutex;

use crate::slot::{Body, Slot};

/// A counter on a cache line of its own.
#[repr(align(64))]
#[derive(Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Loads the value, with acquire ordering.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// Publishes a value, with release ordering.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Release);
    }

    /// Advances by one from `from`; false when another thread did.
    fn step(&self, from: u64) -> bool {
        self.0.compare_exchange(from, from + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}

/// Why a comm has failed.
#[derive(Debug)]
pub struct Failure {
    /// The result of every unfinished request.
    pub result: ncclResult_t,
    /// For the log.
    pub why: String,
}

impl Failure {
    /// A failure with its cause as text.
    pub fn new(result: ncclResult_t, why: impl Into<String>) -> Failure {
        Failure { result, why: why.into() }
    }
}

/// A request that was posted.
pub struct Posted<'a> {
    /// Its slot.
    pub slot: &'a Slot,
    /// Bytes to move.
    pub bytes: usize,
    /// The comm is resting: the poster must start it.
    pub was_idle: bool,
}

/// The ledger of a comm. Requests are numbered from 0; request k uses slot k % 16. Always
/// `freed <= reported <= completed <= posted <= freed + 16`, where a send is freed when it is reported and a receive when it is
/// consumed.
pub struct Ledger {
    receives: bool,
    /// A full window is an error, not a retry.
    strict: bool,
    /// For device memory TCP: no host memory.
    devices: bool,
    /// Requests the caller posted.
    posted: Counter,
    /// Requests whose bytes have been moved.
    completed: Counter,
    /// Requests that `test` reported done.
    reported: Counter,
    /// Receives that were consumed.
    consumed: Counter,
    /// Bytes read from the socket.
    pub received: Counter,
    /// 0, or the result of every unfinished request.
    failed: AtomicI32,
    /// The comm is resting until a post or a kernel event.
    idle: AtomicBool,
    closing: AtomicBool,
    post: Mutex<()>,
    slots: [Slot; MAX_REQUESTS],
}

impl Ledger {
    /// The ledger of a new comm.
    pub fn new(receives: bool, strict: bool, devices: bool) -> Ledger {
        Ledger {
            receives,
            strict,
            devices,
            posted: Counter::default(),
            completed: Counter::default(),
            reported: Counter::default(),
            consumed: Counter::default(),
            received: Counter::default(),
            failed: AtomicI32::new(NCCL_SUCCESS),
            idle: AtomicBool::new(true),
            closing: AtomicBool::new(false),
            post: Mutex::new(()),
            slots: std::array::from_fn(|_| Slot::new()),
        }
    }

    /// All slots.
    pub fn slots(&self) -> &[Slot; MAX_REQUESTS] {
        &self.slots
    }

    /// The slot of request `seq`.
    pub fn slot(&self, seq: u64) -> &Slot {
        &self.slots[(seq % MAX_REQUESTS as u64) as usize]
    }

    /// Number of requests posted so far.
    pub fn posted(&self) -> u64 {
        self.posted.get()
    }

    /// Number of requests completed so far.
    pub fn completed(&self) -> u64 {
        self.completed.get()
    }

    /// Whether the comm receives.
    pub fn receives(&self) -> bool {
        self.receives
    }

    /// Whether it moves device memory alone.
    pub fn devices(&self) -> bool {
        self.devices
    }

    /// Posts a request: `Ok(None)` when all slots are taken and the comm is lenient. `fill` describes the memory; it gets
    /// the request's number and runs under the posting lock.
    pub fn post(
        &self,
        fill: impl FnOnce(u64, &mut Body) -> Result<(), ncclResult_t>,
    ) -> Result<Option<Posted<'_>>, ncclResult_t> {
        let guard = self.post.lock();
        self.check()?;
        let seq = self.posted.get();
        let freed = if self.receives { self.consumed.get() } else { self.reported.get() };
        if seq - freed >= MAX_REQUESTS as u64 {
            return if self.strict { Err(NCCL_INTERNAL_ERROR) } else { Ok(None) };
        }
        let slot = self.slot(seq);
        // SAFETY: the slot is free (seq - freed < 16) and posts are serialised by the lock.
        let bytes = unsafe {
            let body = slot.body();
            fill(seq, body)?;
            body.total
        };
        slot.seq.store(seq, Ordering::Release);
        self.posted.set(seq + 1);
        drop(guard);
        fence(Ordering::SeqCst);
        let was_idle = self.idle.load(Ordering::Relaxed) && self.idle.swap(false, Ordering::AcqRel);
        Ok(Some(Posted { slot, bytes, was_idle }))
    }

    /// `test` of request `slot`: `Ok(Some(bytes))` when it is done.
    pub fn test(&self, slot: &Slot) -> Result<Option<usize>, ncclResult_t> {
        let seq = slot.seq();
        let reported = self.reported.get();
        if seq < self.completed.get() {
            let received = slot.received.load(Ordering::Relaxed);
            return if seq == reported && self.reported.step(seq) { Ok(Some(received)) } else { Err(NCCL_INTERNAL_ERROR) };
        }
        if let Err(failed) = self.check() {
            // The request may have been completed between the two loads.
            return if seq < self.completed.get() { self.test(slot) } else { Err(failed) };
        }
        if seq != reported {
            return Err(NCCL_INTERNAL_ERROR);
        }
        Ok(None)
    }

    /// The number of the receive in `slot`, if it is the next to consume.
    pub fn consumable(&self, slot: &Slot) -> Result<u64, ncclResult_t> {
        let seq = slot.seq();
        if seq != self.consumed.get() || seq >= self.reported.get() {
            return Err(NCCL_INTERNAL_ERROR);
        }
        Ok(seq)
    }

    /// Frees the slot of receive `seq`.
    pub fn consume(&self, seq: u64) -> Result<(), ncclResult_t> {
        if self.consumed.step(seq) {
            Ok(())
        } else {
            Err(NCCL_INTERNAL_ERROR)
        }
    }

    /// Publishes that every request below `completed` is done. The caller holds the I/O lock.
    pub fn complete(&self, completed: u64) {
        self.completed.set(completed);
    }

    /// Ok unless the comm has failed; then the result of its requests.
    pub fn check(&self) -> Result<(), ncclResult_t> {
        match self.failed.load(Ordering::Acquire) {
            NCCL_SUCCESS => Ok(()),
            failed => Err(failed),
        }
    }

    /// Marks the comm as failed; false when it already was.
    pub fn fail(&self, result: ncclResult_t) -> bool {
        self.failed.compare_exchange(NCCL_SUCCESS, result, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// The comm is being closed: turns end at once.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Release);
    }

    /// Whether a turn should end at once: the comm is being closed or has failed.
    pub fn should_stop(&self) -> bool {
        self.closing.load(Ordering::Acquire) || self.check().is_err()
    }

    /// A turn begins: posts need not wake a thread.
    pub fn begin_turn(&self) {
        self.idle.store(false, Ordering::Release);
    }

    /// Nothing is posted beyond `completed`: true when the comm may rest, false when a post came in the meantime.
    pub fn rest(&self, completed: u64) -> bool {
        self.idle.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        // If the poster saw the flag first, it has scheduled the comm again.
        self.posted.get() == completed || !self.idle.swap(false, Ordering::AcqRel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(_: u64, body: &mut Body) -> Result<(), ncclResult_t> {
        body.total = 3;
        Ok(())
    }

    #[test]
    fn a_window_fills_completes_and_frees_in_order() {
        let ledger = Ledger::new(true, false, false);
        for k in 0..16 {
            let posted = ledger.post(fill).unwrap().unwrap();
            assert_eq!((posted.bytes, posted.was_idle, posted.slot.seq()), (3, k == 0, k));
        }
        assert!(ledger.post(fill).unwrap().is_none());
        assert_eq!(ledger.test(ledger.slot(0)), Ok(None));
        assert_eq!(ledger.test(ledger.slot(1)), Err(NCCL_INTERNAL_ERROR));
        ledger.complete(2);
        assert_eq!(ledger.consumable(ledger.slot(0)), Err(NCCL_INTERNAL_ERROR), "not reported");
        assert_eq!(ledger.test(ledger.slot(0)), Ok(Some(0)));
        assert!(ledger.post(fill).unwrap().is_none(), "a receive slot is free only when consumed");
        let seq = ledger.consumable(ledger.slot(0)).unwrap();
        ledger.consume(seq).unwrap();
        assert!(ledger.consume(seq).is_err());
        assert_eq!(ledger.post(fill).unwrap().unwrap().slot.seq(), 16);
    }

    #[test]
    fn a_failure_is_final_and_keeps_completed_requests() {
        let ledger = Ledger::new(false, true, false);
        ledger.post(fill).unwrap();
        ledger.post(fill).unwrap();
        ledger.complete(1);
        assert!(ledger.fail(7) && !ledger.fail(8));
        assert_eq!(ledger.test(ledger.slot(0)), Ok(Some(0)));
        assert_eq!(ledger.test(ledger.slot(1)), Err(7));
        assert!(matches!(ledger.post(fill), Err(7)) && ledger.should_stop());
    }

    #[test]
    fn a_post_before_the_rest_is_not_lost() {
        let ledger = Ledger::new(false, false, false);
        ledger.begin_turn();
        assert!(!ledger.post(fill).unwrap().unwrap().was_idle);
        assert!(!ledger.rest(0), "a request is waiting");
        ledger.complete(1);
        assert!(ledger.rest(1));
        assert!(ledger.post(fill).unwrap().unwrap().was_idle);
    }
}
