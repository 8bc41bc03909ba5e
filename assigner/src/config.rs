//! What a node is told when it starts: where it listens, where it keeps its log, how it comes to be a member, and who may
//! speak with it. Values are checked here, once; flags and files belong to the command line.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use mandoline_core::task::{Address, AddressError};

/// Where callers and operators reach a node, unless told.
pub const CLIENT_PORT: u16 = 7400;
/// Where a node's peers reach it, unless told.
pub const PEER_PORT: u16 = 7401;

/// What a node is told when it starts.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where callers and operators reach it.
    pub listen: SocketAddr,
    /// Where its peers reach it.
    pub peer_listen: SocketAddr,
    /// What it tells callers and peers of where it is, if that differs from where it listens.
    pub advertise: Option<Seat>,
    /// Where it keeps its log and snapshots.
    pub data: PathBuf,
    /// How it comes to be a member.
    pub start: Start,
    /// Who may speak with it.
    pub access: Access,
}

/// How a node comes to be a member of a cluster. Only the first start counts: later ones find the answer on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// It founds a cluster of one, which others may join.
    Init,
    /// It founds a cluster with these, itself among them: the same list at each.
    Peers(Vec<Seat>),
    /// It joins the cluster that this peer address belongs to.
    Join(Address),
    /// Its disk says: it is a member already.
    Known,
}

/// Where a member is: one host, a port for callers and one for peers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Seat {
    /// Where callers and operators reach it.
    pub client: Address,
    /// Where its peers reach it.
    pub peer: Address,
}

/// A text is no seat.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} names no node: give HOST, HOST:PEER_PORT or HOST:CLIENT_PORT/PEER_PORT, such as 10.0.0.7:7400/7401"
)]
pub struct SeatError {
    text: String,
    source: AddressError,
}

impl FromStr for Seat {
    type Err = SeatError;

    /// Reads `HOST`, `HOST:PEER_PORT` (callers use the port before it), or `HOST:CLIENT_PORT/PEER_PORT`.
    fn from_str(text: &str) -> Result<Self, SeatError> {
        let bad = |source| SeatError { text: text.chars().take(300).collect(), source };
        let address = |text: String| text.parse::<Address>().map_err(bad);
        let has_port = !text.ends_with(']') && text.contains(':');
        if !has_port {
            let [client, peer] = [CLIENT_PORT, PEER_PORT].map(|port| format!("{text}:{port}"));
            return Ok(Self { client: address(client)?, peer: address(peer)? });
        }
        if let Some((client, peer_port)) = text.split_once('/') {
            let client = address(client.to_owned())?;
            let (host, _) = client.as_str().rsplit_once(':').expect("an address has a port");
            let peer = address(format!("{host}:{peer_port}"))?;
            return Ok(Self { client, peer });
        }
        let peer = address(text.to_owned())?;
        let (host, port) = peer.as_str().rsplit_once(':').expect("an address has a port");
        let before = port.parse::<u16>().expect("an address has a port in range") - 1;
        let client = address(format!("{host}:{before}"))?;
        Ok(Self { client, peer })
    }
}

impl fmt::Display for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (_, port) = self.peer.as_str().rsplit_once(':').expect("an address has a port");
        write!(f, "{}/{port}", self.client)
    }
}

/// Who may speak with a node, and how both sides know each other.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// What proves who is who; nothing: plain text.
    pub tls: Option<Tls>,
    /// What each caller must show.
    pub token: Option<Token>,
    /// Plain text and no token are fine on any address: for networks that nobody else is on.
    pub insecure: bool,
}

/// Certificates, as PEM.
#[derive(Clone)]
pub struct Tls {
    /// The node's own, with what leads to the authority.
    pub certificate: Vec<u8>,
    /// The key that belongs to it.
    pub key: Vec<u8>,
    /// The authority that vouches for the cluster's nodes.
    pub authority: Vec<u8>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls(..)")
    }
}

/// What each caller must show. Never printed.
#[derive(Clone)]
pub struct Token(String);

/// A text is no token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It could be guessed.
    #[error(
        "the token has {0} characters: use at least {TOKEN_MIN}, such as from `openssl rand -hex 32`"
    )]
    Short(usize),
    /// It would not fit a header.
    #[error("the token has more than {TOKEN_MAX} characters, or some that are no visible ASCII")]
    Form,
}

/// The fewest characters of a token: 16 hex digits are 64 bits, more than can be tried over a network.
const TOKEN_MIN: usize = 16;
/// The most characters of a token: a header line is bounded by servers to some KiB.
const TOKEN_MAX: usize = 1_024;

