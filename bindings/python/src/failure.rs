//! What goes wrong, as the exceptions of `mandoline._errors`. They are Python's own classes, with attributes that a handler can use.

use std::error::Error;
use std::fmt::Write;

use mandoline::slicelet::{NotOwner, NotReady};
use mandoline::snapshot::NoTask;
use pyo3::prelude::PyAnyMethods;
use pyo3::types::{PyModule, PyTuple};
use pyo3::{Bound, IntoPyObject, PyErr, PyResult, Python};

use crate::generation::Generation;

/// Why a call fails.
pub(crate) enum Failure {
    /// The task does not own a key.
    NotOwner(NotOwner),
    /// Nobody serves a key.
    NoTask(NoTask),
    /// A task cannot get ready.
    NotReady(NotReady),
    /// What was waited for did not come.
    TimedOut(String),
    /// What was given to start with is wrong.
    Config(String),
}

impl Failure {
    /// Takes an error that whoever starts something can do something about.
    pub(crate) fn config(error: &dyn Error) -> Self {
        Self::Config(chain(error))
    }
}

impl From<NotOwner> for Failure {
    fn from(why: NotOwner) -> Self {
        Self::NotOwner(why)
    }
}

impl From<NoTask> for Failure {
    fn from(why: NoTask) -> Self {
        Self::NoTask(why)
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        Python::attach(|py| exception(py, failure).unwrap_or_else(|error| error))
    }
}

fn exception(py: Python<'_>, failure: Failure) -> PyResult<PyErr> {
    let owner = |why: NotOwner| {
        let message = why.to_string();
        match why {
            NotOwner::Elsewhere { owner, generation } => {
                let owner = owner.map(|owner| owner.to_string());
                make(py, "NotOwner", (message, owner, Generation(generation)))
            }
            NotOwner::InTransit { id, generation } => {
                make(py, "InTransit", (message, id.to_string(), Generation(generation)))
            }
            NotOwner::NoLease { generation } => {
                make(py, "NoLease", (message, Generation(generation)))
            }
            NotOwner::Cost(error) => make(py, "ConfigError", (error.to_string(),)),
        }
    };
    match failure {
        Failure::NotOwner(why) => owner(why),
        Failure::NoTask(why) => {
            let generation = match why {
                NoTask::Unknown => None,
                NoTask::Nobody { generation, .. } => Some(Generation(generation)),
            };
            make(py, "NoTask", (why.to_string(), generation))
        }
        Failure::NotReady(why) => make(py, "NotReady", (chain(&why),)),
        Failure::TimedOut(message) => make(py, "TimedOut", (message,)),
        Failure::Config(message) => make(py, "ConfigError", (message,)),
    }
}

fn make<'py, A>(py: Python<'py>, name: &str, args: A) -> PyResult<PyErr>
where
    A: IntoPyObject<'py, Target = PyTuple, Output = Bound<'py, PyTuple>, Error = PyErr>,
{
    let class = PyModule::import(py, "mandoline._errors")?.getattr(name)?;
    Ok(PyErr::from_value(class.call1(args.into_pyobject(py)?)?))
}

/// An error and what it stems from, in a line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        write!(text, ": {error}").expect("a string takes it");
        source = error.source();
    }
    text
}
