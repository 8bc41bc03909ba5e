//! Which requests go by a gateway of another region, what each hop sees, and what becomes of loops and lost links.

use std::net::SocketAddr;
use std::time::Duration;

use mandoline::gateways::Gateways;
use mandoline_core::key::SliceKey;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use super::harness::{Backend, Owners, Stage, key_at};
use super::tunnels;
use crate::config::Config;

/// A request for a key of the lower half of all keys, or of the upper.
fn get(upper: bool, fields: &str) -> String {
    let mut keys = (0..).map(|n| format!("key-{n}"));
    let key = keys.find(|key| (SliceKey::of(key.as_bytes()).0 >= 1 << 63) == upper).unwrap();
    format!("GET /kv/{key} HTTP/1.1\r\nhost: a\r\n{fields}connection: close\r\n\r\n")
}

fn gateways(home: &str, beyond: &[(&str, SocketAddr)]) -> Option<Gateways> {
    let beyond = beyond.iter().map(|(region, at)| format!("{region}={at}").parse().unwrap());
    Some(Gateways::new(home.parse().unwrap(), beyond).unwrap())
}

/// A proxy for which the lower half of the keys lives in `eu` and the upper in `us`.
async fn stage(
    number: u64,
    (eu, us): (SocketAddr, SocketAddr),
    change: impl FnOnce(&mut Config),
) -> Stage {
    let stage = Stage::with(Owners::none(), change);
    stage.owners.give_in(number, &[(0, 1, eu, "eu"), (1 << 63, 2, us, "us")]).await;
    stage
}

#[tokio::test]
async fn what_lives_beyond_goes_by_its_gateway_and_from_there_to_its_task() {
    let (eu, us) = (Backend::echo("eu").await, Backend::echo("us").await);
    let far = stage(1, (eu.address, us.address), |config| {
        config.id = "us".parse().unwrap();
        config.gateways = gateways("us", &[("eu", "127.0.0.1:1".parse().unwrap())]);
    })
    .await;
    let at = far.proxy.local_addr();
    let near = stage(1, (eu.address, us.address), |config| {
        config.id = "eu".parse().unwrap();
        config.gateways = gateways("eu", &[("us", at)]);
    })
    .await;
    let at_home = near.talk(&get(false, "")).await;
    assert!(at_home.contains("\r\n\r\neu GET ") && !at_home.contains("mandoline-us"), "{at_home}");
    assert!(!at_home.contains("mandoline-hops"), "it went straight: {at_home}");
    let beyond = near.talk(&get(true, "")).await;
    let (head, seen) = beyond.split_once("\r\n\r\n").unwrap();
    assert!(seen.starts_with("us GET "), "{beyond}");
    // Each hop signs, on the way there and on the way back.
    let via = |text: &str| -> Vec<String> {
        let lines = text.lines().filter_map(|line| line.strip_prefix("via: "));
        lines.map(str::to_owned).collect()
    };
    assert_eq!(via(seen), ["1.1 mandoline-eu", "1.1 mandoline-us"]);
    assert_eq!(via(head), ["1.1 mandoline-us", "1.1 mandoline-eu"]);
    assert!(seen.contains("mandoline-hops: 0"), "the task is the last stop: {seen}");
    let stats = near.stats();
    assert_eq!((stats.tasks.len(), stats.gateways.gateways[0].1.sent), (1, 1), "{stats:?}");
    assert_eq!((stats.answered, stats.retried, stats.gateways.lost), (2, 0, 0));
    assert_eq!(far.stats().tasks.len(), 1);
}

#[tokio::test]
async fn a_region_without_a_gateway_is_reached_straight() {
    let (eu, us) = (Backend::echo("eu").await, Backend::echo("us").await);
    let stage = stage(1, (eu.address, us.address), |config| {
        config.gateways = gateways("eu", &[("ap", "127.0.0.1:1".parse().unwrap())]);
    })
    .await;
    assert!(stage.talk(&get(true, "")).await.contains("\r\n\r\nus GET "));
    // A hop that is left over ends at the task.
    let answer = stage.talk(&get(true, "mandoline-hops: 1\r\n")).await;
    assert!(answer.contains("mandoline-hops: 0"), "{answer}");
}

