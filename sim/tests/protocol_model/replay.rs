//! Paths of the model, walked by the real machines: `State`, `Leader`, `Ledger` and `Holder` of `core`.
//!
//! At each step they must see the same as the model: who owns, who believes, how many ticks of lease are left. Where a model that
//! lacks a rule goes on, they must refuse. What only the shells do is done here: a proposal is written only in the term
//! in which it was made, a confirmation is asked of whoever leads in truth, and what plans say is taken from the model.
//!
//! Clocks go 1 % wrong here, and a lease is two ticks. That a fifth stands for that in the model is no loss: at whole ticks what a
//! slow clock calls `T - 1 %` and a fast one `T + 1 %` both end after two, in either scale.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use mandoline_core::assignment::{Assignment, Replica};
use mandoline_core::command::{ClusterId, Command as CoreCommand, EndReason};
use mandoline_core::generation::Generation as CoreGeneration;
use mandoline_core::key::SliceKey;
use mandoline_core::leader::{self, Leader};
use mandoline_core::lease::{self, Holder, Ledger, Margin, Renewal};
use mandoline_core::load::Load;
use mandoline_core::name::JobName;
use mandoline_core::plan::{Edit, Move, Plan, Reason};
use mandoline_core::slice::Slice;
use mandoline_core::spec::{Consistency, JobSpec, LEASE_MAX, Ratio};
use mandoline_core::state::{Outcome, State};
use mandoline_core::task::{SessionId, TaskInfo};
use mandoline_core::time::Time;
use mandoline_core::transit::{Act as CoreAct, HandOffId, Step};

use crate::agreed::{Agreed, Command, Generation, Session, Transit};
use crate::model::{Act, Protocol, SLOW};
use crate::world::{Stage, World};

/// As long as a restored cluster holds off, as in the model.
const LEASE: Duration = LEASE_MAX;
/// The first moment: nothing is before it.
const ORIGIN: Time = Time::from_millis(1_000_000);

/// Why the real machines did not go along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The holder has no session to ask for.
    NothingToAskFor,
    /// The leader does not take the renewal in, or does not know that it leads.
    NotGranted,
    /// The holder does not believe what the model's does.
    NotBelieved,
    /// The holder has not let go.
    NotReleased,
    /// The leader counts on.
    NotOver,
    /// It was decided in another term.
    AnotherTerm,
    /// The leader has nothing to propose: what it was told is stale, or it waits.
    NotProposed,
    /// The state refuses the command.
    NotApplied,
    /// The state is another one.
    NotAgreed,
}

/// The real machines, as far along as the model.
pub(crate) struct Replay {
    job: JobName,
    one_name: bool,
    ticks: u32,
    /// How far clocks of processes and of leaders go in a tick.
    paces: [Duration; 2],
    state: State,
    written: Option<CoreCommand>,
    leaders: [Option<Lead>; 2],
    holders: [Holder; 2],
    lives: [u64; 2],
    /// The number of the renewal that the model has on its way, and the grant to it.
    asked: [u64; 2],
    granted: [Option<CoreGeneration>; 2],
    let_go: BTreeSet<HandOffId>,
    agreed: BTreeMap<Generation, Arc<Assignment>>,
    sessions: BTreeMap<Session, SessionId>,
}

struct Lead {
    leader: Leader,
    ledger: Ledger,
    state: State,
    /// Whom it has decided to end, in this term.
    ending: BTreeSet<SessionId>,
}

impl Lead {
    fn new(now: Time, state: &State, job: &JobName) -> Self {
        let (leader, ledger) = (Leader::new(now, state), Ledger::new(Margin::STANDARD));
        let mut lead = Self { leader, ledger, state: state.clone(), ending: BTreeSet::new() };
        lead.admit(now, job);
        lead
    }

    fn admit(&mut self, now: Time, job: &JobName) {
        let tasks = &self.state.jobs[job].assignment.tasks;
        for task in tasks.values() {
            self.ledger.admit(now, task.session, task.lease.expect("the job is exclusive"));
        }
    }

    fn applied(&mut self, now: Time, state: &State, job: &JobName) {
        let before = std::mem::replace(&mut self.state, state.clone());
        let tasks = &state.jobs[job].assignment.tasks;
        for session in before.jobs[job].assignment.tasks.keys() {
            if !tasks.contains_key(session) {
                self.ledger.forget(*session);
            }
        }
        self.admit(now, job);
        let event = leader::Event::Applied { job: job.clone() };
        self.leader.handle(now, state, event, &mut Vec::new());
    }

