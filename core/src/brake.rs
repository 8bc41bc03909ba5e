//! Whether to believe that many tasks are gone at once.
//!
//! One lost task of three is an everyday matter: what it served goes elsewhere within seconds. Where more than a set share of
//! all tasks go missing within one lease it is another: mostly the leader is the one that is cut off, or whatever struck
//! them will let go of them again, and giving all that they have to the few that are left would bring those down, too. So
//! nothing is reassigned until somebody knows better: the tasks, by coming back; their callers, whose requests to them fail or
//! do not; or an operator, who says so.
//!
//! A hold has no end of its own. Waiting is safe in either kind of job, for the assignment stays as it is; but keys of
//! tasks that really are gone remain unserved meanwhile, so whoever owns a brake must be loud about it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::spec::{JobSpec, Ratio};
use crate::task::SessionId;
use crate::time::Time;

/// Below so many tasks, most of them may well be gone: two of three are stopped by hand, or by a bad minute.
const FROM_TASKS: usize = 4;

/// When to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// More than this share of all tasks may not go within one lease; all of them: no number is too large.
    pub share: Ratio,
    /// The time in which losses are counted together.
    pub lease: Duration,
}

impl From<&JobSpec> for Limits {
    fn from(spec: &JobSpec) -> Self {
        Self { share: spec.brake, lease: spec.lease }
    }
}

/// What callers say of a task that the leader does not hear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// They are served: the leader is the one that is cut off.
    Served,
    /// Nearly all that they send there fails.
    Failing,
}

/// Who is missing, of how many.
#[derive(Clone, Copy, Debug)]
pub struct Muster<'a> {
    /// Sessions that were silent for as long as a lost one is.
    pub missing: &'a BTreeSet<SessionId>,
    /// Sessions that have gone quiet, the missing among them: their time is about to come.
    pub quiet: usize,
    /// All sessions, whatever they do.
    pub tasks: usize,
    /// Sessions that are lost by an operator's word.
    pub believed: &'a BTreeSet<SessionId>,
}

/// A hold: what is known of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// Since when.
    pub since: Time,
    /// Who is missing, and what their callers say of them, since when, where they say anything.
    pub missing: BTreeMap<SessionId, Option<(Word, Time)>>,
    /// How many tasks there were when it began, those included that had just been lost.
    pub tasks: usize,
    /// When one that was missing came back, the last time.
    returned: Option<Time>,
}

/// Believes in single losses, and holds where there are too many.
#[derive(Clone, Debug)]
pub struct Brake {
    limits: Limits,
    /// When tasks were believed to be lost, within the last lease.
    lost: VecDeque<Time>,
    hold: Option<Hold>,
}

impl Brake {
    /// Begins with no loss.
    pub const fn new(limits: Limits) -> Self {
        Self { limits, lost: VecDeque::new(), hold: None }
    }

    /// Takes other limits from the job's spec.
    pub const fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Gives the hold that is on.
    pub const fn hold(&self) -> Option<&Hold> {
        self.hold.as_ref()
    }

    /// Says who of the missing is to be taken for lost now. Asked again and again, as long as somebody is missing.
    pub fn judge(&mut self, now: Time, muster: Muster<'_>) -> BTreeSet<SessionId> {
        let Limits { lease, .. } = self.limits;
        self.lost.retain(|at| now.since(*at) < lease);
        let known = self.known_lost(now, muster);
        if let Some(hold) = &mut self.hold {
            hold.note(now, muster.missing);
        }
        let left = muster.missing.len() - known.len();
        // Those that somebody knows to be lost tell nothing of the others.
        let too_many = self.too_many(muster.quiet - known.len(), muster.tasks - known.len());
        let over = match &self.hold {
            None => too_many && muster.tasks + self.lost.len() >= FROM_TASKS,
            // Where tasks come back the others are given time to do so, each time one lease.
            Some(hold) => {
                left > 0 && (too_many || hold.returned.is_some_and(|at| now.since(at) < lease))
            }
        };
        if !over {
            self.hold = None;
            self.lost.extend(std::iter::repeat_n(now, left));
            return muster.missing.clone();
        }
        if left > 0 {
            let hold = self.hold.get_or_insert_with(|| Hold {
                since: now,
                missing: BTreeMap::new(),
                tasks: muster.tasks + self.lost.len(),
                returned: None,
            });
            hold.note(now, muster.missing);
        }
        known
    }

