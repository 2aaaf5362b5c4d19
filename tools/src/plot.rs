//! Measured rows as a chart: GB/s and latency over size, one line per operation.

use crate::carried::{DIRECT, NVLINK};
use crate::error::{Context, Result};
use crate::fail;
use crate::report::Row;
use crate::units::show_size;
use plotters::coord::Shift;
use plotters::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;

const COLOURS: [RGBColor; 8] = [
    RGBColor(31, 119, 180),
    RGBColor(214, 96, 20),
    RGBColor(44, 140, 60),
    RGBColor(170, 40, 110),
    RGBColor(110, 80, 170),
    RGBColor(120, 90, 60),
    RGBColor(20, 150, 160),
    RGBColor(90, 90, 90),
];

/// A point: the size as a power of 2, GB/s, median and 99th percentile in us.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Point {
    power: f64,
    rate: f64,
    p50: f64,
    p99: f64,
}

/// Sorts rows into lines by operation and mode, ascending. If transfers consist of blocks, the size is the block's, and each
/// total has its own line.
fn lines(rows: &[Row]) -> BTreeMap<String, Vec<Point>> {
    let in_blocks = rows.iter().any(|row| row.block_bytes < row.total_bytes);
    let mut lines: BTreeMap<String, Vec<Point>> = BTreeMap::new();
    for row in rows {
        let mut name = row.op.to_string();
        if in_blocks {
            name += &format!(" {}", show_size(row.total_bytes));
        }
        if row.inflight > 1 {
            name += &format!(" x{}", row.inflight);
        }
        if row.bidirectional {
            name += " both ways";
        }
        // A demo has rows of both kinds.
        if [DIRECT, NVLINK].iter().any(|direct| row.path.starts_with(direct)) {
            name += ", direct";
        }
        let size = if in_blocks { row.block_bytes } else { row.total_bytes };
        let point = Point { power: (size as f64).log2(), rate: row.gbytes_per_s, p50: row.p50_us, p99: row.p99_us };
        lines.entry(name).or_default().push(point);
    }
    for points in lines.values_mut() {
        points.sort_by(|a, b| a.power.total_cmp(&b.power));
    }
    lines
}

/// Draws rows into an SVG file.
pub fn write_svg(path: &Path, rows: &[Row]) -> Result<()> {
    let Some(largest) = rows.iter().max_by_key(|row| row.total_bytes) else { fail!("there are no rows to draw") };
    let title = format!("{} memory, {} over {}", largest.memory, show_size(largest.total_bytes), largest.path);
    let mut svg = String::new();
    draw(&mut svg, &title, &lines(rows)).context(format_args!("cannot draw {}", path.display()))?;
    std::fs::write(path, svg).context(format_args!("cannot write {}", path.display()))
}

type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Size of one chart, and of a letter and a row of the legend.
const CHART: (u32, u32) = (860, 400);
const LETTER: u32 = 9;
const ROW: i32 = 22;

