//! What the log's commands make of the state: the model's `State::apply`, for one slice and two processes.

use crate::rule::Rule;

/// A generation; also what a token and a hand-off's id are. Zero is none.
pub(crate) type Generation = u8;
/// A session. Zero is none.
pub(crate) type Session = u8;

/// What is agreed on as of one generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Agreed {
    /// The living session of each process, and in which of its lives it got that.
    pub(crate) live: [Living; 2],
    /// Who has the slice.
    pub(crate) owner: Session,
    /// Since which generation.
    pub(crate) token: Generation,
    pub(crate) transit: Option<Transit>,
    /// A restored cluster has not waited yet: the slice gets no owner.
    pub(crate) holds_off: bool,
}

/// A session that has not ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Living {
    pub(crate) session: Session,
    /// Which life of the process: the number that it drew.
    pub(crate) life: u8,
}

/// The slice's way to its next owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Transit {
    pub(crate) id: Generation,
    pub(crate) to: Session,
    pub(crate) releasing: bool,
}

/// What the log holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Command {
    /// A process asks for a session, and may say that one of its own has stopped.
    Register {
        process: u8,
        life: u8,
        stopped: Session,
    },
    End {
        session: Session,
    },
    /// The planner gives a slice that nobody has.
    Assign {
        to: Session,
    },
    /// The planner takes it from its owner, and gives it to nobody.
    Unassign,
    /// The planner moves it.
    Prepare {
        to: Session,
    },
    Release {
        id: Generation,
    },
    Acknowledged {
        id: Generation,
        by: Session,
    },
    Lapsed {
        id: Generation,
    },
    Abort {
        id: Generation,
    },
    /// A restored cluster has waited.
    Settle,
}

impl Agreed {
    /// The slice is being released by `session`.
    pub(crate) fn releases(&self, session: Session) -> Option<Transit> {
        self.transit.filter(|transit| transit.releasing && self.owner == session)
    }

    /// The process whose session this is.
    pub(crate) fn process(&self, session: Session) -> Option<usize> {
        self.live.iter().position(|living| session != 0 && living.session == session)
    }

    /// Carries a command out as `generation`, or refuses it. `mint` is the next session.
    pub(crate) fn apply(
        &self,
        command: Command,
        generation: Generation,
        mint: Session,
        rules: &Rules,
    ) -> Option<Self> {
        let mut next = *self;
        match command {
            Command::Register { process, life, stopped } => {
                next.make_room(usize::from(process), life, stopped, generation, rules)?;
                next.live[usize::from(process)] = Living { session: mint, life };
            }
            Command::End { session } => next.end(session, generation)?,
            Command::Assign { to } => {
                let free = self.owner == 0 && !self.holds_off;
                self.process(to).filter(|_| free)?;
                next.give(to, generation);
            }
            Command::Unassign => {
                let may = !rules.hold(Rule::NoOneInstead) && self.transit.is_none();
                (may && self.owner != 0).then_some(())?;
                next.owner = 0;
            }
            Command::Prepare { to } => {
                let moves = self.owner != 0 && self.owner != to && self.transit.is_none();
                self.process(to).filter(|_| moves)?;
                next.transit = Some(Transit { id: generation, to, releasing: false });
            }
            Command::Release { id } => {
                let transit = self.transit.filter(|it| it.id == id && !it.releasing)?;
                next.transit = Some(Transit { releasing: true, ..transit });
            }
            Command::Acknowledged { id, by } => {
                let counts = |it: &Transit| {
                    it.releasing && (it.id == id || !rules.hold(Rule::AckNamesHandOff))
                };
                let to = match self.transit {
                    Some(transit) => Some(transit).filter(counts)?.to,
                    None if !rules.hold(Rule::AckEndsWithAbort) => self.other(by)?,
                    None => return None,
                };
                (self.owner == by).then(|| next.give(to, generation))?;
            }
            Command::Lapsed { id } => {
                let transit = self.transit.filter(|it| it.id == id && it.releasing)?;
                next.give(transit.to, generation);
            }
            Command::Abort { id } => {
                self.transit.filter(|it| it.id == id)?;
                next.transit = None;
            }
            Command::Settle => next.holds_off = false,
        }
        if !rules.hold(Rule::TokenGrows) && self.owner != 0 {
            next.token = self.token;
        }
        Some(next)
    }

    /// Sees to it that nobody else bears the name.
    fn make_room(
        &mut self,
        process: usize,
        life: u8,
        stopped: Session,
        generation: Generation,
        rules: &Rules,
    ) -> Option<()> {
        for (other, living) in self.live.into_iter().enumerate() {
            let in_the_way = living.session != 0 && (other == process || rules.one_name);
            let same_process = other == process && living.life == life;
            let believed = same_process || !rules.hold(Rule::SameProcess);
            if in_the_way {
                (stopped == living.session && believed).then_some(())?;
                self.end(stopped, generation)?;
            }
        }
        Some(())
    }

    fn end(&mut self, session: Session, generation: Generation) -> Option<()> {
        let process = self.process(session)?;
        self.live[process] = Living::default();
        match self.transit {
            Some(transit) if self.owner == session => self.give(transit.to, generation),
            Some(transit) if transit.to == session => self.transit = None,
            _ if self.owner == session => self.owner = 0,
            _ => {}
        }
        Some(())
    }

    fn give(&mut self, to: Session, generation: Generation) {
        *self = Self { owner: to, token: generation, transit: None, ..*self };
    }

    fn other(&self, session: Session) -> Option<Session> {
        let process = self.process(session)?;
        Some(self.live[1 - process].session).filter(|other| *other != 0)
    }
}

/// Which rules hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// The one that does not, if any.
    pub(crate) without: Option<Rule>,
    /// Both processes bear the same name: a successor, started while the first still runs.
    pub(crate) one_name: bool,
}

impl Rules {
    pub(crate) fn hold(&self, rule: Rule) -> bool {
        self.without != Some(rule)
    }
}
