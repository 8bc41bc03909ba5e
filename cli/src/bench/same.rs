//! `mandoline bench same`: proxy, stub, backhaul and Python give the same owner for a key, at one generation of a real cluster.
//!
//! An assigner runs as a process; a hundred and more tasks register with it from this one, each behind a socket of its own. Once the
//! assignment is frozen, everyone who routes is asked for the same random keys:
//!
//! | who | how it is asked |
//! |---|---|
//! | stub | the route that `clerk.channel` and `RouteLayer` share, with a client below it that notes whom it was told to ask |
//! | proxy | its own stages up to where it would send, `DryRun` |
//! | backhaul | the owner's layer, which has to serve, and another task's, which may not forward and has to name the owner |
//! | Python | by what `--write` leaves for its test: the assignment, the keys, their owners |
//!
//! Some keys of the same kind are asked for in earnest: through a proxy that is a process, by the stub over gRPC, and from any task by
//! HTTP and by gRPC. Whoever answers says its name.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use clap::Args;
use http::uri::PathAndQuery;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use mandoline::http::backhaul::BackhaulLayer;
use mandoline::http::key::KeyFrom;
use mandoline::http::names::{HOPS, OWNER};
use mandoline::http::replay::{BoxError, Replay};
use mandoline::http::route::{RouteError, RouteLayer, ToTask};
use mandoline::{Assignment, Clerk, SessionId, SliceKey, Slicelet};
use mandoline_core::prng::Prng;
use mandoline_core::spec::JobSpec;
use mandoline_proto::pb;
use mandoline_proxy::config::Config;
use mandoline_proxy::dry_run::DryRun;
use mandoline_proxy::router::Router;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tonic::body::Body;
use tonic::client::{Grpc, GrpcService};
use tonic::metadata::MetadataValue;
use tonic::transport::Endpoint;
use tonic_prost::ProstCodec;
use tower::util::BoxService;
use tower::{Layer, Service, ServiceExt, service_fn};

use crate::bench::echo::{App, KEY, serve};
use crate::bench::processes::{Cluster, ProxyKnows};
use crate::bench::trial::{STOPPED, until_stopped};
use crate::failure::Failure;

/// Asks everyone who routes for the same keys, and compares
///
/// Starts an assigner and a proxy as processes of their own on loopback, and 32 tasks in this one; all of them end with this
/// command. Ends with 1 if any two disagree.
///
/// Example: mandoline bench same --keys 1000000 --json
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct SameArgs {
    /// How many random keys of 1 to 64 bytes everyone is asked for; a quarter of them are grouped
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    keys: u32,
    /// For how many more a request is sent, in each of five ways
    #[arg(long, default_value_t = 2_000)]
    calls: u32,
    /// What the keys are drawn by
    #[arg(long, default_value_t = 7)]
    seed: u64,
    /// Leaves the assignment, the keys and their owners in this directory, for other languages
    #[arg(long, value_name = "DIR")]
    write: Option<PathBuf>,
    /// Ends with one JSON object on a line; the rest goes to stderr
    #[arg(long)]
    json: bool,
}

