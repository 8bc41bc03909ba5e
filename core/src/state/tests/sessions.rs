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
fn a_successor_has_the_slices_back_where_there_is_a_grace() {
    let mut state = with_job();
    let spec = JobSpec { grace: Duration::from_secs(1), ..JobSpec::new(kv()) };
    state.apply(Command::ApplyJob { spec, if_version: None }).unwrap();
    let old = register(&mut state, info("a", 1, 1)).unwrap();
    give_all(&mut state, old).unwrap();
    let next = Command::Register { job: kv(), info: info("a", 2, 1), stopped: Some(old) };
    let new = state.apply(next).unwrap().outcome;
    let assignment = Arc::clone(&state.jobs[&kv()].assignment);
    let since = assignment.generation;
    assert_eq!(new, Outcome::Session(SessionId(2)));
    let (_, assigned) = assignment.get(SliceKey(7));
    let served = [Replica { session: SessionId(2), since }];
    assert_eq!((assigned.replicas.as_slice(), assigned.token), (served.as_slice(), since));
    // And one that was lost in the meantime.
    let lost = Command::End { job: kv(), session: SessionId(2), reason: EndReason::Lost };
    state.apply(lost).unwrap();
    assert_eq!(state.jobs[&kv()].waiting().len(), 1);
    let other = register(&mut state, info("b", 3, 2)).unwrap();
    let back = register(&mut state, info("a", 4, 1)).unwrap();
    let job = &state.jobs[&kv()];
    assert_eq!(job.assignment.of(other).count(), 0);
    assert_eq!((job.assignment.of(back).count(), job.kept.len()), (1, 0));
}

#[test]
fn a_plan_that_touches_what_waits_ends_the_wait_and_so_does_the_leader() {
    let mut state = with_job();
    let spec = JobSpec { grace: Duration::from_secs(1), ..JobSpec::new(kv()) };
    state.apply(Command::ApplyJob { spec, if_version: None }).unwrap();
    let [a, b] = [("a", 1), ("b", 2)].map(|(name, id)| {
        register(&mut state, info(name, id, u16::try_from(id).unwrap())).unwrap()
    });
    give_all(&mut state, a).unwrap();
    let lost = |session| Command::End { job: kv(), session, reason: EndReason::Lost };
    let forget = |session| Command::Forget { job: kv(), task: "a".parse().unwrap(), session };
    assert!(matches!(refuse(&mut state, forget(a)), Refused::NoSuchSession { .. }));
    state.apply(lost(a)).unwrap();
    give_all(&mut state, b).unwrap();
    assert_eq!(state.jobs[&kv()].kept.len(), 0);
    let a = register(&mut state, info("a", 3, 1)).unwrap();
    assert_eq!(state.jobs[&kv()].assignment.of(a).count(), 0, "it is another's");
    state.apply(lost(b)).unwrap();
    let refused = Command::Forget { job: kv(), task: "b".parse().unwrap(), session: a };
    assert!(matches!(refuse(&mut state, refused), Refused::NoSuchSession { .. }));
    let forget = Command::Forget { job: kv(), task: "b".parse().unwrap(), session: b };
    state.apply(forget).unwrap();
    assert_eq!(state.jobs[&kv()].kept.len(), 0);
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

#[test]
fn who_went_is_remembered_until_somebody_comes() {
    let mut state = with_job();
    let gone = |state: &State| -> Vec<String> {
        state.jobs[&kv()].gone.iter().map(ToString::to_string).collect()
    };
    let names = ["a", "b", "c"];
    let sessions: Vec<SessionId> = (1..)
        .zip(names)
        .map(|(id, name)| register(&mut state, info(name, id, id as u16)).unwrap())
        .collect();
    for session in &sessions {
        let end = Command::End { job: kv(), session: *session, reason: EndReason::Left };
        state.apply(end).unwrap();
    }
    assert_eq!(gone(&state), names);
    register(&mut state, info("b", 4, 4)).unwrap();
    assert_eq!(gone(&state), ["a", "c"], "it is back");
    let other = register(&mut state, info("d", 5, 5)).unwrap();
    assert_eq!(gone(&state), ["c"], "it stands for the first");
    // A process that goes on under another session was never gone.
    let on = info("d", 5, 5);
    state.apply(Command::Register { job: kv(), info: on, stopped: Some(other) }).unwrap();
    assert_eq!(gone(&state), ["c"]);
    let named = |id: u16| info(&format!("t{id}"), id.into(), id);
    let many: Vec<SessionId> =
        (100..250).map(|id| register(&mut state, named(id)).unwrap()).collect();
    for session in many {
        let end = Command::End { job: kv(), session, reason: EndReason::Lost };
        state.apply(end).unwrap();
    }
    let newest: Vec<String> = (150..250).map(|id| format!("t{id}")).collect();
    assert_eq!(gone(&state), newest);
}
