//! The stage `forward`: from where a request goes to an answer.

pub(crate) mod setback;
pub(crate) mod message;
pub(crate) mod exchange;
pub(crate) mod owner;

use crate::forward::owner::to_owner;
use crate::identify::sign;
use crate::passage::Passage;
use crate::refusal::Refusal;
use crate::tunnel::Switch;

/// The stage `forward`: gets an answer from the task.
pub(crate) async fn forward(passage: &mut Passage) -> Result<(), Refusal> {
    let route = passage.route();
    let job = route.to.job();
    let target = passage.target.take().expect("route has found the task");
    sign(passage);
    let answer = to_owner(passage, job, target).await?;
    // To the client of a stream any 2xx says that it is a tunnel now (RFC 8441, 5).
    if passage.switch.as_ref().is_some_and(Switch::is_stream) && answer.0.status().is_success() {
        return Err(Refusal::Garbled(
            "it was asked to switch to WebSocket, and neither did nor refused",
        ));
    }
    passage.answer = Some(answer);
    Ok(())
}
