//! A gRPC service whose clients send each call to its key's owner: a generated stub over a channel that routes.
//!
//! The stub is what `tonic-prost-build` makes of `kv.proto` and knows nothing of shards. Servers take in what is theirs, by a layer.
//!
//! With `cargo run -- assigner --init --data-dir a` running and a job made by `echo 'name: stubs' | cargo run -- job apply -`:
//!
//!     cargo run -p examples --example stub_routing -- serve stubs-0 127.0.0.1:9040
//!     cargo run -p examples --example stub_routing -- serve stubs-1 127.0.0.1:9041
//!     cargo run -p examples --example stub_routing -- put colour red
//!     cargo run -p examples --example stub_routing -- get colour

use std::collections::HashMap;
use std::error::Error;
use std::sync::{Arc, Mutex};

use mandoline::http::key::KeyFrom;
use mandoline::http::own::OwnLayer;
use mandoline::{Clerk, Slicelet};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::metadata::errors::InvalidMetadataValue;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use kv::kv_client::KvClient;
use kv::kv_server::{Kv, KvServer};
use kv::{GetReply, GetRequest, PutReply, PutRequest};

// It is generated.
#[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all, clippy::use_self)]
mod kv {
    tonic::include_proto!("kv");
}

const USAGE: &str = "usage: stub_routing serve NAME ADDRESS | stub_routing put KEY VALUE | stub_routing get KEY...   (MANDOLINE_ASSIGNERS: whom to ask, 127.0.0.1:7400)";

/// Where clients say the key and servers find it.
const SHARD_KEY: &str = "x-shard-key";

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let assigners =
        std::env::var("MANDOLINE_ASSIGNERS").unwrap_or_else(|_| "127.0.0.1:7400".to_owned());
    let assigners: Vec<&str> = assigners.split(',').collect();
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["serve", name, address] => serve(name, address, &assigners).await,
        ["put", key, value] => put(key, value, &assigners).await,
        ["get", keys @ ..] if !keys.is_empty() => get(keys, &assigners).await,
        _ => Err(USAGE.into()),
    }
}

/// Serves the keys that this task owns.
async fn serve(name: &str, address: &str, assigners: &[&str]) -> Result<(), Box<dyn Error>> {
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?.to_string();
    let slicelet = Slicelet::builder("stubs", name, &address).assigners(assigners);
    let slicelet = Arc::new(slicelet.start()?);
    let shard = Shard { name: name.to_owned(), values: Mutex::default() };
    let server = Server::builder()
        .layer(OwnLayer::new(Arc::clone(&slicelet), KeyFrom::metadata(SHARD_KEY)))
        .add_service(KvServer::new(shard));
    let serving = tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    slicelet.ready().await?;
    println!("{name} serves at {address}");

    // Ctrl-C gives the slices away before the task goes; calls are answered until then.
    tokio::signal::ctrl_c().await?;
    slicelet.shutdown().await;
    serving.abort();
    Ok(())
}

/// What one task has in memory.
struct Shard {
    name: String,
    values: Mutex<HashMap<String, String>>,
}

#[tonic::async_trait]
impl Kv for Shard {
    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetReply>, Status> {
        let values = self.values.lock().expect("nobody panics in here");
        let value = values.get(&request.into_inner().key).cloned();
        Ok(Response::new(GetReply { value, served_by: self.name.clone() }))
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutReply>, Status> {
        let PutRequest { key, value } = request.into_inner();
        self.values.lock().expect("nobody panics in here").insert(key, value);
        Ok(Response::new(PutReply { served_by: self.name.clone() }))
    }
}

/// The stub, over a channel to all tasks instead of one to a server.
async fn stub(
    assigners: &[&str],
) -> Result<KvClient<mandoline::http::channel::Channel>, Box<dyn Error>> {
    let clerk = Clerk::builder("stubs").sources(assigners).start()?;
    clerk.ready().await;
    Ok(KvClient::new(clerk.channel(KeyFrom::metadata(SHARD_KEY))))
}

/// A call, and beside it the key that it is routed by.
fn keyed<T>(key: &str, message: T) -> Result<Request<T>, InvalidMetadataValue> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(SHARD_KEY, key.parse()?);
    Ok(request)
}

async fn put(key: &str, value: &str, assigners: &[&str]) -> Result<(), Box<dyn Error>> {
    let message = PutRequest { key: key.to_owned(), value: value.to_owned() };
    let reply = stub(assigners).await?.put(keyed(key, message)?).await?.into_inner();
    println!("{} keeps {key}", reply.served_by);
    Ok(())
}

async fn get(keys: &[&str], assigners: &[&str]) -> Result<(), Box<dyn Error>> {
    let mut stub = stub(assigners).await?;
    for key in keys {
        let message = GetRequest { key: (*key).to_owned() };
        let GetReply { value, served_by } = stub.get(keyed(key, message)?).await?.into_inner();
        println!("{served_by} has {key}: {}", value.as_deref().unwrap_or("nothing"));
    }
    Ok(())
}
