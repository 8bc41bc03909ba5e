//! The stage `pause`: a request whose key is held for others waits behind them.

use crate::hold::Held;
use crate::passage::Passage;
use crate::refusal::Refusal;
use crate::setup::To;

/// Lets a request pass unless others with its key are held.
pub(crate) async fn pause(passage: &mut Passage) -> Result<(), Refusal> {
    let route = passage.route();
    let To::Job { job, .. } = &route.to;
    let Passage { key, head, tape, line, held_until, exchange, .. } = passage;
    let key = key.expect("key has found the key");
    let mut held = Held::new(&job.hold, key, tape, line, held_until);
    if held.in_turn(head).await? {
        exchange.goes_on();
    }
    Ok(())
}
