//! What a caller asks of tasks, slice by slice, whatever comes of it: told to the leader every period.
//!
//! A task counts what it takes; what it refuses, or what never reached it, only its callers know. Counting costs what it
//! costs a task (see `counters` and `hot`), and neither waits nor allocates.
//!
//! Where the assignment changes, only slices that stay as they were keep what was counted on them. How the load of one that
//! was split lies nobody here knows, and a guess would make some part of it look busier than its task says. What threads
//! add to a view that has just been replaced is lost: it is a few requests, and too little raises nothing.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use mandoline_core::key::SliceKey;
use mandoline_core::load::Load;
use mandoline_core::name::JobName;
use mandoline_core::offers::{AVOIDED_MAX, Caller, OFFER_MAX, Offer, SliceOffer};
use mandoline_core::report::{HOT_MAX, HotKey};
use mandoline_core::task::Address;
use mandoline_distributor::connect::Connector;
use mandoline_proto::pb;
use mandoline_proto::pb::offer_reply::Reply;
use mandoline_proto::pb::tasks_client::TasksClient;
use mandoline_proto::task::offer_message;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Code;

use crate::counters::{Tally, per_second};
use crate::dialer::{Dialer, Next};
use crate::hot::Hot;
use crate::snapshot::Snapshot;

/// How often what was offered is told until the leader has said how often tasks report.
const FIRST_EVERY: Duration = Duration::from_secs(1);
/// How long one who is asked may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// The longest window that an offer may have.
const WINDOW_MAX: Duration = Duration::from_secs(3_600);
/// After a refusal that only time can mend, so many periods are let go by: thousands of callers may hear the same.
const REFUSED_PERIODS: u32 = 12;

/// Counts what is offered.
pub(crate) struct Offered {
    view: ArcSwap<View>,
    hot: Hot,
}

struct View {
    snapshot: Arc<Snapshot>,
    offered: Tally,
    failed: Tally,
}

impl View {
    fn new(snapshot: Arc<Snapshot>) -> Self {
        let slices = snapshot.assignment().slices.count();
        Self { snapshot, offered: Tally::new(slices), failed: Tally::new(slices) }
    }
}

impl Offered {
    /// Begins with nothing.
    pub(crate) fn new(snapshot: Arc<Snapshot>) -> Self {
        Self { view: ArcSwap::from_pointee(View::new(snapshot)), hot: Hot::new() }
    }

    /// Counts a request, as it is sent on its way.
    pub(crate) fn offer(&self, key: SliceKey, thousandths: u64) {
        let view = self.view.load();
        view.offered.add(view.snapshot.index_of(key), thousandths);
        self.hot.note(key, thousandths);
    }

    /// Counts that a request which was offered has failed.
    pub(crate) fn fail(&self, key: SliceKey, thousandths: u64) {
        let view = self.view.load();
        view.failed.add(view.snapshot.index_of(key), thousandths);
    }

    /// Goes on by another snapshot. One caller at a time.
    pub(crate) fn install(&self, snapshot: Arc<Snapshot>) {
        let new = Arc::new(View::new(snapshot));
        let old = self.view.swap(Arc::clone(&new));
        let (before, after) =
            (&old.snapshot.assignment().slices, &new.snapshot.assignment().slices);
        for (index, (slice, _)) in after.iter().enumerate() {
            let place = before.index_of(slice.first());
            if before.slice_at(place) == slice {
                new.offered.add(index, old.offered.take(place));
                new.failed.add(index, old.failed.take(place));
            }
        }
    }

    /// Takes what was offered over a window that ends now.
    fn take(&self, caller: Caller, window: Duration) -> Offer {
        let view = self.view.load();
        let slices = &view.snapshot.assignment().slices;
        let part = |index| {
            let load = per_second(view.offered.take(index), window);
            // A request may have been offered in the window before.
            let failed = per_second(view.failed.take(index), window).min(load);
            SliceOffer { slice: slices.slice_at(index), load, failed }
        };
        let parts = (0..slices.count()).map(part).filter(|part| part.load > Load::ZERO);
        let slices = heaviest(parts.collect());
        let hot = self.hot.take().worth_telling().into_iter().take(HOT_MAX);
        let hot =
            hot.map(|heavy| HotKey { key: heavy.key, load: per_second(heavy.at_least(), window) });
        let mut hot: Vec<HotKey> = hot.collect();
        hot.sort_unstable();
        let avoided = view.snapshot.avoided().map(|task| task.session).take(AVOIDED_MAX).collect();
        Offer { caller, window, slices, hot, avoided }
    }
}