    /// Takes the newest belief in a loss back: nothing came of it.
    pub fn acquit(&mut self) {
        self.lost.pop_back();
    }

    /// Takes what callers say of those that are missing; whoever is not named, of them they say nothing.
    pub fn hear(&mut self, now: Time, words: &BTreeMap<SessionId, Word>) {
        let Some(hold) = &mut self.hold else { return };
        for (session, heard) in &mut hold.missing {
            let before = heard.take();
            *heard = words.get(session).map(|word| match before {
                Some((same, since)) if same == *word => (same, since),
                _ => (*word, now),
            });
        }
    }

    /// Those of the missing that are lost by an operator's word, or by that of their callers for as long as a lease.
    fn known_lost(&self, now: Time, muster: Muster<'_>) -> BTreeSet<SessionId> {
        let fails = |session: &SessionId| {
            let heard = self.hold.as_ref().and_then(|hold| hold.missing.get(session)).copied();
            matches!(heard.flatten(), Some((Word::Failing, since)) if now.since(since) >= self.limits.lease)
        };
        let known = |session: &&SessionId| muster.believed.contains(session) || fails(session);
        muster.missing.iter().filter(known).copied().collect()
    }

    fn too_many(&self, away: usize, tasks: usize) -> bool {
        let (away, all) = ((away + self.lost.len()) as u128, (tasks + self.lost.len()) as u128);
        away * 1_000_000 > all * u128::from(self.limits.share.millionths())
    }
}

