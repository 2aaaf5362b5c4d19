//! What tcpx-top shows: engines, connections and channels with rates, from the exported statistics; and how it is drawn, on a
//! terminal of any width.

use crate::carried::{carrier, DIRECT};
use crate::scrape::Sample;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Block, Borders, Paragraph};
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

/// An engine as displayed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Engine {
    /// Its address.
    pub address: String,
    /// Values by name.
    pub values: BTreeMap<String, f64>,
    /// Transfers by size: the bounds of the buckets with the transfers below them.
    pub times: BTreeMap<String, Vec<(f64, f64)>>,
}

/// The source and the number of an engine.
type EngineKey = (usize, u64);

/// All data of one reading.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    /// Engines.
    pub engines: BTreeMap<EngineKey, Engine>,
    /// Connections by engine and id.
    pub connections: BTreeMap<(EngineKey, u64), Connection>,
}

impl View {
    /// Sorts samples of sources into engines, connections and channels.
    pub fn of(sources: &[Vec<Sample>]) -> View {
        let mut view = View::default();
        for (source, samples) in sources.iter().enumerate() {
            samples.iter().for_each(|sample| view.add(source, sample));
        }
        view.connections.values_mut().for_each(|c| c.channels.sort_by_key(|channel| channel.number));
        view
    }

