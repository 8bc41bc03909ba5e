//! One proxy takes over from another: the new process is given the sockets that the old one listens on, serves from them, and tells
//! the old one to finish what it has begun. The sockets themselves never close, so no client is refused and none that waits in them is
//! lost; nor is a port free for anyone else in between.
//!
//! The two meet at a socket in the file system that only this user may open:
//!
//! ```text
//! new  connects
//! old  one record of 128 bytes for each socket, with its descriptor, and an empty one
//! new  starts on them, waits until it knows who serves what, and writes one byte
//! old  stops taking connections, hangs up, ends what is under way, and ends
//! new  puts a file of its own in the place of the old one's
//! ```
//!
//! A new process that ends before its byte has changed nothing: the old one goes on. An old one that waits no longer says so by a byte
//! of its own before it hangs up, and one that was stopped meanwhile just hangs up: its sockets live on in the new one.
//!
//! Who takes the file away? Whoever offers at it, and only while it offers: not once it is taken, nor while another process asks, since
//! that one may be about to replace it. To look whose file it is does not do, for it may be replaced between the look and the removal.
//!
//! Service managers that hold the sockets themselves (systemd) hand them over at the start instead: see [`from_manager`].

use std::fs::Permissions;
use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
/// What the old process writes when it goes on serving.
const LATE: u8 = b'l';
/// How long either side waits for the other's next word; the new process needs some of it to learn who serves what.
const WORD_WAIT: Duration = Duration::from_secs(30);
/// How long to wait after the kernel refused a socket, for want of descriptors most likely.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// How many sockets are taken at most: one for each of the most workers on a few listeners, and the admin address.
const SOCKETS_MAX: usize = 1 + 8 * crate::config::WORKERS_MAX;

/// A file at which the next process could ask, before it is where that looks. Dropping it takes it away.
#[derive(Debug)]
pub struct Prepared {
    listener: UnixListener,
    beside: Beside,
    path: PathBuf,
}

/// A file that is not where it is to be yet, and goes with this.
#[derive(Debug)]
struct Beside(PathBuf);

/// Sockets that another process may take over. Dropping it takes the offer back, and closes this process's hold on them.
#[derive(Debug)]
pub struct Offer {
    state: Arc<Mutex<State>>,
    path: PathBuf,
    file: (u64, u64),
}

/// What has become of an offer.
#[derive(Debug)]
enum State {
    Offered(Sockets),
    /// A process has asked, and they are shown to it.
    Asked,
    Taken,
    Withdrawn,
}

/// Makes a file for the next process to ask at, beside `path`. To be done before the one that serves is told to end: a folder that takes
/// no file is learnt of in time.
pub fn prepare(path: &Path) -> io::Result<Prepared> {
    let beside = Beside(path.with_extension(std::process::id().to_string()));
    // A file that an earlier process of this number left behind.
    drop(std::fs::remove_file(&beside.0));
    let listener = UnixListener::bind(&beside.0)?;
    std::fs::set_permissions(&beside.0, Permissions::from_mode(0o600))?;
    Ok(Prepared { listener, beside, path: path.to_owned() })
}

impl Prepared {
    /// Lets another process take the sockets over, from now on; when one has, `stop` is cancelled. A file that is there is replaced:
    /// whoever was behind it has been taken over from, or is gone.
    pub fn offer(self, sockets: Sockets, stop: CancellationToken) -> io::Result<Offer> {
        let Self { listener, beside, path } = self;
        let file = number(&beside.0)?;
        let state = Arc::new(Mutex::new(State::Offered(sockets)));
        let offer = Offer { state: Arc::clone(&state), path, file };
        // It waits for somebody to ask, until the process ends.
        thread::Builder::new()
            .name("mandoline-handover".to_owned())
            .spawn(move || answer(&listener, &state, &stop))?;
        std::fs::rename(&beside.0, &offer.path)?;
        Ok(offer)
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // It is where it was to be, or of no use.
        drop(std::fs::remove_file(&self.0));
    }
}