    /// What it would propose if it heard this now, and looked in.
    fn proposals(&self, now: Time, event: Option<leader::Event>) -> Vec<CoreCommand> {
        let (mut leader, mut out) = (self.leader.clone(), Vec::new());
        if let Some(event) = event {
            leader.handle(now, &self.state, event, &mut out);
        }
        leader.tick(now, &self.state, &mut out);
        let proposed = out.into_iter().filter_map(|action| match action {
            leader::Action::Propose(command) => Some(command),
            _ => None,
        });
        proposed.collect()
    }
}

impl Replay {
    /// Begins where the model does.
    pub(crate) fn new(protocol: &Protocol, world: &World) -> Self {
        assert_eq!(protocol.lease, 2, "clocks here are made for leases of two ticks");
        let job: JobName = "kv".parse().expect("it is a name");
        let wrong = |goes: u8| LEASE / 2 / 100 * if goes == SLOW { 99 } else { 101 };
        let mut replay = Self {
            job: job.clone(),
            one_name: protocol.rules.one_name,
            ticks: 0,
            paces: [wrong(world.clocks.processes), wrong(world.clocks.leaders)],
            state: State::default(),
            written: None,
            leaders: [None, None],
            holders: [(); 2].map(|()| Holder::new(Margin::STANDARD)),
            lives: [0; 2],
            asked: [0; 2],
            granted: [None; 2],
            let_go: BTreeSet::new(),
            agreed: BTreeMap::new(),
            sessions: BTreeMap::new(),
        };
        let consistency = Consistency::Exclusive;
        let spec = JobSpec { consistency, lease: LEASE, ..JobSpec::new(job) };
        replay
            .state
            .apply(CoreCommand::ApplyJob { spec, if_version: None })
            .expect("the spec is good");
        for (process, living) in world.now().live.iter().enumerate() {
            if living.session != 0 {
                let register = replay.register(process, None);
                replay.apply(register, living.session).expect("the name is free");
            }
        }
        let first = replay.change(None, Some(1));
        replay.apply(first, 0).expect("the slice is free");
        replay.agreed.insert(1, replay.newest());
        replay.elect(0);
        for process in 0..2 {
            if world.processes[process].session != 0 {
                replay.join(process, world);
                if world.processes[process].lease > 0 {
                    replay.send(process).expect("it has a session");
                    replay.granted[process] = Some(replay.newest().generation);
                    replay.take(process);
                }
            }
        }
        replay
    }

    /// Does what the model did, or says why not.
    pub(crate) fn step(&mut self, before: &World, act: Act, after: &World) -> Result<(), Refusal> {
        let place = usize::from;
        match act {
            Act::Tick => {
                self.ticks += 1;
                let now = self.process_time();
                self.holders.iter_mut().for_each(|holder| holder.tick(now, &mut Vec::new()));
                // A guard that has lost its slice goes.
                for process in 0..2 {
                    if before.processes[process].guard && !after.processes[process].guard {
                        self.let_go(process);
                    }
                }
            }
            Act::Send { process } => self.send(place(process))?,
            Act::Arrive { process, leader, .. } => self.arrive(place(process), place(leader))?,
            Act::Grant { process, .. } => self.grant(before, place(process))?,
            Act::Take { process, .. } => self.take(place(process)),
            Act::Install { process, generation, .. } => {
                self.install(place(process), generation, after);
            }
            Act::Finish { process } => self.let_go(place(process)),
            Act::Acknowledge { process } => {
                let it = &before.processes[place(process)];
                let transit = before.as_of(it.installed).transit.expect("the model releases");
                self.let_go
                    .contains(&self.id(transit.id))
                    .then_some(())
                    .ok_or(Refusal::NotReleased)?;
            }
            Act::Join { process } => self.join(place(process), after),
            Act::Dismiss { process } => {
                let now = self.process_time();
                self.holders[place(process)].handle(now, lease::Event::Ended, &mut Vec::new());
            }
            Act::Crash { process } => {
                self.lives[place(process)] += 1;
                self.holders[place(process)] = Holder::new(Margin::STANDARD);
            }
            Act::Decide { leader, process } => self.decide(after, place(leader), place(process))?,
            Act::Write(command) => self.written = Some(self.write(before, command)?),
            Act::Commit => self.commit(before, after)?,
            Act::Elect { kept } => {
                self.written.take_if(|_| !kept);
                self.elect(place(after.leading));
            }
            Act::Notice { leader } => self.leaders[place(leader)] = None,
            Act::Restore => {
                let incarnation = self.state.incarnation + 1;
                self.state = self.state.restored(ClusterId(incarnation.into()), incarnation);
                self.agreed.insert(after.newest, self.newest());
                (self.written, self.leaders) = (None, [None, None]);
                self.elect(0);
            }
        }
        self.compare(after)
    }

