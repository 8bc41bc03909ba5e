//! The lease from both ends, as transcripts: what a task hears, and what it does.

use std::fmt::Write;

use super::*;
use crate::assignment::Replicas;
use crate::name::TaskName;
use crate::task::{Address, Phase, Task, TaskInfo};

const A: SessionId = SessionId(1);
const B: SessionId = SessionId(2);
const T: Duration = Duration::from_secs(5);

fn at(millis: u64) -> Time {
    Time::from_millis(millis)
}

fn number(number: u64) -> Generation {
    Generation { incarnation: 1, number }
}

fn id(began: u64) -> HandOffId {
    HandOffId { began: number(began), first: SliceKey(0) }
}

/// One slice, owned by `owner` since `since`, in hand-off or not.
fn assignment(generation: u64, owner: SessionId, since: u64, transit: Option<Transit>) -> Event {
    let mut made = Assignment::exclusive("kv".parse().unwrap(), number(generation));
    for session in [A, B] {
        let (name, address): (TaskName, Address) =
            (format!("t{session}").parse().unwrap(), format!("h:{}", session.0).parse().unwrap());
        let task = Task::new(session, TaskInfo::new(name, session.0, address));
        let task = Task { phase: Phase::Serving, lease: Some(T), ..task };
        made.tasks.insert(session, Arc::new(task));
    }
    let replica = Replica { session: owner, since: number(since) };
    made.slices.set(
        Slice::FULL,
        Assigned {
            replicas: Replicas::Owner(Some(replica)),
            token: number(since),
            transit: transit.map(Arc::new),
            ..Assigned::default()
        },
    );
    assert_eq!(made.broken_slice(), None);
    Event::Assigned(Arc::new(made))
}

fn transit(began: u64, from: SessionId, to: SessionId, step: Step) -> Option<Transit> {
    Some(Transit { id: id(began), from: Some(from), to, step })
}

/// A holder and what it did, in few words.
struct Scene {
    holder: Holder,
    log: String,
}

impl Scene {
    /// Session A, attached, with a first lease from 0 and all keys since generation 3.
    fn serving() -> Self {
        let mut scene = Self { holder: Holder::new(Margin::STANDARD), log: String::new() };
        scene.happen(0, Event::Attached { session: A, lease: Some(T) });
        scene.beat(0);
        scene.happen(1, assignment(3, A, 3, None));
        scene.grant(2, 1, 3);
        scene.log.clear();
        scene
    }

    fn happen(&mut self, millis: u64, event: Event) {
        let mut out = Vec::new();
        self.holder.handle(at(millis), event, &mut out);
        self.note(&out);
    }

    fn beat(&mut self, millis: u64) {
        let mut out = Vec::new();
        self.holder.beat(at(millis), &mut out);
        self.note(&out);
    }

    fn grant(&mut self, millis: u64, request: u64, generation: u64) {
        let generation = number(generation);
        self.happen(millis, Event::Granted { session: A, request, generation });
    }

    fn note(&mut self, actions: &[Action]) {
        for action in actions {
            let log = &mut self.log;
            match action {
                Action::Renew(number) => write!(log, "renew {number}; "),
                Action::Extend(until) => write!(log, "until {until}; "),
                Action::Hold(held) => write!(log, "hold {}; ", held.len()),
                Action::Prepare(coming) => write!(log, "prepare {}; ", coming.id.began),
                Action::Release(going) => {
                    write!(log, "release {} by {}; ", going.id.began, going.until)
                }
                Action::Resume(id) => write!(log, "resume {}; ", id.began),
                Action::Fetch(id) => write!(log, "fetch {}; ", id.began),
                Action::Arrived(id) => write!(log, "arrived {}; ", id.began),
                Action::Discard(id) => write!(log, "discard {}; ", id.began),
                Action::Ready(id) => write!(log, "ready {}; ", id.began),
                Action::Acknowledge(id) => write!(log, "acknowledge {}; ", id.began),
                Action::Lapsed(session) => write!(log, "{session} lapsed; "),
            }
            .unwrap();
        }
    }

    fn did(&mut self) -> String {
        std::mem::take(&mut self.log).trim_end_matches("; ").to_owned()
    }

    fn serves(&self, millis: u64) -> (bool, bool) {
        let key = SliceKey(7);
        (self.holder.accepts(at(millis), key), self.holder.believes(at(millis), key))
    }
}

#[test]
fn a_lease_counts_from_when_it_was_asked_for() {
    let mut scene = Scene::serving();
    assert_eq!(scene.serves(4_949), (true, true));
    assert_eq!(scene.serves(4_950), (false, false), "one per cent early");
    scene.beat(1_000);
    // However long the answer took.
    scene.grant(4_000, 2, 3);
    assert_eq!(scene.did(), "renew 2; until 5.950s");
}

