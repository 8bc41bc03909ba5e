//! Intervals as requests: who sends them, who serves them, and how late a caller hears what came of them.
//!
//! An interval says how often each key was asked for and not in which order, so its requests come evenly spread over it in an
//! order drawn by lot. Several callers (`Network::callers`), proxies say, each send a part of them, drawn by lot too, and choose
//! by an `Overflow` of their own. A task counts a request when it comes, and the caller hears of it with the answer, `delay`
//! later. So a caller never knows what others sent in the meantime.
//!
//! Requests of one key come in chunks of at most a five-hundredth of what a task is due, for an interval of twenty million
//! would take a minute otherwise. A chunk goes one way, so a task is judged up to 0.2 % too hard, and no request is treated
//! differently where there are fewer than a thousand a task.

use std::collections::VecDeque;
use std::time::Duration;

use mandoline_core::key::SliceKey;
use mandoline_core::prng::Prng;
use mandoline_core::spec::Ratio;
use mandoline_core::spill::{Overflow, Seat, Ticket};
use mandoline_core::time::Time;

use crate::fleet::Member;
use crate::interval::Interval;

/// How many chunks a task's due load makes.
const CHUNKS_A_TASK: u64 = 500;

/// How requests travel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Network {
    /// How many callers share the requests evenly; 0 counts as 1.
    pub callers: usize,
    /// How long after a request was sent its answer is heard.
    pub delay: Duration,
    /// How long an interval lasts: a balancing round.
    pub round: Duration,
}

/// Four callers that hear after 50 ms, a slow service within one region; a round of 10 s, as a job has unless told.
impl Default for Network {
    fn default() -> Self {
        Self { callers: 4, delay: Duration::from_millis(50), round: Duration::from_secs(10) }
    }
}

/// Some requests for one key that come together and go one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The key's place in the interval.
    pub place: u32,
    /// What they cost together.
    pub cost: u64,
}

/// Cuts an interval's load into chunks, in an order drawn by lot.
pub fn chunks(interval: &Interval, tasks: usize, prng: &mut Prng) -> Vec<Chunk> {
    let most = (interval.total() / (tasks.max(1) as u64 * CHUNKS_A_TASK)).max(1);
    let mut chunks = Vec::new();
    for (place, (_, load)) in (0..).zip(interval.loads()) {
        let mut rest = *load;
        while rest > 0 {
            let cost = rest.min(most);
            chunks.push(Chunk { place, cost });
            rest -= cost;
        }
    }
    for place in (1..chunks.len()).rev() {
        chunks.swap(place, prng.below(place as u64 + 1) as usize);
    }
    chunks
}

/// An answer on its way.
#[derive(Clone, Copy, Debug)]
struct Answer {
    due: Time,
    caller: usize,
    // By id, since seats change, and by life.
    id: u32,
    session: u64,
    ticket: Ticket,
    served: u64,
}

/// The callers, and what the tasks have counted.
#[derive(Clone, Debug)]
pub struct Callers {
    network: Network,
    callers: Vec<Overflow>,
    members: Vec<Member>,
    // By id: which life, and what was served in it. Invariant: it has every member.
    lives: Vec<(u64, u64)>,
    // By time, since all are as late.
    answers: VecDeque<Answer>,
    prng: Prng,
}

impl Callers {
    /// Makes callers that know nothing yet.
    pub fn new(network: Network, cap: Ratio, seed: u64) -> Self {
        let mut prng = Prng::new(seed);
        let caller = |_| Overflow::new(cap, network.round, prng.bits());
        let callers = (0..network.callers.max(1)).map(caller).collect();
        let (members, lives, answers) = (Vec::new(), Vec::new(), VecDeque::new());
        Self { network, callers, members, lives, answers, prng }
    }

    /// Tells all callers who there is, sorted by id.
    pub fn seat(&mut self, members: &[Member]) {
        if self.members == members {
            return;
        }
        let was_there =
            |id: u32| self.members.binary_search_by_key(&id, |member| member.id).is_ok();
        for member in members {
            let id = member.id as usize;
            if self.lives.len() <= id {
                self.lives.resize(id + 1, (0, 0));
            }
            // Whoever comes back has served nothing in its new life.
            if !was_there(member.id) {
                self.lives[id] = (self.lives[id].0 + 1, 0);
            }
        }
        let seat = |member: &Member| Seat {
            session: session(member.id, self.lives[member.id as usize].0),
            name: Prng::new(u64::from(member.id)).bits(),
            capacity: f64::from(member.capacity) / 1_000.0,
            region: 0,
            is_open: true,
        };
        let seats: Vec<Seat> = members.iter().map(seat).collect();
        self.members = members.to_vec();
        self.callers.iter_mut().for_each(|caller| caller.seat(&seats));
    }

    /// Sends requests for a key and says which member serves them, by its place. `holders` are places too, at least one.
    pub fn send(&mut self, now: Time, key: SliceKey, holders: &[u32], cost: u64) -> u32 {
        self.deliver(now);
        let caller = self.prng.below(self.callers.len() as u64) as usize;
        let choice = self.callers[caller].choose(now, key, holders, cost);
        let id = self.members[choice.seat as usize].id;
        let (life, served) = &mut self.lives[id as usize];
        *served += cost;
        let (session, served) = (session(id, *life), *served);
        let (due, ticket) = (now + self.network.delay, choice.ticket);
        self.answers.push_back(Answer { due, caller, id, session, ticket, served });
        choice.seat
    }

