//! What is asked of a job, and how that changes.

use super::*;

#[test]
fn a_spec_is_changed_only_by_who_has_seen_it() {
    let mut state = with_job();
    let spec = JobSpec { band: Band::Adaptive(Ratio::percent(20)), ..JobSpec::new(kv()) };
    let blind = Command::ApplyJob { spec: spec.clone(), if_version: Some(0) };
    assert!(matches!(refuse(&mut state, blind), Refused::Version { version: 1, expected: 0, .. }));
    state.apply(Command::ApplyJob { spec: spec.clone(), if_version: Some(1) }).unwrap();
    assert_eq!(
        (state.jobs[&kv()].spec.band, state.jobs[&kv()].version),
        (Band::Adaptive(Ratio::percent(20)), 2)
    );
    let senseless = JobSpec { band: Band::Adaptive(Ratio::percent(0)), ..spec };
    let refused = refuse(&mut state, Command::ApplyJob { spec: senseless, if_version: None });
    assert!(matches!(refused, Refused::Spec(_)));
}

#[test]
fn a_job_stays_of_the_kind_that_it_was_made() {
    let mut state = with_job();
    let exclusive = JobSpec { consistency: Consistency::Exclusive, ..JobSpec::new(kv()) };
    let change = Command::ApplyJob { spec: exclusive.clone(), if_version: None };
    let refused = refuse(&mut state, change).to_string();
    assert!(refused.starts_with("job kv is affinity and cannot become exclusive: make another"));
    let other: JobName = "other".parse().unwrap();
    for spec in [
        JobSpec { name: other.clone(), ..exclusive.clone() },
        JobSpec { name: other.clone(), lease: Duration::from_secs(9), ..exclusive },
    ] {
        state.apply(Command::ApplyJob { spec, if_version: None }).unwrap();
    }
    assert_eq!(state.jobs[&other].spec.lease, Duration::from_secs(9));
    let back = Command::ApplyJob { spec: JobSpec::new(other), if_version: None };
    assert!(matches!(refuse(&mut state, back), Refused::Consistency { .. }));
}

#[test]
fn callers_hear_of_a_changed_cap_by_a_generation_of_its_own() {
    let mut state = State::default();
    let apply = |state: &mut State, percent: Option<u32>, band| {
        let spill = percent.map(|percent| Spill { cap: Ratio::percent(percent) });
        let spec =
            JobSpec { spill, band: Band::Adaptive(Ratio::percent(band)), ..JobSpec::new(kv()) };
        let applied = state.apply(Command::ApplyJob { spec, if_version: None }).unwrap();
        (applied.delta, state.jobs[&kv()].assignment.clone())
    };
    let (delta, first) = apply(&mut state, Some(115), 3);
    assert_eq!((delta, first.spill), (None, Some(Ratio::percent(115))), "a new job is told whole");
    let (delta, same) = apply(&mut state, Some(115), 9);
    assert_eq!((delta, same.generation), (None, first.generation), "callers need not know");
    let (delta, other) = apply(&mut state, Some(130), 9);
    assert_eq!(delta.unwrap().apply_to(&same), Ok((*other).clone()));
    assert_eq!(
        (other.spill, other.generation),
        (Some(Ratio::percent(130)), first.generation.next())
    );
    // What happens next keeps it, until it is taken back.
    register(&mut state, info("a", 1, 1)).unwrap();
    assert_eq!(state.jobs[&kv()].assignment.spill, other.spill);
    assert_eq!(apply(&mut state, None, 9).1.spill, None);
}

#[test]
fn a_job_is_frozen_until_it_is_not() {
    let mut state = with_job();
    for (command, frozen) in [
        (Command::Freeze { job: kv() }, true),
        (Command::Freeze { job: kv() }, true),
        (Command::ApplyJob { spec: JobSpec::new(kv()), if_version: None }, true),
        (Command::Unfreeze { job: kv() }, false),
    ] {
        state.apply(command).unwrap();
        assert_eq!(state.jobs[&kv()].frozen, frozen);
    }
    let other: JobName = "other".parse().unwrap();
    assert_eq!(
        refuse(&mut state, Command::Freeze { job: other.clone() }),
        Refused::NoSuchJob(other)
    );
}

#[test]
fn there_are_only_so_many_jobs() {
    let mut state = State::default();
    for number in 0..JOBS_MAX {
        let spec = JobSpec::new(format!("j{number}").parse().unwrap());
        state.apply(Command::ApplyJob { spec, if_version: None }).unwrap();
    }
    let one_more = Command::ApplyJob { spec: JobSpec::new(kv()), if_version: None };
    assert!(matches!(refuse(&mut state, one_more), Refused::Limit { max: JOBS_MAX, .. }));
}
