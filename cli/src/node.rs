//! `mandoline assigner`: one node of the control plane, as a process of its own.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use mandoline_assigner::assigner::{Assigner, Listeners};
use mandoline_assigner::config::{CLIENT_PORT, Config, PEER_PORT, Seat, Start};
use mandoline_core::task::Address;
use serde::Deserialize;

use crate::access_args::AccessArgs;
use crate::failure::Failure;
use crate::text::{Text, overlay};
use crate::{file, ports, stop};

/// Runs a node of the control plane
///
/// A cluster begins in one of two ways, and a node finds the rest on its disk when it starts again:
///
///   one node alone, which others join:
///     mandoline assigner --init --data-dir a
///     mandoline assigner --join 127.0.0.1:7401 --data-dir b --listen 127.0.0.1:7410 --peer-listen 127.0.0.1:7411
///
///   several at once, each with the same list:
///     mandoline assigner --peers 10.0.0.1,10.0.0.2,10.0.0.3 --advertise 10.0.0.1 --listen 10.0.0.1:7400 ..
///
/// Every option may come from the environment or from a YAML file (--config), where it has the same name with `_`:
///
///   listen: 127.0.0.1:7400
///   peer_listen: 127.0.0.1:7401
///   data_dir: /var/lib/mandoline
///   peers: [10.0.0.1, 10.0.0.2, 10.0.0.3]
///   access: {tls_cert: node.pem, tls_key: node.key, tls_ca: ca.pem, token_file: token}
#[derive(Debug, Default, Args, Deserialize)]
#[command(verbatim_doc_comment)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct NodeArgs {
    /// A YAML file with these options; flags and environment win over it
    #[arg(long, env = "MANDOLINE_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,
    /// Where callers and operators reach it [default: 127.0.0.1:7400]
    #[arg(long, env = "MANDOLINE_LISTEN", value_name = "IP:PORT")]
    listen: Option<Text<SocketAddr>>,
    /// Where its peers reach it [default: 127.0.0.1:7401]
    #[arg(long, env = "MANDOLINE_PEER_LISTEN", value_name = "IP:PORT")]
    peer_listen: Option<Text<SocketAddr>>,
    /// What it tells others of where it is: HOST, HOST:PEER_PORT or HOST:CLIENT_PORT/PEER_PORT [default: where it listens]
    #[arg(long, env = "MANDOLINE_ADVERTISE", value_name = "NODE")]
    advertise: Option<Text<Seat>>,
    /// Where it keeps its log and snapshots [default: mandoline-data]
    #[arg(long, env = "MANDOLINE_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Founds a cluster with these nodes, itself among them: the same list, in the same order, at each
    #[arg(
        long,
        env = "MANDOLINE_PEERS",
        value_name = "NODE,..",
        value_delimiter = ',',
        conflicts_with_all = ["init", "join"]
    )]
    peers: Option<Vec<Text<Seat>>>,
    /// Founds a cluster of one, which others may join
    #[arg(
        long,
        env = "MANDOLINE_INIT",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        conflicts_with = "join"
    )]
    init: Option<bool>,
    /// Joins the cluster that this peer address belongs to
    #[arg(long, env = "MANDOLINE_JOIN", value_name = "HOST:PEER_PORT")]
    join: Option<Text<Address>>,
    #[command(flatten)]
    access: AccessArgs,
}

