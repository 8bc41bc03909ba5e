//! One cluster from its first moment to its last: whoever is in it, and what happens to them in turn.

use std::sync::Arc;
use std::time::Duration;

use mandoline_core::command::{ClusterId, Command};
use mandoline_core::name::JobName;
use mandoline_core::prng::Prng;
use mandoline_core::spec::JobSpec;
use mandoline_core::time::Time;

use crate::check::{Breach, Look, Seen};
use crate::cluster::assigner::Assigner;
use crate::cluster::clerk::Clerk;
use crate::cluster::clock::Clock;
use crate::cluster::faults::Faults;
use crate::cluster::ground::{Event, Ground, Health, Heard, Machine, Own};
use crate::cluster::load::Field;
use crate::cluster::network::{Network, Weather, Word};
use crate::cluster::scenario::{CALM, Kind, Scenario, Setup};
use crate::cluster::tally::{Count, Tally};
use crate::cluster::task::{HEARTBEAT, REPORT_EVERY, Task};
use crate::cluster::trace::Trace;

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
    let mut prng = Prng::new(seed);
    let setup = Setup::draw(scenario, length, &mut prng);
    let mut world = World::new(setup, prng, Trace::new(trace));
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
    end: Time,
}

impl World {
    fn new(setup: Setup, mut prng: Prng, trace: Trace) -> Self {
        let job: JobName = "kv".parse().expect("it is a name");
        let (assigners, tasks, clerks) = (setup.assigners, setup.tasks, setup.clerks);
        let names = [("assigner", assigners), ("task", tasks), ("clerk", clerks)];
        let names = names.iter().flat_map(|(name, count)| (0..*count).map(move |n| (*name, n)));
        let machines: Vec<Machine> = names
            .map(|(name, n)| {
                let clock = Clock::new(Time::from_millis(prng.below(1_000_000_000)), 0);
                Machine::new(format!("{name}-{n}"), clock)
            })
            .collect();
        let network = Network::new(machines.len(), Weather::FAIR);
        let mut ground = Ground::new(machines, network, prng, trace);
        let end = Time::ZERO + setup.length;
        let until = Time::ZERO + (setup.length - CALM);
        let faults = Faults::new(setup, until, &mut ground);
        for place in 0..ground.machines.len() {
            let drift = faults.drift(&mut ground.prng);
            ground.machines[place].clock.drifts(Time::ZERO, drift);
        }
        let founding = founding(&job);
        let node = |place| Assigner::new(place, assigners, job.clone(), &founding);
        let task = |n| Task::new(assigners + n, job.clone(), assigners);
        let clerk = |n| Clerk::new(assigners + tasks + n, job.clone(), assigners);
        Self {
            field: Field::draw(&mut ground.prng),
            assigners: (0..assigners).map(node).collect(),
            tasks: (0..tasks).map(task).collect(),
            clerks: (0..clerks).map(clerk).collect(),
            ground,
            faults,
            end,
        }
    }

    fn run(&mut self) {
        for place in 0..self.ground.machines.len() {
            self.start(place);
        }
        let calm = self.end.since(Time::ZERO) - CALM;
        self.ground.after(calm, Event::Look);
        while self.ground.breach.is_none()
            && let Some(event) = self.ground.advance()
            && self.ground.now < self.end
        {
            self.step(event);
        }
    }

    fn start(&mut self, place: usize) {
        let Self { ground, assigners, tasks, clerks, .. } = self;
        let (first_task, first_clerk) = (assigners.len(), assigners.len() + tasks.len());
        if place < first_task {
            assigners[place].start(ground);
        } else if place < first_clerk {
            tasks[place - first_task].start(ground);
        } else {
            clerks[place - first_clerk].start(ground);
        }
    }

    fn hear(&mut self, place: usize, heard: Heard) {
        let Self { ground, assigners, tasks, clerks, field, .. } = self;
        let (first_task, first_clerk) = (assigners.len(), assigners.len() + tasks.len());
        if place < first_task {
            assigners[place].hear(ground, heard);
        } else if place < first_clerk {
            let task = &mut tasks[place - first_task];
            task.hear(ground, field, heard);
            if task.is_gone() {
                self.gone(place);
            }
        } else {
            clerks[place - first_clerk].hear(ground, heard);
        }
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
            Kind::Restore => {}
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
        if self.end.since(self.ground.now) == CALM {
            self.ground.note(0, None, || "all is left alone from here on".to_owned());
            self.ground.see(&Seen::Calm);
        }
        let first_task = self.assigners.len();
        let first_clerk = first_task + self.tasks.len();
        let mut look = Look::default();
        let is_up = |place: usize| self.ground.machines[place].health == Health::Up;
        let nodes = self.assigners.iter().map(|node| node.assignment().cloned());
        let tasks = self.tasks.iter().map(|task| Some(Arc::clone(task.known())));
        let clerks = self.clerks.iter().map(|clerk| clerk.known().cloned());
        let all = nodes.chain(tasks).chain(clerks).enumerate();
        look.holds = all.filter(|(place, _)| is_up(*place)).collect();
        look.holds.retain(|(place, _)| {
            !(first_task..first_clerk).contains(place) || !self.tasks[place - first_task].is_gone()
        });
        let tasks = self.tasks.iter().enumerate().filter(|(n, _)| is_up(first_task + n));
        look.served = tasks.flat_map(|(_, task)| task.serves()).collect();
        look.served.sort_unstable();
        self.ground.see(&Seen::Look(&look));
    }
}

/// What every log begins with: a cluster and its job.
fn founding(job: &JobName) -> Vec<Arc<Command>> {
    let spec = JobSpec {
        heartbeat: HEARTBEAT,
        report_every: REPORT_EVERY,
        balance_every: BALANCE_EVERY,
        ..JobSpec::new(job.clone())
    };
    vec![
        Arc::new(Command::FoundCluster { id: ClusterId(1), nodes: 3, incarnation: 1 }),
        Arc::new(Command::ApplyJob { spec, if_version: None }),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTES: Duration = Duration::from_secs(300);

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
            for seed in 0..4 {
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
