//! One cluster from its first moment to its last: whoever is in it, and what happens to them in turn.

use std::sync::Arc;
use std::time::Duration;

use mandoline_core::command::{ClusterId, Command};
use mandoline_core::name::JobName;
use mandoline_core::prng::Prng;
use mandoline_core::slice::Slice;
use mandoline_core::spec::{Consistency, JobSpec};
use mandoline_core::state::State;
use mandoline_core::time::Time;

use crate::check::{Breach, Checks, Look, Seen};
use crate::cluster::assigner::Assigner;
use crate::cluster::clerk::Clerk;
use crate::cluster::clock::Clock;
use crate::cluster::faults::Faults;
use crate::cluster::flaw::Flaw;
use crate::cluster::ground::{Event, Ground, Health, Heard, Machine, Own};
use crate::cluster::load::Field;
use crate::cluster::network::{Network, Weather, Word};
use crate::cluster::scenario::{HOLD_OFF, Kind, Scenario, Setup};
use crate::cluster::store::Store;
use crate::cluster::tally::{Count, Tally};
use crate::cluster::task::{HEARTBEAT, REPORT_EVERY, Task};
use crate::cluster::trace::Trace;

/// Clocks begin some time after their origin.
const HOUR: Time = Time::from_millis(3_600_000);
/// How often everyone is looked at once all is quiet.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long it takes to hear that nobody listens.
const REFUSED: Duration = Duration::from_millis(2);
/// How often load is evened out.
const BALANCE_EVERY: Duration = Duration::from_secs(5);

/// What came of a seed.
#[derive(Debug)]
pub struct Ran {
    /// How much time passed.
    pub lasted: Duration,
    /// What happened, in numbers.
    pub tally: Tally,
    /// What was broken, if anything.
    pub breach: Option<Breach>,
    /// What happened, line by line, if that was asked for.
    pub trace: Trace,
}

/// Runs a cluster, the same for the same seed.
pub fn run(scenario: Scenario, seed: u64, length: Duration, trace: bool) -> Ran {
    run_flawed(scenario, seed, length, trace, Flaw::None)
}

/// Runs a cluster whose protocol is broken on purpose.
pub fn run_flawed(scenario: Scenario, seed: u64, length: Duration, trace: bool, flaw: Flaw) -> Ran {
    let mut prng = Prng::new(seed);
    let setup = Setup::draw(scenario, length, &mut prng);
    let mut world = World::new(scenario, setup, prng, Trace::new(trace), flaw);
    world.run();
    let Ground { now, tally, breach, trace, .. } = world.ground;
    Ran { lasted: now.min(world.end).since(Time::ZERO), tally, breach, trace }
}

/// A cluster.
struct World {
    ground: Ground,
    faults: Faults,
    field: Field,
    assigners: Vec<Assigner>,
    tasks: Vec<Task>,
    clerks: Vec<Clerk>,
    store: Store,
    /// An older state of the cluster, to restore.
    backup: Option<State>,
    end: Time,
}

impl World {
    fn new(scenario: Scenario, setup: Setup, mut prng: Prng, trace: Trace, flaw: Flaw) -> Self {
        let job = setup.job();
        let Setup { assigners, tasks, twins, clerks, lease, .. } = setup;
        let names =
            [("assigner", assigners), ("task", tasks + twins), ("clerk", clerks), ("store", 1)];
        let names = names.iter().flat_map(|(name, count)| (0..*count).map(move |n| (*name, n)));
        let machines: Vec<Machine> = names
            .map(|(name, n)| {
                let shows = HOUR + Duration::from_millis(prng.below(1_000_000_000));
                Machine::new(format!("{name}-{n}"), Clock::new(shows, 0))
            })
            .collect();
        let store = machines.len() - 1;
        let network = Network::new(machines.len(), Weather::FAIR);
        let checks = Checks::new(scenario == Scenario::Drift);
        let mut ground = Ground::new(machines, network, prng, trace, flaw, checks);
        ground.heartbeat = heartbeat(lease);
        let end = Time::ZERO + setup.length;
        let until = Time::ZERO + (setup.length - setup.calm);
        let faults = Faults::new(setup, until, &mut ground);
        for place in 0..ground.machines.len() {
            let drift = faults.drift(&mut ground.prng);
            ground.machines[place].clock.drifts(Time::ZERO, drift);
        }
        let founding = founding(&job, lease);
        let node = |place| Assigner::new(place, assigners, job.clone(), &founding, flaw);
        let task = |n| {
            // A twin bears the name of the first.
            let name = format!("task-{}", n % tasks).parse().expect("it is short and plain");
            Task::new(assigners + n, name, job.clone(), assigners, store)
        };
        let clerk = |n| Clerk::new(assigners + tasks + twins + n, job.clone(), assigners);
        Self {
            field: Field::draw(&mut ground.prng),
            assigners: (0..assigners).map(node).collect(),
            tasks: (0..tasks + twins).map(task).collect(),
            clerks: (0..clerks).map(clerk).collect(),
            store: Store::new(store),
            backup: None,
            ground,
            faults,
            end,
        }
    }

