//! A client that goes on using reqwest, and sends each request straight to its key's owner, with no proxy in between.
//!
//! Routing goes round reqwest as it does round any HTTP client: whatever the client does, such as its pool and its timeouts, it does on.
//!
//! With `cargo run -- dev` running, whose sample cache this asks:
//!
//!     cargo run -p examples --example reqwest_client -- put apple red
//!     cargo run -p examples --example reqwest_client -- get apple pear
//!
//! That is what `curl http://127.0.0.1:8080/kv/apple` gets by way of the proxy.

use mandoline::Clerk;
use mandoline::http::key::KeyFrom;
use mandoline::http::replay::{BoxError, Replay};
use mandoline::http::route::RouteLayer;
use reqwest::{Body, Client, RequestBuilder, Response};
use tower::util::BoxCloneSyncService;
use tower::{Layer, ServiceExt, service_fn};

const USAGE: &str = "usage: reqwest_client put KEY VALUE | reqwest_client get KEY...   (MANDOLINE_ASSIGNERS: whom to ask, 127.0.0.1:7400)";

/// reqwest, whose requests go to the tasks of a job, each to the owner of its key.
#[derive(Clone)]
struct Sharded {
    plain: Client,
    routed: BoxCloneSyncService<http::Request<Body>, http::Response<Body>, BoxError>,
}

impl Sharded {
    fn new(plain: Client, clerk: Clerk, key: KeyFrom) -> Self {
        let client = plain.clone();
        let one_task = service_fn(move |request: http::Request<Replay<Body>>| {
            let client = client.clone();
            async move {
                let request = reqwest::Request::try_from(request.map(Body::wrap))?;
                client.execute(request).await.map(http::Response::from)
            }
        });
        let routed = RouteLayer::new(clerk, key).layer(one_task).map_err(BoxError::from);
        Self { plain, routed: BoxCloneSyncService::new(routed) }
    }

    /// Sends a request made by reqwest. Its host says nothing: the key does.
    async fn send(&self, request: RequestBuilder) -> Result<Response, BoxError> {
        let request = http::Request::try_from(request.build()?)?;
        Ok(self.routed.clone().oneshot(request).await?.into())
    }
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let assigners =
        std::env::var("MANDOLINE_ASSIGNERS").unwrap_or_else(|_| "127.0.0.1:7400".to_owned());
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["put", key, value] => {
            let kv = connect(&assigners).await?;
            let answer = kv.send(kv.plain.put(url(key)).body((*value).to_owned())).await?;
            println!("{key}: {}", told(answer).await?);
        }
        ["get", keys @ ..] if !keys.is_empty() => {
            let kv = connect(&assigners).await?;
            for key in keys {
                println!("{key}: {}", told(kv.send(kv.plain.get(url(key))).await?).await?);
            }
        }
        _ => return Err(USAGE.into()),
    }
    Ok(())
}

async fn connect(assigners: &str) -> Result<Sharded, BoxError> {
    let clerk = Clerk::builder("kv").sources(assigners.split(',')).start()?;
    clerk.ready().await;
    Ok(Sharded::new(Client::new(), clerk, KeyFrom::path(1)))
}

fn url(key: &str) -> String {
    format!("http://kv/kv/{key}")
}

/// Which task has answered, and what.
async fn told(answer: Response) -> Result<String, reqwest::Error> {
    let (status, task) = (answer.status(), answer.remote_addr());
    let task = task.map_or_else(|| "a task".to_owned(), |task| task.to_string());
    Ok(format!("{status} from {task}: {}", answer.text().await?.trim()))
}
