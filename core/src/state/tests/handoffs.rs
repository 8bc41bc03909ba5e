//! Hand-offs as transcripts: each way in which a slice on its way can go on, and what is refused meanwhile.

use super::transcript::{Scene, check, plan};
use super::*;

use Consistency::{Affinity, Exclusive};

#[test]
fn an_owner_is_asked_before_its_slice_is_anothers() {
    check(
        Exclusive,
        "a b c",
        "- -> a           | a@5 #5
         a -> b           | a@5 #5, preparing for b
         release          | a@5 #5, releasing for b
         acknowledged a   | b@6 #8
         b -> c           | b@6 #8, preparing for c
         release          | b@6 #8, releasing for c
         lapsed           | c@9 #11
         c -> a           | c@9 #11, preparing for a
         abort            | c@9 #11",
    );
}

#[test]
fn an_act_fits_the_step_that_it_needs_and_changes_nothing_elsewhere() {
    // What each act leads to: of no hand-off, of one that prepares, of one that releases.
    let owned = ["a@4 #4", "a@4 #4, preparing for b", "a@4 #4, releasing for b", "b@5 #7", "stale"];
    let [kept, _, releasing, given, stale] = owned;
    for (act, idle, preparing, released) in [
        ("release", stale, releasing, stale),
        ("acknowledged a", stale, stale, given),
        ("acknowledged b", stale, stale, stale),
        ("lapsed", stale, stale, given),
        ("switch", stale, stale, stale),
        ("abort", stale, kept, kept),
    ] {
        for (steps, expected) in [("", idle), ("a -> b", preparing), ("a -> b, release", released)]
        {
            let mut scene = Scene::new(Exclusive, "a b");
            scene.act("- -> a");
            steps
                .split(", ")
                .filter(|step| !step.is_empty())
                .for_each(|step| drop(scene.act(step)));
            assert_eq!(scene.act(act), expected, "{act} after {steps:?}");
        }
    }
}

#[test]
fn nobody_speaks_for_another_hand_off_than_the_one_that_is() {
    check(
        Exclusive,
        "a b",
        "- -> a                | a@4 #4
         a -> b                | a@4 #4, preparing for b
         release               | a@4 #4, releasing for b
         abort                 | a@4 #4
         acknowledged a        | stale
         a -> b                | a@4 #4, preparing for b
         acknowledged a of 5   | stale
         release of 5          | stale
         release               | a@4 #4, releasing for b
         acknowledged a of 5   | stale
         lapsed of 5           | stale
         abort of 5            | stale
         abort of 9            | stale
         acknowledged a        | b@8 #10
         acknowledged a        | stale
         lapsed                | stale
         abort                 | stale",
    );
}

#[test]
fn a_hand_off_goes_one_step_a_command() {
    // Who is told to release in the same breath in which its word is taken was never told.
    let mut scene = Scene::new(Exclusive, "a b");
    scene.act("- -> a");
    scene.act("a -> b");
    let id = scene.assignment().slices.value_at(0).transit.as_ref().unwrap().id;
    let by = scene.session("a");
    let steps = [Act::Release, Act::Acknowledged { by }, Act::Lapsed].map(|act| (id, act));
    let both = Command::HandOff { job: kv(), steps: steps.into() };
    assert_eq!(scene.apply(both), "a@4 #4, releasing for b");
}

#[test]
fn steps_that_are_stale_are_left_out_and_nothing_but_stale_ones_is_refused() {
    let mut scene = Scene::new(Exclusive, "a b");
    for line in ["- -> a", "split 80", "00: a -> b", "80: a -> b", "release of 6"] {
        scene.act(line);
    }
    let began = |number| Generation { incarnation: 1, number };
    let [low, high] = [0, 1 << 63].map(SliceKey);
    let hand_off = |steps: &[(u64, SliceKey, Act)]| {
        let steps = steps
            .iter()
            .map(|(number, first, act)| (HandOffId { began: began(*number), first: *first }, *act));
        Command::HandOff { job: kv(), steps: steps.collect() }
    };
    let by = scene.session("a");
    let some =
        [(6, low, Act::Acknowledged { by }), (6, high, Act::Release), (7, high, Act::Release)];
    assert_eq!(scene.apply(hand_off(&some)), "00: b@6 #9; 80: a@4 #4, releasing for b");
    assert_eq!(scene.apply(hand_off(&some)), "stale");
    // The middle of a slice, or the first key of another one, is no hand-off.
    assert_eq!(scene.apply(hand_off(&[(7, SliceKey(9), Act::Abort)])), "stale");
    assert_eq!(scene.apply(hand_off(&[(7, low, Act::Abort)])), "stale");
    assert_eq!(scene.apply(hand_off(&[])), "00: b@6 #9; 80: a@4 #4, releasing for b");
}

