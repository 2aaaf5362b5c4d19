//! Statistics as Prometheus and OpenMetrics read them.

use super::{ChannelStats, ConnectionStats, EngineStats};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{text, DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use std::fmt;

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

#[derive(Debug)]
struct Snapshot(Vec<EngineStats>);

impl Family {
    fn new(name: impl Into<String>, help: &'static str) -> Family {
        Family { name: name.into(), help, samples: Vec::new() }
    }

    fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let Some((_, first)) = self.samples.first() else { return Ok(()) };
        let kind = match first {
            Number::Counter(_) => ConstCounter::new(0u64).metric_type(),
            Number::Gauge(_) => ConstGauge::new(0f64).metric_type(),
        };
        let mut metric = encoder.encode_descriptor(&self.name, self.help, None, kind)?;
        for (labels, number) in &self.samples {
            let sample = metric.encode_family(labels)?;
            match *number {
                Number::Counter(n) => ConstCounter::new(n).encode(sample)?,
                Number::Gauge(n) => ConstGauge::new(n).encode(sample)?,
            }
        }
        Ok(())
    }
}

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
                    labels.extend([("channel", i.to_string()), ("nic", channel.nic.clone())]);
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
            self.of_engines("connections", "Connections that are there", |e| Gauge(e.connections.len() as f64)),
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
            self.of_connections("silent_seconds", "Since anything was heard of the peer", |c| Gauge(c.silent.as_secs_f64())),
            self.of_connections("transfers_in_flight", "Transfers of this side under way", |c| Gauge(c.in_flight as f64)),
            self.of_connections("backlog_bytes", "Bytes of the control stream that wait to leave", |c| {
                Gauge(c.backlog_bytes as f64)
            }),
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
            counter("stalls", "Seconds in which the channel had chunks under way and moved none", |c| c.stalls),
            counter("packed_chunks", "Chunks gathered from device memory", |c| c.packed_chunks),
            counter("unpacked_chunks", "Chunks scattered to device memory", |c| c.unpacked_chunks),
            counter("pack_us", "Microseconds that gathering took, of all chunks together", |c| c.pack_us),
            counter("unpack_us", "Microseconds that scattering took, of all chunks together", |c| c.unpack_us),
            gauge("sent_bytes_per_second", "Over the last second or so", |c| c.sent_per_second),
            gauge("received_bytes_per_second", "Over the last second or so", |c| c.received_per_second),
            gauge("speed_bytes_per_second", "While the channel was busy sending; 0: unknown", |c| c.speed),
            gauge("queued_bytes", "Bytes handed to the channel and not sent", |c| c.queued_bytes as f64),
            gauge("window_out", "Places of the window in use for sending", |c| f64::from(c.window_out)),
            gauge("window_in", "Places of the window in use for receiving", |c| f64::from(c.window_in)),
            gauge("window", "Places of the window", |c| f64::from(c.window)),
            gauge("slow", "1 while the channel runs far below the others", |c| f64::from(u8::from(c.slow))),
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

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let families = self.engine_families().into_iter().chain(self.connection_families()).chain(self.channel_families());
        for family in families {
            family.encode(&mut encoder)?;
        }
        Ok(())
    }
}

/// The statistics of engines in OpenMetrics' text format, which Prometheus reads.
pub(super) fn exposition(engines: Vec<EngineStats>) -> String {
    let mut registry = Registry::with_prefix("uccl_tcpx");
    registry.register_collector(Box::new(Snapshot(engines)));
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = text::encode(&mut out, &registry);
    out
}

#[cfg(test)]
mod tests {
    use super::super::{Network, Totals};
    use super::*;

    fn engine() -> EngineStats {
        let network = Some(Network { retransmits: 3, segments: 9, rtt_us: 1500, ..Network::default() });
        let channel = ChannelStats { nic: "eth1".into(), sent_bytes: 5, slow: true, network, ..ChannelStats::default() };
        let unknown = ChannelStats { nic: "eth2".into(), ..ChannelStats::default() };
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
        let text = exposition(vec![engine(), EngineStats { metadata: "other".into(), ..EngineStats::default() }]);
        for line in [
            "# TYPE uccl_tcpx_connections_opened counter",
            "uccl_tcpx_connections_opened_total{engine=\"10.0.0.1:4000?-1\"} 4",
            "uccl_tcpx_connections_opened_total{engine=\"other\"} 0",
            "uccl_tcpx_connection_refused_total{engine=\"10.0.0.1:4000?-1\",connection=\"7\",peer=\"a\\\"b\\n\"} 2",
            "channel=\"0\",nic=\"eth1\"} 5",
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
        assert_eq!(exposition(Vec::new()), "# EOF\n");
    }
}
