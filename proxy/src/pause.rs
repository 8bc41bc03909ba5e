//! The stage `pause`: a request waits while a pause holds it, and behind others with its key while their slice moves.

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
    let mut facts =
        Facts::of(&passage.head, &passage.host.0, job.map(|job| &job.name), passage.key);
    since_ends(passage, &mut facts).await?;
    if !is_exempt(&passage.setup.config.exempt, &mut passage.head) {
        if passage.worker.gates.is_any() {
            while_paused(passage, &mut facts).await?;
        }
        passage.exchange.is_past_pauses(facts);
    }
    let waits_for_leave = passage.waits_for_leave;
    let Passage { key, head, tape, presence, stays, exchange, .. } = passage;
    let Some((job, key)) = job.zip(*key) else { return Ok(()) };
    let mut held =
        Held::new(&job.hold, key, Waiter { head, tape, presence, stays, waits_for_leave });
    if held.in_turn().await? {
        exchange.goes_on(stays.held);
    }
    Ok(())
}

/// Translates a key anew that was translated before the end of a pause that covered it.
async fn since_ends(passage: &mut Passage, facts: &mut Facts) -> Result<(), Refusal> {
    // What stands for the key now may have been paused as well.
    while let Some(translated) = &passage.translated {
        let ended = passage.worker.gates.ends.last(facts);
        if ended <= translated.since {
            break;
        }
        translate(passage, facts, ended).await?;
    }
    Ok(())
}

/// Translates a key by what the table says after the end of a pause, which may have been for this: to have another shard take over.
async fn translate(
    passage: &mut Passage,
    facts: &mut Facts,
    ended: Option<Instant>,
) -> Result<(), Refusal> {
    let route = passage.route();
    let Some((lookup, translated)) = route.lookup.as_ref().zip(passage.translated.as_mut()) else {
        return Ok(());
    };
    let since = ended.unwrap_or_else(Instant::now);
    let answer = lookup.find_since(&translated.looked_up, since).await;
    translated.answer = answer.map_err(Refusal::Lookup)?;
    translated.since = translated.since.max(Some(since));
    let key = translated.key();
    (passage.key, facts.key) = (Some(key), Some(key));
    passage.exchange.has_other_key(key);
    Ok(())
}

/// Holds a request until no pause holds it that it has not waited for.
async fn while_paused(passage: &mut Passage, facts: &mut Facts) -> Result<(), Refusal> {
    let most = passage.setup.config.timeouts.pause;
    let until = Instant::now() + most;
    let mut waited_at: Vec<PauseId> = Vec::new();
    while let Some(gate) = passage.worker.gates.holding(facts, &waited_at) {
        waited_at.push(gate.account.id);
        let waits_for_leave = passage.waits_for_leave;
        let Passage { key, head, tape, presence, stays, .. } = &mut *passage;
        // Those without a key have no order among them but that of all.
        let place_of = key.unwrap_or(SliceKey::MIN);
        let mut waiter = Waiter { head, tape, presence, stays, waits_for_leave };
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
        translate(passage, facts, gate.opened()).await?;
        // Others may have ended meanwhile, and others have begun: nothing is waited for between the last look at either.
        since_ends(passage, facts).await?;
    }
    if !waited_at.is_empty() {
        let Passage { head, stays, exchange, .. } = passage;
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
