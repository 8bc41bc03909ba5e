//! What a connection carries after it has switched protocols: bytes both ways, which nobody here reads, until either side ends it or both
//! are silent for too long.
//!
//! A tunnel that says nothing costs no buffer: bytes are read into room that all share, and kept only where the other side does not
//! take them at once.

use std::cell::RefCell;
use std::error::Error;
use std::future::poll_fn;
use std::io;
use std::mem::MaybeUninit;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::metrics::names::Count;
use crate::observe::Exchange;
use crate::permit::Permit;
use crate::pool::dial::Io;
use crate::record::Outcome;
use crate::worker::Worker;

/// What becomes of a request that switches protocols.
#[derive(Clone)]
pub(crate) enum Switch {
    /// It leaves its tunnel here for whoever has the connection, all of which is the client's side.
    Connection(Rc<RefCell<Option<Tunnel>>>),
    /// Its stream of HTTP/2 is the client's side.
    Stream(Rc<RefCell<Option<OnUpgrade>>>, CancellationToken),
}

/// A connection that is to be switched: the task's side, and the request that it all began with.
pub(crate) struct Tunnel {
    worker: Rc<Worker>,
    task: OnUpgrade,
    exchange: Exchange,
    // One of as many tunnels as there may be, from before its task is asked until it has ended.
    permit: Permit,
}

impl Switch {
    pub(crate) fn connection() -> Self {
        Self::Connection(Rc::default())
    }

    pub(crate) fn stream(stream: OnUpgrade, stop: &CancellationToken) -> Self {
        Self::Stream(Rc::new(RefCell::new(Some(stream))), stop.clone())
    }

    pub(crate) const fn is_stream(&self) -> bool {
        matches!(self, Self::Stream(..))
    }

    /// Has the client's side switch when the answer is out.
    pub(crate) fn set(self, tunnel: Tunnel) {
        match self {
            Self::Connection(place) => drop(place.replace(Some(tunnel))),
            Self::Stream(stream, stop) => {
                let worker = Rc::clone(&tunnel.worker);
                let stream = stream.take().expect("a stream switches once");
                worker.pool.spawn(async move {
                    match stream.await {
                        Ok(client) => {
                            tunnel.run(TokioIo::new(client), Bytes::new(), &stop).await;
                        }
                        Err(error) => debug!(%error, "A client left as its stream switched"),
                    }
                });
            }
        }
    }

    /// Gives what the connection has switched to, if it has.
    pub(crate) fn take(&self) -> Option<Tunnel> {
        match self {
            Self::Connection(place) => place.take(),
            Self::Stream(..) => None,
        }
    }
}

/// How a tunnel ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("both sides ended the tunnel")]
    Over,
    #[error("the client broke off")]
    Client(#[source] io::Error),
    #[error("the task broke off")]
    Task(#[source] io::Error),
    #[error("nothing came through the tunnel for {0:?}")]
    Silent(Duration),
    #[error("the proxy stops, and the tunnel did not end in time")]
    Stopped,
}

impl End {
    const fn outcome(&self) -> Outcome {
        match self {
            Self::Over | Self::Silent(_) | Self::Stopped => Outcome::Answered,
            Self::Client(_) => Outcome::Abandoned,
            Self::Task(_) => Outcome::Failed,
        }
    }
}

/// How long a side may be silent after the other has ended what it says: it has had the last word, and is most likely gone.
const HALF_WAIT: Duration = Duration::from_secs(30);

/// How long each side is given to take the end of a tunnel that the proxy ends itself.
const CLOSE_WAIT: Duration = Duration::from_millis(200);

impl Tunnel {
    pub(crate) const fn new(
        worker: Rc<Worker>,
        task: OnUpgrade,
        exchange: Exchange,
        permit: Permit,
    ) -> Self {
        Self { worker, task, exchange, permit }
    }

    /// Carries bytes both ways until it ends. `ahead` came from the client behind its request.
    pub(crate) async fn run(
        self,
        mut client: impl AsyncRead + AsyncWrite + Unpin,
        ahead: Bytes,
        stop: &CancellationToken,
    ) {
        let Self { worker, task, mut exchange, permit: _permit } = self;
        let task = match task.await {
            Ok(task) => task,
            Err(error) => {
                debug!(%error, "A task broke off as it switched protocols");
                return exchange.ends(Outcome::Failed);
            }
        };
        let parts = task.downcast::<TokioIo<Io>>().expect("it is a connection to a task");
        let mut task = parts.io.into_inner();
        // A machine that has vanished would otherwise be noticed by nobody as long as the client talks.
        if let Err(error) = task.keep_alive(worker.setup().config.timeouts.stall) {
            debug!(%error, "A tunnel's task may vanish unnoticed");
        }
        let _open = Open::new(&worker);
        let limit = worker.setup().config.timeouts.tunnel;
        let flow = Flow::new(ahead, parts.read_buf);
        let carrying = flow.carry(&mut client, &mut task, limit, |up, down| {
            worker.counters.add(Count::TunnelBytesUp, up);
            worker.counters.add(Count::TunnelBytesDown, down);
            exchange.hands_on(down);
        });
        let end = tokio::select! {
            end = carrying => end,
            () = last_moment(&worker, stop) => End::Stopped,
        };
        debug!(error = &end as &dyn Error, "A tunnel has ended");
        match end {
            End::Silent(_) => worker.counters.count(Count::TunnelsSilent),
            End::Stopped => worker.counters.count(Count::TunnelsCut),
            End::Over | End::Client(_) | End::Task(_) => {}
        }
        if !matches!(end, End::Over) {
            exchange.ends_since(&end);
            let closing = async { tokio::join!(client.shutdown(), task.shutdown()) };
            // Whoever does not take it sees the connection close.
            drop(timeout(CLOSE_WAIT, closing).await);
        }
        exchange.ends(end.outcome());
    }
}

/// Waits until the proxy stops, and then for most of the time that what is under way is given: the rest is to say goodbye in.
async fn last_moment(worker: &Worker, stop: &CancellationToken) {
    stop.cancelled().await;
    let grace = worker.setup().config.timeouts.grace;
    sleep(grace - grace / 10).await;
}

/// A tunnel that is open, for as long as this lives.
struct Open<'a>(&'a Worker);