#[tokio::test]
async fn of_several_gateways_one_that_answers_is_found() {
    let (eu, us) = (Backend::echo("eu").await, Backend::echo("us").await);
    let nobody = Backend::nobody().await;
    let stage = stage(1, (eu.address, us.address), |config| {
        config.gateways = gateways("eu", &[("us", nobody), ("us", us.address)]);
    })
    .await;
    for _ in 0..10 {
        for number in 0..10 {
            let request = get(true, "").replace("/kv/", &format!("/kv/{number}"));
            let upper =
                SliceKey::of(request.split(['/', ' ']).nth(3).unwrap().as_bytes()).0 >= 1 << 63;
            let answer = stage.talk(&request).await;
            assert!(answer.contains(if upper { "\r\n\r\nus " } else { "\r\n\r\neu " }), "{answer}");
        }
    }
    let stats = stage.stats();
    assert_eq!((stats.failed, stats.gateways.lost), (0, 0));
    let failed: Vec<u64> = stats.gateways.gateways.iter().map(|(_, link)| link.failed).collect();
    let sent: Vec<u64> = stats.gateways.gateways.iter().map(|(_, link)| link.sent).collect();
    assert!(failed.contains(&0) && failed.iter().all(|failed| *failed < 10), "{failed:?}");
    assert_eq!(failed.iter().sum::<u64>(), sent.iter().min().copied().unwrap(), "{sent:?}");
}

#[tokio::test]
async fn a_lost_link_takes_only_the_keys_beyond_it() {
    let eu = Backend::echo("eu").await;
    let nobody = Backend::nobody().await;
    for unreachable in [nobody.to_string(), "gateway.invalid:80".to_owned()] {
        let gateway = format!("us={unreachable}").parse().unwrap();
        // The task of the other region would answer; it is not asked.
        let stage = stage(1, (eu.address, eu.address), |config| {
            config.gateways = Some(Gateways::new("eu".parse().unwrap(), [gateway]).unwrap());
        })
        .await;
        for _ in 0..3 {
            let answer = stage.talk(&get(true, "")).await;
            assert!(answer.starts_with("HTTP/1.1 503 Service Unavailable\r\n"), "{answer}");
            let status = "\r\nproxy-status: mandoline; error=destination_unavailable; details=\"region us\"\r\n";
            assert!(
                answer.contains(status) && answer.contains("\r\nretry-after: 1\r\n"),
                "{answer}"
            );
            assert!(
                answer.contains("mandoline: region us, where this key lives, cannot be"),
                "{answer}"
            );
            assert!(stage.talk(&get(false, "")).await.starts_with("HTTP/1.1 200"));
        }
        let stats = stage.stats();
        assert_eq!((stats.gateways.lost, stats.answered, stats.failed), (3, 3, 3));
    }
}

