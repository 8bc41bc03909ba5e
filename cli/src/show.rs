//! What the cluster says, as tables for people and as JSON for programs.
//!
//! In JSON, slice keys are 16 hex digits, generations "incarnation.number", durations "5s", shares "10%", loads units a
//! second: the same forms that the commands and the files accept.

use clap::ValueEnum;
use mandoline_core::flags::PauseId;
use mandoline_core::load::Load;
use mandoline_core::slice::Slice;
use mandoline_proto::pb;
use serde_json::{Value, json};

use crate::job_text;
use crate::table::Table;

/// How to print.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Aligned columns.
    #[default]
    Table,
    /// One JSON value.
    Json,
}

impl Format {
    /// Prints to stdout, in the form that was asked for.
    pub(crate) fn print(self, json: &Value, table: impl std::fmt::Display) {
        let text = match self {
            Self::Table => table.to_string(),
            Self::Json => format!("{json:#}\n"),
        };
        self::text(&text);
    }
}

/// Prints to stdout.
pub(crate) fn text(text: &str) {
    // A reader that went away, such as `head`, is no error.
    use std::io::Write as _;
    drop(std::io::stdout().write_all(text.as_bytes()));
}

/// The whole cluster.
pub(crate) fn status_json(status: &pb::StatusReply) -> Value {
    json!({
        "cluster": status.cluster,
        "node": status.node,
        "leader": (status.leader != 0).then_some(status.leader),
        "term": status.term,
        "last_log": status.last_log,
        "applied": status.applied,
        "nodes": status.nodes.iter().map(node_json).collect::<Vec<_>>(),
        "jobs": status.jobs.iter().map(job_json).collect::<Vec<_>>(),
        "pauses": pause_ids(&status.pauses),
    })
}

fn node_json(node: &pb::NodeStatus) -> Value {
    json!({
        "node": node.node,
        "client_address": node.client_address,
        "peer_address": node.peer_address,
        "voter": node.voter,
        "leader": node.leader,
        "reachable": node.reachable,
        "matched": node.matched,
    })
}

/// One job.
pub(crate) fn job_json(job: &pb::JobStatus) -> Value {
    let churn = job.churn.unwrap_or_default();
    json!({
        "name": job.spec.as_ref().map_or("", |spec| &spec.name),
        "version": job.version,
        "generation": generation(job.generation),
        "slices": job.slices,
        "unserved": job.unserved,
        "load": units(total(job)),
        "callers": job.callers,
        "offered": units(job.offered),
        "offered_failed": units(job.offered_failed),
        "imbalance": imbalance(job),
        "frozen": job.frozen,
        "pins": job.pins.len(),
        "brake": job.brake.as_ref().map(brake_json),
        "confined": job.confined.iter().map(confined_json).collect::<Vec<_>>(),
        "spec": job_text::json(job.spec.as_ref()),
        "churn": {
            "moves": churn.moves,
            "keys": millionths(churn.keys),
            "load": millionths(churn.load),
        },
        "tasks": job.tasks.iter().map(task_json).collect::<Vec<_>>(),
    })
}

fn brake_json(brake: &pb::Brake) -> Value {
    let missing = |missing: &pb::Missing| {
        let word = word(missing);
        json!({ "task": missing.task, "session": missing.session, "callers": word })
    };
    json!({
        "held": seconds(brake.held_ms),
        "tasks": brake.tasks,
        "missing": brake.missing.iter().map(missing).collect::<Vec<_>>(),
    })
}

/// What callers say of a task that is missing.
fn word(missing: &pb::Missing) -> Option<&'static str> {
    match missing.word() {
        pb::Word::Unspecified => None,
        pb::Word::Served => Some("served"),
        pb::Word::Failing => Some("failing"),
    }
}

/// A range that stays with one task, and why.
pub(crate) fn confined_json(confined: &pb::Confined) -> Value {
    let crash = |crash: &pb::Crash| {
        json!({
            "task": crash.task,
            "session": crash.session,
            "before": seconds(crash.before_ms),
            "held": seconds(crash.held_ms),
        })
    };
    json!({
        "slice": slice(confined),
        "task": confined.task,
        "crashes": confined.crashes.iter().map(crash).collect::<Vec<_>>(),
    })
}