impl Token {
    /// Takes a token, white space round it apart.
    pub fn new(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        if text.len() > TOKEN_MAX || !text.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(TokenError::Form);
        }
        if text.len() < TOKEN_MIN {
            return Err(TokenError::Short(text.len()));
        }
        Ok(Self(text.to_owned()))
    }

    /// Gives the token, to send it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// Why a configuration was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Strangers could reach the node.
    #[error(
        "{0} can be reached by others, and {1} is missing: give it, listen on 127.0.0.1, or say --insecure"
    )]
    Open(SocketAddr, &'static str),
    /// A list names a node twice.
    #[error("the list of peers names {0} twice")]
    Twice(Address),
    /// More members would not vote faster.
    #[error("{0} peers are given: use 1 to {PEERS_MAX}, best 3 or 5")]
    Count(usize),
    /// Others cannot call a wildcard.
    #[error("{0} is no address that others can call: say --advertise HOST")]
    Wildcard(SocketAddr),
}

/// The most members that found a cluster.
const PEERS_MAX: usize = 9;

impl Config {
    /// Checks what cannot be true, and that no stranger gets in by an oversight.
    pub fn check(&self) -> Result<(), ConfigError> {
        for address in [self.listen, self.peer_listen] {
            self.access.check(address)?;
            if self.advertise.is_none() && address.ip().is_unspecified() {
                return Err(ConfigError::Wildcard(address));
            }
        }
        let Start::Peers(seats) = &self.start else { return Ok(()) };
        if seats.is_empty() || seats.len() > PEERS_MAX {
            return Err(ConfigError::Count(seats.len()));
        }
        let mut peers: Vec<&Address> = seats.iter().map(|seat| &seat.peer).collect();
        peers.sort();
        match peers.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(ConfigError::Twice(pair[0].clone())),
            None => Ok(()),
        }
    }
}

impl Access {
    /// Checks that an address which others can reach asks who they are.
    pub fn check(&self, address: SocketAddr) -> Result<(), ConfigError> {
        if self.insecure || address.ip().is_loopback() {
            return Ok(());
        }
        match (&self.tls, &self.token) {
            (None, _) => Err(ConfigError::Open(address, "TLS (certificate, key, authority)")),
            (_, None) => Err(ConfigError::Open(address, "a token")),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(listen: &str, access: Access) -> Config {
        Config {
            listen: listen.parse().unwrap(),
            peer_listen: "127.0.0.1:7401".parse().unwrap(),
            advertise: None,
            data: PathBuf::from("data"),
            start: Start::Init,
            access,
        }
    }

    #[test]
    fn a_seat_is_a_host_with_one_or_two_ports() {
        for (text, full) in [
            ("10.0.0.7", "10.0.0.7:7400/7401"),
            ("10.0.0.7:7411", "10.0.0.7:7410/7411"),
            ("node-1:80/90", "node-1:80/90"),
            ("[::1]", "[::1]:7400/7401"),
            ("[::1]:81", "[::1]:80/81"),
        ] {
            let seat: Seat = text.parse().unwrap();
            assert_eq!(seat.to_string(), full);
            assert_eq!(full.parse(), Ok(seat));
        }
        for bad in ["", ":80", "a:1", "a:80/", "a:80/x", "a b"] {
            assert!(bad.parse::<Seat>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_address_that_others_reach_needs_tls_and_a_token() {
        let token = Token::new("0123456789abcdef").unwrap();
        let tls = Tls { certificate: vec![], key: vec![], authority: vec![] };
        let open = "10.0.0.7:7400";
        assert_eq!(config("127.0.0.1:7400", Access::default()).check(), Ok(()));
        let bare = config(open, Access::default()).check().unwrap_err().to_string();
        assert!(bare.contains("TLS") && bare.contains("--insecure"), "{bare}");
        let no_token = Access { tls: Some(tls.clone()), ..Access::default() };
        assert!(config(open, no_token).check().unwrap_err().to_string().contains("a token"));
        let full = Access { tls: Some(tls), token: Some(token), insecure: false };
        assert_eq!(config(open, full).check(), Ok(()));
        let insecure = Access { insecure: true, ..Access::default() };
        assert_eq!(config(open, insecure.clone()).check(), Ok(()));
        assert!(config("0.0.0.0:7400", insecure).check().is_err(), "nobody can call a wildcard");
    }

    #[test]
    fn a_list_of_peers_names_each_once() {
        let with = |texts: &[&str]| {
            let seats = texts.iter().map(|text| text.parse().unwrap()).collect();
            Config { start: Start::Peers(seats), ..config("127.0.0.1:7400", Access::default()) }
        };
        assert_eq!(with(&["a", "b", "c"]).check(), Ok(()));
        assert_eq!(
            with(&["a", "b", "a"]).check(),
            Err(ConfigError::Twice("a:7401".parse().unwrap()))
        );
        assert_eq!(with(&[]).check(), Err(ConfigError::Count(0)));
    }

    #[test]
    fn a_token_is_never_printed() {
        let token = Token::new(" 0123456789abcdef\n").unwrap();
        assert_eq!(format!("{token:?}"), "Token(..)");
        assert_eq!(token.expose(), "0123456789abcdef");
        assert_eq!(Token::new("short").unwrap_err(), TokenError::Short(5));
        assert_eq!(Token::new("0123456789abcdef é").unwrap_err(), TokenError::Form);
    }
}
