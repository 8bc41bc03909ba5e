//! What a node counts, every name in one place: `mandoline_assigner_<noun>_<unit>`. Labels are few and bounded: jobs are at
//! most a thousand, and no key, slice or task is ever one.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// What a node counts. Clones count together.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// Calls of the admin service that were answered here, by call and code.
    pub admin_calls: Family<CallLabels, Counter>,
    /// Admin calls that were passed on to the leader.
    pub admin_forwarded: Counter,
    /// One while this node leads.
    pub leading: Gauge,
    /// The term of the log.
    pub term: Gauge,
    /// The newest log entry that this node has.
    pub last_log: Gauge,
    /// The newest log entry that this node has applied.
    pub applied: Gauge,
    /// Members of the cluster.
    pub members: Gauge,
    /// Streams of watchers that are open here.
    pub watchers: Gauge,
    /// Sessions of tasks that are open here.
    pub sessions: Gauge,
    /// Pauses that proxies hold requests for, or let them go on after.
    pub pauses: Gauge,
    /// The generation's number, by job.
    pub generation: Family<JobLabels, Gauge>,
    /// Tasks, by job.
    pub tasks: Family<JobLabels, Gauge>,
    /// Slices, by job.
    pub slices: Family<JobLabels, Gauge>,
    /// Slices that nobody serves, by job.
    pub unserved: Family<JobLabels, Gauge>,
    /// One while the job is frozen, by job.
    pub frozen: Family<JobLabels, Gauge>,
    /// Pins, by job.
    pub pins: Family<JobLabels, Gauge>,
    /// One while too many tasks are missing at once and nothing is reassigned, by job; zero where this node does not lead.
    pub brake: Family<JobLabels, Gauge>,
    /// Tasks that are missing meanwhile, by job.
    pub brake_missing: Family<JobLabels, Gauge>,
    /// For how long that has been so, by job.
    pub brake_seconds: Family<JobLabels, Gauge>,
    /// Ranges of keys that crash tasks and stay with one, by job.
    pub confined: Family<JobLabels, Gauge>,
    /// Moves of replicas since the job began, by job.
    pub moves: Family<JobLabels, Gauge>,
    /// Load moved since the job began, in multiples of the load at the time, by job.
    pub load_churn: Family<JobLabels, Gauge<f64, AtomicU64>>,
    /// Keys moved since the job began, in multiples of all keys, by job.
    pub key_churn: Family<JobLabels, Gauge<f64, AtomicU64>>,
    /// Callers that report what they offer, by job; zero where this node does not lead.
    pub callers: Family<JobLabels, Gauge>,
    /// What callers offered in the last round, in units a second, by job.
    pub offered: Family<JobLabels, Gauge<f64, AtomicU64>>,
    /// What failed of it, by job.
    pub failed: Family<JobLabels, Gauge<f64, AtomicU64>>,
    /// Tasks that report far more than their callers offered, by job.
    pub suspects: Family<JobLabels, Gauge>,
    /// Tasks that callers avoid, by job.
    pub outliers: Family<JobLabels, Gauge>,
}

/// Which call, and how it ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CallLabels {
    /// The call's name.
    pub call: &'static str,
    /// The gRPC code's name.
    pub code: Code,
}

/// A gRPC code as a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Code(pub tonic::Code);

impl prometheus_client::encoding::EncodeLabelValue for Code {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        use std::fmt::Write as _;
        write!(encoder, "{:?}", self.0)
    }
}

/// Which job.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct JobLabels {
    /// The job's name.
    pub job: String,
}

impl Metrics {
    /// Registers everything under its name.
    pub fn registry(&self) -> Registry {
        let mut registry = Registry::with_prefix("mandoline_assigner");
        let r = &mut registry;
        r.register("admin_calls", "Admin calls answered here", self.admin_calls.clone());
        r.register(
            "admin_forwarded",
            "Admin calls passed on to the leader",
            self.admin_forwarded.clone(),
        );
        r.register("leading", "One while this node leads", self.leading.clone());
        r.register("log_term", "The term of the log", self.term.clone());
        r.register("log_last_index", "The newest log entry here", self.last_log.clone());
        r.register("log_applied_index", "The newest log entry applied here", self.applied.clone());
        r.register("members", "Members of the cluster", self.members.clone());
        r.register("watchers", "Streams of watchers that are open here", self.watchers.clone());
        r.register("sessions", "Sessions of tasks that are open here", self.sessions.clone());
        r.register("pauses", "Pauses that hold or release requests", self.pauses.clone());
        r.register("job_generation", "The generation's number", self.generation.clone());
        r.register("job_tasks", "Tasks of the job", self.tasks.clone());
        r.register("job_slices", "Slices of the job", self.slices.clone());
        r.register("job_slices_unserved", "Slices that nobody serves", self.unserved.clone());
        r.register(
            "job_frozen",
            "One while an operator keeps slices where they are",
            self.frozen.clone(),
        );
        r.register(
            "job_pins",
            "Ranges of keys that an operator nailed to a task",
            self.pins.clone(),
        );
        r.register(
            "brake_holding",
            "One while too many tasks are missing at once and nothing is reassigned",
            self.brake.clone(),
        );
        r.register(
            "brake_missing_tasks",
            "Tasks that are missing while the brake holds",
            self.brake_missing.clone(),
        );
        r.register(
            "brake_held_seconds",
            "For how long the brake has held",
            self.brake_seconds.clone(),
        );
        r.register(
            "job_confined",
            "Ranges of keys that crash tasks and stay with one",
            self.confined.clone(),
        );
        r.register("job_moves", "Moves of replicas since the job began", self.moves.clone());
        r.register(
            "job_load_churn_ratio",
            "Load moved since the job began, in multiples of the load at the time",
            self.load_churn.clone(),
        );
        r.register(
            "job_key_churn_ratio",
            "Keys moved since the job began, in multiples of all keys",
            self.key_churn.clone(),
        );
        r.register(
            "job_callers",
            "Callers that report what they offer to the leader, which this node is",
            self.callers.clone(),
        );
        r.register(
            "job_offered_units",
            "What callers offered, in units a second as of the last round",
            self.offered.clone(),
        );
        r.register(
            "job_offered_failed_units",
            "What failed of that, in units a second",
            self.failed.clone(),
        );
        r.register(
            "job_tasks_suspect",
            "Tasks that report far more load than their callers offered them",
            self.suspects.clone(),
        );
        r.register(
            "job_tasks_avoided",
            "Tasks that callers avoid, since their requests to them fail though they heartbeat",
            self.outliers.clone(),
        );
        registry
    }
}

/// Writes a registry in the OpenMetrics text format.
pub fn render(registry: &Registry) -> String {
    let mut text = String::new();
    encode(&mut text, registry).expect("a string takes all that is written");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_has_a_name_and_a_help_text() {
        let metrics = Metrics::default();
        let labels = CallLabels { call: "ApplyJob", code: Code(tonic::Code::NotFound) };
        metrics.admin_calls.get_or_create(&labels).inc();
        metrics.generation.get_or_create(&JobLabels { job: "kv".to_owned() }).set(42);
        let text = render(&metrics.registry());
        let call = r#"mandoline_assigner_admin_calls_total{call="ApplyJob",code="NotFound"} 1"#;
        assert!(text.contains(call), "{text}");
        assert!(text.contains(r#"mandoline_assigner_job_generation{job="kv"} 42"#), "{text}");
        assert!(text.contains("# HELP mandoline_assigner_leading One while this node leads"));
        assert!(text.ends_with("# EOF\n"));
    }
}