/// The crashes that tell against a range, oldest first.
fn evidence(confined: &pb::Confined) -> String {
    let crash = |crash: &pb::Crash| {
        let (before, held) = (seconds(crash.before_ms), seconds(crash.held_ms));
        format!("{} (s{}) {before} before, having held it for {held}", crash.task, crash.session)
    };
    confined.crashes.iter().map(crash).collect::<Vec<_>>().join("; ")
}

/// Which range stays with which task, and why, as a line.
pub(crate) fn confined_line(confined: &pb::Confined) -> String {
    let (slice, task) = (slice(confined), &confined.task);
    format!("confined to {task}: {slice}, crashed: {}\n", evidence(confined))
}

fn slice(confined: &pb::Confined) -> String {
    let slice = confined.slice.and_then(|slice| Slice::try_from(slice).ok());
    slice.map_or_else(String::new, |slice| slice.to_string())
}

fn seconds(millis: u64) -> String {
    format!("{:.1}s", millis as f64 / 1e3)
}

/// What needs an operator's eye: brakes that hold, and ranges that crash tasks. Empty if all is well.
pub(crate) fn alarms(jobs: &[pb::JobStatus]) -> String {
    let mut text = String::new();
    for job in jobs {
        let name = job.spec.as_ref().map_or("", |spec| &spec.name);
        if let Some(brake) = &job.brake {
            let missing = brake.missing.iter().map(|missing| match word(missing) {
                None => missing.task.clone(),
                Some(word) => format!("{} (callers: {word})", missing.task),
            });
            let missing: Vec<String> = missing.collect();
            text += &format!(
                "ALARM  job {name}: {} of {} tasks are missing at once, for {}; nothing is reassigned\n  \
                 missing: {}\n  \
                 it goes on when they return, or when their callers' requests fail for a while\n  \
                 if you know that they are gone: mandoline task believe-lost --job {name}\n\n",
                brake.missing.len(),
                brake.tasks,
                seconds(brake.held_ms),
                missing.join(", "),
            );
        }
        for confined in &job.confined {
            let (slice, task) = (slice(confined), &confined.task);
            text += &format!(
                "ALARM  job {name}: {slice} crashes tasks and stays with {task}, which serves nothing else\n  \
                 crashed: {}\n  \
                 it ends an hour after the last crash, or by: mandoline assignment release {name} {slice}\n\n",
                evidence(confined),
            );
        }
    }
    text
}

/// One task.
pub(crate) fn task_json(task: &pb::TaskStatus) -> Value {
    let (session, info, phase) = parts(task);
    json!({
        "name": info.name,
        "session": session,
        "address": info.address,
        "watch": (!info.watch.is_empty()).then_some(info.watch),
        "labels": info.labels,
        "capacity": f64::from(info.capacity) / 1_000.0,
        "revision": info.revision,
        "phase": phase,
        "slices": task.slices,
        "load": units(task.load),
        "connected": task.connected,
        "suspect": task.suspect,
        "avoided_by": task.avoided_by,
    })
}

/// The whole cluster, for people.
pub(crate) fn status_table(status: &pb::StatusReply) -> String {
    let leader = match status.leader {
        0 => "nobody leads".to_owned(),
        node => format!("leader n{node}"),
    };
    let cluster = if status.cluster.is_empty() { "not founded" } else { &status.cluster };
    format!(
        "cluster {cluster}  {leader}  term {}  applied {} of {}\n\n{}{}\n{}\n{}",
        status.term,
        status.applied,
        status.last_log,
        paused(&status.pauses) + &alarms(&status.jobs),
        node_table(&status.nodes),
        job_table(&status.jobs),
        task_table(&status.jobs),
    )
}

/// Says in a line that requests are paused; nothing while none are.
fn paused(pauses: &[u64]) -> String {
    match &pause_ids(pauses)[..] {
        [] => String::new(),
        ids => format!("requests are paused: {} (`mandoline pause list`)\n\n", ids.join(", ")),
    }
}

fn pause_ids(pauses: &[u64]) -> Vec<String> {
    pauses.iter().map(|id| PauseId(*id).to_string()).collect()
}

