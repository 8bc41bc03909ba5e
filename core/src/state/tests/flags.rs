//! Pauses in the log: minted once, ended, taken away, and never those of a cluster before.

use super::*;
use crate::flags::{AtEnd, LASTS_MAX, RELEASE_MAX, Scope, ScopeError};

fn order(job: Option<&str>) -> PauseOrder {
    let job = job.map(|job| job.parse().unwrap());
    PauseOrder {
        scope: Scope { job, path: Some("/carts".into()), ..Scope::default() },
        why: "schema change".into(),
        lasts: Duration::from_secs(30),
        at_end: AtEnd::GoOn,
        release_over: Duration::from_secs(10),
    }
}

fn add(state: &mut State) -> PauseId {
    let applied = state.apply(Command::AddPause { order: order(Some("kv")) }).unwrap();
    let Outcome::Pause(id) = applied.outcome else { panic!("{applied:?}") };
    id
}

fn shown(state: &State) -> String {
    let pauses = state.flags.pauses.values();
    let pauses = pauses.map(|pause| format!(" {} {:?}", pause.id, pause.phase));
    state.flags.version.to_string() + &pauses.collect::<String>()
}

#[test]
fn a_pause_is_added_ended_and_taken_away() {
    let mut state = with_job();
    assert_eq!(shown(&state), "1.0");
    let (first, second) = (add(&mut state), add(&mut state));
    assert_eq!(shown(&state), "1.2 p1 Holding p2 Holding");
    let end = |id, seconds| Command::EndPause { id, over: Duration::from_secs(seconds) };
    state.apply(end(first, 10)).unwrap();
    assert_eq!(shown(&state), "1.3 p1 Releasing { over: 10s } p2 Holding");
    state.apply(end(first, 10)).unwrap();
    assert_eq!(state.flags.version.number, 3, "nothing has changed by that");
    state.apply(end(first, 0)).unwrap();
    assert_eq!(shown(&state), "1.4 p1 Releasing { over: 0ns } p2 Holding");
    state.apply(Command::ClearPause { id: second }).unwrap();
    state.apply(Command::ClearPause { id: first }).unwrap();
    assert_eq!(shown(&state), "1.6");
    assert_eq!(add(&mut state), PauseId(3), "an id is given once");
}

#[test]
fn pauses_that_make_no_sense_and_unknown_ids_are_refused() {
    let mut state = with_job();
    let mut check = |order: PauseOrder, error: &Refused| {
        assert_eq!(refuse(&mut state, Command::AddPause { order }), *error);
    };
    check(order(Some("other")), &Refused::NoSuchJob("other".parse().unwrap()));
    let everything = PauseOrder { scope: Scope::default(), ..order(None) };
    check(everything, &Refused::Pause(ScopeError::Empty.into()));
    for lasts in [Duration::ZERO, LASTS_MAX * 2] {
        let endless = PauseOrder { lasts, ..order(None) };
        check(endless, &Refused::Pause(PauseError::Lasts(lasts)));
    }
    let id = add(&mut state);
    let over = RELEASE_MAX * 2;
    let refused = refuse(&mut state, Command::EndPause { id, over });
    assert_eq!(refused, Refused::Pause(PauseError::Release(over)));
    let id = PauseId(2);
    let over = Duration::ZERO;
    assert_eq!(refuse(&mut state, Command::EndPause { id, over }), Refused::NoSuchPause(id));
    assert_eq!(refuse(&mut state, Command::ClearPause { id }), Refused::NoSuchPause(id));
}

#[test]
fn there_are_so_many_pauses_and_no_more() {
    let mut state = with_job();
    for _ in 0..PAUSES_MAX {
        add(&mut state);
    }
    let full = Refused::Limit { what: "pauses of a cluster", max: PAUSES_MAX };
    assert_eq!(refuse(&mut state, Command::AddPause { order: order(None) }), full);
    state.apply(Command::ClearPause { id: PauseId(5) }).unwrap();
    add(&mut state);
}

#[test]
fn a_cluster_that_is_founded_or_restored_has_newer_flags_than_any_before() {
    let mut state = with_job();
    add(&mut state);
    let found = Command::FoundCluster { id: ClusterId(7), nodes: 1, incarnation: 9 };
    state.apply(found).unwrap();
    assert_eq!(shown(&state), "9.1 p1 Holding");
    let mut restored = state.restored(ClusterId(8), 12);
    assert_eq!(shown(&restored), "12.0", "its pauses are long over");
    assert!(add(&mut restored) > PauseId(1 << 31), "the cluster before has minted more");
}