    fn run(&mut self) {
        for place in 0..self.ground.machines.len() {
            self.start(place);
        }
        let calm = self.end.since(Time::ZERO) - self.faults.setup().calm;
        self.ground.after(calm, Event::Look);
        while self.ground.breach.is_none()
            && let Some(event) = self.ground.advance()
            && self.ground.now < self.end
        {
            self.step(event);
        }
    }

    fn start(&mut self, place: usize) {
        let (tasks, clerks) = (self.first_task(), self.first_clerk());
        let Self { ground, assigners, tasks: all, clerks: some, store, .. } = self;
        match place {
            _ if place < tasks => assigners[place].start(ground),
            _ if place < clerks => all[place - tasks].start(ground),
            _ if place < store.place() => some[place - clerks].start(ground),
            // Storage never stops.
            _ => {}
        }
    }

    fn hear(&mut self, place: usize, heard: Heard) {
        let (tasks, clerks) = (self.first_task(), self.first_clerk());
        let Self { ground, assigners, tasks: all, clerks: some, store, field, .. } = self;
        match place {
            _ if place < tasks => assigners[place].hear(ground, heard),
            _ if place < clerks => {
                let task = &mut all[place - tasks];
                task.hear(ground, field, heard);
                let (gained, gone) = (task.gained(), task.is_gone());
                if gained {
                    self.believes(place);
                }
                if gone {
                    self.gone(place);
                }
            }
            _ if place < store.place() => some[place - clerks].hear(ground, heard),
            _ => store.hear(ground, heard),
        }
    }

    const fn first_task(&self) -> usize {
        self.assigners.len()
    }

    const fn first_clerk(&self) -> usize {
        self.first_task() + self.tasks.len()
    }

    /// A task may believe more than before: does another believe some of it too?
    fn believes(&mut self, who: usize) {
        let first = self.first_task();
        if self.faults.setup().lease.is_none() {
            return;
        }
        let slices = self.tasks[who - first].believes(&self.ground);
        // Who is gone believes nothing; who stands still believes what his clock lets him.
        let lives = |place: usize| self.ground.machines[place].health != Health::Down;
        let all = self.tasks.iter().enumerate().map(|(n, task)| (first + n, task));
        let others = all.filter(|(place, _)| *place != who && lives(*place));
        let others: Vec<(usize, Vec<Slice>)> =
            others.map(|(place, task)| (place, task.believes(&self.ground))).collect();
        self.ground.see(&Seen::Believes { who, slices: &slices, others: &others });
    }

    /// Whose event this is, if it is a process's.
    fn place_of(&self, event: &Event) -> Option<usize> {
        match event {
            Event::Letter { to, .. } => Some(*to),
            Event::Flow(id, side) | Event::Break(id, side) => self.ground.network.place(*id, *side),
            Event::Own { place, .. } => Some(*place),
            _ => None,
        }
    }

    fn step(&mut self, event: Event) {
        let Some(place) = self.place_of(&event) else { return self.befall(event) };
        match self.ground.machines[place].health {
            Health::Up => self.happen(place, event),
            Health::Paused => self.ground.machines[place].waiting.push_back(event),
            Health::Down => {
                // Nobody listens here: whoever opened a stream hears of it; a letter is lost.
                if let Event::Flow(id, side) = event
                    && self.ground.network.drop_end(id, side)
                {
                    self.ground.after(REFUSED, Event::Break(id, 1 - side));
                }
            }
        }
    }

    fn happen(&mut self, place: usize, event: Event) {
        match event {
            Event::Letter { from, letter, .. } => self.hear(place, Heard::Letter(from, letter)),
            Event::Flow(id, side) => match self.ground.flow(id, side) {
                Some(Word::Said(say)) => self.hear(place, Heard::Said(id, side, say)),
                Some(Word::Over) => self.hear(place, Heard::Broke(id, side)),
                None => {}
            },
            Event::Break(id, side) => {
                let believed = self.ground.network.drop_end(id, side);
                believed.then(|| self.hear(place, Heard::Broke(id, side)));
            }
            Event::Own { life, own, .. } if life == self.ground.machines[place].life => {
                let due = match own {
                    Own::Wake => self.ground.woken(place),
                    _ => true,
                };
                if due {
                    self.hear(place, Heard::Own(own));
                }
            }
            _ => {}
        }
    }