#[tokio::test]
async fn where_packets_vanish_one_request_finds_out_and_the_others_are_told() {
    const SOON: Duration = Duration::from_millis(200);
    let eu = Backend::echo("eu").await;
    // Nobody accepts, and once the queue is full the kernel drops what comes: as good as a link that swallows packets.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let hole = socket.listen(1).unwrap();
    let at = hole.local_addr().unwrap();
    let mut queue = vec![];
    while let Ok(stream) = timeout(SOON, TcpStream::connect(at)).await {
        queue.push(stream.unwrap());
    }
    let stage = stage(1, (eu.address, eu.address), |config| {
        config.gateways = gateways("eu", &[("us", at)]);
        config.timeouts.connect = SOON;
    })
    .await;
    let request = get(true, "");
    let all = (0..20).map(|_| stage.talk(&request));
    for answer in futures_util::future::join_all(all).await {
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("region us"), "{answer}");
    }
    // Those that came before the first knew of it, too, have waited no longer than that one.
    for _ in 0..20 {
        assert!(stage.talk(&request).await.starts_with("HTTP/1.1 503"));
    }
    let stats = stage.stats();
    assert_eq!(stats.gateways.lost, 40);
    assert!(stats.gateways.gateways[0].1.sent < 40, "some were told at once: {stats:?}");
    assert!(stage.talk(&get(false, "")).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn of_several_replicas_one_at_home_serves_and_one_far_away_if_that_is_gone() {
    let (eu, us) = (Backend::echo("eu").await, Backend::echo("us").await);
    let stage = Stage::with(Owners::none(), |config| {
        config.gateways = gateways("eu", &[("us", us.address)]);
    });
    stage.owners.give_all(1, &[(1, us.address, "us"), (2, eu.address, "eu")]).await;
    for _ in 0..10 {
        assert!(stage.talk(&get(true, "")).await.contains("\r\n\r\neu GET "));
    }
    let nobody = Backend::nobody().await;
    stage.owners.give_all(2, &[(1, us.address, "us"), (3, nobody, "eu")]).await;
    for _ in 0..10 {
        assert!(stage.talk(&get(true, "")).await.contains("\r\n\r\nus GET "));
    }
    let stats = stage.stats();
    assert_eq!((stats.failed, stats.gateways.gateways[0].1.sent), (0, 10));
}

#[tokio::test]
async fn what_crossed_once_is_not_sent_across_again() {
    let (eu, us) = (Backend::echo("eu").await, Backend::echo("us").await);
    let stage = stage(7, (eu.address, us.address), |config| {
        config.gateways = gateways("eu", &[("us", us.address)]);
    })
    .await;
    for hops in ["1", "0", "many"] {
        let answer = stage.talk(&get(true, &format!("mandoline-hops: {hops}\r\n"))).await;
        assert!(answer.starts_with("HTTP/1.1 421 Misdirected Request\r\n"), "{hops}: {answer}");
        assert!(answer.contains("\r\nmandoline-generation: 1.7\r\n"), "{hops}: {answer}");
    }
    assert!(stage.talk(&get(true, "mandoline-hops: 2\r\n")).await.starts_with("HTTP/1.1 200"));
    assert!(stage.talk(&get(false, "mandoline-hops: 1\r\n")).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn a_gateway_that_leads_back_is_named() {
    let (eu, us) = (Backend::echo("eu").await, Backend::echo("us").await);
    // To another proxy of the own region, which would send it to a gateway too.
    let tasks = (eu.address, us.address);
    let other = stage(1, tasks, |config| {
        config.id = "other".parse().unwrap();
        config.gateways = gateways("eu", &[("us", us.address)]);
    })
    .await;
    let at = other.proxy.local_addr();
    let near = stage(1, tasks, |config| config.gateways = gateways("eu", &[("us", at)])).await;
    let answer = near.talk(&get(true, "")).await;
    assert!(answer.starts_with("HTTP/1.1 502 Bad Gateway\r\n"), "{answer}");
    assert!(
        answer.contains("\r\nproxy-status: mandoline; error=proxy_loop_detected\r\n"),
        "{answer}"
    );
    // To whoever runs the proxy: an address from inside is not for clients.
    assert!(answer.contains("whoever runs this proxy finds in its log why"), "{answer}");
    assert!(!answer.contains(&at.to_string()), "{answer}");
    // To the proxy itself.
    let free = Backend::nobody().await;
    let own = stage(1, tasks, |config| {
        config.listeners = vec![free.into()];
        config.gateways = gateways("eu", &[("us", free)]);
    })
    .await;
    let answer = own.talk(&get(true, "")).await;
    assert!(answer.starts_with("HTTP/1.1 508 Loop Detected\r\n"), "{answer}");
}

#[tokio::test]
async fn who_lags_or_is_ahead_is_asked_again_once_both_know_the_same() {
    let (eu, us) = (Backend::echo("eu").await, Backend::echo("us").await);
    let tasks = (eu.address, us.address);
    let far = stage(1, tasks, |config| {
        config.gateways = gateways("us", &[("eu", "127.0.0.1:1".parse().unwrap())]);
    })
    .await;
    let at = far.proxy.local_addr();
    let near = stage(2, tasks, |config| {
        config.id = "near".parse().unwrap();
        config.gateways = gateways("eu", &[("us", at)]);
    })
    .await;
    // All has moved to the other region, which has not heard of it.
    near.owners.give_in(3, &[(0, 2, us.address, "us")]).await;
    let request = get(false, "");
    let (answer, ()) = tokio::join!(near.talk(&request), async {
        far.owners.give_in(3, &[(0, 2, us.address, "us")]).await;
    });
    assert!(answer.contains("\r\n\r\nus GET "), "{answer}");
    // And back, which the near one has not heard of.
    far.owners.give_in(4, &[(0, 1, eu.address, "eu")]).await;
    let (answer, ()) = tokio::join!(near.talk(&request), async {
        near.owners.give_in(4, &[(0, 1, eu.address, "eu")]).await;
    });
    assert!(answer.contains("\r\n\r\neu GET "), "{answer}");
}

#[tokio::test]
async fn a_group_of_keys_lies_together() {
    let (low, high) = (Backend::echo("low").await, Backend::echo("high").await);
    let stage = Stage::with(Owners::none(), |config| key_at(config, "path:0/path:1"));
    let group = SliceKey::grouped(b"eu", b"").0 & !0xFFFF_FFFF;
    let runs = [(0, 1, low.address), (group, 2, high.address), (group + (1 << 32), 1, low.address)];
    stage.owners.give(1, &runs).await;
    for (path, task) in [("/eu/ann", "high"), ("/eu/bob", "high"), ("/us/ann", "low")] {
        let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        let answer = stage.talk(&request).await;
        assert!(answer.contains(&format!("\r\n\r\n{task} GET ")), "{path}: {answer}");
    }
}

#[tokio::test]
async fn a_tunnel_goes_by_a_gateway_and_the_client_is_known_beyond() {
    let (eu, us) = (Backend::echo("eu").await, tunnels::echo().await);
    let far = stage(1, (eu.address, us.address), |config| {
        config.id = "us".parse().unwrap();
        config.gateways = gateways("us", &[("eu", "127.0.0.1:1".parse().unwrap())]);
    })
    .await;
    let at = far.proxy.local_addr();
    let near = stage(1, (eu.address, us.address), |config| {
        config.id = "eu".parse().unwrap();
        config.gateways = gateways("eu", &[("us", at)]);
    })
    .await;
    let mut wire = near.connect().await;
    let (line, _) =
        get(true, "").split_once('\n').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
    wire.send(tunnels::ASK.replace("GET /kv/a HTTP/1.1\r", &line)).await;
    assert!(wire.head().await.starts_with("HTTP/1.1 101 "));
    tunnels::says(&mut wire, "from far away").await;
    assert_eq!((near.stats().tunnels, far.stats().tunnels), (1, 1));

    let seen = Backend::echo("us").await;
    let far = stage(1, (eu.address, seen.address), |config| {
        config.id = "us".parse().unwrap();
        config.gateways = gateways("us", &[("eu", "127.0.0.1:1".parse().unwrap())]);
        config.forwarded.trusted = vec!["127.0.0.0/8".parse().unwrap()];
    })
    .await;
    let at = far.proxy.local_addr();
    let near = stage(1, (eu.address, seen.address), |config| {
        config.id = "eu".parse().unwrap();
        config.gateways = gateways("eu", &[("us", at)]);
        config.forwarded.trusted = vec!["127.0.0.0/8".parse().unwrap()];
    })
    .await;
    let answer = near.talk(&get(true, "x-forwarded-for: 192.0.2.1\r\n")).await;
    assert!(answer.contains("x-forwarded-for: 192.0.2.1, 127.0.0.1, 127.0.0.1\n"), "{answer}");
}
