//! What an operator nails to a task.

use super::*;

fn pin(first: u64, last: u64, task: &str) -> Command {
    let slice = Slice::new(SliceKey(first), SliceKey(last)).unwrap();
    Command::Pin { job: kv(), slice, task: task.parse().unwrap() }
}

fn pins(state: &State) -> String {
    let pin =
        |pin: &Pin| format!("{:x}-{:x} {}", pin.slice.first().0, pin.slice.last().0, pin.task);
    state.jobs[&kv()].pins.iter().map(pin).collect::<Vec<_>>().join(", ")
}

#[test]
fn pins_stay_in_order_and_apart_and_survive_their_task() {
    let mut state = with_job();
    let a = register(&mut state, info("a", 1, 1)).unwrap();
    register(&mut state, info("b", 2, 2)).unwrap();
    for command in [pin(10, 19, "a"), pin(30, 39, "b"), pin(20, 29, "a"), pin(0, 0, "b")] {
        state.apply(command).unwrap();
    }
    assert_eq!(pins(&state), "0-0 b, a-13 a, 14-1d a, 1e-27 b");
    for (command, message) in [
        (pin(5, 10, "a"), "overlaps 000000000000000a..0000000000000013, which is pinned to a"),
        (pin(39, 50, "a"), "overlaps 000000000000001e..0000000000000027, which is pinned to b"),
        (pin(12, 13, "a"), "overlaps 000000000000000a"),
        (pin(0, u64::MAX, "a"), "overlaps 0000000000000000..0000000000000000"),
        (pin(50, 59, "c"), "job kv has no task c: `mandoline task list`"),
    ] {
        let refused = refuse(&mut state, command).to_string();
        assert!(refused.contains(message), "{refused}");
    }
    // Exactly the same keys change their task.
    state.apply(pin(10, 19, "b")).unwrap();
    state.apply(Command::End { job: kv(), session: a, reason: EndReason::Lost }).unwrap();
    assert_eq!(pins(&state), "0-0 b, a-13 b, 14-1d a, 1e-27 b");
    let unpin = |last| {
        let slice = Slice::new(SliceKey(10), SliceKey(last)).unwrap();
        Command::Unpin { job: kv(), slice }
    };
    assert!(matches!(refuse(&mut state, unpin(18)), Refused::NoSuchPin { .. }));
    state.apply(unpin(19)).unwrap();
    assert_eq!(pins(&state), "0-0 b, 14-1d a, 1e-27 b");
}

#[test]
fn there_are_only_so_many_pins() {
    let mut state = with_job();
    register(&mut state, info("a", 1, 1)).unwrap();
    for key in 0..PINS_MAX as u64 {
        state.apply(pin(key, key, "a")).unwrap();
    }
    let more = refuse(&mut state, pin(u64::MAX, u64::MAX, "a"));
    assert!(matches!(more, Refused::Limit { max: PINS_MAX, .. }), "{more}");
    state.apply(pin(7, 7, "a")).unwrap();
}
