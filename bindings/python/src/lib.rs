//! Mandoline for Python: the same clerk and the same slicelet, so that Python gives the same answers as Rust.
//!
//! What does not wait is answered here and now, with the interpreter's lock held for some hundred nanoseconds. What waits
//! (`wait`) is a future on a runtime of its own: a Python thread waits for it without the lock, or asyncio is called back. The
//! classes that users see are Python's (`python/mandoline`), on top of these: they choose between the two.

mod failure;
mod generation;
mod key;
mod wait;
mod connect;
mod clerk;
mod guard;
mod slicelet;

use pyo3::prelude::{PyModule, PyResult};
use pyo3::types::PyModuleMethods;
use pyo3::{Bound, pymodule, wrap_pyfunction};

/// Mandoline's clerk and slicelet. Use `mandoline` or `mandoline.aio`, not this.
#[pymodule]
fn _mandoline(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<generation::Generation>()?;
    module.add_class::<key::Slice>()?;
    module.add_class::<wait::Waiting>()?;
    module.add_class::<clerk::Clerk>()?;
    module.add_class::<clerk::Target>()?;
    module.add_class::<guard::Guard>()?;
    module.add_class::<slicelet::Slicelet>()?;
    module.add_class::<slicelet::Owner>()?;
    module.add_function(wrap_pyfunction!(key::slice_key, module)?)?;
    module.add_function(wrap_pyfunction!(key::grouped_slice_key, module)?)
}
