//! Who owns a key.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mandoline::clerk::{Held, NotMoved, State};
use mandoline::{Address, JobName, SliceKey, Task};
use pyo3::types::{IntoPyDict, PyDict};
use pyo3::{Bound, Py, PyAny, PyResult, Python, pyclass, pymethods};

use crate::connect::connector;
use crate::failure::Failure;
use crate::generation::{Generation, Given};
use crate::key;
use crate::wait::{length, wait};

/// Where a key is served.
#[pyclass(frozen, module = "mandoline")]
pub(crate) struct Target {
    task: Arc<Task>,
    generation: mandoline::Generation,
    is_spilled: bool,
}

#[pymethods]
impl Target {
    /// Where the task serves requests: `host:port`.
    #[getter]
    fn address(&self) -> &str {
        self.task.info.address.as_str()
    }

    /// The task's name.
    #[getter]
    fn task(&self) -> &str {
        self.task.info.name.as_str()
    }

    /// The task's labels, such as its zone.
    #[getter]
    fn labels<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.task.info.labels.iter().into_py_dict(py)
    }

    /// The assignment that says so.
    #[getter]
    fn generation(&self) -> Generation {
        Generation(self.generation)
    }

    /// Whether the task is none of those that serve the key, and takes it because they are loaded above the job's cap.
    #[getter]
    fn is_spilled(&self) -> bool {
        self.is_spilled
    }

    fn __repr__(&self) -> String {
        format!("<Target {} at {} as of {}>", self.task(), self.address(), self.generation)
    }
}

/// Knows who owns every key of a job.
#[pyclass(frozen, subclass, module = "mandoline")]
pub(crate) struct Clerk {
    clerk: mandoline::Clerk,
}

#[pymethods]
impl Clerk {
    #[new]
    #[pyo3(signature = (job, sources, *, peers=vec![], cache=None, token=None, ca=None, name="python"))]
    fn new(
        job: &str,
        sources: Vec<String>,
        peers: Vec<String>,
        cache: Option<PathBuf>,
        token: Option<&str>,
        ca: Option<&[u8]>,
        name: &str,
    ) -> PyResult<Self> {
        let job = JobName::new(job).map_err(|error| Failure::config(&error))?;
        let builder = mandoline::Clerk::builder(job)
            .sources(addresses(&sources)?)
            .peers(addresses(&peers)?)
            .connector(connector(token, ca)?)
            .named(name);
        let builder = match cache {
            Some(path) => builder.cache(path),
            None => builder,
        };
        let clerk = builder.start().map_err(|error| Failure::config(&error))?;
        Ok(Self { clerk })
    }

    /// Finds the task that serves a key. Never waits.
    fn route(&self, key: &Bound<'_, PyAny>) -> PyResult<Target> {
        self.target(SliceKey::of(key::bytes(key)?))
    }

    /// Finds the task that serves a slice key, such as a grouped one. Never waits.
    fn route_at(&self, slice_key: u64) -> PyResult<Target> {
        self.target(SliceKey(slice_key))
    }

    /// Tells the clerk that a generation was seen elsewhere, such as on a request that a task turned away.
    fn refresh(&self, generation: Given) {
        self.clerk.refresh(generation.0);
    }

    /// The job's name.
    #[getter]
    fn job(&self) -> &str {
        self.clerk.job().as_str()
    }

    /// The generation of the newest assignment that is known.
    #[getter]
    fn generation(&self) -> Option<Generation> {
        self.clerk.assignment().map(|newest| Generation(newest.generation))
    }

    /// `empty`, `live` or `stale`; for how many seconds; and what went wrong last, if anything.
    fn _state(&self) -> (&'static str, f64, Option<String>) {
        let (state, lasting, why) = match self.clerk.state() {
            State::Empty { lasting, why } => ("empty", lasting, Some(why)),
            State::Live { lasting } => ("live", lasting, None),
            State::Stale { lasting, why } => ("stale", lasting, Some(why)),
        };
        (state, lasting.as_secs_f64(), why)
    }

    #[pyo3(signature = (timeout, done=None))]
    fn _ready(
        &self,
        py: Python<'_>,
        timeout: Option<f64>,
        done: Option<Py<PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        let (clerk, late) = (self.clerk.clone(), self.clerk.clone());
        let late = move || format!("no assignment came in time: {:?}", late.state());
        let ready = async move { Ok(Generation(clerk.ready().await.generation)) };
        wait(py, timeout, done, late, ready)
    }

    #[pyo3(signature = (generation, timeout, done=None))]
    fn _wait_for(
        &self,
        py: Python<'_>,
        generation: Given,
        timeout: Option<f64>,
        done: Option<Py<PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        let (clerk, wanted) = (self.clerk.clone(), generation.0);
        let patience = patience(timeout)?;
        let reached = async move {
            let reached = clerk.wait_for(wanted, patience).await;
            let newest = reached.map_err(|error| Failure::TimedOut(error.to_string()))?;
            Ok(Generation(newest.generation))
        };
        wait(py, None, done, String::new, reached)
    }

    #[pyo3(signature = (slice_key, generation, timeout, done=None))]
    fn _wait_moved(
        &self,
        py: Python<'_>,
        slice_key: u64,
        generation: Given,
        timeout: Option<f64>,
        done: Option<Py<PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        let (clerk, told, key) = (self.clerk.clone(), generation.0, SliceKey(slice_key));
        let patience = patience(timeout)?;
        let moved = async move {
            match clerk.wait_moved(key, told, patience).await {
                Ok(target) => Ok(Target::of(&target)),
                Err(NotMoved::NoTask(why)) => Err(why.into()),
                Err(error @ NotMoved::TimedOut { .. }) => Err(Failure::TimedOut(error.to_string())),
            }
        };
        wait(py, None, done, String::new, moved)
    }

    fn __repr__(&self) -> String {
        format!("<{:?}>", self.clerk)
    }
}

impl Clerk {
    fn target(&self, key: SliceKey) -> PyResult<Target> {
        let target = self.clerk.route_at(key).map_err(Failure::from)?;
        Ok(Target::of(&target))
    }
}

impl Target {
    fn of(target: &mandoline::Target<Held>) -> Self {
        let (task, generation) = (Arc::clone(target.task()), target.generation());
        Self { task, generation, is_spilled: target.is_spilled() }
    }
}

/// As long as timers go where no time is given: some thirty years.
const FOR_EVER: Duration = Duration::from_secs(1 << 30);

fn patience(seconds: Option<f64>) -> PyResult<Duration> {
    Ok(seconds.map(length).transpose()?.unwrap_or(FOR_EVER))
}

fn addresses(texts: &[String]) -> PyResult<Vec<Address>> {
    let addresses = texts.iter().map(|text| text.parse());
    addresses
        .collect::<Result<_, _>>()
        .map_err(|error: <Address as std::str::FromStr>::Err| Failure::config(&error).into())
}