/// Runs until done, or told to stop.
pub(crate) async fn run(args: SameArgs) -> Result<ExitCode, Failure> {
    let Some(found) = until_stopped(measure(&args)).await? else {
        return Ok(ExitCode::from(STOPPED));
    };
    let Found { keys, calls, slices, tasks, generation, ref differ } = found;
    let total = differ.total();
    if args.json {
        println!(
            "{}",
            json!({
                "keys": keys, "calls": calls, "slices": slices, "tasks": tasks, "generation": generation,
                "differ": {
                    "stub": differ.stub, "proxy": differ.proxy, "backhaul": differ.backhaul,
                    "called": differ.called,
                },
                "differ_total": total,
            })
        );
    } else {
        println!(
            "{keys} keys and {calls} calls over {slices} slices of {tasks} tasks at generation {generation}: {total} answers differ"
        );
    }
    Ok(if total == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

struct Found {
    keys: u32,
    calls: u32,
    slices: usize,
    tasks: usize,
    generation: String,
    differ: Differ,
}

/// How many answers were not the clerk's, by who gave them.
#[derive(Default)]
struct Differ {
    stub: u64,
    proxy: u64,
    backhaul: u64,
    called: u64,
}

impl Differ {
    /// Counts an answer that is another, and shows the first few.
    fn note(&mut self, whose: impl Fn(&mut Self) -> &mut u64, is_same: bool, asked: &Asked) {
        if !is_same {
            *whose(self) += 1;
            if self.total() <= SHOWN {
                eprintln!("not the same for {:?} (slice key {})", asked.uri(), asked.slice_key());
            }
        }
    }

    const fn total(&self) -> u64 {
        self.stub + self.proxy + self.backhaul + self.called
    }
}

/// A key as a user has it.
struct Asked {
    group: Option<Vec<u8>>,
    key: Vec<u8>,
}

impl Asked {
    /// Any bytes; every fourth in one of some groups.
    fn draw(prng: &mut Prng, nth: u32) -> Self {
        let mut bytes = |least: u64| -> Vec<u8> {
            let length = least + prng.below(LENGTH_MAX + 1 - least);
            (0..length).map(|_| prng.below(256) as u8).collect()
        };
        let key = bytes(1);
        let group = nth.is_multiple_of(4).then(|| bytes(1));
        Self { group, key }
    }

    fn slice_key(&self) -> SliceKey {
        match &self.group {
            None => SliceKey::of(&self.key),
            Some(group) => SliceKey::grouped(group, &self.key),
        }
    }

    /// `/KEY`, or `/KEY?group=GROUP`: any byte can be said in both.
    fn uri(&self) -> String {
        let mut uri = format!("/{}", percent(&self.key));
        if let Some(group) = &self.group {
            write!(uri, "?group={}", percent(group)).expect("a string takes it");
        }
        uri
    }

    /// For `--write`: the length of the group, 65535 if there is none, that of the key, and both.
    fn write(&self, into: &mut Vec<u8>) {
        let lengths = [
            self.group.as_ref().map_or(u16::MAX, |group| group.len() as u16),
            self.key.len() as u16,
        ];
        into.extend(lengths.map(u16::to_le_bytes).as_flattened());
        into.extend(self.group.iter().flatten());
        into.extend(&self.key);
    }
}

fn percent(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(3 * bytes.len());
    for byte in bytes {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => text.push(char::from(*byte)),
            _ => write!(text, "%{byte:02X}").expect("a string takes it"),
        }
    }
    text
}

/// A task of this process.
struct Served {
    session: SessionId,
    address: String,
    slicelet: Arc<Slicelet>,
    serving: JoinHandle<()>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn measure(args: &SameArgs) -> anyhow::Result<Found> {
    let cluster = Cluster::start(&std::env::current_exe()?, 1).await?;
    let spec = JobSpec {
        balance_every: Duration::from_millis(100),
        // Nobody is lost because so many share a processor.
        heartbeat: Duration::from_secs(5),
        ..JobSpec::new("kv".parse()?)
    };
    cluster.apply(&(&spec).into(), START_WITHIN).await?;
    let clerk = Clerk::builder("kv").sources(cluster.addresses()).start()?;
    let mut tasks = Vec::new();
    for n in 0..TASKS {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (name, address) = (format!("kv-{n}"), listener.local_addr()?.to_string());
        let assigners = cluster.addresses().into_iter().map(|address| address.to_string());
        let slicelet = Slicelet::builder("kv", &name, &address).assigners(assigners);
        let slicelet = Arc::new(slicelet.start()?);
        let app = App::new(&name).forwarding(&slicelet, clerk.clone(), KeyFrom::header(KEY));
        let serving = tokio::spawn(serve(listener, app));
        tasks.push(Served { session: SessionId(0), address, slicelet, serving });
    }
    cluster.served("kv", TASKS, START_WITHIN).await?;
    let many = async |_: &Cluster| {
        clerk.assignment().filter(|known| known.slices.count() >= SLICES_MIN).map(drop)
    };
    cluster.until("a thousand slices", START_WITHIN, many).await?;
    let freeze = pb::FreezeJobRequest { job: "kv".to_owned(), unfreeze: false };
    cluster.admin(0).freeze_job(freeze).await?;
    let assignment = still(&cluster, &clerk, &tasks).await?;
    for task in &mut tasks {
        let known =
            assignment.tasks.iter().find(|(_, known)| known.info.address.as_str() == task.address);
        task.session = *known.with_context(|| format!("{} is no task", task.address))?.0;
    }
    let mut differ = Differ::default();
    decide(args, &assignment, &clerk, &tasks, &mut differ).await?;
    call(args, &cluster, &clerk, &tasks, &mut differ).await?;
    ensure!(
        clerk.assignment().is_some_and(|known| known.generation == assignment.generation),
        "the assignment has changed meanwhile"
    );
    if let Some(dir) = &args.write {
        keep(dir, args, &cluster, &assignment, &tasks).await?;
    }
    Ok(Found {
        keys: args.keys,
        calls: args.calls,
        slices: assignment.slices.count(),
        tasks: tasks.len(),
        generation: assignment.generation.to_string(),
        differ,
    })
}

/// Waits until everyone knows one generation: a round that was under way may still have changed something.
async fn still(
    cluster: &Cluster,
    clerk: &Clerk,
    tasks: &[Served],
) -> anyhow::Result<Arc<Assignment>> {
    let look = async |cluster: &Cluster| {
        let told = cluster.served("kv", TASKS, START_WITHIN).await.ok()?.generation?.into();
        let same = |known: mandoline::Generation| known == told;
        let known = clerk.assignment().filter(|known| same(known.generation))?;
        tasks.iter().all(|task| same(task.slicelet.generation())).then_some(known)
    };
    cluster.until("everyone to know one generation", START_WITHIN, look).await
}

/// Asks everyone for whom they would ask.
async fn decide(
    args: &SameArgs,
    assignment: &Assignment,
    clerk: &Clerk,
    tasks: &[Served],
    differ: &mut Differ,
) -> anyhow::Result<()> {
    let mut everyone = [
        Everyone::of(KeyFrom::path(0), clerk, tasks)?,
        Everyone::of("query:group/path:0".parse()?, clerk, tasks)?,
    ];
    let mut prng = Prng::new(args.seed);
    let mut chance = Prng::new(!args.seed);
    for nth in 0..args.keys {
        let asked = Asked::draw(&mut prng, nth);
        let owner = owner_of(assignment, &asked, tasks)?;
        let other = (owner + 1 + chance.below(tasks.len() as u64 - 1) as usize) % tasks.len();
        let Everyone { stub, proxy, layers } = &mut everyone[usize::from(asked.group.is_some())];
        let request = Request::get(asked.uri()).header("host", "kv").body(Empty::<Bytes>::new())?;
        let session = tasks[owner].session;

        let told = stub.call(request.clone()).await?.into_body();
        differ.note(|differ| &mut differ.stub, told == session, &asked);
        let told = proxy.first(request.clone().into_parts().0);
        let same = told == Ok((session, assignment.generation));
        differ.note(|differ| &mut differ.proxy, same, &asked);
        // Whoever may not forward serves, or says who does.
        let mut request = request;
        request.headers_mut().insert(HOPS, HeaderValue::from_static("0"));
        let served = layers[owner].ask(request.clone()).await;
        let refused = layers[other].ask(request).await;
        let named = refused.headers().get(OWNER).map(HeaderValue::as_bytes);
        let same = served.status() == StatusCode::OK
            && refused.status() == StatusCode::MISDIRECTED_REQUEST
            && named == Some(tasks[owner].address.as_bytes());
        differ.note(|differ| &mut differ.backhaul, same, &asked);
        if (nth + 1).is_multiple_of(100_000) {
            eprintln!("{} of {} keys", nth + 1, args.keys);
        }
    }
    Ok(())
}

/// Gives the place of the task that an assignment names for a key.
fn owner_of(assignment: &Assignment, asked: &Asked, tasks: &[Served]) -> anyhow::Result<usize> {
    let (slice, assigned) = assignment.get(asked.slice_key());
    let Some(replica) = assigned.replicas.as_slice().first() else {
        bail!("nobody serves {slice}")
    };
    let place = tasks.iter().position(|task| task.session == replica.session);
    place.with_context(|| format!("{} is no task", replica.session))
}

/// All who route, by keys of one kind.
struct Everyone {
    stub: Stub,
    proxy: DryRun,
    layers: Vec<Layered>,
}

type Nothing = Empty<Bytes>;
type Stub = BoxService<Request<Nothing>, Response<SessionId>, RouteError>;

impl Everyone {
    fn of(key: KeyFrom, clerk: &Clerk, tasks: &[Served]) -> anyhow::Result<Self> {
        let notes = service_fn(|request: Request<Replay<Nothing>>| {
            let to: &ToTask = request.extensions().get().expect("each request is addressed");
            std::future::ready(Ok::<_, Infallible>(Response::new(to.session)))
        });
        let stub = BoxService::new(RouteLayer::new(clerk.clone(), key.clone()).layer(notes));
        let router = Router::new(clerk.clone());
        let proxy = DryRun::new(Config::new("127.0.0.1:0".parse()?, key.clone(), router))?;
        let layer = |task: &Served| {
            let slicelet = Arc::clone(&task.slicelet);
            Layered(BackhaulLayer::new(&task.address, slicelet, clerk.clone(), key.clone()))
        };
        Ok(Self { stub, proxy, layers: tasks.iter().map(layer).collect() })
    }
}

/// A task as its layer sees requests.
struct Layered(BackhaulLayer);

impl Layered {
    async fn ask(&self, request: Request<Nothing>) -> Response<()> {
        let served = service_fn(|_: Request<Nothing>| {
            std::future::ready(Ok::<_, Infallible>(Response::new(Nothing::new())))
        });
        match self.0.layer(served).oneshot(request).await {
            Ok(answer) => answer.map(drop),
            Err(never) => match never {},
        }
    }
}

/// Sends requests to everyone, and compares who answers.
async fn call(
    args: &SameArgs,
    cluster: &Cluster,
    clerk: &Clerk,
    tasks: &[Served],
    differ: &mut Differ,
) -> anyhow::Result<()> {
    let proxy = cluster.start_proxy("proxy", ProxyKnows::default()).await?;
    let client = Client::builder(TokioExecutor::new()).build_http::<Nothing>();
    let routed = Client::builder(TokioExecutor::new()).build_http();
    let routed = RouteLayer::new(clerk.clone(), KeyFrom::header(KEY)).layer(routed);
    let channel = clerk.channel(KeyFrom::metadata(KEY));
    let plain = |task: &Served| {
        Ok(Endpoint::from_shared(format!("http://{}", task.address))?.connect_lazy())
    };
    let plain = tasks.iter().map(plain).collect::<anyhow::Result<Vec<_>>>()?;
    let mut prng = Prng::new(args.seed ^ CALLED);
    for _ in 0..args.calls {
        let length = 1 + prng.below(LENGTH_MAX);
        // What a header can say, and percent-encoded a path.
        let key: Vec<u8> = (0..length).map(|_| 0x21 + prng.below(0x7f - 0x21) as u8).collect();
        let asked = Asked { group: None, key };
        let owner = clerk.route(&asked.key)?.name().to_string();
        let header = HeaderValue::from_bytes(&asked.key)?;
        let request =
            |uri: String| Request::get(uri).header(KEY, header.clone()).body(Nothing::new());
        let at = prng.below(tasks.len() as u64) as usize;
        let by_proxy = format!("http://{}/kv{}", proxy.address, asked.uri());
        let told = [
            text(client.request(request(by_proxy)?).await?).await?,
            text(client.request(request(format!("http://{}/", tasks[at].address))?).await?).await?,
            text(routed.clone().oneshot(request("/".to_owned())?).await?).await?,
            say(channel.clone(), &header).await?,
            say(plain[at].clone(), &header).await?,
        ];
        differ.note(|differ| &mut differ.called, told.iter().all(|name| *name == owner), &asked);
    }
    Ok(())
}

async fn text(answer: Response<Incoming>) -> anyhow::Result<String> {
    let bytes = answer.into_body().collect().await?.to_bytes();
    Ok(String::from_utf8(bytes.to_vec())?)
}

/// Calls by gRPC.
async fn say<S>(channel: S, key: &HeaderValue) -> anyhow::Result<String>
where
    S: GrpcService<Body>,
    S::ResponseBody: http_body::Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    S::Error: std::error::Error + Send + Sync + 'static,
{
    let mut client = Grpc::new(channel);
    client.ready().await?;
    let mut request = tonic::Request::new(String::new());
    request.metadata_mut().insert(KEY, MetadataValue::try_from(key.as_bytes())?);
    let path = PathAndQuery::from_static("/t.Echo/Say");
    let codec = ProstCodec::<String, String>::default();
    Ok(client.unary(request, path, codec).await?.into_inner())
}

/// Leaves what another language needs to answer for itself.
async fn keep(
    dir: &Path,
    args: &SameArgs,
    cluster: &Cluster,
    assignment: &Assignment,
    tasks: &[Served],
) -> anyhow::Result<()> {
    let (mut keys, mut owners) = (Vec::new(), String::new());
    let mut prng = Prng::new(args.seed);
    for nth in 0..args.keys {
        let asked = Asked::draw(&mut prng, nth);
        asked.write(&mut keys);
        writeln!(owners, "{}", tasks[owner_of(assignment, &asked, tasks)?].address)?;
    }
    fs::write(dir.join("keys"), keys)?;
    fs::write(dir.join("owners"), owners)?;
    // As a clerk keeps it, to start from it where nobody answers.
    let path = dir.join("assignment");
    let clerk = Clerk::builder("kv").sources(cluster.addresses()).cache(&path).start()?;
    let kept = async |_: &Cluster| {
        let same =
            clerk.assignment().is_some_and(|known| known.generation == assignment.generation);
        (same && path.exists()).then_some(())
    };
    cluster.until("the assignment to be kept", START_WITHIN, kept).await
}

/// How many tasks serve, and how many slices they have at least.
const TASKS: usize = 32;
const SLICES_MIN: usize = 1_000;
/// How many keys are shown that someone had another owner for.
const SHOWN: u64 = 10;
/// How long a key or a group may be, in bytes.
const LENGTH_MAX: u64 = 64;
/// Keys that are sent are not those that are only asked for.
const CALLED: u64 = 1 << 32;

/// How long anything may take to start on a busy machine.
const START_WITHIN: Duration = Duration::from_secs(60);
