//! One proxy takes over from another: the new process is given the sockets that the old one listens on, serves from them, and tells
//! the old one to finish what it has begun. The sockets themselves never close, so no client is refused and none that waits in them is
//! lost; nor is a port free for anyone else in between.
//!
//! The two meet at a socket in the file system that only this user may open:
//!
//! ```text
//! new  connects
//! old  one record of 128 bytes for each socket, with its descriptor, and an empty one
//! new  binds nothing, starts, waits until it knows who serves what, and writes one byte
//! old  stops taking connections, ends what is under way, and ends
//! ```
//!
//! A new process that ends before its byte has changed nothing: the old one goes on. Service managers that hold the sockets themselves
//! (systemd) hand them over at the start instead: see [`from_manager`].

use std::fs::Permissions;
use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg, sockopt,
};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, getuid, pidfd_getfd, pidfd_open};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::sockets::Sockets;

/// One record: an address as text, and zeros. The longest path of a Unix socket has 108 bytes.
const RECORD_BYTES: usize = 128;
/// What the new process writes when it serves.
const READY: u8 = b'r';
/// How long either side waits for the other's next word; the new process needs some of it to learn who serves what.
const WORD_WAIT: Duration = Duration::from_secs(30);
/// How many sockets are taken at most: one for each of the most workers on a few listeners, and the admin address.
const SOCKETS_MAX: usize = 1 + 8 * crate::config::WORKERS_MAX;

/// Sockets that another process may take over. Dropping it takes the offer back, and closes this process's hold on them.
#[derive(Debug)]
pub struct Offer {
    sockets: Arc<Mutex<Option<Sockets>>>,
    taken: Arc<AtomicBool>,
    path: PathBuf,
    inode: u64,
}

impl Offer {
    /// Says whether another process has taken the sockets over, and serves.
    pub fn is_taken(&self) -> bool {
        self.taken.load(Relaxed)
    }
}

/// Lets another process take the sockets over, from now on; when one has, `stop` is cancelled. The file at `path` is replaced: whoever
/// was there has been taken over from, or is gone.
pub fn offer(path: &Path, sockets: Sockets, stop: CancellationToken) -> io::Result<Offer> {
    let beside = path.with_extension(std::process::id().to_string());
    // A file that an earlier process of this number left behind.
    drop(std::fs::remove_file(&beside));
    let listener = UnixListener::bind(&beside)?;
    std::fs::set_permissions(&beside, Permissions::from_mode(0o600))?;
    let inode = std::fs::metadata(&beside)?.ino();
    std::fs::rename(&beside, path)?;
    let sockets = Arc::new(Mutex::new(Some(sockets)));
    let taken = Arc::new(AtomicBool::new(false));
    let (offered, is_taken) = (Arc::clone(&sockets), Arc::clone(&taken));
    let wait = move || {
        for stream in listener.incoming() {
            // A second one waits here for the first.
            let sockets = offered.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let Some(sockets) = &*sockets else { return };
            match stream.and_then(|stream| give(&stream, sockets)) {
                Ok(()) => {
                    info!("Another process serves from now on");
                    is_taken.store(true, Relaxed);
                    stop.cancel();
                    return;
                }
                Err(error) => warn!(%error, "Another process asked to take over, and did not"),
            }
        }
    };
    // It waits for somebody to ask, until the process ends.
    thread::Builder::new().name("mandoline-handover".to_owned()).spawn(wait)?;
    Ok(Offer { sockets, taken, path: path.to_owned(), inode })
}

impl Drop for Offer {
    fn drop(&mut self) {
        let is_ours = std::fs::metadata(&self.path).is_ok_and(|found| found.ino() == self.inode);
        if is_ours {
            // If it stays, whoever comes finds nobody behind it.
            drop(std::fs::remove_file(&self.path));
        }
        *self.sockets.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = None;
    }
}

