//! What can happen next: the protocol's moves, and whatever can go wrong.

use stateright::{Model, Property};

use crate::agreed::{Agreed, Command, Generation, Living, Rules};
use crate::rule::Rule;
use crate::world::{Clocks, LOG_MAX, Leader, Left, Process, Renewal, Stage, World, Written};

/// Units a tick of a clock that is right.
const RIGHT: u8 = 5;
/// Units a tick of a clock that is a fifth too slow.
pub(crate) const SLOW: u8 = RIGHT - MARGIN;
/// Units a tick of a clock that is a fifth too fast.
const FAST: u8 = RIGHT + MARGIN;
/// How clocks may go: as bad as it gets for safety, and the other way round.
pub(crate) const CLOCKS: [Clocks; 2] =
    [Clocks { processes: SLOW, leaders: FAST }, Clocks { processes: FAST, leaders: SLOW }];
/// What a clock gains or loses in a tick at most, and so the margin for each tick of a lease: with it, what a slow clock counts
/// for the holder and what a fast one counts for the leader ends in the same tick. Less would be too little.
const MARGIN: u8 = 1;

/// What must hold always.
pub(crate) const ONE_OWNER: &str = "no two believe that they own the slice";
/// What must hold always, too.
pub(crate) const TOKENS_GROW: &str = "each owner's token is greater than the one before";

/// What must be possible.
pub(crate) const ACKNOWLEDGED: &str = "a release is acknowledged";
/// What must be possible, too.
pub(crate) const LAPSED: &str = "a release lapses";
/// What must be possible, too.
pub(crate) const ABORTED: &str = "a hand-off is aborted";
/// What must be possible, too.
pub(crate) const TAKEN_OVER: &str = "the slice of one that fell silent is served by the other";
/// What must be possible, too.
pub(crate) const RETURNED: &str = "the slice comes back to its first owner";

/// The protocol, and what may go wrong with it.
#[derive(Clone, Debug)]
pub(crate) struct Protocol {
    pub(crate) rules: Rules,
    pub(crate) left: Left,
    /// The last generation.
    pub(crate) log: Generation,
    /// How long a lease is, in ticks of a right clock.
    pub(crate) lease: u8,
    /// How clocks may go.
    pub(crate) clocks: &'static [Clocks],
    /// The first process has asked for no lease yet; else both have been granted one just now.
    pub(crate) fresh: bool,
}

/// Something that happens. Processes and leaders go by number, 0 or 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Act {
    /// Time passes.
    Tick,
    /// A process sends a renewal.
    Send { process: u8 },
    /// It comes in at a leader.
    Arrive { process: u8, renewal: u8, leader: u8 },
    /// The leader grants it.
    Grant { process: u8, renewal: u8 },
    /// The grant comes back.
    Take { process: u8, renewal: u8 },
    /// A process installs what was agreed on as of a generation; with a guard out, if the slice is released there.
    Install { process: u8, generation: Generation, guard: bool },
    /// The last guard goes.
    Finish { process: u8 },
    /// A process acknowledges a release.
    Acknowledge { process: u8 },
    /// A process hears of its new session.
    Join { process: u8 },
    /// A process hears that its session has ended.
    Dismiss { process: u8 },
    /// A process dies, and begins anew.
    Crash { process: u8 },
    /// A leader decides that a process's session has lapsed, and to end it.
    Decide { leader: u8, process: u8 },
    /// The leader writes a command.
    Write(Command),
    /// What was written is committed.
    Commit,
    /// The other one is elected; what was written is kept or lost.
    Elect { kept: bool },
    /// A leader hears that it was deposed.
    Notice { leader: u8 },
    /// The cluster is lost, and restored from a backup.
    Restore,
}

impl Model for Protocol {
    type State = World;
    type Action = Act;

    fn init_states(&self) -> Vec<World> {
        self.clocks.iter().map(|clocks| self.begin(*clocks)).collect()
    }

