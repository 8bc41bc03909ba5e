//! What a task owns, and how loaded it is.

use std::collections::BTreeMap;
use std::sync::Arc;

use mandoline::SliceKey;
use mandoline::slicelet::{Builder, Claim, Shutdown, Slicelet as Inner, State};
use pyo3::prelude::PyAnyMethods;
use pyo3::{Bound, IntoPyObject, Py, PyAny, PyResult, Python, pyclass, pymethods};

use crate::connect::connector;
use crate::failure::Failure;
use crate::generation::Generation;
use crate::guard::Guard;
use crate::key::{self, Slice};
use crate::wait::{length, wait};

/// Who owns a key, as far as a task knows.
#[pyclass(frozen, module = "mandoline")]
pub(crate) struct Owner {
    owner: mandoline::slicelet::Owner,
}

#[pymethods]
impl Owner {
    /// Where another task serves the key, if one does.
    #[getter]
    fn address(&self) -> Option<&str> {
        self.owner.address.as_ref().map(|address| address.as_str())
    }

    /// The assignment that says so.
    #[getter]
    fn generation(&self) -> Generation {
        Generation(self.owner.generation)
    }

    fn __repr__(&self) -> String {
        format!("<Owner {} as of {}>", self.address().unwrap_or("nobody"), self.owner.generation)
    }
}

/// What a task knows of the slices that it owns.
#[pyclass(frozen, subclass, module = "mandoline")]
pub(crate) struct Slicelet {
    slicelet: Arc<Inner>,
}

