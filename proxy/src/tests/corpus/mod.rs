//! The corpus of requests and answers that are made to be misread, and what comes of each: refused, or forwarded with one reading.
//!
//! Each case runs against a proxy whose task writes down what it sees (`recorder`), and again with nginx, HAProxy and Apache
//! between the two (`peers`), for each of them reads what it is sent in its own way. What the task sees must be just the requests
//! that the case names; what the proxy counts and the peer logs must agree; and after each case a request on the same connection
//! to the task, by another client, must get its own answer.

mod case;
mod strict;
mod frames;
mod recorder;
mod peers;

use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::{interval, timeout};

use crate::metrics::stats::Stats;
use crate::tests::corpus::case::{AtPeer, Case, Forwarded, Outcome, Step};
use crate::tests::corpus::frames::Frames;
use crate::tests::corpus::peers::Peer;
use crate::tests::corpus::recorder::Recorder;
use crate::tests::corpus::strict::{Fault, Message, Strict};
use crate::tests::harness::{DEADLINE, Owners, Stage, within};

#[tokio::test]
async fn each_case_ends_as_it_says() {
    check(Recorder::start().await, None).await;
}

#[tokio::test]
async fn nginx_reads_what_was_meant() {
    let recorder = Recorder::start().await;
    let Some(peer) = Peer::nginx(recorder.address()).await else { return };
    check(recorder, Some(peer)).await;
}

#[tokio::test]
async fn haproxy_reads_what_was_meant() {
    let recorder = Recorder::start().await;
    let Some(peer) = Peer::haproxy(recorder.address()).await else { return };
    check(recorder, Some(peer)).await;
}

#[tokio::test]
async fn apache_reads_what_was_meant() {
    let recorder = Recorder::start().await;
    let Some(peer) = Peer::apache(recorder.address()).await else { return };
    check(recorder, Some(peer)).await;
}

/// Runs all cases on one proxy, so that none may disturb the next.
async fn check(recorder: Recorder, peer: Option<Peer>) {
    let mut cases = case::all();
    // What a task answers wrong is between it and the proxy.
    cases.retain(|case| peer.is_none() || case.script.is_none());
    if let Ok(part) = std::env::var("MANDOLINE_CASE") {
        cases.retain(|case| case.name.contains(&part));
    }
    let task = peer.as_ref().map_or_else(|| recorder.address(), |peer| peer.address);
    let stage = Stage::new(Owners::all(task).await);
    let mut bench = Bench { stage, recorder, peer, logged: 0, broken: Vec::new() };
    let mut failures = Vec::new();
    for case in &cases {
        if let Err(why) = bench.run(case).await {
            failures.push(format!("{}\n    {why}", case.name));
            bench.forget().await;
        }
    }
    let complaints = bench.peer.as_ref().map_or_else(String::new, Peer::complaints);
    let (wrong, all) = (failures.len(), cases.len());
    println!("{} of {all} cases ended as they say", all - wrong);
    assert!(wrong == 0, "{wrong} of {all} cases:\n{}\n{complaints}", failures.join("\n"));
}

/// What the cases run on.
struct Bench {
    stage: Stage,
    recorder: Recorder,
    peer: Option<Peer>,
    /// How many lines of the peer's log were looked at.
    logged: usize,
    /// What may be seen in part, and be logged, at any later time.
    broken: Vec<String>,
}

/// What the client of a case asks for if the case is about the answer.
const ASKED: &str = " /kv/a";

/// What follows on a case, on its connection and on another.
const LAST: &str = "GET /kv/last HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
const AFTER: &str = "GET /kv/after HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";

impl Bench {
    async fn run(&mut self, case: &Case) -> Result<(), String> {
        let before = self.stage.stats();
        self.recorder.next_answer(case.script.clone());
        let run = timeout(DEADLINE, self.client(case));
        run.await.map_err(|_| format!("took longer than {DEADLINE:?}"))??;
        self.after().await?;
        self.compare_seen(case)?;
        self.compare_log(case).await?;
        self.compare_counts(case, &before).await
    }

    /// Starts afresh after a failure.
    async fn forget(&mut self) {
        self.recorder.next_answer(None);
        self.recorder.seen();
        self.logged = self.peer.as_ref().map_or(0, |peer| peer.log().len());
    }

