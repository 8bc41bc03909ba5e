//! A request's way to a task that takes it: whom to ask, and after a refusal whom to ask next, within the caller's time.
//!
//! A task that refuses a request has done nothing, and says by which assignment it judged. That tells what to wait for: where it
//! knows more than the clerk, for the clerk to know as much; where it gives the slice away, for an assignment by which that is over;
//! and where it knows less, a moment, for it will hear what the clerk has heard. So nobody asks in a loop, and the new owner is found
//! as soon as anybody can know it.

use std::time::Duration;

use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::clerk::{Clerk, Held, NotMoved};
use crate::snapshot::{NoTask, Target};

/// How long a task that lags behind the clerk is given before it is asked again: at first, and at most. News reach tasks and callers
/// at the same moment, so the first pause does nearly always.
const PAUSE: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(320);

/// The tries of one request. In HTTP a task refuses with 421, or with 503 and `mandoline-transit`, and says in
/// `mandoline-generation` what it judged by; any other protocol needs the same two answers.
///
/// ```no_run
/// # use std::time::Duration;
/// # use mandoline::tries::Tries;
/// # use mandoline::{Clerk, Generation, SliceKey};
/// # enum Answer { Ok(String), NotMine(Generation), LettingGo(Generation) }
/// # async fn send(to: &str) -> std::io::Result<Answer> { unimplemented!() }
/// # async fn f(clerk: &Clerk) -> Result<String, Box<dyn std::error::Error>> {
/// let mut tries = Tries::new(clerk, SliceKey::of(b"user-42"), Duration::from_secs(5));
/// loop {
///     let target = tries.next().await?;
///     match send(target.address().as_str()).await? {
///         Answer::Ok(answer) => return Ok(answer),
///         Answer::NotMine(generation) => tries.not_owner(generation),
///         Answer::LettingGo(generation) => tries.in_transit(generation),
///     }
/// }
/// # }
/// ```
#[derive(Debug)]
pub struct Tries<'a> {
    clerk: &'a Clerk,
    key: SliceKey,
    began: Instant,
    deadline: Instant,
    // The assignment that the last task was chosen by.
    asked_by: Generation,
    refusal: Option<Refusal>,
    pause: Duration,
}

/// What a task said instead of taking a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It does not own the key, by this assignment.
    NotOwner(Generation),
    /// It is giving the key's slice away, by this assignment.
    InTransit(Generation),
    /// It was not reached, or broke off.
    Unreached,
}

/// Why there is nobody to ask any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GaveUp {
    /// The caller's time is over.
    #[error("no task took key {key} within {waited:?}; the last said {last:?}")]
    TimedOut {
        /// Which key.
        key: SliceKey,
        /// How long it was tried.
        waited: Duration,
        /// What the last task said.
        last: Refusal,
    },
    /// Nobody serves the key.
    #[error(transparent)]
    NoTask(#[from] NoTask),
}

impl<'a> Tries<'a> {
    /// Begins with a request that its caller waits for so long.
    pub fn new(clerk: &'a Clerk, key: SliceKey, patience: Duration) -> Self {
        let began = Instant::now();
        let (deadline, asked_by) = (began + patience, Generation::ZERO);
        Self { clerk, key, began, deadline, asked_by, refusal: None, pause: PAUSE }
    }

    /// Says whom to ask: at once the first time, and after a refusal as soon as there is reason to hope. Without a refusal in
    /// between it says who serves the key now. Needs a tokio runtime with time.
    pub async fn next(&mut self) -> Result<Target<Held>, GaveUp> {
        if let Some(refusal) = self.refusal.take()
            && !self.wait(refusal).await?
        {
            let (key, waited) = (self.key, self.began.elapsed());
            return Err(GaveUp::TimedOut { key, waited, last: refusal });
        }
        let target = self.clerk.route_at(self.key)?;
        if target.generation() > self.asked_by {
            self.pause = PAUSE;
        }
        self.asked_by = target.generation();
        Ok(target)
    }

