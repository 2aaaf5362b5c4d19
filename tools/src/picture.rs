//! A screen of characters as an SVG picture. Pure.

use ratatui::buffer::{Buffer, Cell};
use ratatui::style::{Color, Modifier};
use std::fmt::Write;

/// The size of a cell in pixels, and the font size at which usual fonts fit it.
const WIDE: usize = 8;
const HIGH: usize = 17;
const LETTER: f32 = 13.3;
/// From the top of a cell to the baseline.
const LINE: usize = 13;
/// Margin around the screen.
const MARGIN: usize = 10;
const INK: &str = "#d8dee9";
const PAPER: &str = "#20242c";

fn colour(colour: Color) -> &'static str {
    match colour {
        Color::Red | Color::LightRed => "#ff6b6b",
        Color::Green | Color::LightGreen => "#8fce7a",
        Color::Yellow | Color::LightYellow => "#e8c35a",
        _ => INK,
    }
}

/// The look of a cell: adjacent cells that look alike become one piece of text.
fn look(cell: &Cell) -> (&'static str, bool, bool) {
    (colour(cell.fg), cell.modifier.contains(Modifier::BOLD), cell.modifier.contains(Modifier::REVERSED))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Draws the screen.
pub fn svg(screen: &Buffer) -> String {
    let (columns, rows) = (usize::from(screen.area.width), usize::from(screen.area.height));
    let (width, height) = (columns * WIDE + 2 * MARGIN, rows * HIGH + 2 * MARGIN);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"DejaVu Sans Mono, Menlo, Consolas, monospace\" font-size=\"{LETTER}\">\n\
         <rect width=\"{width}\" height=\"{height}\" rx=\"6\" fill=\"{PAPER}\"/>\n"
    );
    for (y, line) in screen.content().chunks(columns.max(1)).enumerate() {
        let mut x = 0;
        for piece in line.chunk_by(|a, b| look(a) == look(b)) {
            write_piece(&mut out, (x, y), piece);
            x += piece.len();
        }
    }
    out + "</svg>\n"
}

/// Draws cells that look alike, at a column and a row.
fn write_piece(out: &mut String, (x, y): (usize, usize), piece: &[Cell]) {
    let ((ink, bold, reversed), n) = (look(&piece[0]), piece.len());
    let text: String = piece.iter().map(Cell::symbol).collect();
    let (left, top) = (MARGIN + x * WIDE, MARGIN + y * HIGH);
    let (mut ink, weight) = (ink, if bold { " font-weight=\"bold\"" } else { "" });
    if reversed {
        let _ = writeln!(out, "<rect x=\"{left}\" y=\"{top}\" width=\"{}\" height=\"{HIGH}\" fill=\"{ink}\"/>", n * WIDE);
        ink = PAPER;
    }
    // Each word is positioned by itself, so that columns align whatever the font.
    let mut column = 0;
    for word in text.split_inclusive("  ") {
        let (skipped, shown) = (word.chars().take_while(|c| *c == ' ').count(), word.trim());
        let at = left + (column + skipped) * WIDE;
        column += word.chars().count();
        if !shown.is_empty() {
            // Writing to memory does not fail.
            let _ = writeln!(out, "<text x=\"{at}\" y=\"{}\" fill=\"{ink}\"{weight}>{}</text>", top + LINE, escaped(shown));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::layout::Rect;
    use ratatui::style::Style;

    #[test]
    fn looks_and_positions_are_kept() {
        let mut screen = Buffer::empty(Rect::new(0, 0, 12, 2));
        screen.set_string(2, 0, "a<b", Style::new());
        screen.set_string(6, 0, "SLOW", Style::new().fg(Color::Red).add_modifier(Modifier::BOLD));
        screen.set_string(0, 1, "head", Style::new().add_modifier(Modifier::REVERSED));
        let svg = svg(&screen);
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"), "{svg}");
        assert!(svg.contains(">a&lt;b</text>") && svg.contains(&format!("x=\"{}\" y=\"{}\"", MARGIN + 2 * WIDE, MARGIN + LINE)));
        assert!(svg.contains("fill=\"#ff6b6b\" font-weight=\"bold\"") && svg.contains(">SLOW</text>"), "{svg}");
        assert!(svg.contains(&format!("width=\"{}\" height=\"{HIGH}\" fill=\"{INK}\"", 4 * WIDE)), "{svg}");
        assert!(Buffer::empty(Rect::new(0, 0, 0, 0)).content().is_empty());
        assert!(super::svg(&Buffer::empty(Rect::new(0, 0, 0, 0))).ends_with("</svg>\n"));
    }
}