impl Hold {
    /// Brings the list of the missing up to date.
    fn note(&mut self, now: Time, missing: &BTreeSet<SessionId>) {
        let before = self.missing.len();
        self.missing.retain(|session, _| missing.contains(session));
        if self.missing.len() < before {
            self.returned = Some(now);
        }
        for session in missing {
            self.missing.entry(*session).or_insert(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(5);

    fn at(seconds: u64) -> Time {
        Time::from_millis(seconds * 1_000)
    }

    fn set(sessions: &[u64]) -> BTreeSet<SessionId> {
        sessions.iter().copied().map(SessionId).collect()
    }

    /// A brake that holds from more than half on, and of whose tasks so many are missing.
    struct Scene {
        brake: Brake,
        tasks: usize,
        believed: BTreeSet<SessionId>,
    }

    impl Scene {
        fn new(tasks: usize) -> Self {
            let limits = Limits { share: Ratio::percent(50), lease: LEASE };
            Self { brake: Brake::new(limits), tasks, believed: BTreeSet::new() }
        }

        /// Who is taken for lost; those are gone from then on.
        fn judge(&mut self, second: u64, missing: &[u64]) -> BTreeSet<SessionId> {
            let missing = set(missing);
            let (quiet, tasks) = (missing.len(), self.tasks);
            let believed = &self.believed;
            let lost =
                self.brake.judge(at(second), Muster { missing: &missing, quiet, tasks, believed });
            self.tasks -= lost.len();
            lost
        }

        fn hear(&mut self, second: u64, words: &[(u64, Word)]) {
            let words = words.iter().map(|(session, word)| (SessionId(*session), *word));
            self.brake.hear(at(second), &words.collect());
        }
    }

    #[test]
    fn an_ordinary_loss_is_believed_at_once() {
        for (tasks, missing) in [(1, 1), (3, 1), (3, 3), (4, 2), (100, 50)] {
            let missing: Vec<u64> = (1..=missing).collect();
            assert_eq!(Scene::new(tasks).judge(0, &missing), set(&missing), "of {tasks}");
        }
    }

    #[test]
    fn too_many_at_once_are_held_for_ever() {
        let mut scene = Scene::new(5);
        for second in 0..10_000 {
            assert_eq!(scene.judge(second, &[1, 2, 3]), set(&[]));
        }
        let hold = scene.brake.hold().unwrap();
        assert_eq!((hold.since, hold.missing.len(), hold.tasks), (at(0), 3, 5));
    }

    #[test]
    fn losses_within_one_lease_add_up_and_later_ones_do_not() {
        let mut scene = Scene::new(5);
        assert_eq!(scene.judge(0, &[1]), set(&[1]));
        assert_eq!(scene.judge(3, &[2]), set(&[2]));
        assert_eq!(scene.judge(4, &[3]), set(&[]), "the third of five");
        assert_eq!(scene.judge(5, &[3]), set(&[3]), "the first is a lease ago");
        let mut scene = Scene::new(5);
        for session in 1..=5 {
            let lost = scene.judge(session * 5, &[session]);
            assert_eq!(lost, set(&[session]), "each a lease after the other");
        }
    }

    #[test]
    fn those_about_to_go_missing_count() {
        let mut scene = Scene::new(5);
        let (missing, believed) = (set(&[1]), set(&[]));
        let muster = Muster { missing: &missing, quiet: 3, tasks: 5, believed: &believed };
        assert_eq!(scene.brake.judge(at(0), muster), set(&[]));
    }

    #[test]
    fn as_long_as_tasks_come_back_the_others_are_waited_for() {
        let mut scene = Scene::new(10);
        assert_eq!(scene.judge(0, &[1, 2, 3, 4, 5, 6]), set(&[]));
        assert_eq!(scene.judge(20, &[2, 3, 4, 5, 6]), set(&[]), "half of them, yet one is back");
        assert_eq!(scene.judge(24, &[3, 4, 5, 6]), set(&[]));
        assert_eq!(scene.judge(28, &[3, 4, 5, 6]), set(&[]));
        assert_eq!(scene.judge(29, &[3, 4, 5, 6]), set(&[3, 4, 5, 6]), "a lease after the last");
        assert!(scene.brake.hold().is_none());
    }

    #[test]
    fn all_back_is_the_end_of_it() {
        let mut scene = Scene::new(5);
        assert_eq!(scene.judge(0, &[1, 2, 3]), set(&[]));
        assert_eq!(scene.judge(2, &[]), set(&[]));
        assert!(scene.brake.hold().is_none());
        assert_eq!(scene.judge(3, &[1]), set(&[1]), "an ordinary loss again");
    }

    #[test]
    fn others_in_their_place_end_it() {
        let mut scene = Scene::new(5);
        assert_eq!(scene.judge(0, &[1, 2, 3]), set(&[]));
        scene.tasks = 8;
        assert_eq!(scene.judge(9, &[1, 2, 3]), set(&[1, 2, 3]));
    }

    #[test]
    fn an_operator_is_believed_and_only_as_far_as_his_word_goes() {
        let mut scene = Scene::new(10);
        let all = [1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(scene.judge(0, &all), set(&[]));
        scene.believed = set(&[1, 2]);
        assert_eq!(scene.judge(1, &all), set(&[1, 2]));
        assert_eq!(scene.judge(9, &all[2..]), set(&[]), "six of eight are held still");
        scene.believed = set(&all);
        assert_eq!(scene.judge(10, &all[2..]), set(&all[2..]));
        assert!(scene.brake.hold().is_none());
    }

    #[test]
    fn callers_whose_requests_fail_for_a_lease_are_believed() {
        let mut scene = Scene::new(10);
        let all = [1, 2, 3, 4, 5, 6, 7, 8];
        let gone = [(1, Word::Failing), (2, Word::Failing), (3, Word::Served)];
        assert_eq!(scene.judge(0, &all), set(&[]));
        scene.hear(1, &gone);
        assert_eq!(scene.judge(5, &all), set(&[]));
        scene.hear(5, &gone);
        assert_eq!(scene.judge(6, &all), set(&[1, 2]));
        scene.hear(6, &gone);
        assert_eq!(scene.judge(100, &all[2..]), set(&[]), "one is served, of five nobody says");
        let hold = scene.brake.hold().unwrap();
        assert_eq!(hold.missing[&SessionId(3)], Some((Word::Served, at(1))));
        assert_eq!(hold.missing[&SessionId(4)], None);
    }

    #[test]
    fn callers_that_fall_silent_or_are_served_again_begin_anew() {
        for between in [vec![], vec![(1, Word::Served)]] {
            let mut scene = Scene::new(4);
            assert_eq!(scene.judge(0, &[1, 2, 3]), set(&[]));
            scene.hear(0, &[(1, Word::Failing)]);
            scene.hear(4, &between);
            scene.hear(5, &[(1, Word::Failing)]);
            assert_eq!(scene.judge(9, &[1, 2, 3]), set(&[]));
            assert_eq!(scene.judge(10, &[1, 2, 3]), set(&[1]));
        }
    }

    #[test]
    fn a_share_of_all_never_holds() {
        let mut scene = Scene::new(5);
        scene.brake.set_limits(Limits { share: Ratio::percent(100), lease: LEASE });
        assert_eq!(scene.judge(0, &[1, 2, 3, 4, 5]), set(&[1, 2, 3, 4, 5]));
    }
}
