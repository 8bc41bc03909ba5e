//! A cache in the memory of several tasks, and a front end that sends each request to the task that may have the answer.
//!
//! A page takes a while to make. Its key's owner makes it once and has it from then on; what leaves a task, it lets go of.
//!
//! With `cargo run -- assigner --init --data-dir a` running and a job made by `echo 'name: pages' | cargo run -- job apply -`:
//!
//!     cargo run -p examples --example sharded_cache -- task pages-0 127.0.0.1:9010
//!     cargo run -p examples --example sharded_cache -- task pages-1 127.0.0.1:9011
//!     cargo run -p examples --example sharded_cache -- front 127.0.0.1:9012
//!     curl -i http://127.0.0.1:9012/pages/home

use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Extension, Router};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use mandoline::http::key::KeyFrom;
use mandoline::http::load::Cost;
use mandoline::http::own::{Own, OwnLayer};
use mandoline::http::route::RouteLayer;
use mandoline::{Clerk, Slice, SliceKey, Slicelet};
use tokio::net::TcpListener;
use tower::{Layer, ServiceExt};

const USAGE: &str = "usage: sharded_cache task NAME ADDRESS | sharded_cache front ADDRESS   (MANDOLINE_ASSIGNERS: whom to ask, 127.0.0.1:7400)";

/// How many pages a task keeps.
const CAPACITY: usize = 1000;
/// How long a page takes to make.
const WORK: Duration = Duration::from_millis(100);

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let assigners =
        std::env::var("MANDOLINE_ASSIGNERS").unwrap_or_else(|_| "127.0.0.1:7400".to_owned());
    let assigners: Vec<&str> = assigners.split(',').collect();
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["task", name, address] => task(name, address, &assigners).await,
        ["front", address] => front(address, &assigners).await,
        _ => Err(USAGE.into()),
    }
}

/// Serves the pages whose keys this task owns.
async fn task(name: &str, address: &str, assigners: &[&str]) -> Result<(), Box<dyn Error>> {
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?.to_string();
    let cache = Arc::new(Mutex::new(Lru::default()));
    let leaving = Arc::clone(&cache);
    let slicelet = Slicelet::builder("pages", name, &address)
        .assigners(assigners)
        .on_added(|slices| println!("came: {} ranges", slices.len()))
        .on_removed(move |slices| {
            let dropped = leaving.lock().expect("nobody panics in here").drop_all(slices);
            println!("left: {} ranges, {dropped} pages", slices.len());
        });
    let slicelet = Arc::new(slicelet.start()?);
    let own = OwnLayer::new(Arc::clone(&slicelet), KeyFrom::path(1));
    let app = Router::new().route("/pages/{name}", get(page)).with_state(cache).layer(own);
    let serving = tokio::spawn(async { axum::serve(listener, app).await });
    slicelet.ready().await?;
    println!("{name} serves at {address}");

    // Ctrl-C gives the slices away before the task goes; requests are answered until then.
    tokio::signal::ctrl_c().await?;
    slicelet.shutdown().await;
    serving.abort();
    Ok(())
}

/// Answers from memory, or makes the page. The balancer hears what either costs.
async fn page(
    State(cache): State<Arc<Mutex<Lru>>>,
    Extension(Own(guard)): Extension<Own>,
    Path(name): Path<String>,
) -> impl IntoResponse {
    if let Some(page) = cache.lock().expect("nobody panics in here").find(&name) {
        return ([("x-cache", "hit")], Extension(Cost(1.0)), page);
    }
    tokio::time::sleep(WORK).await;
    let page = format!("This is {name}.\n");
    let mut cache = cache.lock().expect("nobody panics in here");
    // What has left meanwhile is not kept: nobody would let go of it any more.
    if guard.still_owned() {
        cache.keep(name, page.clone());
    }
    ([("x-cache", "miss")], Extension(Cost(20.0)), page)
}

/// Sends each request to the owner of its key.
async fn front(address: &str, assigners: &[&str]) -> Result<(), Box<dyn Error>> {
    let clerk = Clerk::builder("pages").sources(assigners).start()?;
    clerk.ready().await;
    let client = Client::builder(TokioExecutor::new()).build_http();
    let client = RouteLayer::new(clerk, KeyFrom::path(1)).layer(client);
    let app = Router::new().fallback(async |asked: Request| match client.oneshot(asked).await {
        Ok(answer) => answer.map(Body::new),
        Err(error) => (StatusCode::BAD_GATEWAY, format!("{error}\n")).into_response(),
    });
    let listener = TcpListener::bind(address).await?;
    println!("the front end is at {}", listener.local_addr()?);
    Ok(axum::serve(listener, app).await?)
}

/// The pages that were asked for last, each with when that was.
#[derive(Default)]
struct Lru {
    uses: u64,
    pages: HashMap<String, (u64, String)>,
    by_use: BTreeMap<u64, String>,
}

impl Lru {
    fn find(&mut self, name: &str) -> Option<String> {
        let page = self.pages.get(name)?.1.clone();
        self.keep(name.to_owned(), page.clone());
        Some(page)
    }

    fn keep(&mut self, name: String, page: String) {
        self.uses += 1;
        self.by_use.insert(self.uses, name.clone());
        if let Some((before, _)) = self.pages.insert(name, (self.uses, page)) {
            self.by_use.remove(&before);
        }
        if self.pages.len() > CAPACITY {
            let (_, oldest) = self.by_use.pop_first().expect("each page has its last use");
            self.pages.remove(&oldest);
        }
    }

    fn drop_all(&mut self, slices: &[Slice]) -> usize {
        let before = self.pages.len();
        let left = |key: SliceKey| slices.iter().any(|slice| slice.contains(key));
        self.pages.retain(|name, _| !left(SliceKey::of(name.as_bytes())));
        self.by_use.retain(|_, name| self.pages.contains_key(name));
        before - self.pages.len()
    }
}