    /// The task that was asked does not own the key, judging by generation `known`.
    pub const fn not_owner(&mut self, known: Generation) {
        self.refusal = Some(Refusal::NotOwner(known));
    }

    /// The task that was asked is giving the key's slice away, judging by generation `known`.
    pub const fn in_transit(&mut self, known: Generation) {
        self.refusal = Some(Refusal::InTransit(known));
    }

    /// The task that was asked refused the request.
    pub const fn refused(&mut self, refusal: Refusal) {
        self.refusal = Some(refusal);
    }

    /// The task that was asked was not reached: it may have gone, so that another will have the key, or may be back in a moment.
    pub const fn unreached(&mut self) {
        self.refusal = Some(Refusal::Unreached);
    }

    /// Waits until someone serves the key; no if nobody does in the caller's time. For those who would rather wait than hear of
    /// [`GaveUp::NoTask`].
    pub async fn anyone(&self) -> bool {
        let mut changes = self.clerk.changes();
        let comes = async {
            while self.clerk.route_at(self.key).is_err() {
                if changes.changed().await.is_err() {
                    return false;
                }
            }
            true
        };
        timeout_at(self.deadline, comes).await.unwrap_or(false)
    }

    /// Waits for what a refusal promises; no if it does not come in the caller's time.
    async fn wait(&mut self, refusal: Refusal) -> Result<bool, NoTask> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let known = match refusal {
            Refusal::NotOwner(known) | Refusal::InTransit(known) => known,
            Refusal::Unreached => {
                let pause = self.pause.min(left);
                self.pause = (2 * self.pause).min(PAUSE_MAX);
                let Generation { incarnation, number } = self.asked_by;
                let newer = Generation { incarnation, number: number + 1 };
                // Whatever comes first: news of the key, or another attempt at the same task.
                let _news = self.clerk.wait_for(newer, pause).await;
                return Ok(left > pause);
            }
        };
        if known < self.asked_by {
            let until = (Instant::now() + self.pause).min(self.deadline);
            self.pause = (2 * self.pause).min(PAUSE_MAX);
            sleep_until(until).await;
            return Ok(until < self.deadline);
        }
        if refusal == Refusal::NotOwner(known) && known > self.asked_by {
            return Ok(self.clerk.wait_for(known, left).await.is_ok());
        }
        // By this very assignment nobody takes it: what comes next decides.
        match self.clerk.wait_moved(self.key, known, left).await {
            Ok(_) => Ok(true),
            Err(NotMoved::TimedOut { .. }) => Ok(false),
            Err(NotMoved::NoTask(nobody)) => Err(nobody),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mandoline_core::assignment::{Assigned, Assignment, Replica, Replicas};
    use mandoline_core::slice_map::SliceMap;
    use mandoline_core::task::{SessionId, Task, TaskInfo};
    use mandoline_distributor::hub::Hub;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn generation(number: u64) -> Generation {
        Generation { incarnation: 1, number }
    }

    /// Task `owner` serves everything as of this generation.
    fn give(hub: &Hub, number: u64, owner: u64) {
        let mut made = Assignment::new("kv".parse().unwrap(), generation(number));
        let (session, since) = (SessionId(owner), made.generation);
        let address = format!("127.0.0.1:{owner}").parse().unwrap();
        let info = TaskInfo::new(format!("t{owner}").parse().unwrap(), owner, address);
        made.tasks.insert(session, Arc::new(Task::new(session, info)));
        let replicas = Replicas::One(Replica { session, since });
        made.slices = SliceMap::uniform(Assigned { replicas, ..Assigned::default() });
        hub.publish(Arc::new(made), None);
    }

    async fn clerk(hub: &Hub) -> Clerk {
        let clerk = Clerk::follow_hub(hub, "kv".parse().unwrap()).unwrap();
        clerk.wait_for(generation(1), PATIENCE).await.unwrap();
        clerk
    }

    async fn asked(tries: &mut Tries<'_>) -> (u64, u64) {
        let target = tries.next().await.unwrap();
        (target.session().0, target.generation().number)
    }

    #[tokio::test]
    async fn each_refusal_is_waited_out_in_its_own_way() {
        let hub = Hub::new();
        give(&hub, 1, 1);
        let clerk = clerk(&hub).await;
        let mut tries = Tries::new(&clerk, SliceKey(7), PATIENCE);
        assert_eq!(asked(&mut tries).await, (1, 1));
        // It gives the slice away by 1.2: not that, but what comes after is waited for.
        tries.in_transit(generation(2));
        give(&hub, 2, 1);
        let (next, ()) = tokio::join!(asked(&mut tries), async { give(&hub, 3, 2) });
        assert_eq!(next, (2, 3));
        // The new owner has not heard of it yet: it is asked again, and again.
        for _ in 0..3 {
            tries.not_owner(generation(2));
            assert_eq!(asked(&mut tries).await, (2, 3));
        }
        // It has heard of more than the clerk.
        tries.not_owner(generation(4));
        let (next, ()) = tokio::join!(asked(&mut tries), async { give(&hub, 4, 3) });
        assert_eq!(next, (3, 4));
        // And where it refuses by the same assignment, the next one decides.
        tries.not_owner(generation(4));
        let (next, ()) = tokio::join!(asked(&mut tries), async { give(&hub, 5, 1) });
        assert_eq!(next, (1, 5));
    }

    #[tokio::test]
    async fn the_callers_time_is_the_bound() {
        let hub = Hub::new();
        give(&hub, 1, 1);
        let clerk = clerk(&hub).await;
        for (refusal, known) in [
            (Refusal::InTransit(generation(1)), "in transit"),
            (Refusal::NotOwner(generation(9)), "news that do not come"),
            (Refusal::NotOwner(generation(1)), "the same"),
            (Refusal::NotOwner(generation(0)), "a task that never hears"),
            (Refusal::Unreached, "a task that is gone"),
        ] {
            let patience = Duration::from_millis(30);
            let mut tries = Tries::new(&clerk, SliceKey(7), patience);
            let error = loop {
                match tries.next().await {
                    Ok(target) => assert_eq!(target.session(), SessionId(1), "{known}"),
                    Err(error) => break error,
                }
                tries.refused(refusal);
            };
            let GaveUp::TimedOut { waited, last, .. } = error else { panic!("{error}") };
            assert_eq!(last, refusal, "{known}");
            assert!(waited >= patience, "{known}: {waited:?}");
        }
    }

    #[tokio::test]
    async fn where_nobody_serves_a_key_that_is_said() {
        let hub = Hub::new();
        give(&hub, 1, 1);
        let clerk = clerk(&hub).await;
        let mut tries = Tries::new(&clerk, SliceKey(7), PATIENCE);
        tries.next().await.unwrap();
        tries.in_transit(generation(1));
        hub.publish(Arc::new(Assignment::new("kv".parse().unwrap(), generation(2))), None);
        assert!(matches!(tries.next().await, Err(GaveUp::NoTask(_))));
        // Who would rather wait is woken by the task that comes.
        let (comes, ()) = tokio::join!(tries.anyone(), async { give(&hub, 3, 2) });
        assert!(comes);
        assert_eq!(asked(&mut tries).await, (2, 3));
        let hub = Hub::new();
        give(&hub, 1, 1);
        let clerk = self::clerk(&hub).await;
        hub.publish(Arc::new(Assignment::new("kv".parse().unwrap(), generation(2))), None);
        clerk.wait_for(generation(2), PATIENCE).await.unwrap();
        let tries = Tries::new(&clerk, SliceKey(7), Duration::from_millis(20));
        assert!(!tries.anyone().await, "nobody comes in the caller's time");
    }
}
