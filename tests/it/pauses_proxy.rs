//! Pauses as operators use them, in front of real tasks: by time, by flag, and with clients that leave and a slow release.

use std::time::Duration;

use mandoline_core::flags::{AtEnd, PauseOrder, Scope};
use mandoline_core::spec::JobSpec;
use mandoline_proto::pb;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::callers::{PATIENCE, my_turn, program};
use crate::processes::{Cluster, Proxy, ProxyKnows, Task, page};

/// An assigner, a task and a proxy, and whoever operates them.
struct Scene {
    task: Option<Task>,
    proxy: Proxy,
    cluster: Cluster,
}

impl Scene {
    async fn start() -> Self {
        let cluster = Cluster::start(program(), 1).await.unwrap();
        let heartbeat = Duration::from_millis(500);
        let spec = JobSpec { heartbeat, ..JobSpec::new("kv".parse().unwrap()) };
        cluster.apply(&pb::JobSpec::from(&spec), PATIENCE).await.unwrap();
        let task = Some(cluster.start_task("kv-0").unwrap());
        cluster.served("kv", 1, PATIENCE).await.unwrap();
        let proxy = cluster.start_proxy("proxy", ProxyKnows::default()).await.unwrap();
        Self { task, proxy, cluster }
    }

    /// Begins a pause of some requests, and waits until the proxy goes by it. It has one worker.
    async fn pause(&self, scope: Scope, lasts: Duration) -> u64 {
        let (why, at_end, release_over) = ("a test".into(), AtEnd::GoOn, Duration::ZERO);
        let order = PauseOrder { scope, why, lasts, at_end, release_over };
        let request = pb::AddPauseRequest { order: Some((&order).into()) };
        let id = self.cluster.admin(0).add_pause(request).await.unwrap().into_inner().id;
        self.until("pause_in_flight", id, 0).await;
        id
    }

    async fn end(&self, id: u64, over: Duration) {
        let over_ms = Some(over.as_millis() as u64);
        self.cluster.admin(0).end_pause(pb::EndPauseRequest { id, over_ms }).await.unwrap();
    }

    /// Stops the only task and starts it anew.
    async fn restart_task(&mut self) {
        let mut task = self.task.take().unwrap();
        task.process.terminate().unwrap();
        task.process.wait_ended(PATIENCE).await.unwrap();
        self.task = Some(self.cluster.start_task("kv-0").unwrap());
        self.cluster.served("kv", 1, PATIENCE).await.unwrap();
    }

    /// Reads a number of a pause from the proxy's page.
    async fn number(&self, what: &str, id: u64) -> Option<u64> {
        let page = page(self.proxy.admin, "/metrics").await?;
        let start = format!("mandoline_proxy_{what}{{pause=\"p{id}\"}} ");
        page.lines().find_map(|line| line.strip_prefix(start.as_str()))?.parse().ok()
    }

    async fn until(&self, what: &str, id: u64, number: u64) {
        let so = async |_: &Cluster| (self.number(what, id).await? == number).then_some(());
        self.cluster.until(&format!("{what} to be {number}"), PATIENCE, so).await.unwrap();
    }

    /// Sends a request, whose answer is read from what it gives.
    async fn send(&self, method: &str, key: &str, body: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(self.proxy.address).await.unwrap();
        let head = format!(
            "{method} /kv/{key} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(body).await.unwrap();
        stream
    }
}

/// Reads an answer to its end.
async fn answer(mut stream: TcpStream) -> String {
    let mut answer = String::new();
    let read = timeout(PATIENCE, stream.read_to_string(&mut answer)).await;
    read.expect("an answer comes").unwrap();
    answer
}

fn of_job() -> Scope {
    Scope { job: Some("kv".parse().unwrap()), ..Scope::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_by_time_lets_go_when_it_has_lasted_with_nobody_left_to_say_so() {
    let _turn = my_turn().await;
    let mut scene = Scene::start().await;
    let id = scene.pause(of_job(), Duration::from_secs(4)).await;
    let held = scene.send("PUT", "a", b"1").await;
    scene.until("pause_held", id, 1).await;
    scene.cluster.kill_nodes();
    assert!(answer(held).await.starts_with("HTTP/1.1 204"));
    assert!(answer(scene.send("GET", "a", b"").await).await.ends_with("\r\n\r\n1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_by_flag_holds_over_a_restart_of_the_task_until_it_is_ended() {
    let _turn = my_turn().await;
    let mut scene = Scene::start().await;
    let scope = Scope { methods: vec!["PUT".into()], ..of_job() };
    let id = scene.pause(scope, Duration::from_secs(300)).await;
    let held = scene.send("PUT", "a", b"1").await;
    scene.until("pause_held", id, 1).await;
    // What it is not for goes through meanwhile.
    assert!(answer(scene.send("GET", "a", b"").await).await.starts_with("HTTP/1.1 404"));
    scene.restart_task().await;
    scene.end(id, Duration::ZERO).await;
    assert!(answer(held).await.starts_with("HTTP/1.1 204"));
    assert!(answer(scene.send("GET", "a", b"").await).await.ends_with("\r\n\r\n1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_forgets_those_who_leave_and_lets_the_others_go_slowly_and_in_order() {
    let _turn = my_turn().await;
    let mut scene = Scene::start().await;
    let id = scene.pause(of_job(), Duration::from_secs(300)).await;
    let mut all = JoinSet::new();
    let large = vec![b'x'; 1_000_000];
    for n in 1..=50_usize {
        let stream = scene.send("PUT", &format!("key-{}", n % 5), n.to_string().as_bytes()).await;
        scene.until("pause_held", id, n as u64).await;
        all.spawn(async move { (answer(stream).await, Instant::now(), n) });
    }
    for (n, body) in (1..).zip([&large[..], b"", &large[..]]) {
        let stream = scene.send("PUT", "key-0", body).await;
        scene.until("pause_held", id, 51).await;
        drop(stream);
        scene.until("pause_left_total", id, n).await;
    }
    scene.restart_task().await;
    let (over, began) = (Duration::from_secs(2), Instant::now());
    scene.end(id, over).await;
    let mut answers: Vec<(String, Instant, usize)> = all.join_all().await;
    answers.sort_by_key(|(_, at, _)| *at);
    assert!(answers.iter().all(|(answer, ..)| answer.starts_with("HTTP/1.1 204")));
    for key in 0..5 {
        let order: Vec<usize> =
            answers.iter().map(|(_, _, n)| *n).filter(|n| n % 5 == key).collect();
        assert!(order.is_sorted(), "{order:?}");
    }
    // The last has its moment in the last fiftieth; how much later it came says more of this machine.
    assert!(began.elapsed() >= over.mul_f64(0.9), "{:?}", began.elapsed());
    assert_eq!(scene.number("pause_released_total", id).await, Some(50));
    assert!(answer(scene.send("GET", "key-0", b"").await).await.ends_with("\r\n\r\n50"));
}
