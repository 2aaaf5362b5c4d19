//! A connection when code below it panics: it ends, whichever thread drove it and whatever else fails while it ends.

use super::*;
use crate::budget::Pool;
use crate::channel::path::{Arrival, Carries, Copier, Departure, Line, Path};
use crate::channel::plan::ChunkLimits;
use crate::channel::router::Channels;
use crate::channel::stripe::Loads;
use crate::config::Config;
use crate::direct::{Activity, Blocks, Direct, Event, Pairing, Route, Start, Way};
use crate::engine::progress::context::DriveContext;
use crate::engine::progress::doorbell::Bell;
use crate::engine::progress::pacing::Cores;
use crate::engine::progress::thread;
use crate::engine::setup::accept_queue::Waiting;
use crate::engine::transfer::{self, LocalSegment};
use crate::engine::Engine;
use crate::logging::Limiter;
use crate::notify::{Inbox, Queue};
use crate::proto::{Machine, Setting, Sketch};
use crate::region::{Hold, Region, RegionUse};
use crate::stats::ChannelStats;
use crate::status::{err, ErrorKind};
use crate::types::{Key, Landing, Piece, Place};
use crate::wire::control::ControlStream;
use crate::wire::session::{Direction, Session};
use process::Mutex;
use std::cell::Cell;
use std::net::{TcpListener, TcpStream};
use std::panic::{catch_unwind, AssertUnwindSafe};

/// A path that panics when driven, when closed, or not at all.
struct SimulatedDefect {
    driven: bool,
    closed: bool,
    /// Does not panic when driven; a direct transport always claims to be about to end a transfer.
    hasty: bool,
    /// Direct transfers start, and fail.
    begins: bool,
    /// Its channel has failed while nothing was in flight.
    failed: bool,
}

