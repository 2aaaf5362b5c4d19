//! What tcpx-top shows: connections and their channels with rates, from the exported statistics; and how it is drawn.

use crate::carried::{carrier, DIRECT};
use crate::scrape::Sample;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Block, Cell, Paragraph, Row, Table};
use ratatui::{Frame, Terminal};
use std::collections::BTreeMap;
use std::io;

/// A channel as displayed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Channel {
    /// Its number, which sorts it.
    pub number: u64,
    /// Its plugin.
    pub plugin: String,
    /// Its NIC.
    pub nic: String,
    /// The peer's NIC, if it has another name.
    pub peer_nic: String,
    /// Values by name.
    pub values: BTreeMap<String, f64>,
}

/// A connection as displayed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Connection {
    /// The peer's address.
    pub peer: String,
    /// Values by name.
    pub values: BTreeMap<String, f64>,
    /// Its channels.
    pub channels: Vec<Channel>,
}

/// All data of one reading.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    /// Engines: values by name.
    pub engines: BTreeMap<String, BTreeMap<String, f64>>,
    /// Connections by engine and id.
    pub connections: BTreeMap<(String, u64), Connection>,
}

impl View {
    /// Sorts samples into engines, connections and channels.
    pub fn of(samples: &[Sample]) -> View {
        let mut view = View::default();
        for sample in samples {
            let label = |name: &str| sample.labels.get(name).cloned().unwrap_or_default();
            let number = |name: &str| label(name).parse::<u64>().unwrap_or(0);
            let name = sample.name.trim_end_matches("_total");
            if let Some(name) = name.strip_prefix("channel_") {
                let connection = view.connections.entry((label("engine"), number("connection"))).or_default();
                connection.peer = label("peer");
                let wanted = number("channel");
                let at = connection.channels.iter().position(|c| c.number == wanted).unwrap_or_else(|| {
                    let (plugin, nic, peer_nic) = (label("plugin"), label("nic"), label("peer_nic"));
                    connection.channels.push(Channel { number: wanted, plugin, nic, peer_nic, values: BTreeMap::new() });
                    connection.channels.len() - 1
                });
                connection.channels[at].values.insert(name.to_owned(), sample.value);
            } else if let Some(name) = name.strip_prefix("connection_").filter(|_| sample.labels.contains_key("connection")) {
                let connection = view.connections.entry((label("engine"), number("connection"))).or_default();
                connection.peer = label("peer");
                connection.values.insert(name.to_owned(), sample.value);
            } else {
                view.engines.entry(label("engine")).or_default().insert(name.to_owned(), sample.value);
            }
        }
        view.connections.values_mut().for_each(|c| c.channels.sort_by_key(|channel| channel.number));
        view
    }

    /// Sent and received bytes per second by plugin and NIC.
    fn paths(&self) -> BTreeMap<String, (f64, f64)> {
        let mut paths: BTreeMap<String, (f64, f64)> = BTreeMap::new();
        for channel in self.connections.values().flat_map(|c| &c.channels) {
            let sums = paths.entry(channel.over(&channel.nic)).or_default();
            sums.0 += channel.get("sent_bytes_per_second");
            sums.1 += channel.get("received_bytes_per_second");
        }
        paths
    }
}

impl Channel {
    fn get(&self, name: &str) -> f64 {
        self.values.get(name).copied().unwrap_or(0.0)
    }

    /// The word for its plugin, and these NICs.
    fn over(&self, nics: &str) -> String {
        match carrier(&self.plugin) {
            "" => clean(nics),
            DIRECT => DIRECT.to_owned(),
            plugin => format!("{} {}", clean(plugin), clean(nics)),
        }
    }

    /// Its plugin, its NIC, and the peer's if they are not the same.
    fn path(&self) -> String {
        match self.peer_nic.is_empty() {
            true => self.over(&self.nic),
            false => self.over(&format!("{}>{}", self.nic, self.peer_nic)),
        }
    }

    /// A warning word; empty if all is well.
    fn mark(&self) -> &'static str {
        if self.get("lost") > 0.0 {
            "LOST"
        } else if self.get("slow") > 0.0 {
            "SLOW"
        } else if self.get("window_out") > 0.0 && self.get("sent_bytes_per_second") == 0.0 {
            "STALLED"
        } else {
            ""
        }
    }
}

fn rate(bytes_per_second: f64) -> String {
    match bytes_per_second {
        r if r >= 1e9 => format!("{:.2} GB/s", r / 1e9),
        r if r >= 1e6 => format!("{:.1} MB/s", r / 1e6),
        r if r >= 1e3 => format!("{:.1} kB/s", r / 1e3),
        r => format!("{r:.0} B/s"),
    }
}

/// A peer's or interface's name without characters that would control the terminal or reorder its text.
fn clean(text: &str) -> String {
    text.chars().map(|c| if matches!(c, ' '..='~') { c } else { '?' }).collect()
}

