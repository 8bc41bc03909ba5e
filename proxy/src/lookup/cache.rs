//! What a table has said, within a bound, and who waits for what it has not said yet.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::lookup::{Answer, Fault, Limits, Said};

/// What an answer takes beside its bytes: two maps' entries and their allocations, roughly.
const ENTRY_BYTES: usize = 128;

#[derive(Debug)]
pub(super) struct Cache {
    limits: Limits,
    answers: HashMap<Arc<[u8]>, Entry>,
    /// The oldest first. A number that is not the entry's own is of one that was replaced.
    order: VecDeque<(Arc<[u8]>, u64)>,
    questions: HashMap<Box<[u8]>, Question>,
    bytes: usize,
    next: u64,
}

#[derive(Debug)]
struct Entry {
    answer: Answer,
    since: Instant,
    number: u64,
}

#[derive(Debug)]
struct Question {
    since: Instant,
    waiting: Vec<Said>,
}

/// What is known of a key.
pub(super) enum Known {
    Fresh(Answer),
    /// It is being asked for.
    Asked(oneshot::Receiver<Result<Answer, Fault>>),
    /// It has been asked for for too long already.
    Overdue,
    /// It is for the caller to ask.
    Nothing(oneshot::Receiver<Result<Answer, Fault>>),
}

impl Cache {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            answers: HashMap::new(),
            order: VecDeque::new(),
            questions: HashMap::new(),
            bytes: 0,
            next: 0,
        }
    }

    /// Gives what the table said of a key, if that is still good.
    pub(super) fn fresh(&self, key: &[u8], now: Instant) -> Option<Answer> {
        let entry = self.answers.get(key)?;
        let ttl = if entry.answer.is_some() { self.limits.ttl } else { self.limits.negative_ttl };
        (now.duration_since(entry.since) < ttl).then(|| entry.answer.clone())
    }

    pub(super) fn get(&mut self, key: &[u8], now: Instant) -> Known {
        if let Some(answer) = self.fresh(key, now) {
            return Known::Fresh(answer);
        }
        let (said, waiting) = oneshot::channel();
        match self.questions.get_mut(key) {
            Some(question) if now.duration_since(question.since) >= self.limits.within => {
                Known::Overdue
            }
            Some(question) => {
                question.waiting.push(said);
                Known::Asked(waiting)
            }
            None => {
                self.questions.insert(key.into(), Question { since: now, waiting: vec![said] });
                Known::Nothing(waiting)
            }
        }
    }

    /// Gives what was known before, if that may still be said, and else the fault.
    pub(super) fn stale(&self, key: &[u8], now: Instant, fault: Fault) -> Result<Arc<[u8]>, Fault> {
        let Some(Entry { answer: Some(answer), since, .. }) = self.answers.get(key) else {
            return Err(fault);
        };
        let serves = matches!(fault, Fault::Down(_) | Fault::Late | Fault::Busy)
            && now.duration_since(*since) < self.limits.ttl + self.limits.stale;
        if serves { Ok(Arc::clone(answer)) } else { Err(fault) }
    }

    pub(super) fn forget_question(&mut self, key: &[u8]) {
        self.questions.remove(key);
    }

    /// Takes what the table says, and tells those who wait.
    pub(super) fn answer(&mut self, key: &[u8], answer: Result<Answer, Fault>, now: Instant) {
        if let Ok(answer) = &answer {
            self.keep(key, answer.clone(), now);
        }
        let waiting = self.questions.remove(key).map(|question| question.waiting);
        for said in waiting.into_iter().flatten() {
            // Whoever has left does not need it.
            let _left = said.send(answer.clone());
        }
    }

    pub(super) fn flush(&mut self) {
        self.answers.clear();
        self.order.clear();
        self.bytes = 0;
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
            cache.answer(&[(n % 251) as u8], Ok(Some(Arc::from(&b"x"[..]))), now);
            cache.answer(&[0], Ok(Some(Arc::from(&b"y"[..]))), now);
            assert!(cache.bytes <= limits.cache_bytes);
            assert!(cache.order.len() <= 2 * cache.answers.len() + 64);
        }
        assert_eq!(cache.answers.len(), 10);
        let sum: usize = cache.answers.iter().map(|(key, entry)| size(key, &entry.answer)).sum();
        assert_eq!(cache.bytes, sum);
        cache.flush();
        assert_eq!((cache.bytes, cache.answers.len()), (0, 0));
    }
}
