//! Waiting, for threads and for asyncio: one future, and two ways to hear of its end.

use std::future::Future;
use std::pin::pin;
use std::sync::OnceLock;
use std::time::Duration;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::PyErr;
use pyo3::types::PyNone;
use pyo3::{IntoPyObject, IntoPyObjectExt, Py, PyAny, PyResult, Python, pyclass, pymethods};
use tokio::runtime::Runtime;
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout, timeout_at};

use crate::failure::Failure;

/// How often a thread that waits looks whether a signal came, such as Ctrl-C: soon enough for people.
const SIGNALS_EVERY: Duration = Duration::from_millis(100);

/// Something that is waited for by asyncio.
#[pyclass(frozen, module = "mandoline")]
pub(crate) struct Waiting(AbortHandle);

#[pymethods]
impl Waiting {
    /// Waits no longer. What was waited for goes on.
    fn cancel(&self) {
        self.0.abort();
    }
}

/// Waits for a future of at most so many seconds, without the interpreter's lock; or, if there is somebody to call, begins to.
///
/// Without `done` its result is returned, and `late` says what is wrong if there is none in time. With it, `done(result, error)` is
/// called from another thread, and what is returned is a [`Waiting`].
pub(crate) fn wait<T>(
    py: Python<'_>,
    seconds: Option<f64>,
    done: Option<Py<PyAny>>,
    late: impl FnOnce() -> String + Send + 'static,
    future: impl Future<Output = Result<T, Failure>> + Send + 'static,
) -> PyResult<Py<PyAny>>
where
    T: for<'py> IntoPyObject<'py> + Send + 'static,
{
    let runtime = runtime()?;
    let patience = seconds.map(length).transpose()?;
    let future = async move {
        match patience {
            None => future.await,
            Some(patience) => match timeout(patience, future).await {
                Ok(done) => done,
                Err(_) => Err(Failure::TimedOut(late())),
            },
        }
    };
    let Some(done) = done else {
        let value = block(py, runtime, future)??;
        return value.into_py_any(py);
    };
    let call = async move {
        let output = future.await;
        // Nothing to do once the interpreter ends.
        Python::try_attach(|py| {
            let result = output.map_err(PyErr::from).and_then(|value| value.into_py_any(py));
            let told = match result {
                Ok(value) => done.call1(py, (value, PyNone::get(py))),
                Err(error) => done.call1(py, (PyNone::get(py), error)),
            };
            if let Err(error) = told {
                error.write_unraisable(py, None);
            }
        });
    };
    let waiting = Waiting(runtime.spawn(call).abort_handle());
    Ok(Py::new(py, waiting)?.into_any())
}

/// Waits in this thread, which goes on hearing signals.
fn block<F>(py: Python<'_>, runtime: &Runtime, future: F) -> PyResult<F::Output>
where
    F: Future<Output: Send> + Send,
{
    let mut future = pin!(future);
    loop {
        let look = || {
            runtime.block_on(async {
                timeout_at(Instant::now() + SIGNALS_EVERY, future.as_mut()).await.ok()
            })
        };
        if let Some(output) = py.detach(look) {
            return Ok(output);
        }
        py.check_signals()?;
    }
}

/// Reads a length in seconds, as Python gives them.
pub(crate) fn length(seconds: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(seconds).map_err(|error| {
        Failure::Config(format!("{seconds} is no length of time in seconds: {error}")).into()
    })
}

/// The runtime that waits. Its one thread does not live on in a process that was forked off.
fn runtime() -> PyResult<&'static Runtime> {
    static RUNTIME: OnceLock<(u32, std::io::Result<Runtime>)> = OnceLock::new();
    let start = || {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(1).thread_name("mandoline-python").enable_time();
        (std::process::id(), runtime.build())
    };
    match RUNTIME.get_or_init(start) {
        (process, Ok(runtime)) if *process == std::process::id() => Ok(runtime),
        (_, Ok(_)) => Err(PyRuntimeError::new_err(
            "mandoline was used before this process was forked off, and its threads are not here: \
             start clerks and slicelets after the fork",
        )),
        (_, Err(error)) => Err(PyRuntimeError::new_err(format!("there is no thread: {error}"))),
    }
}