    fn process_time(&self) -> Time {
        ORIGIN + self.paces[0] * self.ticks
    }

    fn leader_time(&self) -> Time {
        ORIGIN + self.paces[1] * self.ticks
    }

    fn newest(&self) -> Arc<Assignment> {
        Arc::clone(&self.state.jobs[&self.job].assignment)
    }

    fn id(&self, began: Generation) -> HandOffId {
        HandOffId { began: self.agreed[&began].generation, first: SliceKey::MIN }
    }

    // --- Processes.

    fn send(&mut self, process: usize) -> Result<(), Refusal> {
        let (now, mut out) = (self.process_time(), Vec::new());
        self.holders[process].beat(now, &mut out);
        let number = out.iter().find_map(|action| match action {
            lease::Action::Renew(number) => Some(*number),
            _ => None,
        });
        self.asked[process] = number.ok_or(Refusal::NothingToAskFor)?;
        self.granted[process] = None;
        Ok(())
    }

    fn take(&mut self, process: usize) {
        let Some(session) = self.holders[process].session() else { return };
        let generation = self.granted[process].take().expect("the model has a grant");
        let event = lease::Event::Granted { session, request: self.asked[process], generation };
        let now = self.process_time();
        self.holders[process].handle(now, event, &mut Vec::new());
    }

    /// Installs, and lets go at once where the model has no guard out.
    fn install(&mut self, process: usize, generation: Generation, after: &World) {
        let now = self.process_time();
        let event = lease::Event::Assigned(Arc::clone(&self.agreed[&generation]));
        self.holders[process].handle(now, event, &mut Vec::new());
        let it = &after.processes[process];
        if after.as_of(generation).releases(it.session).is_some() && !it.guard {
            self.let_go(process);
        }
    }

    fn let_go(&mut self, process: usize) {
        let (now, mut out) = (self.process_time(), Vec::new());
        let held = self.holders[process].held(now, SliceKey::MIN);
        let installed = held.and_then(|held| held.release).map(|(id, _)| id);
        // One that has no lease left, or none yet, has nothing to let go of: it says so all the same.
        let known = installed.or_else(|| self.newest_release(process));
        if let Some(id) = known {
            self.holders[process].handle(now, lease::Event::Released(id), &mut out);
        }
        self.let_go.extend(out.into_iter().filter_map(|action| match action {
            lease::Action::Acknowledge(id) => Some(id),
            _ => None,
        }));
    }

    fn newest_release(&self, process: usize) -> Option<HandOffId> {
        let session = self.holders[process].session();
        let transits = self.agreed.values().rev().filter_map(|agreed| {
            agreed.get(SliceKey::MIN).1.transit.clone().filter(|it| it.step == Step::Releasing)
        });
        transits.into_iter().find(|transit| transit.from == session).map(|transit| transit.id)
    }

    fn join(&mut self, process: usize, world: &World) {
        let it = &world.processes[process];
        let (session, now) = (self.sessions[&it.session], self.process_time());
        let event = lease::Event::Attached { session, lease: Some(LEASE) };
        self.holders[process].handle(now, event, &mut Vec::new());
        self.install(process, it.installed, world);
    }

    // --- Leaders.

    fn elect(&mut self, leader: usize) {
        self.leaders[leader] = Some(Lead::new(self.leader_time(), &self.state, &self.job));
    }

    fn lead(&self, leader: usize) -> &Lead {
        self.leaders[leader].as_ref().expect("the model's leader believes that it leads")
    }

    fn arrive(&mut self, process: usize, leader: usize) -> Result<(), Refusal> {
        let (now, job) = (self.leader_time(), self.job.clone());
        let session = self.holders[process].session().ok_or(Refusal::NothingToAskFor)?;
        let renewal = Renewal { job, session, request: self.asked[process] };
        let lead =
            self.leaders[leader].as_mut().expect("the model's leader believes that it leads");
        let known = lead.ledger.over_at(session).is_some() && !lead.ending.contains(&session);
        // Whether a confirmation has to begin depends on who else waits; that it was taken in shows when it is granted.
        lead.ledger.ask(now, renewal);
        known.then_some(()).ok_or(Refusal::NotGranted)
    }

