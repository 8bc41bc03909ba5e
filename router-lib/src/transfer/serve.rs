//! The side that has the slice: answers pulls, on the listener where peers watch.
//!
//! Every pull is held against what the slicelet knows: whether there is such a hand-off from this very process to the one that
//! asks, and in which step. The application's export runs on a thread of its own and writes into a bounded window, from
//! which the connection sends. A connection that breaks leaves both as they are, for a while.

use std::collections::BTreeMap;
use std::future::pending;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::stream::{self, Stream, StreamExt};
use mandoline_core::assignment::{Assigned, Assignment};
use mandoline_core::generation::Generation;
use mandoline_core::name::JobName;
use mandoline_core::slice::Slice;
use mandoline_core::transit::{HandOffId, Step};
use mandoline_proto::pb;
use mandoline_proto::pb::transfers_server::{Transfers, TransfersServer};
use mandoline_proto::transfer::{Ask, End, Party, Pass, Pull, Refusal, RefusalCode, Say, Wanted};
use tokio::sync::{Notify, OwnedMutexGuard, OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::{Request, Response, Status, Streaming};

use crate::transfer::window::{Piece, Reader, Sink, Window};
use crate::transfer::{BULK_MAX, HandOff, LAST_MAX, Limits, Moved, State};

/// What the slicelet knows of slices that are about to leave this task.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outgoing {
    /// This task; nothing while it has no session.
    pub me: Option<Party>,
    /// The newest assignment that is taken in here: hand-offs that began later may be asked for before they are known.
    pub known: Generation,
    /// Hand-offs that lead away from here.
    pub hand_offs: BTreeMap<HandOffId, Leaving>,
}

/// A slice that is about to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaving {
    /// Which keys.
    pub slice: Slice,
    /// Who will serve it.
    pub to: Party,
    /// Which pass it is time for: the last one once no guard of the slice is left and none will be given.
    pub due: Pass,
}

impl Outgoing {
    /// Finds in an assignment what is about to leave `me`. Of a slice that is being released, `is_quiet` says whether its last guard
    /// is gone.
    pub fn of(assignment: &Assignment, me: Party, is_quiet: impl Fn(HandOffId) -> bool) -> Self {
        let leaving = |(slice, assigned): (Slice, &Assigned)| {
            let transit = assigned.transit.as_deref()?;
            let is_mine = transit.from == Some(me.session);
            let to = assignment.tasks.get(&transit.to).filter(|_| is_mine)?;
            let to = Party { session: to.session, incarnation: to.info.incarnation };
            let is_last = transit.step == Step::Releasing && is_quiet(transit.id);
            let due = if is_last { Pass::Last } else { Pass::Bulk };
            Some((transit.id, Leaving { slice, to, due }))
        };
        let hand_offs = assignment.slices.iter().filter_map(leaving).collect();
        Self { me: Some(me), known: assignment.generation, hand_offs }
    }
}

/// Answers those who pull the state of slices that leave this task.
#[derive(Clone)]
pub struct Exports {
    shared: Arc<Shared>,
}

struct Shared {
    job: JobName,
    state: Option<Arc<dyn State>>,
    outgoing: watch::Receiver<Outgoing>,
    limits: Limits,
    slots: Mutex<BTreeMap<HandOffId, Slot>>,
    // A slot has changed in a way that `sent` waits for.
    progress: Notify,
    bulk: Arc<Semaphore>,
    last: Arc<Semaphore>,
}

/// What is known of a hand-off that was pulled.
struct Slot {
    hand_off: HandOff,
    // One call to the application at a time.
    turn: Arc<tokio::sync::Mutex<()>>,
    running: Option<Running>,
    // The bulk pass that the other side has.
    bulk: Option<u32>,
    last: Option<Result<Moved, Refusal>>,
}

struct Running {
    wanted: Wanted,
    attempt: u32,
    resumed: u32,
    window: Arc<Window>,
}

/// Why the last pass was not sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotSent {
    /// The bulk pass has not arrived at the other side, so there is nothing to add to: no last pass will come.
    #[error("the bulk pass of hand-off {0} has not arrived, so no last pass is sent")]
    NoBulk(HandOffId),
    /// It is over.
    #[error("hand-off {0} is over")]
    Over(HandOffId),
    /// The export failed, or the other side stayed away.
    #[error("the last pass of hand-off {0} was not sent")]
    Failed(HandOffId, #[source] Refusal),
}

