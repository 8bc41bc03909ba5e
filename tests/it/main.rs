//! The integration tests: the real thing, as users run it.
// Helpers of tests are tests: what cannot fail may be unwrapped.
#![allow(clippy::unwrap_used)]

#[path = "../tidy.rs"]
mod tidy;
#[allow(dead_code)] // `bench` uses the rest of it
#[path = "../../cli/src/bench/processes.rs"]
mod processes;
mod kit;
mod callers;
mod slips;
mod slicelet;
mod session;
mod examples;
mod dev;
mod cluster;
mod outage;
mod wiped;
mod bad_calls;
mod same_answer;
mod backhaul;
mod flood;
mod during_change;
mod proxy_reload;
mod pauses_proxy;
mod proxy_handover;
mod pools;
mod grpc_proxy;
mod proxy_observe;
mod lookups;
mod hand;
mod regions;
mod langs;
mod brakes;
mod pauses;
mod fate;
mod secure;
mod failover;
mod task_loss;
mod rolling;
mod exclusive;
mod moving;
mod spill;
mod away;
mod durability;
mod disk_full;
mod reaction;
mod agent;
mod choice;
mod distributor;
mod agree;
mod sim_cluster;
mod sim_chaos;
mod sim_balance;
mod sim_advise;
