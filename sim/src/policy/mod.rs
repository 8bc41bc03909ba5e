//! The policies that compete, and what they have in common: each sees the last interval and is judged on the next.
//!
//! Most policies are planners: they say who holds what, and the harness does the rest (`Planned`). One that decides request by
//! request, such as a ring with bounded loads, is a `Policy` of its own.

pub mod fixed;
mod board;
pub mod slicer;
pub mod dicer;
pub mod ring;
pub mod bounded_ring;
pub mod spilling;
pub mod mandoline;

use crate::fleet::Member;
use crate::interval::Interval;
use crate::layout::Layout;

/// All that a plan may depend on.
#[derive(Clone, Copy, Debug)]
pub struct Round<'a> {
    /// Who lives in the coming interval, sorted by id. Never empty.
    pub members: &'a [Member],
    /// What was asked for in the interval before; none in the first.
    pub seen: Option<&'a Interval>,
    /// Whose report of that interval is missing or late, sorted: `Layout::measure_heard` leaves them out.
    pub silent: &'a [u32],
    /// The coming interval, for the clairvoyant alone: a planner that looks at it cheats.
    pub next: &'a Interval,
    /// Which interval it is, from 0.
    pub interval: usize,
}

/// Decides who holds what. Called once an interval: `observe`, `plan`, `layout`, in this order.
pub trait Planner: Send {
    /// Names the policy, as in the output.
    fn name(&self) -> String;

    /// Gathers what the reports of the last interval told: slice loads, hot keys. Tasks would have done that, so it is not
    /// counted as planning time.
    fn observe(&mut self, round: &Round<'_>) {
        let _ = round;
    }

    /// Decides. This is what is timed.
    fn plan(&mut self, round: &Round<'_>);

    /// Writes down who holds what from now on. Every slice should be held by members of the round; what is not goes unserved.
    fn layout(&self) -> Layout;
}

/// How an interval went.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Served {
    /// What landed on each member, in the order of the members.
    pub loads: Vec<f64>,
    /// The share of the load that landed on members that did not hold its keys in the interval before; none in the first.
    pub churn_load: f64,
    /// The same by key range.
    pub churn_keys: f64,
    /// Replicas that came, went or moved.
    pub moves: u64,
    /// The share of the load that landed on nobody.
    pub unserved: f64,
}

/// A competitor. Called once an interval: `observe`, `plan`, `serve`, in this order.
pub trait Policy: Send {
    /// Names the policy, as in the output.
    fn name(&self) -> String;

    /// Gathers what the last interval told; not timed.
    fn observe(&mut self, round: &Round<'_>) {
        let _ = round;
    }

    /// Decides what it decides before the interval. This is what is timed.
    fn plan(&mut self, round: &Round<'_>);

    /// Serves the interval.
    fn serve(&mut self, members: &[Member], interval: &Interval) -> Served;

    /// Counts the slices that it needs, or what comes nearest, such as virtual nodes.
    fn slices(&self) -> usize;
}

/// A planner as a competitor.
#[derive(Debug)]
pub struct Planned<P> {
    planner: P,
    // As of the last interval served, and as planned for the next.
    before: Option<Layout>,
    now: Option<Layout>,
}

impl<P: Planner> Planned<P> {
    /// Lets a planner compete.
    pub fn new(planner: P) -> Self {
        Self { planner, before: None, now: None }
    }

    /// Gives the layout that was planned last.
    pub fn layout(&self) -> Option<&Layout> {
        self.now.as_ref()
    }
}

impl<P: Planner> Policy for Planned<P> {
    fn name(&self) -> String {
        self.planner.name()
    }

    fn observe(&mut self, round: &Round<'_>) {
        self.planner.observe(round);
    }

    fn plan(&mut self, round: &Round<'_>) {
        self.planner.plan(round);
    }

    fn serve(&mut self, members: &[Member], interval: &Interval) -> Served {
        self.before = self.now.take();
        let now = self.now.insert(self.planner.layout());
        let loads = now.loads(interval, members);
        let moved = self.before.as_ref().map(|before| Layout::churn(before, now, interval));
        let moved = moved.unwrap_or_default();
        Served {
            loads: loads.members,
            churn_load: moved.load,
            churn_keys: moved.keys,
            moves: moved.moves,
            unserved: loads.unserved / interval.total().max(1) as f64,
        }
    }

    fn slices(&self) -> usize {
        self.now.as_ref().map_or(0, Layout::count)
    }
}

#[cfg(test)]
mod tests {
    use mandoline_core::key::SliceKey;

    use super::*;
    use crate::layout::Holders;

    /// Gives everything to the member whose number is the interval's.
    struct Turns(u32);

    impl Planner for Turns {
        fn name(&self) -> String {
            "turns".to_owned()
        }

        fn plan(&mut self, round: &Round<'_>) {
            self.0 = round.interval as u32;
        }

        fn layout(&self) -> Layout {
            Layout::even(1, |_| Holders::one(self.0))
        }
    }

    #[test]
    fn a_plan_is_judged_on_the_interval_it_was_made_for_and_against_the_plan_before() {
        let member = |id| Member { id, capacity: 1_000, zone: 0, region: 0, revision: 0 };
        let members = [member(0), member(1)];
        let interval = Interval::new(vec![(SliceKey(5), 8)]);
        let mut policy = Planned::new(Turns(9));
        let mut serve = |number| {
            let (seen, silent) = (None, &[][..]);
            policy.plan(&Round {
                members: &members,
                seen,
                silent,
                next: &interval,
                interval: number,
            });
            policy.serve(&members, &interval)
        };
        assert_eq!(serve(0), Served { loads: vec![8.0, 0.0], ..Served::default() });
        let all = Served { churn_load: 1.0, churn_keys: 1.0, moves: 1, ..Served::default() };
        assert_eq!(serve(1), Served { loads: vec![0.0, 8.0], ..all });
        let lost = Served {
            churn_load: 1.0,
            churn_keys: 1.0,
            moves: 1,
            unserved: 1.0,
            loads: vec![0.0, 0.0],
        };
        assert_eq!(serve(2), lost);
    }
}