    /// Something happens to the world, and not to a process alone.
    fn befall(&mut self, event: Event) {
        match event {
            Event::Fault(kind) => {
                let strikes = self.faults.strikes(kind, &mut self.ground);
                strikes.then(|| self.strike(kind));
            }
            Event::Over(kind) => self.faults.end(kind, &mut self.ground),
            Event::Up { place, life } => self.up(place, life),
            Event::Look => self.look(),
            _ => {}
        }
    }

    fn strike(&mut self, kind: Kind) {
        let assigners = 0..self.assigners.len();
        let tasks = assigners.end..assigners.end + self.tasks.len();
        let Self { ground, faults, .. } = self;
        match kind {
            Kind::TaskCrash | Kind::AssignerCrash => {
                let places = if kind == Kind::TaskCrash { tasks } else { assigners };
                if let Some(place) = faults.pick(places, ground) {
                    self.crash(place);
                }
            }
            Kind::Pause => {
                if let Some(place) = faults.pick(0..ground.machines.len(), ground) {
                    let length = faults.pause(ground);
                    ground.note(place, None, || format!("stands still for {length:?}"));
                    let machine = &mut ground.machines[place];
                    machine.health = Health::Paused;
                    let life = machine.life;
                    ground.after(length, Event::Up { place, life });
                }
            }
            Kind::Break => {
                let place = ground.prng.below(ground.machines.len() as u64) as usize;
                let streams = ground.network.streams_of(place);
                if !streams.is_empty() {
                    let (id, side) = streams[ground.prng.below(streams.len() as u64) as usize];
                    ground.after(Duration::ZERO, Event::Break(id, side));
                    let later = Duration::from_millis(ground.prng.below(5_000));
                    ground.after(later, Event::Break(id, 1 - side));
                }
            }
            Kind::Rate => {
                let place = ground.prng.below(ground.machines.len() as u64) as usize;
                let drift = faults.drift(&mut ground.prng);
                let now = ground.now;
                ground.machines[place].clock.drifts(now, drift);
            }
            Kind::Drain => {
                if let Some(place) = faults.pick(tasks.clone(), ground) {
                    ground.note(place, None, || "is to leave".to_owned());
                    self.tasks[place - tasks.start].drain(ground);
                    if self.tasks[place - tasks.start].is_gone() {
                        self.gone(place);
                    }
                }
            }
            Kind::Shift => self.field.shift(&mut ground.prng),
            Kind::Partition | Kind::OneWay | Kind::Loss | Kind::Slow | Kind::Stall => {
                faults.begin(kind, ground);
            }
            Kind::Restore => self.restore(),
        }
    }

    /// All assigners are lost, and a new cluster begins with what a backup has of the old one.
    fn restore(&mut self) {
        let known =
            self.assigners.iter().map(Assigner::state).max_by_key(|state| state.last_session);
        let now = known.cloned();
        let Some(backup) = std::mem::replace(&mut self.backup, now) else { return };
        let ground = &mut self.ground;
        ground.cluster += 1;
        let id = ClusterId(u128::from(ground.cluster));
        // Milliseconds of a wall clock, as the real one has it.
        let wall = 1_000_000 * ground.cluster + (ground.now.as_nanos() / 1_000_000);
        let mut state = backup.restored(id, wall);
        ground.note(0, None, || format!("all is lost, and restored as incarnation {wall}"));
        if ground.flaw == Flaw::NoHoldOff {
            state.hold_off = false;
        }
        let nodes = self.assigners.len();
        for place in 0..nodes {
            self.ground.reset_streams(place, false);
            self.ground.machines[place].end();
            self.ground.machines[place].health = Health::Up;
            let job = self.faults.setup().job();
            let flaw = self.ground.flaw;
            self.assigners[place] = Assigner::restored(place, nodes, job, state.clone(), flaw);
            self.assigners[place].start(&mut self.ground);
        }
    }

    /// A process dies, and another begins in its place a while later.
    fn crash(&mut self, place: usize) {
        let Self { ground, faults, .. } = self;
        let silently = ground.prng.below(3) == 0;
        ground.note(place, None, || {
            if silently { "vanishes with its machine" } else { "crashes" }.to_owned()
        });
        ground.reset_streams(place, silently);
        self.ground.machines[place].end();
        let life = self.ground.machines[place].life;
        let later = faults.lasts(Duration::from_secs(6), &mut self.ground);
        self.ground.after(later, Event::Up { place, life });
    }

