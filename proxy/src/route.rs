//! The stage `route`: which task owns the key, or which server of a pool is to answer.

use mandoline_core::key::SliceKey;

use crate::job::Job;
use crate::passage::Passage;
use crate::pool::ConnectionPool;
use crate::refusal::Refusal;
use crate::setup::{EVERYTHING, Setup, To};
use crate::target::Target;

/// The stage `route`: finds the task that owns the key.
pub(crate) fn route(passage: &mut Passage) -> Result<(), Refusal> {
    let route = passage.route();
    let Passage { worker, setup, key, .. } = passage;
    let target = match &route.to {
        To::Job { job, .. } => find(job, key.expect("key has found the key"), &worker.pool, setup)?,
        To::Pool { job } => job.owners.route(EVERYTHING, &worker.pool).ok_or(Refusal::NoServer)?,
    };
    passage.target = Some(target);
    Ok(())
}

/// Finds the task that owns a key.
pub(crate) fn find(
    job: &Job,
    key: SliceKey,
    pool: &ConnectionPool,
    setup: &Setup,
) -> Result<Target, Refusal> {
    let target = job.owners.route(key, pool).ok_or(Refusal::Unserved)?;
    if let Some(most) = setup.config.max_staleness {
        job.owners.check_age(most).map_err(Refusal::TooOld)?;
    }
    Ok(target)
}