impl<'a> Open<'a> {
    fn new(worker: &'a Worker) -> Self {
        worker.counters.count(Count::TunnelsOpened);
        Self(worker)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.counters.count(Count::TunnelsClosed);
    }
}

/// Bytes on their way, up from the client to the task and down again.
struct Flow {
    up: Way,
    down: Way,
}

/// Bytes that go one way.
struct Way {
    /// What was read and not yet taken.
    left: Bytes,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Flowing,
    /// There is something to be flushed before more is waited for.
    Unflushed,
    /// Whoever sends has said all.
    Ending,
    /// Whoever takes has heard so, or takes nothing any more.
    Over,
}

/// Which side broke off.
enum Fault {
    Sender(io::Error),
    Taker,
}

/// What is read at a time.
const PIECE_BYTES: usize = 16 << 10;

impl Flow {
    /// Begins with what came behind the heads.
    fn new(up: Bytes, down: Bytes) -> Self {
        let way = |left| Way { left, state: State::Unflushed };
        Self { up: way(up), down: way(down) }
    }

    /// Carries bytes until the tunnel has ended, or nothing has come through for as long as `limit`. `took` is told how much went up and
    /// how much down.
    async fn carry(
        mut self,
        client: &mut (impl AsyncRead + AsyncWrite + Unpin),
        task: &mut (impl AsyncRead + AsyncWrite + Unpin),
        limit: Duration,
        mut took: impl FnMut(u64, u64),
    ) -> End {
        let mut moved = Instant::now();
        let mut quiet = pin!(sleep_until(moved + limit));
        poll_fn(|context| {
            let polled = self.poll(context, client, task, |up, down| {
                moved = Instant::now();
                took(up, down);
            });
            if polled.is_ready() {
                return polled;
            }
            let limit = if self.is_half() { limit.min(HALF_WAIT) } else { limit };
            if moved + limit < quiet.deadline() {
                quiet.as_mut().reset(moved + limit);
            }
            // The timer is set anew when it has run out, so that a piece costs no more than a look at the clock.
            loop {
                ready!(quiet.as_mut().poll(context));
                if moved + limit <= Instant::now() {
                    return Poll::Ready(End::Silent(limit));
                }
                quiet.as_mut().reset(moved + limit);
            }
        })
        .await
    }

    /// Says whether one side has ended what it says.
    const fn is_half(&self) -> bool {
        matches!(self.up.state, State::Over) || matches!(self.down.state, State::Over)
    }

    /// Carries what there is, and tells how much went up and down; ready when the tunnel has ended.
    fn poll(
        &mut self,
        context: &mut Context<'_>,
        client: &mut (impl AsyncRead + AsyncWrite + Unpin),
        task: &mut (impl AsyncRead + AsyncWrite + Unpin),
        mut took: impl FnMut(u64, u64),
    ) -> Poll<End> {
        let up = self.up.poll(context, client, task, |bytes| took(bytes, 0));
        if let Poll::Ready(Err(error)) = up {
            return Poll::Ready(End::Client(error));
        }
        let down = self.down.poll(context, task, client, |bytes| took(0, bytes));
        if let Poll::Ready(Err(error)) = down {
            return Poll::Ready(End::Task(error));
        }
        if up.is_ready() && down.is_ready() { Poll::Ready(End::Over) } else { Poll::Pending }
    }
}

impl Way {
    /// Carries what there is; ready when no more will go this way. Who takes no more may still have something to say, so that alone is
    /// no error: whether it is gone shows when it is read from.
    fn poll(
        &mut self,
        context: &mut Context<'_>,
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
        took: impl FnMut(u64),
    ) -> Poll<io::Result<()>> {
        match ready!(self.poll_on(context, from, to, took)) {
            Ok(()) | Err(Fault::Taker) => {
                self.state = State::Over;
                Poll::Ready(Ok(()))
            }
            Err(Fault::Sender(error)) => Poll::Ready(Err(error)),
        }
    }