impl Exports {
    /// Answers by what `outgoing` says at the time. Without a `state` every pull is refused.
    pub fn new(
        job: JobName,
        state: Option<Arc<dyn State>>,
        outgoing: watch::Receiver<Outgoing>,
    ) -> Self {
        Self::with_limits(job, state, outgoing, Limits::default())
    }

    /// The same with other limits.
    pub fn with_limits(
        job: JobName,
        state: Option<Arc<dyn State>>,
        outgoing: watch::Receiver<Outgoing>,
        limits: Limits,
    ) -> Self {
        let (slots, progress) = (Mutex::default(), Notify::new());
        let [bulk, last] = [BULK_MAX, LAST_MAX].map(|max| Arc::new(Semaphore::new(max)));
        let shared = Shared { job, state, outgoing, limits, slots, progress, bulk, last };
        Self { shared: Arc::new(shared) }
    }

    /// Gives the service to serve beside the watch.
    pub fn service(&self) -> TransfersServer<Self> {
        TransfersServer::new(self.clone())
    }

    /// Waits until the other side has the last pass and has taken it in, or will not: then the slice may be acknowledged. Ends
    /// at once where the bulk pass has not arrived. Waits for as long as the hand-off goes on: give it a deadline.
    pub async fn sent(&self, id: HandOffId) -> Result<Moved, NotSent> {
        let mut outgoing = self.shared.outgoing.clone();
        loop {
            let progress = self.shared.progress.notified();
            tokio::pin!(progress);
            progress.as_mut().enable();
            if !outgoing.borrow_and_update().hand_offs.contains_key(&id) {
                return Err(NotSent::Over(id));
            }
            let (bulk, last) = {
                let slots = self.shared.lock();
                slots.get(&id).map_or((None, None), |slot| (slot.bulk, slot.last.clone()))
            };
            match (bulk, last) {
                (_, Some(last)) => return last.map_err(|refusal| NotSent::Failed(id, refusal)),
                (None, None) => return Err(NotSent::NoBulk(id)),
                (Some(_), None) => {}
            }
            tokio::select! {
                () = progress => {}
                changed = outgoing.changed() => {
                    changed.map_err(|_| NotSent::Over(id))?;
                }
            }
        }
    }

