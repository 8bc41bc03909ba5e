//! Requests of one worker that wait for the same kind of thing: an assignment by which their slices have settled, or a pause's
//! end. They go in the order in which they came, at the pace of a ramp.

use std::collections::{BTreeMap, BTreeSet};

use mandoline_core::key::SliceKey;
use mandoline_core::ramp::{BURST, Ramp};
use mandoline_core::time::Time;
use tokio::sync::oneshot;

/// Requests that wait for the same kind of thing; `F` says for what each of them does.
pub(crate) struct Line<F> {
    // By arrival. Those who were told to go are here until they have gone, so that nobody with their key overtakes them.
    members: BTreeMap<u64, Member<F>>,
    by_key: BTreeSet<(SliceKey, u64)>,
    ramp: Ramp,
}

struct Member<F> {
    key: SliceKey,
    waits_for: F,
    // None once it was told.
    tell: Option<oneshot::Sender<Turn>>,
}

/// What becomes of a request whose turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// It goes on.
    Go,
    /// It is refused: what it waited for is not to be.
    Fail,
}

impl<F> Line<F> {
    pub(crate) const fn new(ramp: Ramp) -> Self {
        Self { members: BTreeMap::new(), by_key: BTreeSet::new(), ramp }
    }

    /// Takes a request in at its place, which nobody else has.
    pub(crate) fn join(
        &mut self,
        arrival: u64,
        key: SliceKey,
        waits_for: F,
    ) -> oneshot::Receiver<Turn> {
        let (tell, turn) = oneshot::channel();
        self.members.insert(arrival, Member { key, waits_for, tell: Some(tell) });
        self.by_key.insert((key, arrival));
        turn
    }

    /// The same, while those before it are let go.
    pub(crate) fn join_late(
        &mut self,
        arrival: u64,
        key: SliceKey,
        waits_for: F,
    ) -> oneshot::Receiver<Turn> {
        self.ramp.joined();
        self.join(arrival, key, waits_for)
    }

    /// Forgets a request that was told to go, or does not wait any longer.
    pub(crate) fn leave(&mut self, arrival: u64) {
        if let Some(member) = self.members.remove(&arrival) {
            self.by_key.remove(&(member.key, arrival));
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.members.len()
    }

    /// Gives what the last with this key waits for.
    pub(crate) fn last(&self, key: SliceKey) -> Option<&F> {
        let (_, arrival) = self.by_key.range((key, 0)..=(key, u64::MAX)).next_back()?;
        self.members.get(arrival).map(|member| &member.waits_for)
    }

    /// Changes the pace.
    pub(crate) fn goes_by(&mut self, ramp: Ramp) {
        self.ramp = ramp;
    }

    /// Tells those whose turn it is, of those for whom all is ready. Says when to look in next, if more of them wait.
    pub(crate) fn let_go(
        &mut self,
        now: Time,
        turn: Turn,
        is_ready: impl Fn(SliceKey, &F) -> bool,
    ) -> Option<Time> {
        let ready =
            |member: &Member<F>| member.tell.is_some() && is_ready(member.key, &member.waits_for);
        let heads = self.members.iter().filter(|(_, member)| ready(member));
        // One more than may go at once shows that there are more.
        let heads: Vec<u64> = heads.map(|(arrival, _)| *arrival).take(BURST + 1).collect();
        let going = self.ramp.tick(now, heads.len());
        for arrival in &heads[..going] {
            let tell = self.members.get_mut(arrival).and_then(|member| member.tell.take());
            // Whoever leaves at this moment does not hear it.
            let _: Option<Result<(), Turn>> = tell.map(|tell| tell.send(turn));
        }
        (heads.len() > going).then(|| self.ramp.deadline())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Tells those whose turn it is, and gives who was.
    fn gone(waiting: &mut [(u64, oneshot::Receiver<Turn>)]) -> Vec<u64> {
        waiting
            .iter_mut()
            .filter_map(|(arrival, turn)| turn.try_recv().is_ok().then_some(*arrival))
            .collect()
    }

    fn key(at: u64) -> SliceKey {
        SliceKey(at)
    }

    #[test]
    fn they_go_in_the_order_in_which_they_came_once_all_is_ready() {
        let mut line = Line::new(Ramp::fastest(Time::ZERO));
        let mut waiting: Vec<_> =
            [(1, 5), (2, 3), (3, 5)].map(|(n, at)| (n, line.join(n, key(at), at))).into();
        assert_eq!(line.let_go(Time::ZERO, Turn::Go, |_, at| *at > 9), None);
        assert_eq!(gone(&mut waiting), Vec::<u64>::new());
        assert_eq!(line.let_go(Time::ZERO, Turn::Go, |_, at| *at == 5), None);
        assert_eq!(gone(&mut waiting), [1, 3]);
        // Until they have gone, others with their key wait behind them.
        assert_eq!(line.last(key(5)), Some(&5));
        line.leave(1);
        line.leave(3);
        assert_eq!((line.last(key(5)), line.last(key(3)), line.len()), (None, Some(&3), 1));
        line.leave(2);
        line.leave(2);
        assert!(line.is_empty());
    }

    #[test]
    fn a_ramp_lets_the_head_go_first_also_for_one_who_came_late() {
        let mut line = Line::new(Ramp::fastest(Time::ZERO));
        let mut waiting: Vec<_> = (0..4).map(|n| (n, line.join(n, key(n), ()))).collect();
        let over = Duration::from_secs(4);
        line.goes_by(Ramp::new(Time::ZERO, line.len(), over, 1));
        waiting.push((9, line.join_late(9, key(0), ())));
        let due = line.let_go(Time::ZERO, Turn::Go, |_, ()| true);
        assert_eq!(gone(&mut waiting), [0]);
        assert!(due.is_some_and(|due| due <= Time::from_millis(1_000)));
        let end = Time::ZERO + over;
        assert_eq!(line.let_go(end, Turn::Go, |_, ()| true), None);
        assert_eq!(gone(&mut waiting), [1, 2, 3, 9]);
    }
}