impl Path for SimulatedDefect {
    fn channels(&self) -> usize {
        1
    }
    fn limits(&self, _total: u64) -> ChunkLimits {
        ChunkLimits { bytes: 4096, pieces: 1, crossed: 1 }
    }
    fn carries(&self, _local: Place, _peer: Place) -> Carries {
        Carries::Now
    }
    fn loads(&mut self, _place: Place, _bulk: bool, _now: Instant, _out: &mut Loads) {}
    fn submit(&mut self, _channel: usize, _departure: Departure, _copier: &mut Copier, _now: Instant) -> Result<()> {
        Ok(())
    }
    fn expect(&mut self, _channel: usize, _arrival: Arrival) -> Result<()> {
        Ok(())
    }
    fn progress(&mut self, _copier: &mut Copier, _now: Instant, _events: &mut Vec<Event>) -> Result<bool> {
        assert!(self.hasty, "a simulated defect");
        Ok(false)
    }
    fn busy(&self) -> bool {
        self.driven
    }
    fn change(&mut self, _channel: usize, _change: crate::channel::path::Change) -> Result<()> {
        Ok(())
    }
    fn network(&mut self, _each: &mut dyn FnMut(Line<'_>)) -> Result<()> {
        match self.failed {
            true => Err(err!(RemoteDisconnect, "a simulated reset")),
            false => Ok(()),
        }
    }
    fn describe(&self, _channel: usize, _way: Way) -> String {
        String::new()
    }
    fn stats(&self, _kernel: bool, _now: Instant, _out: &mut Vec<ChannelStats>) {}
    fn forget_region(&mut self, _id: u64) {}
}

/// A direct transport that always claims to be about to end a transfer, or whose transfers start and fail.
struct SimulatedHaste {
    begins: bool,
}

impl Direct for SimulatedHaste {
    fn route(&mut self, _way: Way, _pairings: &[Pairing], _hold: &Hold) -> Result<Route> {
        Ok(if self.begins { Route::Direct } else { Route::Channels })
    }
    fn start(&mut self, _transfer: &mut Start<'_>, _landing: Option<Landing>) -> Result<()> {
        Err(err!(RemoteDisconnect, "a simulated loss"))
    }
    fn can_send(&mut self, _place: Place, _hold: &Hold) -> bool {
        false
    }
    fn land(&mut self, _key: Key, _region: &RegionUse, _buffer: (u64, u64), _there: Place) -> Option<Landing> {
        None
    }
    fn withdraw(&mut self, _key: Key) -> bool {
        false
    }
    fn progress(&mut self, _now: Instant, _events: &mut Vec<Event>) -> Result<bool> {
        Ok(false)
    }
    fn activity(&self) -> Activity {
        Activity { spin_until: Some(Instant::now() + Duration::from_secs(1)), ..Activity::default() }
    }
    fn by_nvlink(&self, _here: Place, _there: Place) -> bool {
        false
    }
    fn offer(&mut self, _region: &Region) {}
    fn forget(&mut self, _region: u64) {}
    fn uses_region(&self, _region: u64) -> bool {
        false
    }
    fn ready(&mut self, _place: Place) -> Result<()> {
        Ok(())
    }
    fn flowed(&self) -> (u64, u64) {
        (0, 0)
    }
    fn describe(&self, _way: Way) -> String {
        String::new()
    }
    fn stats(&self, _kernel: bool) -> ChannelStats {
        ChannelStats::default()
    }
}

impl Drop for SimulatedDefect {
    fn drop(&mut self) {
        assert!(!self.closed, "a simulated defect at the end");
    }
}

fn table() -> Arc<ConnectionTable> {
    Arc::new(ConnectionTable::new(DriveContext::new(Bell::new().unwrap(), true, Duration::from_secs(1), 1000)))
}

/// A connection over such a path, and the peer's socket.
fn connection(table: &Arc<ConnectionTable>, driven: bool, closed: bool) -> (Arc<Connection>, TcpStream) {
    connection_over(table, SimulatedDefect { driven, closed, hasty: false, begins: false, failed: false })
}

fn connection_over(table: &Arc<ConnectionTable>, path: SimulatedDefect) -> (Arc<Connection>, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let theirs = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let session = Session::new(Direction::ToListening, &[7; 32], b"test").unwrap();
    let control = ControlStream::new(listener.accept().unwrap().0, session, Vec::new()).unwrap();
    let timeout = Duration::from_secs(60);
    let account = Pool::endless().account([127, 0, 0, 1].into());
    let setting = Setting {
        registry: table.context.registry.clone(),
        inbox: Inbox::new(&Queue::new(1 << 30, 256 << 20, &Arc::default()), &account),
        account,
        lines: Arc::new(Limiter::new(1000)),
        eager_bytes: 0,
        peer: "a peer".to_owned(),
        transfer_timeout: timeout,
        nic_timeout: timeout,
        peer_timeout: timeout,
        heartbeat: timeout,
        match_timeout: timeout,
        doorbells: true,
    };
    let haste = path.hasty.then(|| Box::new(SimulatedHaste { begins: path.begins }) as Box<dyn Direct>);
    let channels = Channels::new(haste, vec![Box::new(path)], None);
    let core = Core::new(Machine::new(setting, Instant::now()), channels, control, String::new(), false);
    let peer = Peer {
        ip: [127, 0, 0, 1].into(),
        name: "a peer".to_owned(),
        gpu_index: -1,
        key: None,
        engine: [1; 16],
        lineage: None,
        _counted: None,
    };
    let connection = Arc::new(Connection::new(table.clone(), core, peer, table.context.queue.bell.slot().unwrap(), None));
    assert!(table.connections.insert(connection.id(), &connection));
    (connection, theirs)
}

/// Runs `body` with panic messages silenced.
fn quietly<T>(body: impl FnOnce() -> T) -> T {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock();
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let value = body();
    std::panic::set_hook(hook);
    value
}

fn kind(connection: &Connection) -> Option<ErrorKind> {
    connection.status().err().map(|e| e.kind())
}

#[test]
fn a_panic_in_the_progress_thread_ends_all_connections_and_not_the_thread() {
    quietly(|| {
        let table = table();
        let all: Vec<_> = [(true, true), (false, true), (false, false)].map(|(d, c)| connection(&table, d, c)).into();
        std::thread::scope(|s| {
            let thread = s.spawn(|| thread::run(&table, None));
            let until = Instant::now() + Duration::from_secs(10);
            let ended = || all.iter().all(|(connection, _)| kind(connection) == Some(ErrorKind::Internal));
            while !ended() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
            let outcome: Vec<_> = all.iter().map(|(connection, _)| kind(connection)).collect();
            let running = !thread.is_finished();
            table.end();
            assert!(thread.join().is_ok() && running, "the thread has ended");
            assert_eq!(outcome, [Some(ErrorKind::Internal); 3]);
        });
    });
}

#[test]
fn a_panic_in_an_applications_thread_ends_the_connection() {
    quietly(|| {
        let table = table();
        for closed in [false, true] {
            let (connection, _theirs) = connection(&table, true, closed);
            let memory = [0u8; 64];
            let mr =
                table.context.registry.add(memory.as_ptr() as u64, 64, Place::HOST, crate::types::RemoteAccess::ALL).unwrap();
            let id = connection.recv(LocalSegment { mr, addr: memory.as_ptr() as usize, len: 64 });
            let id = id.expect("a receive");
            assert!(catch_unwind(AssertUnwindSafe(|| connection.poll(id))).is_err(), "a defect");
            assert_eq!(kind(&connection), Some(ErrorKind::Internal));
            assert_eq!(connection.poll(id).unwrap_err().kind(), ErrorKind::Internal);
            assert!(!table.context.registry.retire(mr).unwrap().in_use(), "nothing touches memory any more");
        }
    });
}

#[test]
fn a_connection_that_ended_before_it_was_watched_causes_no_wake_up() {
    let table = table();
    let (connection, theirs) = connection(&table, false, false);
    let woken = |wait| {
        let mut tokens = Vec::new();
        table.context.queue.bell.wait(wait, &mut tokens);
        tokens
    };
    drop(theirs);
    connection.abandon();
    connection.watch().expect("its next use reports that it has ended");
    assert_eq!(woken(Duration::from_millis(50)), []);
    assert_eq!(kind(&connection), Some(ErrorKind::Internal));
}

/// The set-up thread checks this, and accept checks it under the queue's lock.
#[test]
fn is_up_does_not_wait_for_the_lock() {
    let table = table();
    let (connection, _theirs) = connection(&table, false, false);
    let kept = connection.shared.lock();
    let (sender, receiver) = std::sync::mpsc::channel();
    let asked = connection.clone();
    let asks = std::thread::spawn(move || sender.send(Waiting::is_up(&*asked)).unwrap());
    let up = receiver.recv_timeout(Duration::from_secs(5));
    drop(kept);
    asks.join().unwrap();
    assert_eq!(up, Ok(true));
    connection.abandon();
    assert!(!Waiting::is_up(&*connection));
}

/// A peer can start something new whenever something has ended.
#[test]
fn an_application_thread_returns_from_transfers_that_never_end() {
    let mut context = DriveContext::new(Bell::new().unwrap(), true, Duration::from_secs(1), 1000);
    context.cores = Cores::Many;
    let table = Arc::new(ConnectionTable::new(context));
    let (connection, _theirs) =
        connection_over(&table, SimulatedDefect { driven: true, closed: false, hasty: true, begins: false, failed: false });
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        connection.drive_for_application();
        sender.send(()).unwrap();
    });
    assert!(receiver.recv_timeout(Duration::from_secs(20)).is_ok(), "it drives forever");
}

