//! Requests that are held: by a pause, which an operator began, or while the slice of their key is on its way to another task.
//!
//! Both wait here instead of failing, in lines that work alike. What they wait for wakes the line: an assignment, or a pause's
//! end. It then lets them go in the order in which they came, at the pace of a ramp (`mandoline_core::ramp`), so that whoever
//! serves them is not buried under all that came meanwhile; and who that is, is looked up afresh.
//!
//! What is held is bounded in number and bytes, by each pause and in all, and each request in time; past a bound it is answered
//! 503. A request whose client leaves is forgotten at once. hyper drops it where the body has been read to its end; so the body
//! is read on meanwhile as far as there is room, and `wire::Presence` tells where it is longer.

pub(crate) mod room;
pub(crate) mod line;
pub(crate) mod book;
pub(crate) mod queue;
pub(crate) mod settling;
pub(crate) mod flights;
pub(crate) mod ends;
pub(crate) mod gates;
pub(crate) mod grpc;

use std::future::pending;
use std::time::Duration;

use http::request::Parts;
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};

use crate::hold::book::End;
use crate::hold::line::{Line, Turn};
use crate::hold::queue::{Queue, Stay};
use crate::hold::room::Full;
use crate::hold::settling::Settling;
use crate::refusal::Refusal;
use crate::upload::{Gathered, Tape};
use crate::wire::Presence;

/// A request that may have to wait, and what can end its wait.
pub(crate) struct Waiter<'a> {
    pub(crate) head: &'a Parts,
    pub(crate) tape: &'a Tape,
    pub(crate) presence: &'a Presence,
    pub(crate) stays: &'a mut Stays,
    /// Whether the client waits for leave to send its body, which the task gives.
    pub(crate) waits_for_leave: bool,
}

/// What a request's waits have come to so far.
#[derive(Default)]
pub(crate) struct Stays {
    // Its place among all of the worker, once it has waited.
    place: Option<u64>,
    /// For how long it has waited in all.
    pub(crate) held: Duration,
    // When it has waited for slices for as long as it may.
    settled_by: Option<Instant>,
    /// When the client itself gives up, if it says so; known once it has waited.
    pub(crate) deadline: Option<Instant>,
}

/// Why a wait ended though it was not the request's turn, or not to go on.
pub(crate) enum Ended {
    /// It did not begin: there was no room.
    Full(Full),
    /// It has waited for as long as it may.
    Late,
    /// What it waited for is not to be.
    Failed,
    /// The client left, gave up, or broke off.
    ByClient(Refusal),
}

/// A request as far as the slice of its key is concerned. Whatever that meets, it is held for so long in all.
pub(crate) struct Held<'a> {
    settling: &'a Settling,
    key: SliceKey,
    waiter: Waiter<'a>,
}

impl<'a> Held<'a> {
    pub(crate) const fn new(settling: &'a Settling, key: SliceKey, waiter: Waiter<'a>) -> Self {
        Self { settling, key, waiter }
    }

    /// Says for how long it has been held in all, for pauses too.
    pub(crate) const fn so_far(&self) -> Duration {
        self.waiter.stays.held
    }

    /// Lets a request pass unless others with its key are held: then it waits behind them. Says whether it did.
    pub(crate) async fn in_turn(&mut self) -> Result<bool, Refusal> {
        let Some(told) = self.settling.last(self.key) else { return Ok(false) };
        self.settled(told).await?;
        Ok(true)
    }

    /// Holds the request until there is an assignment newer than `told` by which the slice of its key has settled.
    pub(crate) async fn settled(&mut self, told: Generation) -> Result<(), Refusal> {
        let Self { settling, key, waiter } = self;
        let latest = || Instant::now() + settling.wait_max;
        let until = *waiter.stays.settled_by.get_or_insert_with(latest);
        // What the task goes by exists, so the clerk's source should have it soon.
        settling.clerk.refresh(told);
        let join = |line: &mut Line<_>, place| line.join(place, *key, told);
        let waited = waiter.wait(&settling.queue, until, join).await;
        waited.map_err(|ended| match ended {
            Ended::Full(_) => Refusal::HeldFull,
            Ended::Late | Ended::Failed => Refusal::HeldLong,
            Ended::ByClient(refusal) => refusal,
        })
    }
}

