//! What owners are granted, when they are taken for gone, and who waits for that.

use super::stage::{LEASE, Stage, spec};
use super::*;
use crate::command::ClusterId;

const A: SessionId = SessionId(1);
const B: SessionId = SessionId(2);

#[test]
fn nothing_is_granted_before_leadership_is_confirmed() {
    let mut stage = Stage::new(2);
    stage.renew(A);
    assert_eq!((stage.confirms, stage.granted.as_slice()), (1, [].as_slice()));
    // These came in after the confirmation began: they wait for the next one, together.
    let (second, third) = (stage.renew(B), stage.renew(A));
    assert_eq!(stage.confirms, 1);
    stage.confirm(true);
    assert_eq!((stage.confirms, stage.granted.len()), (1, 1));
    stage.confirm(true);
    assert_eq!(stage.granted[1..], [(B, second), (A, third)]);
    assert_eq!(stage.confirms, 0);
}

#[test]
fn who_is_not_known_to_lead_grants_nothing_and_asks_again_for_who_came_since() {
    let mut stage = Stage::new(2);
    stage.renew(A);
    let late = stage.renew(B);
    stage.confirm(false);
    assert_eq!((stage.confirms, stage.granted.len()), (1, 0));
    stage.confirm(true);
    assert_eq!(stage.granted, [(B, late)]);
}

#[test]
fn a_session_that_is_no_more_is_granted_nothing() {
    let mut stage = Stage::new(2);
    stage.renew(A);
    stage.renew(SessionId(9));
    stage.agree(Command::End { job: kv(), session: A, reason: EndReason::Left });
    stage.confirm(true);
    stage.renew(A);
    assert_eq!((stage.confirms, stage.granted.len()), (0, 0));
    assert_eq!(stage.leader.ledger.over_at(A), None, "it is not remembered for ever");
    assert!(stage.leader.ledger.over_at(B).is_some());
    // Its end is applied, and the leader has not heard of that yet.
    stage.renew(B);
    let end = Command::End { job: kv(), session: B, reason: EndReason::Left };
    stage.state.apply(end).unwrap();
    stage.confirm(true);
    assert_eq!(stage.granted, []);
}

#[test]
fn a_crashed_owner_is_waited_for_and_not_for_long() {
    let mut stage = Stage::new(3);
    stage.smooth = true;
    stage.pass(1_000, &[]);
    stage.happen(Event::Broken { job: kv(), session: A });
    // It last renewed just now; a broken connection does not shorten that.
    stage.pass(5_049, &[A]);
    assert!(stage.assignment().tasks.contains_key(&A), "its lease is not over");
    let had = stage.slices_of(A);
    assert!(had > 0);
    stage.pass(1, &[A]);
    assert!(!stage.assignment().tasks.contains_key(&A));
    let orphans =
        stage.assignment().slices.iter().any(|(_, one)| one.replicas.as_slice().is_empty());
    assert!(!orphans, "what it had is served elsewhere at once");
}

#[test]
fn an_owner_is_waited_for_by_the_lease_that_it_registered_with() {
    for seconds in [2, 60] {
        let mut stage = Stage::new(2);
        stage.smooth = true;
        let lease = Duration::from_secs(seconds);
        let command = Command::ApplyJob { spec: JobSpec { lease, ..spec() }, if_version: None };
        stage.agree(command);
        stage.renew(A);
        stage.pass(5_049, &[A]);
        assert!(stage.assignment().tasks.contains_key(&A), "{lease:?} is for those that come");
        stage.pass(1, &[A]);
        assert!(!stage.assignment().tasks.contains_key(&A), "{lease:?}");
    }
}

#[test]
fn a_new_leader_waits_a_whole_lease_whatever_was_before() {
    let mut stage = Stage::new(2);
    stage.smooth = true;
    stage.pass(5_000, &[A]);
    stage.change_leader();
    stage.pass(5_049, &[A]);
    assert!(stage.assignment().tasks.contains_key(&A));
    stage.pass(1, &[A]);
    assert!(!stage.assignment().tasks.contains_key(&A));
}

