//! The integration tests: the real thing, as users run it.
