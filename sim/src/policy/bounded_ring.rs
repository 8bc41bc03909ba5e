//! Consistent hashing with bounded loads: a request goes clockwise to the first task that is not yet full.
//!
//! Mirrokni, Thorup and Zadimoghaddam (SODA'18), at the level of requests: an interval's requests come in a random order, and
//! each is taken by the first task from its key's place on whose load stays below `c` times its due, which is its share by
//! capacity of all load so far in the interval. So a key is served by as many tasks as its load fills.
//!
//! Idealised: the load of every task is known to everyone at once and forgotten at the end of the interval, and requests last
//! no time. Real ones (HAProxy, Envoy, Google's) count what one balancer has in flight. Requests of one key come in chunks of at
//! most a five-hundredth of a task's due load, so that an interval of twenty million requests is a million steps; the bound
//! holds up to one chunk. Churn is load that lands on a task that had not served that key in the interval before; a key that
//! nobody asked for then counts as served by its own task, as it does for the planners.

use mandoline_core::key::SliceKey;
use mandoline_core::prng::Prng;

use crate::fleet::Member;
use crate::interval::Interval;
use crate::policy::ring::Ring;
use crate::policy::{Policy, Round, Served};

/// The policy `bounded-ring`.
#[derive(Clone, Debug)]
pub struct BoundedRing {
    ring: Ring,
    // As of the last interval served; none before the first.
    before: Option<Before>,
    bound: f64,
    prng: Prng,
}

/// Who had served what.
#[derive(Clone, Debug)]
struct Before {
    ring: Ring,
    // Key and id, strictly sorted.
    pairs: Vec<(SliceKey, u32)>,
}

impl BoundedRing {
    /// Makes the policy with so many virtual nodes for a task of capacity 1, a bound (1.15 in most comparisons; at least 1),
    /// and the order of requests by a seed.
    pub fn new(virtual_nodes: u32, bound: f64, seed: u64) -> Self {
        let (ring, prng) = (Ring::new(virtual_nodes), Prng::new(seed));
        Self { ring, before: None, bound: bound.max(1.0), prng }
    }

    /// Cuts an interval's load into chunks, each of one key (its place in the interval), in a random order.
    fn chunks(&mut self, interval: &Interval, most: u64) -> Vec<(u32, u64)> {
        let mut chunks = Vec::new();
        for (place, (_, load)) in (0..).zip(interval.loads()) {
            let mut rest = *load;
            while rest > 0 {
                let chunk = rest.min(most);
                chunks.push((place, chunk));
                rest -= chunk;
            }
        }
        for place in (1..chunks.len()).rev() {
            chunks.swap(place, self.prng.below(place as u64 + 1) as usize);
        }
        chunks
    }
}

impl Policy for BoundedRing {
    fn name(&self) -> String {
        "bounded-ring".to_owned()
    }

    fn plan(&mut self, round: &Round<'_>) {
        self.ring.place(round.members);
    }

    fn serve(&mut self, members: &[Member], interval: &Interval) -> Served {
        self.ring.place(members);
        let points = self.ring.points();
        let capacity: f64 = members.iter().map(|member| f64::from(member.capacity)).sum();
        let due: Vec<f64> = members
            .iter()
            .map(|member| self.bound * f64::from(member.capacity) / capacity)
            .collect();
        let seat = |id: u32| members.binary_search_by_key(&id, |member| member.id);
        let seats: Vec<usize> = points
            .iter()
            .map(|point| seat(point.1).expect("only members stand on the ring"))
            .collect();
        let starts = self.ring.firsts(interval);

        let most = (interval.total() / (members.len() as u64 * CHUNKS_A_TASK)).max(1);
        let mut loads = vec![0.0; members.len()];
        let mut served = Vec::new();
        let mut so_far = 0.0;
        for (place, chunk) in self.chunks(interval, most) {
            so_far += chunk as f64;
            let start = starts[place as usize] as usize;
            let clockwise = seats[start..].iter().chain(&seats[..start]);
            // The bounds of all add up to more than all load, so somebody is below; rounding cannot leave nobody either, for
            // the key's own task takes it then.
            let taker = clockwise.copied().find(|seat| loads[*seat] < due[*seat] * so_far);
            let taker = taker.unwrap_or(seats[start]);
            loads[taker] += chunk as f64;
            served.push(((place, members[taker].id), chunk));
        }

        served.sort_unstable();
        let mut pairs = Vec::with_capacity(served.len());
        let mut held = self.before.as_ref().map(Before::walk);
        let mut news = 0;
        for chunks in served.chunk_by(|a, b| a.0 == b.0) {
            let (place, id) = chunks[0].0;
            let key = interval.loads()[place as usize].0;
            if held.as_mut().is_some_and(|held| !held.held(key, id)) {
                news += chunks.iter().map(|chunk| chunk.1).sum::<u64>();
            }
            pairs.push((key, id));
        }
        self.before = Some(Before { ring: self.ring.clone(), pairs });
        let churn_load = news as f64 / interval.total().max(1) as f64;
        // Moves and churn by key range belong to plans; here there is none.
        Served { loads, churn_load, ..Served::default() }
    }

