//! Statistics as Prometheus and OpenMetrics read them.

use super::{ChannelStats, ConnectionStats, EngineStats};
use std::fmt::{self, Write};

/// In front of every name.
const PREFIX: &str = "uccl_tcpx";

/// The text format of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// The older format of Prometheus, for readers that ask for nothing else.
    Plain,
}

impl Format {
    /// As an HTTP header names it.
    pub(super) fn content_type(self) -> &'static str {
        match self {
            Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Format::Plain => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// Labels of a sample.
type Labels = Vec<(&'static str, String)>;

/// Samples of one name.
struct Family {
    name: String,
    help: &'static str,
    samples: Vec<(Labels, Number)>,
}

#[derive(Clone, Copy)]
enum Number {
    Counter(u64),
    Gauge(f64),
}

/// A label's value between its quotes.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| match c {
            '\\' => f.write_str("\\\\"),
            '"' => f.write_str("\\\""),
            '\n' => f.write_str("\\n"),
            c => f.write_char(c),
        })
    }
}

impl Family {
    fn new(name: impl Into<String>, help: &'static str) -> Family {
        Family { name: name.into(), help, samples: Vec::new() }
    }

    fn write(&self, format: Format, out: &mut String) -> fmt::Result {
        let Some((_, first)) = self.samples.first() else { return Ok(()) };
        let (kind, suffix) = match first {
            Number::Counter(_) => ("counter", "_total"),
            Number::Gauge(_) => ("gauge", ""),
        };
        // OpenMetrics names the family, the older format the sample.
        let (name, help) = (&self.name, self.help);
        let family = if format == Format::Plain { suffix } else { "" };
        writeln!(out, "# HELP {PREFIX}_{name}{family} {help}\n# TYPE {PREFIX}_{name}{family} {kind}")?;
        for (labels, number) in &self.samples {
            write!(out, "{PREFIX}_{name}{suffix}")?;
            for (i, (label, value)) in labels.iter().enumerate() {
                write!(out, "{}{label}=\"{}\"", if i == 0 { '{' } else { ',' }, Escaped(value))?;
            }
            match *number {
                Number::Counter(n) => writeln!(out, "}} {n}")?,
                Number::Gauge(n) if n.fract() == 0.0 => writeln!(out, "}} {n:.1}")?,
                Number::Gauge(n) => writeln!(out, "}} {n}")?,
            }
        }
        Ok(())
    }
}

/// Statistics of the engines of a process.
struct Snapshot(Vec<EngineStats>);

impl Snapshot {
    /// A family with one sample an engine.
    fn of_engines(&self, name: &str, help: &'static str, number: impl Fn(&EngineStats) -> Number) -> Family {
        let mut family = Family::new(name, help);
        family.samples = self.0.iter().map(|engine| (engine_labels(engine), number(engine))).collect();
        family
    }

    fn of_connections(&self, name: &str, help: &'static str, number: impl Fn(&ConnectionStats) -> Number) -> Family {
        let mut family = Family::new(format!("connection_{name}"), help);
        for engine in &self.0 {
            family.samples.extend(engine.connections.iter().map(|c| (connection_labels(engine, c), number(c))));
        }
        family
    }

    /// A family with one sample a channel; a channel that has no number is left out.
    fn of_channels(&self, name: &str, help: &'static str, number: impl Fn(&ChannelStats) -> Option<Number>) -> Family {
        let mut family = Family::new(format!("channel_{name}"), help);
        for engine in &self.0 {
            for connection in &engine.connections {
                for (i, channel) in connection.channels.iter().enumerate() {
                    let mut labels = connection_labels(engine, connection);
                    let (plugin, nic) = (channel.plugin.clone(), channel.nic.clone());
                    labels.extend([("channel", i.to_string()), ("plugin", plugin), ("nic", nic)]);
                    let joined = Some(&channel.peer_nic).filter(|nic| !nic.is_empty());
                    labels.extend(joined.map(|nic| ("peer_nic", nic.clone())));
                    family.samples.extend(number(channel).map(|number| (labels, number)));
                }
            }
        }
        family
    }

    fn engine_families(&self) -> Vec<Family> {
        use Number::{Counter, Gauge};
        let Some(first) = self.0.first() else { return Vec::new() };
        let mut all = vec![
            self.of_engines("up_seconds", "Since the engine was created", |e| Gauge(e.uptime.as_secs_f64())),
            self.of_engines("connections", "Open connections", |e| Gauge(e.connections.len() as f64)),
            self.of_engines("notifications_waiting", "Notifications that the application has not taken", |e| {
                Gauge(e.notifications_waiting as f64)
            }),
        ];
        for (i, (name, _, help)) in first.counters().into_iter().enumerate() {
            all.push(self.of_engines(name, help, |e| Counter(e.counters()[i].1)));
        }
        for (i, (name, _, help)) in first.totals.each().into_iter().enumerate() {
            all.push(self.of_engines(name, help, |e| Counter(e.totals.each()[i].1)));
        }
        all
    }

