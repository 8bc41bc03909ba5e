//! The lease and hand-off protocol of `docs/protocol.md` as a model, of which every state that can be reached is looked at.
//!
//! Two leaders in turn, two processes, one slice. Messages are lost, late, out of order and, as far as that can matter, doubled;
//! clocks go a fifth wrong, either way, and margins are as much, so that a lease of 2 or 3 ticks shows what 1 % of 5 s would.
//! Times are kept as what is left of them, so nothing bounds how long a run goes on. Bounded are the log, elections, crashes,
//! restores and new sessions (`SCENARIOS`); one renewal of each process is on its way at a time, and one command is written and
//! not committed. Without any one of its rules the model must go wrong (`MUTANTS`): that shows that it could have.
//!
//! The machines of `core` walk the paths of the model: on those of the whole model they must see what it sees, and on those that
//! go wrong they must refuse a step.

mod rule;
mod agreed;
mod world;
mod model;
mod replay;

use std::collections::BTreeMap;

use mandoline_core::prng::Prng;
use stateright::{Checker, HasDiscoveries, Model, Path};

use crate::agreed::{Command, Rules};
use crate::model::{
    ABORTED, ACKNOWLEDGED, Act, CLOCKS, LAPSED, ONE_OWNER, Protocol, RETURNED, TAKEN_OVER,
    TOKENS_GROW,
};
use crate::replay::{Refusal, Replay};
use crate::rule::{RULES, Rule};
use crate::world::{Left, World};

/// What may go wrong, and how often.
#[derive(Clone, Copy, Debug)]
struct Scenario {
    name: &'static str,
    /// The last generation; the first is 1.
    log: u8,
    /// In ticks.
    lease: u8,
    left: Left,
    /// The first process has the slice and a session, and has asked for no lease yet.
    fresh: bool,
    /// The second process is the first one's successor.
    one_name: bool,
    /// What must be possible in it.
    reaches: &'static [&'static str],
}

const NOTHING: Left = Left { elections: 0, crashes: 0, restores: 0, sessions: 0 };

const SCENARIOS: [Scenario; 8] = [
    Scenario {
        name: "the slice goes and comes back",
        log: 7,
        lease: 2,
        left: NOTHING,
        fresh: false,
        one_name: false,
        reaches: &[ACKNOWLEDGED, LAPSED, ABORTED, TAKEN_OVER, RETURNED],
    },
    Scenario {
        name: "a hand-off under two leaders",
        log: 5,
        lease: 2,
        left: Left { elections: 1, ..NOTHING },
        fresh: false,
        one_name: false,
        reaches: &[ACKNOWLEDGED, LAPSED, ABORTED, TAKEN_OVER],
    },
    Scenario {
        name: "a session that has asked for nothing yet",
        log: 3,
        lease: 2,
        left: Left { elections: 1, ..NOTHING },
        fresh: true,
        one_name: false,
        reaches: &[ABORTED, TAKEN_OVER],
    },
    Scenario {
        name: "three terms of two leaders",
        log: 4,
        lease: 2,
        left: Left { elections: 2, sessions: 1, ..NOTHING },
        fresh: false,
        one_name: false,
        reaches: &[ACKNOWLEDGED, LAPSED, ABORTED, TAKEN_OVER],
    },
    Scenario {
        name: "a longer lease",
        log: 4,
        lease: 3,
        left: Left { elections: 1, ..NOTHING },
        fresh: false,
        one_name: false,
        reaches: &[ACKNOWLEDGED, LAPSED, ABORTED, TAKEN_OVER],
    },
    Scenario {
        name: "a process dies and is back",
        log: 4,
        lease: 2,
        left: Left { crashes: 1, sessions: 1, ..NOTHING },
        fresh: false,
        one_name: false,
        reaches: &[ACKNOWLEDGED, LAPSED, ABORTED, TAKEN_OVER],
    },
    Scenario {
        name: "a successor of the same name",
        log: 5,
        lease: 2,
        left: Left { elections: 1, sessions: 2, ..NOTHING },
        fresh: false,
        one_name: true,
        reaches: &[TAKEN_OVER],
    },
    Scenario {
        name: "a restored cluster",
        log: 5,
        lease: 2,
        left: Left { restores: 1, sessions: 1, ..NOTHING },
        fresh: false,
        one_name: false,
        reaches: &[ACKNOWLEDGED, LAPSED, ABORTED, TAKEN_OVER],
    },
];