/// Keeps the heaviest, where there are more than an offer may name.
fn heaviest(mut parts: Vec<SliceOffer>) -> Vec<SliceOffer> {
    if parts.len() > OFFER_MAX {
        parts.sort_unstable_by_key(|part| (std::cmp::Reverse(part.load), part.slice));
        parts.truncate(OFFER_MAX);
        parts.sort_unstable_by_key(|part| part.slice);
    }
    parts
}

/// Tells the leader what is offered, period by period.
pub(crate) struct Reporter {
    job: JobName,
    caller: Caller,
    connector: Connector,
    dialer: Dialer,
    every: Duration,
    // Whoever took the last offer.
    leader: Option<Leader>,
    // Said once, until it goes well again.
    refused: bool,
}

struct Leader {
    address: Address,
    client: Client,
}

type Client = TasksClient<
    tonic::service::interceptor::InterceptedService<
        tonic::transport::Channel,
        mandoline_distributor::connect::Authorize,
    >,
>;

/// What became of an offer at one address.
enum Answer {
    Taken {
        every: Duration,
    },
    Elsewhere(Option<Address>),
    /// Nobody would take it.
    Refused(String),
    /// This one cannot.
    Failed(String),
}

impl Reporter {
    /// Asks `sources` who leads. Those that are no assigners are passed over.
    pub(crate) fn new(
        job: JobName,
        number: u64,
        sources: Vec<Address>,
        connector: Connector,
    ) -> Self {
        let (caller, dialer) = (Caller(number), Dialer::new(sources, number));
        let (every, leader, refused) = (FIRST_EVERY, None, false);
        Self { job, caller, connector, dialer, every, leader, refused }
    }

    /// Runs until told to stop.
    pub(crate) async fn run(mut self, offered: Arc<Offered>, stop: CancellationToken) {
        let mut began = Instant::now();
        let mut let_go_by = 0_u32;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep(self.every) => {}
            }
            let now = Instant::now();
            let window = now.duration_since(began);
            began = now;
            let offer = offered.take(self.caller, window);
            // A machine that slept through more than a window may be has nothing to say of it.
            if let_go_by > 0 || window > WINDOW_MAX {
                let_go_by = let_go_by.saturating_sub(1);
                continue;
            }
            let message = offer_message(&self.job, &offer);
            tokio::select! {
                () = stop.cancelled() => return,
                taken = self.tell(message) => if !taken { let_go_by = REFUSED_PERIODS },
            }
        }
    }

    /// Asks one after the other until the offer is taken or everyone was asked. Says no where it was refused for good.
    async fn tell(&mut self, message: pb::Offer) -> bool {
        loop {
            let leader = match self.leader.take() {
                Some(leader) => leader,
                None => match self.dialer.next() {
                    Next::Dial(address) => match self.dial(address) {
                        Some(leader) => leader,
                        None => continue,
                    },
                    // Everyone was asked: the next period tries again, with what is offered then.
                    Next::Wait(_) => return true,
                },
            };
            let address = leader.address.clone();
            match ask(leader.client.clone(), message.clone()).await {
                Answer::Taken { every } => {
                    self.dialer.attached(every);
                    (self.leader, self.every, self.refused) = (Some(leader), every, false);
                    return true;
                }
                Answer::Elsewhere(Some(leader)) => self.dialer.redirected(leader),
                Answer::Elsewhere(None) => {}
                Answer::Refused(problem) => {
                    if !std::mem::replace(&mut self.refused, true) {
                        tracing::warn!(%address, problem, "What this caller offers is not heard");
                    }
                    return false;
                }
                Answer::Failed(problem) => {
                    tracing::debug!(%address, problem, "cannot tell what is offered here");
                }
            }
        }
    }

    fn dial(&self, address: Address) -> Option<Leader> {
        let endpoint = self.connector.endpoint(&address).ok()?;
        let (channel, authorize) = (endpoint.connect_lazy(), self.connector.authorize());
        let client = TasksClient::with_interceptor(channel, authorize);
        Some(Leader { address, client })
    }
}

