//! What a table has said, within a bound, and who waits for what it has not said yet.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use mandoline_core::key::KEY_MAX_BYTES;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::lookup::{Answer, Fault, Found, Limits, LookupStats, Told};

/// What an answer takes beside its bytes: two maps' entries and their allocations, roughly.
const ENTRY_BYTES: usize = 128;
/// How often one key is asked for again at once, since it changed while it was asked for. Then whoever waits gets what there is.
const ROUNDS_MAX: u8 = 3;

/// For how long a key is not asked for again after a fault of its own: one that hangs, and is wanted all the time, must not keep the
/// table busy for itself.
const REST_FOR: Duration = Duration::from_secs(1);
/// How many such keys are remembered.
const RESTING_MAX: usize = 1024;

/// What a waiting request hears.
type Said = oneshot::Sender<Result<Answer, Fault>>;
/// How it hears it.
pub(super) type Hears = oneshot::Receiver<Result<Answer, Fault>>;

#[derive(Debug)]
pub(super) struct Cache {
    limits: Limits,
    answers: HashMap<Arc<[u8]>, Entry>,
    /// The oldest first. A number that is not the entry's own is of one that was replaced.
    order: VecDeque<(Arc<[u8]>, u64)>,
    questions: HashMap<Box<[u8]>, Question>,
    /// Keys that had a fault of their own.
    resting: HashMap<Box<[u8]>, Rest>,
    bytes: usize,
    next: u64,
    stats: LookupStats,
}

#[derive(Debug)]
struct Entry {
    answer: Answer,
    /// When the table was asked for it.
    since: Instant,
    number: u64,
}

#[derive(Debug)]
struct Rest {
    fault: Fault,
    began: Instant,
    /// When the table was asked.
    asked: Instant,
}

#[derive(Debug)]
struct Question {
    since: Instant,
    /// When the table was asked, if it was.
    asked: Option<Instant>,
    /// Those who wait, and since when the table's word must be.
    waiting: Vec<(Said, Option<Instant>)>,
    state: State,
    rounds: u8,
}

/// How far a question is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Queued,
    Asked,
    /// The key has changed since it was asked for, so the answer may be of before.
    Outdated,
}

/// What is known of a key.
pub(super) enum Known {
    Fresh(Answer),
    /// It is being asked for.
    Asked(Hears),
    /// It has been asked for for too long already, or was in vain a moment ago.
    Faulty(Fault),
    /// It is for the caller to ask.
    Nothing(Hears),
}

