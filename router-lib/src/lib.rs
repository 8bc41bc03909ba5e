//! Looks up which task owns a key, in nanoseconds, and tells a task what it owns.
