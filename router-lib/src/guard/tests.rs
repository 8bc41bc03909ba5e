//! What a guard says while slices come, split, go and come back: with a real holder, a real clock, and no leader.

use std::sync::Mutex;

use mandoline_core::assignment::{Assigned, Assignment, Replica, Replicas};
use mandoline_core::lease::{Action, Event, Holder, Margin};
use mandoline_core::slice::Slice;
use mandoline_core::task::{Task, TaskInfo};
use mandoline_core::transit::{Step, Transit};

use super::*;
use crate::boot_clock;
use crate::term::Term;

const A: SessionId = SessionId(1);
const B: SessionId = SessionId(2);
const LEASE: Duration = Duration::from_secs(60);

fn number(number: u64) -> Generation {
    Generation { incarnation: 1, number }
}

fn slice(first: u64, last: u64) -> Slice {
    Slice::new(SliceKey(first), SliceKey(last)).unwrap()
}

/// An assignment of slices that begin at these keys: owner, since when, and where it is being released to.
fn assignment(
    generation: u64,
    runs: &[(u64, SessionId, u64, Option<SessionId>)],
) -> Arc<Assignment> {
    let mut made = Assignment::exclusive("kv".parse().unwrap(), number(generation));
    for session in [A, B] {
        let (name, address) = (format!("t{}", session.0), format!("h:{}", session.0));
        let info = TaskInfo::new(name.parse().unwrap(), session.0, address.parse().unwrap());
        let task = Task { lease: Some(LEASE), ..Task::new(session, info) };
        made.tasks.insert(session, Arc::new(task));
    }
    for (first, owner, since, to) in runs {
        let id = HandOffId { began: number(generation), first: SliceKey(*first) };
        let transit = to.map(|to| Transit { id, from: Some(*owner), to, step: Step::Releasing });
        let assigned = Assigned {
            replicas: Replicas::Owner(Some(Replica { session: *owner, since: number(*since) })),
            token: number(*since),
            transit: transit.map(Arc::new),
            ..Assigned::default()
        };
        made.slices.set(slice(*first, u64::MAX), assigned);
    }
    assert_eq!(made.broken_slice(), None);
    Arc::new(made)
}

/// A task as its session drives it.
struct Scene {
    owned: Arc<Owned>,
    holder: Holder,
    term: Arc<Term>,
    told: Arc<Mutex<Vec<String>>>,
}

impl Scene {
    fn new(lease: Duration) -> Self {
        let told: Arc<Mutex<Vec<String>>> = Arc::default();
        let note = |what: &'static str| {
            let told = Arc::clone(&told);
            Box::new(move |slices: &[Slice]| {
                let ranges = slices.iter().map(|slice| format!("{:x}", slice.first().0));
                let ranges: Vec<String> = ranges.collect();
                told.lock().unwrap().push(format!("{what} {}", ranges.join(",")));
            })
        };
        let start = Assignment::new("kv".parse().unwrap(), Generation::ZERO);
        let owned = Arc::new(Owned::new(start.clone(), note("added"), note("removed")));
        let term = Arc::new(Term::leased(A));
        owned.begin(Arc::clone(&term), Arc::new(start));
        let mut scene = Self { owned, holder: Holder::new(Margin::STANDARD), term, told };
        scene.happen(Event::Attached { session: A, lease: Some(lease) });
        scene
    }

    /// A task that owns everything since generation 2.
    fn serving(lease: Duration) -> Self {
        let mut scene = Self::new(lease);
        scene.know(assignment(2, &[(0, A, 2, None)]));
        scene.grant(2);
        scene.owned.welcome(|_| ());
        scene
    }

    fn happen(&mut self, event: Event) {
        let known = match &event {
            Event::Assigned(assignment) => Arc::clone(assignment),
            _ => Arc::clone(self.owned.view().assignment()),
        };
        let mut out = Vec::new();
        self.holder.handle(boot_clock::now(), event, &mut out);
        for action in out {
            match action {
                Action::Hold(held) => self.owned.hold(Arc::clone(&known), held),
                Action::Extend(until) => assert!(self.term.extend(until)),
                _ => {}
            }
        }
    }

    fn know(&mut self, assignment: Arc<Assignment>) {
        self.happen(Event::Assigned(assignment));
    }

    fn grant(&mut self, generation: u64) {
        self.holder.beat(boot_clock::now(), &mut Vec::new());
        let (request, generation) = (self.holder.asked(), number(generation));
        self.happen(Event::Granted { session: A, request, generation });
    }

    fn take(&self, key: u64) -> Result<Guard, NotOwner> {
        Guard::take(&self.owned, SliceKey(key), 1_000)
    }

    fn is_drained(&self, generation: u64, first: u64) -> bool {
        let id = HandOffId { began: number(generation), first: SliceKey(first) };
        self.owned.view().tenures().unwrap().is_drained(id)
    }
}

