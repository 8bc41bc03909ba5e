//! A load played to a simulated service as `mandoline dev` plays it to a real one, and judged alike: the same windows, the
//! same sums. So what is simulated can be held against what happens.

use std::time::Duration;

use mandoline_core::key::SliceKey;
use mandoline_core::slice_map::SliceMap;
use mandoline_core::spec::JobSpec;
use mandoline_core::task::SessionId;

use crate::event::Event;
use crate::percentile::Percentiles;
use crate::service::Service;

/// How a load is played.
#[derive(Clone, Debug)]
pub struct Rehearsal {
    /// What is asked of the job.
    pub spec: JobSpec,
    /// How many tasks serve.
    pub tasks: usize,
    /// Who serves what when the load begins; whatever comes of the tasks' joining if nothing is said.
    pub layout: Option<SliceMap<SessionId>>,
    /// How long after a round tasks report, given a layout.
    pub lag: Duration,
    /// How long they have been up when the first request comes.
    pub idle: Duration,
    /// When one more task joins, after the first request.
    pub join_at: Option<Duration>,
    /// When a task drains, and which.
    pub drain_at: Option<(Duration, SessionId)>,
    /// Requests a second: like `dev --rate`, the recording's own times do not matter.
    pub rate: f64,
    /// How long; a recording is repeated until then.
    pub length: Duration,
}

/// What came of it: the figures that `dev --json` prints.
#[derive(Clone, Debug, PartialEq)]
pub struct Rehearsed {
    /// The median of max over mean of the tasks' load, by windows of 5 s after the first 20 s.
    pub imbalance_p50: f64,
    /// What was moved of all load, in parts of one round's load.
    pub load_churn: f64,
    /// How many moves that were.
    pub moves: u64,
}

/// As `dev` has them.
const WINDOW: Duration = Duration::from_secs(5);
const SETTLE: Duration = Duration::from_secs(20);

impl Rehearsal {
    /// Plays the events.
    pub fn play(&self, events: &[Event]) -> Rehearsed {
        let mut service = match &self.layout {
            Some(layout) => Service::with_layout(self.spec.clone(), self.tasks, layout, self.lag),
            None => Service::new(self.spec.clone(), self.tasks),
        };
        let start = service.now() + self.idle;
        service.advance(start);
        let churn = service.churn();
        let (mut before, mut next, mut found) = (service.totals(), SETTLE, vec![]);
        let (mut join_at, mut drain_at) = (self.join_at, self.drain_at);
        for (number, event) in events.iter().cycle().enumerate() {
            let at = Duration::from_secs_f64(number as f64 / self.rate);
            if let Some(due) = join_at.filter(|due| *due <= at) {
                service.advance(start + due);
                service.add_task();
                join_at = None;
            }
            if let Some((due, session)) = drain_at.filter(|(due, _)| *due <= at) {
                service.advance(start + due);
                service.drain_task(session);
                drain_at = None;
            }
            while next <= at && next < self.length {
                service.advance(start + next);
                let totals = service.totals();
                if next > SETTLE {
                    let loads = totals
                        .iter()
                        .map(|(task, total)| total - before.get(task).copied().unwrap_or_default());
                    let (sum, max) = loads.fold((0.0, 0.0_f64), |(s, m), l| (s + l, m.max(l)));
                    found.push(if sum > 0.0 { max * service.serving() as f64 / sum } else { 1.0 });
                }
                (before, next) = (totals, next + WINDOW);
            }
            // `dev` ends before a window that closes at the end is counted.
            if at >= self.length {
                break;
            }
            service.advance(start + at);
            service.request(SliceKey::of(event.key.as_bytes()), event.weight as f64);
        }
        let now = service.churn();
        Rehearsed {
            imbalance_p50: Percentiles::of(found).map_or(1.0, |found| found.p50),
            load_churn: (now.load - churn.load) as f64 / 1e6,
            moves: now.moves - churn.moves,
        }
    }
}