#[test]
fn nothing_is_served_before_the_first_grant() {
    let mut scene = Scene { holder: Holder::new(Margin::STANDARD), log: String::new() };
    scene.happen(0, Event::Attached { session: A, lease: Some(T) });
    scene.happen(1, assignment(3, A, 3, None));
    assert_eq!(scene.serves(2), (false, false));
    scene.beat(2);
    scene.grant(3, 1, 3);
    assert_eq!(scene.serves(3), (true, true));
}

#[test]
fn answers_to_unknown_numbers_and_to_other_sessions_mean_nothing() {
    let mut scene = Scene::serving();
    scene.beat(1_000);
    for (session, request) in [(A, 1), (A, 3), (B, 2)] {
        scene.happen(1_001, Event::Granted { session, request, generation: number(3) });
    }
    assert_eq!(scene.did(), "renew 2");
    scene.beat(2_000);
    scene.grant(2_001, 3, 3);
    scene.grant(2_002, 2, 3);
    assert_eq!(scene.did(), "renew 3; until 6.950s", "the older one comes too late");
}

#[test]
fn a_grant_counts_once_its_generation_is_installed() {
    let mut scene = Scene::serving();
    scene.beat(1_000);
    scene.grant(1_001, 2, 4);
    assert_eq!(scene.did(), "renew 2");
    scene.happen(1_002, assignment(4, A, 3, None));
    assert_eq!(scene.did(), "hold 1; until 5.950s");
}

#[test]
fn a_lapse_is_for_good() {
    let mut scene = Scene::serving();
    scene.beat(4_000);
    // The grant was made in time and comes too late.
    scene.grant(4_950, 2, 3);
    assert_eq!(scene.did(), "renew 2; hold 0; s1 lapsed");
    scene.happen(4_951, assignment(4, A, 3, None));
    assert_eq!((scene.serves(4_952), scene.did().as_str()), ((false, false), ""));
    // A new session begins with nothing, even where the old one's assignment is told once more.
    scene.happen(5_000, Event::Attached { session: B, lease: Some(T) });
    scene.happen(5_001, assignment(5, A, 3, None));
    scene.beat(5_002);
    scene.happen(5_003, Event::Granted { session: B, request: 3, generation: number(5) });
    assert_eq!(scene.did(), "hold 0; renew 3; until 9.952s");
    assert_eq!(scene.serves(5_004), (false, false));
}

#[test]
fn a_release_ends_with_the_last_grant_before_it_whatever_is_granted_after() {
    let mut scene = Scene::serving();
    scene.happen(100, assignment(5, A, 3, transit(4, A, B, Step::Preparing)));
    scene.beat(1_000);
    scene.grant(1_001, 2, 6);
    assert_eq!(scene.did(), "hold 1; renew 2");
    scene.happen(1_002, assignment(6, A, 3, transit(4, A, B, Step::Releasing)));
    assert_eq!(scene.did(), "release 1.4 by 4.950s; hold 1; until 5.950s");
    // New work is refused, what is under way may end, and not later than that.
    assert_eq!((scene.serves(4_949), scene.serves(4_950)), ((false, true), (false, false)));
    scene.happen(4_951, Event::Released(id(4)));
    assert_eq!(scene.did(), "acknowledge 1.4");
}

#[test]
fn what_is_acknowledged_is_nobodys_belief_and_is_said_until_it_is_over() {
    let mut scene = Scene::serving();
    scene.happen(100, assignment(5, A, 3, transit(4, A, B, Step::Releasing)));
    scene.happen(200, Event::Released(id(4)));
    scene.happen(201, Event::Released(id(4)));
    scene.happen(202, Event::Released(id(9)));
    assert_eq!(scene.did(), "release 1.4 by 4.950s; hold 1; acknowledge 1.4");
    assert_eq!(scene.serves(300), (false, false));
    scene.beat(1_000);
    scene.happen(1_100, Event::Attached { session: A, lease: Some(T) });
    assert_eq!(scene.did(), "renew 2; acknowledge 1.4; acknowledge 1.4");
    scene.happen(1_200, assignment(6, B, 4, None));
    scene.beat(2_000);
    assert_eq!(scene.did(), "hold 0; renew 3");
}

#[test]
fn an_aborted_hand_off_gives_the_slice_back_for_as_long_as_the_session_has() {
    let mut scene = Scene::serving();
    scene.happen(100, assignment(5, A, 3, transit(4, A, B, Step::Releasing)));
    scene.happen(200, Event::Released(id(4)));
    scene.beat(1_000);
    scene.grant(1_001, 2, 5);
    scene.did();
    scene.happen(1_300, assignment(6, A, 3, None));
    assert_eq!(scene.did(), "resume 1.4; hold 1");
    assert_eq!((scene.serves(5_949), scene.serves(5_950)), ((true, true), (false, false)));
}