    fn poll_on(
        &mut self,
        context: &mut Context<'_>,
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
        mut took: impl FnMut(u64),
    ) -> Poll<Result<(), Fault>> {
        let mut room = [const { MaybeUninit::uninit() }; PIECE_BYTES];
        loop {
            while !self.left.is_empty() {
                let taken = ready!(write(context, to, &self.left))?;
                took(taken as u64);
                self.left.advance(taken);
            }
            // Though empty it may keep a parser's whole buffer alive.
            self.left = Bytes::new();
            match self.state {
                State::Over => return Poll::Ready(Ok(())),
                State::Ending => {
                    return Pin::new(to).poll_shutdown(context).map_err(|_| Fault::Taker);
                }
                State::Flowing | State::Unflushed => {}
            }
            let mut piece = ReadBuf::uninit(&mut room);
            let read = Pin::new(&mut *from).poll_read(context, &mut piece);
            match read.map_err(Fault::Sender)? {
                Poll::Ready(()) if piece.filled().is_empty() => self.state = State::Ending,
                Poll::Ready(()) => {
                    let mut rest = piece.filled();
                    self.state = State::Unflushed;
                    if let Poll::Ready(taken) = write(context, to, rest)? {
                        took(taken as u64);
                        rest = &rest[taken..];
                    }
                    self.left = Bytes::copy_from_slice(rest);
                }
                Poll::Pending => {
                    if self.state == State::Unflushed {
                        ready!(Pin::new(&mut *to).poll_flush(context)).map_err(|_| Fault::Taker)?;
                        self.state = State::Flowing;
                    }
                    return Poll::Pending;
                }
            }
        }
    }
}

fn write(
    context: &mut Context<'_>,
    to: &mut (impl AsyncWrite + Unpin),
    bytes: &[u8],
) -> Poll<Result<usize, Fault>> {
    match ready!(Pin::new(to).poll_write(context, bytes)) {
        Ok(taken) if taken > 0 => Poll::Ready(Ok(taken)),
        _ => Poll::Ready(Err(Fault::Taker)),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, DuplexStream, duplex};
    use tokio::task::JoinHandle;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(300);

    /// The far ends of a tunnel, and how it ends. Each side has room for little.
    fn tunnel() -> (DuplexStream, DuplexStream, JoinHandle<(End, u64, u64)>) {
        let ((client, mut near_client), (task, mut near_task)) = (duplex(8), duplex(8));
        let carrying = tokio::spawn(async move {
            let (mut up, mut down) = (0, 0);
            let flow = Flow::new(Bytes::from_static(b"ahead "), Bytes::new());
            let end = flow.carry(&mut near_client, &mut near_task, LIMIT, |more, less| {
                (up, down) = (up + more, down + less);
            });
            let end = end.await;
            (end, up, down)
        });
        (client, task, carrying)
    }

    async fn read(stream: &mut DuplexStream) -> String {
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test(start_paused = true)]
    async fn what_came_ahead_goes_first_and_each_side_may_end_first() {
        let (mut client, mut task, carrying) = tunnel();
        let asking = tokio::spawn(async move {
            client.write_all(b"this is more than there is room for").await.unwrap();
            client.shutdown().await.unwrap();
            read(&mut client).await
        });
        assert_eq!(read(&mut task).await, "ahead this is more than there is room for");
        task.write_all(b"so is this here").await.unwrap();
        task.shutdown().await.unwrap();
        assert_eq!(asking.await.unwrap(), "so is this here");
        assert!(matches!(carrying.await.unwrap(), (End::Over, 41, 15)));
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends_it_and_sooner_when_one_side_has_ended() {
        let (mut client, mut task, carrying) = tunnel();
        let began = Instant::now();
        sleep(LIMIT - Duration::from_secs(1)).await;
        client.write_all(b"x").await.unwrap();
        let mut got = [0; 7];
        task.read_exact(&mut got).await.unwrap();
        assert!(matches!(carrying.await.unwrap(), (End::Silent(LIMIT), 7, 0)));
        let lasted = began.elapsed();
        assert!(lasted >= 2 * LIMIT - Duration::from_secs(1) && lasted < 2 * LIMIT, "{lasted:?}");

        let (client, mut task, carrying) = tunnel();
        task.shutdown().await.unwrap();
        let began = Instant::now();
        assert!(matches!(carrying.await.unwrap(), (End::Silent(HALF_WAIT), 6, 0)));
        assert!(began.elapsed() < LIMIT);
        drop((client, task));
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_side_said_before_it_left_arrives() {
        let (mut client, mut task, carrying) = tunnel();
        task.write_all(b"goodbye").await.unwrap();
        drop(task);
        assert_eq!(read(&mut client).await, "goodbye");
        // Nobody takes what the client says.
        assert!(matches!(carrying.await.unwrap(), (End::Over, _, 7)));
    }
}