    fn actions(&self, world: &World, acts: &mut Vec<Act>) {
        acts.push(Act::Tick);
        for process in 0..2 {
            self.acts_of_process(world, process, acts);
        }
        for leader in 0..2 {
            self.acts_of_leader(world, leader, acts);
        }
        if world.written.is_some() {
            acts.push(Act::Commit);
        } else if world.newest < self.log {
            self.writes(world, acts);
        }
        if world.left.elections > 0 {
            acts.push(Act::Elect { kept: true });
            if world.written.is_some() {
                acts.push(Act::Elect { kept: false });
            }
        }
        if world.left.restores > 0 && world.newest < self.log {
            acts.push(Act::Restore);
        }
    }

    fn next_state(&self, world: &World, act: Act) -> Option<World> {
        let mut next = world.clone();
        match act {
            Act::Tick => self.tick(&mut next),
            Act::Send { process } => self.send(&mut next.processes[usize::from(process)]),
            Act::Arrive { process, renewal, leader } => {
                let session = world.processes[usize::from(process)].session;
                let leads = &mut next.leaders[usize::from(leader)];
                if let Some(place) = world.as_of(leads.applied).process(session) {
                    leads.wait[place] = self.wait();
                }
                next.renewal(process, renewal).stage = Stage::Waits { leader };
            }
            Act::Grant { process, renewal } => grant(&mut next, process, renewal),
            Act::Take { process, renewal } => self.take(&mut next, process, renewal),
            Act::Install { process, generation, guard } => {
                install(&mut next, process, generation, guard);
            }
            Act::Finish { process } => next.processes[usize::from(process)].guard = false,
            Act::Acknowledge { process } => acknowledge(&mut next, process),
            Act::Join { process } => join(&mut next, process),
            Act::Dismiss { process } => next.processes[usize::from(process)].stop(),
            Act::Crash { process } => {
                next.left.crashes -= 1;
                let process = &mut next.processes[usize::from(process)];
                *process = Process { life: process.life + 1, ..Process::default() };
            }
            Act::Decide { leader, process } => {
                let process = usize::from(process);
                let leader = &mut next.leaders[usize::from(leader)];
                leader.ending[process] = world.as_of(leader.applied).live[process].session;
            }
            Act::Write(command) => next.written = Some(Written { command, inherited: false }),
            Act::Commit => self.commit(&mut next),
            Act::Elect { kept } => self.elect(&mut next, kept),
            Act::Notice { leader } => next.depose(leader),
            Act::Restore => self.restore(&mut next),
        }
        self.forget(&mut next);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(ONE_OWNER, |_, world: &World| {
                !(world.believes(0) && world.believes(1))
            }),
            Property::always(TOKENS_GROW, |_, world: &World| !world.token_fell),
            Property::sometimes(ACKNOWLEDGED, |_, world: &World| {
                world.writes(|command| matches!(command, Command::Acknowledged { .. }))
            }),
            Property::sometimes(LAPSED, |_, world: &World| {
                world.writes(|command| matches!(command, Command::Lapsed { .. }))
            }),
            Property::sometimes(ABORTED, |_, world: &World| {
                world.writes(|command| matches!(command, Command::Abort { .. }))
            }),
            Property::sometimes(TAKEN_OVER, |_, world: &World| {
                world.believes(1) && world.now().live[0].session == 0
            }),
            Property::sometimes(RETURNED, |_, world: &World| {
                world.believes(0) && world.now().token > 1
            }),
        ]
    }
}

impl Protocol {
    /// How long a holder counts on a grant.
    fn hold(&self) -> u8 {
        let margin = if self.rules.hold(Rule::DriftMargin) { MARGIN } else { 0 };
        (RIGHT - margin) * self.lease
    }

    /// How long a leader waits for a renewal.
    fn wait(&self) -> u8 {
        let margin = if self.rules.hold(Rule::DriftMargin) { MARGIN } else { 0 };
        (RIGHT + margin) * self.lease
    }

