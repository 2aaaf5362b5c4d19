//! tcpx-top: shows what the connections of a running process do, from its exported statistics.

use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use ratatui::crossterm::terminal;
use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;
use tcpx_tools::cli::Top;
use tcpx_tools::error::{Context, Result};
use tcpx_tools::picture::svg;
use tcpx_tools::say;
use tcpx_tools::scrape::{fetch, parse};
use tcpx_tools::view::{self, View};

fn main() -> ExitCode {
    let args: Top = tcpx_tools::cli::parse();
    let result = if let Some(path) = &args.svg {
        draw_into(path, &args)
    } else if args.once || !std::io::stdout().is_terminal() {
        once(&args)
    } else {
        watch(&args)
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Reads all sources.
fn read(sources: &[String]) -> Result<View> {
    let samples = sources.iter().map(|source| Ok(parse(&fetch(source)?))).collect::<Result<Vec<_>>>()?;
    Ok(View::of(&samples))
}

fn once(args: &Top) -> Result<()> {
    // A file or a pipe has no width.
    let width = if std::io::stdout().is_terminal() { terminal::size().map_or(80, |(width, _)| width.into()) } else { 130 };
    say!("{}", view::text(&read(&args.sources)?, width));
    Ok(())
}

fn draw_into(path: &Path, args: &Top) -> Result<()> {
    let screen = view::screen(&read(&args.sources)?).context("cannot draw")?;
    std::fs::write(path, svg(&screen)).context(format_args!("cannot write {}", path.display()))
}

/// Redraws until the user quits.
fn watch(args: &Top) -> Result<()> {
    let first = read(&args.sources)?;
    let mut terminal = ratatui::try_init().context("cannot draw on this terminal; try --once")?;
    let result = run(&mut terminal, args, first);
    ratatui::restore();
    result
}

fn run(terminal: &mut ratatui::DefaultTerminal, args: &Top, mut shown: View) -> Result<()> {
    let every = args.interval;
    let (mut offset, mut note, mut next) = (0usize, String::new(), Instant::now() + every);
    loop {
        terminal.draw(|frame| view::draw(frame, &shown, offset, &note)).context("cannot draw")?;
        if event::poll(next.saturating_duration_since(Instant::now())).context("cannot read the keyboard")? {
            if let Event::Key(key) = event::read().context("cannot read the keyboard")? {
                match key.code {
                    KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                    KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Ok(()),
                    KeyCode::Down | KeyCode::Char('j') => offset = offset.saturating_add(1),
                    KeyCode::Up | KeyCode::Char('k') => offset = offset.saturating_sub(1),
                    _ => {}
                }
            }
            continue;
        }
        next = Instant::now() + every;
        note = match read(&args.sources) {
            Ok(view) => {
                shown = view;
                view::KEYS.to_owned()
            }
            // The last reading stays on the screen: the process may have ended.
            Err(e) => e.to_string(),
        };
    }
}
