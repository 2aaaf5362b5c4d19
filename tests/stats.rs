//! The statistics of engines over loopback: transfers, refusals, set-ups, closes; and their export while the engines live.

mod local;

use local::{pair, port};
use std::net::TcpStream;
use std::time::{Duration, Instant};
use uccl_p2p::config::{Config, PluginChoice};
use uccl_p2p::engine::{Connection, Direction, Engine, FifoItem, LocalSegment};

fn config() -> Config {
    Config { num_channels: Some(2), ..local::config() }
}

fn write(connection: &Connection, local: (u64, &[u8]), mut item: FifoItem, spoil: bool) -> bool {
    if spoil {
        item.addr += 1 << 40;
    }
    item.size = local.1.len() as u32;
    let segment = LocalSegment { mr: local.0, addr: local.1.as_ptr() as usize, len: local.1.len() };
    let id = connection.transfer(Direction::Write, [(segment, item)].into_iter()).expect("started");
    connection.wait(id, Some(Duration::from_secs(30))).is_ok_and(|state| state.complete)
}

/// Waits until it holds: counters lag behind by a moment.
fn soon(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn small_writes_travel_inside_the_control_message_and_others_on_channels() {
    let (a, b) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let (out, _incoming) = pair(&a, &b);
    let source: Vec<u8> = (0..128 << 10).map(|i| (i % 251) as u8).collect();
    let target = vec![0u8; source.len()];
    let mr = a.register(source.as_ptr() as usize, source.len()).unwrap();
    let remote = b.register(target.as_ptr() as usize, target.len()).unwrap();
    let item = b.fifo_item(remote, target.as_ptr() as usize, target.len()).unwrap();
    let totals = || out.stats().unwrap().totals;
    assert!(write(&out, (mr, &source[..8 << 10]), item, false));
    assert_eq!((totals().eager_sent_bytes, totals().sent_bytes), (8 << 10, 0));
    assert!(write(&out, (mr, &source[..(8 << 10) + 1]), item, false));
    assert_eq!((totals().eager_sent_bytes, totals().sent_bytes), (8 << 10, (8 << 10) + 1));
    assert_eq!(target[..(8 << 10) + 1], source[..(8 << 10) + 1]);
}

#[test]
fn transfers_refusals_and_set_ups_are_counted_and_outlive_their_connection() {
    let (a, b) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let (out, incoming) = pair(&a, &b);
    let source = vec![7u8; 4 << 20];
    let target = vec![0u8; 4 << 20];
    let mr = a.register(source.as_ptr() as usize, source.len()).unwrap();
    let remote = b.register(target.as_ptr() as usize, target.len()).unwrap();
    let item = b.fifo_item(remote, target.as_ptr() as usize, target.len()).unwrap();
    assert!(write(&out, (mr, &source), item, false));
    assert!(write(&out, (mr, &source[..100]), item, false));
    assert!(!write(&out, (mr, &source[..100]), item, true));
    out.notify(b"name", b"text").unwrap();
    soon("the notification is counted", || incoming.stats().unwrap().totals.notifications_received == 1);

    let (mine, theirs) = (out.stats().unwrap(), incoming.stats().unwrap());
    let t = mine.totals;
    assert_eq!((t.transfers_started, t.transfers_completed, t.transfers_failed, t.refused_by_peer), (3, 2, 1, 1));
    // The failed one has no time, and the peer counts its own transfers only.
    let times = a.stats().unwrap().times;
    assert_eq!(times.counts.map(|of_class| of_class.iter().sum::<u64>()), [1, 0, 1, 0]);
    assert!(times.nanoseconds[0] > 0 && times.nanoseconds[1] == 0 && times.nanoseconds[2] > 0, "{times:?}");
    assert_eq!(b.stats().unwrap().times, Default::default());
    assert_eq!((t.sent_bytes, t.eager_sent_bytes, t.notifications_sent), (4 << 20, 200, 1));
    assert_eq!((theirs.totals.received_bytes, theirs.totals.eager_received_bytes), (4 << 20, 100));
    assert_eq!((theirs.totals.peer_transfers, theirs.totals.refused), (3, 1));
    assert!(t.control_sent_bytes > 0 && t.control_received_bytes > 0 && mine.error.is_none());
    assert_eq!(mine.channels.len(), 2);
    assert_eq!(mine.channels.iter().map(|c| c.sent_bytes).sum::<u64>(), 4 << 20);
    assert!(mine.channels.iter().all(|c| c.nic == "lo" && c.network.as_ref().is_some_and(|n| n.segments > 0)));
    assert!(mine.channels.iter().all(|c| c.plugin == "TCPX-soft" && !c.lost && c.nvlink_bytes == 0), "{mine}");

    // An unauthenticated connection that sends garbage.
    use std::io::{Read, Write};
    let mut unauthenticated = TcpStream::connect(("127.0.0.1", port(&b))).unwrap();
    unauthenticated.write_all(&[0; 4096]).unwrap();
    let _ = unauthenticated.read(&mut [0; 64]);
    soon("the failed set-up is counted", || b.stats().unwrap().setups_in_failed == 1);
    assert!(a.connect("127.0.0.1", "", 1).is_err());
    let (at_a, at_b) = (a.stats().unwrap(), b.stats().unwrap());
    assert_eq!((at_a.setups_out, at_a.setups_out_failed, at_b.setups_in), (1, 1, 1));
    assert_eq!((at_a.totals, at_b.connections.len()), (t, 1));

    out.close();
    soon("the end is counted", || b.stats().unwrap().closed == 1);
    let ended = a.stats().unwrap();
    assert_eq!((ended.closed, ended.lost, ended.connections.len()), (1, 0, 0));
    assert_eq!(ended.totals.sent_bytes, 4 << 20);
    assert_eq!(out.stats().unwrap().totals.sent_bytes, 4 << 20);
    assert!(out.stats().unwrap().error.is_some() && ended.to_string().contains("1 opened, 1 closed, 0 lost"), "{ended}");
}

/// Simulated device memory: the processor packs and unpacks. The plugin reads that it does when the process begins, so the test has
/// a process of its own.
#[test]
fn packing_and_unpacking_time_is_reported() {
    if std::env::var_os("UCCL_TCPX_EMULATE_DEVICE").is_none() {
        let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
        alone.args(["--exact", "packing_and_unpacking_time_is_reported", "--nocapture"]);
        assert!(alone.env("UCCL_TCPX_EMULATE_DEVICE", "1").status().unwrap().success());
        return;
    }
    let (a, b) = (Engine::new(config()).unwrap(), Engine::new(config()).unwrap());
    let (out, incoming) = pair(&a, &b);
    let (source, target) = (vec![7u8; 4 << 20], vec![0u8; 4 << 20]);
    let mr = a.register(source.as_ptr() as usize, source.len()).unwrap();
    let remote = b.register(target.as_ptr() as usize, target.len()).unwrap();
    assert!(write(&out, (mr, &source), b.fifo_item(remote, target.as_ptr() as usize, target.len()).unwrap(), false));
    let (mine, theirs) = (out.stats().unwrap(), incoming.stats().unwrap());
    assert!(mine.totals.packed_chunks > 0 && mine.totals.pack_us > 0 && mine.totals.unpack_us == 0, "{mine}");
    assert!(theirs.totals.unpacked_chunks > 0 && theirs.totals.unpack_us > 0 && theirs.totals.pack_us == 0, "{theirs}");
    assert_eq!(mine.totals.pack_us, mine.channels.iter().map(|c| c.pack_us).sum::<u64>());
    assert!(mine.to_string().contains(", pack ") && theirs.to_string().contains(", unpack "), "{mine}{theirs}");
}

#[test]
fn statistics_are_offered_while_the_engine_lives() {
    let path = std::env::temp_dir().join(format!("uccl-stats-{}.prom", std::process::id()));
    let setting = [("UCCL_TCPX_METRICS", path.to_str().unwrap())];
    let _ = config();
    let config = Config { plugin: PluginChoice::Soft, ..Config::from_env_with(&setting).unwrap() };
    let engine = Engine::new(config).unwrap();
    let address = engine.metadata().rsplit_once('?').unwrap().0.to_owned();
    for line in ["uccl_tcpx_connections{engine=\"1\"} 0".to_owned(), format!("engine=\"1\",address=\"{address}\",gpu=\"")] {
        soon("the file lists the engine", || std::fs::read_to_string(&path).unwrap().contains(&line));
    }
    drop(engine);
    std::fs::remove_file(&path).unwrap();
}
