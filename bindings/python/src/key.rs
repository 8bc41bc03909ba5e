//! Keys and places, as Python values.

use mandoline::SliceKey;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::PyAnyMethods;
use pyo3::types::{PyBytes, PyBytesMethods, PyString, PyStringMethods, PyTypeMethods};
use pyo3::{Bound, PyAny, PyResult, pyclass, pyfunction, pymethods};

/// Lends a key's bytes: those of `bytes`, or the UTF-8 of `str`.
pub(crate) fn bytes<'a>(key: &'a Bound<'_, PyAny>) -> PyResult<&'a [u8]> {
    if let Ok(bytes) = key.cast::<PyBytes>() {
        return Ok(bytes.as_bytes());
    }
    if let Ok(text) = key.cast::<PyString>() {
        return Ok(text.to_str()?.as_bytes());
    }
    let kind = key.get_type().name()?.to_string();
    Err(PyTypeError::new_err(format!("a key is bytes or str, and not {kind}")))
}

/// Hashes a key to its slice key.
#[pyfunction]
pub(crate) fn slice_key(key: &Bound<'_, PyAny>) -> PyResult<u64> {
    Ok(SliceKey::of(bytes(key)?).0)
}

/// Places a member of a group: all members of a group lie together.
#[pyfunction]
pub(crate) fn grouped_slice_key(
    group: &Bound<'_, PyAny>,
    member: &Bound<'_, PyAny>,
) -> PyResult<u64> {
    Ok(SliceKey::grouped(bytes(group)?, bytes(member)?).0)
}

/// A run of slice keys, both ends included.
#[pyclass(frozen, eq, hash, ord, module = "mandoline", skip_from_py_object)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Slice(pub(crate) mandoline::Slice);

#[pymethods]
impl Slice {
    /// The first slice key.
    #[getter]
    fn first(&self) -> u64 {
        self.0.first().0
    }

    /// The last slice key, which belongs to the slice.
    #[getter]
    fn last(&self) -> u64 {
        self.0.last().0
    }

    fn __contains__(&self, slice_key: u64) -> bool {
        self.0.contains(SliceKey(slice_key))
    }

    fn __str__(&self) -> String {
        self.0.to_string()
    }

    fn __repr__(&self) -> String {
        format!("<Slice {}>", self.0)
    }
}
