//! Writes all numbers in the form that Prometheus reads.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use mandoline::gateways::{Gateway, GatewayStats};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::lookup::LookupStats;
use crate::metrics::counters::{
    BUCKETS, CLASSES, Counters, Durations, FIRST_BUCKET_NANOS, RouteCounters,
};
use crate::metrics::names::{self, TaskCount};
use crate::metrics::stats::{Knowledge, PauseStats, TlsStats};
use crate::metrics::tally::Tally;
use crate::trace::TraceStats;

/// How long the requests of a route took.
type RouteDurations = ((&'static str, &'static str), fn(&RouteCounters) -> &Durations);
const ROUTE_DURATIONS: [RouteDurations; 2] = [
    (names::ROUTE_DURATION, |route| &route.durations),
    (names::ROUTE_UPSTREAM, |route| &route.upstream),
];

impl Tally {
    fn encode_routes(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let all = self.routes();
        let (name, help) = names::ROUTE_REQUESTS;
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (route, stats) in &all {
            for ((outcome, class), count) in &stats.ended {
                let status = CLASSES[usize::from(*class)];
                let labels =
                    [("route", &**route), ("outcome", outcome.as_str()), ("status", status)];
                ConstCounter::new(*count).encode(family.encode_family(&labels)?)?;
            }
        }
        let (name, help) = names::ROUTE_IN_FLIGHT;
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (route, stats) in &all {
            let gauge = ConstGauge::new(i64::try_from(stats.in_flight).unwrap_or(i64::MAX));
            gauge.encode(family.encode_family(&[("route", &**route)])?)?;
        }
        let counters = self.route_counters();
        for ((name, help), of) in ROUTE_DURATIONS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            for (route, workers) in &counters {
                let (sum, count, buckets) = added_up(workers.iter().map(|worker| of(worker)));
                let label = [("route", &**route)];
                let mut histogram = family.encode_family(&label)?;
                histogram.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
            }
        }
        Ok(())
    }

    fn durations(&self, of: impl Fn(&Counters) -> &Durations) -> (f64, u64, Vec<(f64, u64)>) {
        added_up(self.workers.iter().map(|worker| of(worker)))
    }

    fn encode_lookups(
        all: &BTreeMap<Box<str>, LookupStats>,
        encoder: &mut DescriptorEncoder<'_>,
    ) -> fmt::Result {
        for ((name, help), kind, value) in names::LOOKUP_NUMBERS {
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for (lookup, stats) in all {
                let (labels, value) = ([("lookup", &**lookup)], value(stats));
                let metric = family.encode_family(&labels)?;
                match kind {
                    MetricType::Counter => ConstCounter::new(value).encode(metric)?,
                    _ => {
                        ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX)).encode(metric)?;
                    }
                }
            }
        }
        let (name, help) = names::LOOKUP_FAULTS;
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (lookup, stats) in all {
            let LookupStats { late, busy, down, two, length, .. } = *stats;
            for (fault, count) in
                [("late", late), ("busy", busy), ("down", down), ("two", two), ("length", length)]
            {
                let labels = [("lookup", &**lookup), ("fault", fault)];
                ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }

    fn encode_tls(all: &[TlsStats], encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        for ((name, help), kind, value) in names::TLS_NUMBERS {
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for tls in all {
                let labels = [("listener", tls.address.as_str())];
                match kind {
                    MetricType::Counter => {
                        ConstCounter::new(value(tls)).encode(family.encode_family(&labels)?)?;
                    }
                    _ => {
                        let gauge = ConstGauge::new(i64::try_from(value(tls)).unwrap_or(i64::MAX));
                        gauge.encode(family.encode_family(&labels)?)?;
                    }
                }
            }
        }
        let (name, help) = names::VALID_UNTIL;
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for tls in all {
            for (file, until) in &tls.valid_until {
                let file = file.display().to_string();
                let labels = [("listener", tls.address.as_str()), ("file", file.as_str())];
                ConstGauge::new(*until).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

/// Writes all numbers in the form that Prometheus reads.
impl Collector for Tally {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let stats = self.stats();
        for (what, name, help) in names::COUNTS {
            let sum = ConstCounter::new(self.sum(what));
            sum.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)?;
        }
        let now = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let gauges = [
            (names::IN_FLIGHT, now(stats.in_flight)),
            (names::HELD, now(stats.held)),
            (names::HELD_BYTES, now(stats.held_bytes)),
            (names::CONNECTIONS, now(stats.connections)),
            (names::TUNNELS, now(stats.tunnels)),
        ];
        for ((name, help), value) in gauges {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        Self::encode_pauses(&stats.pauses, &mut encoder)?;
        let Knowledge { jobs, pools, reloads, log, traces, .. } = (self.known)();
        for ((name, help), value) in
            [(names::RELOADS, reloads.taken), (names::RELOADS_REFUSED, reloads.refused)]
        {
            let family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            ConstCounter::new(value).encode(family)?;
        }
        let (name, help) = names::RELOAD_LAST_REFUSED;
        let gauge = ConstGauge::new(i64::from(reloads.last_refused));
        gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        for ((name, help), value) in names::JOB_GAUGES {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for known in &jobs {
                let gauge = ConstGauge::new(now(value(known)));
                gauge.encode(family.encode_family(&[("job", known.job.as_str())])?)?;
            }
        }
        for ((name, help), value) in names::POOL_GAUGES {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (pool, servers) in &pools {
                let gauge = ConstGauge::new(now(value(servers)));
                gauge.encode(family.encode_family(&[("pool", pool.as_str())])?)?;
            }
        }
        for (what, name, help) in names::TASK_COUNTS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (session, task) in &stats.tasks {
                let value = match what {
                    TaskCount::Tried => task.tried,
                    TaskCount::Answered => task.answered,
                    TaskCount::Misdirected => task.misdirected,
                    TaskCount::Releasing => task.releasing,
                    TaskCount::Failed => task.failed,
                };
                let labels = [("task", session.to_string()), ("address", task.address.to_string())];
                ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
            }
        }
        Self::encode_gateways(&stats.gateways, &mut encoder)?;
        self.encode_routes(&mut encoder)?;
        let lines = log.map(|log| {
            [
                (names::LOG_WRITTEN, log.written),
                (names::LOG_DROPPED, log.dropped),
                (names::LOG_FAILED, log.failed),
            ]
        });
        let spans = traces.map(|spans| {
            let TraceStats { exported, dropped, failed } = spans;
            [
                (names::SPANS_EXPORTED, exported),
                (names::SPANS_DROPPED, dropped),
                (names::SPANS_FAILED, failed),
            ]
        });
        for ((name, help), value) in lines.into_iter().chain(spans).flatten() {
            let family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            ConstCounter::new(value).encode(family)?;
        }
        Self::encode_lookups(&stats.lookups, &mut encoder)?;
        Self::encode_tls(&stats.tls, &mut encoder)?;
        let histograms = [
            (names::DURATION, self.durations(|worker| &worker.durations)),
            (names::UPSTREAM, self.durations(|worker| &worker.upstream)),
            (names::HOLD, self.durations(|worker| &worker.holds)),
        ];
        for ((name, help), (sum, count, buckets)) in histograms {
            let mut histogram =
                encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            histogram.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        Ok(())
    }
}

impl Tally {
    fn encode_pauses(pauses: &[PauseStats], encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        for ((name, help), value) in names::PAUSE_GAUGES {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for pause in pauses {
                let gauge = ConstGauge::new(i64::try_from(value(pause)).unwrap_or(i64::MAX));
                gauge.encode(family.encode_family(&[("pause", pause.id.to_string())])?)?;
            }
        }
        for ((name, help), value) in names::PAUSE_COUNTS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for pause in pauses {
                let labels = [("pause", pause.id.to_string())];
                ConstCounter::new(value(pause)).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }

    fn encode_gateways(stats: &GatewayStats, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let (name, help) = names::REGION_LOST;
        let lost = ConstCounter::new(stats.lost);
        lost.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)?;
        let labels = |gateway: &Gateway| {
            [("region", gateway.region.to_string()), ("address", gateway.address.to_string())]
        };
        for (name, help, count) in names::GATEWAY_COUNTS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (gateway, link) in &stats.gateways {
                ConstCounter::new(count(link)).encode(family.encode_family(&labels(gateway))?)?;
            }
        }
        let (name, help) = names::GATEWAY_UP;
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (gateway, link) in &stats.gateways {
            let up = ConstGauge::new(i64::from(link.retry_at.is_none()));
            up.encode(family.encode_family(&labels(gateway))?)?;
        }
        Ok(())
    }
}

/// Adds up how long something took: the sum in seconds, how often, and how many ended by each bucket's bound.
fn added_up<'a>(all: impl Iterator<Item = &'a Durations> + Clone) -> (f64, u64, Vec<(f64, u64)>) {
    let sum = |cell: &dyn Fn(&Durations) -> u64| -> u64 { all.clone().map(cell).sum() };
    let nanos = sum(&|durations| durations.nanos.load(Relaxed));
    let bound = |n: usize| match n {
        BUCKETS => f64::INFINITY,
        n => Duration::from_nanos(FIRST_BUCKET_NANOS << n).as_secs_f64(),
    };
    let count = |n: usize| sum(&|durations| durations.buckets[n].load(Relaxed));
    let buckets: Vec<(f64, u64)> = (0..=BUCKETS).map(|n| (bound(n), count(n))).collect();
    (nanos as f64 / 1e9, buckets.iter().map(|(_, count)| count).sum(), buckets)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mandoline::gateways::Gateways;
    use mandoline_core::flags::{PauseId, Scope};
    use mandoline_core::generation::Generation;
    use mandoline_core::key::SliceKey;
    use mandoline_core::task::{Address, SessionId};

    use super::*;
    use crate::access_log::writer::LogStats;
    use crate::metrics::names::Count;
    use crate::metrics::stats::{Known, Reloads};
    use crate::record::{Outcome, Record};
    use crate::servers::{Server, Servers};

    #[test]
    fn workers_are_added_up() {
        let workers: Arc<[Arc<Counters>]> = (0..2).map(|_| Arc::new(Counters::default())).collect();
        let address: Address = "127.0.0.1:1".parse().unwrap();
        for worker in &*workers {
            worker.count(Count::Requests);
            worker.count(Count::Requests);
            worker.task(SessionId(7), &address).count(TaskCount::Tried);
            let route = worker.route("carts");
            route.takes();
            route.takes();
            let record = Record {
                route: Some(Arc::clone(&route.name)),
                key: None,
                generation: Generation::ZERO,
                first: None,
                last: None,
                first_try_right: true,
                tries: 2,
                status: Some(200),
                outcome: Outcome::Answered,
                held: Duration::ZERO,
                upstream: Duration::from_micros(500),
                duration: Duration::from_millis(1),
                bytes_out: 0,
            };
            worker.record(&record, Some(&route));
            worker.route("gone");
            worker.keep_routes(["carts"].into_iter());
        }
        workers[0].count(Count::Holds);
        workers[1].count(Count::Holds);
        workers[1].hold_ended(Count::HoldsReleased, Duration::from_millis(3));
        let gateway: Gateway = "us=127.0.0.1:9".parse().unwrap();
        let gateways = Gateways::new("eu".parse().unwrap(), [gateway.clone()]).unwrap();
        gateways.next(&gateway.region, SliceKey(1), &[]).unwrap();
        gateways.failed(&gateway, &fmt::Error);
        gateways.lost();
        let pause = PauseStats {
            id: PauseId(7),
            scope: Scope::default(),
            in_force: true,
            ended: false,
            lasts_yet: Duration::from_millis(1_500),
            in_flight: 1,
            held: 2,
            held_bytes: 77,
            holds: 20,
            released: 3,
            failed: 4,
            late: 5,
            left: 6,
            refused: 7,
        };
        let generation = Generation { incarnation: 1, number: 42 };
        let server = |fault: Option<&str>| Server {
            address: "127.0.0.1:1".parse().unwrap(),
            fault: fault.map(str::to_owned),
        };
        let servers = Servers { servers: vec![server(None), server(Some("late"))], is_panic: true };
        let known = move || Knowledge {
            jobs: vec![Known { job: "kv".parse().unwrap(), generation, avoided: 1 }],
            pools: vec![("web".parse().unwrap(), Arc::new(servers.clone()))],
            gateways: Some(gateways.clone()),
            reloads: Reloads { taken: 3, refused: 2, last_refused: true },
            held_bytes: 77,
            tls: Vec::new(),
            pauses: vec![pause.clone()],
            lookups: [(
                "shops".into(),
                LookupStats { hits: 5, two: 6, keys: 7, ..LookupStats::default() },
            )]
            .into(),
            log: Some(LogStats { written: 5, dropped: 6, failed: 7 }),
            traces: Some(TraceStats { exported: 5, dropped: 6, failed: 7 }),
        };
        let tally = Tally::new(workers, known);
        let stats = tally.stats();
        assert_eq!((stats.requests, stats.answered, stats.in_flight, stats.retried), (4, 2, 2, 2));
        assert_eq!(stats.tasks[&SessionId(7)].tried, 2);
        assert_eq!((stats.holds, stats.holds_released, stats.held), (2, 1, 1));
        let route = &stats.routes["carts"];
        assert_eq!((route.in_flight, route.ended(Outcome::Answered)), (2, 2));
        assert_eq!(stats.routes.len(), 1);

        let mut registry = prometheus_client::registry::Registry::default();
        registry.register_collector(Box::new(tally));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "mandoline_proxy_requests_total 4",
            "mandoline_proxy_requests_in_flight 2",
            "mandoline_proxy_assignment_generation{job=\"kv\"} 42",
            "mandoline_proxy_reloads_total 3",
            "mandoline_proxy_reloads_refused_total 2",
            "mandoline_proxy_reload_last_refused 1",
            "mandoline_proxy_tasks_avoided{job=\"kv\"} 1",
            "mandoline_proxy_pool_servers{pool=\"web\"} 2",
            "mandoline_proxy_pool_servers_healthy{pool=\"web\"} 1",
            "mandoline_proxy_pool_panic{pool=\"web\"} 1",
            "mandoline_proxy_task_requests_total{task=\"s7\",address=\"127.0.0.1:1\"} 2",
            "mandoline_proxy_request_duration_seconds_count 2",
            "mandoline_proxy_request_duration_seconds_bucket{le=\"0.001024\"} 2",
            "mandoline_proxy_request_duration_seconds_bucket{le=\"+Inf\"} 2",
            "mandoline_proxy_route_requests_total{route=\"carts\",outcome=\"answered\",status=\"2xx\"} 2",
            "mandoline_proxy_route_requests_in_flight{route=\"carts\"} 2",
            "mandoline_proxy_route_request_duration_seconds_bucket{le=\"0.001024\",route=\"carts\"} 2",
            "mandoline_proxy_route_upstream_duration_seconds_bucket{le=\"0.000512\",route=\"carts\"} 2",
            "mandoline_proxy_upstream_duration_seconds_count 2",
            "mandoline_proxy_spans_total 5",
            "mandoline_proxy_spans_dropped_total 6",
            "mandoline_proxy_spans_failed_total 7",
            "mandoline_proxy_access_log_lines_total 5",
            "mandoline_proxy_access_log_lines_dropped_total 6",
            "mandoline_proxy_access_log_lines_failed_total 7",
            "mandoline_proxy_lookup_hits_total{lookup=\"shops\"} 5",
            "mandoline_proxy_lookup_faults_total{lookup=\"shops\",fault=\"two\"} 6",
            "mandoline_proxy_lookup_keys{lookup=\"shops\"} 7",
            "mandoline_proxy_requests_held 1",
            "mandoline_proxy_held_bytes 77",
            "mandoline_proxy_pause_in_flight{pause=\"p7\"} 1",
            "mandoline_proxy_pause_held{pause=\"p7\"} 2",
            "mandoline_proxy_pause_held_bytes{pause=\"p7\"} 77",
            "mandoline_proxy_pause_holds_total{pause=\"p7\"} 20",
            "mandoline_proxy_pause_released_total{pause=\"p7\"} 3",
            "mandoline_proxy_pause_failed_total{pause=\"p7\"} 4",
            "mandoline_proxy_pause_late_total{pause=\"p7\"} 5",
            "mandoline_proxy_pause_left_total{pause=\"p7\"} 6",
            "mandoline_proxy_pause_refused_total{pause=\"p7\"} 7",
            "mandoline_proxy_hold_duration_seconds_count 1",
            "mandoline_proxy_requests_region_lost_total 1",
            "mandoline_proxy_gateway_requests_total{region=\"us\",address=\"127.0.0.1:9\"} 1",
            "mandoline_proxy_gateway_failures_total{region=\"us\",address=\"127.0.0.1:9\"} 1",
            "mandoline_proxy_gateway_up{region=\"us\",address=\"127.0.0.1:9\"} 0",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
