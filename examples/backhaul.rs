//! A web application whose every task answers for every user: what another task owns is forwarded to it, so clients may go to any.
//!
//! With `cargo run -- assigner --init --data-dir a` running and a job made by `echo 'name: carts' | cargo run -- job apply -`:
//!
//!     cargo run -p examples --example backhaul -- carts-0 127.0.0.1:9000
//!     cargo run -p examples --example backhaul -- carts-1 127.0.0.1:9001
//!     curl -i -d apples http://127.0.0.1:9000/carts/ann
//!     curl -i http://127.0.0.1:9001/carts/ann

use std::collections::HashMap;
use std::error::Error;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::{Path, State};
use axum::routing::get;
use mandoline::http::backhaul::BackhaulLayer;
use mandoline::http::key::KeyFrom;
use mandoline::{Clerk, Slicelet};
use tokio::net::TcpListener;

const USAGE: &str =
    "usage: backhaul NAME ADDRESS   (MANDOLINE_ASSIGNERS: whom to ask, 127.0.0.1:7400)";

/// What each user of this task has in the cart.
#[derive(Clone, Default)]
struct Carts(Arc<Mutex<HashMap<String, Vec<String>>>>);

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let assigners =
        std::env::var("MANDOLINE_ASSIGNERS").unwrap_or_else(|_| "127.0.0.1:7400".to_owned());
    let assigners: Vec<&str> = assigners.split(',').collect();
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [name, address] = words.as_slice() else { return Err(USAGE.into()) };
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?.to_string();

    let slicelet = Slicelet::builder("carts", name, &address).assigners(&assigners);
    let slicelet = Arc::new(slicelet.start()?);
    let clerk = Clerk::builder("carts").sources(&assigners).start()?;

    let backhaul = BackhaulLayer::new(name, Arc::clone(&slicelet), clerk, KeyFrom::path(1));
    let app = Router::new()
        .route("/carts/{user}", get(show).post(add))
        .with_state(Carts::default())
        .layer(backhaul);
    let serving = tokio::spawn(async { axum::serve(listener, app).await });
    slicelet.ready().await?;
    println!("{name} serves at {address}");

    // Ctrl-C gives the slices away before the task goes; requests are answered until then.
    tokio::signal::ctrl_c().await?;
    slicelet.shutdown().await;
    serving.abort();
    Ok(())
}

async fn show(State(Carts(carts)): State<Carts>, Path(user): Path<String>) -> String {
    let carts = carts.lock().expect("nobody panics in here");
    carts.get(&user).map(|cart| cart.join(", ")).unwrap_or_default() + "\n"
}

async fn add(State(Carts(carts)): State<Carts>, Path(user): Path<String>, item: String) {
    carts.lock().expect("nobody panics in here").entry(user).or_default().push(item);
}
