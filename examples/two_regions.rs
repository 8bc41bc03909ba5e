//! A web application in two regions: each user's profile lives in one of them, and clients go to the nearest task of either.
//!
//! A task serves what is its own, and forwards the rest: within its region straight to the owner, and beyond it to a gateway of the other
//! region, which is any task there. That one looks again, so only it has to know who serves what over there by now.
//!
//! With `cargo run -- assigner --init --data-dir a` running and a job whose users live where their path says:
//! `printf 'name: profiles\nbalance_every: 1s\nhomes: [{group: eu, region: eu}, {group: us, region: us}]\n' | cargo run -- job apply -`:
//!
//!     cargo run -p examples --example two_regions -- eu eu-0 127.0.0.1:9050 us=127.0.0.1:9052 us=127.0.0.1:9053
//!     cargo run -p examples --example two_regions -- eu eu-1 127.0.0.1:9051 us=127.0.0.1:9052 us=127.0.0.1:9053
//!     cargo run -p examples --example two_regions -- us us-0 127.0.0.1:9052 eu=127.0.0.1:9050 eu=127.0.0.1:9051
//!     cargo run -p examples --example two_regions -- us us-1 127.0.0.1:9053 eu=127.0.0.1:9050 eu=127.0.0.1:9051
//!     curl -i -X PUT -d sailor http://127.0.0.1:9050/profiles/us/ann
//!     curl -i http://127.0.0.1:9051/profiles/us/ann
//!
//! The answer says who gave it, and who passed the request on. A task that reaches no gateway of `us` answers 503 for who lives there, and
//! serves its own.

use std::collections::HashMap;
use std::error::Error;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::routing::get;
use mandoline::gateways::{Gateway, Gateways};
use mandoline::http::backhaul::BackhaulLayer;
use mandoline::http::key::KeyFrom;
use mandoline::http::route::Routing;
use mandoline::{Clerk, Slicelet};
use tokio::net::TcpListener;

const USAGE: &str = "usage: two_regions REGION NAME ADDRESS [OTHER=GATEWAY...]   (MANDOLINE_ASSIGNERS: whom to ask, 127.0.0.1:7400)";

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let assigners =
        std::env::var("MANDOLINE_ASSIGNERS").unwrap_or_else(|_| "127.0.0.1:7400".to_owned());
    let assigners: Vec<&str> = assigners.split(',').collect();
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [region, name, address, others @ ..] = words.as_slice() else { return Err(USAGE.into()) };
    let others =
        others.iter().map(|gateway| gateway.parse()).collect::<Result<Vec<Gateway>, _>>()?;
    let gateways = Gateways::new(region.parse()?, others)?;
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?.to_string();

    // By its label the assigner knows where the task is.
    let slicelet =
        Slicelet::builder("profiles", name, &address).label("region", region).assigners(&assigners);
    let slicelet = Arc::new(slicelet.start()?);
    let clerk = Clerk::builder("profiles").sources(&assigners).start()?;

    // The keys of a region lie together, which is what the job's homes go by.
    let key = KeyFrom::path(2).within(KeyFrom::path(1));
    let routing = Routing::new(clerk, key).by_gateways(gateways);
    let backhaul = BackhaulLayer::routed(name, Arc::clone(&slicelet), routing);
    let app = Router::new()
        .route("/profiles/{home}/{user}", get(show).put(keep))
        .with_state(Profiles { name: name.clone(), kept: Arc::default() })
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

/// The profiles that this task has.
#[derive(Clone)]
struct Profiles {
    name: String,
    kept: Arc<Mutex<HashMap<(String, String), String>>>,
}

impl Profiles {
    /// Who answers, and who has passed the request on.
    fn way(&self, asked: &HeaderMap) -> String {
        let via = asked.get_all(header::VIA).iter().filter_map(|via| via.to_str().ok());
        let via = via.map(|via| format!(", via {via}")).collect::<String>();
        format!("by {}{via}\n", self.name)
    }
}

async fn show(
    State(profiles): State<Profiles>,
    Path(user): Path<(String, String)>,
    asked: HeaderMap,
) -> (StatusCode, String) {
    let way = profiles.way(&asked);
    match profiles.kept.lock().expect("nobody panics in here").get(&user) {
        Some(profile) => (StatusCode::OK, format!("{profile}, {way}")),
        None => (StatusCode::NOT_FOUND, format!("no such user, {way}")),
    }
}

async fn keep(
    State(profiles): State<Profiles>,
    Path(user): Path<(String, String)>,
    asked: HeaderMap,
    profile: String,
) -> String {
    let way = profiles.way(&asked);
    profiles.kept.lock().expect("nobody panics in here").insert(user, profile);
    format!("kept, {way}")
}
