//! A watch by plain HTTP: server-sent events with JSON in them, for languages that have no gRPC at hand. Any node answers,
//! and so does whatever else is watched on a port of its own: a distributor, a proxy.
//!
//! `docs/protocol.md` says what a client has to do. What is told is the hub's: everything once, then what changed; a reader that
//! is slow skips what is outdated. Nothing is queued for it: an event is written as the connection takes it, a large one in pieces,
//! so a watcher costs one piece and a hold on an assignment that is there anyway.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, RawQuery, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::stream;
use mandoline_core::assignment::{Assigned, Assignment, Replica};
use mandoline_core::delta::{Delta, TaskChange};
use mandoline_core::generation::Generation;
use mandoline_core::name::JobName;
use mandoline_core::slice::Slice;
use mandoline_core::task::{Phase, Task};
use mandoline_core::transit::Transit;
use mandoline_distributor::hub::{Hub, Subscription, Told};
use mandoline_proto::update::{Assembler, Update};
use serde_json::{Map, Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::access::Guard;
use crate::raft::{Consensus, Role};

/// The most watchers by HTTP of one node. Each event is written anew for each of them, in some 10 ms for 10,000 slices; those by
/// gRPC share what is encoded once, and may be many more.
const WATCHERS_MAX: usize = 1_000;
/// How often a quiet stream says that it is alive: twice within the ten seconds after which impatient middlemen cut it.
const BEAT_EVERY: Duration = Duration::from_secs(4);
/// How many slices or tasks are written at once: a tenth of a millisecond, and some 64 KiB.
const PIECE: usize = 256;
/// What a client does by itself when the stream ends: asks again after so many milliseconds.
const RETRY: &str = "retry: 1000\n\n";

/// Who tells, which decides what it means that a job is not known here.
#[derive(Clone)]
pub(crate) enum Teller {
    /// A node: it knows of every job while it follows a leader.
    Node(Consensus),
    /// A distributor, or a proxy that is watched: it knows of the jobs that it was started for, once it has heard of them.
    Follower,
}

impl Teller {
    fn knows_nothing_of(&self, job: JobName) -> Refusal {
        match self {
            Self::Node(consensus) => match consensus.status().role {
                Role::Leader { .. } | Role::Follower { leader: Some(_) } => Refusal::NoSuchJob(job),
                Role::Follower { leader: None } => Refusal::NotReady(job),
            },
            Self::Follower => Refusal::NotHeard(job),
        }
    }
}

/// Gives the watch's route. It asks for the cluster's token as every call does.
pub(crate) fn routes(teller: Teller, hub: Hub, guard: Guard, stop: CancellationToken) -> Router {
    let places = Arc::new(Semaphore::new(WATCHERS_MAX));
    let source = Source { teller, hub, guard, places, stop };
    Router::new().route("/api/v1/jobs/{job}/watch", get(watch)).with_state(source)
}

#[derive(Clone)]
struct Source {
    teller: Teller,
    hub: Hub,
    guard: Guard,
    places: Arc<Semaphore>,
    stop: CancellationToken,
}

/// Why a watch is refused.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("{0}")]
    Stranger(String),
    #[error("job: {0}")]
    Job(#[from] mandoline_core::name::NameError),
    #[error("{field}: {problem}")]
    Invalid { field: &'static str, problem: String },
    #[error("there is no parameter {0:?}: this takes known=INCARNATION.NUMBER")]
    Parameter(String),
    #[error("no job {0}: `mandoline job list` shows those that are")]
    NoSuchJob(JobName),
    #[error("this node follows nobody yet and cannot say whether there is a job {0}: ask another")]
    NotReady(JobName),
    #[error("nothing was heard of a job {0} here, or not yet: ask another, such as an assigner")]
    NotHeard(JobName),
    #[error("this node has its {WATCHERS_MAX} watchers by HTTP: ask another one, or watch by gRPC")]
    Full,
    #[error(transparent)]
    Crowded(#[from] mandoline_distributor::hub::TooManyWatchers),
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match self {
            Self::Stranger(_) => StatusCode::UNAUTHORIZED,
            Self::Job(_) | Self::Invalid { .. } | Self::Parameter(_) => StatusCode::BAD_REQUEST,
            Self::NoSuchJob(_) => StatusCode::NOT_FOUND,
            Self::NotReady(_) | Self::NotHeard(_) | Self::Full | Self::Crowded(_) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
        };
        let page = json!({ "error": self.to_string() });
        (status, [(CONTENT_TYPE, "application/json")], format!("{page}\n")).into_response()
    }
}

async fn watch(
    State(mut source): State<Source>,
    Path(job): Path<String>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let admitted = source.guard.admit(&headers);
    admitted.map_err(|status| Refusal::Stranger(status.message().to_owned()))?;
    let job = JobName::from_str(&job)?;
    let known = known(query.as_deref(), &headers)?;
    let place = Arc::clone(&source.places).try_acquire_owned().map_err(|_| Refusal::Full)?;
    let subscription = source.hub.subscribe(&job, known)?;
    if source.hub.get(&job).is_none() {
        return Err(source.teller.knows_nothing_of(job));
    }
    debug!(%job, ?known, "Watch by HTTP began");
    let feed = Feed {
        subscription,
        rest: None,
        beat_at: Instant::now() + BEAT_EVERY,
        is_over: false,
        stop: source.stop,
        _place: place,
    };
    let told = stream::unfold(feed, Feed::next);
    let events = futures_util::StreamExt::chain(
        stream::once(async { Bytes::from_static(RETRY.as_bytes()) }),
        told,
    );
    let body = Body::from_stream(futures_util::StreamExt::map(events, Ok::<_, std::io::Error>));
    let headers = [
        (CONTENT_TYPE.as_str(), "text/event-stream"),
        (CACHE_CONTROL.as_str(), "no-store"),
        // nginx holds answers back otherwise.
        ("x-accel-buffering", "no"),
    ];
    Ok((headers, body).into_response())
}

/// What the watcher knows: the last event that it took in, as it says when it comes back by itself, else what it asked with.
fn known(query: Option<&str>, headers: &HeaderMap) -> Result<Option<Generation>, Refusal> {
    let mut asked = None;
    for pair in query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        let Some(value) = pair.strip_prefix("known=") else {
            return Err(Refusal::Parameter(pair.chars().take(100).collect()));
        };
        if asked.replace(generation("known", value)?).is_some() {
            let problem = "is given twice".to_owned();
            return Err(Refusal::Invalid { field: "known", problem });
        }
    }
    let Some(last) = headers.get(LAST_EVENT_ID) else { return Ok(asked) };
    let last = String::from_utf8_lossy(last.as_bytes());
    generation(LAST_EVENT_ID, &last).map(Some)
}

fn generation(field: &'static str, text: &str) -> Result<Generation, Refusal> {
    let short = text.chars().take(100).collect::<String>();
    short.parse().map_err(|error| Refusal::Invalid { field, problem: format!("{error}") })
}

const LAST_EVENT_ID: &str = "last-event-id";

/// What one watcher is told.
struct Feed {
    subscription: Subscription,
    /// What is left of an event that was begun.
    rest: Option<Rest>,
    beat_at: Instant,
    is_over: bool,
    stop: CancellationToken,
    _place: OwnedSemaphorePermit,
}

impl Feed {
    /// Gives what the connection should carry next.
    async fn next(mut self) -> Option<(Bytes, Self)> {
        if self.is_over {
            return None;
        }
        let text = match self.rest.as_mut().and_then(Rest::next) {
            Some(piece) => piece,
            None => {
                self.rest = None;
                tokio::select! {
                    told = self.subscription.tell() => self.event(told),
                    () = sleep_until(self.beat_at) => ":\n\n".to_owned(),
                    () = self.stop.cancelled() => return None,
                }
            }
        };
        self.beat_at = Instant::now() + BEAT_EVERY;
        Some((text.into(), self))
    }

    fn event(&mut self, told: Told) -> String {
        let frame = match told {
            Told::Everything(assignment) => {
                let rest = self.rest.insert(Rest::new(assignment));
                return rest.head();
            }
            Told::Frame(frame) => frame,
        };
        match Assembler::default().take_bytes(&frame.message()) {
            Ok(Some(Update::Delta(delta))) => {
                let data = delta_json(&delta);
                format!("event: delta\nid: {}\ndata: {data}\n\n", delta.to)
            }
            Ok(Some(Update::Unknown(job))) => {
                self.is_over = true;
                format!("event: gone\ndata: {}\n\n", json!({ "job": job.as_str() }))
            }
            Ok(Some(Update::Full(_)) | None) | Err(_) => {
                unreachable!("the hub's frames hold a delta or a name")
            }
        }
    }
}

/// A full assignment that is on its way out, a piece at a time. Each piece is a `data` line of its own: a client joins the lines of
/// an event by line feeds, which is space to JSON.
struct Rest {
    assignment: Arc<Assignment>,
    tasks: usize,
    slices: usize,
    ended: bool,
}

impl Rest {
    const fn new(assignment: Arc<Assignment>) -> Self {
        Self { assignment, tasks: 0, slices: 0, ended: false }
    }

    fn head(&self) -> String {
        let Assignment { job, generation, spill, .. } = &*self.assignment;
        let (job, spill) = (json!(job.as_str()), json!(spill.map(|cap| cap.to_string())));
        let exclusive = self.assignment.is_exclusive();
        format!(
            "event: full\nid: {generation}\ndata: {{\"job\":{job},\"generation\":\"{generation}\",\
             \"exclusive\":{exclusive},\"spill\":{spill},\"tasks\":[\n"
        )
    }

    fn next(&mut self) -> Option<String> {
        let Assignment { tasks, slices, .. } = &*self.assignment;
        if self.tasks < tasks.len() {
            let (from, to) = (self.tasks, tasks.len().min(self.tasks + PIECE));
            self.tasks = to;
            return Some(piece(
                from,
                tasks.values().skip(from).take(PIECE).map(|task| task_json(task)),
            ));
        }
        let count = slices.count();
        if self.slices < count {
            let (from, to) = (self.slices, count.min(self.slices + PIECE));
            self.slices = to;
            let opening = if from == 0 { "data: ],\"slices\":[\n" } else { "" };
            let slice = |index| slice_json(slices.slice_at(index), slices.value_at(index));
            return Some(opening.to_owned() + &piece(from, (from..to).map(slice)));
        }
        (!std::mem::replace(&mut self.ended, true)).then(|| "data: ]}\n\n".to_owned())
    }
}

/// A line of items of a list, the first of which is its `from`th.
fn piece(from: usize, items: impl Iterator<Item = Value>) -> String {
    let mut line = "data: ".to_owned();
    for (index, item) in items.enumerate() {
        if from + index > 0 {
            line.push(',');
        }
        line.push_str(&item.to_string());
    }
    line.push('\n');
    line
}

fn delta_json(delta: &Delta) -> Value {
    let (mut set, mut gone) = (vec![], vec![]);
    for change in &delta.tasks {
        match change {
            TaskChange::Set(task) => set.push(task_json(task)),
            TaskChange::Gone(session) => gone.push(json!(session.0)),
        }
    }
    let slices = delta.slices.iter().map(|(slice, assigned)| slice_json(*slice, assigned));
    json!({
        "job": delta.job.as_str(),
        "from": delta.from.to_string(),
        "generation": delta.to.to_string(),
        "spill": delta.spill.map(|cap| cap.to_string()),
        "tasks": set,
        "gone": gone,
        "slices": slices.collect::<Vec<_>>(),
    })
}

fn task_json(task: &Task) -> Value {
    let labels = task.info.labels.iter().map(|(key, value)| (key.clone(), json!(value)));
    json!({
        "session": task.session.0,
        "task": task.info.name.as_str(),
        "address": task.info.address.as_str(),
        "watch": task.info.watch.as_ref().map(|address| address.as_str()),
        "labels": labels.collect::<Map<_, _>>(),
        "capacity": f64::from(task.info.capacity.thousandths()) / 1e3,
        "revision": task.info.revision,
        "phase": match task.phase {
            Phase::Serving => "serving",
            Phase::Draining => "draining",
        },
    })
}

fn slice_json(slice: Slice, assigned: &Assigned) -> Value {
    let replica = |replica: &Replica| json!({ "session": replica.session.0, "since": replica.since.to_string() });
    let transit = |transit: &Transit| {
        json!({
            "hand_off": transit.id.to_string(),
            "step": transit.step.to_string(),
            "from": transit.from.map(|from| from.0),
            "to": transit.to.0,
        })
    };
    json!({
        "slice": slice.to_string(),
        "replicas": assigned.replicas.as_slice().iter().map(replica).collect::<Vec<_>>(),
        "load": assigned.load.units(),
        "token": assigned.token.to_string(),
        "transit": assigned.transit.as_deref().map(transit),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use mandoline_core::slice_map::SliceMap;
    use mandoline_core::task::{SessionId, TaskInfo};

    fn number(number: u64) -> Generation {
        Generation { incarnation: 1, number }
    }

    fn kv() -> JobName {
        "kv".parse().unwrap()
    }

    /// So many tasks and slices, each served by the first task.
    fn assignment(tasks: u64, slices: u64) -> Arc<Assignment> {
        let mut assignment = Assignment::new(kv(), number(1));
        for id in 1..=tasks {
            let (name, address) = (format!("t{id}"), format!("h:{id}"));
            let info = TaskInfo::new(name.parse().unwrap(), id, address.parse().unwrap());
            assignment.tasks.insert(SessionId(id), Arc::new(Task::new(SessionId(id), info)));
        }
        let replica = (tasks > 0).then_some(Replica { session: SessionId(1), since: number(1) });
        let assigned = Assigned { replicas: replica.into_iter().collect(), ..Assigned::default() };
        assignment.slices = SliceMap::uniform(assigned);
        for nth in 1..slices {
            assignment.slices.split(mandoline_core::key::SliceKey(nth << 40));
        }
        Arc::new(assignment)
    }

    fn feed(hub: &Hub) -> Feed {
        Feed {
            subscription: hub.subscribe(&kv(), None).unwrap(),
            rest: None,
            beat_at: Instant::now() + BEAT_EVERY,
            is_over: false,
            stop: CancellationToken::new(),
            _place: Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap(),
        }
    }

    /// The next event's data, and the size of the largest piece that it came in.
    fn event(feed: Feed) -> (String, Value, usize, Feed) {
        let (mut text, mut largest, mut feed) = (String::new(), 0, feed);
        while !text.ends_with("\n\n") {
            let (piece, rest) = feed.next().now_or_never().expect("there is more").unwrap();
            largest = largest.max(piece.len());
            text.push_str(std::str::from_utf8(&piece).unwrap());
            feed = rest;
        }
        let data: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        let data = serde_json::from_str(&data.join("\n")).unwrap();
        (text, data, largest, feed)
    }

    #[tokio::test]
    async fn everything_is_told_in_pieces_and_is_one_document() {
        let piece = PIECE as u64;
        for (tasks, slices) in [(0, 1), (1, 1), (3, 5), (piece, piece), (piece + 1, 4 * piece + 1)]
        {
            let hub = Hub::new();
            hub.publish(assignment(tasks, slices), None);
            let (text, data, largest, _) = event(feed(&hub));
            assert!(text.starts_with("event: full\nid: 1.1\ndata: {\"job\":\"kv\""), "{text}");
            assert_eq!(data["tasks"].as_array().unwrap().len() as u64, tasks);
            assert_eq!(data["slices"].as_array().unwrap().len() as u64, slices);
            assert_eq!((&data["exclusive"], &data["spill"]), (&json!(false), &Value::Null));
            assert!(largest < 100_000, "{largest}");
        }
    }

    #[tokio::test]
    async fn a_step_says_what_changed_and_the_end_is_told() {
        let hub = Hub::new();
        let start = assignment(2, 2);
        hub.publish(Arc::clone(&start), None);
        let (_, _, _, mut feed) = event(feed(&hub));
        let replica = Replica { session: SessionId(2), since: number(2) };
        let assigned =
            Assigned { replicas: [replica].into_iter().collect(), ..Assigned::default() };
        let slice: Slice = "0000000000000000..000000ffffffffff".parse().unwrap();
        let delta = Delta {
            job: kv(),
            from: number(1),
            to: number(2),
            tasks: vec![TaskChange::Gone(SessionId(1))],
            slices: vec![(Slice::FULL, assigned.clone())],
            spill: None,
        };
        hub.publish(Arc::new(delta.apply_to(&start).unwrap()), Some(&delta));
        let (text, data, _, next) = event(feed);
        feed = next;
        assert!(text.starts_with("event: delta\nid: 1.2\ndata: {"), "{text}");
        assert_eq!((&data["from"], &data["generation"]), (&json!("1.1"), &json!("1.2")));
        assert_eq!((&data["gone"], &data["tasks"]), (&json!([1]), &json!([])));
        assert_eq!(data["slices"][0]["replicas"], json!([{ "session": 2, "since": "1.2" }]));
        assert_eq!(slice_json(slice, &assigned)["slice"], "0000000000000000..000000ffffffffff");
        hub.forget(&kv());
        let (text, data, _, feed) = event(feed);
        assert!(text.starts_with("event: gone\ndata: "), "{text}");
        assert_eq!(data, json!({ "job": "kv" }));
        assert!(feed.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_quiet_stream_says_that_it_lives() {
        let hub = Hub::new();
        hub.publish(assignment(1, 1), None);
        let (_, _, _, feed) = event(feed(&hub));
        let began = Instant::now();
        let (beat, feed) = feed.next().await.unwrap();
        assert_eq!((&beat[..], began.elapsed()), (&b":\n\n"[..], BEAT_EVERY));
        feed.stop.cancel();
        assert!(feed.next().await.is_none());
    }
}