#[pymethods]
impl Slicelet {
    #[new]
    #[pyo3(signature = (
        job, task, address, assigners, *, labels=BTreeMap::new(), capacity=1.0, revision="",
        watch_address=None, grace=25.0, on_added=None, on_removed=None, on_prepare=None,
        on_release=None, on_resume=None, token=None, ca=None
    ))]
    #[allow(clippy::too_many_arguments)] // they have names in Python
    fn new(
        job: &str,
        task: &str,
        address: &str,
        assigners: Vec<String>,
        labels: BTreeMap<String, String>,
        capacity: f64,
        revision: &str,
        watch_address: Option<&str>,
        grace: f64,
        on_added: Option<Py<PyAny>>,
        on_removed: Option<Py<PyAny>>,
        on_prepare: Option<Py<PyAny>>,
        on_release: Option<Py<PyAny>>,
        on_resume: Option<Py<PyAny>>,
        token: Option<&str>,
        ca: Option<&[u8]>,
    ) -> PyResult<Self> {
        let mut builder = Inner::builder(job, task, address)
            .assigners(assigners)
            .capacity(capacity)
            .revision(revision)
            .grace(length(grace)?)
            .connector(connector(token, ca)?);
        for (key, value) in &labels {
            builder = builder.label(key, value);
        }
        let told = |builder: Builder, call, tell: fn(Builder, Py<PyAny>) -> Builder| match call {
            Some(call) => tell(builder, call),
            None => builder,
        };
        builder = match watch_address {
            Some(address) => builder.watch_address(address),
            None => builder,
        };
        builder = told(builder, on_added, |b, call| b.on_added(move |all| tell_all(&call, all)));
        builder =
            told(builder, on_removed, |b, call| b.on_removed(move |all| tell_all(&call, all)));
        builder =
            told(builder, on_prepare, |b, call| b.on_prepare(move |one| tell(&call, Slice(one))));
        builder =
            told(builder, on_release, |b, call| b.on_release(move |one| tell(&call, Slice(one))));
        builder =
            told(builder, on_resume, |b, call| b.on_resume(move |one| tell(&call, Slice(one))));
        let slicelet = builder.start().map_err(|error| Failure::config(&error))?;
        Ok(Self { slicelet: Arc::new(slicelet) })
    }

    /// Says whether this task owns a key right now. Counts nothing.
    fn owns(&self, key: &Bound<'_, PyAny>) -> PyResult<bool> {
        Ok(self.slicelet.owns(key::bytes(key)?))
    }

    /// Says whether this task owns a slice key, such as a grouped one.
    fn owns_at(&self, slice_key: u64) -> bool {
        self.slicelet.owns_at(SliceKey(slice_key))
    }

    /// Takes a request in and counts what it costs. Raises `NotOwner` if another task owns its key.
    #[pyo3(signature = (key, cost=1.0, *, spilled=false))]
    fn claim(&self, key: &Bound<'_, PyAny>, cost: f64, spilled: bool) -> PyResult<()> {
        self.claim_at(SliceKey::of(key::bytes(key)?).0, cost, spilled)
    }

    /// Takes a request in at a slice key, such as a grouped one.
    #[pyo3(signature = (slice_key, cost=1.0, *, spilled=false))]
    fn claim_at(&self, slice_key: u64, cost: f64, spilled: bool) -> PyResult<()> {
        let key = SliceKey(slice_key);
        let claimed = match spilled {
            true => self.slicelet.claim_spilled_at(key, cost),
            false => self.slicelet.claim_at(key, cost),
        };
        match claimed.map_err(|error| Failure::config(&error))? {
            Claim::Mine => Ok(()),
            Claim::Elsewhere(owner) => {
                let (owner, generation) = (owner.address, owner.generation);
                Err(Failure::from(mandoline::slicelet::NotOwner::Elsewhere { owner, generation })
                    .into())
            }
        }
    }

    /// Takes a guard of a key, and counts what its request costs. Raises `NotOwner`.
    #[pyo3(signature = (key, cost=1.0))]
    fn acquire(&self, key: &Bound<'_, PyAny>, cost: f64) -> PyResult<Guard> {
        self.acquire_at(SliceKey::of(key::bytes(key)?).0, cost)
    }

    /// Takes a guard of a slice key, such as a grouped one.
    #[pyo3(signature = (slice_key, cost=1.0))]
    fn acquire_at(&self, slice_key: u64, cost: f64) -> PyResult<Guard> {
        let guard = self.slicelet.acquire_at(SliceKey(slice_key), cost);
        Ok(Guard::new(guard.map_err(Failure::from)?))
    }

    /// Counts what a request has cost, where that is known only afterwards.
    fn count(&self, key: &Bound<'_, PyAny>, cost: f64) -> PyResult<()> {
        let counted = self.slicelet.count(key::bytes(key)?, cost);
        counted.map_err(|error| Failure::config(&error).into())
    }

    /// Says who else owns a key.
    fn owner_of(&self, key: &Bound<'_, PyAny>) -> PyResult<Owner> {
        Ok(Owner { owner: self.slicelet.owner_of(key::bytes(key)?) })
    }

    /// The generation of the assignment in force.
    #[getter]
    fn generation(&self) -> Generation {
        Generation(self.slicelet.generation())
    }

    /// How many slices the task owns right now.
    #[getter]
    fn owned(&self) -> usize {
        self.slicelet.owned()
    }

    /// Where peers may watch, if they may.
    #[getter]
    fn watch_address(&self) -> Option<&str> {
        self.slicelet.watch_address().map(|address| address.as_str())
    }

    /// `attached`, `alone` or `stopped`; the session, if it has one; and what stands in the way, if anything.
    fn _state(&self) -> (&'static str, Option<u64>, Option<String>) {
        match self.slicelet.state() {
            State::Attached { session, .. } => ("attached", Some(session.0), None),
            State::Alone { why, .. } => ("alone", None, Some(why.to_string())),
            State::Stopped => ("stopped", None, None),
        }
    }

    #[pyo3(signature = (timeout, done=None))]
    fn _ready(
        &self,
        py: Python<'_>,
        timeout: Option<f64>,
        done: Option<Py<PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        let (slicelet, late) = (Arc::clone(&self.slicelet), Arc::clone(&self.slicelet));
        let late = move || format!("the task was not ready in time: {:?}", late.state());
        let ready = async move {
            slicelet.ready().await.map_err(Failure::NotReady)?;
            Ok(Generation(slicelet.generation()))
        };
        wait(py, timeout, done, late, ready)
    }

    /// Gives how many slices were still the task's.
    #[pyo3(signature = (done=None))]
    fn _shutdown(&self, py: Python<'_>, done: Option<Py<PyAny>>) -> PyResult<Py<PyAny>> {
        let slicelet = Arc::clone(&self.slicelet);
        let shutdown = async move {
            Ok(match slicelet.shutdown().await {
                Shutdown::Drained => 0,
                Shutdown::GraceOver { slices } => slices,
            })
        };
        wait(py, None, done, String::new, shutdown)
    }

    fn __repr__(&self) -> String {
        format!("<{:?}>", self.slicelet)
    }
}

/// Calls Python from the session's thread. What it raises is printed as Python prints what nobody can catch.
fn tell(call: &Py<PyAny>, what: impl for<'py> IntoPyObject<'py>) {
    // Nothing is called any more once the interpreter ends.
    Python::try_attach(|py| {
        if let Err(error) = call.bind(py).call1((what,)) {
            error.write_unraisable(py, Some(call.bind(py)));
        }
    });
}

fn tell_all(call: &Py<PyAny>, all: &[mandoline::Slice]) {
    tell(call, all.iter().copied().map(Slice).collect::<Vec<_>>());
}