/// Most lines of the summary.
const TOP: usize = 12;
const HEAD: [&str; 11] = ["connection", "channel", "path", "out", "in", "speed", "window", "queue", "rtt", "resent", ""];
const WIDTHS: [u16; 11] = [24, 8, 14, 12, 12, 12, 8, 10, 10, 14, 8];

/// The cells of all lines, and whether to highlight each.
fn lines(view: &View) -> Vec<([String; 11], bool)> {
    let mut out = Vec::new();
    for ((_, id), connection) in &view.connections {
        let get = |name: &str| connection.values.get(name).copied().unwrap_or(0.0);
        let sum = |name: &str| connection.channels.iter().map(|c| c.get(name)).sum::<f64>();
        let state = if get("up") > 0.0 { String::new() } else { "ENDED".to_owned() };
        let silent = get("silent_seconds");
        let state = if state.is_empty() && silent > 4.0 { format!("silent {silent:.0} s") } else { state };
        let (resent, lost) = (get("resent_chunks"), connection.channels.iter().filter(|c| c.get("lost") > 0.0).count());
        let state = if state.is_empty() && lost > 0 { format!("{lost} lost") } else { state };
        let marked = !state.is_empty();
        out.push((
            [
                format!("{id} {}", clean(&connection.peer)),
                format!("{} open", connection.channels.len() - lost),
                String::new(),
                rate(sum("sent_bytes_per_second")),
                rate(sum("received_bytes_per_second")),
                String::new(),
                format!("{:.0} fly", get("transfers_in_flight")),
                rate(sum("queued_bytes")).replace("/s", ""),
                String::new(),
                match resent {
                    n if n > 0.0 => format!("{:.0}, {n:.0} ch", sum("retransmits")),
                    _ => format!("{:.0}", sum("retransmits")),
                },
                state,
            ],
            marked,
        ));
        for channel in &connection.channels {
            let (mark, speed) = (channel.mark(), channel.get("speed_bytes_per_second"));
            out.push((
                [
                    String::new(),
                    channel.number.to_string(),
                    channel.path(),
                    rate(channel.get("sent_bytes_per_second")),
                    rate(channel.get("received_bytes_per_second")),
                    if speed > 0.0 { rate(speed) } else { "-".to_owned() },
                    format!("{:.0}/{:.0}", channel.get("window_out"), channel.get("window")),
                    rate(channel.get("queued_bytes")).replace("/s", ""),
                    format!("{:.2} ms", channel.get("rtt_seconds") * 1e3),
                    format!("{:.0}/{:.0}", channel.get("retransmits"), channel.get("segments")),
                    mark.to_owned(),
                ],
                !mark.is_empty(),
            ));
        }
    }
    out
}

/// The first lines: engines, plugins and NICs.
fn summary(view: &View) -> Vec<String> {
    let mut out = Vec::new();
    for (engine, values) in &view.engines {
        let get = |name: &str| values.get(name).copied().unwrap_or(0.0);
        out.push(format!(
            "engine {}: up {:.0} s, {:.0} connections ({:.0} opened, {:.0} lost), refused {:.0}, limits hit {:.0}, set-ups failed {:.0}",
            clean(engine),
            get("up_seconds"),
            get("connections"),
            get("connections_opened"),
            get("connections_lost"),
            get("refused"),
            get("limits_hit"),
            get("setups_in_failed") + get("setups_out_failed")
        ));
    }
    for (path, (sent, received)) in view.paths() {
        out.push(format!("{path}: {} out, {} in", rate(sent), rate(received)));
    }
    out
}

/// Everything as plain text.
pub fn text(view: &View) -> String {
    let cells = |cells: &[String; 11]| {
        let padded = cells.iter().zip(WIDTHS).map(|(text, width)| format!("{text:<width$}", width = usize::from(width)));
        padded.collect::<Vec<_>>().join(" ").trim_end().to_owned()
    };
    let mut out = summary(view);
    out.push(cells(&HEAD.map(str::to_owned)));
    out.extend(lines(view).iter().map(|(line, _)| cells(line)));
    out.join("\n")
}

/// The help line of the interactive screen.
pub const KEYS: &str =
    "q: quit, arrows: scroll; red: slower than the others, stalled, lost, silent or ended; ch: chunks sent again after a loss";

/// A screen large enough for everything.
pub fn screen(view: &View) -> io::Result<Buffer> {
    let width = WIDTHS.iter().sum::<u16>() + WIDTHS.len() as u16 + 1;
    let height = summary(view).len().min(TOP) + lines(view).len() + 6;
    let area = Rect::new(0, 0, width, height.min(usize::from(u16::MAX / width)) as u16);
    let mut terminal = Terminal::new(TestBackend::new(area.width, area.height))?;
    terminal.draw(|frame| draw(frame, view, 0, KEYS))?;
    Ok(terminal.backend().buffer().clone())
}

