//! The stage `pause`: a request waits while a pause holds it, and behind others with its key while their slice moves.

use std::rc::Rc;

use http::request::Parts;
use mandoline_core::flags::PauseId;
use mandoline_core::key::SliceKey;
use tokio::time::Instant;

use crate::config::Exempt;
use crate::hold::flights::Facts;
use crate::hold::gates::Gate;
use crate::hold::room::Full;
use crate::hold::{Ended, Held, Waiter, grpc};
use crate::passage::Passage;
use crate::refusal::{Paused, Refusal, WhyPaused};
use crate::setup::To;

/// Lets a request pass unless a pause holds it, or others with its key are held.
pub(crate) async fn pause(passage: &mut Passage) -> Result<(), Refusal> {
    let route = passage.route();
    // A pool is no job to those who pause: they may name its host or path. Nor has it slices that move.
    let job = match &route.to {
        To::Job { job, .. } => Some(job),
        To::Pool { .. } => None,
    };
    if !is_exempt(&passage.setup.config.exempt, &mut passage.head) {
        let mut facts = Facts {
            job: job.map(|job| Rc::clone(&job.name)),
            key: passage.key,
            host: passage.host.0.clone(),
            path: passage.head.uri.path_and_query().cloned(),
            method: passage.head.method.clone(),
        };
        if passage.worker.gates.is_any() {
            while_paused(passage, &mut facts).await?;
        }
        passage.exchange.is_past_pauses(facts);
    }
    let waits_for_leave = passage.waits_for_leave;
    let Passage { key, head, tape, line, stays, exchange, .. } = passage;
    let Some((job, key)) = job.zip(*key) else { return Ok(()) };
    let mut held = Held::new(&job.hold, key, Waiter { head, tape, line, stays, waits_for_leave });
    if held.in_turn().await? {
        exchange.goes_on(stays.held);
    }
    Ok(())
}

/// Holds a request until no pause holds it that it has not waited for.
async fn while_paused(passage: &mut Passage, facts: &mut Facts) -> Result<(), Refusal> {
    let waits_for_leave = passage.waits_for_leave;
    let route = passage.route();
    let Passage { worker, setup, key, translated, head, tape, line, stays, exchange, .. } = passage;
    let most = setup.config.timeouts.pause;
    let until = Instant::now() + most;
    let mut waited_at: Vec<PauseId> = Vec::new();
    while let Some(gate) = worker.gates.holding(facts, &waited_at) {
        waited_at.push(gate.account.id);
        // Those without a key have no order among them but that of all.
        let place_of = key.unwrap_or(SliceKey::MIN);
        let mut waiter = Waiter { head, tape, line, stays, waits_for_leave };
        let waited = waiter.wait(&gate.queue, until, |line, place| match gate.is_open() {
            true => line.join_late(place, place_of, ()),
            false => line.join(place, place_of, ()),
        });
        let refusal = |why| refusal(&gate, why);
        waited.await.map_err(|ended| match ended {
            Ended::Full(Full::Requests(most)) => refusal(WhyPaused::Requests(most)),
            Ended::Full(Full::Bytes(most)) => refusal(WhyPaused::Bytes(most)),
            Ended::Late => refusal(WhyPaused::Long(most)),
            Ended::Failed if gate.fails() => refusal(WhyPaused::Fails),
            Ended::Failed => refusal(WhyPaused::Stops),
            Ended::ByClient(refusal) => refusal,
        })?;
        if let Some((lookup, translated)) = route.lookup.as_ref().zip(translated.as_mut()) {
            // The pause may have been for this: to have another shard take over.
            let ended = gate.opened().unwrap_or_else(Instant::now);
            let answer = lookup.find_since(&translated.looked_up, ended).await;
            translated.answer = answer.map_err(Refusal::Lookup)?;
            let fresh = translated.key();
            (*key, facts.key) = (Some(fresh), Some(fresh));
            exchange.has_other_key(fresh);
        }
    }
    if !waited_at.is_empty() {
        exchange.goes_on(stays.held);
        if let Some(deadline) = stays.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            grpc::shorten(&mut head.headers, left);
        }
    }
    Ok(())
}

fn refusal(gate: &Gate, why: WhyPaused) -> Refusal {
    let (pause, lasts_yet) = (gate.account.id, gate.account.left());
    Refusal::Paused(Paused { pause, why, lasts_yet })
}

/// Says whether no pause holds the request. What shows that is not for the task.
pub(crate) fn is_exempt(exempt: &Exempt, head: &mut Parts) -> bool {
    let Exempt { paths, header } = exempt;
    let is_probe = paths.iter().any(|path| **path == *head.uri.path());
    let Some((name, secret)) = header else { return is_probe };
    let shown = head.headers.remove(name);
    is_probe || shown.is_some_and(|shown| is_same(shown.as_bytes(), secret.as_bytes()))
}

/// Compares in a time that does not tell how much of a guess was right.
fn is_same(shown: &[u8], secret: &[u8]) -> bool {
    let differing = shown.iter().zip(secret).fold(0, |all, (a, b)| all | (a ^ b));
    shown.len() == secret.len() && differing == 0
}
