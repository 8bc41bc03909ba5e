//! Taking ports, and saying who holds one that is taken: on Linux `/proc` knows, for processes that this user may look at.

use std::fs;
use std::net::{SocketAddr, TcpListener};

use crate::failure::Failure;

/// Listens on `address`; a port that is taken is named, with who holds it where that can be found out.
pub(crate) fn bind(address: SocketAddr, what: &str) -> Result<TcpListener, Failure> {
    let listener = TcpListener::bind(address).map_err(|error| taken(address, what, &error))?;
    // tokio takes over sockets that do not block.
    listener
        .set_nonblocking(true)
        .map_err(|error| Failure::new(format!("cannot use {address}")).because(error))?;
    Ok(listener)
}

/// Explains why nobody can listen on `address`.
pub(crate) fn taken(address: SocketAddr, what: &str, error: &std::io::Error) -> Failure {
    let failure = Failure::new(format!("cannot listen on {address} for {what}"));
    match error.kind() {
        std::io::ErrorKind::AddrInUse => match holder(address.port()) {
            Some(holder) => failure
                .because(format!("the port is taken by {holder}"))
                .try_this(format!("stop it with `kill {}`, or give another port", holder.pid)),
            None => failure
                .because("the port is taken, by a process that this user may not look at")
                .try_this("give another port"),
        },
        _ => failure.because(error).try_this("give an address of this machine"),
    }
}

/// A process that holds a port.
#[derive(Debug, PartialEq, Eq)]
struct Holder {
    pid: u32,
    command: String,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {} ({})", self.pid, self.command)
    }
}

fn holder(port: u16) -> Option<Holder> {
    let sockets: Vec<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(|table| listening(&table, port))
        .collect();
    if sockets.is_empty() {
        return None;
    }
    let pids = fs::read_dir("/proc")
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let holds = |pid: &u32| {
        let files = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
        let is_it = |file: fs::DirEntry| {
            fs::read_link(file.path()).is_ok_and(|to| {
                to.to_str().is_some_and(|to| sockets.iter().any(|socket| socket == to))
            })
        };
        files.filter_map(Result::ok).any(is_it).then_some(())
    };
    let pid = pids.into_iter().find(|pid| holds(pid).is_some())?;
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = line.split(|b| *b == 0).map(String::from_utf8_lossy);
    let command: Vec<String> = words.take(3).map(|word| word.chars().take(60).collect()).collect();
    Some(Holder { pid, command: command.join(" ").trim().to_owned() })
}

/// The sockets that listen on `port`, from the kernel's table, by the names that `/proc/PID/fd` gives them.
fn listening(table: &str, port: u16) -> Vec<String> {
    let socket = |line: &str| -> Option<String> {
        // Columns: slot, local address, remote address, state (0A listens), five more, and the inode.
        let mut columns = line.split_whitespace();
        let (_, local) = columns.nth(1)?.rsplit_once(':')?;
        let listens = columns.nth(1)? == "0A";
        let inode = columns.nth(5)?;
        let is_it = listens && u16::from_str_radix(local, 16).ok()? == port;
        is_it.then(|| format!("socket:[{inode}]"))
    };
    table.lines().filter_map(socket).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_table_is_read() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   0: 0100007F:1CE8 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0\n   1: 0100007F:1CE8 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0\n";
        assert_eq!(listening(table, 7400), ["socket:[4711]"]);
        assert!(listening(table, 7401).is_empty());
    }

    #[test]
    fn a_taken_port_is_named_with_who_holds_it() {
        let first = bind("127.0.0.1:0".parse().unwrap(), "tests").unwrap();
        let address = first.local_addr().unwrap();
        let failure = bind(address, "the assigner's clients").unwrap_err().to_string();
        let what = format!("error: cannot listen on {address} for the assigner's clients");
        assert!(failure.starts_with(&what), "{failure}");
        if cfg!(target_os = "linux") {
            let me = format!("the port is taken by process {}", std::process::id());
            assert!(failure.contains(&me), "{failure}");
        }
    }
}