/// A path that does nothing.
fn idle(table: &Arc<ConnectionTable>) -> (Arc<Connection>, TcpStream) {
    connection_over(table, SimulatedDefect { driven: false, closed: false, hasty: true, begins: false, failed: false })
}

#[test]
fn a_check_for_a_region_does_not_wait_for_the_lock_unless_asked_to() {
    let table = table();
    let (connection, _theirs) = idle(&table);
    let kept = connection.shared.lock();
    let asks = |queue| connection.fail_if_using(1, queue, err!(Canceled, "a test"));
    assert!(!asks(false), "it was not checked");
    let preparing = Preparing::new(&connection.shared);
    assert!(!asks(true), "a thread prepares it");
    drop(preparing);
    assert!(!connection.say_goodbye(Instant::now()), "nothing can be said");
    drop(kept);
    assert!(asks(false) && asks(true));
    assert_eq!(kind(&connection), None);
    assert!(connection.say_goodbye(Instant::now()));
}

#[test]
fn a_look_for_notifications_does_not_wait_for_the_lock() {
    let table = table();
    let (connection, _theirs) = idle(&table);
    assert!(!connection.drive_for_application(), "nothing is under way");
    let kept = connection.shared.lock();
    assert!(connection.drive_for_application(), "another thread drives it");
    drop(kept);
    assert!(!connection.drive_for_application());
}

/// Two threads that take the lock in a loop starve a caller that only tries.
#[test]
fn a_check_for_a_region_queues_behind_threads_that_take_the_lock_in_a_loop() {
    let table = table();
    let (connection, _theirs) = idle(&table);
    let over = AtomicBool::new(false);
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let _held = connection.shared.lock();
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
        }
        std::thread::sleep(Duration::from_millis(20));
        let asked = (0..20).all(|_| connection.fail_if_using(1, true, err!(Canceled, "a test")));
        over.store(true, Ordering::Relaxed);
        assert!(asked);
    });
}