    /// Does as the client of the case, and reads what it gets.
    async fn client(&self, case: &Case) -> Result<(), String> {
        let mut client = self.connect().await;
        let mut outcomes = case.outcomes.iter();
        for step in &case.steps {
            match step {
                // The proxy may have closed the connection: what it answered is what counts.
                Step::Send(bytes) => drop(client.stream.write_all(bytes).await),
                Step::Wait => {
                    let outcome = outcomes.next().expect("an answer is waited for");
                    self.outcome(case, &mut client, outcome).await?;
                }
                Step::Frame(frame) => drop(client.stream.write_all(&frame.bytes()).await),
            }
        }
        if case.is_h2 {
            return self.replies(case, Frames::new(client)).await;
        }
        for outcome in outcomes {
            self.outcome(case, &mut client, outcome).await?;
        }
        if !case.closed {
            client
                .stream
                .write_all(LAST.as_bytes())
                .await
                .map_err(|error| format!("closed: {error}"))?;
            own_answer(&mut client, "GET /kv/last").await?;
        }
        match client.rest().await {
            rest if rest.is_empty() => Ok(()),
            rest => Err(format!("more than was expected: {:?}", String::from_utf8_lossy(&rest))),
        }
    }

    /// Reads what a client of HTTP/2 gets.
    async fn replies(&self, case: &Case, mut frames: Frames) -> Result<(), String> {
        let mut stream = 1;
        for outcome in &case.outcomes {
            let reply = frames.reply(stream).await;
            stream += 2;
            let Some(reply) = reply else {
                let may_end = case.closed && matches!(outcome, Outcome::Reset | Outcome::Broken(_));
                demand(may_end, || format!("closed, and not {outcome:?}"))?;
                continue;
            };
            let is_so = match outcome {
                Outcome::Reset => reply.is_reset && reply.status == 0,
                Outcome::Broken(_) => reply.is_reset || reply.status >= 400,
                Outcome::Refused { status, .. } => reply.status == *status,
                Outcome::Forwarded(forwarded) => match self.at_peer(forwarded) {
                    Some(AtPeer::Answers(status)) => reply.status == *status,
                    _ => {
                        let has_body = !forwarded.line.starts_with("HEAD ");
                        let body = if has_body { &forwarded.body[..] } else { &[] };
                        reply.status == 200 && !reply.is_reset && reply.body == body
                    }
                },
                Outcome::Passed { status, body } => reply.status == *status && reply.body == *body,
                Outcome::Cut(status) => reply.status == *status && reply.is_reset,
            };
            demand(is_so, || format!("not {outcome:?}, but {reply:?}"))?;
        }
        if case.closed {
            frames.closed().await;
            return Ok(());
        }
        let last = 2 * u32::try_from(case.steps.len()).expect("a case is short") + 101;
        frames.ask(last, "/kv/last").await;
        let reply = frames.reply(last).await;
        let is_served = reply.as_ref().is_some_and(|reply| reply.status == 200);
        demand(is_served, || format!("the next stream got {reply:?}"))
    }

    async fn connect(&self) -> Strict {
        let connecting = TcpStream::connect(self.stage.proxy.local_addr());
        Strict::new(within("a connection", connecting).await.unwrap())
    }

    async fn outcome(
        &self,
        case: &Case,
        client: &mut Strict,
        outcome: &Outcome,
    ) -> Result<(), String> {
        let to_head = match outcome {
            Outcome::Forwarded(forwarded) => forwarded.line.starts_with("HEAD "),
            _ => matches!(&case.steps[0], Step::Send(sent) if sent.starts_with(b"HEAD ")),
        };
        let answer = client.answer(to_head).await;
        match (outcome, &answer) {
            (Outcome::Forwarded(forwarded), Ok(answer)) => self.forwarded(forwarded, answer),
            (Outcome::Refused { status, .. }, Ok(answer)) => {
                demand(answer.status() == Ok(*status), || {
                    format!("not refused with {status}: {answer:?}")
                })
            }
            (Outcome::Refused { or_dropped: true, .. }, Err(Fault::Nothing)) => Ok(()),
            (Outcome::Broken(_), Err(Fault::Nothing)) => Ok(()),
            (Outcome::Broken(_), Ok(answer)) => {
                let status = answer.status();
                demand(status.is_ok_and(|status| status >= 400), || {
                    format!("went through: {answer:?}")
                })
            }
            (Outcome::Passed { status, body }, Ok(answer)) => {
                let same = answer.status() == Ok(*status) && answer.body == *body;
                demand(same, || format!("another answer: {answer:?}"))
            }
            (Outcome::Cut(status), Err(Fault::Cut(start))) => {
                let same = start.split(' ').nth(1) == Some(&status.to_string());
                demand(same, || format!("another answer: {start}"))
            }
            (outcome, answer) => Err(format!("not {outcome:?}, but {answer:?}")),
        }
    }

