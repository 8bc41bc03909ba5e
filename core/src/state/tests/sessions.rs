//! Who is a task of a job, and who no more.

use super::*;

#[test]
fn registering_again_gives_the_same_session_and_another_process_is_refused() {
    let mut state = with_job();
    let first = register(&mut state, info("a", 1, 1)).unwrap();
    assert_eq!(register(&mut state, info("a", 1, 1)), Ok(first));
    let twice = Command::Register { job: kv(), info: info("a", 2, 9), stopped: None };
    assert!(
        matches!(refuse(&mut state, twice), Refused::NameTaken { session, .. } if session == first)
    );
    let same_address = Command::Register { job: kv(), info: info("b", 2, 1), stopped: None };
    assert!(matches!(refuse(&mut state, same_address), Refused::AddressTaken { .. }));
    let nowhere =
        Command::Register { job: "x".parse().unwrap(), info: info("a", 1, 1), stopped: None };
    assert!(matches!(refuse(&mut state, nowhere), Refused::NoSuchJob(_)));
}

#[test]
fn a_successor_may_say_that_its_predecessor_has_stopped() {
    let mut state = with_job();
    let old = register(&mut state, info("a", 1, 1)).unwrap();
    give_all(&mut state, old).unwrap();
    let register = Command::Register { job: kv(), info: info("a", 2, 1), stopped: Some(old) };
    let new = state.apply(register).unwrap().outcome;
    assert_eq!(new, Outcome::Session(SessionId(2)), "sessions are never given twice");
    let assignment = &state.jobs[&kv()].assignment;
    assert!(!assignment.tasks.contains_key(&old));
    assert_eq!(assignment.get(SliceKey(7)).1.replicas.as_slice(), []);
}

#[test]
fn nobody_can_say_that_another_task_has_stopped() {
    let mut state = with_job();
    let other = register(&mut state, info("a", 1, 1)).unwrap();
    state
        .apply(Command::Register { job: kv(), info: info("b", 2, 2), stopped: Some(other) })
        .unwrap();
    assert!(state.jobs[&kv()].assignment.tasks.contains_key(&other));
}

#[test]
fn an_ended_session_is_gone_for_good() {
    let mut state = with_job();
    let session = register(&mut state, info("a", 1, 1)).unwrap();
    let end = Command::End { job: kv(), session, reason: EndReason::Lost };
    state.apply(end.clone()).unwrap();
    assert!(matches!(refuse(&mut state, end), Refused::NoSuchSession { .. }));
    assert_eq!(register(&mut state, info("a", 1, 1)), Ok(SessionId(2)));
}