/// The peer has disconnected, and the thread that starts a transfer is the first to notice: chunks may already be sent.
#[test]
fn a_transfer_that_fails_as_it_starts_reports_the_failure_by_its_id() {
    let table = table();
    let (connection, theirs) = idle(&table);
    let memory = [0u8; 64];
    let addr = memory.as_ptr() as usize;
    let mr = table.context.registry.add(addr as u64, 64, Place::HOST, crate::types::RemoteAccess::ALL).unwrap();
    // With a byte unread the socket of the peer is reset when it is closed.
    connection.notify(b"", b"").expect("a connected peer");
    drop(theirs);
    let local = LocalSegment { mr, addr, len: 64 };
    let id = connection.send(std::iter::once(local)).expect("it has begun");
    let ended = connection.wait(id, Some(Duration::from_secs(20)));
    assert_eq!(ended.unwrap_err().kind(), ErrorKind::RemoteDisconnect);
    let late = connection.send(std::iter::once(local)).unwrap_err();
    assert_eq!(late.kind(), ErrorKind::RemoteDisconnect, "nothing begins on a connection that is lost");
    assert!(!table.context.registry.retire(mr).unwrap().in_use());
}

/// No blocks.
struct NoBlocks;

impl Blocks for NoBlocks {
    fn fill(&mut self, _most: usize, _bytes: u64, _out: &mut Vec<Piece>) -> Option<usize> {
        None
    }
    fn is_done(&self) -> bool {
        true
    }
}

/// A direct transfer moves bytes as soon as it starts.
#[test]
fn a_direct_transfer_that_fails_as_it_starts_has_an_id() {
    let table = table();
    let path = |begins| SimulatedDefect { driven: false, closed: false, hasty: true, begins, failed: false };
    let starts = |connection: &Connection| {
        let sketch = Sketch { pairings: Vec::new(), hold: Hold::new(Vec::new()), total: 64, count: 1 };
        Submission(&connection.shared).transfer_direct(Way::In, sketch, &mut NoBlocks)
    };
    let (connection, _theirs) = connection_over(&table, path(false));
    assert_eq!((starts(&connection).unwrap(), kind(&connection)), (None, None));
    let (connection, _theirs) = connection_over(&table, path(true));
    let id = starts(&connection).unwrap().expect("it has begun");
    assert_eq!(connection.poll(id).unwrap_err().kind(), ErrorKind::RemoteDisconnect);
    assert_eq!(kind(&connection), Some(ErrorKind::RemoteDisconnect));
}

/// A caller that gets an error sends the notification again, and the peer would have it twice.
#[test]
fn a_notification_that_was_sent_is_no_error_though_its_connection_is_lost() {
    let table = table();
    let lost = || Err(err!(RemoteDisconnect, "a simulated loss of a channel"));
    let queued = |connection: &Connection, message: &[u8]| {
        let now = Instant::now();
        let mut core = connection.shared.lock();
        core.machine.notify(b"", message, now);
        Submission(&connection.shared).leave(core, lost(), now)
    };
    let (connection, _theirs) = idle(&table);
    assert_eq!(queued(&connection, b"left"), Ok(()));
    assert_eq!(kind(&connection), Some(ErrorKind::RemoteDisconnect));
    // The peer reads nothing.
    let (connection, _theirs) = idle(&table);
    assert_eq!(queued(&connection, &vec![0; 32 << 20]).unwrap_err().kind(), ErrorKind::RemoteDisconnect);
    assert_eq!(kind(&connection), Some(ErrorKind::RemoteDisconnect));
}

/// No bell rings for what happens between the last round and the arming, and nothing happens afterwards.
#[test]
fn a_channel_that_failed_before_its_doorbell_was_armed_is_noticed() {
    for disarmed in [false, true] {
        let table = table();
        let path = SimulatedDefect { driven: false, closed: false, hasty: true, begins: false, failed: true };
        let (connection, _theirs) = connection_over(&table, path);
        connection.slot().doorbell().armed.fetch_or(nccl_net_abi::UCCL_DOORBELL_FAILED, Ordering::SeqCst);
        if disarmed {
            connection.arm(false);
        }
        std::thread::scope(|s| {
            s.spawn(|| thread::run(&table, None));
            let until = Instant::now() + Duration::from_secs(10);
            while kind(&connection).is_none() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
            table.end();
            assert_eq!(kind(&connection), Some(ErrorKind::RemoteDisconnect));
        });
    }
}