    /// The first process owns the slice. The second has a session too, or else is the first one's successor: it bears the
    /// same name, and was told that the first one has stopped.
    fn begin(&self, clocks: Clocks) -> World {
        let lives = |session| Living { session, life: 0 };
        let second = if self.rules.one_name { lives(0) } else { lives(2) };
        let first = Agreed { live: [lives(1), second], owner: 1, token: 1, ..Agreed::default() };
        let mut agreed = [Agreed::default(); LOG_MAX];
        agreed[1] = first;
        let holder = |session| {
            let lease = if session == 1 && self.fresh { 0 } else { self.hold() };
            Process { session, installed: 1, lease, right: lease, ..Process::default() }
        };
        let successor = Process { stopped: 1, ..Process::default() };
        World {
            clocks,
            agreed,
            newest: 1,
            written: None,
            minted: 2,
            leading: 0,
            leaders: [self.begin_to_lead(&first, 1), Leader::default()],
            processes: [holder(1), if self.rules.one_name { successor } else { holder(2) }],
            acknowledged: [0; LOG_MAX],
            left: self.left,
            token: 1,
            token_fell: false,
        }
    }

    fn acts_of_process(&self, world: &World, process: u8, acts: &mut Vec<Act>) {
        let it = &world.processes[usize::from(process)];
        let living = world.now().live[usize::from(process)];
        let bears = living.session != 0 && living.life == it.life && living.session != it.stopped;
        if bears && (it.session == 0 || it.session == it.stopped) {
            acts.push(Act::Join { process });
        }
        if world.left.crashes > 0 {
            acts.push(Act::Crash { process });
        }
        if it.session == 0 {
            return;
        }
        // A second renewal in the same tick would change nothing.
        if it.lease < self.hold() && it.mail.iter().all(|renewal| renewal.worth < self.hold()) {
            acts.push(Act::Send { process });
        }
        for (renewal, mail) in (0..).zip(&it.mail) {
            match mail.stage {
                Stage::None => {}
                Stage::Sent => acts.extend(
                    (0..2)
                        .filter(|leader| self.hears(world, *leader, process))
                        .map(|leader| Act::Arrive { process, renewal, leader }),
                ),
                Stage::Waits { leader } => {
                    if self.grants(world, leader, process) {
                        acts.push(Act::Grant { process, renewal });
                    }
                }
                Stage::Granted { applied } => {
                    if applied <= it.installed || !self.rules.hold(Rule::InstallFirst) {
                        acts.push(Act::Take { process, renewal });
                    }
                }
            }
        }
        for generation in it.installed + 1..=world.newest {
            acts.push(Act::Install { process, generation, guard: false });
            let closes = world.as_of(generation).releases(it.session).is_some();
            if closes && world.believes(process.into()) && !it.guard {
                acts.push(Act::Install { process, generation, guard: true });
            }
        }
        if it.guard {
            acts.push(Act::Finish { process });
        }
        let done = !it.guard || !self.rules.hold(Rule::GuardsFirst);
        let releases = world.as_of(it.installed).releases(it.session).filter(|_| done);
        if releases.is_some_and(|transit| world.acknowledged[usize::from(transit.id)] == 0) {
            acts.push(Act::Acknowledge { process });
        }
        if world.now().process(it.session).is_none() {
            acts.push(Act::Dismiss { process });
        }
    }

    /// Whether a leader takes a process's renewal in: it goes by the session alone.
    fn hears(&self, world: &World, leader: u8, process: u8) -> bool {
        let leader = &world.leaders[usize::from(leader)];
        let session = world.processes[usize::from(process)].session;
        let ends = leader.ending.contains(&session) && self.rules.hold(Rule::NoGrantAfterEnd);
        leader.believes && world.as_of(leader.applied).process(session).is_some() && !ends
    }