impl Waiter<'_> {
    /// Waits in a queue until it is this request's turn.
    pub(crate) async fn wait<F>(
        &mut self,
        queue: &Queue<F>,
        until: Instant,
        join: impl FnOnce(&mut Line<F>, u64) -> oneshot::Receiver<Turn>,
    ) -> Result<(), Ended> {
        let since = Instant::now();
        let ended = self.wait_in(queue, until, join).await;
        self.stays.held += since.elapsed();
        ended
    }

    async fn wait_in<F>(
        &mut self,
        queue: &Queue<F>,
        until: Instant,
        join: impl FnOnce(&mut Line<F>, u64) -> oneshot::Receiver<Turn>,
    ) -> Result<(), Ended> {
        let bytes = head_bytes(self.head) + self.tape.kept_bytes();
        if self.stays.place.is_none() {
            let patience = grpc::patience(&self.head.headers);
            self.stays.deadline = patience.and_then(|length| Instant::now().checked_add(length));
        }
        let deadline = self.stays.deadline;
        let (mut stay, turn) =
            queue.enter(&mut self.stays.place, bytes, join).map_err(Ended::Full)?;
        let is_clients = deadline.is_some_and(|deadline| deadline <= until);
        let end = deadline.filter(|_| is_clients).unwrap_or(until);
        tokio::select! {
            biased;
            turn = turn => match turn {
                // The sender is gone only when the line is, with the worker.
                Ok(Turn::Go) | Err(_) => {
                    stay.end = End::Released;
                    Ok(())
                }
                Ok(Turn::Fail) => {
                    stay.end = End::Failed;
                    Err(Ended::Failed)
                }
            },
            refusal = self.left(&stay) => Err(Ended::ByClient(refusal)),
            () = sleep_until(end) => {
                stay.end = End::Late;
                Err(if is_clients { Ended::ByClient(Refusal::Deadline) } else { Ended::Late })
            }
        }
    }

    /// Waits until the client has left where hyper does not notice, or sends what is no body.
    async fn left<F>(&self, stay: &Stay<'_, F>) -> Refusal {
        if !self.tape.is_coming() {
            self.presence.is_followed().await;
            self.presence.hung_up().await;
            return Refusal::Left;
        }
        let reads_on = async {
            if self.waits_for_leave {
                return pending().await;
            }
            match self.tape.gather(GATHER_MAX, |more| stay.grow(more)).await {
                Gathered::Enough | Gathered::Full => pending().await,
                Gathered::Gone => Refusal::Left,
                Gathered::Broken => self.tape.fault().expect("a body that is broken has a fault"),
            }
        };
        tokio::select! {
            refusal = reads_on => refusal,
            () = self.presence.hung_up() => Refusal::Left,
        }
    }
}

/// What a head takes, roughly: its texts, and its entries in the maps.
fn head_bytes(head: &Parts) -> usize {
    let target = head.uri.path_and_query().map_or(0, |target| target.as_str().len());
    let lines = head.headers.iter().map(|(name, value)| name.as_str().len() + value.len());
    target + lines.sum::<usize>() + head.headers.len() * HEADER_ENTRY_BYTES
}

/// An entry of `http`'s header map, and its place in the index.
const HEADER_ENTRY_BYTES: usize = 112;

/// How much of a body is read while its request is held, so that its end shows: or else the client's leave waits behind it, in a
/// kernel that has no room for it. Longer ones are seen to break off only if the client resets the connection.
const GATHER_MAX: usize = 1 << 20;
