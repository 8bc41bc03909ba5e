//! The network: letters that get lost, come twice or out of order, and streams that behave as TCP does.
//!
//! A letter (what assigners say to each other, requests, writes to storage) takes as long as it takes, and may not come, or come
//! twice. A stream (sessions, watches) is ordered and loses nothing while it lasts, however bad the network: what is sent
//! into a partition waits, and comes when that heals. If that takes too long the sender sees the stream break, while the
//! other side goes on believing in it for a while: half-open. A process that dies has its streams reset, if its machine
//! lives on and the network lets the reset pass; else the other side finds out late.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use mandoline_core::prng::Prng;
use mandoline_core::time::Time;

/// How often a stream tries again what did not get through.
const AGAIN: Duration = Duration::from_millis(200);
/// How long a half-open stream lingers, at most.
const LINGER_MAX: Duration = Duration::from_secs(20);

/// Names a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct StreamId(pub u64);

/// One side of a stream: zero opened it.
pub type Side = usize;

/// How bad the network is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weather {
    /// Letters that are lost, in a thousand.
    pub lost: u64,
    /// Letters that come twice, in a thousand.
    pub twice: u64,
    /// The longest ordinary delay.
    pub delay: Duration,
    /// Messages that take up to fifty times as long, in a thousand.
    pub late: u64,
}

impl Weather {
    /// As it is in a data centre.
    pub const FAIR: Self = Self { lost: 0, twice: 0, delay: Duration::from_millis(2), late: 0 };
}

/// What a stream hands on.
#[derive(Clone, Debug)]
pub enum Word<S> {
    /// Something was said.
    Said(S),
    /// The stream is over.
    Over,
}

/// What came of looking at a stream.
#[derive(Debug)]
pub enum Flowed<S> {
    /// Nothing comes now.
    Nothing,
    /// To look again then.
    Later(Time),
    /// This came to this side; look at the stream again then, if at all.
    Came(Word<S>, Option<Time>),
    /// This side sees it break now; the other one then.
    Broke(Side, Time),
}

#[derive(Debug)]
struct Stream<S> {
    ends: [End; 2],
    /// What flows towards each side.
    flows: [Flow<S>; 2],
    /// How long it bears that nothing gets through.
    patience: Duration,
}

#[derive(Clone, Copy, Debug)]
struct End {
    place: usize,
    open: bool,
}

#[derive(Debug)]
struct Flow<S> {
    waiting: VecDeque<(Time, Word<S>)>,
    /// Since when nothing gets through.
    stuck: Option<Time>,
}

impl<S> Default for Flow<S> {
    fn default() -> Self {
        Self { waiting: VecDeque::new(), stuck: None }
    }
}

/// The network between so many places.
#[derive(Debug)]
pub struct Network<S> {
    /// For each place those that it cannot reach, a bit each.
    cut: Vec<u32>,
    weather: Weather,
    streams: BTreeMap<StreamId, Stream<S>>,
    last: u64,
}

impl<S> Network<S> {
    /// A whole network in this weather.
    pub fn new(places: usize, weather: Weather) -> Self {
        assert!(places <= 32, "a place is a bit");
        Self { cut: vec![0; places], weather, streams: BTreeMap::new(), last: 0 }
    }

    /// Lets nothing pass from the first to the second places, a bit each.
    pub fn cut(&mut self, from: u32, to: u32) {
        for (place, cut) in self.cut.iter_mut().enumerate() {
            if from & (1 << place) != 0 {
                *cut |= to & !(1 << place);
            }
        }
    }

    /// Lets everything pass again.
    pub fn heal(&mut self) {
        self.cut.fill(0);
    }

    /// Changes the weather.
    pub const fn set_weather(&mut self, weather: Weather) {
        self.weather = weather;
    }

    fn is_cut(&self, from: usize, to: usize) -> bool {
        self.cut[from] & (1 << to) != 0
    }

    fn delay(&self, prng: &mut Prng) -> Duration {
        let usual = self.weather.delay.mul_f64(0.05 + 0.95 * prng.unit());
        if prng.below(1_000) < self.weather.late {
            usual * (2 + prng.below(48) as u32)
        } else {
            usual
        }
    }

    /// Says how long each copy of a letter takes that arrives.
    pub fn post(&self, from: usize, to: usize, prng: &mut Prng) -> [Option<Duration>; 2] {
        if self.is_cut(from, to) || prng.below(1_000) < self.weather.lost {
            return [None; 2];
        }
        let twice = prng.below(1_000) < self.weather.twice;
        [Some(self.delay(prng)), twice.then(|| self.delay(prng))]
    }

    /// Opens a stream.
    pub fn open(&mut self, from: usize, to: usize, prng: &mut Prng) -> StreamId {
        self.last += 1;
        let end = |place| End { place, open: true };
        let patience = Duration::from_millis(2_000 + prng.below(20_000));
        let stream = Stream { ends: [end(from), end(to)], flows: Default::default(), patience };
        self.streams.insert(StreamId(self.last), stream);
        StreamId(self.last)
    }

    /// Gives the place of one side, as long as there is a stream.
    pub fn place(&self, id: StreamId, side: Side) -> Option<usize> {
        Some(self.streams.get(&id)?.ends[side].place)
    }

    /// Says whether a side still believes in the stream.
    pub fn is_open(&self, id: StreamId, side: Side) -> bool {
        self.streams.get(&id).is_some_and(|stream| stream.ends[side].open)
    }

