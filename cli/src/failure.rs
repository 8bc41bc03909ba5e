//! An error as an operator reads it: what went wrong, why, and what to try. Printed on stderr; the exit code is 2.

use std::fmt;

/// What went wrong, why, and what to try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    what: String,
    why: Option<String>,
    try_this: Option<String>,
}

impl Failure {
    /// Says what went wrong.
    pub(crate) fn new(what: impl fmt::Display) -> Self {
        Self { what: what.to_string(), why: None, try_this: None }
    }

    /// Adds why.
    #[must_use]
    pub(crate) fn because(mut self, why: impl fmt::Display) -> Self {
        self.why = Some(why.to_string());
        self
    }

    /// Adds the error below, with all that lie below that.
    #[must_use]
    pub(crate) fn caused_by(self, error: &dyn std::error::Error) -> Self {
        self.because(chain(error))
    }

    /// Says where in a file.
    #[must_use]
    pub(crate) fn at(mut self, place: impl fmt::Display) -> Self {
        self.what = format!("{place}: {}", self.what);
        self
    }

    /// Adds what to try.
    #[must_use]
    pub(crate) fn try_this(mut self, hint: impl fmt::Display) -> Self {
        self.try_this = Some(hint.to_string());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.what)?;
        if let Some(why) = &self.why {
            write!(f, "\n  why: {why}")?;
        }
        if let Some(hint) = &self.try_this {
            write!(f, "\n  try: {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}

/// Writes an error and its sources in one line, leaving out what a source merely repeats.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(below) = source {
        let more = below.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = below.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_says_what_why_and_what_to_try() {
        let failure = Failure::new("no answer").because("refused").try_this("start one");
        assert_eq!(failure.to_string(), "error: no answer\n  why: refused\n  try: start one");
        assert_eq!(Failure::new("no answer").to_string(), "error: no answer");
    }
}