#[test]
fn whose_end_was_proposed_is_granted_nothing_even_if_that_fails() {
    let mut stage = Stage::new(2);
    stage.renew(A);
    stage.confirm(true);
    stage.granted.clear();
    stage.smooth = false;
    stage.now += LEASE + LEASE / 100;
    stage.happen(Event::Heard { job: kv(), session: B });
    stage.tick();
    assert!(
        matches!(stage.proposed.front(), Some(Command::End { session: A, .. })),
        "{:?}",
        stage.proposed
    );
    // It comes back while that is under way, and nobody knows what became of it.
    for outcome in ["unknown", "failed"] {
        stage.renew(A);
        assert_eq!(stage.confirms, 0, "{outcome}");
        if outcome == "unknown" {
            stage.fail_next();
        }
    }
    // Others are granted as before.
    stage.renew(B);
    stage.confirm(true);
    assert_eq!(stage.granted.iter().map(|(session, _)| *session).collect::<Vec<_>>(), [B]);
}

#[test]
fn an_end_that_came_to_nothing_is_proposed_until_it_happens() {
    let mut stage = Stage::new(2);
    stage.now += LEASE + LEASE / 100;
    stage.happen(Event::Heard { job: kv(), session: B });
    stage.tick();
    for _ in 0..3 {
        assert!(matches!(stage.fail_next(), Command::End { session: A, .. }));
        // It was never granted anything, so it has not lapsed, and would own what it cannot serve for as long as it is heard.
        stage.renew(A);
        stage.pass(99, &[]);
        assert_eq!(stage.proposed, []);
        stage.pass(1, &[]);
    }
    stage.agree_next();
    assert!(!stage.assignment().tasks.contains_key(&A));
    stage.proposed.clear();
    stage.pass(1_000, &[]);
    let again = stage.proposed.iter().any(|command| matches!(command, Command::End { .. }));
    assert!(!again, "{:?}", stage.proposed);
}

#[test]
fn owners_after_a_restore_wait_until_all_of_before_have_lapsed() {
    let mut state = State::default();
    state.apply(Command::ApplyJob { spec: spec(), if_version: None }).unwrap();
    let mut stage = Stage::of(state.restored(ClusterId(7), 1_700_000_000_000));
    let task = stage.register(1);
    let began = stage.now;
    stage.pass(60_500, &[]);
    assert_eq!((stage.slices_of(task), stage.rounds.len()), (0, 0), "nobody even plans");
    // 60 s and one per cent after this leader began, and some moments for who hears of it.
    stage.pass(200, &[]);
    let orphans =
        stage.assignment().slices.iter().any(|(_, one)| one.replicas.as_slice().is_empty());
    assert!(!orphans, "{} after {}", stage.now, began);
    // Another leader in between begins anew.
    let mut stage = Stage::of(stage.state.restored(ClusterId(8), 1_800_000_000_000));
    let task = stage.register(1);
    stage.pass(50_000, &[]);
    stage.change_leader();
    stage.pass(60_500, &[]);
    assert_eq!(stage.slices_of(task), 0);
    stage.pass(200, &[]);
    assert!(stage.slices_of(task) > 0);
}

#[test]
fn a_hold_off_that_cannot_be_ended_is_tried_again_and_not_in_a_loop() {
    let mut state = State::default();
    state.apply(Command::ApplyJob { spec: spec(), if_version: None }).unwrap();
    let mut stage = Stage::of(state.restored(ClusterId(7), 1_700_000_000_000));
    stage.register(1);
    stage.smooth = false;
    stage.pass(60_600, &[]);
    assert_eq!(stage.proposed.len(), 1);
    for _ in 0..3 {
        stage.fail_next();
        assert_eq!(stage.proposed.len(), 0);
        stage.pass(100, &[]);
        assert_eq!(stage.proposed.len(), 1);
    }
    stage.smooth = true;
    stage.agree_next();
    stage.pass(100, &[]);
    assert!(stage.slices_of(SessionId(stage.state.last_session)) > 0);
}
