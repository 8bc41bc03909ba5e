//! How things are with the proxy, on one page: for people who look, and as JSON for programs.

use std::fmt::Write;
use std::sync::Arc;

use mandoline_core::name::JobName;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::config::Checked;
use crate::lookup::LookupStats;
use crate::metrics::stats::{RouteStats, Stats};
use crate::metrics::tally::Tally;
use crate::record::Outcome;
use crate::router::Router;
use crate::servers::Server;

/// Gathers how things are.
pub(crate) fn state(config: &Checked, tally: &Tally, began: Instant) -> Value {
    let stats = tally.stats();
    let reloads = tally.reloads();
    let places: Vec<String> = config.listeners.iter().map(|l| l.address.to_string()).collect();
    let log = config.access_log.as_ref().map(|log| {
        let stats = log.writer.stats();
        json!({"written": stats.written, "dropped": stats.dropped, "failed": stats.failed})
    });
    json!({
        "proxy": {
            "version": env!("CARGO_PKG_VERSION"),
            "id": config.id.as_str(),
            "listen": places.join(", "),
            "workers": config.workers,
            "up_seconds": began.elapsed().as_secs(),
            "connections": stats.connections,
        },
        "configuration": {
            "reloads": reloads.taken,
            "refused": reloads.refused,
            "last_refused": reloads.last_refused,
        },
        "requests": {
            "in_flight": stats.in_flight,
            "answered": stats.answered,
            "refused": stats.refused,
            "failed": stats.failed,
            "abandoned": stats.abandoned,
            "retried": stats.retried,
            "held": stats.held,
        },
        "routes": routes(config, &stats),
        "jobs": jobs(config),
        "pools": pools(config),
        "pauses": pauses(&stats),
        "lookups": lookups(&stats),
        "tasks": tasks(&stats),
        "gateways": gateways(&stats),
        "access_log": log,
    })
}

/// The routes in the order in which they are tried.
fn routes(config: &Checked, stats: &Stats) -> Vec<Value> {
    let route = |place: usize| {
        let route = &config.routes[place];
        let (to, mut key) = route.to.describe();
        if let Some(lookup) = &route.lookup {
            key = format!("{key}, by lookup {}", lookup.name());
        }
        let empty = RouteStats::default();
        let stats = stats.routes.get(&*route.name).unwrap_or(&empty);
        let ended: u64 = Outcome::ALL.iter().map(|outcome| stats.ended(*outcome)).sum();
        let mean = |all: std::time::Duration| (ended > 0).then(|| all.as_secs_f64() / ended as f64);
        json!({
            "route": &*route.name,
            "takes": route.matches.to_string(),
            "to": to,
            "key": key,
            "in_flight": stats.in_flight,
            "answered": stats.ended(Outcome::Answered),
            "refused": stats.ended(Outcome::Refused),
            "failed": stats.ended(Outcome::Failed),
            "abandoned": stats.ended(Outcome::Abandoned),
            "mean_seconds": mean(stats.duration),
            "mean_upstream_seconds": mean(stats.upstream),
        })
    };
    config.table().order().map(route).collect()
}

fn jobs(config: &Checked) -> Vec<Value> {
    let jobs = config.jobs.iter().filter(|(name, _)| !config.pools.contains_key(name));
    jobs.map(job).collect()
}

/// A line for each server of each pool.
fn pools(config: &Checked) -> Vec<Value> {
    let pools = config.pools.iter().map(|(name, known)| (name, Arc::clone(&known.borrow())));
    let mut lines = Vec::new();
    for (name, known) in pools {
        for Server { address, fault } in &known.servers {
            lines.push(json!({
                "pool": name.as_str(),
                "server": address.as_str(),
                "healthy": fault.is_none(),
                "asked": fault.is_none() || known.is_panic,
                "fault": fault,
            }));
        }
    }
    lines
}

fn job((name, router): (&JobName, &Router)) -> Value {
    let assignment = router.clerk().assignment();
    let known = router.known();
    json!({
        "job": name.as_str(),
        "generation": assignment.as_ref().map(|assignment| assignment.generation.to_string()),
        "slices": assignment.as_ref().map(|assignment| assignment.slices.count()),
        "tasks": assignment.as_ref().map(|assignment| assignment.tasks.len()),
        "tasks_avoided": known.avoided,
    })
}

fn pauses(stats: &Stats) -> Vec<Value> {
    let pauses = stats.pauses.iter().map(|pause| {
        json!({
            "pause": pause.id.to_string(),
            "scope": pause.scope.to_string(),
            "in_force": pause.in_force,
            "ended": pause.ended,
            "lasts_yet_seconds": pause.lasts_yet.as_secs_f64(),
            "in_flight": pause.in_flight,
            "held": pause.held,
            "released": pause.released,
            "left": pause.left,
            "refused": pause.refused,
        })
    });
    pauses.collect()
}

fn lookups(stats: &Stats) -> Vec<Value> {
    let lookups = stats.lookups.iter().map(|(name, lookup)| {
        let LookupStats { late, busy, down, two, length, .. } = lookup;
        json!({
            "lookup": &**name,
            "keys": lookup.keys,
            "hits": lookup.hits + lookup.negative_hits,
            "misses": lookup.misses,
            "questions": lookup.questions,
            "stale": lookup.stale,
            "faults": late + busy + down + two + length,
        })
    });
    lookups.collect()
}

