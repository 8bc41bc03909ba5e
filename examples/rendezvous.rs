//! A meeting point: publishers and subscribers of a topic meet in the memory of the task that owns it, whichever they ask.
//!
//! A message is a hop to the owner and a hop to each listener, and nobody keeps lists of who listens where. When a topic moves to
//! another task its listeners are told, and come again. What is said in between is lost: a meeting point keeps nothing.
//!
//! With `cargo run -- assigner --init --data-dir a` running and a job made by `echo 'name: topics' | cargo run -- job apply -`:
//!
//!     cargo run -p examples --example rendezvous -- task topics-0 127.0.0.1:9030
//!     cargo run -p examples --example rendezvous -- task topics-1 127.0.0.1:9031
//!     cargo run -p examples --example rendezvous -- listen lunch 127.0.0.1:9030 127.0.0.1:9031
//!     curl -d soup http://127.0.0.1:9031/topics/lunch

use std::collections::HashMap;
use std::error::Error;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::ws::close_code::RESTART;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, State};
use axum::response::Response;
use axum::routing::get;
use axum::{Extension, Router};
use futures_util::StreamExt;
use mandoline::http::backhaul::BackhaulLayer;
use mandoline::http::key::KeyFrom;
use mandoline::http::own::Own;
use mandoline::slicelet::Guard;
use mandoline::{Clerk, Slicelet};
use tokio::net::TcpListener;
use tokio::sync::broadcast;
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::Message as Heard;

const USAGE: &str = "usage: rendezvous task NAME ADDRESS | rendezvous listen TOPIC ADDRESS...   (MANDOLINE_ASSIGNERS: whom to ask, 127.0.0.1:7400)";

/// How far a listener may fall behind before it misses something.
const BEHIND: usize = 64;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let assigners =
        std::env::var("MANDOLINE_ASSIGNERS").unwrap_or_else(|_| "127.0.0.1:7400".to_owned());
    let assigners: Vec<&str> = assigners.split(',').collect();
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["task", name, address] => task(name, address, &assigners).await,
        ["listen", topic, addresses @ ..] if !addresses.is_empty() => {
            listen(topic, addresses).await;
            Ok(())
        }
        _ => Err(USAGE.into()),
    }
}

/// Serves the topics that this task owns, and passes on to their owners those who ask it for others.
async fn task(name: &str, address: &str, assigners: &[&str]) -> Result<(), Box<dyn Error>> {
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?.to_string();
    let slicelet = Slicelet::builder("topics", name, &address).assigners(assigners);
    let slicelet = Arc::new(slicelet.start()?);
    let clerk = Clerk::builder("topics").sources(assigners).start()?;
    let backhaul = BackhaulLayer::new(name, Arc::clone(&slicelet), clerk, KeyFrom::path(1));
    let topics = get(join).post(say).with_state(Topics::default());
    let app = Router::new().route("/topics/{topic}", topics).layer(backhaul);
    let serving = tokio::spawn(async { axum::serve(listener, app).await });
    slicelet.ready().await?;
    println!("{name} serves at {address}");

    // Ctrl-C gives the slices away before the task goes, and with them their listeners.
    tokio::signal::ctrl_c().await?;
    slicelet.shutdown().await;
    serving.abort();
    Ok(())
}

/// Each topic that someone listens to.
#[derive(Clone, Default)]
struct Topics(Arc<Mutex<HashMap<String, broadcast::Sender<String>>>>);

/// Tells everyone who listens to a topic, and the publisher how many those are.
async fn say(
    State(Topics(topics)): State<Topics>,
    Path(topic): Path<String>,
    said: String,
) -> String {
    let topics = topics.lock().expect("nobody panics in here");
    let heard = topics.get(&topic).map_or(0, |room| room.send(said).unwrap_or(0));
    format!("heard by {heard}\n")
}

async fn join(
    State(Topics(topics)): State<Topics>,
    Extension(Own(guard)): Extension<Own>,
    Path(topic): Path<String>,
    upgrade: WebSocketUpgrade,
) -> Response {
    let mut topics = topics.lock().expect("nobody panics in here");
    topics.retain(|_, room| room.receiver_count() > 0); // the others were left by everyone
    let room = topics.entry(topic).or_insert_with(|| broadcast::channel(BEHIND).0);
    let said = room.subscribe();
    upgrade.on_upgrade(move |socket| meet(socket, said, guard))
}

/// Carries what is said to one listener, as long as the topic is this task's.
async fn meet(mut socket: WebSocket, mut said: broadcast::Receiver<String>, guard: Arc<Guard>) {
    loop {
        let sent = tokio::select! {
            () = guard.lost() => break,
            said = said.recv() => match said {
                Ok(said) => socket.send(Message::Text(said.into())).await,
                Err(_) => break, // it fell behind
            },
            heard = socket.recv() => match heard {
                Some(Ok(_)) => continue, // such as a ping, which is answered
                _ => return,
            },
        };
        if sent.is_err() {
            return;
        }
    }
    let again = CloseFrame { code: RESTART, reason: "come again".into() };
    // A listener that has left needs no word.
    drop(socket.send(Message::Close(Some(again))).await);
}

/// Prints what is said about a topic; when the task that it listens by goes, it goes on by the next.
async fn listen(topic: &str, addresses: &[&str]) {
    for address in addresses.iter().cycle() {
        let Ok((mut socket, _)) = connect_async(format!("ws://{address}/topics/{topic}")).await
        else {
            tokio::time::sleep(Duration::from_millis(200)).await;
            continue;
        };
        println!("listening to {topic} by {address}");
        while let Some(Ok(heard)) = socket.next().await {
            match heard {
                Heard::Text(said) => println!("{topic}: {said}"),
                Heard::Close(Some(why)) => println!("{topic}: {}", why.reason),
                _ => {}
            }
        }
    }
}
