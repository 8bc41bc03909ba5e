//! An exclusive job on a stage: what the leader proposes waits until the test lets it happen or come to nothing.

use std::collections::VecDeque;

use super::*;

pub(super) const LEASE: Duration = Duration::from_secs(5);

/// A leader of one exclusive job, its log, and what it said.
pub(super) struct Stage {
    pub(super) state: State,
    pub(super) leader: Leader,
    pub(super) now: Time,
    /// Whether what is proposed is agreed on at once, and each confirmation succeeds.
    pub(super) smooth: bool,
    pub(super) proposed: VecDeque<Command>,
    pub(super) confirms: usize,
    pub(super) granted: Vec<(SessionId, u64)>,
    pub(super) drained: Vec<SessionId>,
    pub(super) rounds: Vec<Round>,
    request: u64,
}

pub(super) fn spec() -> JobSpec {
    JobSpec { consistency: Consistency::Exclusive, ..JobSpec::new(kv()) }
}

impl Stage {
    /// Tasks `1..=tasks` share the keys, and every hand-off is over.
    pub(super) fn new(tasks: u64) -> Self {
        let mut state = State::default();
        state.apply(Command::ApplyJob { spec: spec(), if_version: None }).unwrap();
        let mut stage = Self::of(state);
        for task in 1..=tasks {
            stage.register(task);
        }
        stage.hand_over_all();
        stage.granted.clear();
        stage.rounds.clear();
        stage.smooth = false;
        stage
    }

    pub(super) fn of(state: State) -> Self {
        let now = Time::from_millis(1_000);
        let leader = Leader::new(now, &state);
        Self {
            state,
            leader,
            now,
            smooth: true,
            proposed: VecDeque::new(),
            confirms: 0,
            granted: Vec::new(),
            drained: Vec::new(),
            rounds: Vec::new(),
            request: 0,
        }
    }

    /// Another leader takes over, now.
    pub(super) fn change_leader(&mut self) {
        self.leader = Leader::new(self.now, &self.state);
        self.proposed.clear();
        self.confirms = 0;
    }

    pub(super) fn assignment(&self) -> Arc<Assignment> {
        Arc::clone(&self.state.jobs[&kv()].assignment)
    }

    pub(super) fn happen(&mut self, event: Event) {
        let mut out = Vec::new();
        self.leader.handle(self.now, &self.state, event, &mut out);
        self.carry_out(out);
    }

    pub(super) fn tick(&mut self) {
        let mut out = Vec::new();
        self.leader.tick(self.now, &self.state, &mut out);
        self.carry_out(out);
    }

    fn carry_out(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Propose(command) if self.smooth => self.agree(command),
                Action::Propose(command) => self.proposed.push_back(command),
                Action::Confirm if self.smooth => self.happen(Event::Confirmed(true)),
                Action::Confirm => self.confirms += 1,
                Action::Grant { session, request, .. } => self.granted.push((session, request)),
                Action::Drained { session, .. } => self.drained.push(session),
                Action::Plan(round) => {
                    let plan = balance::plan(&round);
                    self.rounds.push(*round);
                    self.happen(Event::Planned { job: kv(), plan });
                }
            }
        }
    }

    /// A command is agreed on, and the leader hears of it.
    pub(super) fn agree(&mut self, command: Command) {
        let happens = match self.state.apply(command.clone()) {
            Ok(_) => Event::Applied { job: kv() },
            Err(_) => Event::Failed(command),
        };
        self.happen(happens);
    }

    /// The oldest proposal is agreed on. Gives it.
    pub(super) fn agree_next(&mut self) -> Command {
        let command = self.proposed.pop_front().expect("something is proposed");
        self.agree(command.clone());
        command
    }

    /// The oldest proposal comes to nothing. Gives it.
    pub(super) fn fail_next(&mut self) -> Command {
        let command = self.proposed.pop_front().expect("something is proposed");
        self.happen(Event::Failed(command.clone()));
        command
    }

    pub(super) fn register(&mut self, task: u64) -> SessionId {
        let (name, address) = (format!("t{task}"), format!("h:{task}"));
        let info = TaskInfo::new(name.parse().unwrap(), task, address.parse().unwrap());
        self.agree(Command::Register { job: kv(), info, stopped: None });
        let session = SessionId(self.state.last_session);
        self.happen(Event::Attached { job: kv(), session });
        session
    }

    pub(super) fn drain(&mut self, session: SessionId) {
        self.agree(Command::Drain { job: kv(), session });
    }

    /// A session asks for more time. Gives the number of its renewal.
    pub(super) fn renew(&mut self, session: SessionId) -> u64 {
        self.request += 1;
        let request = self.request;
        self.happen(Event::Renewed { job: kv(), session, request });
        request
    }

    pub(super) fn confirm(&mut self, leads: bool) {
        self.confirms -= 1;
        self.happen(Event::Confirmed(leads));
    }

    /// Lets time pass, looking in whenever the leader asks to be. Tasks renew ten times a second, all but the silent ones.
    pub(super) fn pass(&mut self, millis: u64, silent: &[SessionId]) {
        let end = self.now + Duration::from_millis(millis);
        let mut beat = self.now + Duration::from_millis(100);
        let mut ticks = 0;
        while self.now < end {
            let due = self.leader.deadline().unwrap_or(end).min(beat).min(end);
            self.now = self.now.max(due);
            if self.now >= beat {
                beat += Duration::from_millis(100);
                let tasks: Vec<_> = self.assignment().tasks.keys().copied().collect();
                for session in tasks.into_iter().filter(|session| !silent.contains(session)) {
                    self.renew(session);
                }
            }
            if self.leader.deadline().is_some_and(|deadline| deadline <= self.now) {
                self.tick();
                ticks += 1;
                assert!(ticks < 100 + millis / 10, "the leader spins at {}", self.now);
            }
        }
    }

    pub(super) fn transits(&self) -> Vec<Transit> {
        let assignment = self.assignment();
        assignment.slices.iter().filter_map(|(_, one)| one.transit.as_deref().copied()).collect()
    }

    /// The task of a hand-off says what its step needs.
    pub(super) fn answer(&mut self, transit: Transit) {
        let (job, id) = (kv(), transit.id);
        self.happen(match transit.step {
            Step::Preparing => Event::Ready { job, session: transit.to, id },
            Step::Releasing => Event::Acknowledged { job, session: transit.from.unwrap(), id },
        });
    }

    /// All tasks do what hand-offs need of them, and everything is agreed on, until nothing is on its way.
    pub(super) fn hand_over_all(&mut self) {
        for _ in 0..10_000 {
            while !self.proposed.is_empty() {
                self.agree_next();
            }
            let transits = self.transits();
            if transits.is_empty() {
                return;
            }
            transits.into_iter().for_each(|transit| self.answer(transit));
        }
        panic!("hand-offs do not end");
    }

    pub(super) fn slices_of(&self, session: SessionId) -> usize {
        self.assignment().of(session).count()
    }
}
