//! How far the copy is: a bar on a terminal, a line in the log now and then elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::watch;

use crate::snapshot::CopyState;

/// Between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Shows it for as long as it is polled.
pub(super) async fn show(mut copied: watch::Receiver<CopyState>) {
    let terminal = std::io::stderr().is_terminal();
    let mut bar: Option<ProgressBar> = None;
    let mut said: Option<Instant> = None;
    while copied.changed().await.is_ok() {
        let state = *copied.borrow_and_update();
        let ended = state.tables > 0 && state.tables_copied == state.tables;
        if terminal {
            draw(bar.get_or_insert_with(new_bar), &state);
            if ended && let Some(bar) = bar.take() {
                bar.finish();
            }
        } else if state.tables > 0 && (ended || said.is_none_or(|said| said.elapsed() >= LINE_INTERVAL)) {
            said = (!ended).then(Instant::now);
            tracing::info!("{}", line(&state));
        }
    }
}

fn new_bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    // A template that can't be parsed leaves the default one.
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent:>3} % {msg}") {
        bar.set_style(style);
    }
    bar
}

fn draw(bar: &ProgressBar, state: &CopyState) {
    bar.set_length(state.estimated_rows.max(state.rows).max(1));
    bar.set_position(state.rows);
    bar.set_message(line(state));
}

fn line(state: &CopyState) -> String {
    let left = state.seconds_left.map_or_else(String::new, |seconds| {
        format!(", {} left", humantime::format_duration(Duration::from_secs(seconds)))
    });
    format!(
        "copied {} of {} tables, {} of about {} rows, {}, {}/s{left}",
        state.tables_copied,
        state.tables,
        state.rows,
        state.estimated_rows.max(state.rows),
        ByteSize(state.bytes),
        ByteSize(state.bytes_per_second as u64),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_far_and_how_long() {
        let state = CopyState {
            tables: 3,
            tables_copied: 1,
            rows: 50,
            bytes: 2048,
            estimated_rows: 200,
            bytes_per_second: 1024.0,
            seconds_left: Some(75),
            ..CopyState::default()
        };
        let expected = "copied 1 of 3 tables, 50 of about 200 rows, 2.0 KiB, 1.0 KiB/s, 1m 15s left";
        assert_eq!(line(&state), expected);
    }
}