/// Each rule, with the log and what else it takes to see that it is needed, and how the real machines keep to it.
const MUTANTS: [(Rule, u8, Left, Refusal); 20] = [
    (Rule::DriftMargin, 3, NOTHING, Refusal::NotBelieved),
    (Rule::CountFromSend, 3, NOTHING, Refusal::NotBelieved),
    (Rule::ConfirmedGrant, 3, Left { elections: 1, ..NOTHING }, Refusal::NotGranted),
    (Rule::NewLeaderWaits, 3, Left { elections: 1, ..NOTHING }, Refusal::NotOver),
    (Rule::EachTermAnew, 3, Left { elections: 2, ..NOTHING }, Refusal::NotOver),
    (Rule::NoGrantAfterEnd, 3, NOTHING, Refusal::NotGranted),
    (Rule::EndInItsTerm, 3, Left { elections: 2, ..NOTHING }, Refusal::AnotherTerm),
    (Rule::LapseForGood, 3, Left { sessions: 1, ..NOTHING }, Refusal::NothingToAskFor),
    (Rule::SameProcess, 3, Left { sessions: 1, ..NOTHING }, Refusal::NotApplied),
    (Rule::InstallFirst, 4, NOTHING, Refusal::NotBelieved),
    (Rule::ReleaseEndsRight, 4, NOTHING, Refusal::NotBelieved),
    (Rule::GrantGivesNothing, 4, NOTHING, Refusal::NotBelieved),
    (Rule::GuardsFirst, 4, NOTHING, Refusal::NotReleased),
    (Rule::LapseWaits, 4, NOTHING, Refusal::NotProposed),
    (Rule::NoOneInstead, 3, NOTHING, Refusal::NotApplied),
    (Rule::AckNamesHandOff, 7, NOTHING, Refusal::NotProposed),
    (Rule::AckEndsWithAbort, 5, NOTHING, Refusal::NotProposed),
    (Rule::TokenGrows, 4, NOTHING, Refusal::NotAgreed),
    (Rule::HoldOff, 5, Left { restores: 1, sessions: 1, ..NOTHING }, Refusal::NotProposed),
    (
        Rule::FreshSessions,
        5,
        Left { restores: 1, crashes: 1, sessions: 1, ..NOTHING },
        Refusal::NotGranted,
    ),
];

impl Scenario {
    fn protocol(&self) -> Protocol {
        let Self { log, lease, left, fresh, one_name, .. } = *self;
        let rules = Rules { without: None, one_name };
        Protocol { rules, left, log, lease, clocks: &CLOCKS, fresh }
    }
}

/// Walks a path with the real machines. Says which act they refused, and why.
fn replay(protocol: &Protocol, path: Path<World, Act>) -> Result<(), (Act, Refusal)> {
    let steps = path.into_vec();
    let mut replay = Replay::new(protocol, &steps[0].0);
    for pair in steps.windows(2) {
        let (before, after) = (&pair[0].0, &pair[1].0);
        let act = pair[0].1.expect("each state but the last has a next");
        replay.step(before, act, after).map_err(|refusal| (act, refusal))?;
    }
    Ok(())
}

/// How many paths are walked by chance, over more than can be looked at whole.
const WALKS: u64 = 2_000;
/// How long each is: by then the log is full.
const WALK_STEPS: usize = 120;

#[test]
fn no_two_own_a_slice_whatever_goes_wrong() {
    for scenario in SCENARIOS {
        let Scenario { name, reaches, lease, .. } = scenario;
        let protocol = scenario.protocol();
        let checker = protocol.clone().checker().threads(2).spawn_bfs().join();
        let (states, steps) = (checker.unique_state_count(), checker.max_depth());
        println!("{name}: {states} states, {steps} steps deep");
        for wrong in [ONE_OWNER, TOKENS_GROW] {
            if let Some(path) = checker.discovery(wrong) {
                panic!("{name}: not so: {wrong}: {:#?}", path.into_actions());
            }
        }
        for possible in reaches {
            let path = checker.discovery(possible);
            let path = path.unwrap_or_else(|| panic!("{name}: not found: {possible}"));
            if lease == 2 {
                assert_eq!(replay(&protocol, path), Ok(()), "{name}: {possible}");
            }
        }
    }
}

