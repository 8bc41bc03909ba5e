//! The way to the leader: a pause, a question to an assigner, or a connection that holds.
//!
//! One value that is asked for its next step, so that the session's loop has one branch for it and stays readable.

use std::pin::Pin;
use std::time::Duration;

use mandoline_core::task::Address;
use mandoline_distributor::connect::Connector;
use mandoline_proto::pb;
use mandoline_proto::pb::session_reply::Reply;
use mandoline_proto::pb::session_request::Request;
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep, sleep, timeout};
use tonic::{Code, Streaming};

use crate::life::Beats;

/// How long an assigner may take to accept a session: registration is one commit, an election away at worst.
const DIAL_PATIENCE: Duration = Duration::from_secs(2);
/// How long a connection may take to stand; a host that is gone does not answer at all.
const CONNECT_PATIENCE: Duration = Duration::from_secs(1);
/// What may wait to be sent. The queue fills only when the leader does not read; the connection is then given up.
const REQUESTS_MAX: usize = 64;

/// How assigners are reached.
#[derive(Clone)]
pub(crate) enum Way {
    /// Over the network.
    Network(Connector),
    /// Within the process, as the test kit does.
    #[cfg(feature = "testing")]
    InProcess(mpsc::Sender<Caller>),
}

impl Way {
    /// How others are reached over the network, if they are.
    pub(crate) const fn connector(&self) -> Option<&Connector> {
        match self {
            Self::Network(connector) => Some(connector),
            #[cfg(feature = "testing")]
            Self::InProcess(_) => None,
        }
    }
}

/// A task that wants to speak with the leader of the same process.
#[cfg(feature = "testing")]
pub(crate) struct Caller {
    pub(crate) requests: mpsc::Receiver<pb::SessionRequest>,
    pub(crate) replies: mpsc::Sender<Reply>,
}

/// What the leader says, however it comes.
pub(crate) enum Replies {
    Network(Box<Streaming<pb::SessionReply>>),
    #[cfg(feature = "testing")]
    InProcess(mpsc::Receiver<Reply>),
}

impl Replies {
    /// Waits for the next; none when the stream is closed. Safe to cancel.
    pub(crate) async fn message(&mut self) -> Result<Option<pb::SessionReply>, tonic::Status> {
        match self {
            Self::Network(replies) => replies.message().await,
            #[cfg(feature = "testing")]
            Self::InProcess(replies) => {
                let reply = replies.recv().await;
                Ok(reply.map(|reply| pb::SessionReply { reply: Some(reply) }))
            }
        }
    }
}

/// Where the session stands on its way to the leader.
pub(crate) enum Link {
    Waiting(Pin<Box<Sleep>>),
    Dialing(Pin<Box<dyn Future<Output = Dialed> + Send>>),
    Attached(Box<Connection>),
}

/// What comes next on the way to the leader.
pub(crate) enum Step {
    /// The pause is over.
    Waited,
    /// An assigner has answered, or cannot.
    Dialed(Dialed),
    /// The leader says something.
    Reply(Option<Reply>),
    /// The connection broke.
    Broke(String),
}

impl Link {
    /// Asks an assigner to take the session on.
    pub(crate) fn dial(way: Way, address: Address, first: Request) -> Self {
        Self::Dialing(Box::pin(dial(way, address, first)))
    }

    /// Waits before it is asked again what to do.
    pub(crate) fn wait(pause: Duration) -> Self {
        Self::Waiting(Box::pin(sleep(pause)))
    }

    /// Waits for what comes next; may be dropped and asked again without losing anything.
    pub(crate) async fn next(&mut self) -> Step {
        match self {
            Self::Waiting(pause) => {
                pause.as_mut().await;
                Step::Waited
            }
            Self::Dialing(dialed) => Step::Dialed(dialed.as_mut().await),
            Self::Attached(connection) => match connection.replies.message().await {
                Ok(Some(reply)) => Step::Reply(reply.reply),
                Ok(None) => Step::Broke("it closed the stream".to_owned()),
                Err(status) => Step::Broke(said(&status)),
            },
        }
    }
}

