//! `mandoline bench`: what is claimed of the system, measured on this machine with real processes.

#[allow(dead_code)] // the integration tests use the rest of it
mod processes;
mod plain;
mod trial;
mod failover;
mod handoff;
mod moving;
mod rolling;
mod pause;
mod crash;
mod reaction;
mod route;
mod echo;
mod same;
mod backhaul;
mod stub;
mod proxy;
mod flood;

use std::process::ExitCode;

use clap::Subcommand;

use crate::failure::Failure;

/// Measures what is claimed, on this machine
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    Failover(failover::FailoverArgs),
    Handoff(handoff::HandoffArgs),
    Moving(moving::MovingArgs),
    Rolling(rolling::RollingArgs),
    Pause(pause::PauseArgs),
    Crash(crash::CrashArgs),
    Reaction(reaction::ReactionArgs),
    Route(route::RouteArgs),
    Same(same::SameArgs),
    Backhaul(backhaul::BackhaulArgs),
    Stub(stub::StubArgs),
    Proxy(proxy::ProxyArgs),
    #[command(hide = true)]
    Origin(proxy::origin::OriginArgs),
    Flood(flood::FloodArgs),
    #[command(hide = true)]
    Echo(echo::EchoArgs),
}

/// Answers `bench`.
pub(crate) async fn run(command: BenchCommand) -> Result<ExitCode, Failure> {
    match command {
        BenchCommand::Failover(args) => failover::run(args).await,
        BenchCommand::Handoff(args) => handoff::run(args).await,
        BenchCommand::Moving(args) => moving::run(args).await,
        BenchCommand::Rolling(args) => rolling::run(args).await,
        BenchCommand::Pause(args) => pause::run(args).await,
        BenchCommand::Crash(args) => crash::run(args).await,
        BenchCommand::Reaction(args) => reaction::run(args).await,
        BenchCommand::Route(args) => route::run(args).await,
        BenchCommand::Same(args) => same::run(args).await,
        BenchCommand::Backhaul(args) => backhaul::run(args).await,
        BenchCommand::Stub(args) => stub::run(args).await,
        BenchCommand::Proxy(args) => proxy::run(args).await,
        BenchCommand::Origin(args) => proxy::origin::run(args).await,
        BenchCommand::Flood(args) => flood::run(args).await,
        BenchCommand::Echo(args) => echo::run(args).await,
    }
}
