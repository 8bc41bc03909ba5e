//! The stage `route`: which task owns the key.

use mandoline_core::key::SliceKey;

use crate::job::Job;
use crate::passage::Passage;
use crate::pool::Pool;
use crate::refusal::Refusal;
use crate::setup::{Setup, To};
use crate::target::Target;

/// The stage `route`: finds the task that owns the key.
pub(crate) fn route(passage: &mut Passage) -> Result<(), Refusal> {
    let route = passage.route();
    let To::Job { job, .. } = &route.to;
    let key = passage.key.expect("key has found the key");
    passage.target = Some(find(job, key, &passage.worker.pool, &passage.setup)?);
    Ok(())
}

/// Finds the task that owns a key.
pub(crate) fn find(
    job: &Job,
    key: SliceKey,
    pool: &Pool,
    setup: &Setup,
) -> Result<Target, Refusal> {
    let target = job.lookup.route(key, pool).ok_or(Refusal::Unserved)?;
    if let Some(most) = setup.config.max_staleness {
        job.lookup.check_age(most).map_err(Refusal::TooOld)?;
    }
    Ok(target)
}
