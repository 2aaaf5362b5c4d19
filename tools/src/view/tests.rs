//! The view at the widths of terminals, from samples as an engine exports them.

use super::*;
use crate::scrape::parse;

/// Samples of channels with their labels.
fn channel(i: usize, nics: &str, values: &[(&str, f64)]) -> String {
    let labels = format!("{{engine=\"1\",connection=\"1\",peer=\"10.0.0.2\",channel=\"{i}\",plugin=\"TCPX-soft\",{nics}}}");
    values.iter().map(|(name, value)| format!("uccl_tcpx_channel_{name}{labels} {value}\n")).collect()
}

fn samples() -> String {
    let of = "{engine=\"1\",connection=\"1\",peer=\"10.0.0.2\"}";
    let info = "{engine=\"1\",connection=\"1\",peer=\"10.0.0.2\",address=\"10.0.0.2:51234\"}";
    let far = "{engine=\"1\",connection=\"2\",peer=\"2001:db8:1234:5678:9abc:def0:1234:5678\"";
    let common = [("window", 16.0), ("window_out", 12.0), ("speed_bytes_per_second", 123e6), ("segments_total", 81_234.0)];
    let fast =
        [&common[..], &[("sent_bytes_per_second", 118e6), ("rtt_seconds", 0.00021), ("queued_bytes", 2_097_152.0)]].concat();
    let slow = [&common[..], &[("sent_bytes_per_second", 2.4e6), ("slow", 1.0), ("retransmits_total", 4_321.0)]].concat();
    let buckets = |size: &str, counts: [(&str, u64); 4]| -> String {
        let line =
            |(le, n): (&str, u64)| format!("uccl_tcpx_transfer_seconds_bucket{{engine=\"1\",size=\"{size}\",le=\"{le}\"}} {n}\n");
        counts.into_iter().map(line).collect()
    };
    [
        "uccl_tcpx_engine_info{engine=\"1\",address=\"10.0.0.1:40123\",gpu=\"-1\",plugin=\"TCPX-soft\"} 1\n".to_owned(),
        "uccl_tcpx_uptime_seconds{engine=\"1\"} 86400.5\nuccl_tcpx_connections{engine=\"1\"} 2\n".to_owned(),
        "uccl_tcpx_connections_opened_total{engine=\"1\"} 12345\nuccl_tcpx_setups_in_failed_total{engine=\"1\"} 7\n".to_owned(),
        buckets("to_64KiB", [("5e-05", 600), ("0.00025", 1000), ("10.0", 1000), ("+Inf", 1000)]),
        buckets("to_64MiB", [("5e-05", 0), ("0.0025", 1), ("10.0", 98), ("+Inf", 100)]),
        buckets("larger", [("5e-05", 0), ("0.0025", 0), ("10.0", 0), ("+Inf", 0)]),
        format!(
            "uccl_tcpx_connection_info{info} 1\nuccl_tcpx_connection_up{of} 1\nuccl_tcpx_connection_transfers_in_flight{of} 8\n"
        ),
        format!("uccl_tcpx_connection_resent_chunks_total{of} 31\n"),
        format!("uccl_tcpx_connection_restored_channels_total{of} 2\n"),
        format!("uccl_tcpx_connection_info{far},address=\"[2001:db8:1234:5678:9abc:def0:1234:5678]:65535\"}} 1\n"),
        format!("uccl_tcpx_connection_up{far}}} 1\nuccl_tcpx_connection_silent_seconds{far}}} 7.4\n"),
        channel(10, "nic=\"eth1\"", &fast),
        channel(2, "nic=\"enp134s0f1np1\",peer_nic=\"enp12s0\"", &slow),
        channel(0, "nic=\"eth1\"", &[("sent_bytes_per_second", 1e6)]),
        channel(3, "nic=\"eth2\"", &[("lost", 1.0)]),
    ]
    .concat()
}

fn view() -> View {
    View::of(&[parse(&samples())])
}