async fn ask(mut client: Client, message: pb::Offer) -> Answer {
    let Ok(answered) = timeout(PATIENCE, client.offer(message)).await else {
        return Answer::Failed(format!("no answer within {PATIENCE:?}"));
    };
    match answered.map(|response| response.into_inner().reply) {
        Ok(Some(Reply::Taken(taken))) => {
            let every = Duration::from_millis(taken.report_every_ms);
            let sensible =
                (Duration::from_millis(10)..=Duration::from_secs(3_600)).contains(&every);
            Answer::Taken { every: if sensible { every } else { FIRST_EVERY } }
        }
        Ok(Some(Reply::Redirect(redirect))) => Answer::Elsewhere(redirect.address.parse().ok()),
        Ok(None) => Answer::Failed("it said nothing".to_owned()),
        Err(status) => {
            let said = format!("{}: {}", status.code(), status.message());
            match status.code() {
                Code::InvalidArgument | Code::ResourceExhausted | Code::Unauthenticated => {
                    Answer::Refused(said)
                }
                _ => Answer::Failed(said),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use mandoline_core::assignment::Assignment;
    use mandoline_core::generation::Generation;
    use mandoline_core::slice::Slice;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn snapshot(splits: &[u64]) -> Arc<Snapshot> {
        let mut made = Assignment::new("kv".parse().unwrap(), Generation::ZERO);
        splits.iter().for_each(|at| made.slices.split(SliceKey(*at)));
        Arc::new(Snapshot::of(Arc::new(made)))
    }

    fn slice(first: u64, last: u64) -> Slice {
        Slice::new(SliceKey(first), SliceKey(last)).unwrap()
    }

    fn part(slice: Slice, load: u64, failed: u64) -> SliceOffer {
        SliceOffer { slice, load: Load::from_milli(load), failed: Load::from_milli(failed) }
    }

    #[test]
    fn what_is_offered_is_told_once_with_what_failed_of_it() {
        let offered = Offered::new(snapshot(&[100]));
        for _ in 0..6 {
            offered.offer(SliceKey(7), 1_000);
        }
        offered.offer(SliceKey(100), 500);
        offered.fail(SliceKey(7), 1_000);
        // It was offered in a window before.
        offered.fail(SliceKey(100), 2_000);
        let offer = offered.take(Caller(1), SECOND * 2);
        assert_eq!(offer.check(), Ok(()));
        let (low, high) = (slice(0, 99), slice(100, u64::MAX));
        assert_eq!(offer.slices, [part(low, 3_000, 500), part(high, 250, 250)]);
        assert_eq!(offer.hot, [HotKey { key: SliceKey(7), load: Load::from_milli(3_000) }]);
        assert!(offered.take(Caller(1), SECOND).slices.is_empty());
    }

    #[test]
    fn slices_that_stay_keep_their_counts_and_others_begin_anew() {
        let offered = Offered::new(snapshot(&[100, 200]));
        for key in [7, 100, 200] {
            offered.offer(SliceKey(key), 1_000);
        }
        offered.install(snapshot(&[50, 100, 200]));
        offered.offer(SliceKey(60), 1_000);
        let told = offered.take(Caller(1), SECOND).slices;
        let expected = [
            part(slice(50, 99), 1_000, 0),
            part(slice(100, 199), 1_000, 0),
            part(slice(200, u64::MAX), 1_000, 0),
        ];
        assert_eq!(told, expected);
    }

    #[test]
    fn the_heaviest_slices_are_told_in_their_order() {
        let count = OFFER_MAX as u64 + 10;
        let all = (0..count).map(|n| part(slice(n, n), (n * 7) % count, 0)).collect();
        let kept = heaviest(all);
        assert_eq!(kept.len(), OFFER_MAX);
        assert!(kept.is_sorted_by_key(|part| part.slice));
        assert!(kept.iter().all(|part| part.load.milli() >= 10));
    }

    #[test]
    fn counting_allocates_nothing() {
        let offered = Offered::new(snapshot(&[100]));
        let count = || {
            for key in 0..5_000 {
                offered.offer(SliceKey(key), 1_000);
                offered.fail(SliceKey(key), 1_000);
            }
        };
        // The first time a thread is given its lane.
        offered.offer(SliceKey(1), 1_000);
        assert_eq!(allocation_counter::measure(count).count_total, 0);
    }
}