fn tasks(stats: &Stats) -> Vec<Value> {
    let tasks = stats.tasks.iter().map(|(session, task)| {
        json!({
            "session": session.to_string(),
            "address": task.address.as_str(),
            "requests": task.tried,
            "answered": task.answered,
            "misdirected": task.misdirected,
            "failed": task.failed,
        })
    });
    tasks.collect()
}

fn gateways(stats: &Stats) -> Vec<Value> {
    let gateways = stats.gateways.gateways.iter().map(|(gateway, link)| {
        json!({
            "region": gateway.region.to_string(),
            "address": gateway.address.as_str(),
            "up": link.retry_at.is_none(),
            "requests": link.sent,
            "failed": link.failed,
        })
    });
    gateways.collect()
}

/// What the page has, in its order, and the columns of each.
const PARTS: [(&str, &[&str]); 11] = [
    ("proxy", &["version", "id", "listen", "workers", "up_seconds", "connections"]),
    ("configuration", &["reloads", "refused", "last_refused"]),
    ("requests", &["in_flight", "held", "answered", "refused", "failed", "abandoned", "retried"]),
    (
        "routes",
        &[
            "route",
            "takes",
            "to",
            "key",
            "in_flight",
            "answered",
            "refused",
            "failed",
            "abandoned",
            "mean_seconds",
            "mean_upstream_seconds",
        ],
    ),
    ("jobs", &["job", "generation", "slices", "tasks", "tasks_avoided"]),
    ("pools", &["pool", "server", "healthy", "asked", "fault"]),
    (
        "pauses",
        &[
            "pause",
            "scope",
            "in_force",
            "ended",
            "lasts_yet_seconds",
            "in_flight",
            "held",
            "released",
            "left",
            "refused",
        ],
    ),
    ("lookups", &["lookup", "keys", "hits", "misses", "questions", "stale", "faults"]),
    ("tasks", &["session", "address", "requests", "answered", "misdirected", "failed"]),
    ("gateways", &["region", "address", "up", "requests", "failed"]),
    ("access_log", &["written", "dropped", "failed"]),
];

/// Makes the page: a table for each part of the state.
pub(crate) fn html(state: &Value) -> String {
    let mut page = String::from(HEAD);
    for (part, columns) in PARTS {
        let rows = match &state[part] {
            Value::Array(rows) if rows.is_empty() => continue,
            Value::Array(rows) => rows.iter().collect(),
            Value::Null => continue,
            one => vec![one],
        };
        let title = part.replace('_', " ");
        write!(page, "<h2>{title}</h2>\n<table>\n<tr>").expect("a string takes it");
        for column in columns {
            let column = column.replace('_', " ");
            write!(page, "<th>{column}</th>").expect("a string takes it");
        }
        page.push_str("</tr>\n");
        for row in rows {
            page.push_str("<tr>");
            for column in columns {
                let text = match &row[column] {
                    Value::Null => "-".to_owned(),
                    Value::String(text) => text.clone(),
                    Value::Number(number) if number.is_f64() => {
                        format!("{:.6}", number.as_f64().unwrap_or_default())
                    }
                    other => other.to_string(),
                };
                write!(page, "<td>{}</td>", escaped(&text)).expect("a string takes it");
            }
            page.push_str("</tr>\n");
        }
        page.push_str("</table>\n");
    }
    page.push_str(FOOT);
    page
}

fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            _ => escaped.push(c),
        }
    }
    escaped
}

const HEAD: &str = "<!doctype html>
<html lang=\"en\">
<meta charset=\"utf-8\">
<title>Mandoline proxy</title>
<style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222 }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin: 1.5em 0 .3em }
table { border-collapse: collapse } th, td { text-align: left; padding: .2em 1em .2em 0; border-bottom: 1px solid #ddd }
th { font-weight: 600 } td { font-variant-numeric: tabular-nums }
</style>
<h1>Mandoline proxy</h1>
";

const FOOT: &str = "<p>The same as JSON: <a href=\"/api/state\">/api/state</a>. Numbers: <a href=\"/metrics\">/metrics</a>.\n</html>\n";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_what_the_state_has_and_runs_nothing() {
        let state = json!({
            "proxy": {"id": "p1"},
            "routes": [{"route": "<script>alert(\"a & b\")</script>", "mean_seconds": 0.25, "to": null}],
            "pauses": [],
            "access_log": null,
        });
        let page = html(&state);
        assert!(page.contains("<h2>routes</h2>"), "{page}");
        assert!(
            page.contains("&lt;script&gt;alert(&quot;a &amp; b&quot;)&lt;/script&gt;"),
            "{page}"
        );
        assert!(page.contains("<td>0.250000</td>") && page.contains("<td>-</td>"), "{page}");
        for absent in ["<script", "pauses", "access_log", "src=", "http:", "https:"] {
            assert!(!page.contains(absent), "{absent} in {page}");
        }
    }
}