    /// Confirms until the grant comes out, twice at most: once for those that asked before.
    fn grant(&mut self, before: &World, process: usize) -> Result<(), Refusal> {
        let Stage::Waits { leader } = before.processes[process].mail[0].stage else {
            unreachable!("the model grants what waits");
        };
        let leader = usize::from(leader);
        let leads = usize::from(before.leading) == leader
            && before.written.is_none_or(|written| !written.inherited);
        let generation = self.lead(leader).state.jobs[&self.job].assignment.generation;
        for _ in 0..2 {
            let lead = self.leaders[leader].as_mut().expect("it was just looked at");
            let (granted, _) = lead.ledger.confirmed(leads);
            for Renewal { session, request, .. } in granted {
                let asks = |it: usize| {
                    self.holders[it].session() == Some(session) && self.asked[it] == request
                };
                if let Some(process) = (0..2).find(|it| asks(*it)) {
                    self.granted[process].get_or_insert(generation);
                }
            }
        }
        self.granted[process].map(drop).ok_or(Refusal::NotGranted)
    }

    fn decide(&mut self, after: &World, leader: usize, process: usize) -> Result<(), Refusal> {
        let session = self.sessions[&after.leaders[leader].ending[process]];
        let now = self.leader_time();
        let lead =
            self.leaders[leader].as_mut().expect("the model's leader believes that it leads");
        if !lead.ledger.is_over(now, session) {
            return Err(Refusal::NotOver);
        }
        lead.ledger.deny(session);
        lead.ending.insert(session);
        Ok(())
    }

    /// Makes a command of the model's, if the leader would propose it now.
    fn write(&self, before: &World, command: Command) -> Result<CoreCommand, Refusal> {
        let (now, job, lead) =
            (self.leader_time(), self.job.clone(), self.lead(before.leading.into()));
        let steps =
            |id, act| CoreCommand::HandOff { job: self.job.clone(), steps: vec![(id, act)] };
        let stale = matches!(command, Command::Acknowledged { .. });
        let (command, event) = match command {
            Command::Register { process, stopped, .. } => {
                return Ok(self.register(usize::from(process), Some(stopped)));
            }
            Command::End { session } => {
                let session = self.sessions[&session];
                let decided = lead.ending.contains(&session);
                let end = CoreCommand::End { job, session, reason: EndReason::Lost };
                return decided.then_some(end).ok_or(Refusal::AnotherTerm);
            }
            Command::Assign { to } => return Ok(self.change(None, Some(to))),
            Command::Unassign => return Ok(self.change(Some(before.now().owner), None)),
            Command::Prepare { to } => return Ok(self.change(Some(before.now().owner), Some(to))),
            Command::Abort { id } => return Ok(steps(self.id(id), CoreAct::Abort)),
            Command::Settle => (CoreCommand::Settle { incarnation: self.state.incarnation }, None),
            Command::Lapsed { id } => {
                // Whoever takes the slice is heard: nothing is handed to a task that is away.
                let to = before.now().transit.expect("the model has a hand-off").to;
                let heard = leader::Event::Heard { job, session: self.sessions[&to] };
                (steps(self.id(id), CoreAct::Lapsed), Some(heard))
            }
            Command::Release { id } => {
                let to = before.now().transit.expect("the model has a hand-off").to;
                let (id, session) = (self.id(id), self.sessions[&to]);
                let event = leader::Event::Ready { job, session, id };
                (steps(id, CoreAct::Release), Some(event))
            }
            Command::Acknowledged { id, by } => {
                let (id, session) = (self.id(id), self.sessions[&by]);
                let event = leader::Event::Acknowledged { job, session, id };
                (steps(id, CoreAct::Acknowledged { by: session }), Some(event))
            }
        };
        if lead.proposals(now, event).contains(&command) {
            return Ok(command);
        }
        // Nor would the state take an acknowledgement that the leader does not.
        assert!(
            !stale || self.state.clone().apply(command).is_err(),
            "it counts though it is stale"
        );
        Err(Refusal::NotProposed)
    }

    // --- What is agreed on.

