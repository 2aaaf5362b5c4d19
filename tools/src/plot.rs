//! Measured rows as a chart: GB/s over block size, one line per operation and total.

use crate::error::{Context, Result};
use crate::fail;
use crate::report::Row;
use crate::units::show_size;
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

/// Points of one line: (block bytes, GB/s), ascending.
type Points = Vec<(f64, f64)>;

/// Sorts rows into lines by operation, total and mode.
fn lines(rows: &[Row]) -> BTreeMap<String, Points> {
    let mut lines: BTreeMap<String, Points> = BTreeMap::new();
    for row in rows {
        let mut name = format!("{} {}", row.op, show_size(row.total_bytes));
        if row.inflight > 1 {
            name += &format!(" x{}", row.inflight);
        }
        if row.bidirectional {
            name += " both ways";
        }
        lines.entry(name).or_default().push((row.block_bytes as f64, row.gbytes_per_s));
    }
    for points in lines.values_mut() {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    lines
}

/// Draws rows into an SVG file.
pub fn write_svg(path: &Path, rows: &[Row]) -> Result<()> {
    let Some(first) = rows.first() else { fail!("there are no rows to draw") };
    let title = format!("{} memory, plugin {}, {} channels", first.memory, first.plugin, first.channels);
    let mut svg = String::new();
    draw(&mut svg, &title, &lines(rows)).context(format_args!("cannot draw {}", path.display()))?;
    std::fs::write(path, svg).context(format_args!("cannot write {}", path.display()))
}

fn draw(svg: &mut String, title: &str, lines: &BTreeMap<String, Points>) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let points = || lines.values().flatten();
    let least = points().map(|p| p.0).fold(f64::INFINITY, f64::min) / 1.5;
    let most = points().map(|p| p.0).fold(0.0, f64::max) * 1.5;
    let top = points().map(|p| p.1).fold(0.0, f64::max) * 1.1 + 1e-6;

    let root = SVGBackend::with_string(svg, (960, 540)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 22))
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(64)
        .build_cartesian_2d((least..most).log_scale().base(2.0), 0.0..top)?;
    chart
        .configure_mesh()
        .x_desc("block size")
        .y_desc("GB/s (1e9 bytes, median)")
        .axis_desc_style(("sans-serif", 18))
        .label_style(("sans-serif", 15))
        .x_labels(12)
        .max_light_lines(1)
        .x_label_formatter(&|bytes| show_size(bytes.round() as u64))
        .y_label_formatter(&|rate| format!("{rate:.1}"))
        .light_line_style(RGBColor(240, 240, 240))
        .bold_line_style(RGBColor(220, 220, 220))
        .draw()?;
    for (i, (name, points)) in lines.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)).point_size(4))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(3)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font(("sans-serif", 15))
        .background_style(WHITE.mix(0.85))
        .border_style(RGBColor(200, 200, 200))
        .draw()?;
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::row;

    #[test]
    fn one_line_per_operation_and_total() {
        let mut rows = vec![row(), Row { block_bytes: 1024, gbytes_per_s: 1.0, ..row() }, Row { total_bytes: 4096, ..row() }];
        rows.push(Row { op: crate::measure::Op::Read, ..row() });
        let lines = lines(&rows);
        assert_eq!(lines.keys().collect::<Vec<_>>(), ["read 64 MiB", "write 4 KiB", "write 64 MiB"]);
        assert_eq!(lines["write 64 MiB"], [(1024.0, 1.0), (4096.0, 6.7108864)]);
    }

    #[test]
    fn a_chart_names_its_lines() {
        let mut svg = String::new();
        draw(&mut svg, "title", &lines(&[row(), Row { block_bytes: 64 << 20, ..row() }])).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert!(svg.contains("write 64 MiB") && svg.contains("block size"));
    }
}
