//! The access log: a line for each request, or for a share of them and all that failed or were slow.
//!
//! A worker makes the line when the request has ended and hands it to a thread that writes (`writer`), or drops it where that
//! thread does not keep up: no request ever waits for a disk or a pipe.

pub mod field;
mod timestamp;
mod value;
pub mod format;
pub mod writer;

use std::time::{Duration, SystemTime};

use mandoline_core::prng::Prng;
use mandoline_core::spec::Ratio;

use crate::access_log::format::Format;
use crate::access_log::writer::Writer;
use crate::record::{Outcome, Record, RequestInfo};

/// Which requests are told of, how, and where to.
#[derive(Clone, Debug)]
pub struct AccessLog {
    /// Who writes.
    pub writer: Writer,
    /// What a line looks like.
    pub format: Format,
    /// The share of requests that is told of. Those that fail are always.
    pub share: Ratio,
    /// From which duration on a request is told of in any case, if from any.
    pub slow: Option<Duration>,
}

impl AccessLog {
    /// Tells of every request.
    pub const fn new(writer: Writer, format: Format) -> Self {
        Self { writer, format, share: Ratio::percent(100), slow: None }
    }

    /// Tells of a request that has ended, if it is to be told of.
    pub(crate) fn tell(&self, record: &Record, request: &RequestInfo, chance: &mut Prng) {
        if self.wants(record, chance) {
            self.writer.write(self.format.line(record, request, SystemTime::now()));
        }
    }

    fn wants(&self, record: &Record, chance: &mut Prng) -> bool {
        record.outcome == Outcome::Failed
            || self.slow.is_some_and(|slow| record.duration >= slow)
            || chance.below(1_000_000) < self.share.millionths().into()
    }
}

#[cfg(test)]
mod tests {
    use mandoline_core::generation::Generation;

    use super::*;

    fn record(outcome: Outcome, duration: Duration) -> Record {
        Record {
            route: None,
            key: None,
            generation: Generation::ZERO,
            first: None,
            last: None,
            first_try_right: true,
            tries: 1,
            status: Some(200),
            outcome,
            held: Duration::ZERO,
            upstream: Duration::ZERO,
            duration,
            bytes_out: 0,
        }
    }

    #[test]
    fn a_share_is_told_of_and_all_that_failed_or_were_slow() {
        let mut log = AccessLog::new(Writer::idle(), Format::usual());
        let mut chance = Prng::new(7);
        let quick = record(Outcome::Answered, Duration::from_millis(1));
        let mut told_of = |log: &AccessLog, record: &Record| {
            (0..10_000).filter(|_| log.wants(record, &mut chance)).count()
        };
        assert_eq!(told_of(&log, &quick), 10_000);
        log.share = Ratio::percent(10);
        let told = told_of(&log, &quick);
        assert!((900..1_100).contains(&told), "{told}");
        log.share = Ratio::percent(0);
        log.slow = Some(Duration::from_secs(1));
        assert_eq!(told_of(&log, &quick), 0);
        assert_eq!(told_of(&log, &record(Outcome::Refused, Duration::ZERO)), 0);
        assert_eq!(told_of(&log, &record(Outcome::Failed, Duration::ZERO)), 10_000);
        assert_eq!(told_of(&log, &record(Outcome::Answered, Duration::from_secs(1))), 10_000);
    }
}
