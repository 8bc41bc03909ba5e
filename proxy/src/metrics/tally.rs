//! Adds up what the workers have counted, when somebody asks.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use mandoline::gateways::Gateways;
use mandoline_core::generation::Generation;
use mandoline_core::task::SessionId;

use crate::metrics::counters::{Counters, RouteCounters};
use crate::metrics::names::{Count, TaskCount};
use crate::metrics::stats::{Knowledge, Reloads, RouteStats, Stats, TaskStats};
use crate::record::Outcome;

/// The counters of all workers, to be added up at any time from any thread.
#[derive(Clone)]
pub struct Tally {
    pub(super) workers: Arc<[Arc<Counters>]>,
    pub(super) known: Arc<dyn Fn() -> Knowledge + Send + Sync>,
}

impl fmt::Debug for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tally").field(&self.stats()).finish()
    }
}

impl Tally {
    pub(crate) fn new(
        workers: Arc<[Arc<Counters>]>,
        known: impl Fn() -> Knowledge + Send + Sync + 'static,
    ) -> Self {
        Self { workers, known: Arc::new(known) }
    }

    /// Adds everything up. Each number is right; two numbers may be a request apart.
    pub fn stats(&self) -> Stats {
        let [ended, closed] = [
            [Count::Answered, Count::Refused, Count::Failed, Count::Abandoned]
                .map(|c| self.sum(c))
                .iter()
                .sum(),
            self.sum(Count::ConnectionsClosed) + self.sum(Count::ConnectionsTurnedAway),
        ];
        // What has ended is read first, for it has begun.
        let tunnels_closed = self.sum(Count::TunnelsClosed);
        let (requests, known) = (self.sum(Count::Requests), (self.known)());
        let holds = self.sum(Count::Holds);
        let ends = [Count::HoldsReleased, Count::HoldsLate, Count::HoldsLeft, Count::HoldsFailed];
        let [released, late, left, failed] = ends.map(|c| self.sum(c));
        Stats {
            requests,
            in_flight: requests.saturating_sub(ended),
            answered: self.sum(Count::Answered),
            refused: self.sum(Count::Refused),
            failed: self.sum(Count::Failed),
            abandoned: self.sum(Count::Abandoned),
            first_try_right: self.sum(Count::FirstTryRight),
            retried: self.sum(Count::Retried),
            unserved: self.sum(Count::Unserved),
            spilled: self.sum(Count::Spilled),
            malformed: self.sum(Count::Malformed),
            holds,
            holds_released: released,
            holds_late: late,
            holds_left: left,
            holds_failed: failed,
            holds_refused: self.sum(Count::HoldsRefused),
            held: holds.saturating_sub(released + late + left + failed),
            held_bytes: known.held_bytes,
            connections: self.sum(Count::ConnectionsOpened).saturating_sub(closed),
            http2_connections: self.sum(Count::Http2Connections),
            proxy_headers_refused: self.sum(Count::ProxyHeaders),
            tls_failures: self.sum(Count::TlsFailures),
            floods: self.sum(Count::Floods),
            tls: known.tls,
            long_bodies: self.sum(Count::LongBodies),
            slow_bodies: self.sum(Count::SlowBodies),
            key_bodies_refused: self.sum(Count::KeyBodiesRefused),
            bad_chains: self.sum(Count::BadChains),
            tunnels: self.sum(Count::TunnelsOpened).saturating_sub(tunnels_closed),
            tunnels_refused: self.sum(Count::TunnelsRefused),
            tunnels_silent: self.sum(Count::TunnelsSilent),
            tunnels_cut: self.sum(Count::TunnelsCut),
            tunnel_bytes: [Count::TunnelBytesUp, Count::TunnelBytesDown].map(|c| self.sum(c)),
            connects: self.sum(Count::Connects),
            connect_failures: self.sum(Count::ConnectFailures),
            tasks: self.tasks(),
            routes: self.routes(),
            pauses: known.pauses,
            lookups: known.lookups,
            gateways: known.gateways.as_ref().map(Gateways::stats).unwrap_or_default(),
        }
    }

    /// Says whether each job that requests are routed to has an assignment.
    pub(crate) fn knows_all(&self) -> bool {
        (self.known)().jobs.iter().all(|known| known.generation != Generation::ZERO)
    }

    /// Says how configurations came into force, or not.
    pub(crate) fn reloads(&self) -> Reloads {
        (self.known)().reloads
    }

    pub(super) fn sum(&self, what: Count) -> u64 {
        self.workers.iter().map(|worker| worker.cells[what as usize].load(Relaxed)).sum()
    }

    pub(super) fn tasks(&self) -> BTreeMap<SessionId, TaskStats> {
        let mut sums = BTreeMap::new();
        for worker in &*self.workers {
            let tasks = worker.tasks.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            for (session, (address, counters)) in &*tasks {
                let empty = TaskStats {
                    address: address.clone(),
                    tried: 0,
                    answered: 0,
                    misdirected: 0,
                    releasing: 0,
                    failed: 0,
                };
                let sum: &mut TaskStats = sums.entry(*session).or_insert(empty);
                let now = |what: TaskCount| counters.cells[what as usize].load(Relaxed);
                sum.tried += now(TaskCount::Tried);
                sum.answered += now(TaskCount::Answered);
                sum.misdirected += now(TaskCount::Misdirected);
                sum.releasing += now(TaskCount::Releasing);
                sum.failed += now(TaskCount::Failed);
            }
        }
        sums
    }

    /// Gives each route's cells, of all workers.
    pub(super) fn route_counters(&self) -> BTreeMap<Arc<str>, Vec<Arc<RouteCounters>>> {
        let mut all: BTreeMap<Arc<str>, Vec<Arc<RouteCounters>>> = BTreeMap::new();
        for worker in &*self.workers {
            let routes = worker.routes.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            for (name, counters) in &*routes {
                all.entry(Arc::clone(name)).or_default().push(Arc::clone(counters));
            }
        }
        all
    }

    pub(super) fn routes(&self) -> BTreeMap<Arc<str>, RouteStats> {
        let sum = |workers: Vec<Arc<RouteCounters>>| {
            let mut stats = RouteStats::default();
            let (mut begun, mut ended) = (0, 0);
            for counters in workers {
                // What has ended is read first, for it has begun.
                for outcome in Outcome::ALL {
                    for (class, cell) in counters.ended[outcome as usize].iter().enumerate() {
                        let count = cell.load(Relaxed);
                        if count > 0 {
                            *stats.ended.entry((outcome, class as u8)).or_default() += count;
                        }
                        ended += count;
                    }
                }
                begun += counters.begun.load(Relaxed);
                stats.duration += Duration::from_nanos(counters.durations.nanos.load(Relaxed));
                stats.upstream += Duration::from_nanos(counters.upstream.nanos.load(Relaxed));
            }
            RouteStats { in_flight: begun.saturating_sub(ended), ..stats }
        };
        self.route_counters().into_iter().map(|(name, workers)| (name, sum(workers))).collect()
    }
}