impl Cache {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            answers: HashMap::new(),
            order: VecDeque::new(),
            questions: HashMap::new(),
            resting: HashMap::new(),
            bytes: 0,
            next: 0,
            stats: LookupStats::default(),
        }
    }

    /// Gives what the table said of a key, since then if that is given and whenever if not.
    fn entry(&self, key: &[u8], since: Option<Instant>) -> Option<&Entry> {
        self.answers.get(key).filter(|entry| since.is_none_or(|since| entry.since >= since))
    }

    /// The same if it is still good.
    pub(super) fn fresh(&self, key: &[u8], now: Instant, since: Option<Instant>) -> Option<Answer> {
        let entry = self.entry(key, since)?;
        let ttl = if entry.answer.is_some() { self.limits.ttl } else { self.limits.negative_ttl };
        (now.duration_since(entry.since) < ttl).then(|| entry.answer.clone())
    }

    /// Says what is known of a key, or is yet to be asked for; by the table as it is now or, if that is given, was since then.
    pub(super) fn get(&mut self, key: &[u8], now: Instant, since: Option<Instant>) -> Known {
        if let Some(answer) = self.fresh(key, now, since) {
            match answer {
                Some(_) => self.stats.hits += 1,
                None => self.stats.negative_hits += 1,
            }
            return Known::Fresh(answer);
        }
        self.stats.misses += 1;
        if let Some(rest) = self.resting.get(key)
            && now.duration_since(rest.began) < REST_FOR
            && since.is_none_or(|since| rest.asked >= since)
        {
            return Known::Faulty(rest.fault.clone());
        }
        let (said, hears) = oneshot::channel();
        match self.questions.get_mut(key) {
            Some(question) if now.duration_since(question.since) >= self.limits.within => {
                Known::Faulty(Fault::Late)
            }
            Some(question) => {
                if question.asked.zip(since).is_some_and(|(asked, since)| asked < since) {
                    question.outdated();
                }
                question.waiting.push((said, since));
                Known::Asked(hears)
            }
            None => {
                let (waiting, state) = (vec![(said, since)], State::Queued);
                let question = Question { since: now, asked: None, waiting, state, rounds: 0 };
                self.questions.insert(key.into(), question);
                Known::Nothing(hears)
            }
        }
    }

    /// Counts a fault, and gives what was known before in its place, if that may still be said: not if it is of before `since`.
    pub(super) fn fails(
        &mut self,
        key: &[u8],
        now: Instant,
        since: Option<Instant>,
        fault: Fault,
    ) -> Result<Arc<[u8]>, Fault> {
        *match fault {
            Fault::Unknown | Fault::Unasked => return Err(fault),
            Fault::Two => &mut self.stats.two,
            Fault::Length(_) => &mut self.stats.length,
            Fault::Down(_) => &mut self.stats.down,
            Fault::Late => &mut self.stats.late,
            Fault::Busy => &mut self.stats.busy,
        } += 1;
        let Some(Entry { answer: Some(answer), since, .. }) = self.entry(key, since) else {
            return Err(fault);
        };
        let serves = matches!(fault, Fault::Down(_) | Fault::Late | Fault::Busy)
            && now.duration_since(*since) < self.limits.ttl + self.limits.stale;
        if !serves {
            return Err(fault);
        }
        let answer = Arc::clone(answer);
        self.stats.stale += 1;
        Ok(answer)
    }

    pub(super) fn drop_question(&mut self, key: &[u8]) {
        self.questions.remove(key);
    }

    /// Somebody asks the table now: what changes from now on, the answer may not have yet.
    pub(super) fn asks(&mut self, key: &[u8], now: Instant) {
        self.stats.questions += 1;
        if let Some(question) = self.questions.get_mut(key) {
            (question.state, question.asked) = (State::Asked, Some(now));
        }
    }

    /// Takes what the table says, and tells those who wait.
    pub(super) fn answer(&mut self, key: &[u8], found: Found, now: Instant) -> Told {
        let answer = found.and_then(|answer| match answer {
            Some(answer) if !(1..=KEY_MAX_BYTES).contains(&answer.len()) => {
                Err(Fault::Length(answer.len()))
            }
            answer => Ok(answer.map(Arc::from)),
        });
        let question = self.questions.get_mut(key);
        let is_outdated = question.as_ref().is_some_and(|one| one.state == State::Outdated);
        if let Some(question) = question.filter(|one| is_outdated && one.rounds < ROUNDS_MAX) {
            (question.state, question.rounds) = (State::Asked, question.rounds + 1);
            question.asked = Some(now);
            self.stats.questions += 1;
            return Told::Again;
        }
        let asked = self.questions.get(key).and_then(|question| question.asked).unwrap_or(now);
        match &answer {
            Ok(answer) if !is_outdated => self.keep(key, answer.clone(), asked),
            Err(fault @ (Fault::Two | Fault::Length(_) | Fault::Late)) if !is_outdated => {
                self.rest(key, Rest { fault: fault.clone(), began: now, asked });
            }
            _ => {}
        }
        let waiting = self.questions.remove(key).map(|question| question.waiting);
        for (said, since) in waiting.into_iter().flatten() {
            // After so many rounds it may yet be of before: then it is none.
            let is_late = since.is_some_and(|since| asked < since);
            let answer = if is_late { Err(Fault::Late) } else { answer.clone() };
            // Whoever has left does not need it.
            let _left = said.send(answer);
        }
        Told::Enough
    }

    /// Forgets one key. Whoever asks for it from now on gets what the table says from now on.
    pub(super) fn forget(&mut self, key: &[u8]) {
        self.stats.forgotten += 1;
        self.resting.remove(key);
        if let Some(entry) = self.answers.remove(key) {
            self.bytes -= size(key, &entry.answer);
        }
        if let Some(question) = self.questions.get_mut(key) {
            question.outdated();
        }
    }

    /// Forgets every key.
    pub(super) fn flush(&mut self) {
        self.stats.flushes += 1;
        self.answers.clear();
        self.order.clear();
        self.resting.clear();
        self.bytes = 0;
        self.questions.values_mut().for_each(Question::outdated);
    }

    pub(super) fn stats(&self) -> LookupStats {
        LookupStats { keys: self.answers.len(), bytes: self.bytes, ..self.stats }
    }

    fn rest(&mut self, key: &[u8], rest: Rest) {
        if self.resting.len() >= RESTING_MAX {
            self.resting.retain(|_, other| rest.began.duration_since(other.began) < REST_FOR);
        }
        if self.resting.len() < RESTING_MAX {
            self.resting.insert(key.into(), rest);
        }
    }

    fn keep(&mut self, key: &[u8], answer: Answer, since: Instant) {
        let (key, number): (Arc<[u8]>, u64) = (key.into(), self.next);
        self.next += 1;
        self.bytes += size(&key, &answer);
        let entry = Entry { answer, since, number };
        if let Some(before) = self.answers.insert(Arc::clone(&key), entry) {
            self.bytes -= size(&key, &before.answer);
        }
        self.order.push_back((key, number));
        let is_last = |answers: &HashMap<Arc<[u8]>, Entry>, key: &[u8], number| {
            answers.get(key).is_some_and(|entry| entry.number == number)
        };
        while self.bytes > self.limits.cache_bytes {
            let Some((oldest, number)) = self.order.pop_front() else { break };
            if is_last(&self.answers, &oldest, number) {
                let entry = self.answers.remove(&oldest).expect("it was just found");
                self.bytes -= size(&oldest, &entry.answer);
            }
        }
        if self.order.len() > 2 * self.answers.len() + 64 {
            let answers = &self.answers;
            self.order.retain(|(key, number)| is_last(answers, key, *number));
        }
    }
}