    /// Whether a leader that has a renewal may answer it now.
    fn grants(&self, world: &World, leader: u8, process: u8) -> bool {
        let inherits = world.written.is_some_and(|written| written.inherited);
        let confirms = world.leading == leader && !inherits;
        (confirms || !self.rules.hold(Rule::ConfirmedGrant)) && self.hears(world, leader, process)
    }

    fn acts_of_leader(&self, world: &World, leader: u8, acts: &mut Vec<Act>) {
        let it = &world.leaders[usize::from(leader)];
        if !it.believes {
            return;
        }
        for (process, living) in (0..).zip(&world.as_of(it.applied).live) {
            let place = usize::from(process);
            let silent = living.session != 0 && it.wait[place] == 0;
            // What one that was deposed decides dies with its belief.
            let matters = if world.leading == leader {
                world.written.is_none() && world.newest < self.log
            } else {
                !self.rules.hold(Rule::EndInItsTerm)
            };
            if silent && matters && it.ending[place] != living.session {
                acts.push(Act::Decide { leader, process });
            }
        }
        if world.leading != leader {
            acts.push(Act::Notice { leader });
        }
    }

    /// What the leader may write: whatever would not be refused.
    fn writes(&self, world: &World, acts: &mut Vec<Act>) {
        let (now, leader) = (world.now(), &world.leaders[usize::from(world.leading)]);
        let mut commands = Vec::new();
        for (number, process) in (0..).zip(&world.processes) {
            if world.left.sessions > 0
                && (process.session == 0 || process.session == process.stopped)
            {
                let Process { life, stopped, .. } = *process;
                commands.push(Command::Register { process: number, life, stopped });
            }
        }
        commands.push(Command::Unassign);
        commands.extend(leader.ending.map(|session| Command::End { session }));
        for Living { session, .. } in now.live {
            commands.push(Command::Assign { to: session });
            commands.push(Command::Prepare { to: session });
        }
        if let Some(transit) = now.transit {
            let id = transit.id;
            commands.extend([Command::Release { id }, Command::Abort { id }]);
            if leader.due == 0 || !self.rules.hold(Rule::LapseWaits) {
                commands.push(Command::Lapsed { id });
            }
        }
        for (id, by) in (0..).zip(world.acknowledged).filter(|(_, by)| *by != 0) {
            commands.push(Command::Acknowledged { id, by });
        }
        if now.holds_off && (leader.due == 0 || !self.rules.hold(Rule::HoldOff)) {
            commands.push(Command::Settle);
        }
        let fits = |command: &Command| self.apply(world, *command).is_some();
        acts.extend(commands.into_iter().filter(fits).map(Act::Write));
    }

    fn apply(&self, world: &World, command: Command) -> Option<Agreed> {
        world.now().apply(command, world.newest + 1, world.minted + 1, &self.rules)
    }

    fn tick(&self, world: &mut World) {
        for process in world.processes.iter_mut().filter(|process| process.session != 0) {
            for renewal in &mut process.mail {
                renewal.worth = renewal.worth.saturating_sub(world.clocks.processes);
                if renewal.worth == 0 {
                    *renewal = Renewal::default();
                }
            }
            let had = process.lease;
            process.lease = process.lease.saturating_sub(world.clocks.processes);
            process.right = process.right.saturating_sub(world.clocks.processes);
            process.guard &= process.right > 0;
            if had > 0 && process.lease == 0 {
                if self.rules.hold(Rule::LapseForGood) {
                    process.stop();
                } else {
                    process.stopped = process.session;
                }
            }
        }
        for leader in &mut world.leaders {
            let passes = |left: &mut u8| *left = left.saturating_sub(world.clocks.leaders);
            leader.wait.iter_mut().for_each(passes);
            passes(&mut leader.due);
        }
    }

    fn send(&self, process: &mut Process) {
        let oldest = process.mail.iter_mut().min_by_key(|renewal| renewal.worth);
        *oldest.expect("there is room for mail") =
            Renewal { worth: self.hold(), stage: Stage::Sent };
    }

