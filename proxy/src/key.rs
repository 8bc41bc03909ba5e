//! The stage `key`: which key the request is for, where its route leads to a job.

use http::request::Parts;
use mandoline::http::key::KeyFrom;
use mandoline_core::key::SliceKey;

use crate::client::Host;
use crate::passage::Passage;
use crate::refusal::Refusal;
use crate::setup::To;

/// Finds the key where the route says that it is.
pub(crate) async fn key(passage: &mut Passage) -> Result<(), Refusal> {
    let route = passage.route();
    let To::Job { job, key } = &route.to;
    let key = find(key, &passage.head, &passage.host)?;
    passage.key = Some(key);
    passage.exchange.has_key(key, job);
    Ok(())
}

/// Finds the key of a request.
pub(crate) fn find(from: &KeyFrom, head: &Parts, host: &Host) -> Result<SliceKey, Refusal> {
    let key = from.find_of(head, host.as_str());
    key.map_err(|miss| Refusal::Key(format!("{miss}; the key is {}", from.describe())))
}
