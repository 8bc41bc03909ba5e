//! Keeps one server's place among the tasks of a job: a slicelet while it is healthy, none while it is not.
//!
//! A server that links nothing cannot say that it is unwell; its checks do. When enough of them fail its slices are moved
//! away as they are from a task that leaves in good order. But when the last healthy one of several is about to go, it is
//! likelier that the agent sees nothing any more than that all servers failed: that one stays until another is well.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use mandoline::slicelet::{Builder, Shutdown, Slicelet, State};
use mandoline_core::name::JobName;
use mandoline_core::task::{Address, Capacity, TaskInfo};
use mandoline_distributor::connect::Connector;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::agent::check::Check;
use crate::agent::judge::{Judge, Limits};
use crate::agent::list::Entry;
use crate::failure::Failure;
use crate::task::Label;
use crate::units::Span;

/// What all servers of an agent have in common.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) job: JobName,
    pub(crate) assigners: Vec<Address>,
    pub(crate) connector: Connector,
    pub(crate) check: Check,
    pub(crate) every: Duration,
    pub(crate) within: Duration,
    pub(crate) limits: Limits,
    /// A server that is not healthy after so long is a failure, if it may not take for ever.
    pub(crate) healthy_within: Option<Duration>,
    /// What it tells others of where the server is, if not where the checks go.
    pub(crate) advertise: Option<Address>,
    pub(crate) capacity: f64,
    pub(crate) labels: Vec<Label>,
    pub(crate) revision: String,
    pub(crate) grace: Duration,
    /// How many servers are listed, and how many of them are tasks that are not leaving.
    pub(crate) listed: AtomicUsize,
    pub(crate) serving: AtomicUsize,
}

impl Setup {
    fn task(&self, entry: &Entry) -> Builder {
        let address = self.advertise.as_ref().unwrap_or(&entry.address);
        let mut builder =
            Slicelet::builder(self.job.as_str(), entry.name.as_str(), address.as_str())
                .assigners(self.assigners.iter().map(Address::as_str))
                .connector(self.connector.clone())
                .capacity(self.capacity)
                .revision(&self.revision)
                .grace(self.grace)
                .probe(tokio::runtime::Handle::current());
        for Label { key, value } in self.labels.iter().chain(&entry.labels) {
            builder = builder.label(key, value);
        }
        builder
    }

    /// Checks that servers may be tasks at all, before anything is asked of anybody.
    pub(crate) fn check_tasks(&self, entries: &[Entry]) -> Result<(), Failure> {
        entries.iter().try_for_each(|entry| self.check_task(entry))
    }

    fn check_task(&self, entry: &Entry) -> Result<(), Failure> {
        let wrong = |error: &dyn std::error::Error| {
            Failure::new(format!("task {} cannot be registered", entry.name)).caused_by(error)
        };
        let mut info = TaskInfo::new(entry.name.clone(), 0, entry.address.clone());
        let labels = self.labels.iter().chain(&entry.labels);
        info.labels = labels.map(|label| (label.key.clone(), label.value.clone())).collect();
        info.revision.clone_from(&self.revision);
        info.capacity = Capacity::new(self.capacity).map_err(|error| wrong(&error))?;
        info.check().map_err(|error| wrong(&error))
    }

    fn start(&self, entry: &Entry) -> Result<Slicelet, Failure> {
        self.task(entry).start().map_err(|error| {
            Failure::new(format!("task {} cannot be registered", entry.name)).caused_by(&error)
        })
    }
}

/// A server that is a task.
struct Serving {
    setup: Arc<Setup>,
    slicelet: Slicelet,
    /// It is not leaving, and counts among those that serve.
    counts: bool,
}

impl Serving {
    fn begin(setup: &Arc<Setup>, entry: &Entry) -> Result<Self, Failure> {
        let slicelet = setup.start(entry)?;
        setup.serving.fetch_add(1, Ordering::Relaxed);
        Ok(Self { setup: Arc::clone(setup), slicelet, counts: true })
    }

