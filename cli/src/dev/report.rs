//! What a run shows: a line a second, and the sums at its end.

use std::collections::VecDeque;
use std::sync::Arc;

use mandoline_core::assignment::Assignment;
use mandoline_core::state::Churn;
use mandoline_core::task::Phase;
use serde_json::{Value, json};

use crate::dev::town::Town;
use crate::drive::Driver;
use crate::drive::ledger::{Totals, Window};

/// Seconds of a window that imbalance is measured over.
const WINDOW_SECONDS: usize = 5;
/// Seconds at the start that are no measure of balance: nothing is known of the load yet.
const SETTLE_SECONDS: usize = 20;

/// What a run shows.
#[derive(Debug)]
pub(crate) struct Report {
    seconds: usize,
    churn_before: Churn,
    totals: Totals,
    right_before: (u64, u64),
    /// The newest seconds, for the line: the load of each, and how many tasks served.
    recent: VecDeque<(Window, usize)>,
    /// The same of the window under way, for the sums.
    gathered: Vec<(Window, usize)>,
    imbalances: Vec<f64>,
    best: Vec<f64>,
}

impl Report {
    /// Begins to count.
    pub(crate) fn new(town: &Town) -> Self {
        Self {
            seconds: 0,
            churn_before: town.churn(),
            totals: Totals::default(),
            right_before: (0, 0),
            recent: VecDeque::new(),
            gathered: vec![],
            imbalances: vec![],
            best: vec![],
        }
    }

    /// Takes what happened in the last second, and says it in a line.
    pub(crate) fn second(&mut self, town: &Town, driver: &Driver) -> String {
        self.seconds += 1;
        let newest = town.newest();
        let tasks = newest.as_deref().map_or(0, serving);
        let totals = driver.totals();
        let window = driver.window();
        self.gather(&window, tasks);
        self.recent.push_back((window, tasks));
        if self.recent.len() > WINDOW_SECONDS {
            self.recent.pop_front();
        }
        let (recent, tasks) = joined(&self.recent);
        let (all, right) = town.first_tries();
        let (all_before, right_before) = std::mem::replace(&mut self.right_before, (all, right));
        let churn = since(town.churn(), self.churn_before);
        let line = format!(
            "{:>4}s  {:>6} req/s  first try {:>7}  max/mean {:>5.2}  slices {:>4}  moves {:>4}  moved load {:>6.1}% keys {:>6.1}%  generation {}{}",
            self.seconds,
            totals.requests - self.totals.requests,
            percent(right - right_before, all - all_before),
            recent.imbalance(tasks),
            newest.as_ref().map_or(0, |newest| newest.slices.count()),
            churn.moves,
            churn.load as f64 / 1e4,
            churn.keys as f64 / 1e4,
            newest.as_ref().map_or_else(String::new, |newest| newest.generation.to_string()),
            if totals.failed > 0 { format!("  failed {}", totals.failed) } else { String::new() },
        );
        self.totals = totals;
        line
    }

    /// Adds a second to the window under way, and closes it when it is full.
    fn gather(&mut self, second: &Window, tasks: usize) {
        if self.seconds <= SETTLE_SECONDS {
            return;
        }
        self.gathered.push((second.clone(), tasks));
        if self.gathered.len() < WINDOW_SECONDS {
            return;
        }
        let (window, tasks) = joined(&self.gathered);
        self.gathered.clear();
        self.imbalances.push(window.imbalance(tasks));
        self.best.push(window.best_imbalance(tasks));
    }

    /// Takes the last sums, once the load has ended.
    pub(crate) fn end(&mut self, driver: &Driver) {
        self.totals = driver.totals();
    }

    /// Sums the run up.
    pub(crate) fn finish(mut self, town: &Town) -> Value {
        for error in &self.totals.errors {
            eprintln!("failed: {error}");
        }
        let churn = since(town.churn(), self.churn_before);
        let (all, right) = town.first_tries();
        json!({
            "requests": self.totals.requests,
            "failed": self.totals.failed,
            "first_try_share": (all > 0).then(|| right as f64 / all as f64),
            "imbalance_p50": quantile(&mut self.imbalances, 0.50),
            "imbalance_p99": quantile(&mut self.imbalances, 0.99),
            "best_imbalance_p50": quantile(&mut self.best, 0.50),
            "moves": churn.moves,
            "key_churn": churn.keys as f64 / 1e6,
            "load_churn": churn.load as f64 / 1e6,
            "generation": town.newest().map(|newest: Arc<Assignment>| newest.generation.to_string()),
        })
    }
}

/// Makes one window of several seconds. Where a task came or went meanwhile the greater number counts: that shows the
/// imbalance greater than it was, never smaller.
fn joined<'a>(seconds: impl IntoIterator<Item = &'a (Window, usize)>) -> (Window, usize) {
    let (mut window, mut tasks) = (Window::default(), 1);
    for (second, serving) in seconds {
        window.add(second);
        tasks = tasks.max(*serving);
    }
    (window, tasks)
}

fn serving(assignment: &Assignment) -> usize {
    assignment.tasks.values().filter(|task| task.phase == Phase::Serving).count()
}

const fn since(now: Churn, before: Churn) -> Churn {
    Churn {
        moves: now.moves - before.moves,
        keys: now.keys - before.keys,
        load: now.load - before.load,
    }
}

fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".to_owned() } else { format!("{:.2}%", part as f64 * 100.0 / whole as f64) }
}

/// The value that a share of all does not exceed: the nearest rank.
fn quantile(values: &mut [f64], share: f64) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    let rank = (values.len() as f64 * share).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_a_value_that_was_measured() {
        let mut values = vec![3.0, 1.0, 2.0];
        assert_eq!(quantile(&mut values, 0.5), Some(2.0));
        assert_eq!(quantile(&mut values, 0.99), Some(3.0));
        assert_eq!(quantile(&mut [], 0.5), None);
    }
}
