//! A clerk: a watcher, and requests by what it knows.

use std::sync::Arc;
use std::time::Duration;

use mandoline_core::assignment::Assignment;
use mandoline_core::name::JobName;
use mandoline_core::prng::Prng;
use mandoline_core::time::Time;
use mandoline_core::watch::{Action, Event, StreamId as Ask, Watcher};

use crate::check::Seen;
use crate::cluster::data;
use crate::cluster::ground::{Ground, Heard, Own};
use crate::cluster::network::StreamId;
use crate::cluster::tally::Count;
use crate::cluster::task;
use crate::cluster::wire::{Letter, Say};

/// The mean time between two requests of a clerk.
const REQUEST_EVERY: Duration = Duration::from_millis(500);

/// A clerk.
#[derive(Debug)]
pub struct Clerk {
    place: usize,
    job: JobName,
    sources: usize,
    watcher: Watcher,
    stream: Option<(Ask, StreamId)>,
}

impl Clerk {
    /// A clerk that has never run, with so many assigners to ask.
    pub fn new(place: usize, job: JobName, sources: usize) -> Self {
        let watcher = watcher(&job, sources, Time::ZERO, 0);
        Self { place, job, sources, watcher, stream: None }
    }

    /// Starts, knowing nothing.
    pub fn start(&mut self, ground: &mut Ground) {
        ground.see(&Seen::Started { who: self.place });
        let seed = ground.prng.bits();
        self.watcher = watcher(&self.job, self.sources, ground.local(self.place), seed);
        self.stream = None;
        ground.own(self.place, REQUEST_EVERY, Own::Request);
        self.settle(ground, Vec::new());
    }

    /// Gives what it knows.
    pub fn known(&self) -> Option<&Arc<Assignment>> {
        self.watcher.known()
    }

    /// Takes in what it hears.
    pub fn hear(&mut self, ground: &mut Ground, heard: Heard) {
        let now = ground.local(self.place);
        let mut out = Vec::new();
        match heard {
            Heard::Said(id, _, say) => {
                if let Some(event) = self.event(id, say) {
                    self.watcher.handle(now, event, &mut out);
                }
            }
            Heard::Broke(id, _) => {
                if let Some((ask, _)) = self.stream.take_if(|(_, stream)| *stream == id) {
                    let why = "the stream broke".to_owned();
                    self.watcher.handle(now, Event::Failed(ask, why), &mut out);
                }
            }
            Heard::Letter(_, Letter::Misdirected { generation }) => {
                self.watcher.handle(now, Event::Seen(generation), &mut out);
            }
            Heard::Own(Own::Request) => {
                let again = REQUEST_EVERY.mul_f64(0.5 + ground.prng.unit());
                ground.own(self.place, again, Own::Request);
                self.request(ground);
            }
            Heard::Own(_) | Heard::Letter(..) => {}
        }
        self.settle(ground, out);
    }

    fn event(&self, id: StreamId, say: Say) -> Option<Event> {
        let (ask, _) = self.stream.filter(|(_, stream)| *stream == id)?;
        match say {
            Say::Opened => Some(Event::Opened(ask)),
            Say::Full(assignment) => Some(Event::Full(ask, assignment)),
            Say::Delta(delta) => Some(Event::Delta(ask, (*delta).clone())),
            _ => None,
        }
    }

    /// Looks in on the watcher, and does what it says.
    fn settle(&mut self, ground: &mut Ground, mut out: Vec<Action>) {
        let now = ground.local(self.place);
        self.watcher.tick(now, &mut out);
        for action in out {
            match action {
                Action::Ask { stream: ask, source, known } => {
                    self.hang_up(ground);
                    let id = ground.open(self.place, source);
                    self.stream = Some((ask, id));
                    ground.say(id, 0, Say::Watch { known });
                }
                Action::Close => self.hang_up(ground),
                Action::Install { assignment, .. } => {
                    ground.tally.count(Count::Installs);
                    ground.see(&Seen::Holds { who: self.place, assignment: &assignment });
                }
            }
        }
        if let Some(deadline) = self.watcher.deadline() {
            ground.wake(self.place, deadline);
        }
    }

    fn hang_up(&mut self, ground: &mut Ground) {
        if let Some((_, id)) = self.stream.take() {
            ground.close(id, 0);
        }
    }

    fn request(&self, ground: &mut Ground) {
        let Some(known) = self.known() else { return };
        let key = data::key(&mut ground.prng);
        let Some(replica) = known.get(key).1.replicas.as_slice().first() else { return };
        let address = &known.tasks[&replica.session].info.address;
        let to = task::place(address.as_str()).expect("addresses here are places");
        ground.post(self.place, to, Letter::Request { key });
    }
}

fn watcher(job: &JobName, sources: usize, now: Time, seed: u64) -> Watcher {
    Watcher::new(job.clone(), sources, 0, None, now, Prng::new(seed))
}
