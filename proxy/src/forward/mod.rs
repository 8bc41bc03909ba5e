//! The stage `forward`: from where a request goes to an answer.

pub(crate) mod setback;
pub(crate) mod message;
pub(crate) mod exchange;
pub(crate) mod owner;

use crate::forward::owner::to_owner;
use crate::identify::sign;
use crate::passage::Passage;
use crate::refusal::Refusal;

/// The stage `forward`: gets an answer from the task.
pub(crate) async fn forward(passage: &mut Passage) -> Result<(), Refusal> {
    let route = passage.route();
    let job = route.to.job();
    let target = passage.target.take().expect("route has found the task");
    sign(passage);
    passage.answer = Some(to_owner(passage, job, target).await?);
    Ok(())
}
