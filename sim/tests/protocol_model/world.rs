//! Everything there is in one moment: the log, two leaders, two processes, what is on its way between them.
//!
//! Times are what is left of a wait, in units of the clock that counts it; so two moments that differ only in when they are
//! are one state, and the model needs no bound on time.

use std::hash::{Hash, Hasher};

use crate::agreed::{Agreed, Command, Generation, Session};

/// How many commands the log can hold beside what it begins with.
pub(crate) const LOG_MAX: usize = 10;
/// How many renewals of a process are on their way at most. A further one takes the place of the oldest: that one is lost.
pub(crate) const MAIL_MAX: usize = 1;

/// Everything there is in one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct World {
    pub(crate) clocks: Clocks,
    /// What was agreed on, by generation. What nobody can learn of any more is blanked.
    pub(crate) agreed: [Agreed; LOG_MAX],
    pub(crate) newest: Generation,
    /// Written and not committed.
    pub(crate) written: Option<Written>,
    /// The session that was minted last.
    pub(crate) minted: Session,
    /// Who leads in truth.
    pub(crate) leading: u8,
    pub(crate) leaders: [Leader; 2],
    pub(crate) processes: [Process; 2],
    /// Who acknowledged each hand-off's release: such a message may arrive at any time, any number of times.
    pub(crate) acknowledged: [Session; LOG_MAX],
    /// How often what can go wrong still may.
    pub(crate) left: Left,
    /// The greatest token so far, and whether a later owner got none greater.
    pub(crate) token: Generation,
    pub(crate) token_fell: bool,
}

/// How fast clocks go, in units a tick; a right one goes at 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Clocks {
    pub(crate) processes: u8,
    pub(crate) leaders: u8,
}

/// How often what can go wrong still may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Left {
    pub(crate) elections: u8,
    pub(crate) crashes: u8,
    pub(crate) restores: u8,
    /// How many sessions may be minted.
    pub(crate) sessions: u8,
}

/// A command that a leader has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Written {
    pub(crate) command: Command,
    /// By the leader before this one.
    pub(crate) inherited: bool,
}

/// What a leader knows beside the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Leader {
    /// It takes itself for the leader.
    pub(crate) believes: bool,
    /// What it has applied.
    pub(crate) applied: Generation,
    /// How long until a process's session counts as lapsed.
    pub(crate) wait: [u8; 2],
    /// Whom it has decided to end.
    pub(crate) ending: [Session; 2],
    /// How long until a release, or a hold-off, is over.
    pub(crate) due: u8,
}

/// A process, in one of its lives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Process {
    pub(crate) life: u8,
    pub(crate) session: Session,
    /// Its session that has stopped.
    pub(crate) stopped: Session,
    pub(crate) installed: Generation,
    /// What is left of its lease, and of its right to the slice.
    pub(crate) lease: u8,
    pub(crate) right: u8,
    /// A guard is out on a slice that is being released.
    pub(crate) guard: bool,
    /// It took a grant for leave to serve a slice that is being released: against the rules.
    pub(crate) reopened: bool,
    pub(crate) mail: [Renewal; MAIL_MAX],
}

/// A renewal on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Renewal {
    /// How much lease its grant is worth.
    pub(crate) worth: u8,
    pub(crate) stage: Stage,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) enum Stage {
    #[default]
    None,
    Sent,
    /// A leader has it.
    Waits {
        leader: u8,
    },
    /// The grant is on its way back, and says what its leader had applied.
    Granted {
        applied: Generation,
    },
}

/// What is blank in every world of this length tells none from another, and hashing is most of the work.
impl Hash for World {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Self { clocks, agreed, newest, written, minted, leading, leaders, processes, .. } =
            self;
        let blank = agreed.iter().position(|agreed| *agreed != Agreed::default());
        agreed[blank.unwrap_or_default()..=usize::from(*newest)].hash(state);
        (clocks, newest, written, minted, leading, leaders, processes).hash(state);
        (self.acknowledged, self.left, self.token, self.token_fell).hash(state);
    }
}

impl World {
    /// What is agreed on as of a generation.
    pub(crate) fn as_of(&self, generation: Generation) -> &Agreed {
        &self.agreed[usize::from(generation)]
    }

    /// What is agreed on now.
    pub(crate) fn now(&self) -> &Agreed {
        self.as_of(self.newest)
    }

    /// Whether a process believes that it may serve the slice.
    pub(crate) fn believes(&self, process: usize) -> bool {
        let it = &self.processes[process];
        let agreed = self.as_of(it.installed);
        let owns = it.session != 0 && agreed.owner == it.session;
        let open = agreed.releases(it.session).is_none() || it.reopened;
        owns && it.right > 0 && (open || it.guard)
    }
}
