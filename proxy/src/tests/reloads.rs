//! Another configuration comes into force while requests are served, or none does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use tokio::task::JoinSet;

use super::harness::{Backend, Owners, Stage, Wire, config, talk, until, within};
use crate::config::Config;
use crate::config::matching::Match;
use crate::config::route::{Destination, Route};

const GET: &str = "GET /kv/a HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n";

/// Takes one more route, to the tasks that `owners` knows.
pub(super) fn with_route(config: &mut Config, host: &str, owners: &Owners) {
    let router = owners.router();
    let job = router.job().clone();
    config.jobs.insert(job.clone(), router);
    let matches = Match { host: Some(host.parse().unwrap()), ..Match::default() };
    let to = Destination::Job { job, key: "path:1".parse().unwrap() };
    config.routes.push(Route::new(matches, to));
}

#[tokio::test]
async fn requests_go_by_host_path_method_and_header_to_the_jobs_of_their_routes() {
    let (one, two) = (Backend::echo("one").await, Backend::echo("two").await);
    let (first, second) = (Owners::all(one.address).await, Owners::none_of("carts"));
    second.give(1, &[(0, 2, two.address)]).await;
    let stage = Stage::with(first, |config| with_route(config, "shop.org", &second));
    let answer = stage.talk(GET).await;
    assert!(answer.contains("one GET /kv/a"), "{answer}");
    let answer = stage.talk(&GET.replace("host: h", "host: Shop.org:80")).await;
    assert!(answer.contains("two GET /kv/a"), "{answer}");
}

#[tokio::test]
async fn a_request_that_no_route_takes_is_told_so() {
    let one = Backend::echo("one").await;
    let stage = Stage::with(Owners::all(one.address).await, |config| {
        config.routes[0].matches = Match {
            path: Some("/kv/*".parse().unwrap()),
            methods: vec![http::Method::GET],
            ..Match::default()
        };
    });
    let answer = stage.talk(&GET.replace("/kv/a", "/other")).await;
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    assert!(answer.contains("proxy-status: mandoline; error=destination_not_found"), "{answer}");
    let answer = stage.talk(&GET.replace("GET", "PUT")).await;
    assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
    assert!(answer.contains("allow: GET\r\n"), "{answer}");
    let answer = stage.talk(&GET.replace("/kv/a", "/kv/%2e%2e/admin")).await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert_eq!(stage.stats().refused, 3);
}

#[tokio::test]
async fn a_hundred_reloads_under_load_cost_no_request() {
    let (one, two) = (Backend::echo("one").await, Backend::echo("two").await);
    let (first, second) = (Owners::all(one.address).await, Owners::none_of("carts"));
    second.give(1, &[(0, 2, two.address)]).await;
    let stage = Stage::new(first);
    let plain = config(&stage.owners, |_| {});
    let mut other = plain.clone();
    other.jobs = [(second.router().job().clone(), second.router())].into();
    let Destination::Job { job, .. } = &mut other.routes[0].to else { unreachable!() };
    *job = second.router().job().clone();

    let (done, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut clients = JoinSet::new();
    for _ in 0..8 {
        let mut wire = stage.connect().await;
        let (done, served) = (Arc::clone(&done), Arc::clone(&served));
        clients.spawn(async move {
            while !done.load(Relaxed) {
                wire.send("GET /kv/a HTTP/1.1\r\nhost: h\r\n\r\n").await;
                let head = wire.head().await;
                assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
                wire.read_to("[]").await;
                served.fetch_add(1, Relaxed);
            }
        });
    }
    let reloader = stage.proxy.reloader();
    for n in 0..100 {
        let before = served.load(Relaxed);
        reloader.reload(if n % 2 == 0 { other.clone() } else { plain.clone() }).await.unwrap();
        let expected = if n % 2 == 0 { "two GET" } else { "one GET" };
        let answer = stage.talk(GET).await;
        assert!(answer.contains(expected), "{n}: {answer}");
        until("a request after the reload", || served.load(Relaxed) > before).await;
    }
    done.store(true, Relaxed);
    while let Some(client) = within("the clients", clients.join_next()).await {
        client.unwrap();
    }
    let stats = stage.stats();
    assert_eq!((stats.failed, stats.refused, stats.abandoned), (0, 0, 0));
}

#[tokio::test]
async fn a_request_under_way_ends_by_what_it_began_with() {
    let task = Backend::raw(|stream| async move {
        let mut wire = Wire::of(stream);
        wire.head().await;
        wire.send("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nab").await;
        wire.head().await;
    })
    .await;
    let stage = Stage::new(Owners::all(task.address).await);
    let mut wire = stage.connect().await;
    wire.send("GET /kv/a HTTP/1.1\r\nhost: h\r\n\r\n").await;
    wire.read_to("ab").await;
    let next = Owners::none_of("carts");
    let mut other = config(&stage.owners, |_| {});
    other.jobs = [(next.router().job().clone(), next.router())].into();
    other.routes.clear();
    stage.proxy.reloader().reload(other).await.unwrap();
    assert_eq!(stage.stats().in_flight, 1);
    let answer = stage.talk(GET).await;
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
}

#[tokio::test]
async fn a_bad_configuration_leaves_the_old_one_in_force() {
    let one = Backend::echo("one").await;
    let stage = Stage::with(Owners::all(one.address).await, |config| {
        config.admin = Some("127.0.0.1:0".parse().unwrap());
    });
    let reloader = stage.proxy.reloader();
    let changed = |change: fn(&mut Config)| {
        let mut config = config(&stage.owners, change);
        config.admin = Some("127.0.0.1:0".parse().unwrap());
        config
    };
    for (bad, why) in [
        (changed(|config| config.routes.push(config.routes[0].clone())), "routes 1 and 2 both"),
        (changed(|config| config.jobs.clear()), "not among the jobs"),
        (
            changed(|config| {
                config.listeners =
                    vec!["127.0.0.2:0".parse::<std::net::SocketAddr>().unwrap().into()];
            }),
            "listen cannot change while the proxy runs",
        ),
    ] {
        let error = reloader.reload(bad).await.unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
        let answer = stage.talk(GET).await;
        assert!(answer.contains("one GET /kv/a"), "{answer}");
    }
    let admin = stage.proxy.admin_addr().unwrap();
    let metrics = async || {
        let ask = b"GET /metrics HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n";
        talk(admin, ask).await
    };
    let page = metrics().await;
    assert!(page.contains("mandoline_proxy_reloads_refused_total 3"), "{page}");
    assert!(page.contains("mandoline_proxy_reload_last_refused 1"), "{page}");
    reloader.reload(changed(|_| {})).await.unwrap();
    let page = metrics().await;
    assert!(page.contains("mandoline_proxy_reload_last_refused 0"), "{page}");
}
