//! What a proxy says of itself and of its requests, as an operator meets it: the log, numbers, the page, and explanations, all of one
//! real process that shards a job.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;

use mandoline_core::spec::JobSpec;
use rustix::process::{Pid, Signal};
use serde_json::Value;

use crate::callers::{PATIENCE, program};
use crate::kit::{Process, ask, free_ports, local, run, text, until};
use crate::processes::Cluster;

/// The lines of a log, once there are so many.
fn lines(path: &Path, count: usize) -> Vec<String> {
    until(&format!("{count} lines in {}", path.display()), || {
        let text = fs::read_to_string(path).ok()?;
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        (lines.len() >= count).then_some(lines)
    })
}

fn get(address: SocketAddr, target: &str) -> (u16, String) {
    let answer = ask(address, "GET", target, "").unwrap();
    (answer.status, answer.head)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_proxy_tells_of_its_requests_is_of_one_piece() {
    let cluster = Cluster::start(program(), 1).await.unwrap();
    cluster.apply(&(&JobSpec::new("kv".parse().unwrap())).into(), PATIENCE).await.unwrap();
    let task = cluster.start_task("kv-0").unwrap();
    cluster.served("kv", 1, PATIENCE).await.unwrap();
    let ports = free_ports(2);
    let [listen, admin] = [ports[0], ports[1]].map(local);
    let (config, log) = (cluster.dir().join("proxy.yaml"), cluster.dir().join("access.log"));
    let yaml = |log_as: &str| {
        format!(
            "listen: {listen}
admin: {admin}
assigners: ['{}']
routes:
  - {{name: carts, path: /kv/*, job: kv, key: path:1}}
  - {{name: refused, path: /kv/secret/*, job: kv, key: header:x-nobody-sends}}
access_log: {{to: {}, {log_as}}}
debug: {{networks: ['127.0.0.1']}}
",
            cluster.addresses()[0],
            log.display(),
        )
    };
    fs::write(&config, yaml("format: json")).unwrap();
    let path = config.display().to_string();
    let process = Process::start(&["proxy", "--config", &path]);
    until("the proxy to be ready", || {
        ask(admin, "GET", "/readyz", "").filter(|answer| answer.status == 200)
    });

    // One request, and all that is said of it.
    let stored = ask(listen, "PUT", "/kv/apple", "red").unwrap();
    assert!(stored.status < 300, "{stored:?}");
    let entry: Value = serde_json::from_str(&lines(&log, 1)[0]).unwrap();
    assert_eq!((&entry["route"], &entry["method"]), (&"carts".into(), &"PUT".into()), "{entry}");
    assert_eq!(entry["upstream"], task.address.to_string().as_str(), "{entry}");
    assert_eq!((&entry["tries"], &entry["outcome"]), (&1.into(), &"answered".into()), "{entry}");
    let metrics = ask(admin, "GET", "/metrics", "").unwrap().body;
    for line in [
        "mandoline_proxy_route_requests_total{route=\"carts\",outcome=\"answered\",status=\"2xx\"} 1",
        "mandoline_proxy_access_log_lines_total 1",
    ] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }

    // What would become of a request is what becomes of it.
    let url = format!("http://{listen}/kv/apple");
    let admin_text = admin.to_string();
    let explained = run(&["proxy", "explain", "--proxy", &admin_text, "--url", &url]);
    let explained = text(&explained.stdout);
    let key = entry["key"].as_str().unwrap();
    for word in ["carts", &task.address.to_string(), "nothing holds it"] {
        assert!(explained.contains(word), "{word} in {explained}");
    }
    let asked = run(&["proxy", "explain", "--proxy", &admin_text, "--url", &url, "-o", "json"]);
    let asked: Value = serde_json::from_slice(&asked.stdout).unwrap();
    assert!(asked.to_string().contains(key), "{key} in {asked}");
    let (_, head) = get_explained(listen, "/kv/apple");
    assert!(head.contains(&format!("route=\"carts\"; key={key}; owner=")), "{head}");
    // A file alone says as much as it can, and nobody needs to run.
    let by_file = run(&["proxy", "explain", "--config", &path, "--url", &url]);
    assert!(text(&by_file.stdout).contains("carts"), "{}", text(&by_file.stderr));

    // A refusal says why, in the answer, the log and the explanation alike.
    let (status, _) = get(listen, "/kv/secret/x");
    assert_eq!(status, 400);
    let refused: Value = serde_json::from_str(&lines(&log, 3)[2]).unwrap();
    let why = refused["reason"].as_str().unwrap();
    assert!(why.contains("x-nobody-sends"), "{refused}");
    let url = format!("http://{listen}/kv/secret/x");
    let explained = run(&["proxy", "explain", "--proxy", &admin_text, "--url", &url]);
    assert!(text(&explained.stdout).contains(why), "{}", text(&explained.stdout));

    // The page and the same for programs.
    let (status, head) = get(admin, "/");
    assert!(status == 200 && head.contains("text/html"), "{head}");
    let state: Value =
        serde_json::from_str(&ask(admin, "GET", "/api/state", "").unwrap().body).unwrap();
    let carts = state["routes"].as_array().unwrap().iter().find(|one| one["route"] == "carts");
    assert_eq!(carts.unwrap()["answered"], 2, "{state}");

    // Another form, a share of none, and a log that was moved away: what is there is there, and what fails is written in any case.
    fs::rename(&log, log.with_extension("1")).unwrap();
    fs::write(&config, yaml("format: '{status} {path} {reason}', share: 0%")).unwrap();
    process.signal(Signal::HUP);
    until("the file to be read", || {
        let metrics = ask(admin, "GET", "/metrics", "").unwrap().body;
        metrics.contains("mandoline_proxy_reloads_total 1").then_some(())
    });
    for _ in 0..20 {
        assert_eq!(get(listen, "/kv/apple").0, 200);
    }
    drop(task);
    let failed = until("a request to fail", || {
        let (status, _) = get(listen, "/kv/apple");
        (status >= 500).then_some(status)
    });
    let written = lines(&log, 1);
    assert!(
        written.iter().all(|line| line.contains(&format!("{failed} /kv/apple"))),
        "{written:?}"
    );
}

/// A request that asks what becomes of it.
fn get_explained(address: SocketAddr, target: &str) -> (u16, String) {
    use std::io::{Read, Write};

    let mut stream = std::net::TcpStream::connect(address).unwrap();
    write!(
        stream,
        "GET {target} HTTP/1.1\r\nhost: {address}\r\nmandoline-explain: 1\r\nconnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let answer = text(&answer);
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (status, answer)
}

#[test]
fn a_proxy_whose_log_nobody_reads_any_more_stops_when_told_to() {
    let words = ["proxy", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--workers", "1"];
    let mut proxy =
        std::process::Command::new(program()).args(words).stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(proxy.stderr.take().unwrap()).lines();
    assert!(log.any(|line| line.unwrap().starts_with("proxy: requests for")));
    drop(log);
    rustix::process::kill_process(Pid::from_child(&proxy), Signal::TERM).unwrap();
    let ended = until("the proxy to end", || proxy.try_wait().unwrap());
    assert!(ended.code().is_some(), "{ended}");
}
