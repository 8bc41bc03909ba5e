//! Slices on their way: who is waited for, how long, and what is planned meanwhile.

use super::stage::Stage;
use super::*;
use crate::transit::Act;

const A: SessionId = SessionId(1);
const B: SessionId = SessionId(2);

/// The steps of the hand-offs that are proposed, which is one command at most.
fn steps(stage: &Stage) -> Vec<(HandOffId, Act)> {
    let of = |command: &Command| match command {
        Command::HandOff { steps, .. } => Some(steps.clone()),
        _ => None,
    };
    let all: Vec<_> = stage.proposed.iter().filter_map(of).collect();
    assert!(all.len() <= 1, "one at a time: {all:?}");
    all.into_iter().flatten().collect()
}

/// Two tasks, and everything that the first one has is on its way to the second.
fn draining() -> (Stage, usize) {
    let mut stage = Stage::new(2);
    let slices = stage.slices_of(A);
    stage.drain(A);
    assert!(matches!(stage.agree_next(), Command::Change { .. }));
    assert_eq!((stage.transits().len(), stage.proposed.len()), (slices, 0));
    (stage, slices)
}

#[test]
fn a_drain_hands_everything_over_a_few_commands_at_a_time() {
    let (mut stage, slices) = draining();
    assert!(slices > 3);
    for (act, step) in
        [(Act::Release, Step::Preparing), (Act::Acknowledged { by: A }, Step::Releasing)]
    {
        let all = stage.transits();
        assert!(all.iter().all(|transit| transit.step == step));
        all.iter().for_each(|transit| stage.answer(*transit));
        assert_eq!(steps(&stage), [(all[0].id, act)], "who said it first");
        // All others said so while that was under way.
        stage.agree_next();
        let rest: Vec<_> = all[1..].iter().map(|transit| (transit.id, act)).collect();
        assert_eq!(steps(&stage), rest);
        assert_eq!(stage.drained, [], "it still serves");
        stage.agree_next();
    }
    assert_eq!((stage.slices_of(A), stage.drained.as_slice()), (0, [A].as_slice()));
    assert_eq!(stage.proposed.len(), 0);
}

#[test]
fn what_tasks_say_twice_or_too_early_or_of_others_means_nothing() {
    let (mut stage, _) = draining();
    let first = stage.transits()[0];
    let (job, id) = (kv(), first.id);
    stage.happen(Event::Ready { job: job.clone(), session: A, id });
    stage.happen(Event::Acknowledged { job: job.clone(), session: A, id });
    let began = first.id.began.next();
    stage.happen(Event::Ready { job: job.clone(), session: B, id: HandOffId { began, ..id } });
    assert_eq!(steps(&stage), []);
    stage.answer(first);
    stage.answer(first);
    stage.agree_next();
    assert_eq!(steps(&stage), []);
    stage.happen(Event::Acknowledged { job, session: B, id });
    stage.answer(first);
    assert_eq!(steps(&stage), []);
    // As heartbeats repeat it: once proposed, and no more once it is over.
    let releasing = Transit { step: Step::Releasing, ..first };
    stage.answer(releasing);
    stage.answer(releasing);
    assert_eq!(steps(&stage).len(), 1);
    stage.agree_next();
    stage.answer(releasing);
    assert_eq!(steps(&stage), []);
}

#[test]
fn who_does_not_get_ready_is_not_waited_for_for_ever() {
    let (mut stage, slices) = draining();
    stage.pass(9_999, &[]);
    assert_eq!(steps(&stage), []);
    stage.pass(1, &[]);
    let found = steps(&stage);
    assert_eq!(found.len(), slices, "all in one command");
    assert!(found.iter().all(|(_, act)| *act == Act::Release));
}

#[test]
fn who_is_to_take_and_is_away_by_then_does_not_get_it() {
    for step in [Step::Preparing, Step::Releasing] {
        let (mut stage, slices) = draining();
        if step == Step::Releasing {
            let all = stage.transits();
            all.iter().for_each(|transit| stage.answer(*transit));
            stage.agree_next();
            stage.agree_next();
        }
        stage.happen(Event::Broken { job: kv(), session: B });
        match step {
            Step::Preparing => stage.pass(10_000, &[B]),
            Step::Releasing => stage.transits().iter().for_each(|transit| stage.answer(*transit)),
        }
        while !steps(&stage).is_empty() {
            assert!(steps(&stage).iter().all(|(_, act)| *act == Act::Abort), "{step}");
            stage.agree_next();
        }
        assert_eq!((stage.slices_of(A), stage.transits().len()), (slices, 0), "{step}");
    }
}

