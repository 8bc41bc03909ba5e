//! Order among assignments, as a Python value.

use std::hash::{DefaultHasher, Hash, Hasher};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::types::{PyBytes, PyString, PyType};
use pyo3::{Borrowed, Bound, FromPyObject, PyAny, PyErr, PyResult, Python, pyclass, pymethods};

/// When an assignment was made: `1.42`. Later ones are greater.
#[pyclass(frozen, eq, ord, module = "mandoline", skip_from_py_object)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Generation(pub(crate) mandoline::Generation);

#[pymethods]
impl Generation {
    #[new]
    fn new(incarnation: u64, number: u64) -> Self {
        Self(mandoline::Generation { incarnation, number })
    }

    /// Reads `1.42`.
    #[staticmethod]
    fn parse(text: &str) -> PyResult<Self> {
        text.parse().map(Self).map_err(|error| PyValueError::new_err(format!("{error}")))
    }

    /// Raised when a backup is restored.
    #[getter]
    fn incarnation(&self) -> u64 {
        self.0.incarnation
    }

    /// Raised by each change.
    #[getter]
    fn number(&self) -> u64 {
        self.0.number
    }

    /// Sixteen bytes that sort as generations do: what a storage compares.
    #[pyo3(name = "to_bytes")]
    fn bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.to_be_bytes())
    }

    fn __str__(&self) -> String {
        self.0.to_string()
    }

    fn __repr__(&self) -> String {
        format!("Generation({}, {})", self.0.incarnation, self.0.number)
    }

    fn __hash__(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.0.hash(&mut hasher);
        hasher.finish()
    }

    /// For `pickle` and `copy`.
    fn __reduce__<'py>(&self, py: Python<'py>) -> (Bound<'py, PyType>, (u64, u64)) {
        (py.get_type::<Self>(), (self.0.incarnation, self.0.number))
    }
}

/// A generation as an argument: one, or its text, as it stands in a header.
pub(crate) struct Given(pub(crate) mandoline::Generation);

impl FromPyObject<'_, '_> for Given {
    type Error = PyErr;

    fn extract(given: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        if let Ok(generation) = given.cast::<Generation>() {
            return Ok(Self(generation.get().0));
        }
        let Ok(text) = given.cast::<PyString>() else {
            return Err(PyTypeError::new_err("a generation is a Generation, or text such as 1.42"));
        };
        Ok(Self(Generation::parse(&text.extract::<String>()?)?.0))
    }
}
