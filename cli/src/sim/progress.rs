//! How far a long computation is, on one line of a terminal that it takes away again. Elsewhere it says nothing, for logs
//! are not read while they grow.

use std::io::{IsTerminal as _, Write as _, stderr};
use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

/// A line on stderr that says how far something is.
#[derive(Debug)]
pub(crate) struct Progress {
    what: &'static str,
    total: Option<u64>,
    // Nothing where nobody looks.
    shown: Option<Mutex<Shown>>,
}

#[derive(Debug)]
struct Shown {
    done: u64,
    next: Instant,
}

impl Progress {
    /// Begins; `total` is how much there is to do, if that is known.
    pub(crate) fn new(what: &'static str, total: Option<u64>) -> Self {
        let shown = stderr().is_terminal().then(|| Shown { done: 0, next: Instant::now() });
        Self { what, total, shown: shown.map(Mutex::new) }
    }

    /// Says that more is done; any thread may.
    pub(crate) fn add(&self, more: u64) {
        let Some(shown) = &self.shown else { return };
        let mut shown = shown.lock().expect("drawing does not panic");
        shown.done += more;
        let now = Instant::now();
        if now >= shown.next {
            shown.next = now + EVERY;
            let text = text(self.what, shown.done, self.total);
            draw(&text);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown.is_some() {
            clear();
        }
    }
}

/// Takes the line away, if there may be one.
pub(crate) fn clear() {
    if stderr().is_terminal() {
        draw("");
    }
}

fn draw(text: &str) {
    // A terminal that is gone is no reason to stop.
    drop(write!(stderr(), "{START_OF_LINE}{text}"));
}

fn text(what: &str, done: u64, total: Option<u64>) -> String {
    let Some(total) = total else { return format!("{what} {done}") };
    let filled = (done.min(total) * BAR / total.max(1)) as usize;
    let (full, empty) = ("#".repeat(filled), "-".repeat(BAR as usize - filled));
    format!("{what} [{full}{empty}] {done}/{total}")
}

/// Often enough to be seen moving.
const EVERY: Duration = Duration::from_millis(100);
/// Fits a line of 80 with its words and numbers.
const BAR: u64 = 30;
/// To the first column, and clear what is there.
const START_OF_LINE: &str = "\r\x1b[K";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_fills_and_never_overflows() {
        assert_eq!(text("rounds", 7, None), "rounds 7");
        assert_eq!(text("x", 0, Some(2)), format!("x [{}] 0/2", "-".repeat(30)));
        assert_eq!(text("x", 2, Some(2)), format!("x [{}] 2/2", "#".repeat(30)));
        assert_eq!(text("x", 9, Some(2)), format!("x [{}] 9/2", "#".repeat(30)));
        assert_eq!(text("x", 0, Some(0)), format!("x [{}] 0/0", "-".repeat(30)));
    }
}