#[test]
fn while_the_brake_holds_what_leaves_goes_to_who_is_there() {
    let mut stage = Stage::new(5);
    stage.smooth = true;
    let missing: Vec<SessionId> = (2..=4).map(SessionId).collect();
    // What was on its way to them is called off by and by.
    stage.pass(20_000, &missing);
    assert!(stage.leader.hold(&kv()).is_some());
    assert_eq!(stage.transits(), []);
    let before: Vec<usize> = missing.iter().map(|session| stage.slices_of(*session)).collect();
    stage.drain(A);
    stage.transits().into_iter().for_each(|transit| {
        assert_eq!(transit.to, SessionId(5), "the only one that is heard");
    });
    for _ in 0..2 {
        stage.transits().into_iter().for_each(|transit| stage.answer(transit));
    }
    let after: Vec<usize> = missing.iter().map(|session| stage.slices_of(*session)).collect();
    assert_eq!((stage.slices_of(A), before), (0, after));
}

#[test]
fn who_does_not_let_go_has_the_slice_until_its_right_to_it_has_ended() {
    let (mut stage, slices) = draining();
    let all = stage.transits();
    all.iter().for_each(|transit| stage.answer(*transit));
    stage.agree_next();
    stage.pass(1_000, &[]);
    stage.agree_next();
    // All but one slice was released a second after the first: each has its own time.
    stage.pass(4_049, &[]);
    assert_eq!(steps(&stage), []);
    stage.pass(1, &[]);
    assert_eq!(steps(&stage), [(all[0].id, Act::Lapsed)]);
    stage.agree_next();
    stage.pass(999, &[]);
    assert_eq!(steps(&stage), []);
    stage.pass(1, &[]);
    assert_eq!(steps(&stage).len(), slices - 1);
    stage.agree_next();
    assert_eq!((stage.slices_of(A), stage.drained.as_slice()), (0, [A].as_slice()));
    assert!(stage.assignment().tasks.contains_key(&A), "the rest of its session lives on");
}

#[test]
fn a_step_that_came_to_nothing_is_tried_again_and_not_in_a_loop() {
    let (mut stage, slices) = draining();
    stage.pass(10_000, &[]);
    for _ in 0..20 {
        let Command::HandOff { steps, .. } = stage.fail_next() else { panic!("steps failed") };
        assert_eq!(steps.len(), slices);
        assert_eq!(stage.proposed.len(), 0, "not at once");
        // Nor because a task says once more what it has said.
        let transits = stage.transits();
        transits.into_iter().for_each(|transit| stage.answer(transit));
        stage.pass(99, &[]);
        assert_eq!(stage.proposed.len(), 0);
        stage.pass(1, &[]);
        assert_eq!(stage.proposed.len(), 1);
    }
    stage.agree_next();
    stage.hand_over_all();
    assert_eq!(stage.slices_of(A), 0);
}

#[test]
fn what_was_proposed_and_fails_late_harms_nothing() {
    let (mut stage, slices) = draining();
    let transits = stage.transits();
    transits.into_iter().for_each(|transit| stage.answer(transit));
    // Nobody knew whether it would be agreed on; then it was, after it was given up.
    let late = stage.proposed.pop_front().unwrap();
    stage.happen(Event::Failed(late.clone()));
    stage.pass(100, &[]);
    assert_eq!(steps(&stage).len(), slices);
    stage.agree(late);
    stage.agree_next();
    assert!(stage.transits().iter().all(|transit| transit.step == Step::Releasing));
    stage.hand_over_all();
    assert_eq!(stage.slices_of(A), 0);
}

#[test]
fn whoever_was_to_take_and_leaves_gets_nothing() {
    for released in [false, true] {
        let (mut stage, slices) = draining();
        if released {
            let transits = stage.transits();
            transits.into_iter().for_each(|transit| stage.answer(transit));
            stage.agree_next();
            stage.agree_next();
        }
        stage.drain(B);
        let found = steps(&stage);
        assert_eq!(found.len(), slices);
        assert!(found.iter().all(|(_, act)| *act == Act::Abort), "{found:?}");
        stage.agree_next();
        assert_eq!((stage.transits().len(), stage.slices_of(A)), (0, slices));
        // There is nobody to give anything to, until somebody comes.
        assert_eq!(stage.proposed.len(), 0);
        let mut told = std::mem::take(&mut stage.drained);
        told.sort_unstable();
        assert_eq!(told, [A, B], "they need not wait for that");
        stage.register(3);
        stage.hand_over_all();
        assert_eq!((stage.slices_of(A), stage.slices_of(B)), (0, 0));
        stage.drained.sort_unstable();
        assert_eq!(stage.drained, [A, B]);
    }
}

#[test]
fn who_leaves_and_has_nothing_yet_is_not_done_while_something_comes() {
    let mut stage = Stage::new(1);
    let new = stage.register(2);
    assert!(matches!(stage.agree_next(), Command::Change { .. }));
    assert!(stage.transits().iter().all(|transit| transit.to == new));
    assert!(!stage.transits().is_empty());
    stage.drain(new);
    assert_eq!((stage.drained.len(), stage.assignment().has_nothing_for(new)), (0, false));
    stage.agree_next();
    assert_eq!((stage.transits().len(), stage.drained.as_slice()), (0, [new].as_slice()));
    assert!(stage.assignment().has_nothing_for(new) && !stage.assignment().has_nothing_for(A));
}

