//! What an operator is told when an assigner does not answer: a question goes to the next, a change only where it surely
//! came to nothing.

use std::net::TcpListener;

use rustix::process::Signal;

use crate::kit::{Process, ask, free_ports, json, local, run, run_with, text, until};

/// Two nodes that lead together, or not at all.
fn pair(dir: &std::path::Path) -> ([Process; 2], [String; 2]) {
    let ports = free_ports(4);
    let at = |index: usize| local(ports[index]).to_string();
    let seats = format!("127.0.0.1:{}/{},127.0.0.1:{}/{}", ports[0], ports[1], ports[2], ports[3]);
    let node = |index: usize| {
        let (listen, peer) = (at(2 * index), at(2 * index + 1));
        let data = dir.join(index.to_string());
        let args = ["assigner", "--listen", &listen, "--peer-listen", &peer, "--peers", &seats];
        Process::start(&[&args[..], &["--data-dir", data.to_str().unwrap()]].concat())
    };
    let nodes = [node(0), node(1)];
    for port in [ports[0], ports[2]] {
        until("a node to be ready", || {
            ask(local(port), "GET", "/readyz", "").filter(|answer| answer.status == 200)
        });
    }
    (nodes, [at(0), at(2)])
}

#[test]
fn a_change_is_asked_for_again_only_where_it_came_to_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let ([mut first, _second], [at_first, at_second]) = pair(dir.path());
    // It takes connections in, and never answers.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let mute = mute.local_addr().map(|address| (mute, address.to_string())).unwrap();
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let apply = |assigners: &str, timeout: &str| {
        let args = ["job", "apply", "-", "--if-version", "0", "--timeout", timeout];
        run_with(&[&args[..], &["--assigners", assigners]].concat(), "name: kv\n")
    };
    let jobs = |assigners: &str| {
        json(&["job", "list", "-o", "json", "--timeout", "2s", "--assigners", assigners])
    };

    let behind_mute = format!("{},{at_second}", mute.1);
    let unsure = apply(&behind_mute, "1s");
    let err = text(&unsure.stderr);
    assert_eq!(unsure.status.code(), Some(2), "{err}");
    assert!(err.contains("may have been carried out") && err.contains(&mute.1), "{err}");
    assert!(err.contains("look with `mandoline job get kv`"), "{err}");
    assert_eq!(jobs(&behind_mute).as_array().map(Vec::len), Some(0), "a question goes to the next");

    let applied = apply(&format!("{gone},{at_first}"), "10s");
    assert!(applied.status.success(), "{}", text(&applied.stderr));

    // Nobody leads alone.
    first.signal(Signal::KILL);
    first.ended();
    let both = format!("{at_first},{at_second}");
    let led_by_nobody = || {
        let refused = run_with(&["job", "apply", "-", "--assigners", &both], "name: kv2\n");
        assert_eq!(refused.status.code(), Some(2));
        let err = text(&refused.stderr);
        // The survivor may take a moment to see that it is alone.
        err.contains("no assigner could answer").then_some(err)
    };
    let err = until("the survivor to know no leader", led_by_nobody);
    assert!(err.contains("no leader within") && err.contains("more than half"), "{err}");
    assert!(!err.contains("mandoline dev"), "{err}");
    let transfer = run(&["cluster", "transfer", "--assigners", &gone]);
    assert!(text(&transfer.stderr).contains("mandoline dev"), "{}", text(&transfer.stderr));
}