    /// A task has left in good order: the next one under its name begins soon.
    fn gone(&mut self, place: usize) {
        let ground = &mut self.ground;
        ground.machines[place].end();
        let life = ground.machines[place].life;
        let later = Duration::from_millis(100 + ground.prng.below(3_000));
        ground.after(later, Event::Up { place, life });
    }

    fn up(&mut self, place: usize, life: u32) {
        let machine = &mut self.ground.machines[place];
        if machine.life != life {
            return;
        }
        match std::mem::replace(&mut machine.health, Health::Up) {
            Health::Paused => {
                self.ground.note(place, None, || "goes on".to_owned());
                for event in std::mem::take(&mut self.ground.machines[place].waiting) {
                    self.ground.after(Duration::ZERO, event);
                }
            }
            Health::Down => {
                self.ground.tally.count(Count::Restarts);
                self.ground.note(place, None, || "starts".to_owned());
                self.start(place);
            }
            Health::Up => {}
        }
    }

    /// All is quiet: how is everyone?
    fn look(&mut self) {
        if self.ground.now + LOOK_EVERY < self.end {
            self.ground.after(LOOK_EVERY, Event::Look);
        }
        if self.end.since(self.ground.now) == self.faults.setup().calm {
            self.ground.note(0, None, || "all is left alone from here on".to_owned());
            let holds_off = self.assigners.iter().any(|node| node.state().hold_off);
            let held_off = if holds_off { HOLD_OFF } else { Duration::ZERO };
            self.ground.see(&Seen::Calm { held_off });
        }
        let first_task = self.first_task();
        let mut look = Look::default();
        let is_up = |place: usize| self.ground.machines[place].health == Health::Up;
        let nodes = self.assigners.iter().map(|node| node.assignment().cloned());
        let tasks = self.tasks.iter().map(|task| Some(Arc::clone(task.known())));
        let clerks = self.clerks.iter().map(|clerk| clerk.known().cloned());
        let all = nodes.chain(tasks).chain(clerks).enumerate();
        look.holds = all.filter(|(place, _)| is_up(*place)).collect();
        // Whoever bears another's name has nothing to hold while that one lives.
        let twins = self.faults.setup().twins;
        look.holds.retain(|(place, _)| {
            let Some(n) = place.checked_sub(first_task).filter(|n| *n < self.tasks.len()) else {
                return true;
            };
            let (task, is_twin) =
                (&self.tasks[n], twins > 0 && (n == 0 || n + 1 == self.tasks.len()));
            !task.is_gone() && (task.is_on() || !is_twin)
        });
        let tasks = self.tasks.iter().enumerate().filter(|(n, _)| is_up(first_task + n));
        look.served = tasks.flat_map(|(_, task)| task.serves(&self.ground)).collect();
        look.served.sort_unstable();
        self.ground.see(&Seen::Look(&look));
    }
}

/// How often tasks beat: two heartbeats may be lost before a lease is over.
fn heartbeat(lease: Option<Duration>) -> Duration {
    lease.map_or(HEARTBEAT, |lease| HEARTBEAT.min(lease / 3))
}

/// What every log begins with: a cluster and its job.
fn founding(job: &JobName, lease: Option<Duration>) -> Vec<Arc<Command>> {
    let mut spec = JobSpec {
        report_every: REPORT_EVERY,
        balance_every: BALANCE_EVERY,
        ..JobSpec::new(job.clone())
    };
    if let Some(lease) = lease {
        (spec.consistency, spec.lease) = (Consistency::Exclusive, lease);
        spec.heartbeat = heartbeat(Some(lease));
    }
    spec.check().expect("the spec of a simulated job is good");
    vec![
        Arc::new(Command::FoundCluster { id: ClusterId(1), nodes: 3, incarnation: 1 }),
        Arc::new(Command::ApplyJob { spec, if_version: None }),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTES: Duration = Duration::from_secs(200);

    #[test]
    fn a_seed_gives_the_same_to_the_byte() {
        let play = || {
            let ran = run(Scenario::Mixed, 7, MINUTES, true);
            let lines: Vec<String> = ran.trace.lines().iter().map(ToString::to_string).collect();
            (lines.join("\n"), ran.tally)
        };
        assert_eq!(play(), play());
    }

    #[test]
    fn nothing_breaks_in_any_scenario() {
        for scenario in Scenario::ALL {
            for seed in 0..2 {
                let ran = run(scenario, seed, MINUTES, false);
                assert_eq!(ran.breach, None, "{scenario} seed {seed}");
                assert!(
                    ran.tally.of(Count::Changes) > 10,
                    "{scenario} seed {seed}: {:?}",
                    ran.tally
                );
            }
        }
    }
}