#[test]
fn a_slice_in_hand_off_is_not_cut_joined_or_moved() {
    for step in ["a -> b", "release"] {
        let mut scene = Scene::new(Exclusive, "a b c");
        for line in ["- -> a", "a -> b", step] {
            scene.act(line);
        }
        for line in ["split 80", "a -> c", "a -> b", "- -> c"] {
            let refused = scene.act(line);
            assert!(refused.contains("..ffffffffffffffff: it is in hand-off"), "{line}: {refused}");
        }
    }
    check(
        Exclusive,
        "a b",
        "- -> a       | a@4 #4
         split 80     | 00: a@4 #4; 80: a@4 #4
         80: a -> b   | 00: a@4 #4; 80: a@4 #4, preparing for b
         merge        | no 8000000000000000..ffffffffffffffff: it is in hand-off
         split 40     | 00: a@4 #4; 40: a@4 #4; 80: a@4 #4, preparing for b
         merge        | no it is in hand-off
         abort of 6   | stale",
    );
}

#[test]
fn several_splits_at_once_do_not_cut_a_slice_in_hand_off_either() {
    let mut scene = Scene::new(Exclusive, "a b");
    for line in ["- -> a", "split 80", "80: a -> b"] {
        scene.act(line);
    }
    let split = |at| Edit::Split { at: SliceKey(at), low: Load::ZERO };
    let base = scene.assignment().generation;
    let refused = scene.apply(plan(base, vec![split(9), split(1 << 63 | 9)]));
    assert!(refused.contains("it is in hand-off"), "{refused}");
}

#[test]
fn an_owner_is_not_left_with_what_nobody_takes() {
    check(
        Exclusive,
        "a b",
        "- -> a   | a@4 #4
         a -> -   | no cannot take 0000000000000000..ffffffffffffffff from its owner
         - -> b   | no its replicas are not as the move expects",
    );
}

#[test]
fn whoever_ends_while_its_slice_is_on_its_way_gives_it_at_once() {
    for steps in ["a -> b", "a -> b, release"] {
        for (ends, expected) in [("end a", "b@5"), ("again a", "b@5"), ("end b", "a@4 #4")] {
            let mut scene = Scene::new(Exclusive, "a b");
            scene.act("- -> a");
            steps.split(", ").for_each(|step| drop(scene.act(step)));
            let found = scene.act(ends);
            let stays = found.starts_with(expected) && !found.contains("for");
            assert!(stays, "{ends} after {steps}: {found}");
        }
    }
    check(
        Exclusive,
        "a b c",
        "- -> a           | a@5 #5
         a -> b           | a@5 #5, preparing for b
         release          | a@5 #5, releasing for b
         end b            | a@5 #5
         acknowledged a   | stale
         end a            | - #9",
    );
}

#[test]
fn what_is_on_its_way_does_not_wait_for_who_had_it() {
    for kind in [Affinity, Exclusive] {
        let mut scene = Scene::new(kind, "a b+");
        let grace = Duration::from_secs(30);
        let spec = JobSpec { grace, consistency: kind, ..JobSpec::new(kv()) };
        scene.apply(Command::ApplyJob { spec, if_version: None });
        scene.act("- -> a");
        scene.act("a -> b");
        assert_eq!(scene.act("end a"), "b@5 #6", "{kind}");
        assert_eq!(scene.act("join a"), "b@5 #6", "{kind}: it is another's");
    }
}

#[test]
fn who_leaves_is_given_nothing_by_the_end_of_another() {
    check(
        Exclusive,
        "a b c",
        "- -> a    | a@5 #5
         a -> b    | a@5 #5, preparing for b
         drain b   | a@5 #5, preparing for b
         end a     | - #8",
    );
    check(
        Exclusive,
        "a b c",
        "- -> a    | a@5 #5
         a -> b    | a@5 #5, preparing for b
         end a     | b@6 #7
         end b     | - #8
         - -> c    | c@9 #9",
    );
}

#[test]
fn slices_are_joined_only_where_nobody_could_tell_the_difference() {
    check(
        Exclusive,
        "a b",
        "- -> a           | a@4 #4
         split 80         | 00: a@4 #4; 80: a@4 #4
         merge            | a@4 #4
         split 80         | 00: a@4 #4; 80: a@4 #4
         80: a -> b       | 00: a@4 #4; 80: a@4 #4, preparing for b
         end b            | 00: a@4 #4; 80: a@4 #4
         merge            | a@4 #4",
    );
    // The same owner, but not since the same change; or by tokens of its own.
    let mut scene = Scene::new(Exclusive, "a b");
    for line in ["- -> a", "split 80", "00: a -> b", "release", "acknowledged a"] {
        scene.act(line);
    }
    let high =
        HandOffId { began: Generation { incarnation: 1, number: 9 }, first: SliceKey(1 << 63) };
    let by = scene.session("a");
    assert_eq!(scene.act("80: a -> b"), "00: b@6 #8; 80: a@4 #4, preparing for b");
    for act in [Act::Release, Act::Acknowledged { by }] {
        scene.apply(Command::HandOff { job: kv(), steps: vec![(high, act)] });
    }
    let refused = scene.act("merge");
    assert!(refused.contains("not made of whole slices that the same tasks serve"), "{refused}");
}

