//! A task that says whatever a test has it say.

use mandoline_proto::pb;
use mandoline_proto::pb::session_reply::Reply;
use mandoline_proto::pb::session_request::Request as Asked;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::session::cluster::PATIENCE;

pub(crate) struct Raw {
    requests: mpsc::Sender<pb::SessionRequest>,
    replies: Streaming<pb::SessionReply>,
}

pub(crate) fn info(name: &str, incarnation: u64, address: &str) -> pb::TaskInfo {
    let (name, address) = (name.to_owned(), address.to_owned());
    pb::TaskInfo { name, incarnation, address, ..Default::default() }
}

pub(crate) fn register(info: pb::TaskInfo) -> Asked {
    let job = "kv".to_owned();
    Asked::Register(pb::Register { job, info: Some(info), ..Default::default() })
}

pub(crate) fn attach(session: u64, incarnation: u64) -> Asked {
    Asked::Attach(pb::Attach { job: "kv".to_owned(), session, known: None, incarnation })
}

impl Raw {
    /// Opens a stream that begins with this.
    pub(crate) async fn open(address: &str, first: Option<Asked>) -> Result<Self, Status> {
        let (requests, queue) = mpsc::channel(64);
        requests.try_send(pb::SessionRequest { request: first }).unwrap();
        let address = format!("http://{address}");
        let mut client = pb::tasks_client::TasksClient::connect(address).await.unwrap();
        let replies = client.session(ReceiverStream::new(queue)).await?.into_inner();
        Ok(Self { requests, replies })
    }

    /// Opens a stream that is turned away, and gives how.
    pub(crate) async fn turned_away(address: &str, first: Option<Asked>) -> Status {
        match Self::open(address, first).await {
            Ok(mut raw) => raw.next().await.expect_err("a stream that is turned away"),
            Err(status) => status,
        }
    }

    pub(crate) async fn say(&self, asked: Asked) {
        self.requests.send(pb::SessionRequest { request: Some(asked) }).await.unwrap();
    }

    /// Gives the next reply, or nothing at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Reply>, Status> {
        let reply = timeout(PATIENCE, self.replies.message()).await.expect("a reply in time")?;
        Ok(reply.map(|reply| reply.reply.unwrap()))
    }

    /// Skips replies until one is picked.
    pub(crate) async fn hears<T>(&mut self, what: &str, pick: impl Fn(&Reply) -> Option<T>) -> T {
        loop {
            match self.next().await {
                Ok(Some(reply)) => match pick(&reply) {
                    Some(picked) => return picked,
                    None => continue,
                },
                end => panic!("the stream ended ({end:?}) before {what}"),
            }
        }
    }

    /// Gives the session, which the stream begins with.
    pub(crate) async fn session(&mut self) -> u64 {
        match self.next().await {
            Ok(Some(Reply::Attached(attached))) => attached.session,
            other => panic!("{other:?} instead of a session"),
        }
    }

    pub(crate) async fn refused(&mut self) -> (pb::RefusedCode, String) {
        let refused = |reply: &Reply| match reply {
            Reply::Refused(refused) => Some((refused.code(), refused.message.clone())),
            _ => None,
        };
        self.hears("a refusal", refused).await
    }

    pub(crate) async fn granted(&mut self, request: u64) {
        self.say(Asked::Heartbeat(pb::Heartbeat { request })).await;
        let granted = |reply: &Reply| match reply {
            Reply::Grant(grant) => (grant.request == request).then_some(()),
            _ => None,
        };
        self.hears("a grant", granted).await;
    }
}
