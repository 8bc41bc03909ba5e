//! The stage `route`: which task owns the key.

use crate::passage::Passage;
use crate::refusal::Refusal;
use crate::setup::To;

/// The stage `route`: finds the task that owns the key.
pub(crate) fn route(passage: &mut Passage) -> Result<(), Refusal> {
    let route = passage.route();
    let To::Job { job, .. } = &route.to;
    let key = passage.key.expect("key has found the key");
    let found = job.lookup.route(key, &passage.worker.pool);
    passage.target = Some(found.ok_or(Refusal::Unserved)?);
    if let Some(most) = passage.setup.config.max_staleness {
        job.lookup.check_age(most).map_err(Refusal::TooOld)?;
    }
    Ok(())
}