    fn add(&mut self, source: usize, sample: &Sample) {
        let label = |name: &str| sample.labels.get(name).cloned().unwrap_or_default();
        let number = |name: &str| label(name).parse::<u64>().unwrap_or(0);
        let engine = (source, number("engine"));
        let name = sample.name.trim_end_matches("_total");
        if !sample.labels.contains_key("connection") {
            return self.engines.entry(engine).or_default().add(name, label, sample.value);
        }
        let connection = self.connections.entry((engine, number("connection"))).or_default();
        if name == "connection_info" {
            connection.peer = label("address");
        } else if let Some(name) = name.strip_prefix("channel_") {
            let wanted = number("channel");
            let at = connection.channels.iter().position(|c| c.number == wanted).unwrap_or_else(|| {
                let (plugin, nic, peer_nic) = (label("plugin"), label("nic"), label("peer_nic"));
                connection.channels.push(Channel { number: wanted, plugin, nic, peer_nic, values: BTreeMap::new() });
                connection.channels.len() - 1
            });
            connection.channels[at].values.insert(name.to_owned(), sample.value);
        } else if let Some(name) = name.strip_prefix("connection_") {
            connection.values.insert(name.to_owned(), sample.value);
        }
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

impl Engine {
    fn add(&mut self, name: &str, label: impl Fn(&str) -> String, value: f64) {
        match name {
            "engine_info" => self.address = label("address"),
            "transfer_seconds_bucket" => {
                let bound = if label("le") == "+Inf" { f64::INFINITY } else { label("le").parse().unwrap_or(f64::INFINITY) };
                self.times.entry(label("size")).or_default().push((bound, value));
            }
            _ => drop(self.values.insert(name.to_owned(), value)),
        }
    }

    /// How long half, and 99 of 100, of the transfers of each size took at most.
    fn times(&self) -> Vec<String> {
        let line = |(size, buckets): (&String, &Vec<(f64, f64)>)| {
            let all = buckets.last().map_or(0.0, |&(_, below)| below);
            let within = |part: f64| {
                let bound = buckets.iter().find(|&&(_, below)| below >= all * part).map_or(f64::INFINITY, |&(bound, _)| bound);
                if bound.is_finite() {
                    format!("<= {}", time(bound))
                } else {
                    "> 10 s".to_owned()
                }
            };
            let size = clean(&size.replace('_', " "));
            (all > 0.0).then(|| format!("{size}: {all:.0} transfers, p50 {}, p99 {}", within(0.5), within(0.99)))
        };
        self.times.iter().filter_map(line).collect()
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

// ---- numbers ----

/// Three digits and a unit.
fn short(n: f64, units: [&str; 4]) -> String {
    let (n, unit) = match n {
        n if n >= 999.5e6 => (n / 1e9, units[3]),
        n if n >= 999.5e3 => (n / 1e6, units[2]),
        n if n >= 999.5 => (n / 1e3, units[1]),
        // An empty sum is -0.
        n => return format!("{:.0} {}", n + 0.0, units[0]),
    };
    let digits = match n {
        n if n >= 99.95 => 0,
        n if n >= 9.995 => 1,
        _ => 2,
    };
    format!("{n:.digits$} {unit}")
}

fn rate(bytes_per_second: f64) -> String {
    short(bytes_per_second, ["B/s", "kB/s", "MB/s", "GB/s"])
}

fn bytes(n: f64) -> String {
    short(n, ["B", "kB", "MB", "GB"])
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s} s"),
        s if s >= 1e-3 => format!("{} ms", (s * 1e6).round() / 1e3),
        s => format!("{:.0} us", s * 1e6),
    }
}

/// A peer's or interface's name without characters that would control the terminal or reorder its text.
fn clean(text: &str) -> String {
    text.chars().map(|c| if matches!(c, ' '..='~') { c } else { '?' }).collect()
}

/// In so many columns, with the end cut off if need be.
fn fit(text: &str, width: usize) -> String {
    match text.chars().count() <= width {
        true => text.to_owned(),
        false => text.chars().take(width.saturating_sub(1)).chain(['~']).collect(),
    }
}

/// Parts in lines of at most `width` columns.
fn wrap(parts: &[String], between: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for part in parts {
        match lines.last_mut() {
            Some(line) if line.len() + between.len() + part.len() <= width => *line += &format!("{between}{part}"),
            Some(_) => lines.push(format!("  {part}")),
            None => lines.push(part.clone()),
        }
    }
    lines.iter().map(|line| fit(line, width)).collect()
}

// ---- lines ----

/// From this width on there are all columns, and most of them from this one on.
const WIDE: usize = 120;
const USUAL: usize = 78;
/// Most lines of the summary.
const TOP: usize = 12;

/// A column of the lines of channels.
struct Column {
    head: &'static str,
    /// Its width on a narrow screen, and on a wide one.
    widths: (usize, usize),
    /// The narrowest screen that has it.
    from: usize,
    of: fn(&Channel) -> String,
}

const fn column(head: &'static str, widths: (usize, usize), from: usize, of: fn(&Channel) -> String) -> Column {
    Column { head, widths, from, of }
}

/// The state comes last, and no screen is too narrow for it.
const COLUMNS: [Column; 10] = [
    column("  ch", (4, 5), 0, |c| format!("  {}", c.number)),
    column("path", (14, 26), 0, Channel::path),
    column("out", (9, 10), 0, |c| rate(c.get("sent_bytes_per_second"))),
    column("in", (9, 10), 0, |c| rate(c.get("received_bytes_per_second"))),
    column("speed", (0, 10), WIDE, |c| match c.get("speed_bytes_per_second") {
        speed if speed > 0.0 => rate(speed),
        _ => "-".to_owned(),
    }),
    column("window", (7, 8), USUAL, |c| format!("{:.0}/{:.0}", c.get("window_out"), c.get("window"))),
    column("queue", (0, 8), WIDE, |c| bytes(c.get("queued_bytes"))),
    column("rtt", (8, 9), USUAL, |c| match c.get("rtt_seconds") {
        rtt if rtt > 0.0 => format!("{:.2} ms", rtt * 1e3),
        _ => "-".to_owned(),
    }),
    column("resent", (11, 16), 0, |c| match (c.get("retransmits"), c.get("segments")) {
        (again, of) if again > 0.0 && of > 0.0 => format!("{again:.0} {:.1}%", 100.0 * again / of),
        (again, _) => format!("{again:.0}"),
    }),
    column("", (7, 8), 0, |c| c.mark().to_owned()),
];

/// The texts of a line in the columns of a screen.
fn cells(width: usize, text: impl Fn(&Column) -> String) -> String {
    let cell = |column: &Column| {
        let width = if width >= WIDE { column.widths.1 } else { column.widths.0 };
        format!("{:<width$}", fit(&text(column), width))
    };
    let line = COLUMNS.iter().filter(|column| column.from <= width).map(cell).collect::<Vec<_>>().join(" ");
    fit(line.trim_end(), width)
}

/// The line of a connection, and whether to highlight it. Where there is little room, its state counts most, then its peer.
fn heading(id: u64, connection: &Connection, width: usize) -> (String, bool) {
    let get = |name: &str| connection.values.get(name).copied().unwrap_or(0.0);
    let sum = |name: &str| connection.channels.iter().map(|c| c.get(name)).sum::<f64>();
    let lost = connection.channels.iter().filter(|c| c.get("lost") > 0.0).count();
    let (silent, resent) = (get("silent_seconds"), get("resent_chunks"));
    let state = match () {
        () if get("up") == 0.0 => "  ENDED".to_owned(),
        () if silent > 4.0 => format!("  silent {silent:.0} s"),
        () if lost > 0 => format!("  {lost} lost"),
        () => String::new(),
    };
    let mut parts = vec![
        format!("  {} open", connection.channels.len() - lost),
        format!(", {:.0} in flight", get("transfers_in_flight")),
        format!(", out {}", rate(sum("sent_bytes_per_second"))),
        format!(", in {}", rate(sum("received_bytes_per_second"))),
    ];
    if resent > 0.0 {
        parts.push(format!(", resent {:.0} + {resent:.0} chunks", sum("retransmits")));
    }
    parts.push(format!(", queue {}", bytes(sum("queued_bytes"))));
    let (back, moves) = (get("restored_channels"), get("control_moves"));
    if back > 0.0 {
        parts.push(format!(", {back:.0} back"));
    }
    if moves > 0.0 {
        parts.push(format!(", control moved {moves:.0}x"));
    }
    let mut line = fit(&format!("{id} {}", clean(&connection.peer)), width.saturating_sub(state.len()));
    for part in parts {
        if line.len() + part.len() + state.len() <= width {
            line += &part;
        }
    }
    (line + &state, !state.is_empty())
}

/// How a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    Plain,
    Connection,
    Marked,
}

/// The lines of connections and channels.
fn lines(view: &View, width: usize) -> Vec<(String, Look)> {
    let mut out = Vec::new();
    for ((_, id), connection) in &view.connections {
        let (line, marked) = heading(*id, connection, width);
        out.push((line, if marked { Look::Marked } else { Look::Connection }));
        for channel in &connection.channels {
            let look = if channel.mark().is_empty() { Look::Plain } else { Look::Marked };
            out.push((cells(width, |column| (column.of)(channel)), look));
        }
    }
    out
}

/// The first lines: engines with the times of their transfers, plugins and NICs.
fn summary(view: &View, width: usize) -> Vec<String> {
    let mut out = Vec::new();
    for ((_, number), engine) in &view.engines {
        let get = |name: &str| engine.values.get(name).copied().unwrap_or(0.0);
        let name = if engine.address.is_empty() { number.to_string() } else { clean(&engine.address) };
        let parts = [
            format!("engine {name}: up {:.0} s", get("uptime_seconds")),
            format!(
                "{:.0} connections ({:.0} opened, {:.0} lost)",
                get("connections"),
                get("connections_opened"),
                get("connections_lost")
            ),
            format!("refused {:.0}", get("refused")),
            format!("limits hit {:.0}", get("limits_hit")),
            format!("set-ups failed {:.0}", get("setups_in_failed") + get("setups_out_failed")),
        ];
        out.extend(wrap(&parts, ", ", width));
        out.extend(wrap(&engine.times(), "; ", width));
    }
    let path = |(path, (sent, received)): (&String, &(f64, f64))| format!("{path}: {} out, {} in", rate(*sent), rate(*received));
    out.extend(wrap(&view.paths().iter().map(path).collect::<Vec<_>>(), "; ", width));
    out
}

fn head(width: usize) -> String {
    cells(width, |column| column.head.to_owned())
}

// ---- text and screen ----

/// Everything as plain text, in lines of at most `width` columns.
pub fn text(view: &View, width: usize) -> String {
    let mut out = summary(view, width);
    out.push(head(width));
    out.extend(lines(view, width).into_iter().map(|(line, _)| line));
    out.join("\n")
}

/// The help line of the interactive screen.
pub const KEYS: &str = "q: quit, arrows: scroll; red: slow, stalled, lost, silent or ended";

/// A screen large enough for everything.
pub fn screen(view: &View) -> io::Result<Buffer> {
    let width = WIDE as u16;
    let height = summary(view, WIDE).len().min(TOP) + lines(view, WIDE).len() + 3;
    let area = Rect::new(0, 0, width, height.min(usize::from(u16::MAX / width)) as u16);
    let mut terminal = Terminal::new(TestBackend::new(area.width, area.height))?;
    terminal.draw(|frame| draw(frame, view, 0, KEYS))?;
    Ok(terminal.backend().buffer().clone())
}

/// Draws the view, scrolled to line `offset`; `note` is the last line.
pub fn draw(frame: &mut Frame<'_>, view: &View, offset: usize, note: &str) {
    let width = usize::from(frame.area().width);
    let top = summary(view, width);
    let heights =
        [Constraint::Length(top.len().min(TOP) as u16 + 1), Constraint::Length(1), Constraint::Min(1), Constraint::Length(1)];
    let areas = Layout::vertical(heights).split(frame.area());
    let title = Block::new().borders(Borders::TOP).title(" tcpx-top ");
    frame.render_widget(Paragraph::new(top.into_iter().map(Line::from).collect::<Vec<_>>()).block(title), areas[0]);
    let reversed = Style::new().add_modifier(Modifier::REVERSED);
    frame.render_widget(Paragraph::new(head(width)).style(reversed), areas[1]);
    let line = |(line, look): (String, Look)| {
        let style = match look {
            Look::Marked => Style::new().fg(Color::Red).add_modifier(Modifier::BOLD),
            Look::Connection => Style::new().add_modifier(Modifier::BOLD),
            Look::Plain => Style::new(),
        };
        Line::styled(line, style)
    };
    let shown: Vec<Line<'_>> = lines(view, width).into_iter().skip(offset).map(line).collect();
    frame.render_widget(Paragraph::new(shown), areas[2]);
    frame.render_widget(Paragraph::new(fit(note, width)), areas[3]);
}

#[cfg(test)]
mod tests;