#[test]
fn what_was_handed_over_together_but_not_at_once_stays_apart() {
    let mut scene = Scene::new(Exclusive, "a b");
    scene.act("- -> a");
    scene.act("split 80");
    let (low, high) = Slice::FULL.split_at(SliceKey(1 << 63)).unwrap();
    let (from, to, none) = (Some(scene.session("a")), Some(scene.session("b")), Load::ZERO);
    let step = |slice| {
        let reason = Reason::Load;
        Edit::Move(Move { slice, from, to, reason, load: none, before: none, after: none })
    };
    let base = scene.assignment().generation;
    scene.apply(plan(base, vec![step(low), step(high)]));
    let id = |slice: Slice| HandOffId { began: base.next(), first: slice.first() };
    let hand_off = |steps| Command::HandOff { job: kv(), steps };
    scene.apply(hand_off(vec![(id(low), Act::Release), (id(high), Act::Release)]));
    scene.apply(hand_off(vec![(id(low), Act::Lapsed)]));
    let found = scene.apply(hand_off(vec![(id(high), Act::Lapsed)]));
    assert_eq!(found, "00: b@6 #8; 80: b@6 #9");
    let refused = scene.act("merge");
    assert!(refused.contains("the same tasks serve"), "{refused}");
}

#[test]
fn callers_of_an_affinity_job_stay_until_who_prepares_is_ready() {
    check(
        Affinity,
        "a b+ c",
        "- -> a           | a@5 #5
         a -> b          | a@5 #5, preparing for b
         release          | stale
         acknowledged a   | stale
         lapsed           | stale
         switch           | b@6 #7
         switch           | stale
         b  -> c          | c@8 #8
         c -> b          | c@8 #8, preparing for b
         abort            | c@8 #8",
    );
    // There is nobody to stay with.
    check(Affinity, "b+", "- -> b | b@3 #3");
}

#[test]
fn a_job_that_does_not_wait_moves_at_once() {
    let mut scene = Scene::new(Affinity, "a b+");
    let spec = JobSpec { prepare_within: Duration::ZERO, ..JobSpec::new(kv()) };
    scene.apply(Command::ApplyJob { spec, if_version: None });
    scene.act("- -> a");
    assert_eq!(scene.act("a -> b"), "b@5 #5");
}

#[test]
fn replicas_come_and_go_round_one_that_is_on_its_way() {
    check(
        Affinity,
        "a b c+ d",
        "- -> a     | a@6 #6
         - -> b     | a@6 b@7 #7
         a -> c    | a@6 b@7 #7, preparing for c
         - -> d     | no it is in hand-off
         end b      | a@6 #9, preparing for c
         switch     | c@8 #10
         end c      | - #11",
    );
    // A replica that is added: it has nobody's place until the last of the others ends.
    check(
        Affinity,
        "a b c+",
        "- -> a     | a@5 #5
         - -> b     | a@5 b@6 #6
         - -> c    | a@5 b@6 #6, preparing for c
         end a      | b@6 #8, preparing for c
         end b      | c@7 #9",
    );
    check(
        Affinity,
        "a c+",
        "- -> a     | a@4 #4
         - -> c    | a@4 #4, preparing for c
         switch     | a@4 c@5 #6",
    );
    check(
        Affinity,
        "a c+",
        "- -> a     | a@4 #4
         - -> c    | a@4 #4, preparing for c
         drain c    | a@4 #4, preparing for c
         end a      | - #7",
    );
}

#[test]
fn an_owner_that_lapsed_speaks_for_itself_and_nobody_else_does() {
    let mut scene = Scene::new(Exclusive, "a b");
    scene.act("- -> a");
    let old = scene.session("a");
    let other_process = Command::Register { job: kv(), info: info("a", 1, 1), stopped: Some(old) };
    let refused = scene.apply(other_process);
    assert!(refused.contains("task a lives at h:97 as s1"), "{refused}");
    // Its own process does, and begins with nothing.
    assert_eq!(scene.act("again a"), "- #5");
    assert_ne!(scene.session("a"), old);
    // Said twice, as whoever heard no answer does, it is said once.
    let (new, state) = (scene.session("a"), scene.state.clone());
    let once_more = Command::Register {
        job: kv(),
        info: state.jobs[&kv()].assignment.tasks[&new].info.clone(),
        stopped: Some(old),
    };
    scene.apply(once_more);
    assert_eq!((scene.session("a"), &scene.state), (new, &state));
}

#[test]
fn a_lease_is_fixed_when_its_task_registers() {
    let mut scene = Scene::new(Exclusive, "a");
    let spec =
        JobSpec { consistency: Exclusive, lease: Duration::from_secs(30), ..JobSpec::new(kv()) };
    scene.apply(Command::ApplyJob { spec, if_version: None });
    scene.act("join b");
    let lease = |name: &str| scene.assignment().tasks[&scene.session(name)].lease.unwrap();
    assert_eq!((lease("a").as_secs(), lease("b").as_secs()), (5, 30));
    let affinity = Scene::new(Affinity, "a");
    assert_eq!(affinity.assignment().tasks[&affinity.session("a")].lease, None);
}
