//! What a plan does, and when it comes too late.

use super::*;

#[test]
fn each_change_is_a_greater_generation_and_a_delta_that_leads_there() {
    let mut state = with_job();
    let mut followed = state.jobs[&kv()].assignment.as_ref().clone();
    let commands = [
        Command::Register { job: kv(), info: info("a", 1, 1), stopped: None },
        Command::Register { job: kv(), info: info("b", 2, 2), stopped: None },
        Command::Drain { job: kv(), session: SessionId(1) },
        Command::Undrain { job: kv(), session: SessionId(1) },
        Command::End { job: kv(), session: SessionId(1), reason: EndReason::Left },
    ];
    for command in commands {
        let delta = state.apply(command).unwrap().delta.unwrap();
        followed = delta.apply_to(&followed).unwrap();
        assert_eq!(followed, *state.jobs[&kv()].assignment);
    }
    assert_eq!(followed.generation.number, 6);
}

#[test]
fn a_plan_applies_to_the_assignment_that_it_was_made_for_and_no_other() {
    let mut state = with_job();
    let session = register(&mut state, info("a", 1, 1)).unwrap();
    let base = state.jobs[&kv()].assignment.generation;
    let applied = give_all(&mut state, session).unwrap();
    assert_eq!(applied.delta.unwrap().to, base.next());
    assert_eq!(state.jobs[&kv()].churn.keys, 1_000_000, "all keys, in millionths");
    let even = Ratio::from_millionths(1_000_000);
    let late = Plan { base, edits: vec![], imbalance: (even, even), total: Load::ZERO };
    let refused = refuse(&mut state, Command::Change { job: kv(), plan: late.clone() });
    assert!(matches!(refused, Refused::Stale { .. }));
    let future = Plan { base: base.next().next().next(), ..late };
    let refused = refuse(&mut state, Command::Change { job: kv(), plan: future });
    assert!(matches!(refused, Refused::Stale { .. }));
}

#[test]
fn a_leaving_task_is_given_nothing() {
    let mut state = with_job();
    let session = register(&mut state, info("a", 1, 1)).unwrap();
    state.apply(Command::Drain { job: kv(), session }).unwrap();
    let before = state.clone();
    assert!(matches!(give_all(&mut state, session), Err(Refused::Taker { .. })));
    assert!(matches!(give_all(&mut state, SessionId(9)), Err(Refused::Taker { .. })));
    assert_eq!(state, before);
}

#[test]
fn loads_are_stored_without_a_new_generation() {
    let mut state = with_job();
    let base = state.jobs[&kv()].assignment.generation;
    let loads = vec![Load::from_milli(5)];
    state.apply(Command::StoreLoads { job: kv(), base, loads: loads.clone() }).unwrap();
    let assignment = &state.jobs[&kv()].assignment;
    assert_eq!((assignment.generation, assignment.get(SliceKey(0)).1.load), (base, loads[0]));
    let many = Command::StoreLoads { job: kv(), base, loads: vec![Load::ZERO; 2] };
    assert_eq!(refuse(&mut state, many), Refused::Loads { expected: 1, found: 2 });
}