/// The cluster's members, for people.
pub(crate) fn node_table(nodes: &[pb::NodeStatus]) -> Table {
    let mut table = Table::new(&["NODE", "CLIENTS", "PEERS", "ROLE", "REACHABLE", "LOG"]);
    for node in nodes {
        let role = match (node.leader, node.voter) {
            (true, _) => "leader",
            (false, true) => "follower",
            (false, false) => "learner",
        };
        table.row([
            format!("n{}", node.node),
            node.client_address.clone(),
            node.peer_address.clone(),
            role.to_owned(),
            yes(node.reachable),
            node.matched.to_string(),
        ]);
    }
    table
}

/// Jobs, for people.
pub(crate) fn job_table(jobs: &[pb::JobStatus]) -> Table {
    let mut table = Table::new(&[
        "JOB",
        "VERSION",
        "GENERATION",
        "TASKS",
        "SLICES",
        "UNSERVED",
        "LOAD",
        "MAX/MEAN",
        "MOVES",
    ]);
    for job in jobs {
        let name = job.spec.as_ref().map_or_else(String::new, |spec| spec.name.clone());
        table.row([
            name,
            job.version.to_string(),
            generation(job.generation),
            job.tasks.len().to_string(),
            job.slices.to_string(),
            job.unserved.to_string(),
            format!("{:.1}", units(total(job))),
            imbalance(job).map_or_else(String::new, |ratio| format!("{ratio:.2}")),
            job.churn.unwrap_or_default().moves.to_string(),
        ]);
    }
    table
}

/// The tasks of jobs, for people.
pub(crate) fn task_table<'a>(jobs: impl IntoIterator<Item = &'a pb::JobStatus>) -> Table {
    let mut table =
        Table::new(&["TASK", "JOB", "SESSION", "ADDRESS", "PHASE", "CONNECTED", "SLICES", "LOAD"]);
    for job in jobs {
        let name = job.spec.as_ref().map_or("", |spec| &spec.name);
        for task in &job.tasks {
            let (session, info, phase) = parts(task);
            table.row([
                info.name,
                name.to_owned(),
                format!("s{session}"),
                info.address,
                standing(phase, task),
                yes(task.connected),
                task.slices.to_string(),
                format!("{:.1}", units(task.load)),
            ]);
        }
    }
    table
}

/// A task's phase, and what is held against it.
fn standing(phase: &str, task: &pb::TaskStatus) -> String {
    let mut standing = phase.to_owned();
    if task.suspect {
        standing += ", suspect";
    }
    match task.avoided_by {
        0 => {}
        1 => standing += ", fails: avoided by 1 caller",
        callers => standing += &format!(", fails: avoided by {callers} callers"),
    }
    standing
}

/// The spec of a job and where it stands, for people.
pub(crate) fn job_page(job: &pb::JobStatus) -> String {
    let by_hand = match (job.frozen, job.pins.len()) {
        (false, 0) => String::new(),
        (true, 0) => "frozen by hand\n\n".to_owned(),
        (false, pins) => format!("pinned by hand: {pins}\n\n"),
        (true, pins) => format!("frozen by hand; pinned by hand: {pins}\n\n"),
    };
    format!(
        "{}\n{}{by_hand}{}\n{}",
        job_text::yaml(job.spec.as_ref()),
        alarms(std::slice::from_ref(job)),
        job_table(std::slice::from_ref(job)),
        task_table([job]),
    )
}

/// The greatest load of a task by the mean, weighted by capacity; nothing while there is no load.
pub(crate) fn imbalance(job: &pb::JobStatus) -> Option<f64> {
    let weight = |task: &pb::TaskStatus| {
        let (_, info, _) = parts(task);
        f64::from(if info.capacity == 0 { 1_000 } else { info.capacity })
    };
    let weights: f64 = job.tasks.iter().map(weight).sum();
    let mean = total(job) as f64 / weights;
    let most = job.tasks.iter().map(|task| task.load as f64 / weight(task)).fold(0.0, f64::max);
    (mean > 0.0).then(|| most / mean)
}

fn total(job: &pb::JobStatus) -> u64 {
    job.tasks.iter().map(|task| task.load).sum()
}

fn parts(task: &pb::TaskStatus) -> (u64, pb::TaskInfo, &'static str) {
    let task = task.task.clone().unwrap_or_default();
    let phase = match task.phase() {
        pb::Phase::Serving => "serving",
        pb::Phase::Draining => "draining",
        pb::Phase::Unspecified => "unknown",
    };
    (task.session, task.info.unwrap_or_default(), phase)
}