/// A connection to the leader, which has taken the session on.
pub(crate) struct Connection {
    pub(crate) leader: Address,
    pub(crate) requests: mpsc::Sender<pb::SessionRequest>,
    pub(crate) replies: Replies,
    pub(crate) beats: Beats,
}

/// What an assigner answered.
pub(crate) enum Dialed {
    /// It leads and takes the session on.
    On(Box<Connection>, pb::Attached),
    /// It does not lead; whom to ask instead, if it knows.
    Elsewhere(Address, Option<Address>),
    /// It leads, and will not have the task.
    Refused(Address, pb::Refused),
    /// It cannot be reached, or made no sense.
    Failed(Address, String),
}

async fn dial(way: Way, address: Address, first: Request) -> Dialed {
    match timeout(DIAL_PATIENCE, ask(&way, &address, first)).await {
        Ok(Ok(Asked::On(connection, attached))) => Dialed::On(connection, attached),
        Ok(Ok(Asked::Elsewhere(leader))) => Dialed::Elsewhere(address, leader),
        Ok(Ok(Asked::Refused(refused))) => Dialed::Refused(address, refused),
        Ok(Err(problem)) => Dialed::Failed(address, problem),
        Err(_) => Dialed::Failed(address, format!("no answer within {DIAL_PATIENCE:?}")),
    }
}

enum Asked {
    On(Box<Connection>, pb::Attached),
    Elsewhere(Option<Address>),
    Refused(pb::Refused),
}

async fn ask(way: &Way, address: &Address, first: Request) -> Result<Asked, String> {
    let (requests, queue) = mpsc::channel(REQUESTS_MAX);
    let first = pb::SessionRequest { request: Some(first) };
    requests.try_send(first).expect("a new queue has room");
    let mut replies = match way {
        Way::Network(connector) => match call(connector, address, queue).await? {
            Ok(replies) => Replies::Network(Box::new(replies)),
            Err(status) => return refusal(&status),
        },
        #[cfg(feature = "testing")]
        Way::InProcess(door) => {
            let (said, replies) = mpsc::channel(REQUESTS_MAX);
            let called = door.send(Caller { requests: queue, replies: said }).await;
            called.map_err(|_| "the service has stopped".to_owned())?;
            Replies::InProcess(replies)
        }
    };
    let reply = match replies.message().await {
        Ok(reply) => reply.and_then(|reply| reply.reply),
        Err(status) => return refusal(&status),
    };
    match reply {
        Some(Reply::Attached(attached)) if attached.session != 0 => {
            let beats = Beats::new(Instant::now());
            let connection = Connection { leader: address.clone(), requests, replies, beats };
            Ok(Asked::On(Box::new(connection), attached))
        }
        Some(Reply::Redirect(redirect)) => Ok(Asked::Elsewhere(redirect.address.parse().ok())),
        Some(Reply::Refused(refused)) => Ok(Asked::Refused(refused)),
        Some(_) => Err("it began with something else than attaching".to_owned()),
        None => Err("it closed the stream".to_owned()),
    }
}

/// Opens the stream, or says what the assigner answered instead.
async fn call(
    connector: &Connector,
    address: &Address,
    queue: mpsc::Receiver<pb::SessionRequest>,
) -> Result<Result<Streaming<pb::SessionReply>, tonic::Status>, String> {
    let endpoint = connector.endpoint(address).map_err(|error| chain(&error))?;
    let channel = endpoint.connect_timeout(CONNECT_PATIENCE).connect().await;
    let channel = channel.map_err(|error| chain(&error))?;
    let mut client =
        pb::tasks_client::TasksClient::with_interceptor(channel, connector.authorize());
    let stream = tokio_stream::wrappers::ReceiverStream::new(queue);
    Ok(client.session(stream).await.map(tonic::Response::into_inner))
}

/// A status says less than a `Refused`, but this much: what is invalid stays so.
fn refusal(status: &tonic::Status) -> Result<Asked, String> {
    if status.code() == Code::InvalidArgument {
        let code = pb::RefusedCode::Invalid.into();
        return Ok(Asked::Refused(pb::Refused { code, message: status.message().to_owned() }));
    }
    Err(said(status))
}

fn said(status: &tonic::Status) -> String {
    format!("{}: {}", status.code(), status.message())
}

/// An error and what caused it, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