    /// Ends the exports of hand-offs that are over, and tells the application. Runs until the slicelet is gone: whoever serves
    /// [`Exports::service`] runs this beside it.
    pub async fn clear(&self) {
        let mut outgoing = self.shared.outgoing.clone();
        let mut told = JoinSet::new();
        loop {
            let gone = outgoing.changed().await.is_err();
            for slot in self.shared.over(gone) {
                if let (Some(state), turn) = (self.shared.state.clone(), slot.turn) {
                    told.spawn_blocking(move || {
                        let _turn = turn.blocking_lock();
                        state.exported(&slot.hand_off);
                    });
                }
            }
            while let Some(told) = told.try_join_next() {
                if let Err(error) = told {
                    tracing::error!(%error, "the application's `exported` failed");
                }
            }
            if gone {
                // An application that blocks must not hold the slicelet up.
                told.detach_all();
                return;
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<HandOffId, Slot>> {
        // Each change is whole before anything in it could panic.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes out what is over, or all.
    fn over(&self, all: bool) -> Vec<Slot> {
        let mut slots = self.lock();
        let live = self.outgoing.borrow();
        let over = slots.extract_if(.., |id, _| all || !live.hand_offs.contains_key(id));
        let over: Vec<Slot> = over.map(|(_, slot)| slot).collect();
        drop(live);
        drop(slots);
        for running in over.iter().filter_map(|slot| slot.running.as_ref()) {
            running.window.close(RefusalCode::Over, "the hand-off is over");
        }
        over
    }

    /// Begins to answer, or says why not.
    async fn begin(
        self: &Arc<Self>,
        pull: &Pull,
        requests: Streaming<pb::PullRequest>,
    ) -> Result<Connection, Refusal> {
        let Some(state) = &self.state else {
            return Err(refusal(RefusalCode::NoExporter, "this task exports nothing"));
        };
        let hand_off = self.due(pull).await?;
        let reader = match self.resume(pull)? {
            Some(reader) => reader,
            None => self.start(pull, hand_off, Arc::clone(state)).await?,
        };
        Ok(Connection {
            shared: Arc::clone(self),
            outgoing: self.outgoing.clone(),
            requests,
            pull: pull.clone(),
            reader,
            phase: Phase::Beginning,
        })
    }

    /// Waits until it is time for what is asked for.
    async fn due(&self, pull: &Pull) -> Result<HandOff, Refusal> {
        let mut outgoing = self.outgoing.clone();
        let due = async {
            loop {
                if let Some(hand_off) = self.standing(pull, &outgoing.borrow_and_update())? {
                    return Ok(hand_off);
                }
                if outgoing.changed().await.is_err() {
                    return Err(refusal(RefusalCode::Over, "this task is stopping"));
                }
            }
        };
        timeout(self.limits.due_within, due).await.unwrap_or_else(|_| {
            let why = format!("it is not time for the {} pass yet", pull.wanted.pass());
            Err(refusal(RefusalCode::NotDue, why))
        })
    }

    /// Holds a pull against what is known right now. Nothing: it is too early.
    fn standing(&self, pull: &Pull, outgoing: &Outgoing) -> Result<Option<HandOff>, Refusal> {
        let id = pull.hand_off;
        let is_meant = pull.job == self.job && outgoing.me == Some(pull.server);
        if !is_meant {
            let me = outgoing.me.map_or_else(|| "no session".to_owned(), |me| me.to_string());
            let why = format!("{} of job {} was meant, and this is {me}", pull.server, pull.job);
            return Err(refusal(RefusalCode::WrongServer, why));
        }
        let Some(leaving) = outgoing.hand_offs.get(&id) else {
            return if id.began > outgoing.known {
                Ok(None)
            } else {
                Err(refusal(RefusalCode::Over, format!("hand-off {id} is over")))
            };
        };
        if leaving.to != pull.puller {
            let why = format!("hand-off {id} leads to {}, and not to {}", leaving.to, pull.puller);
            return Err(refusal(RefusalCode::NotThePeer, why));
        }
        match (pull.wanted.pass(), leaving.due) {
            (Pass::Bulk, Pass::Bulk) | (Pass::Last, Pass::Last) => {
                Ok(Some(HandOff { id, slice: leaving.slice }))
            }
            (Pass::Last, Pass::Bulk) => Ok(None),
            (Pass::Bulk, Pass::Last) => {
                Err(refusal(RefusalCode::Over, format!("the bulk pass of hand-off {id} is over")))
            }
        }
    }

    /// Goes on where a connection broke. Nothing: this attempt has not begun.
    fn resume(&self, pull: &Pull) -> Result<Option<Reader>, Refusal> {
        let mut slots = self.lock();
        let mut slot = slots.get_mut(&pull.hand_off);
        if let Some(slot) = &slot {
            slot.check(pull)?;
        }
        let running = slot.as_mut().and_then(|slot| slot.running.as_mut());
        let known = running.filter(|running| running.attempt == pull.attempt);
        if known.is_none() && pull.offset == 0 {
            return Ok(None);
        }
        let reader = known.and_then(|running| {
            running.resumed += 1;
            running.window.read_from(pull.offset)
        });
        reader.map(Some).ok_or_else(|| {
            let why = format!("what stands at byte {} is not there any more", pull.offset);
            refusal(RefusalCode::CannotResume, why)
        })
    }

    /// Begins an export, once the one before has ended and it is this one's turn.
    async fn start(
        self: &Arc<Self>,
        pull: &Pull,
        hand_off: HandOff,
        state: Arc<dyn State>,
    ) -> Result<Reader, Refusal> {
        let (turn, permit) = self.turn(pull, hand_off).await?;
        let mut slots = self.lock();
        // Much may have happened while this waited.
        let slot = self.slot(&mut slots, pull, hand_off)?;
        let window = Window::new(self.limits);
        let (wanted, attempt) = (pull.wanted, pull.attempt);
        slot.running = Some(Running { wanted, attempt, resumed: 0, window: Arc::clone(&window) });
        match wanted {
            // Whatever the other side had is of no use once changes are noted anew.
            Wanted::Bulk => (slot.bulk, slot.last) = (None, None),
            Wanted::Last { .. } => slot.last = None,
        }
        drop(slots);
        tracing::debug!(%hand_off, pass = %wanted.pass(), attempt, to = %pull.puller, "Export began");
        let reader = window.read_from(0).expect("a new window begins at 0");
        // Its handle is let go: the window says how it ends, and an application that never returns is left behind.
        drop(tokio::task::spawn_blocking(move || {
            let mut sink = Sink::new(window);
            let result = state.export(&hand_off, wanted.pass(), &mut sink);
            sink.finish(result);
            drop((turn, permit));
        }));
        Ok(reader)
    }

    /// Waits in line for the application: behind older calls for the same hand-off, and behind other hand-offs.
    async fn turn(
        &self,
        pull: &Pull,
        hand_off: HandOff,
    ) -> Result<(OwnedMutexGuard<()>, OwnedSemaphorePermit), Refusal> {
        let turn = {
            let mut slots = self.lock();
            let slot = self.slot(&mut slots, pull, hand_off)?;
            if let Some(older) = slot.running.take_if(|running| running.attempt < pull.attempt) {
                let why = "a newer pull of this hand-off has taken over";
                older.window.close(RefusalCode::Superseded, why);
            }
            Arc::clone(&slot.turn)
        };
        let line = match pull.wanted.pass() {
            Pass::Bulk => Arc::clone(&self.bulk),
            Pass::Last => Arc::clone(&self.last),
        };
        let both = async {
            let turn = turn.lock_owned().await;
            (turn, line.acquire_owned().await.expect("the semaphore is never closed"))
        };
        timeout(self.limits.stall, both).await.map_err(|_| {
            let why = "other exports keep this one waiting: they take too long, or never return";
            refusal(RefusalCode::ExportStalled, why)
        })
    }

    /// Finds the place of a hand-off that goes on, or makes it: under one lock, so that none is made after `over` has looked.
    fn slot<'a>(
        &self,
        slots: &'a mut BTreeMap<HandOffId, Slot>,
        pull: &Pull,
        hand_off: HandOff,
    ) -> Result<&'a mut Slot, Refusal> {
        self.standing(pull, &self.outgoing.borrow())?;
        let slot = slots.entry(hand_off.id).or_insert_with(|| Slot::new(hand_off));
        slot.check(pull)?;
        Ok(slot)
    }

    /// Notes what became of a pass.
    fn over_with(&self, pull: &Pull, outcome: Result<Moved, Refusal>) {
        let mut slots = self.lock();
        let Some(slot) = slots.get_mut(&pull.hand_off) else { return };
        let Some(running) = slot.running.as_ref().filter(|running| running.attempt == pull.attempt)
        else {
            return;
        };
        let outcome = outcome.map(|moved| Moved { resumed: running.resumed, ..moved });
        match (pull.wanted, outcome) {
            (Wanted::Bulk, Ok(_)) => slot.bulk = Some(pull.attempt),
            (Wanted::Bulk, Err(_)) => {}
            (Wanted::Last { .. }, outcome) => slot.last = Some(outcome),
        }
        drop(slots);
        self.progress.notify_waiters();
    }
}

impl Slot {
    fn new(hand_off: HandOff) -> Self {
        Self { hand_off, turn: Arc::default(), running: None, bulk: None, last: None }
    }

    /// Checks that a pull follows on what has been.
    fn check(&self, pull: &Pull) -> Result<(), Refusal> {
        if let Some(running) = &self.running {
            let is_older = running.attempt > pull.attempt;
            if is_older || (running.attempt == pull.attempt && running.wanted != pull.wanted) {
                let why = format!("attempt {} is newer than {}", running.attempt, pull.attempt);
                return Err(refusal(RefusalCode::Superseded, why));
            }
        }
        match pull.wanted {
            Wanted::Last { after } if self.bulk != Some(after) => {
                let why =
                    format!("bulk pass {after} of hand-off {} has not arrived", pull.hand_off);
                Err(refusal(RefusalCode::NoBulk, why))
            }
            Wanted::Bulk | Wanted::Last { .. } => Ok(()),
        }
    }
}

/// One connection that pulls. Dropped when the connection breaks, which leaves the window for another one.
struct Connection {
    shared: Arc<Shared>,
    outgoing: watch::Receiver<Outgoing>,
    requests: Streaming<pb::PullRequest>,
    pull: Pull,
    reader: Reader,
    phase: Phase,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Beginning,
    Sending,
    // All is sent; the other side has to say that it is taken in.
    Sent { bytes: u64 },
    Over,
}

enum Heard {
    Ask(Result<Option<pb::PullRequest>, Status>),
    Piece(Result<Piece, Refusal>),
    Outgoing(bool),
}

impl Connection {
    /// Says the next thing; nothing at the end.
    async fn next(&mut self) -> Option<Result<pb::PullReply, Status>> {
        if self.phase == Phase::Beginning {
            self.phase = Phase::Sending;
            let server = self.pull.server;
            return Some(Ok(Say::Begun { server, offset: self.reader.at() }.into()));
        }
        while self.phase != Phase::Over {
            let is_sending = self.phase == Phase::Sending;
            let piece =
                async { if is_sending { self.reader.next().await } else { pending().await } };
            let heard = tokio::select! {
                biased;
                ask = self.requests.message() => Heard::Ask(ask),
                changed = self.outgoing.changed() => Heard::Outgoing(changed.is_ok()),
                piece = piece => Heard::Piece(piece),
            };
            let said = match heard {
                Heard::Ask(Ok(Some(request))) => match Ask::try_from(request) {
                    Ok(ask) => self.ask(&ask),
                    Err(error) => Err(Status::invalid_argument(error.to_string())),
                },
                // It has left, and may come back.
                Heard::Ask(Ok(None) | Err(_)) => return None,
                Heard::Piece(piece) => Ok(Some(self.piece(piece))),
                Heard::Outgoing(is_there) => Ok(self.look(is_there).map(|no| self.end(no))),
            };
            match said {
                Ok(Some(say)) => return Some(Ok(say.into())),
                Ok(None) => {}
                Err(status) => {
                    self.phase = Phase::Over;
                    return Some(Err(status));
                }
            }
        }
        None
    }

    fn ask(&mut self, ask: &Ask) -> Result<Option<Say>, Status> {
        match (ask, self.phase) {
            (Ask::Taken(taken), _) if *taken <= self.reader.at() => {
                self.reader.acknowledge(*taken);
                Ok(None)
            }
            (Ask::Imported, Phase::Sent { bytes }) => {
                self.reader.acknowledge(bytes);
                self.shared.over_with(&self.pull, Ok(Moved { bytes, resumed: 0 }));
                self.phase = Phase::Over;
                Ok(None)
            }
            (Ask::Taken(_) | Ask::Imported, _) => {
                Err(Status::invalid_argument("that was not sent yet"))
            }
            (Ask::Pull(_), _) => Err(Status::invalid_argument("one pull a stream")),
        }
    }

    fn piece(&mut self, piece: Result<Piece, Refusal>) -> Say {
        match piece {
            Ok(Piece::Chunk(bytes)) => {
                Say::Chunk { offset: self.reader.at() - bytes.len() as u64, bytes }
            }
            Ok(Piece::End { length, checksum }) => {
                self.phase = Phase::Sent { bytes: length };
                let (hand_off, pass) = (self.pull.hand_off, self.pull.wanted.pass());
                Say::End(End { hand_off, pass, length, checksum })
            }
            Err(refusal) => self.end(refusal),
        }
    }

    /// Looks whether the hand-off goes on.
    fn look(&self, is_there: bool) -> Option<Refusal> {
        if !is_there {
            return Some(refusal(RefusalCode::Over, "this task is stopping"));
        }
        self.shared.standing(&self.pull, &self.outgoing.borrow()).err()
    }

    fn end(&mut self, refusal: Refusal) -> Say {
        self.phase = Phase::Over;
        if refusal.code != RefusalCode::Superseded {
            tracing::warn!(hand_off = %self.pull.hand_off, pass = %self.pull.wanted.pass(), %refusal, "Export ended early");
            self.reader.close(&refusal);
            self.shared.over_with(&self.pull, Err(refusal.clone()));
        }
        Say::Refused(refusal)
    }
}

fn refusal(code: RefusalCode, message: impl Into<String>) -> Refusal {
    Refusal { code, message: message.into() }
}

#[tonic::async_trait]
impl Transfers for Exports {
    type PullStream = Pin<Box<dyn Stream<Item = Result<pb::PullReply, Status>> + Send>>;

    async fn pull(
        &self,
        request: Request<Streaming<pb::PullRequest>>,
    ) -> Result<Response<Self::PullStream>, Status> {
        let mut requests = request.into_inner();
        let first = timeout(self.shared.limits.stall, requests.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no pull came"))??;
        let first = first.ok_or_else(|| Status::invalid_argument("the stream was empty"))?;
        let pull = match Ask::try_from(first) {
            Ok(Ask::Pull(pull)) => pull,
            Ok(_) => return Err(Status::invalid_argument("a stream begins with a pull")),
            Err(error) => return Err(Status::invalid_argument(error.to_string())),
        };
        let replies: Self::PullStream = match self.shared.begin(&pull, requests).await {
            Ok(connection) => Box::pin(stream::unfold(connection, |mut connection| async {
                connection.next().await.map(|said| (said, connection))
            })),
            Err(refusal) => {
                tracing::debug!(hand_off = %pull.hand_off, from = %pull.puller, %refusal, "Pull refused");
                Box::pin(stream::iter([Ok(Say::Refused(refusal).into())]).boxed())
            }
        };
        Ok(Response::new(replies))
    }
}