    fn connection_families(&self) -> Vec<Family> {
        use Number::{Counter, Gauge};
        let mut all = vec![
            self.of_connections("up", "1 while the connection is up", |c| Gauge(f64::from(u8::from(c.error.is_none())))),
            self.of_connections("silent_seconds", "Time since the last frame of the peer", |c| Gauge(c.silent.as_secs_f64())),
            self.of_connections("transfers_in_flight", "Transfers of this engine in flight", |c| Gauge(c.in_flight as f64)),
            self.of_connections("backlog_bytes", "Bytes queued on the control connection", |c| Gauge(c.backlog_bytes as f64)),
        ];
        for (i, (name, _, help)) in super::Totals::default().each().into_iter().enumerate() {
            all.push(self.of_connections(name, help, |c| Counter(c.totals.each()[i].1)));
        }
        all
    }

    fn channel_families(&self) -> Vec<Family> {
        use Number::{Counter, Gauge};
        let counter = |name, help, of: fn(&ChannelStats) -> u64| self.of_channels(name, help, |c| Some(Counter(of(c))));
        let gauge = |name, help, of: fn(&ChannelStats) -> f64| self.of_channels(name, help, |c| Some(Gauge(of(c))));
        let network =
            |name, help, of: fn(&super::Network) -> Number| self.of_channels(name, help, |c| c.network.as_ref().map(of));
        vec![
            counter("sent_bytes", "Bytes sent", |c| c.sent_bytes),
            counter("sent_chunks", "Chunks sent", |c| c.sent_chunks),
            counter("received_bytes", "Bytes received", |c| c.received_bytes),
            counter("received_chunks", "Chunks received", |c| c.received_chunks),
            counter("nvlink_bytes", "Bytes of direct transfers that were copied over NVLink", |c| c.nvlink_bytes),
            counter("stalls", "Seconds in which the channel had chunks in flight and moved none", |c| c.stalls),
            counter("packed_chunks", "Chunks packed from GPU memory", |c| c.packed_chunks),
            counter("unpacked_chunks", "Chunks unpacked into GPU memory", |c| c.unpacked_chunks),
            counter("pack_us", "Time from submitting a chunk until it was packed, summed, microseconds", |c| c.pack_us),
            counter("unpack_us", "Time from submitting a chunk until it was unpacked, summed, microseconds", |c| c.unpack_us),
            gauge("sent_bytes_per_second", "Over the last second or so", |c| c.sent_per_second),
            gauge("received_bytes_per_second", "Over the last second or so", |c| c.received_per_second),
            gauge("speed_bytes_per_second", "While the channel was busy sending; 0: unknown", |c| c.speed),
            gauge("queued_bytes", "Bytes queued on the channel and not sent yet", |c| c.queued_bytes as f64),
            gauge("window_out", "Places of the window in use for sending", |c| f64::from(c.window_out)),
            gauge("window_in", "Places of the window in use for receiving", |c| f64::from(c.window_in)),
            gauge("window", "Places of the window", |c| f64::from(c.window)),
            gauge("slow", "1 while the channel runs far below the others", |c| f64::from(u8::from(c.slow))),
            gauge("lost", "1 once the channel is lost", |c| f64::from(u8::from(c.lost))),
            network("segments", "TCP segments sent", |n| Counter(n.segments)),
            network("retransmits", "TCP segments sent again", |n| Counter(n.retransmits)),
            network("rtt_seconds", "Smoothed round trip", |n| Gauge(f64::from(n.rtt_us) / 1e6)),
            network("min_rtt_seconds", "Smallest round trip", |n| Gauge(f64::from(n.min_rtt_us) / 1e6)),
        ]
    }
}

fn engine_labels(engine: &EngineStats) -> Labels {
    vec![("engine", engine.metadata.clone())]
}

fn connection_labels(engine: &EngineStats, connection: &ConnectionStats) -> Labels {
    vec![("engine", engine.metadata.clone()), ("connection", connection.id.to_string()), ("peer", connection.peer.clone())]
}