/// Draws the view, scrolled to line `offset`; `note` is the last line.
pub fn draw(frame: &mut Frame<'_>, view: &View, offset: usize, note: &str) {
    let top = summary(view);
    let areas = Layout::vertical([Constraint::Length(top.len().min(TOP) as u16 + 2), Constraint::Min(3), Constraint::Length(1)])
        .split(frame.area());
    let head = Paragraph::new(top.into_iter().map(Line::from).collect::<Vec<_>>()).block(Block::bordered().title(" tcpx-top "));
    frame.render_widget(head, areas[0]);
    let row = |(cells, marked): ([String; 11], bool)| {
        let connection = !cells[0].is_empty();
        let style = match (marked, connection) {
            (true, _) => Style::new().fg(Color::Red).add_modifier(Modifier::BOLD),
            (false, true) => Style::new().add_modifier(Modifier::BOLD),
            (false, false) => Style::new(),
        };
        Row::new(cells.map(Cell::from)).style(style)
    };
    let rows = lines(view).into_iter().skip(offset).map(row);
    let table = Table::new(rows, WIDTHS.map(Constraint::Length))
        .header(Row::new(HEAD).style(Style::new().add_modifier(Modifier::REVERSED)))
        .block(Block::bordered());
    frame.render_widget(table, areas[1]);
    frame.render_widget(Paragraph::new(note.to_owned()), areas[2]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scrape::parse;

    fn view() -> View {
        let channel = |i: usize, nic: &str, rate: f64, slow: f64| {
            let labels = format!(
                "{{engine=\"e\",connection=\"1\",peer=\"10.0.0.2:5\",channel=\"{i}\",plugin=\"TCPX-soft\",nic=\"{nic}\"}}"
            );
            format!(
                "uccl_tcpx_channel_sent_bytes_per_second{labels} {rate}\nuccl_tcpx_channel_slow{labels} {slow}\n\
                 uccl_tcpx_channel_retransmits_total{labels} 7\n"
            )
        };
        let text = format!(
            "uccl_tcpx_up_seconds{{engine=\"e\"}} 9\nuccl_tcpx_connections{{engine=\"e\"}} 1\n\
             uccl_tcpx_connection_up{{engine=\"e\",connection=\"1\",peer=\"10.0.0.2:5\"}} 1\n{}{}{}",
            channel(10, "eth1", 118e6, 0.0),
            channel(2, "eth2", 2.4e6, 1.0),
            channel(0, "eth1", 1e6, 0.0)
        );
        View::of(&parse(&text))
    }

    #[test]
    fn the_slow_channel_is_marked_and_nics_are_summed() {
        let text = text(&view());
        let slow: Vec<&str> = text.lines().filter(|l| l.ends_with("SLOW")).collect();
        assert!(slow.len() == 1 && slow[0].contains(" tcp eth2 ") && slow[0].contains("2.4 MB/s"), "{text}");
        assert!(text.contains("tcp eth1: 119.0 MB/s out") && text.contains("1 connections"), "{text}");
        let order: Vec<u64> = view().connections.values().flat_map(|c| c.channels.iter().map(|c| c.number)).collect();
        assert_eq!(order, [0, 2, 10]);
    }

    #[test]
    fn lost_channels_are_marked_and_not_open() {
        let labels = |channel: usize| {
            format!("{{engine=\"e\",connection=\"1\",peer=\"p\",channel=\"{channel}\",nic=\"eth{channel}\",peer_nic=\"ib0\"}}")
        };
        let channel = |i: usize| format!("uccl_tcpx_channel_lost{} {}\n", labels(i), i % 2);
        let of = "{engine=\"e\",connection=\"1\",peer=\"p\"}";
        let all: String = (0..3).map(channel).collect();
        let more = format!("uccl_tcpx_connection_up{of} 1\nuccl_tcpx_connection_resent_chunks_total{of} 5\n");
        let text = text(&View::of(&parse(&format!("{all}{more}"))));
        let lost: Vec<&str> = text.lines().filter(|line| line.ends_with(" LOST")).collect();
        assert!(lost.len() == 1 && lost[0].contains("eth1>ib0"), "{text}");
        let connection = text.lines().find(|line| line.starts_with("1 p")).expect("the connection");
        assert!(connection.contains("2 open") && connection.contains("5 ch") && connection.ends_with("1 lost"), "{text}");
    }

    #[test]
    fn a_screen_for_a_picture_has_room_for_everything() {
        let screen = screen(&view()).unwrap();
        let text: String = screen.content().iter().map(|cell| cell.symbol()).collect();
        for part in ["10.0.0.2:5", "SLOW", "eth1: 119.0 MB/s out", "q: quit"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(screen.area.height, 13, "a box of 3 lines, one of 5, and the last line");
    }

    #[test]
    fn it_draws_in_any_size() {
        for (width, height) in [(140, 20), (40, 8), (10, 3), (1, 1)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
            terminal.draw(|frame| draw(frame, &view(), 0, "q: quit")).unwrap();
            let text: String = terminal.backend().buffer().content().iter().map(|cell| cell.symbol()).collect();
            assert!(width < 140 || (text.contains("SLOW") && text.contains("10.0.0.2:5") && text.contains("q: quit")), "{text}");
        }
    }
}