    /// Asks to leave while another stays. Of two that ask at the same time one is refused.
    fn may_leave(&mut self) -> bool {
        let alone = self.setup.listed.load(Ordering::Relaxed) == 1;
        let leave = |serving: usize| (alone || serving > 1).then(|| serving - 1);
        let serving = &self.setup.serving;
        let left = serving.fetch_update(Ordering::Relaxed, Ordering::Relaxed, leave).is_ok();
        self.counts = !left;
        left
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if self.counts {
            self.setup.serving.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Keeps a server's place until told to stop, then has its slices moved away.
pub(crate) async fn keep(
    setup: Arc<Setup>,
    entry: Entry,
    stop: CancellationToken,
) -> Result<(), Failure> {
    let mut keeper = Keeper {
        judge: Judge::new(setup.limits),
        serving: None,
        held: false,
        said: Said::default(),
        began: Instant::now(),
        was_healthy: false,
        setup,
        entry,
    };
    let mut tick = interval(keeper.setup.every);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let checked = async {
            tick.tick().await;
            keeper.setup.check.ask(&keeper.entry.address, keeper.setup.within).await
        };
        tokio::select! {
            () = stop.cancelled() => break,
            outcome = checked => keeper.hear(outcome).await?,
        }
    }
    keeper.drain("told to stop").await;
    Ok(())
}

struct Keeper {
    setup: Arc<Setup>,
    entry: Entry,
    judge: Judge,
    serving: Option<Serving>,
    /// It is kept though it is not healthy.
    held: bool,
    said: Said,
    began: Instant,
    was_healthy: bool,
}

impl Keeper {
    async fn hear(&mut self, outcome: Result<(), String>) -> Result<(), Failure> {
        let (task, address) = (self.entry.name.clone(), self.entry.address.clone());
        let healthy = self.judge.hear(outcome.is_ok());
        match &outcome {
            Ok(()) => self.said.health = None,
            Err(why) if self.said.health.as_ref() != Some(why) => {
                let then =
                    if self.serving.is_some() { "may be moved away" } else { "begins when it is" };
                eprintln!("task {task} is not healthy, and {then}: {why}");
                self.said.health = Some(why.clone());
            }
            Err(_) => {}
        }
        self.was_healthy |= healthy;
        match (healthy, &mut self.serving) {
            (true, None) => {
                self.serving = Some(Serving::begin(&self.setup, &self.entry)?);
                eprintln!("task {task} is healthy: asking for slices for {address}");
            }
            (false, Some(serving)) => {
                if serving.may_leave() {
                    self.drain("not healthy").await;
                } else {
                    self.hold();
                }
            }
            _ => {}
        }
        self.held &= !healthy;
        self.check_patience(&outcome)?;
        self.check_session()
    }

    fn hold(&mut self) {
        if !std::mem::replace(&mut self.held, true) {
            let task = &self.entry.name;
            eprintln!("task {task} is kept though it is not healthy: no other is either");
        }
    }

    fn check_patience(&self, outcome: &Result<(), String>) -> Result<(), Failure> {
        let (Some(patience), Err(why), false) =
            (self.setup.healthy_within, outcome, self.was_healthy)
        else {
            return Ok(());
        };
        if self.began.elapsed() < patience {
            return Ok(());
        }
        let (task, patience) = (&self.entry.name, Span(patience));
        Err(Failure::new(format!("task {task} was not healthy within {patience}"))
            .because(why)
            .try_this(format!(
                "check the server and what it is asked (--health {}), or give it longer (--healthy-within)",
                self.setup.check
            )))
    }

    /// Says once what stands between the task and its slices. A job that has become exclusive ends the agent.
    fn check_session(&mut self) -> Result<(), Failure> {
        let Some(Serving { slicelet, .. }) = &self.serving else {
            self.said.session = None;
            return Ok(());
        };
        if slicelet.assignment().is_exclusive() {
            return Err(refuse_exclusive(&self.setup.job));
        }
        let why = match slicelet.state() {
            State::Alone { why, .. } => Some(why.to_string()),
            State::Attached { .. } | State::Stopped => None,
        };
        if why != self.said.session {
            let task = &self.entry.name;
            match &why {
                Some(why) => eprintln!("task {task} is not registered, and asks on: {why}"),
                None => eprintln!("task {task} is registered"),
            }
            self.said.session = why;
        }
        Ok(())
    }

    async fn drain(&mut self, why: &str) {
        let Some(serving) = self.serving.take() else { return };
        let task = &self.entry.name;
        eprintln!("task {task} is {why}: its slices are moved away");
        match serving.slicelet.shutdown().await {
            Shutdown::Drained => eprintln!("task {task} is drained"),
            Shutdown::GraceOver { slices } => {
                eprintln!("task {task} leaves {slices} slices that nobody took over");
            }
        }
        self.said.session = None;
    }
}

/// What was said last, so that it is said once.
#[derive(Debug, Default)]
struct Said {
    health: Option<String>,
    session: Option<String>,
}

/// Says why an agent has no place in an exclusive job.
pub(crate) fn refuse_exclusive(job: &JobName) -> Failure {
    Failure::new(format!("job {job} is exclusive: an agent cannot register a server for it"))
        .because(
            "a server that links nothing goes on serving a key after it has lost it, so two tasks would own it at a time",
        )
        .try_this(
            "link the library (`Slicelet::acquire`), or have a job with `consistency: affinity`, which allows that for a moment",
        )
}