    fn register(&self, process: usize, stopped: Option<Session>) -> CoreCommand {
        let name = if process == 0 || self.one_name { "a" } else { "b" };
        let drawn = 100 * (process as u64 + 1) + self.lives[process];
        let address = format!("h{process}-{}:1", self.lives[process]);
        let name = name.parse().expect("it is a name");
        let info = TaskInfo::new(name, drawn, address.parse().expect("it is an address"));
        let stopped = stopped.and_then(|stopped| self.sessions.get(&stopped).copied());
        CoreCommand::Register { job: self.job.clone(), info, stopped }
    }

    fn change(&self, from: Option<Session>, to: Option<Session>) -> CoreCommand {
        let [from, to] = [from, to].map(|it| it.map(|it| self.sessions[&it]));
        let zero = Load::ZERO;
        let step = Move {
            slice: Slice::FULL,
            from,
            to,
            reason: Reason::Load,
            load: zero,
            before: zero,
            after: zero,
        };
        let even = Ratio::percent(100);
        let (base, edits) = (self.newest().generation, vec![Edit::Move(step)]);
        let plan = Plan { base, edits, imbalance: (even, even), total: zero };
        CoreCommand::Change { job: self.job.clone(), plan }
    }

    /// Applies a command; a session that it mints is `minted` in the model.
    fn apply(&mut self, command: CoreCommand, minted: Session) -> Result<(), Refusal> {
        let applied = self.state.apply(command).map_err(|_| Refusal::NotApplied)?;
        if let Outcome::Session(session) = applied.outcome {
            self.sessions.insert(minted, session);
        }
        Ok(())
    }

    fn commit(&mut self, before: &World, after: &World) -> Result<(), Refusal> {
        let Some(command) = self.written.take() else { return Ok(()) };
        if after.newest == before.newest {
            // What the model refuses is refused.
            assert!(self.state.clone().apply(command).is_err(), "the model refuses this");
            return Ok(());
        }
        self.apply(command, after.minted)?;
        self.agreed.insert(after.newest, self.newest());
        let (now, leading) = (self.leader_time(), usize::from(after.leading));
        let lead = self.leaders[leading].as_mut().expect("someone leads");
        lead.applied(now, &self.state, &self.job);
        Ok(())
    }

    // --- What all of them must see alike.

    fn compare(&self, world: &World) -> Result<(), Refusal> {
        if self.seen(world.now()) != Some(()) {
            return Err(Refusal::NotAgreed);
        }
        let now = self.process_time();
        for (process, holder) in self.holders.iter().enumerate() {
            let it = &world.processes[process];
            let model = (world.believes(process), it.lease.div_ceil(world.clocks.processes));
            let left = holder.deadline().map_or(Duration::ZERO, |until| until.since(now));
            let left = left.as_nanos().div_ceil(self.paces[0].as_nanos());
            let real = (holder.believes(now, SliceKey::MIN), left as u8);
            let dares = (real.0 && !model.0) || real.1 > model.1;
            assert!(!dares, "process {process} believes {real:?}, in the model {model:?}");
            if real != model {
                return Err(Refusal::NotBelieved);
            }
        }
        let both = self.holders.iter().all(|holder| holder.believes(now, SliceKey::MIN));
        assert!(!both, "two real holders believe");
        Ok(())
    }

    /// The state says of the slice what the model says.
    fn seen(&self, agreed: &Agreed) -> Option<()> {
        let newest = self.newest();
        let assigned = newest.get(SliceKey::MIN).1;
        let real = |session: &Session| self.sessions.get(session).copied();
        let owner = assigned.replicas.as_slice().first().map(|Replica { session, .. }| *session);
        (owner == real(&agreed.owner)).then_some(())?;
        let token = self.agreed.get(&agreed.token).map(|known| known.generation);
        (owner.is_none() || token.is_none() || token == Some(assigned.token)).then_some(())?;
        let transit = assigned.transit.as_deref();
        let same = |Transit { id, to, releasing }: Transit| {
            transit.is_some_and(|it| {
                let step = if releasing { Step::Releasing } else { Step::Preparing };
                (it.id, Some(it.to), it.step) == (self.id(id), real(&to), step)
            })
        };
        agreed.transit.map_or_else(|| transit.is_none(), same).then_some(())?;
        let living = agreed.live.iter().filter_map(|living| real(&living.session));
        (living.collect::<BTreeSet<_>>() == newest.tasks.keys().copied().collect()).then_some(())
    }
}