/// The screen of a terminal, without blanks at the ends of lines.
fn drawn(view: &View, width: u16, height: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, view, 0, KEYS)).unwrap();
    let cells: Vec<&str> = terminal.backend().buffer().content().iter().map(|cell| cell.symbol()).collect();
    cells.chunks(usize::from(width)).map(|line| line.concat().trim_end().to_owned() + "\n").collect()
}

/// Compares a screen with the one in a file beside this one.
fn is_the_screen_of(name: &str, drawn: &str) {
    let path = format!("{}/src/view/{name}", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, drawn).unwrap();
    }
    assert!(std::fs::read_to_string(&path).unwrap() == drawn, "{path} is another screen; UPDATE_DOCS=1 renews it:\n{drawn}");
}

#[test]
fn eighty_columns_show_what_matters() {
    is_the_screen_of("top-80.txt", &drawn(&view(), 80, 16));
}

#[test]
fn a_hundred_and_thirty_columns_show_everything() {
    is_the_screen_of("top-130.txt", &drawn(&view(), 130, 14));
}

#[test]
fn nothing_is_wider_than_the_screen_and_no_state_is_cut() {
    for width in [60, 77, 78, 80, 100, 119, 120, 130, 200] {
        let text = text(&view(), width);
        assert!(text.lines().all(|line| line.chars().count() <= width), "{width}: {text}");
        for end in ["SLOW", "LOST", "1 lost", "silent 7 s"] {
            assert!(text.lines().any(|line| line.ends_with(end)), "{width}, {end}: {text}");
        }
    }
}

#[test]
fn channels_are_in_order_and_nics_are_summed() {
    let view = view();
    let order: Vec<u64> = view.connections.values().flat_map(|c| c.channels.iter().map(|c| c.number)).collect();
    assert_eq!(order, [0, 2, 3, 10]);
    assert!(text(&view, 80).contains("tcp eth1: 119 MB/s out"), "{}", text(&view, 80));
}

/// Two processes have an engine 1 each.
#[test]
fn sources_are_kept_apart() {
    let other = samples().replace("10.0.0.1:40123", "10.0.0.9:7").replace("10.0.0.2:51234", "10.0.0.8:8");
    let view = View::of(&[parse(&samples()), parse(&other)]);
    assert_eq!((view.engines.len(), view.connections.len()), (2, 4));
    let text = text(&view, 130);
    for name in ["engine 10.0.0.1:40123", "engine 10.0.0.9:7", "1 10.0.0.2:51234", "1 10.0.0.8:8"] {
        assert!(text.contains(name), "{name}: {text}");
    }
}

#[test]
fn names_of_peers_control_no_terminal() {
    let hostile = samples().replace("eth1", "e\u{1b}[2J\u{202e}").replace("10.0.0.2:51234", "\u{1b}]0;x\u{7}");
    let text = text(&View::of(&[parse(&hostile)]), 80);
    assert!(text.chars().all(|c| matches!(c, ' '..='~' | '\n')), "{text:?}");
}

#[test]
fn numbers_have_three_digits() {
    let shown = [0.0, 999.4, 999.6, 12_345.0, 999_499.0, 999_600.0, 123.4e6, 2.4e9, 99.96e9, 123e9].map(rate);
    let expected =
        ["0 B/s", "999 B/s", "1.00 kB/s", "12.3 kB/s", "999 kB/s", "1.00 MB/s", "123 MB/s", "2.40 GB/s", "100 GB/s", "123 GB/s"];
    assert_eq!(shown, expected);
    assert_eq!([10.0, 2.5, 0.1, 0.0025, 0.00025, 1e-5].map(time), ["10 s", "2.5 s", "100 ms", "2.5 ms", "250 us", "10 us"]);
}

#[test]
fn a_screen_for_a_picture_has_room_for_everything() {
    let screen = screen(&view()).unwrap();
    let text: String = screen.content().iter().map(|cell| cell.symbol()).collect();
    for part in ["10.0.0.2:51234", "SLOW", "tcp eth1: 119 MB/s out", "silent 7 s", "q: quit"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn it_draws_in_any_size() {
    for (width, height) in [(140, 20), (40, 8), (10, 3), (1, 1)] {
        drawn(&view(), width, height);
    }
}