fn draw(svg: &mut String, title: &str, lines: &BTreeMap<String, Vec<Point>>) -> Drawn {
    // The legend is as wide as its longest name.
    let longest = lines.keys().map(|name| name.chars().count()).max().unwrap_or(0) as u32;
    let (legend, head) = (longest * LETTER + 60, 40);
    let height = head + 2 * CHART.1.max(lines.len() as u32 * ROW as u32 / 2 + 20);
    let root = SVGBackend::with_string(svg, (CHART.0 + legend, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let (top, rest) = root.split_vertically(head);
    top.draw(&Text::new(title.to_owned(), (16, 12), ("sans-serif", 22)))?;
    let (charts, names) = rest.split_horizontally(CHART.0);
    let halves = charts.split_evenly((2, 1));
    rates(&halves[0], lines)?;
    latencies(&halves[1], lines)?;
    for (i, name) in lines.keys().enumerate() {
        let (y, colour) = (24 + i as i32 * ROW, COLOURS[i % COLOURS.len()]);
        names.draw(&PathElement::new([(8, y), (32, y)], colour.stroke_width(3)))?;
        names.draw(&Text::new(name.clone(), (40, y - 8), ("sans-serif", 16)))?;
    }
    root.present()?;
    Ok(())
}

/// The range of sizes, as whole powers of 2.
fn span(lines: &BTreeMap<String, Vec<Point>>) -> std::ops::Range<f64> {
    let powers = || lines.values().flatten().map(|p| p.power);
    let (least, most) = (powers().fold(f64::INFINITY, f64::min).floor(), powers().fold(0.0, f64::max).ceil());
    least - 0.5..most + 0.5
}

/// A tick of the size axis: whole powers of 2 only.
fn tick(power: &f64) -> String {
    let whole = power.round();
    if (power - whole).abs() > 1e-6 || !(0.0..63.0).contains(&whole) {
        return String::new();
    }
    show_size(1 << whole as u32)
}

/// The number of ticks that fit on the size axis.
fn ticks(span: &std::ops::Range<f64>) -> usize {
    let powers = (span.end - span.start) as usize + 1;
    if powers <= 12 {
        powers
    } else {
        powers / 2
    }
}

/// Round times in us for an axis of this range, few enough to be readable.
fn time_ticks(range: &std::ops::Range<f64>) -> Vec<f64> {
    let of = |steps: &[f64]| -> Vec<f64> {
        let decades = range.start.log10().floor() as i32..=range.end.log10().ceil() as i32;
        let all = decades.flat_map(|decade| steps.iter().map(move |step| step * 10f64.powi(decade)));
        all.filter(|us| range.contains(us)).collect()
    };
    let fine: [&[f64]; 2] = [&[1.0, 2.0, 5.0], &[1.0, 3.0]];
    fine.into_iter().map(of).find(|ticks| ticks.len() <= 9).unwrap_or_else(|| of(&[1.0]))
}

/// A tick of the time axis, in a unit that keeps it short.
fn time(us: &f64) -> String {
    match *us {
        us if us < 0.999e3 => format!("{} us", (us * 10.0).round() / 10.0),
        us if us < 0.999e6 => format!("{} ms", (us / 1e2).round() / 10.0),
        us => format!("{} s", (us / 1e5).round() / 10.0),
    }
}

fn rates(area: &Area<'_>, lines: &BTreeMap<String, Vec<Point>>) -> Drawn {
    let most = lines.values().flatten().map(|p| p.rate).fold(0.0, f64::max) * 1.1 + 1e-6;
    let (span, digits) = (span(lines), if most < 0.5 { 3 } else { 1 + usize::from(most < 5.0) });
    let mut chart = ChartBuilder::on(area)
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(76)
        .build_cartesian_2d(span.clone(), 0.0..most)?;
    chart
        .configure_mesh()
        .x_desc("size")
        .y_desc("GB/s (1e9 bytes, median)")
        .axis_desc_style(("sans-serif", 17))
        .label_style(("sans-serif", 14))
        .x_labels(ticks(&span))
        .max_light_lines(1)
        .x_label_formatter(&tick)
        .y_label_formatter(&|rate| format!("{rate:.digits$}"))
        .light_line_style(RGBColor(245, 245, 245))
        .bold_line_style(RGBColor(220, 220, 220))
        .draw()?;
    for (i, points) in lines.values().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        chart.draw_series(LineSeries::new(points.iter().map(|p| (p.power, p.rate)), colour.stroke_width(2)).point_size(4))?;
    }
    Ok(())
}

fn latencies(area: &Area<'_>, lines: &BTreeMap<String, Vec<Point>>) -> Drawn {
    let times = || lines.values().flatten().flat_map(|p| [p.p50, p.p99]).filter(|us| *us > 0.0);
    let (least, most) = (times().fold(f64::INFINITY, f64::min), times().fold(1.0, f64::max));
    let range = least.min(most) / 1.5..most * 1.5;
    let times = time_ticks(&range);
    let span = span(lines);
    let mut chart = ChartBuilder::on(area)
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(76)
        .build_cartesian_2d(span.clone(), range.log_scale().with_key_points(times))?;
    chart
        .configure_mesh()
        .x_desc("size")
        .y_desc("latency (line: median, ring: p99)")
        .axis_desc_style(("sans-serif", 17))
        .label_style(("sans-serif", 14))
        .x_labels(ticks(&span))
        .max_light_lines(1)
        .x_label_formatter(&tick)
        .y_label_formatter(&time)
        .light_line_style(RGBColor(245, 245, 245))
        .bold_line_style(RGBColor(220, 220, 220))
        .draw()?;
    for (i, points) in lines.values().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        chart.draw_series(LineSeries::new(points.iter().map(|p| (p.power, p.p50)), colour.stroke_width(2)).point_size(4))?;
        chart.draw_series(points.iter().map(|p| Circle::new((p.power, p.p99), 4, colour.stroke_width(1))))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::Op;
    use crate::report::tests::row;

    #[test]
    fn one_line_per_operation_and_total() {
        let mut rows = vec![row(), Row { block_bytes: 1024, gbytes_per_s: 1.0, ..row() }, Row { total_bytes: 4096, ..row() }];
        rows.push(Row { op: Op::Read, ..row() });
        rows.push(Row { op: Op::Read, path: "direct (one host)".into(), ..row() });
        let lines = lines(&rows);
        assert_eq!(lines.keys().collect::<Vec<_>>(), ["read 64 MiB", "read 64 MiB, direct", "write 4 KiB", "write 64 MiB"]);
        assert_eq!(lines["write 64 MiB"].iter().map(|p| (p.power, p.rate)).collect::<Vec<_>>(), [(10.0, 1.0), (12.0, 6.5)]);
    }

    #[test]
    fn a_sweep_is_one_line_over_size() {
        let sizes = (12..27).map(|p| Row { total_bytes: 1 << p, block_bytes: 1 << p, ..row() });
        let lines = lines(&sizes.collect::<Vec<_>>());
        assert_eq!(lines.keys().collect::<Vec<_>>(), ["write"]);
        assert_eq!(lines["write"].len(), 15);
    }

    #[test]
    fn a_chart_has_complete_names_and_round_ticks() {
        let mut svg = String::new();
        let long = Row { inflight: 1000, bidirectional: true, block_bytes: 64 << 20, op: Op::Send, ..row() };
        draw(&mut svg, "title", &lines(&[row(), long, Row { block_bytes: 64 << 20, ..row() }])).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert!(svg.contains("send 64 MiB x1000 both ways") && svg.contains("GB/s") && svg.contains("median"));
        for size in ["4 KiB", "1 MiB", "64 MiB"] {
            assert!(svg.contains(&format!("\n{size}\n")), "no tick {size}");
        }
        assert_eq!(tick(&12.5), "");
    }

    #[test]
    fn the_time_axis_has_a_few_round_ticks_whatever_its_range() {
        let words = |range| time_ticks(&range).iter().map(time).collect::<Vec<_>>();
        assert_eq!(words(12.0..90.0), ["20 us", "50 us"]);
        assert_eq!(words(12.0..90_000.0), ["30 us", "100 us", "300 us", "1 ms", "3 ms", "10 ms", "30 ms"]);
        assert_eq!(words(0.4..3e6), ["1 us", "10 us", "100 us", "1 ms", "10 ms", "100 ms", "1 s"]);
        for least in [0.3, 7.0, 900.0] {
            for factor in [2.3, 30.0, 4e3, 1e7] {
                assert!((1..=9).contains(&time_ticks(&(least..least * factor)).len()), "{least} {factor}");
            }
        }
    }
}