/// The statistics of engines as text.
pub(super) fn exposition(engines: Vec<EngineStats>, format: Format) -> String {
    let snapshot = Snapshot(engines);
    let families =
        snapshot.engine_families().into_iter().chain(snapshot.connection_families()).chain(snapshot.channel_families());
    let mut out = String::new();
    for family in families {
        // Writing to a string does not fail.
        let _ = family.write(format, &mut out);
    }
    if format == Format::OpenMetrics {
        out.push_str("# EOF\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::{Network, Totals};
    use super::*;

    fn engine() -> EngineStats {
        let network = Some(Network { retransmits: 3, segments: 9, rtt_us: 1500, ..Network::default() });
        let (plugin, nic) = ("TCPX-soft".into(), "eth1".into());
        let channel = ChannelStats { plugin, nic, sent_bytes: 5, slow: true, network, ..ChannelStats::default() };
        let unknown = ChannelStats { nic: "eth2".into(), peer_nic: "eth3".into(), ..ChannelStats::default() };
        let connection = ConnectionStats {
            id: 7,
            peer: "a\"b\n".into(),
            channels: vec![channel, unknown],
            totals: Totals { refused: 2, ..Totals::default() },
            ..ConnectionStats::default()
        };
        EngineStats { metadata: "10.0.0.1:4000?-1".into(), opened: 4, connections: vec![connection], ..EngineStats::default() }
    }

    #[test]
    fn every_level_has_its_samples() {
        let text =
            exposition(vec![engine(), EngineStats { metadata: "other".into(), ..EngineStats::default() }], Format::OpenMetrics);
        for line in [
            "# TYPE uccl_tcpx_connections_opened counter",
            "uccl_tcpx_connections_opened_total{engine=\"10.0.0.1:4000?-1\"} 4",
            "uccl_tcpx_connections_opened_total{engine=\"other\"} 0",
            "uccl_tcpx_connection_refused_total{engine=\"10.0.0.1:4000?-1\",connection=\"7\",peer=\"a\\\"b\\n\"} 2",
            "channel=\"0\",plugin=\"TCPX-soft\",nic=\"eth1\"} 5",
            "# EOF",
        ] {
            assert!(text.contains(line), "no {line} in\n{text}");
        }
        assert_eq!(text.lines().filter(|l| l.starts_with("uccl_tcpx_channel_retransmits_total{")).count(), 1, "{text}");
        let mut types: Vec<&str> = text.lines().filter(|l| l.starts_with("# TYPE")).collect();
        let n = types.len();
        types.dedup();
        assert_eq!(types.len(), n, "a family appears twice");
    }

    #[test]
    fn nothing_is_well_formed_too() {
        assert_eq!(exposition(Vec::new(), Format::OpenMetrics), "# EOF\n");
        assert_eq!(exposition(Vec::new(), Format::Plain), "");
    }

    #[test]
    fn both_formats_are_written_to_the_letter() {
        let family = |name: &str, samples| Family { name: name.into(), help: "What it is", samples };
        let labels = |peer: &str| vec![("engine", "e".to_owned()), ("peer", peer.to_owned())];
        let counter = family("sent", vec![(labels("a\\b\"c\nd"), Number::Counter(u64::MAX)), (labels(""), Number::Counter(0))]);
        let gauge = family("speed", [0.0, 1.5, 1e-6, 5e9].map(|n| (labels("p"), Number::Gauge(n))).into());
        let text = |format| {
            let mut out = String::new();
            [&counter, &gauge, &family("none", Vec::new())].iter().for_each(|family| family.write(format, &mut out).unwrap());
            out
        };
        let expected = |family: &str| {
            format!(
                "# HELP uccl_tcpx_{family} What it is\n# TYPE uccl_tcpx_{family} counter\n\
                 uccl_tcpx_sent_total{{engine=\"e\",peer=\"a\\\\b\\\"c\\nd\"}} 18446744073709551615\n\
                 uccl_tcpx_sent_total{{engine=\"e\",peer=\"\"}} 0\n\
                 # HELP uccl_tcpx_speed What it is\n# TYPE uccl_tcpx_speed gauge\n\
                 uccl_tcpx_speed{{engine=\"e\",peer=\"p\"}} 0.0\n\
                 uccl_tcpx_speed{{engine=\"e\",peer=\"p\"}} 1.5\n\
                 uccl_tcpx_speed{{engine=\"e\",peer=\"p\"}} 0.000001\n\
                 uccl_tcpx_speed{{engine=\"e\",peer=\"p\"}} 5000000000.0\n"
            )
        };
        assert_eq!(text(Format::OpenMetrics), expected("sent"));
        assert_eq!(text(Format::Plain), expected("sent_total"));
    }
}