/// What the application begins on a connection at rest plans a tick before the next heartbeat, for which the thread has a timer already: a peer
/// waits for the report of it.
#[test]
fn a_connection_that_rests_again_ticks_before_its_next_heartbeat() {
    let table = table();
    let (connection, _theirs) = idle(&table);
    let next_tick = || connection.shared.lock().machine.next_tick();
    let until = |is: &dyn Fn() -> bool| {
        (0..2000).any(|_| {
            let done = is();
            if !done {
                std::thread::sleep(Duration::from_millis(1));
            }
            done
        })
    };
    std::thread::scope(|s| {
        s.spawn(|| thread::run(&table, None));
        let rests = until(&|| next_tick() > Instant::now() + Duration::from_secs(10));
        // Its timer for the heartbeat is set now.
        std::thread::sleep(Duration::from_millis(100));
        let said = connection.notify(b"name", b"message");
        let (soon, far) = (Instant::now() + Duration::from_millis(50), Duration::from_secs(10));
        let planned = next_tick() <= soon;
        table.context.request_drive(connection.id());
        let ticked = until(&|| next_tick() > Instant::now() + far);
        table.end();
        assert!(rests && said.is_ok() && planned && ticked, "{rests} {said:?} {planned} {ticked}");
    });
}

/// The change of an interface is not lost while a thread waits for the GPU driver.
#[test]
fn a_connection_that_is_prepared_is_not_checked_for_lost_links() {
    let table = table();
    let (connection, _theirs) = idle(&table);
    let preparing = Preparing::new(&connection.shared);
    assert_eq!(connection.driver().close_faulty(&|_, _| None, &|_| None), None);
    assert!(connection.driver().is_preparing());
    drop(preparing);
    assert_eq!(connection.driver().close_faulty(&|_, _| None, &|_| None), Some(false));
}

/// A write costs its caller one lock of the connection and two walks of its list: one to check it, one to hand out its blocks.
#[test]
fn a_large_direct_write_takes_one_lock_and_two_walks_of_its_list() {
    const BLOCKS: usize = 3000;
    const LEN: usize = 8192;
    let settings = [("UCCL_TCPX_PLUGIN", "soft"), ("UCCL_P2P_DISABLE_IPC", "0"), ("UCCL_SOCKET_IFNAME", "lo")];
    let engine = || Engine::new(Config::from_env_with(&settings).unwrap()).unwrap();
    let (a, b) = (engine(), engine());
    let port = b.metadata().split_once('?').and_then(|(address, _)| address.rsplit_once(':')?.1.parse().ok()).unwrap();
    let out = a.connect("127.0.0.1", "", port).unwrap();
    let inn = b.accept().unwrap();
    // Blocks do not touch: each is a piece of its own.
    let (source, target) = (vec![7u8; 2 * BLOCKS * LEN], vec![0u8; 2 * BLOCKS * LEN]);
    let [mr, there] = [(&a, &source), (&b, &target)].map(|(e, bytes)| e.register(bytes.as_ptr() as usize, bytes.len()).unwrap());
    let walked = Cell::new(0);
    let item = |i: usize| b.fifo_item(there, target.as_ptr() as usize + 2 * i * LEN, LEN).unwrap();
    let list: Vec<_> =
        (0..BLOCKS).map(|i| (LocalSegment { mr, addr: source.as_ptr() as usize + 2 * i * LEN, len: LEN }, item(i))).collect();
    let write =
        || out.transfer(transfer::Direction::Write, list.iter().inspect(|_| walked.set(walked.get() + 1)).copied()).unwrap();
    // The first one asks for the region.
    let first = write();
    assert!(out.wait(first, Some(Duration::from_secs(60))).unwrap().complete);
    for _ in 0..3 {
        walked.set(0);
        let before = shared::LOCKS.with(Cell::get);
        let id = write();
        let locks = shared::LOCKS.with(Cell::get) - before;
        assert!(out.wait(id, Some(Duration::from_secs(60))).unwrap().complete);
        assert_eq!((locks, walked.get()), (1, 2 * BLOCKS));
    }
    let received =
        |nic: &str| -> u64 { inn.stats().unwrap().channels.iter().filter(|c| c.nic == nic).map(|c| c.received_bytes).sum() };
    assert_eq!(received("local"), (4 * BLOCKS * LEN) as u64, "they went directly");
    a.deregister(mr).unwrap();
    b.deregister(there).unwrap();
}