/// Hands the sockets to one process, and waits until it serves.
fn give(stream: &UnixStream, sockets: &Sockets) -> io::Result<()> {
    stream.set_read_timeout(Some(WORD_WAIT))?;
    stream.set_write_timeout(Some(WORD_WAIT))?;
    let peer = sockopt::socket_peercred(stream)?;
    if peer.uid != getuid() && !peer.uid.is_root() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it belongs to another user"));
    }
    for (socket, address) in sockets.all() {
        let mut record = [0; RECORD_BYTES];
        record[..address.len()].copy_from_slice(address.as_bytes());
        let mut space =
            [const { std::mem::MaybeUninit::uninit() }; rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = [socket.as_fd()];
        if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            return Err(io::Error::other("no room for a descriptor"));
        }
        let sent = sendmsg(stream, &[IoSlice::new(&record)], &mut control, SendFlags::NOSIGNAL)?;
        if sent != RECORD_BYTES {
            return Err(io::Error::new(io::ErrorKind::WriteZero, "a record was cut short"));
        }
    }
    let mut stream = stream;
    stream.write_all(&[0; RECORD_BYTES])?;
    let mut word = [0];
    stream.read_exact(&mut word)?;
    if word[0] == READY { Ok(()) } else { Err(io::Error::other("it did not say that it serves")) }
}

/// Sockets that were taken over from a process that still serves.
#[derive(Debug)]
pub struct Taken {
    /// The sockets.
    pub sockets: Vec<TcpListener>,
    stream: UnixStream,
}

/// Asks the process that offers its sockets at `path` for them; nothing if there is none.
pub fn take(path: &Path) -> io::Result<Option<Taken>> {
    let stream = match UnixStream::connect(path) {
        Ok(stream) => stream,
        Err(error) => {
            return match error.kind() {
                // A file without a process behind it is left by one that was killed.
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(None),
                _ => Err(error),
            };
        }
    };
    stream.set_read_timeout(Some(WORD_WAIT))?;
    let mut sockets = Vec::new();
    loop {
        let (record, descriptor) = record(&stream)?;
        match descriptor {
            None if record.iter().all(|b| *b == 0) => return Ok(Some(Taken { sockets, stream })),
            Some(descriptor) if sockets.len() < SOCKETS_MAX => {
                sockets.push(TcpListener::from(descriptor));
            }
            _ => return Err(io::Error::other("the process that serves says what cannot be")),
        }
    }
}

/// Reads one record, and the descriptor that comes with it.
fn record(stream: &UnixStream) -> io::Result<([u8; RECORD_BYTES], Option<OwnedFd>)> {
    let (mut record, mut read, mut descriptor) = ([0; RECORD_BYTES], 0, None);
    while read < RECORD_BYTES {
        let mut space =
            [const { std::mem::MaybeUninit::uninit() }; rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let rest = &mut [IoSliceMut::new(&mut record[read..])];
        let got = recvmsg(stream, rest, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                descriptor = descriptors.last().or(descriptor);
            }
        }
        if got.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        read += got.bytes;
    }
    Ok((record, descriptor))
}

impl Taken {
    /// Tells the old process to finish: this one serves.
    pub fn serves(mut self) -> io::Result<()> {
        self.stream.write_all(&[READY])
    }
}

/// Takes the sockets that a service manager holds for this process, as systemd hands them over (`LISTEN_PID`, `LISTEN_FDS`); nothing if it
/// holds none.
pub fn from_manager() -> io::Result<Option<Vec<TcpListener>>> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<i32>().ok());
    let (Some(process), Some(count)) = (number("LISTEN_PID"), number("LISTEN_FDS")) else {
        return Ok(None);
    };
    if process != getpid().as_raw_nonzero().get() || count < 1 {
        return Ok(None);
    }
    // The safe way to a descriptor that is known by its number only: asked of the own process as of a strange one.
    let own = pidfd_open(getpid(), PidfdFlags::empty())?;
    let sockets = (FIRST_DESCRIPTOR..FIRST_DESCRIPTOR + count.min(SOCKETS_MAX as i32))
        .map(|number| {
            let descriptor = pidfd_getfd(&own, number, PidfdGetfdFlags::empty())?;
            let listens = sockopt::socket_acceptconn(&descriptor)?;
            if !listens {
                let what = format!("descriptor {number} of the service manager does not listen");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
            }
            Ok(TcpListener::from(descriptor))
        })
        .collect::<Result<_, _>>()?;
    Ok(Some(sockets))
}

/// The first descriptor that systemd hands over: SD_LISTEN_FDS_START.
const FIRST_DESCRIPTOR: i32 = 3;