#[test]
fn a_slice_that_was_anothers_in_between_is_not_taken_up_where_it_was_left() {
    let mut scene = Scene::serving();
    scene.happen(100, assignment(5, A, 3, transit(4, A, B, Step::Releasing)));
    scene.happen(200, Event::Released(id(4)));
    scene.did();
    // B had it and gave it back, and all that came through is how that ended.
    scene.happen(300, assignment(9, A, 7, None));
    assert_eq!((scene.did().as_str(), scene.serves(301)), ("hold 1", (true, true)));
}

#[test]
fn a_grant_gives_nothing_back() {
    let mut scene = Scene::serving();
    scene.happen(100, assignment(5, B, 5, None));
    scene.beat(1_000);
    scene.grant(1_001, 2, 5);
    assert_eq!(scene.serves(1_002), (false, false));
    // Nor does an older assignment that comes late.
    scene.happen(1_003, assignment(4, A, 3, None));
    assert_eq!(scene.serves(1_004), (false, false));
}

#[test]
fn what_was_prepared_is_used_only_if_the_slice_came_by_that_hand_off() {
    for (owner, since, said) in [
        (A, 4, "arrived 1.4; hold 1"),
        (A, 7, "discard 1.4; hold 1"),
        (B, 2, "discard 1.4; hold 0"),
    ] {
        let mut scene = Scene::serving();
        scene.happen(100, assignment(4, B, 2, transit(4, B, A, Step::Preparing)));
        scene.happen(200, Event::Prepared(id(4)));
        scene.happen(201, Event::Prepared(id(4)));
        scene.happen(300, assignment(5, B, 2, transit(4, B, A, Step::Releasing)));
        scene.beat(400);
        assert_eq!(
            scene.did(),
            "prepare 1.4; hold 0; ready 1.4; fetch 1.4; hold 0; renew 2; ready 1.4"
        );
        scene.happen(500, assignment(8, owner, since, None));
        assert_eq!(scene.did(), said);
    }
}

#[test]
fn an_affinity_session_serves_without_a_lease() {
    let mut scene = Scene { holder: Holder::new(Margin::STANDARD), log: String::new() };
    scene.happen(0, Event::Attached { session: A, lease: None });
    scene.happen(1, assignment(3, A, 3, None));
    scene.beat(2);
    assert_eq!(scene.serves(100_000), (true, true));
    assert_eq!((scene.did().as_str(), scene.holder.deadline()), ("hold 1; renew 1", None));
    scene.happen(100_001, Event::Ended);
    assert_eq!(scene.serves(100_002), (false, false));
}

fn renewal(session: SessionId, request: u64) -> Renewal {
    Renewal { job: "kv".parse().unwrap(), session, request }
}

fn ledger() -> Ledger {
    let mut ledger = Ledger::new(Margin::STANDARD);
    ledger.admit(at(0), A, T);
    ledger.admit(at(0), B, T);
    ledger
}

#[test]
fn the_leader_waits_longer_than_any_holder_serves() {
    let mut ledger = ledger();
    assert_eq!((ledger.is_over(at(5_049), A), ledger.is_over(at(5_050), A)), (false, true));
    assert!(ledger.ask(at(3_000), renewal(A, 1)));
    assert_eq!(ledger.over_at(A), Some(at(8_050)), "also if the answer never leaves");
    // A new leader admits everyone anew; here it is known already.
    ledger.admit(at(4_000), A, T);
    assert_eq!(ledger.over_at(A), Some(at(8_050)));
    assert!(ledger.is_over(at(0), SessionId(9)), "what never was is over");
}

#[test]
fn one_confirmation_serves_all_that_waited_before_it_began() {
    let mut ledger = ledger();
    assert!(ledger.ask(at(1), renewal(A, 1)));
    // These came in after it began.
    assert!(!ledger.ask(at(2), renewal(B, 1)));
    assert!(!ledger.ask(at(3), renewal(A, 2)));
    assert_eq!(ledger.confirmed(true), (vec![renewal(A, 1)], true));
    assert_eq!(ledger.confirmed(true), (vec![renewal(B, 1), renewal(A, 2)], false));
    assert!(ledger.ask(at(4), renewal(A, 3)));
    assert_eq!(ledger.confirmed(false), (vec![], false), "who is not known to lead grants nothing");
}

#[test]
fn who_is_being_ended_is_granted_nothing() {
    let mut ledger = ledger();
    assert!(ledger.ask(at(1), renewal(A, 1)));
    ledger.deny(A);
    assert_eq!(ledger.confirmed(true), (vec![], false));
    assert!(!ledger.ask(at(2), renewal(A, 2)));
    assert_eq!(ledger.over_at(A), Some(at(5_051)), "nor does asking renew it");
    ledger.forget(A);
    assert!(ledger.is_over(at(0), A) && !ledger.is_over(at(0), B));
}
