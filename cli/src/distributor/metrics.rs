//! What a distributor counts, every name in one place: `mandoline_distributor_<noun>_<unit>`. Made anew when someone asks.

use std::sync::atomic::AtomicU64;

use mandoline::clerk::State;
use mandoline_core::assignment::Assignment;
use mandoline_core::name::JobName;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// What a distributor knows, as numbers.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    /// Streams of watchers that are open here.
    pub(crate) watchers: Gauge,
    generation: Family<JobLabels, Gauge>,
    known: Family<JobLabels, Gauge>,
    stale: Family<JobLabels, Gauge<f64, AtomicU64>>,
}

/// Which job.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct JobLabels {
    job: String,
}

impl Metrics {
    /// Sets what is known of a job, and how well.
    pub(crate) fn job(&self, job: &JobName, known: Option<&Assignment>, state: &State) {
        let labels = || JobLabels { job: job.to_string() };
        let number = known.map_or(0, |known| known.generation.number);
        let number = i64::try_from(number).unwrap_or(i64::MAX);
        self.generation.get_or_create(&labels()).set(number);
        self.known.get_or_create(&labels()).set(i64::from(known.is_some()));
        let stale = match state {
            State::Live { .. } => 0.0,
            State::Stale { lasting, .. } | State::Empty { lasting, .. } => lasting.as_secs_f64(),
        };
        self.stale.get_or_create(&labels()).set(stale);
    }

    /// Gives everything in the OpenMetrics text format.
    pub(crate) fn text(&self) -> String {
        let mut registry = Registry::with_prefix("mandoline_distributor");
        let r = &mut registry;
        r.register("watchers", "Streams of watchers that are open here", self.watchers.clone());
        r.register("job_generation", "The generation's number", self.generation.clone());
        r.register("job_known", "One once the job's assignment is known", self.known.clone());
        r.register(
            "job_stale_seconds",
            "For how long nobody above has told what changes",
            self.stale.clone(),
        );
        let mut text = String::new();
        encode(&mut text, &registry).expect("text grows as it must");
        text
    }
}
