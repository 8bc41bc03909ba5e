//! What kind of job it is, asked before anything is registered: an agent has no place in an exclusive one.

use std::time::Duration;

use mandoline_core::name::JobName;
use mandoline_proto::pb;
use tonic::{Code, Response};

use crate::agent::keeper::refuse_exclusive;
use crate::client::{Client, ClientArgs};
use crate::failure::Failure;

/// Waits until the job is there, saying once what it waits for; refuses an exclusive one.
pub(crate) async fn is_open(job: &JobName, args: &ClientArgs) -> Result<(), Failure> {
    let client = Client::new(args)?;
    let mut said = None;
    loop {
        let waits_for = match consistency(job, &client).await {
            Ok(Some(pb::Consistency::Exclusive)) => return Err(refuse_exclusive(job)),
            Ok(Some(_)) => return Ok(()),
            Ok(None) => format!(
                "there is no job {job} yet, and it is asked for again\n  try: echo 'name: {job}' | mandoline job apply -"
            ),
            Err(failure) => format!("{failure}\n  it is asked again"),
        };
        if said.as_ref() != Some(&waits_for) {
            eprintln!("{waits_for}");
            said = Some(waits_for);
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// How a job keeps its keys, if there is such a job.
async fn consistency(job: &JobName, client: &Client) -> Result<Option<pb::Consistency>, Failure> {
    let request = pb::GetJobRequest { name: job.to_string() };
    let status = client
        .ask(request, async |mut admin, request| match admin.get_job(request).await {
            Ok(reply) => Ok(Response::new(Some(reply.into_inner()))),
            Err(status) if status.code() == Code::NotFound => Ok(Response::new(None)),
            Err(status) => Err(status),
        })
        .await?;
    Ok(status.map(|status| status.spec.unwrap_or_default().consistency()))
}

/// How long until the assigners are asked again: short beside what a person takes to make a job.
const AGAIN: Duration = Duration::from_secs(1);