/// Draws what happens next: what sets everybody back is drawn less often, or nothing would ever be done.
fn draw(prng: &mut Prng, acts: &[Act]) -> Act {
    let mut act = acts[0];
    for _ in 0..4 {
        act = acts[prng.below(acts.len() as u64) as usize];
        let sets_back = matches!(
            act,
            Act::Tick
                | Act::Elect { .. }
                | Act::Crash { .. }
                | Act::Restore
                | Act::Write(Command::Abort { .. } | Command::End { .. })
        );
        if !sets_back {
            break;
        }
    }
    act
}

#[test]
fn the_real_machines_see_on_every_path_what_the_model_sees() {
    let left = Left { elections: 3, crashes: 2, restores: 1, sessions: 5 };
    let mut happened: BTreeMap<String, usize> = BTreeMap::new();
    for seed in 0..WALKS {
        let mut prng = Prng::new(seed);
        let (one_name, fresh) = (prng.below(4) == 0, prng.below(2) == 0);
        let rules = Rules { without: None, one_name };
        let protocol = Protocol { rules, left, log: 9, lease: 2, clocks: &CLOCKS, fresh };
        let mut begins = protocol.init_states();
        let mut world = begins.swap_remove(prng.below(begins.len() as u64) as usize);
        let mut replay = Replay::new(&protocol, &world);
        let mut path = Vec::new();
        for _ in 0..WALK_STEPS {
            let mut acts = Vec::new();
            protocol.actions(&world, &mut acts);
            let act = draw(&mut prng, &acts);
            let next = protocol.next_state(&world, act).expect("it is possible");
            path.push(act);
            if let Err(refusal) = replay.step(&world, act, &next) {
                panic!("seed {seed}: {refusal:?} at the last of {path:#?}");
            }
            world = next;
            let name = format!("{act:?}");
            let name = name.split([' ', '{']).next().unwrap_or_default();
            *happened.entry(name.to_owned()).or_default() += 1;
        }
    }
    println!("{happened:?}");
    let all = [
        "Tick",
        "Send",
        "Arrive",
        "Grant",
        "Take",
        "Install",
        "Finish",
        "Acknowledge",
        "Join",
        "Dismiss",
        "Crash",
        "Decide",
        "Write(Register",
        "Write(End",
        "Write(Assign",
        "Write(Prepare",
        "Write(Release",
        "Write(Acknowledged",
        "Write(Lapsed",
        "Write(Abort",
        "Write(Settle)",
        "Commit",
        "Elect",
        "Restore",
    ];
    for act in all {
        assert!(happened.get(act).is_some_and(|times| *times >= 20), "{act} hardly ever happens");
    }
}

#[test]
fn without_any_one_of_its_rules_the_protocol_fails_and_the_real_machines_refuse() {
    assert_eq!(MUTANTS.map(|(rule, ..)| rule), RULES);
    for (rule, log, left, refusal) in MUTANTS {
        let rules = Rules { without: Some(rule), one_name: rule == Rule::SameProcess };
        // A session that had a lease has lapsed for good when its end is decided; one that never had any can still be granted one.
        let fresh = matches!(rule, Rule::NoGrantAfterEnd | Rule::CountFromSend);
        let protocol = Protocol { rules, left, log, lease: 2, clocks: &CLOCKS[..1], fresh };
        let any = HasDiscoveries::AnyFailures;
        let checker = protocol.clone().checker().finish_when(any).spawn_bfs().join();
        let wrong = if rule == Rule::TokenGrows { TOKENS_GROW } else { ONE_OWNER };
        let path = checker.discovery(wrong);
        let path = path.unwrap_or_else(|| panic!("without {rule:?} nothing goes wrong"));
        let refused = replay(&protocol, path);
        println!("without {rule:?}: {} states, {refused:?}", checker.unique_state_count());
        assert_eq!(refused.map_err(|(_, why)| why), Err(refusal), "without {rule:?}");
    }
}