#[test]
fn no_guard_is_given_before_the_first_grant_and_the_callback() {
    let mut scene = Scene::new(LEASE);
    scene.know(assignment(2, &[(0, A, 2, None)]));
    // It is not ready: to whoever knows that it has the slice it is behind.
    assert_eq!(
        scene.take(7).unwrap_err(),
        NotOwner::Elsewhere { owner: None, generation: number(1) }
    );
    scene.owned.welcome(|_| ());
    assert_eq!(scene.take(7).unwrap_err(), NotOwner::NoLease { generation: number(2) });
    scene.grant(2);
    let guard = scene.take(7).unwrap();
    assert!(guard.still_owned());
    assert_eq!((guard.fencing_token(), guard.since()), (number(2), number(2)));
}

#[test]
fn a_guard_survives_a_split_and_a_merge_that_move_nothing() {
    let mut scene = Scene::serving(LEASE);
    let guard = scene.take(700).unwrap();
    scene.know(assignment(3, &[(0, A, 2, None), (500, A, 2, None)]));
    assert!(guard.still_owned());
    let other = scene.take(600).unwrap();
    scene.know(assignment(4, &[(0, A, 2, None)]));
    assert!(guard.still_owned() && other.still_owned());
    assert_eq!(*scene.told.lock().unwrap(), ["added 0"], "nothing came or went");
}

#[test]
fn a_guard_ends_where_its_slice_goes_and_does_not_come_back_with_it() {
    let mut scene = Scene::serving(LEASE);
    let (stays, goes) = (scene.take(7).unwrap(), scene.take(700).unwrap());
    scene.know(assignment(3, &[(0, A, 2, None), (500, B, 3, None)]));
    assert!(stays.still_owned() && !goes.still_owned());
    let owner = Some("h:2".parse().unwrap());
    assert_eq!(
        scene.take(700).unwrap_err(),
        NotOwner::Elsewhere { owner, generation: number(3) },
        "at once, before anyone was told"
    );
    scene.know(assignment(5, &[(0, A, 2, None), (500, A, 5, None)]));
    scene.owned.welcome(|_| ());
    assert!(!goes.still_owned() && scene.take(700).unwrap().still_owned());
    assert_eq!(*scene.told.lock().unwrap(), ["added 0", "removed 1f4", "added 1f4"]);
}

#[test]
fn a_release_refuses_newcomers_and_waits_for_those_inside() {
    let mut scene = Scene::serving(LEASE);
    let (before, elsewhere) = (scene.take(700).unwrap(), scene.take(7).unwrap());
    // Split first: the guard from before may lie in either half.
    scene.know(assignment(3, &[(0, A, 2, None), (500, A, 2, None)]));
    let inside = scene.take(800).unwrap();
    scene.know(assignment(4, &[(0, A, 2, None), (500, A, 2, Some(B))]));
    let id = HandOffId { began: number(4), first: SliceKey(500) };
    assert_eq!(scene.take(900).unwrap_err(), NotOwner::InTransit { id, generation: number(4) });
    assert!(scene.take(7).is_ok(), "only what moves goes dark");
    assert!(inside.still_owned() && before.still_owned(), "what is under way may end");
    assert!(!scene.is_drained(4, 500));
    drop((inside, before, elsewhere));
    assert!(scene.is_drained(4, 500));
    // Called off: as if nothing had been.
    scene.know(assignment(5, &[(0, A, 2, None), (500, A, 2, None)]));
    assert!(scene.take(900).unwrap().still_owned());
}

#[test]
fn a_lapse_ends_every_guard_for_good() {
    let mut scene = Scene::serving(LEASE);
    let guard = scene.take(7).unwrap();
    scene.owned.lapse(Arc::clone(scene.owned.view().assignment()));
    assert!(!guard.still_owned());
    scene.owned.welcome(|_| ());
    assert_eq!(*scene.told.lock().unwrap(), ["added 0", "removed 0"]);
    // The same process serves again, in a new session.
    let again = Scene { owned: Arc::clone(&scene.owned), ..Scene::new(LEASE) };
    again.owned.begin(Arc::new(Term::leased(B)), assignment(6, &[(0, B, 6, None)]));
    assert!(!guard.still_owned());
    scene.holder.handle(boot_clock::now(), Event::Ended, &mut Vec::new());
}

#[tokio::test]
async fn lost_fires_when_the_lease_runs_out_though_nobody_says_so() {
    let mut scene = Scene::new(Duration::from_millis(50));
    scene.know(assignment(2, &[(0, A, 2, None)]));
    scene.owned.welcome(|_| ());
    scene.grant(2);
    let guard = scene.take(7).unwrap();
    tokio::time::timeout(Duration::from_secs(20), guard.lost()).await.expect("it fires");
    assert!(!guard.still_owned());
    assert_eq!(scene.take(7).unwrap_err(), NotOwner::NoLease { generation: number(2) });
}

#[tokio::test]
async fn lost_fires_when_the_slice_goes() {
    let mut scene = Scene::serving(LEASE);
    let guard = scene.take(7).unwrap();
    let lost = tokio::spawn(async move { guard.lost().await });
    tokio::task::yield_now().await;
    scene.know(assignment(3, &[(0, B, 3, None)]));
    tokio::time::timeout(Duration::from_secs(20), lost).await.expect("it fires").unwrap();
}