    fn deliver(&mut self, now: Time) {
        while let Some(answer) = self.answers.pop_front_if(|answer| answer.due <= now) {
            let seat = self.members.binary_search_by_key(&answer.id, |member| member.id);
            let lives = session(answer.id, self.lives[answer.id as usize].0) == answer.session;
            if let (Ok(seat), true) = (seat, lives) {
                let caller = &mut self.callers[answer.caller];
                caller.hear(answer.due, seat as u32, answer.ticket, answer.served);
            }
        }
    }
}

fn session(id: u32, life: u64) -> u64 {
    life << 32 | u64::from(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAP: Ratio = Ratio::percent(115);

    fn members(count: u32) -> Vec<Member> {
        let member = |id| Member { id, capacity: 1_000, zone: 0, region: 0, revision: 0 };
        (0..count).map(member).collect()
    }

    #[test]
    fn chunks_make_up_the_interval() {
        let interval = Interval::new(vec![(SliceKey(1), 3), (SliceKey(2), 10_000)]);
        let chunks = chunks(&interval, 2, &mut Prng::new(1));
        let cost = |place| -> u64 {
            chunks.iter().filter(|chunk| chunk.place == place).map(|chunk| chunk.cost).sum()
        };
        assert_eq!((cost(0), cost(1)), (3, 10_000));
        assert!(chunks.iter().all(|chunk| chunk.cost <= 10));
        assert!(chunks.iter().take(500).any(|chunk| chunk.place == 0) || chunks.len() > 1_000);
    }

    #[test]
    fn one_key_on_three_tasks_spreads_over_as_many_as_it_needs() {
        for callers in [1, 4, 16] {
            let mut fabric = Callers::new(Network { callers, ..Network::default() }, CAP, 7);
            fabric.seat(&members(3));
            let mut prng = Prng::new(1);
            let mut counts = [0_u64; 3];
            // 3,000 requests a second; three in four are for one key of the first task.
            for n in 0..90_000_u64 {
                let key = if prng.below(4) < 3 { 1 } else { prng.bits() };
                let holder = if key == 1 { 0 } else { (key % 3) as u32 };
                let now = Time::from_nanos(n * 333_333);
                let seat = fabric.send(now, SliceKey(key), &[holder], 1);
                if n >= 60_000 {
                    counts[seat as usize] += 1;
                }
            }
            let most = *counts.iter().max().unwrap() as f64 / 10_000.0;
            assert!(most <= 1.16, "{callers} callers: {counts:?}");
        }
    }

    /// A balanced service of so many tasks; then a key goes to a tenth of all load. Gives the imbalance of each second.
    fn flash(tasks: u32, callers: usize, rate: u64, delay_ms: u64, seconds: u64) -> Vec<f64> {
        let network =
            Network { callers, delay: Duration::from_millis(delay_ms), ..Network::default() };
        let mut fabric = Callers::new(network, CAP, 5);
        fabric.seat(&members(tasks));
        let mut prng = Prng::new(5);
        let total = u64::from(tasks) * rate;
        let (step, end) = (4_370_000_000_u64, 4_370_000_000 + seconds * 1_000_000_000);
        let gap = 1_000_000_000 / total;
        let mut imbalances = Vec::new();
        let mut counts = vec![0_u64; tasks as usize];
        let mut until = step + 1_000_000_000;
        for n in 0..=end / gap {
            let at = n * gap;
            let is_hot = at >= step && prng.below(10) == 0;
            let key = if is_hot { 1 << 40 } else { prng.below(50 * u64::from(tasks)) };
            let holder = if is_hot { 0 } else { (key % u64::from(tasks)) as u32 };
            let seat = fabric.send(Time::from_nanos(at), SliceKey(key), &[holder], 1);
            if at >= until {
                let sum: u64 = counts.iter().sum();
                imbalances
                    .push(*counts.iter().max().unwrap() as f64 * f64::from(tasks) / sum as f64);
                counts.fill(0);
                until += 1_000_000_000;
            }
            if at >= step {
                counts[seat as usize] += 1;
            }
        }
        imbalances
    }

    /// Of a thousand tasks with 2,000 requests a second each, four callers; the row. A minute in a debug build.
    #[test]
    #[ignore = "takes long without optimization: cargo test --release -p mandoline-sim -- --ignored"]
    fn a_flash_crowd_among_a_thousand_tasks_is_spread_within_a_second() {
        let imbalances = flash(1_000, 4, 2_000, 50, 5);
        assert!(imbalances[1..].iter().all(|imbalance| *imbalance <= 1.25), "{imbalances:?}");
    }

    #[test]
    fn a_flash_crowd_is_spread_within_a_second_however_many_callers_and_late_answers() {
        for (callers, delay_ms) in [(1, 50), (4, 50), (16, 50), (4, 5), (4, 200)] {
            let imbalances = flash(50, callers, 2_000, delay_ms, 3);
            assert!(
                imbalances[1..].iter().all(|imbalance| *imbalance <= 1.25),
                "{callers} callers, {delay_ms} ms: {imbalances:?}"
            );
        }
    }
}