impl Offer {
    /// Says whether another process has taken the sockets over, and serves.
    pub fn is_taken(&self) -> bool {
        matches!(*lock(&self.state), State::Taken)
    }
}

impl Drop for Offer {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        match *state {
            State::Offered(_) => *state = State::Withdrawn,
            // It is about to put its own file there, and if not, whoever comes finds nobody behind this one. Nor is it waited for: it
            // goes on by itself.
            State::Asked => return *state = State::Withdrawn,
            State::Taken | State::Withdrawn => return,
        }
        // Nobody else is told of sockets from now on, so who replaces the file has not come by it. The number stays this file's for as
        // long as its socket is open, which is until the process ends.
        if number(&self.path).is_ok_and(|file| file == self.file) {
            drop(std::fs::remove_file(&self.path));
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives the number of a file, and of what it is on.
fn number(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::metadata(path).map(|found| (found.dev(), found.ino()))
}

/// Shows the sockets to one process after the other, until one serves from them.
fn answer(listener: &UnixListener, state: &Mutex<State>, stop: &CancellationToken) {
    // A second one waits here for the first.
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                warn!(%error, "Nobody can ask to take over at the moment");
                thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        let before = std::mem::replace(&mut *lock(state), State::Asked);
        let State::Offered(sockets) = before else {
            *lock(state) = before;
            return;
        };
        match give(&stream, &sockets) {
            Ok(()) => {
                info!("Another process serves from now on");
                *lock(state) = State::Taken;
                stop.cancel();
                // By this the other one learns that it is known.
                return drop(stream);
            }
            Err(error) => {
                warn!(%error, "Another process asked to take over, and did not");
                let mut state = lock(state);
                if matches!(*state, State::Withdrawn) {
                    return;
                }
                *state = State::Offered(sockets);
            }
        }
    }
}

/// Hands the sockets to one process, and waits until it serves. If that takes too long, it is told that it comes too late.
fn give(stream: &UnixStream, sockets: &Sockets) -> io::Result<()> {
    stream.set_read_timeout(Some(WORD_WAIT))?;
    stream.set_write_timeout(Some(WORD_WAIT))?;
    let peer = sockopt::socket_peercred(stream)?;
    if peer.uid != getuid() && !peer.uid.is_root() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it belongs to another user"));
    }
    show(stream, sockets)?;
    let mut word = [0];
    let mut stream = stream;
    let heard = match stream.read_exact(&mut word) {
        Ok(()) if word[0] == READY => return Ok(()),
        Ok(()) => io::Error::other("it did not say that it serves"),
        Err(error) => error,
    };
    // It may have ended.
    drop(stream.write_all(&[LATE]));
    Err(heard)
}

/// Sends the sockets, and where each listens.
fn show(mut stream: &UnixStream, sockets: &Sockets) -> io::Result<()> {
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
    stream.write_all(&[0; RECORD_BYTES])
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
        let (record, descriptor) = match record(&stream) {
            // Its process has ended, or has been taken over from, before it saw who asks, or offers them no more.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            Err(error) if is_end(&error) && sockets.is_empty() => return Ok(None),
            read => read?,
        };
        match descriptor {
            None if record.iter().all(|b| *b == 0) => return Ok(Some(Taken { sockets, stream })),
            Some(descriptor) if sockets.len() < SOCKETS_MAX => {
                sockets.push(TcpListener::from(descriptor));
            }
            _ => return Err(io::Error::other("the process that serves says what cannot be")),
        }
    }
}

fn is_end(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::UnexpectedEof
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
    /// Tells the old process to finish: this one serves. Nobody need be told where it has ended meanwhile; one that no longer waited goes
    /// on serving, so this process is not to.
    pub fn serves(mut self) -> io::Result<()> {
        match self.stream.write_all(&[READY]) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
            // What it had to say before it hung up can be read yet.
            _ => {}
        }
        let mut word = [0];
        match self.stream.read(&mut word) {
            Ok(1..) if word[0] == LATE => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "it has waited for too long, and goes on",
            )),
            // It hung up, since it was told, or has ended. One that hangs has been told all the same.
            _ => Ok(()),
        }
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
