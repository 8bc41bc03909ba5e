//! TLS and a token everywhere: nodes among themselves, tasks, proxies and operators.

use serde_json::Value;

use crate::kit::{Process, ask, free_ports, local, run, run_with, text, until};

fn file(name: &str) -> String {
    format!("{}/../tests/it/tls/{name}", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn a_cluster_speaks_tls_and_asks_for_the_token() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (token, wrong) = (path("token"), path("wrong"));
    std::fs::write(&token, "0123456789abcdef0123456789abcdef\n").unwrap();
    std::fs::write(&wrong, "0123456789abcdef0123456789abcdee\n").unwrap();
    let ports = free_ports(8);
    let at = |index: usize| local(ports[index]).to_string();
    let seats = format!("127.0.0.1:{}/{},127.0.0.1:{}/{}", ports[0], ports[1], ports[2], ports[3]);
    let (authority, certificate, key) = (file("authority.pem"), file("node.pem"), file("node.key"));
    let caller = ["--tls-ca", &authority, "--token-file", &token];
    let node = |index: usize| {
        let (listen, peer) = (at(2 * index), at(2 * index + 1));
        let data = path(&index.to_string());
        let args = ["assigner", "--listen", &listen, "--peer-listen", &peer, "--data-dir", &data];
        let own = ["--peers", &seats, "--tls-cert", &certificate, "--tls-key", &key];
        Process::start(&[&args[..], &own, &caller].concat())
    };
    let _nodes = [node(0), node(1)];
    let assigners = format!("{},{}", at(0), at(2));
    let ask_for = |args: &[&str]| run(&[args, &["--assigners", &assigners], &caller].concat());
    let status = || -> Option<Value> {
        let output = ask_for(&["status", "-o", "json"]);
        serde_json::from_slice(&output.stdout).ok()
    };
    until("the two to agree on a leader", || {
        status().filter(|status| status["leader"].is_u64() && status["nodes"][1]["voter"] == true)
    });

    let refused = |how: &[&str], says: &str| {
        let output = run(&[&["status", "--assigners", &at(0)], how].concat());
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{err}");
        assert!(err.contains(says), "{err}");
    };
    refused(&["--tls-ca", &authority], "asks for a token");
    refused(&["--tls-ca", &authority, "--token-file", &wrong], "not this cluster's");
    refused(&["--tls-ca", &certificate, "--token-file", &token], "no assigner could answer");
    refused(&["--token-file", &token], "no assigner could answer");

    // By either node, so that one of them passes the call on to the other.
    for at in [at(0), at(2)] {
        let apply = ["job", "apply", "-", "--assigners", &at];
        let applied = run_with(&[&apply[..], &caller].concat(), "name: kv\n");
        assert!(applied.status.success(), "{}", text(&applied.stderr));
    }
    let task =
        ["demo", "task", "--name", "a", "--listen", "127.0.0.1:0", "--assigners", &assigners];
    let _task = Process::start(&[&task[..], &caller].concat());
    let (listen, admin, watch) = (at(4), at(5), at(6));
    let proxy = ["proxy", "--listen", &listen, "--admin", &admin, "--assigners", &assigners];
    let own = ["--watch-listen", &watch, "--tls-cert", &certificate, "--tls-key", &key];
    let _proxy = Process::start(&[&proxy[..], &own, &caller].concat());
    let routed = || {
        let put = ask(local(ports[4]), "PUT", "/kv/a", "hello")?;
        (put.status == 204).then_some(())
    };
    until("the proxy to route", routed);
}