fn yes(value: bool) -> String {
    if value { "yes" } else { "no" }.to_owned()
}

fn units(load: u64) -> f64 {
    Load::from_milli(load).units()
}

fn millionths(share: u64) -> f64 {
    share as f64 / 1e6
}

fn generation(generation: Option<pb::Generation>) -> String {
    let pb::Generation { incarnation, number } = generation.unwrap_or_default();
    format!("{incarnation}.{number}")
}

#[cfg(test)]
mod tests {
    use mandoline_core::spec::JobSpec;

    use super::*;

    fn task(name: &str, session: u64, load: u64) -> pb::TaskStatus {
        let info = pb::TaskInfo {
            name: name.to_owned(),
            address: format!("127.0.0.1:{}", 9_000 + session),
            capacity: 1_000,
            ..Default::default()
        };
        let phase = pb::Phase::Serving.into();
        let task = pb::Task { session, info: Some(info), phase, lease_ms: 0 };
        pb::TaskStatus { task: Some(task), slices: 2, load, connected: true, ..Default::default() }
    }

    fn status() -> pb::StatusReply {
        let spec = JobSpec::new("kv".parse().unwrap());
        let job = pb::JobStatus {
            spec: Some((&spec).into()),
            version: 1,
            generation: Some(pb::Generation { incarnation: 1, number: 42 }),
            slices: 4,
            churn: Some(pb::Churn { moves: 7, keys: 250_000, load: 125_000 }),
            tasks: vec![task("a", 1, 3_000), task("b", 2, 1_000)],
            ..Default::default()
        };
        let node = pb::NodeStatus {
            node: 1,
            client_address: "127.0.0.1:7400".to_owned(),
            peer_address: "127.0.0.1:7401".to_owned(),
            voter: true,
            leader: true,
            reachable: true,
            matched: 12,
        };
        pb::StatusReply {
            cluster: "0".repeat(32),
            node: 1,
            leader: 1,
            term: 3,
            last_log: 12,
            applied: 12,
            nodes: vec![node],
            jobs: vec![job],
            pauses: vec![],
        }
    }

    #[test]
    fn json_has_the_forms_that_files_accept() {
        let json = status_json(&status());
        let job = &json["jobs"][0];
        assert_eq!(job["generation"], "1.42");
        assert_eq!(job["spec"]["report_every"], "5s");
        assert_eq!(job["spec"]["band"], "2%");
        assert_eq!(job["load"], 4.0);
        assert_eq!(job["imbalance"], 1.5);
        assert_eq!(job["churn"]["keys"], 0.25);
        assert_eq!(job["tasks"][1]["address"], "127.0.0.1:9002");
        assert_eq!(json["leader"], 1);
        assert_eq!(status_json(&pb::StatusReply::default())["leader"], Value::Null);
    }

    #[test]
    fn tables_are_for_people() {
        let text = status_table(&status());
        let expected = "\
cluster 00000000000000000000000000000000  leader n1  term 3  applied 12 of 12

NODE  CLIENTS         PEERS           ROLE    REACHABLE  LOG
n1    127.0.0.1:7400  127.0.0.1:7401  leader  yes         12

JOB  VERSION  GENERATION  TASKS  SLICES  UNSERVED  LOAD  MAX/MEAN  MOVES
kv         1        1.42      2       4         0   4.0      1.50      7

TASK  JOB  SESSION  ADDRESS         PHASE    CONNECTED  SLICES  LOAD
a     kv   s1       127.0.0.1:9001  serving  yes             2   3.0
b     kv   s2       127.0.0.1:9002  serving  yes             2   1.0
";
        assert_eq!(text, expected);
    }

    #[test]
    fn that_requests_are_paused_is_said_on_top() {
        assert_eq!(paused(&[7, 9]), "requests are paused: p7, p9 (`mandoline pause list`)\n\n");
        assert_eq!(paused(&[]), "");
    }

    #[test]
    fn a_job_without_load_has_no_imbalance() {
        assert_eq!(imbalance(&pb::JobStatus::default()), None);
        let page = job_page(&status().jobs[0]);
        assert!(page.starts_with("name: kv\nband: 2%\nchurn_budget: 100%\n"), "{page}");
    }
}