    fn take(&self, world: &mut World, process: u8, renewal: u8) {
        let answered = std::mem::take(world.renewal(process, renewal));
        let counts = self.rules.hold(Rule::CountFromSend);
        let worth = if counts { answered.worth } else { self.hold() };
        let installed = *world.as_of(world.processes[usize::from(process)].installed);
        let it = &mut world.processes[usize::from(process)];
        it.lease = it.lease.max(worth);
        if installed.releases(it.session).is_none() {
            it.right = it.lease;
        } else if !self.rules.hold(Rule::GrantGivesNothing) {
            (it.right, it.reopened) = (it.lease, true);
        } else if !self.rules.hold(Rule::ReleaseEndsRight) {
            it.right = it.right.max(worth);
        }
    }

    fn commit(&self, world: &mut World) {
        let Some(written) = world.written.take() else { return };
        let Some(next) = self.apply(world, written.command) else { return };
        let before = *world.now();
        if let Command::Register { .. } = written.command {
            world.minted += 1;
            world.left.sessions -= 1;
        }
        if next.owner != before.owner && next.owner != 0 {
            world.token_fell |= next.token <= world.token;
            world.token = next.token;
        }
        world.newest += 1;
        world.agreed[usize::from(world.newest)] = next;
        let leader = &mut world.leaders[usize::from(world.leading)];
        leader.applied = world.newest;
        for process in 0..2 {
            if next.live[process] != before.live[process] {
                leader.wait[process] =
                    if next.live[process].session == 0 { 0 } else { self.wait() };
                leader.ending[process] = 0;
            }
        }
        let releasing = |agreed: &Agreed| agreed.transit.is_some_and(|transit| transit.releasing);
        if releasing(&next) != releasing(&before) {
            leader.due = if releasing(&next) { self.wait() } else { 0 };
        }
    }

    fn begin_to_lead(&self, agreed: &Agreed, applied: Generation) -> Leader {
        let waits = self.rules.hold(Rule::NewLeaderWaits) || applied == 1;
        let wait = |has: bool| if has && waits { self.wait() } else { 0 };
        let releasing = agreed.transit.is_some_and(|transit| transit.releasing);
        Leader {
            believes: true,
            applied,
            wait: agreed.live.map(|living| wait(living.session != 0)),
            ending: [0; 2],
            due: wait(releasing || agreed.holds_off),
        }
    }

    fn elect(&self, world: &mut World, kept: bool) {
        world.left.elections -= 1;
        world.leading = 1 - world.leading;
        world.written = world
            .written
            .filter(|_| kept)
            .map(|Written { command, .. }| Written { command, inherited: true });
        let mut begins = self.begin_to_lead(world.now(), world.newest);
        let leader = &mut world.leaders[usize::from(world.leading)];
        if !self.rules.hold(Rule::EndInItsTerm) {
            begins.ending = leader.ending;
        }
        if !self.rules.hold(Rule::EachTermAnew) && leader.believes {
            begins = Leader { applied: world.newest, ..*leader };
        }
        *leader = begins;
    }

    /// The backup knows of no session. Whoever led the cluster before is gone, and with it what it had heard.
    fn restore(&self, world: &mut World) {
        world.left.restores -= 1;
        world.newest += 1;
        let restored = Agreed { holds_off: true, ..Agreed::default() };
        world.agreed[usize::from(world.newest)] = restored;
        world.written = None;
        world.depose(0);
        world.depose(1);
        world.leading = 0;
        world.leaders[0] = self.begin_to_lead(&restored, world.newest);
        world.acknowledged = [0; LOG_MAX];
        if !self.rules.hold(Rule::FreshSessions) {
            world.minted = 0;
        }
    }