impl NodeArgs {
    /// Fills what flags and environment did not give from the file, and reads what they name.
    fn load(mut self) -> Result<Config, Failure> {
        if let Some(path) = &self.config {
            let from_file: Self = file::read(path)?;
            // How a cluster begins is one choice: a flag that makes it overrules all of the file's.
            if self.peers.is_none() && self.init.is_none() && self.join.is_none() {
                overlay!(self, from_file; peers, init, join);
            }
            overlay!(self, from_file; listen, peer_listen, advertise, data_dir);
            self.access.overlay(from_file.access);
        }
        let start = match (self.peers, self.init == Some(true), self.join) {
            (Some(peers), false, None) => {
                Start::Peers(peers.into_iter().map(|Text(seat)| seat).collect())
            }
            (None, true, None) => Start::Init,
            (None, false, Some(Text(address))) => Start::Join(address),
            (None, false, None) => Start::Known,
            _ => {
                return Err(Failure::new("peers, init and join are three ways to begin")
                    .because("more than one of them is given")
                    .try_this("give one"));
            }
        };
        let local = |given: Option<Text<SocketAddr>>, port| {
            given.map_or_else(|| SocketAddr::from(([127, 0, 0, 1], port)), |Text(address)| address)
        };
        Ok(Config {
            listen: local(self.listen, CLIENT_PORT),
            peer_listen: local(self.peer_listen, PEER_PORT),
            advertise: self.advertise.map(|Text(seat)| seat),
            data: self.data_dir.unwrap_or_else(|| PathBuf::from("mandoline-data")),
            start,
            access: self.access.load()?,
        })
    }
}

/// Runs until told to stop.
pub(crate) async fn run(args: NodeArgs) -> Result<ExitCode, Failure> {
    let config = args.load()?;
    config
        .check()
        .map_err(|error| Failure::new("the node's configuration cannot be right").because(error))?;
    if config.access.insecure {
        eprintln!("warning: --insecure: whoever reaches {} commands this cluster", config.listen);
    }
    let stop = stop::on_signal()?;
    let listeners = Listeners {
        client: ports::bind(config.listen, "callers of the assigner")?,
        peer: ports::bind(config.peer_listen, "peers of the assigner")?,
    };
    let data = config.data.display().to_string();
    let assigner = Assigner::start(config, listeners, stop).await.map_err(|error| {
        Failure::new(format!("the node in {data} did not start")).caused_by(&error)
    })?;
    eprintln!("assigner: callers at {}, data in {data}", assigner.client_address());
    assigner
        .finished()
        .await
        .map_err(|error| Failure::new("the node has stopped by itself").caused_by(&error))?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(yaml: &str, flags: NodeArgs) -> Result<Config, Failure> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.yaml");
        std::fs::write(&path, yaml).unwrap();
        NodeArgs { config: Some(path), ..flags }.load()
    }

    #[test]
    fn a_node_is_described_by_a_file() {
        let yaml =
            "listen: 10.0.0.1:80\npeers: [10.0.0.1, '10.0.0.2:7411']\naccess: {insecure: true}\n";
        let config = load(yaml, NodeArgs::default()).unwrap();
        assert_eq!(config.listen.to_string(), "10.0.0.1:80");
        assert_eq!(config.peer_listen.to_string(), "127.0.0.1:7401");
        let seats = ["10.0.0.1", "10.0.0.2:7411"].map(|text| text.parse().unwrap());
        assert_eq!(config.start, Start::Peers(seats.to_vec()));
        assert!(config.access.insecure);
    }

    #[test]
    fn a_flag_wins_and_one_way_to_begin_is_enough() {
        let init = || NodeArgs { init: Some(true), ..NodeArgs::default() };
        assert_eq!(load("join: a:7401\n", init()).unwrap().start, Start::Init);
        let both = load("init: true\njoin: a:7401\n", NodeArgs::default()).unwrap_err().to_string();
        assert!(both.contains("three ways to begin"), "{both}");
        assert_eq!(NodeArgs::default().load().unwrap().start, Start::Known);
    }

    #[test]
    fn a_slip_in_the_file_is_named() {
        let failure = load("lisen: 127.0.0.1:80\n", NodeArgs::default()).unwrap_err().to_string();
        assert!(failure.contains("node.yaml:1:1: unknown field \"lisen\""), "{failure}");
        assert!(failure.contains("did you mean \"listen\""), "{failure}");
        let failure = load("access:\n  tls_kee: a\n", NodeArgs::default()).unwrap_err().to_string();
        assert!(failure.contains("did you mean \"tls_key\""), "{failure}");
        let half = load("access: {tls_ca: /dev/null, tls_key: /dev/null}", NodeArgs::default());
        assert!(half.unwrap_err().to_string().contains("TLS needs three files"));
    }
}
