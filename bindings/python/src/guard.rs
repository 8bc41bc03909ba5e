//! The word that a task owns a key, as a context manager.

use std::sync::{Arc, Mutex, PoisonError};

use mandoline::slicelet::Guard as Inner;
use pyo3::types::PyTuple;
use pyo3::{Bound, Py, PyAny, PyRef, PyResult, Python, pyclass, pymethods};
use tokio::sync::watch;

use crate::generation::Generation;
use crate::wait::wait;

/// Holds a key while a request works on it: `with slicelet.acquire(key) as guard:`.
#[pyclass(frozen, module = "mandoline")]
pub(crate) struct Guard {
    /// None once it was let go of.
    held: Mutex<Option<Held>>,
    token: mandoline::Generation,
    since: mandoline::Generation,
}

struct Held {
    guard: Arc<Inner>,
    /// Dropped when the guard is let go of, so that who waits for its loss lets go as well: a hand-off waits for all.
    open: watch::Sender<()>,
}

impl Guard {
    pub(crate) fn new(guard: Inner) -> Self {
        let (token, since) = (guard.fencing_token(), guard.since());
        let held = Held { guard: Arc::new(guard), open: watch::Sender::new(()) };
        Self { held: Mutex::new(Some(held)), token, since }
    }

    fn held<T>(&self, look: impl FnOnce(&Held) -> T) -> Option<T> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(look)
    }
}

#[pymethods]
impl Guard {
    /// Says whether the key is still owned, without a break since the guard was taken. Ask before you answer. Once it says no it
    /// never says yes again, and it says no once the guard was let go of.
    fn still_owned(&self) -> bool {
        self.held(|held| held.guard.still_owned()).unwrap_or(false)
    }

    /// The key's fencing token, for storage to refuse whoever owned the key before.
    #[getter]
    fn fencing_token(&self) -> Generation {
        Generation(self.token)
    }

    /// Since when the key has been owned without a break.
    #[getter]
    fn since(&self) -> Generation {
        Generation(self.since)
    }

    /// Lets go of the key. Twice does no harm.
    fn release(&self) {
        drop(self.held.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Waits until the key is no longer owned, or the guard was let go of.
    #[pyo3(signature = (timeout, done=None))]
    fn _lost(
        &self,
        py: Python<'_>,
        timeout: Option<f64>,
        done: Option<Py<PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        let held = self.held(|held| (Arc::clone(&held.guard), held.open.subscribe()));
        let lost = async move {
            if let Some((guard, mut open)) = held {
                tokio::select! {
                    () = guard.lost() => {}
                    _ = open.changed() => {}
                }
            }
            Ok(())
        };
        wait(py, timeout, done, || "the key is still owned".to_owned(), lost)
    }

    fn __enter__(this: PyRef<'_, Self>) -> PyRef<'_, Self> {
        this
    }

    #[pyo3(signature = (*_error))]
    fn __exit__(&self, _error: &Bound<'_, PyTuple>) {
        self.release();
    }

    fn __repr__(&self) -> String {
        let state = if self.still_owned() { "held" } else { "over" };
        format!("<Guard {state}, token {}>", self.token)
    }
}