    /// Says something from one side to the other, and gives when to look, if nobody was to look before.
    pub fn say(
        &mut self,
        now: Time,
        id: StreamId,
        side: Side,
        word: Word<S>,
        prng: &mut Prng,
    ) -> Option<Time> {
        let at = now + self.delay(prng);
        let stream = self.streams.get_mut(&id).filter(|stream| stream.ends[side].open)?;
        if matches!(word, Word::Over) {
            stream.ends[side].open = false;
        }
        let waiting = &mut stream.flows[1 - side].waiting;
        let at = waiting.back().map_or(at, |(before, _)| at.max(*before));
        waiting.push_back((at, word));
        let first = waiting.len() == 1;
        self.tidy(id);
        first.then_some(at)
    }

    /// Looks at what flows towards a side.
    pub fn flow(&mut self, now: Time, id: StreamId, side: Side, prng: &mut Prng) -> Flowed<S> {
        let Some(stream) = self.streams.get(&id) else { return Flowed::Nothing };
        let (from, to) = (stream.ends[1 - side].place, stream.ends[side].place);
        let cut = self.is_cut(from, to);
        let stream = self.streams.get_mut(&id).expect("it was just there");
        let flow = &mut stream.flows[side];
        if cut {
            let stuck = *flow.stuck.get_or_insert(now);
            if now.since(stuck) < stream.patience {
                return Flowed::Later(now + prng.jitter(AGAIN));
            }
            flow.waiting.clear();
            stream.ends[1 - side].open = false;
            return Flowed::Broke(1 - side, now + LINGER_MAX.mul_f64(prng.unit()));
        }
        flow.stuck = None;
        let Some((_, word)) = flow.waiting.pop_front() else { return Flowed::Nothing };
        let next = flow.waiting.front().map(|(at, _)| now.max(*at));
        if !stream.ends[side].open {
            // Nobody listens any more.
            self.tidy(id);
            return next.map_or(Flowed::Nothing, Flowed::Later);
        }
        if matches!(word, Word::Over) {
            stream.ends[side].open = false;
            self.tidy(id);
            return Flowed::Came(Word::Over, None);
        }
        Flowed::Came(word, next)
    }

    /// A side stops believing in a stream without a word. False if it had stopped before.
    pub fn drop_end(&mut self, id: StreamId, side: Side) -> bool {
        let Some(stream) = self.streams.get_mut(&id) else { return false };
        let was_open = std::mem::replace(&mut stream.ends[side].open, false);
        self.tidy(id);
        was_open
    }

    /// Gives the streams that a place still believes in, and its side of each.
    pub fn streams_of(&self, place: usize) -> Vec<(StreamId, Side)> {
        let side = |(id, stream): (&StreamId, &Stream<S>)| {
            let side = stream.ends.iter().position(|end| end.place == place && end.open)?;
            Some((*id, side))
        };
        self.streams.iter().filter_map(side).collect()
    }

    /// Where nobody believes in a stream any more, what still flows reaches nobody.
    fn tidy(&mut self, id: StreamId) {
        let closed = |stream: &Stream<S>| stream.ends.iter().all(|end| !end.open);
        let over = self.streams.get(&id).is_some_and(closed);
        if over {
            self.streams.remove(&id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes to side one, looked at whenever that is said to be of use.
    fn drain(network: &mut Network<u32>, id: StreamId, mut now: Time, prng: &mut Prng) -> Vec<u32> {
        let mut came = Vec::new();
        loop {
            match network.flow(now, id, 1, prng) {
                Flowed::Came(Word::Said(number), next) => {
                    came.push(number);
                    let Some(next) = next else { return came };
                    now = next;
                }
                Flowed::Later(at) => now = at,
                Flowed::Broke(..) | Flowed::Nothing | Flowed::Came(Word::Over, _) => return came,
            }
        }
    }

    #[test]
    fn a_stream_keeps_its_order_and_waits_for_a_partition_to_heal() {
        let mut prng = Prng::new(1);
        let weather = Weather { lost: 900, twice: 900, late: 500, ..Weather::FAIR };
        let mut network = Network::new(2, weather);
        let id = network.open(0, 1, &mut prng);
        network.cut(1, 2);
        for number in 0..100 {
            network.say(Time::ZERO, id, 0, Word::Said(number), &mut prng);
        }
        let stuck = network.flow(Time::from_millis(200), id, 1, &mut prng);
        assert!(matches!(stuck, Flowed::Later(_)), "{stuck:?}");
        network.heal();
        let came = drain(&mut network, id, Time::from_millis(300), &mut prng);
        assert_eq!(came, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn a_stream_that_is_stuck_breaks_for_the_sender_and_lingers_for_the_other() {
        let mut prng = Prng::new(2);
        let mut network = Network::new(2, Weather::FAIR);
        let id = network.open(0, 1, &mut prng);
        network.say(Time::ZERO, id, 0, Word::Said(1), &mut prng);
        network.cut(1, 2);
        assert!(matches!(network.flow(Time::ZERO, id, 1, &mut prng), Flowed::Later(_)));
        let broke = network.flow(Time::from_millis(60_000), id, 1, &mut prng);
        assert!(matches!(broke, Flowed::Broke(0, _)), "{broke:?}");
        assert_eq!((network.is_open(id, 0), network.is_open(id, 1)), (false, true));
        assert!(network.drop_end(id, 1) && network.streams.is_empty());
    }

    #[test]
    fn a_cut_may_hold_in_one_direction_alone_and_letters_come_none_once_or_twice() {
        let mut prng = Prng::new(3);
        let mut network: Network<()> =
            Network::new(3, Weather { lost: 300, twice: 300, ..Weather::FAIR });
        network.cut(0b001, 0b110);
        let mut copies = [0; 3];
        for _ in 0..1_000 {
            assert_eq!(network.post(0, 1, &mut prng), [None; 2]);
            copies[network.post(1, 0, &mut prng).iter().flatten().count()] += 1;
        }
        assert!(copies.iter().all(|count| *count > 100), "{copies:?}");
    }
}