    fn forwarded(&self, forwarded: &Forwarded, answer: &Message) -> Result<(), String> {
        let line = match self.at_peer(forwarded) {
            Some(AtPeer::Answers(status)) => {
                let same = answer.status() == Ok(*status);
                return demand(same, || format!("not {status}: {answer:?}"));
            }
            Some(AtPeer::Rewrites(line)) => line,
            None => &forwarded.line,
        };
        let own = answer.status() == Ok(200) && answer.first("x-echo") == Some(line);
        let own = own && (answer.body == forwarded.body || forwarded.line.starts_with("HEAD "));
        demand(own, || format!("not the answer to {}: {answer:?}", forwarded.line))
    }

    /// What the peer makes of a request, if not just what it is.
    fn at_peer<'a>(&self, forwarded: &'a Forwarded) -> Option<&'a AtPeer> {
        let peer = self.peer.as_ref()?;
        forwarded.at.iter().find(|(name, _)| name == peer.name).map(|(_, made)| made)
    }

    /// Asks as somebody else, by the connection to the task that the case has left behind.
    async fn after(&self) -> Result<(), String> {
        let mut client = self.connect().await;
        within("the next client's request to be taken", client.stream.write_all(AFTER.as_bytes()))
            .await
            .unwrap();
        let answered = own_answer(&mut client, "GET /kv/after");
        within("the next client's answer", answered)
            .await
            .map_err(|why| format!("the next client: {why}"))
    }

    /// The task has seen what the case names, and nothing else.
    fn compare_seen(&mut self, case: &Case) -> Result<(), String> {
        let broken = case.outcomes.iter().filter_map(|outcome| match outcome {
            Outcome::Broken(line) => Some(line.clone()),
            _ => None,
        });
        self.broken.extend(broken);
        let mut seen = Vec::new();
        for message in self.recorder.seen() {
            match message {
                Ok(message) => seen.push(message),
                Err(Fault::Cut(start)) if self.is_broken(&start) => {}
                Err(fault) => return Err(format!("the task cannot read it: {fault:?}")),
            }
        }
        if case.script.is_some() {
            // How often it was tried is not the question.
            seen.retain(|message| !message.line().ends_with(ASKED));
        }
        let mut wanted = self.wanted(case);
        wanted.retain_mut(|(line, forwarded)| {
            match forwarded.and_then(|forwarded| self.at_peer(forwarded)) {
                Some(AtPeer::Answers(_)) => return false,
                Some(AtPeer::Rewrites(rewritten)) => *line = rewritten,
                None => {}
            }
            true
        });
        let lines: Vec<_> = seen.iter().map(Message::line).collect();
        let wanted_lines: Vec<_> = wanted.iter().map(|(line, _)| *line).collect();
        demand(lines == wanted_lines, || format!("the task saw {lines:?}, not {wanted_lines:?}"))?;
        for (message, (_, forwarded)) in seen.iter().zip(&wanted) {
            let Some(forwarded) = forwarded else { continue };
            demand(message.body == forwarded.body, || format!("another body: {message:?}"))?;
            for (name, value) in &forwarded.with {
                // A peer writes the other fields anew.
                if self.peer.is_some() && name != "host" {
                    continue;
                }
                let has = message.all(name).any(|found| found == value);
                demand(has, || format!("no {name}: {value}: {message:?}"))?;
            }
            for name in forwarded.without.iter().filter(|_| self.peer.is_none()) {
                demand(message.first(name).is_none(), || format!("{name}: {message:?}"))?;
            }
        }
        Ok(())
    }

    /// The peer took for requests what the case names, and nothing else.
    async fn compare_log(&mut self, case: &Case) -> Result<(), String> {
        let Some(peer) = &self.peer else { return Ok(()) };
        let wanted = self.wanted(case).into_iter().map(|(line, forwarded)| {
            match forwarded.and_then(|forwarded| self.at_peer(forwarded)) {
                // What it refuses it may not have read far enough to write it down.
                Some(AtPeer::Answers(status)) => (String::new(), format!(" {status}")),
                _ => (peer.logs(line) + " ", " 200".to_owned()),
            }
        });
        let wanted: Vec<(String, String)> = wanted.collect();
        let mut again = interval(Duration::from_millis(2));
        let look = async {
            loop {
                let log = peer.log();
                let mut lines = log[self.logged..].to_vec();
                lines.retain(|line| !self.is_broken(line));
                let same = |(line, (begins, ends)): (&String, &(String, String))| {
                    line.starts_with(begins) && line.ends_with(ends)
                };
                let is_same = lines.iter().zip(&wanted).all(same);
                if is_same && lines.len() == wanted.len() {
                    return Ok(log.len());
                }
                if !is_same || lines.len() > wanted.len() {
                    return Err(format!("{} logged {lines:?}, not {wanted:?}", peer.name));
                }
                again.tick().await;
            }
        };
        let late = |_| format!("{} has not logged {wanted:?}", peer.name);
        self.logged = timeout(DEADLINE, look).await.map_err(late)??;
        Ok(())
    }

    /// The proxy has counted each refusal, and nothing else.
    async fn compare_counts(&self, case: &Case, before: &Stats) -> Result<(), String> {
        let is_refused = |outcome: &&Outcome| matches!(outcome, Outcome::Refused { .. });
        let is_failed = |outcome: &&Outcome| match outcome {
            Outcome::Passed { status, .. } => (500..600).contains(status),
            outcome => matches!(outcome, Outcome::Refused { .. } | Outcome::Cut(_)),
        };
        let uncounted = |outcome: &Outcome| matches!(outcome, Outcome::Broken(_) | Outcome::Reset);
        // A connection of HTTP/2 that breaks its rules is counted as one, with or without requests.
        let breaks = case.is_h2 && case.closed;
        if breaks || case.outcomes.iter().any(uncounted) {
            return Ok(());
        }
        let of_client = case.script.is_none();
        let wanted = match of_client {
            true => case.outcomes.iter().filter(is_refused).count(),
            false => case.outcomes.iter().filter(is_failed).count(),
        } as u64;
        let count = |stats: &Stats| match of_client {
            true => stats.refused + stats.malformed,
            false => stats.failed,
        };
        let mut again = interval(Duration::from_millis(2));
        let look = async {
            while count(&self.stage.stats()) - count(before) != wanted {
                again.tick().await;
            }
        };
        let late = |_| format!("{wanted} were to be counted: {before:?} {:?}", self.stage.stats());
        timeout(Duration::from_secs(1), look).await.map_err(late)
    }

    /// What the task is to see of a case and of what follows on it, each by method and target.
    fn wanted<'a>(&self, case: &'a Case) -> Vec<(&'a str, Option<&'a Forwarded>)> {
        let forwarded = case.outcomes.iter().filter_map(|outcome| match outcome {
            Outcome::Forwarded(forwarded) => Some((&*forwarded.line, Some(forwarded))),
            _ => None,
        });
        let last = (!case.closed).then_some(("GET /kv/last", None));
        forwarded.chain(last).chain([("GET /kv/after", None)]).collect()
    }

    /// Says whether a first line, or what was logged of one, belongs to a request that broke off.
    fn is_broken(&self, line: &str) -> bool {
        // Of one that broke off early the peer has seen no line, nor the recorder.
        let begins = |broken: &String| line.starts_with(&format!("{broken} "));
        line.is_empty() || self.broken.iter().any(begins)
    }
}

async fn own_answer(client: &mut Strict, line: &str) -> Result<(), String> {
    let answer = client.answer(false).await.map_err(|fault| format!("{line}: {fault:?}"))?;
    let own = answer.status() == Ok(200) && answer.first("x-echo") == Some(line);
    demand(own, || format!("not the answer to {line}: {answer:?}"))
}

fn demand(so: bool, why: impl FnOnce() -> String) -> Result<(), String> {
    if so { Ok(()) } else { Err(why()) }
}