    fn slices(&self) -> usize {
        self.ring.points().len()
    }
}

impl Before {
    fn walk(&self) -> Held<'_> {
        Held { ring: &self.ring, rest: &self.pairs }
    }
}

/// Says who had a key, for keys in order.
struct Held<'a> {
    ring: &'a Ring,
    rest: &'a [(SliceKey, u32)],
}

impl Held<'_> {
    /// Says whether a task served the key, or would have if the key had been asked for.
    fn held(&mut self, key: SliceKey, id: u32) -> bool {
        while self.rest.first().is_some_and(|pair| pair.0 < key) {
            self.rest = &self.rest[1..];
        }
        let mut servers = self.rest.iter().take_while(|pair| pair.0 == key).peekable();
        match servers.peek() {
            Some(_) => servers.any(|pair| pair.1 == id),
            None => self.ring.points()[self.ring.next(key)].1 == id,
        }
    }
}

/// How many chunks a task's due load makes: the bound holds up to one of them, a five-hundredth.
const CHUNKS_A_TASK: u64 = 500;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::board::tests::members;

    fn ring() -> BoundedRing {
        BoundedRing::new(100, 1.15, 7)
    }

    /// A hot key and a thousand others.
    fn skewed(hot: u64) -> Interval {
        let mut loads = vec![(SliceKey::of(b"hot"), hot)];
        loads.extend((0..1_000_u64).map(|key| (SliceKey::of(&key.to_le_bytes()), 10)));
        Interval::new(loads)
    }

    #[test]
    fn no_task_is_above_its_bound_by_more_than_a_chunk() {
        let mut tasks = members(10);
        for uneven in [false, true] {
            tasks[3].capacity = if uneven { 3_000 } else { 1_000 };
            let capacity: f64 = tasks.iter().map(|task| f64::from(task.capacity)).sum();
            for hot in [0, 1_000, 20_000] {
                let interval = skewed(hot);
                let served = ring().serve(&tasks, &interval);
                let total: f64 = served.loads.iter().sum();
                assert_eq!(total, interval.total() as f64);
                for (load, task) in served.loads.iter().zip(&tasks) {
                    let due = total * f64::from(task.capacity) / capacity;
                    let chunk = (total / 10.0 / CHUNKS_A_TASK as f64).max(10.0);
                    assert!(*load <= 1.15 * due + chunk, "{hot}: {load} of {due}");
                }
            }
        }
    }

    #[test]
    fn a_key_stays_with_its_task_while_that_has_room() {
        // With a bound that nobody reaches it is consistent hashing.
        let tasks = members(10);
        let mut ring = BoundedRing::new(100, 1e9, 7);
        let served = ring.serve(&tasks, &skewed(500));
        let mut own = vec![0.0; 10];
        for (key, load) in skewed(500).loads() {
            own[ring.ring.points()[ring.ring.next(*key)].1 as usize] += *load as f64;
        }
        assert_eq!(served.loads, own);
        assert_eq!(ring.serve(&tasks, &skewed(500)).churn_load, 0.0);
    }

    #[test]
    fn a_key_too_hot_for_one_task_walks_on() {
        // Half of all load is one key: five tasks' worth, and each may take 1.15.
        let mut ring = ring();
        ring.serve(&members(10), &skewed(10_000));
        let pairs = &ring.before.as_ref().unwrap().pairs;
        let servers = pairs.iter().filter(|pair| pair.0 == SliceKey::of(b"hot")).count();
        assert!(servers >= 5, "{servers}");
    }

    #[test]
    fn churn_is_load_on_a_task_that_did_not_serve_the_key_before() {
        let tasks = members(2);
        let (a, b) = (Interval::new(vec![(SliceKey(1), 6)]), Interval::new(vec![(SliceKey(2), 6)]));
        let mut ring = BoundedRing::new(1, 1e9, 7);
        assert_eq!(ring.serve(&tasks, &a).churn_load, 0.0, "nothing was before");
        assert_eq!(ring.serve(&tasks, &b).churn_load, 0.0, "its own task would have served it");
        let (owner, other) = {
            let owner = ring.ring.points()[ring.ring.next(SliceKey(2))].1;
            (owner as usize, 1 - owner as usize)
        };
        let moved = ring.serve(&tasks[other..=other], &b);
        assert_eq!((moved.churn_load, moved.loads), (1.0, vec![6.0]), "task {owner} is gone");
        assert_eq!(ring.serve(&tasks[other..=other], &b).churn_load, 0.0);
    }

    #[test]
    fn an_interval_without_load_is_served() {
        let served = ring().serve(&members(3), &Interval::default());
        assert_eq!(served, Served { loads: vec![0.0; 3], ..Served::default() });
    }
}