impl Question {
    fn outdated(&mut self) {
        // One that still waits will be asked late enough.
        if self.state == State::Asked {
            self.state = State::Outdated;
        }
    }
}

fn size(key: &[u8], answer: &Answer) -> usize {
    ENTRY_BYTES + key.len() + answer.as_ref().map_or(0, |answer| answer.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_answers_make_room_and_replaced_ones_take_none() {
        let limits = Limits { cache_bytes: 10 * (ENTRY_BYTES + 2), ..Limits::default() };
        let mut cache = Cache::new(limits);
        let now = Instant::now();
        for n in 0..1000_u16 {
            cache.answer(&[(n % 251) as u8], Ok(Some(b"x".to_vec())), now);
            cache.answer(&[0], Ok(Some(b"y".to_vec())), now);
            assert!(cache.bytes <= limits.cache_bytes);
            assert!(cache.order.len() <= 2 * cache.answers.len() + 64);
        }
        assert_eq!(cache.answers.len(), 10);
        let sum: usize = cache.answers.iter().map(|(key, entry)| size(key, &entry.answer)).sum();
        assert_eq!(cache.bytes, sum);
        cache.forget(&[0]);
        assert_eq!((cache.answers.len(), cache.bytes), (9, sum - ENTRY_BYTES - 2));
        cache.flush();
        assert_eq!((cache.bytes, cache.answers.len()), (0, 0));
    }

    #[test]
    fn a_key_that_fails_is_left_alone_for_a_while_or_until_it_changes() {
        let (mut cache, now) = (Cache::new(Limits::default()), Instant::now());
        let fails = |cache: &mut Cache, key: &[u8], at| match cache.get(key, at, None) {
            Known::Nothing(_) => {
                cache.asks(key, at);
                cache.answer(key, Err(Fault::Late), at);
                false
            }
            Known::Faulty(fault) => fault == Fault::Late,
            Known::Fresh(_) | Known::Asked(_) => panic!("nothing is known"),
        };
        assert!(!fails(&mut cache, b"a", now));
        assert!(fails(&mut cache, b"a", now));
        assert!(!fails(&mut cache, b"b", now));
        assert!(!fails(&mut cache, b"a", now + REST_FOR));
        cache.forget(b"a");
        assert!(!fails(&mut cache, b"a", now + REST_FOR));
        cache.flush();
        assert!(!fails(&mut cache, b"b", now));
        for n in 0..2 * RESTING_MAX {
            fails(&mut cache, &n.to_be_bytes(), now);
            assert!(cache.resting.len() <= RESTING_MAX);
        }
        fails(&mut cache, b"later", now + REST_FOR);
        assert_eq!(cache.resting.len(), 1);
        assert_eq!(cache.stats().questions as usize, 5 + 2 * RESTING_MAX + 1);
    }

    #[test]
    fn what_changes_while_it_is_asked_for_is_asked_for_again() {
        let (mut cache, now) = (Cache::new(Limits::default()), Instant::now());
        let Known::Nothing(mut hears) = cache.get(b"a", now, None) else {
            panic!("nothing is known")
        };
        // Not asked for yet, so what it will be told is new.
        cache.flush();
        cache.asks(b"a", now);
        cache.forget(b"a");
        assert_eq!(cache.answer(b"a", Ok(Some(b"old".to_vec())), now), Told::Again);
        assert!(hears.try_recv().is_err());
        cache.forget(b"b");
        assert_eq!(cache.answer(b"a", Ok(Some(b"new".to_vec())), now), Told::Enough);
        assert_eq!(hears.try_recv().unwrap().unwrap().as_deref(), Some(&b"new"[..]));

        // One that changes all the time is told, and not kept.
        let Known::Nothing(mut hears) = cache.get(b"c", now, None) else {
            panic!("nothing is known")
        };
        cache.asks(b"c", now);
        for round in 0..=ROUNDS_MAX {
            cache.flush();
            let told = cache.answer(b"c", Ok(Some(vec![round + 1])), now);
            assert_eq!(told == Told::Again, round < ROUNDS_MAX);
        }
        assert!(hears.try_recv().unwrap().is_ok());
        assert!(cache.fresh(b"c", now, None).is_none());
        let stats = cache.stats();
        assert_eq!((stats.questions, stats.misses, stats.keys), (2 + 4, 2, 0));
    }

    #[test]
    fn what_was_asked_for_before_something_happened_is_asked_for_again() {
        let (mut cache, now) = (Cache::new(Limits::default()), Instant::now());
        let after = now + Duration::from_millis(1);
        let Known::Nothing(mut early) = cache.get(b"a", now, None) else {
            panic!("nothing is known")
        };
        cache.asks(b"a", now);
        // It happens while the table is asked: what it says may be of before, for everyone who waits.
        let Known::Asked(mut late) = cache.get(b"a", after, Some(after)) else {
            panic!("it is being asked for")
        };
        assert_eq!(cache.answer(b"a", Ok(Some(b"old".to_vec())), after), Told::Again);
        assert_eq!(cache.answer(b"a", Ok(Some(b"new".to_vec())), after), Told::Enough);
        for hears in [&mut early, &mut late] {
            assert_eq!(hears.try_recv().unwrap().unwrap().as_deref(), Some(&b"new"[..]));
        }
        // One that happens again and again while it is asked: who came after the last time gets no word of before.
        let at = |n: u8| after + Duration::from_millis(10 + u64::from(n));
        let Known::Nothing(mut first) = cache.get(b"b", at(0), None) else {
            panic!("nothing is known")
        };
        cache.asks(b"b", at(0));
        for round in 0..=ROUNDS_MAX {
            let Known::Asked(mut last) = cache.get(b"b", at(round + 1), Some(at(round + 1))) else {
                panic!("it is being asked for")
            };
            let told = cache.answer(b"b", Ok(Some(b"old".to_vec())), at(round));
            assert_eq!(told == Told::Again, round < ROUNDS_MAX);
            if told == Told::Enough {
                assert_eq!(last.try_recv().unwrap(), Err(Fault::Late));
            }
        }
        assert!(first.try_recv().unwrap().is_ok());
        // Nor is a fault of before one of after.
        let Known::Nothing(_) = cache.get(b"two", now, None) else { panic!("nothing is known") };
        cache.asks(b"two", now);
        assert_eq!(cache.answer(b"two", Err(Fault::Two), at(1)), Told::Enough);
        assert!(matches!(cache.get(b"two", at(2), None), Known::Faulty(Fault::Two)));
        assert!(matches!(cache.get(b"two", at(2), Some(after)), Known::Nothing(_)));
        assert!(matches!(cache.get(b"a", after, Some(after)), Known::Fresh(_)));
        let later = after + Duration::from_millis(1);
        assert!(matches!(cache.get(b"a", later, None), Known::Fresh(_)));
        assert!(matches!(cache.get(b"a", later, Some(later)), Known::Nothing(_)));
    }
}