    /// Forgets what cannot matter any more, so that moments with the same future are the same state.
    fn forget(&self, world: &mut World) {
        let harmless = [Rule::ConfirmedGrant, Rule::EachTermAnew, Rule::EndInItsTerm];
        if harmless.iter().all(|rule| self.rules.hold(*rule)) {
            // Who does not lead confirms nothing, and so grants nothing; and begins anew, should it lead again.
            world.depose(1 - world.leading);
        }
        for it in &mut world.processes {
            let closed = world.agreed[usize::from(it.installed)].releases(it.session).is_some();
            if closed && !it.guard && !it.reopened {
                it.right = 0;
            }
            for renewal in &mut it.mail {
                if let Stage::Granted { applied } = &mut renewal.stage
                    && *applied <= it.installed
                {
                    *applied = 0;
                }
            }
        }
        let processes = world.processes.iter().filter(|process| process.session != 0);
        let leaders = world.leaders.iter().filter(|leader| leader.believes);
        let oldest = processes
            .map(|process| process.installed)
            .chain(leaders.map(|leader| leader.applied))
            .fold(world.newest, Generation::min);
        world.agreed[..usize::from(oldest)].fill(Agreed::default());
        if self.rules.hold(Rule::AckNamesHandOff) && self.rules.hold(Rule::AckEndsWithAbort) {
            let current = world.now().transit.map_or(0, |transit| usize::from(transit.id));
            let old = world.acknowledged.iter_mut().enumerate().filter(|(id, _)| *id != current);
            old.for_each(|(_, by)| *by = 0);
        }
    }
}

impl World {
    fn writes(&self, which: impl Fn(Command) -> bool) -> bool {
        self.written.is_some_and(|written| which(written.command))
    }

    fn renewal(&mut self, process: u8, renewal: u8) -> &mut Renewal {
        &mut self.processes[usize::from(process)].mail[usize::from(renewal)]
    }

    /// A leader is none any more, and what it had heard is gone with it.
    fn depose(&mut self, leader: u8) {
        self.leaders[usize::from(leader)] = Leader::default();
        for renewal in self.processes.iter_mut().flat_map(|process| &mut process.mail) {
            if renewal.stage == (Stage::Waits { leader }) {
                *renewal = Renewal::default();
            }
        }
    }
}

impl Process {
    /// Its session has stopped, for good.
    fn stop(&mut self) {
        *self = Self { life: self.life, stopped: self.session, ..Self::default() };
    }
}

fn grant(world: &mut World, process: u8, renewal: u8) {
    if let Stage::Waits { leader } = world.renewal(process, renewal).stage {
        let applied = world.leaders[usize::from(leader)].applied;
        world.renewal(process, renewal).stage = Stage::Granted { applied };
    }
}

/// A guard outlives only what leaves the slice where it is.
fn install(world: &mut World, process: u8, generation: Generation, guard: bool) {
    let next = *world.as_of(generation);
    let it = &mut world.processes[usize::from(process)];
    let before = &world.agreed[usize::from(it.installed)];
    let same = before.owner == next.owner && before.token == next.token;
    it.guard = (it.guard || guard) && same && next.releases(it.session).is_some();
    (it.installed, it.reopened) = (generation, false);
    // The right to a slice ends with the last grant before the release, also where that is the second one.
    let goes_on = |id| next.releases(it.session).is_some_and(|transit| transit.id == id);
    if !before.releases(it.session).is_some_and(|transit| goes_on(transit.id)) {
        it.right = it.lease;
    }
}

fn acknowledge(world: &mut World, process: u8) {
    let it = &world.processes[usize::from(process)];
    if let Some(transit) = world.as_of(it.installed).releases(it.session) {
        world.acknowledged[usize::from(transit.id)] = it.session;
    }
}

/// The stream of a new session begins with what is agreed on.
fn join(world: &mut World, process: u8) {
    let session = world.now().live[usize::from(process)].session;
    let it = &mut world.processes[usize::from(process)];
    *it = Process { life: it.life, session, installed: world.newest, ..Process::default() };
}
