//! What happened, line by line, for whoever looks into a seed that failed. Off in a sweep: a seed that fails is run once
//! more with it, and does the same.

use std::fmt;

use mandoline_core::slice::Slice;
use mandoline_core::time::Time;

/// A line of a trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// When, in true time.
    pub at: Time,
    /// Who.
    pub who: String,
    /// Which keys it is about, if it is about some.
    pub slice: Option<Slice>,
    /// What happened.
    pub text: String,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>12} {:<10} {}", self.at.to_string(), self.who, self.text)?;
        match self.slice {
            Some(slice) => write!(f, " {slice}"),
            None => Ok(()),
        }
    }
}

/// What happened, line by line, if anyone wants to know.
#[derive(Clone, Debug, Default)]
pub struct Trace(Option<Vec<Line>>);

impl Trace {
    /// Keeps every line, or none.
    pub fn new(on: bool) -> Self {
        Self(on.then(Vec::new))
    }

    /// Notes a line, which is only made if it is kept.
    pub fn note(&mut self, line: impl FnOnce() -> Line) {
        if let Some(lines) = &mut self.0 {
            lines.push(line());
        }
    }

    /// Gives all lines.
    pub fn lines(&self) -> &[Line] {
        self.0.as_deref().unwrap_or_default()
    }

    /// Gives the newest lines about these keys or about everything, oldest first.
    pub fn about(&self, slice: Option<Slice>, count: usize) -> Vec<&Line> {
        let touches = |line: &&Line| match (line.slice, slice) {
            (Some(of), Some(slice)) => of.overlap(slice).is_some(),
            _ => true,
        };
        let mut lines: Vec<&Line> = self.lines().iter().rev().filter(touches).take(count).collect();
        lines.reverse();
        lines
    }
}
