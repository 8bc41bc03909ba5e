//! The stage `key`: which key the request is for, where its route leads to a job.

use std::rc::Rc;

use mandoline::http::key::{Asked, KeyFrom};
use mandoline_core::extract::Miss;
use mandoline_core::key::SliceKey;
use mandoline_core::name::JobName;
use tokio::time::timeout;

use crate::config::limits::KEY_BODY_MAX_BYTES;
use crate::hold::flights::Facts;
use crate::lookup::{Fault, Lookup};
use crate::metrics::names::Count;
use crate::passage::{Passage, Translated};
use crate::refusal::Refusal;
use crate::setup::To;
use crate::upload::Gathered;

/// Finds the key where the route says that it is. What goes to a pool has none.
pub(crate) async fn key(passage: &mut Passage) -> Result<(), Refusal> {
    let route = passage.route();
    let To::Job { job, key } = &route.to else { return Ok(()) };
    let body = if key.reads_body() { Some(body(passage).await?) } else { None };
    let asked = Asked {
        head: &passage.head,
        host: passage.host.as_str(),
        client: Some(passage.client.address()),
        body: body.as_deref(),
    };
    let key = match &route.lookup {
        None => find(key, &asked)?,
        Some(lookup) => {
            let looked_up = looked_up(key, &asked)?;
            let translated = translate(passage, &job.name, lookup, looked_up).await?;
            passage.translated.insert(translated).key()
        }
    };
    passage.key = Some(key);
    passage.exchange.has_key(key, job);
    Ok(())
}

/// Translates a key by what is known. That the table has nothing of use is believed only if it was said after the last pause that may have
/// been for this request, since it is over with the request then; what the table has is held against pauses later.
async fn translate(
    passage: &Passage,
    job: &Rc<JobName>,
    lookup: &Lookup,
    looked_up: Vec<u8>,
) -> Result<Translated, Refusal> {
    let (mut found, mut since) = (lookup.find(&looked_up).await, None);
    if matches!(found, Err(Fault::Unknown | Fault::Two | Fault::Length(_))) {
        let facts = Facts::of(&passage.head, &passage.host.0, Some(job), None);
        since = passage.worker.gates.ends.last_of_any_key(&facts);
        if let Some(since) = since {
            found = lookup.find_since(&looked_up, since).await;
        }
    }
    let answer = found.map_err(Refusal::Lookup)?;
    Ok(Translated { looked_up, answer, since })
}

/// Reads a small body, which is kept to be sent on. It is counted apart from what is kept for second tries, so that long bodies of others
/// take no room from it.
async fn body(passage: &Passage) -> Result<Vec<u8>, Refusal> {
    let long = || Refusal::Key(Miss::LongBody(KEY_BODY_MAX_BYTES).to_string());
    if passage.tape.length().is_some_and(|length| length > KEY_BODY_MAX_BYTES as u64) {
        return Err(long());
    }
    passage.tape.count_in(&passage.worker.key_room);
    let within = passage.setup.config.timeouts.header;
    let reading = passage.tape.gather(KEY_BODY_MAX_BYTES, |_| true);
    match timeout(within, reading).await {
        Err(_) => Err(Refusal::SlowBody),
        Ok(Gathered::Gone) => Err(Refusal::Left),
        Ok(Gathered::Broken) => {
            Err(passage.tape.fault().expect("a body that is broken has a fault"))
        }
        Ok(Gathered::Full) => {
            passage.worker.counters.count(Count::KeyBodiesRefused);
            Err(Refusal::KeyBodiesFull)
        }
        Ok(Gathered::Enough) => {
            let body = passage.tape.gathered().filter(|body| body.len() <= KEY_BODY_MAX_BYTES);
            body.ok_or_else(long)
        }
    }
}

/// Finds the key of a request.
pub(crate) fn find(from: &KeyFrom, asked: &Asked<'_>) -> Result<SliceKey, Refusal> {
    from.find_in(asked).map_err(|miss| refusal(miss, from))
}

/// Finds what a request has a lookup look up.
pub(crate) fn looked_up(from: &KeyFrom, asked: &Asked<'_>) -> Result<Vec<u8>, Refusal> {
    from.bytes_in(asked).map_err(|miss| refusal(miss, from))
}

fn refusal(miss: Miss, from: &KeyFrom) -> Refusal {
    Refusal::Key(format!("{miss}; the key is {}", from.describe()))
}
