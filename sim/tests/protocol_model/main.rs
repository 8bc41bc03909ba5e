//! The lease and hand-off protocol of `docs/protocol.md` as a model, of which every state that can be reached is looked at.
//!
//! Two leaders in turn, two processes, one slice. Messages are lost, late, out of order and, as far as that can matter, doubled;
//! clocks go a fifth wrong, either way, and margins are as much, so that a lease of 2 or 3 ticks shows what 1 % of 5 s would.
//! Times are kept as what is left of them, so nothing bounds how long a run goes on. Bounded are the log, elections, crashes,
//! restores and new sessions (`SCENARIOS`); one renewal of each process is on its way at a time, and one command is written and
//! not committed. Without any one of its rules the model must go wrong (`MUTANTS`): that shows that it could have.

mod rule;
mod agreed;
mod world;
mod model;

use stateright::{Checker, HasDiscoveries, Model};

use crate::agreed::Rules;
use crate::model::{
    ABORTED, ACKNOWLEDGED, CLOCKS, LAPSED, ONE_OWNER, Protocol, RETURNED, TAKEN_OVER, TOKENS_GROW,
};
use crate::rule::{RULES, Rule};
use crate::world::Left;

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

/// Each rule, with what it takes to see that it is needed.
const MUTANTS: [(Rule, u8, Left); 19] = [
    (Rule::DriftMargin, 3, NOTHING),
    (Rule::CountFromSend, 3, NOTHING),
    (Rule::ConfirmedGrant, 3, Left { elections: 1, ..NOTHING }),
    (Rule::NewLeaderWaits, 3, Left { elections: 1, ..NOTHING }),
    (Rule::EachTermAnew, 3, Left { elections: 2, ..NOTHING }),
    (Rule::NoGrantAfterEnd, 3, NOTHING),
    (Rule::EndInItsTerm, 3, Left { elections: 2, ..NOTHING }),
    (Rule::LapseForGood, 3, Left { sessions: 1, ..NOTHING }),
    (Rule::SameProcess, 3, Left { sessions: 1, ..NOTHING }),
    (Rule::InstallFirst, 4, NOTHING),
    (Rule::ReleaseEndsRight, 4, NOTHING),
    (Rule::GrantGivesNothing, 4, NOTHING),
    (Rule::GuardsFirst, 4, NOTHING),
    (Rule::LapseWaits, 4, NOTHING),
    (Rule::AckNamesHandOff, 7, NOTHING),
    (Rule::AckEndsWithAbort, 5, NOTHING),
    (Rule::TokenGrows, 4, NOTHING),
    (Rule::HoldOff, 5, Left { restores: 1, sessions: 1, ..NOTHING }),
    (Rule::FreshSessions, 5, Left { restores: 1, crashes: 1, sessions: 1, ..NOTHING }),
];

#[test]
fn no_two_own_a_slice_whatever_goes_wrong() {
    for Scenario { name, log, lease, left, fresh, one_name, reaches } in SCENARIOS {
        let protocol = Protocol {
            rules: Rules { without: None, one_name },
            left,
            log,
            lease,
            clocks: &CLOCKS,
            fresh,
        };
        let checker = protocol.checker().threads(2).spawn_bfs().join();
        println!(
            "{name}: {} states, {} steps deep",
            checker.unique_state_count(),
            checker.max_depth()
        );
        for wrong in [ONE_OWNER, TOKENS_GROW] {
            if let Some(path) = checker.discovery(wrong) {
                panic!("{name}: not so: {wrong}: {:#?}", path.into_actions());
            }
        }
        for possible in reaches {
            assert!(checker.discovery(possible).is_some(), "{name}: not found: {possible}");
        }
    }
}

#[test]
fn without_any_one_of_its_rules_the_protocol_fails() {
    assert_eq!(MUTANTS.map(|(rule, ..)| rule), RULES);
    for (rule, log, left) in MUTANTS {
        let rules = Rules { without: Some(rule), one_name: rule == Rule::SameProcess };
        // A session that had a lease has lapsed for good when its end is decided; one that never had any can still be granted one.
        let fresh = matches!(rule, Rule::NoGrantAfterEnd | Rule::CountFromSend);
        let protocol = Protocol { rules, left, log, lease: 2, clocks: &CLOCKS[..1], fresh };
        let checker =
            protocol.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
        println!("without {rule:?}: {} states", checker.unique_state_count());
        let expected = if rule == Rule::TokenGrows { TOKENS_GROW } else { ONE_OWNER };
        assert!(checker.discovery(expected).is_some(), "without {rule:?} nothing goes wrong");
    }
}