#[test]
fn who_left_stayed_and_leaves_again_hears_it_again() {
    let (mut stage, _) = draining();
    stage.hand_over_all();
    assert_eq!(stage.drained, [A]);
    stage.agree(Command::Undrain { job: kv(), session: A });
    stage.hand_over_all();
    assert!(stage.slices_of(A) > 0);
    stage.drain(A);
    stage.hand_over_all();
    assert_eq!(stage.drained, [A, A]);
}

#[test]
fn who_was_to_take_and_dies_is_replaced() {
    let mut stage = Stage::new(3);
    let slices = stage.slices_of(A);
    stage.drain(A);
    stage.agree_next();
    stage.smooth = true;
    stage.pass(5_100, &[B]);
    assert!(!stage.assignment().tasks.contains_key(&B));
    assert!(stage.transits().iter().all(|transit| transit.to == SessionId(3)));
    assert_eq!(stage.transits().len(), slices, "what was to go to it goes elsewhere");
    stage.smooth = false;
    stage.hand_over_all();
    assert_eq!((stage.slices_of(A), stage.drained.as_slice()), (0, [A].as_slice()));
}

#[test]
fn who_dies_while_its_slices_are_on_their_way_leaves_them_to_who_was_to_get_them() {
    let (mut stage, _) = draining();
    stage.smooth = true;
    stage.pass(5_049, &[A]);
    assert!(stage.slices_of(A) > 0);
    stage.pass(1, &[A]);
    assert_eq!(stage.transits().len(), 0);
    assert_eq!(stage.slices_of(B), stage.assignment().slices.count());
}

#[test]
fn a_new_leader_takes_up_what_it_finds() {
    let (mut stage, slices) = draining();
    let all = stage.transits();
    stage.answer(all[0]);
    stage.agree_next();
    stage.pass(4_000, &[]);
    stage.change_leader();
    assert_eq!(stage.proposed.len(), 0);
    // Each step has its time anew.
    stage.pass(5_049, &[]);
    assert_eq!(steps(&stage), []);
    stage.pass(1, &[]);
    assert_eq!(steps(&stage), [(all[0].id, Act::Lapsed)]);
    stage.agree_next();
    // What tasks had said to the one before they say again.
    stage.answer(all[1]);
    assert_eq!(steps(&stage), [(all[1].id, Act::Release)]);
    stage.agree_next();
    stage.pass(4_950, &[]);
    assert_eq!(steps(&stage).len(), slices - 2, "and the rest is not waited for for ever");
    stage.hand_over_all();
    assert_eq!(stage.slices_of(A), 0);
}

#[test]
fn slices_on_their_way_are_planned_for_where_they_go_and_not_touched() {
    let mut stage = Stage::new(2);
    stage.pass(11_000, &[]);
    stage.drain(A);
    stage.agree_next();
    let (moving, count) = (stage.transits().len(), stage.assignment().slices.count());
    stage.rounds.clear();
    // Somebody comes, whom nothing is given of what is on its way.
    let new = stage.register(3);
    let round = stage.rounds.last().expect("a task that has nothing is planned for");
    assert_eq!((round.moving.len(), round.assignment.of(A).count()), (moving, 0));
    assert_eq!(round.assignment.of(B).count(), count);
    let before = stage.transits();
    stage.agree_next();
    let after = stage.transits();
    assert!(before.iter().all(|transit| after.contains(transit)));
    assert!(after.iter().all(|transit| transit.to == B || transit.from == Some(B)));
    assert!(after.iter().any(|transit| transit.to == new));
}

#[test]
fn steps_of_hand_offs_are_not_planned_for() {
    let (mut stage, slices) = draining();
    stage.rounds.clear();
    // Each slice in a step of its own.
    for _ in 0..2 {
        for transit in stage.transits() {
            stage.answer(transit);
            stage.agree_next();
        }
    }
    assert_eq!(stage.slices_of(B), stage.assignment().slices.count());
    assert!(slices > 3 && stage.rounds.is_empty(), "{} plans", stage.rounds.len());
}

#[test]
fn a_round_that_a_step_overtook_is_made_soon() {
    let (mut stage, _) = draining();
    let transits = stage.transits();
    stage.answer(transits[0]);
    // The round's plan is being made while the step is agreed on.
    stage.now += Duration::from_secs(10);
    let mut out = Vec::new();
    stage.leader.tick(stage.now, &stage.state, &mut out);
    let round = out.into_iter().find_map(|action| match action {
        Action::Plan(round) => Some(round),
        _ => None,
    });
    let plan = balance::plan(&round.expect("it is time for a round"));
    stage.agree_next();
    stage.rounds.clear();
    stage.happen(Event::Planned { job: kv(), plan });
    assert_eq!(stage.rounds.len(), 0);
    stage.pass(100, &[]);
    assert_eq!(stage.rounds.len(), 1);
}
