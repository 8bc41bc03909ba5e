//! The log of one assigner node, as far as anyone above it can tell: the contract that `core` is built on.
//!
//! It votes, appends and counts majorities by messages over the simulated network. What a real one has beside that (snapshots
//! by wire, changes of members, pre-votes, pipelines) is left out: nobody above sees it, but for the time that it takes. The contract, which
//! `assigner/src/raft/tests/contract.rs` checks against the real one, claim by claim:
//!
//! 1. In one term at most one node leads.
//! 2. All nodes apply the same commands in the same order, each once.
//! 3. What was answered as applied is never lost: whoever leads later has it, at its place.
//! 4. A proposal that was not answered may have been agreed on or not, and will be once or never.
//! 5. What no majority holds may be lost when another node begins to lead.
//! 6. A leader that was deposed, or that cannot reach a majority, may go on believing that it leads for a while.
//! 7. Leadership is confirmed by a round of messages to a majority that begins after it was asked for: it is never confirmed to
//!    a node that was deposed before it asked.
//! 8. Whoever is told that it leads has then applied everything that was answered as applied before it asked, by whomever,
//!    and everything from before its term that could ever be agreed on.
//! 9. A node that starts again knows its term, its vote and its log as of the last fsync that it had waited for; it tells nobody
//!    of anything before that. It does not lead, whatever it was.

use std::sync::Arc;
use std::time::Duration;

use mandoline_core::command::Command;
use mandoline_core::prng::Prng;
use mandoline_core::time::Time;

/// How often a leader says that it leads: a little slower than the real one, which costs the simulator its time.
const BEAT: Duration = Duration::from_millis(200);
/// How long a node waits for a leader; a draw between this and twice as much.
const ELECTION: Duration = Duration::from_millis(500);
/// How long a leader that hears no majority may go on believing, at most.
const BELIEF_MAX_MILLIS: u64 = 10_000;
/// How many entries go out together.
const BATCH: usize = 256;

/// What a log holds.
#[derive(Clone, Debug)]
pub struct Entry {
    /// In which term it was proposed.
    pub term: u64,
    /// What was proposed; nothing where a leader only began.
    pub command: Option<Arc<Command>>,
}

/// What nodes say to each other.
#[derive(Clone, Debug)]
pub enum Packet {
    /// Asks for a vote.
    Ask {
        /// In which term.
        term: u64,
        /// How far the log of whoever asks goes: the term of its last entry, and how many there are.
        last: (u64, usize),
    },
    /// Answers that.
    Vote {
        /// In which term.
        term: u64,
        /// Whether it is given.
        given: bool,
    },
    /// Says who leads, and what is new.
    Append {
        /// In which term.
        term: u64,
        /// What the entries follow: how many there are before, and the term of the last of them.
        after: (usize, u64),
        /// The entries.
        entries: Vec<Entry>,
        /// How many are agreed on.
        agreed: usize,
        /// Counts what was sent.
        round: u64,
    },
    /// Answers that.
    Appended {
        /// In which term.
        term: u64,
        /// How many entries are the leader's, and held for good; or how many may be, if those did not fit.
        held: Result<usize, usize>,
        /// As it was asked.
        round: u64,
    },
}

/// Something to be confirmed: a name that the asker chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(pub u64);

/// What survives a crash.
#[derive(Clone, Debug, Default)]
struct Disk {
    term: u64,
    voted: Option<usize>,
    entries: Vec<Entry>,
}

#[derive(Clone, Debug)]
enum Role {
    Follower,
    Candidate { votes: u32 },
    Leader(Leading),
}

#[derive(Clone, Debug)]
struct Leading {
    /// The first place of this term.
    began: usize,
    next: Vec<usize>,
    held: Vec<usize>,
    /// The newest round that each answered, and when.
    answered: Vec<(u64, Time)>,
    round: u64,
    beat: Time,
    /// How long without a majority until it gives up.
    belief: Duration,
    reads: Vec<Read>,
}

#[derive(Clone, Copy, Debug)]
struct Read {
    ticket: Ticket,
    round: u64,
    agreed: usize,
}

/// The log of one node.
#[derive(Clone, Debug)]
pub struct Log {
    me: usize,
    nodes: usize,
    disk: Disk,
    term: u64,
    voted: Option<usize>,
    entries: Vec<Entry>,
    /// Whether memory is ahead of the disk, and from which entry on.
    dirty: Option<usize>,
    agreed: usize,
    leader: Option<usize>,
    role: Role,
    election: Time,
    /// To be sent.
    out: Vec<(usize, Packet)>,
    /// To be sent once the disk has what they say.
    held: Vec<(usize, Packet)>,
    /// Confirms whatever it is asked to: a flaw, for tests.
    confirms_alone: bool,
}

impl Log {
    /// Begins with what all nodes have: these commands, agreed on.
    pub fn new(me: usize, nodes: usize, founding: &[Arc<Command>]) -> Self {
        let entry = |command: &Arc<Command>| Entry { term: 0, command: Some(Arc::clone(command)) };
        let entries: Vec<Entry> = founding.iter().map(entry).collect();
        let disk = Disk { entries: entries.clone(), ..Disk::default() };
        let mut log = Self {
            me,
            nodes,
            disk,
            term: 0,
            voted: None,
            entries,
            dirty: None,
            agreed: founding.len(),
            leader: None,
            role: Role::Follower,
            election: Time::ZERO,
            out: Vec::new(),
            held: Vec::new(),
            confirms_alone: false,
        };
        // The first of them need not wait.
        log.election = Time::ZERO + BEAT * (me as u32);
        log
    }

    /// Confirms whatever it is asked to from now on, without asking anyone.
    #[must_use]
    pub const fn flawed(mut self, confirms_alone: bool) -> Self {
        self.confirms_alone = confirms_alone;
        self
    }

    /// Starts again after a crash, with what the disk has. `agreed` is how far a snapshot on the same disk goes.
    pub fn restart(&mut self, now: Time, agreed: usize, prng: &mut Prng) {
        let Disk { term, voted, entries } = self.disk.clone();
        (self.term, self.voted, self.entries) = (term, voted, entries);
        (self.dirty, self.agreed, self.leader) = (None, agreed, None);
        self.role = Role::Follower;
        self.out.clear();
        self.held.clear();
        self.wait(now, prng);
    }

    /// Gives the term in which this node leads, as far as it knows.
    pub const fn leads(&self) -> Option<u64> {
        match self.role {
            Role::Leader(_) => Some(self.term),
            _ => None,
        }
    }

    /// Gives who leads, as far as this node knows.
    pub const fn leader(&self) -> Option<usize> {
        self.leader
    }

    /// Counts the entries that are agreed on, as far as this node knows.
    pub const fn agreed(&self) -> usize {
        self.agreed
    }

    /// Gives the entry at a place.
    pub fn entry(&self, at: usize) -> &Entry {
        &self.entries[at]
    }

    /// Takes what is to be sent.
    pub fn outgoing(&mut self) -> Vec<(usize, Packet)> {
        std::mem::take(&mut self.out)
    }

    /// Says whether something has to be written to disk.
    pub const fn is_dirty(&self) -> bool {
        self.dirty.is_some()
    }

    /// The disk has it: what waited for that is sent.
    pub fn synced(&mut self) {
        let Some(from) = self.dirty.take() else { return };
        (self.disk.term, self.disk.voted) = (self.term, self.voted);
        if from < self.entries.len() || from < self.disk.entries.len() {
            self.disk.entries.truncate(from);
            self.disk.entries.extend_from_slice(&self.entries[from..]);
        }
        self.out.append(&mut self.held);
        let all = self.disk.entries.len();
        if let Role::Leader(leading) = &mut self.role {
            leading.held[self.me] = all;
            self.count();
        }
    }

    /// Puts a command into the log of a leader, and gives its place.
    pub fn propose(&mut self, now: Time, command: Arc<Command>) -> Option<usize> {
        self.leads()?;
        let at = self.push(Some(command));
        self.broadcast(now);
        Some(at)
    }

    /// Asks to be told when it is sure that this node leads. False if it surely does not.
    pub fn confirm(&mut self, now: Time, ticket: Ticket) -> bool {
        let agreed = self.agreed;
        let Role::Leader(leading) = &mut self.role else { return false };
        let (round, agreed) = (leading.round + 1, agreed.max(leading.began + 1));
        leading.reads.push(Read { ticket, round, agreed });
        self.broadcast(now);
        true
    }

    /// Takes what is confirmed, given how many entries were applied.
    pub fn confirmed(&mut self, applied: usize) -> Vec<Ticket> {
        let (me, nodes, alone) = (self.me, self.nodes, self.confirms_alone);
        let Role::Leader(leading) = &mut self.role else { return Vec::new() };
        if leading.reads.is_empty() {
            return Vec::new();
        }
        let mut rounds: Vec<u64> = leading.answered.iter().map(|(round, _)| *round).collect();
        rounds[me] = u64::MAX;
        rounds.sort_unstable();
        // The newest round that a majority answered.
        let answered = rounds[nodes - (nodes / 2 + 1)];
        let sure = |read: &Read| alone || (read.round <= answered && read.agreed <= applied);
        let (now, later): (Vec<Read>, Vec<Read>) =
            std::mem::take(&mut leading.reads).into_iter().partition(sure);
        leading.reads = later;
        now.into_iter().map(|read| read.ticket).collect()
    }

    /// Says when to tick next.
    pub fn deadline(&self) -> Time {
        match &self.role {
            Role::Leader(leading) => leading.beat,
            _ => self.election,
        }
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Time, prng: &mut Prng) {
        let majority = self.nodes / 2 + 1;
        match &mut self.role {
            Role::Leader(leading) if leading.beat <= now => {
                let near = |(at, (_, heard)): &(usize, &(u64, Time))| {
                    *at == self.me || now.since(*heard) < leading.belief
                };
                if leading.answered.iter().enumerate().filter(near).count() < majority {
                    self.leader = None;
                    self.follow(now, self.term, prng);
                } else {
                    self.broadcast(now);
                }
            }
            Role::Leader(_) => {}
            _ if self.election <= now => self.stand(now, prng),
            _ => {}
        }
    }

    /// Takes in what another node says.
    pub fn hear(&mut self, now: Time, from: usize, packet: Packet, prng: &mut Prng) {
        let (Packet::Ask { term, .. }
        | Packet::Vote { term, .. }
        | Packet::Append { term, .. }
        | Packet::Appended { term, .. }) = packet;
        if term > self.term {
            self.leader = None;
            self.follow(now, term, prng);
        }
        match packet {
            Packet::Ask { term, last } => {
                let given = term == self.term
                    && self.voted.is_none_or(|voted| voted == from)
                    && last >= self.last();
                if given && self.voted.is_none() {
                    self.voted = Some(from);
                    self.touch(self.entries.len());
                    self.wait(now, prng);
                }
                self.answer(from, Packet::Vote { term: self.term, given });
            }
            Packet::Vote { term, given } if term == self.term && given => {
                if let Role::Candidate { votes } = &mut self.role {
                    *votes |= 1 << from;
                    if votes.count_ones() as usize > self.nodes / 2 {
                        self.lead(now, prng);
                    }
                }
            }
            Packet::Append { term, after, entries, agreed, round } => {
                if term < self.term {
                    // Rounds are counted anew in each term: one of an older term is not answered by its number, or the same node,
                    // leading again, would take that for a newer round's.
                    let (held, round) = (Err(0), 0);
                    return self.answer(from, Packet::Appended { term: self.term, held, round });
                }
                self.leader = Some(from);
                self.role = Role::Follower;
                self.wait(now, prng);
                let held = self.append(after, entries, agreed);
                self.answer(from, Packet::Appended { term: self.term, held, round });
            }
            Packet::Appended { term, held, round } if term == self.term => {
                self.appended(now, from, held, round);
            }
            Packet::Vote { .. } | Packet::Appended { .. } => {}
        }
    }

    fn last(&self) -> (u64, usize) {
        (self.entries.last().map_or(0, |entry| entry.term), self.entries.len())
    }

    fn touch(&mut self, from: usize) {
        self.dirty = Some(self.dirty.map_or(from, |dirty| dirty.min(from)));
    }

    /// What is said rests on what was written.
    fn answer(&mut self, to: usize, packet: Packet) {
        if self.is_dirty() { self.held.push((to, packet)) } else { self.out.push((to, packet)) }
    }

    fn wait(&mut self, now: Time, prng: &mut Prng) {
        self.election = now + ELECTION + ELECTION.mul_f64(prng.unit());
    }

    fn follow(&mut self, now: Time, term: u64, prng: &mut Prng) {
        if term > self.term {
            (self.term, self.voted) = (term, None);
            self.touch(self.entries.len());
        }
        self.role = Role::Follower;
        self.wait(now, prng);
    }

    fn stand(&mut self, now: Time, prng: &mut Prng) {
        self.follow(now, self.term + 1, prng);
        (self.leader, self.voted) = (None, Some(self.me));
        self.role = Role::Candidate { votes: 1 << self.me };
        let ask = Packet::Ask { term: self.term, last: self.last() };
        for to in (0..self.nodes).filter(|to| *to != self.me) {
            self.held.push((to, ask.clone()));
        }
    }

    fn lead(&mut self, now: Time, prng: &mut Prng) {
        self.leader = Some(self.me);
        let began = self.entries.len();
        self.role = Role::Leader(Leading {
            began,
            next: vec![began; self.nodes],
            held: vec![0; self.nodes],
            answered: vec![(0, now); self.nodes],
            round: 0,
            beat: now,
            belief: Duration::from_millis(1_000 + prng.below(BELIEF_MAX_MILLIS - 1_000)),
            reads: Vec::new(),
        });
        self.push(None);
        self.broadcast(now);
    }

    fn push(&mut self, command: Option<Arc<Command>>) -> usize {
        let at = self.entries.len();
        self.entries.push(Entry { term: self.term, command });
        self.touch(at);
        at
    }

    fn broadcast(&mut self, now: Time) {
        let Role::Leader(leading) = &mut self.role else { return };
        leading.round += 1;
        leading.beat = now + BEAT;
        let me = self.me;
        for to in (0..self.nodes).filter(|to| *to != me) {
            self.send(to);
        }
    }

    fn send(&mut self, to: usize) {
        let Role::Leader(leading) = &self.role else { return };
        let next = leading.next[to];
        let upto = self.entries.len().min(next + BATCH);
        let packet = Packet::Append {
            term: self.term,
            after: (next, next.checked_sub(1).map_or(0, |last| self.entries[last].term)),
            entries: self.entries[next..upto].to_vec(),
            agreed: self.agreed,
            round: leading.round,
        };
        self.out.push((to, packet));
    }

    fn append(
        &mut self,
        after: (usize, u64),
        entries: Vec<Entry>,
        agreed: usize,
    ) -> Result<usize, usize> {
        let (count, term) = after;
        let known = count.checked_sub(1).map(|last| self.entries.get(last).map(|e| e.term));
        if known.is_some_and(|known| known != Some(term)) {
            return Err(count.saturating_sub(1).min(self.entries.len()));
        }
        let held = count + entries.len();
        for (at, entry) in (count..).zip(entries) {
            if self.entries.get(at).is_some_and(|known| known.term == entry.term) {
                continue;
            }
            if at < self.entries.len() {
                assert!(at >= self.agreed, "what was agreed on is never taken back");
                self.entries.truncate(at);
            }
            self.entries.push(entry);
            self.touch(at);
        }
        self.agreed = self.agreed.max(agreed.min(held));
        Ok(held)
    }

    fn appended(&mut self, now: Time, from: usize, held: Result<usize, usize>, round: u64) {
        let Role::Leader(leading) = &mut self.role else { return };
        let (newest, heard) = &mut leading.answered[from];
        (*newest, *heard) = ((*newest).max(round), now);
        match held {
            Ok(held) => {
                leading.held[from] = leading.held[from].max(held);
                leading.next[from] = leading.next[from].max(held);
                let more =
                    leading.next[from] < self.entries.len() && held + BATCH <= self.entries.len();
                self.count();
                if more {
                    self.send(from);
                }
            }
            Err(upto) => {
                // What an older message says may long be overtaken.
                leading.next[from] = upto.max(leading.held[from]);
                self.send(from);
            }
        }
    }

    /// What a majority holds is agreed on, if it is of this term or lies before something that is.
    fn count(&mut self) {
        let Role::Leader(leading) = &self.role else { return };
        let mut held = leading.held.clone();
        held.sort_unstable();
        let by_most = held[self.nodes - (self.nodes / 2 + 1)];
        if by_most > self.agreed && self.entries[by_most - 1].term == self.term {
            self.agreed = by_most;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const NODES: usize = 3;

    /// Three logs, and packets under way: what the simulator has beside them, in small.
    struct Net {
        prng: Prng,
        now: Time,
        logs: Vec<Log>,
        under_way: Vec<(Time, usize, usize, Packet)>,
        /// Who cannot reach anyone.
        cut: Option<usize>,
        /// Who led in each term, and since when.
        led: BTreeMap<u64, (usize, Time)>,
        /// What was agreed on at each place, by its term.
        agreed: Vec<u64>,
        /// Who asked when whether it leads, in which term, and how much was agreed on then.
        asked: Vec<(usize, u64, Time, usize)>,
        confirmed: usize,
    }

    impl Net {
        fn new(seed: u64, confirms_alone: bool) -> Self {
            let log = |me| Log::new(me, NODES, &[]).flawed(confirms_alone);
            Self {
                prng: Prng::new(seed),
                now: Time::ZERO,
                logs: (0..NODES).map(log).collect(),
                under_way: Vec::new(),
                cut: None,
                led: BTreeMap::new(),
                agreed: Vec::new(),
                asked: Vec::new(),
                confirmed: 0,
            }
        }

        /// Ten milliseconds pass. Gives what claim is broken, if one is.
        fn step(&mut self) -> Result<(), String> {
            self.now += Duration::from_millis(10);
            let Self { prng, now, logs, .. } = self;
            for (at, log) in logs.iter_mut().enumerate() {
                log.tick(*now, prng);
                match prng.below(400) {
                    0..=9 => drop(log.propose(*now, Arc::new(Command::MintNode))),
                    10..=29 => {
                        if let Some(term) = log.leads()
                            && log.confirm(*now, Ticket(self.asked.len() as u64))
                        {
                            self.asked.push((at, term, *now, self.agreed.len()));
                        }
                    }
                    30 => log.restart(*now, 0, prng),
                    31..=200 => log.synced(),
                    _ => {}
                }
            }
            if prng.below(300) == 0 {
                self.cut = (prng.below(2) == 0).then(|| prng.below(NODES as u64) as usize);
            }
            self.carry();
            self.look()
        }

        fn carry(&mut self) {
            for from in 0..NODES {
                for (to, packet) in self.logs[from].outgoing() {
                    let lost = self.cut.is_some_and(|cut| cut == from || cut == to);
                    let copies = u64::from(!lost) * (1 + u64::from(self.prng.below(20) == 0));
                    for _ in 0..copies {
                        // Some come after whoever sent them was deposed, and leads again.
                        let most = if self.prng.below(50) == 0 { 5_000 } else { 120 };
                        let at = self.now + Duration::from_millis(self.prng.below(most));
                        self.under_way.push((at, from, to, packet.clone()));
                    }
                }
            }
            let (due, later) = std::mem::take(&mut self.under_way)
                .into_iter()
                .partition(|(at, ..)| *at <= self.now);
            self.under_way = later;
            let due: Vec<_> = due;
            for (_, from, to, packet) in due {
                self.logs[to].hear(self.now, from, packet, &mut self.prng);
            }
        }

        fn look(&mut self) -> Result<(), String> {
            for (at, log) in self.logs.iter_mut().enumerate() {
                if let Some(term) = log.leads() {
                    let (who, _) = *self.led.entry(term).or_insert((at, self.now));
                    if who != at {
                        return Err(format!("claim 1: {who} and {at} lead in term {term}"));
                    }
                }
                let count = log.agreed();
                self.agreed.extend((self.agreed.len()..count).map(|place| log.entry(place).term));
                if (0..count).any(|place| log.entry(place).term != self.agreed[place]) {
                    return Err(format!("claims 2 and 3: {at} has something else"));
                }
                for Ticket(ticket) in log.confirmed(count) {
                    let (who, term, asked, agreed) = self.asked[ticket as usize];
                    let later = self.led.range(term + 1..).find(|(_, (_, since))| *since < asked);
                    if let Some((newer, _)) = later {
                        return Err(format!(
                            "claim 7: {who} led in {term}, though {newer} had begun"
                        ));
                    }
                    if count < agreed {
                        return Err(format!("claim 8: {who} has {count} of {agreed}"));
                    }
                    self.confirmed += 1;
                }
            }
            Ok(())
        }
    }

    #[test]
    fn the_contract_holds_over_a_bad_network() {
        for seed in 0..20 {
            let mut net = Net::new(seed, false);
            for _ in 0..6_000 {
                net.step().unwrap_or_else(|broken| panic!("seed {seed} at {}: {broken}", net.now));
            }
            assert!(
                net.led.len() > 3 && net.agreed.len() > 50 && net.confirmed > 20,
                "seed {seed}"
            );
        }
    }

    /// Brings everything to everyone, until all is said.
    fn talk(logs: &mut [Log], now: Time, prng: &mut Prng) {
        loop {
            logs.iter_mut().for_each(Log::synced);
            let said = |(from, log): (usize, &mut Log)| {
                log.outgoing()
                    .into_iter()
                    .map(|(to, packet)| (from, to, packet))
                    .collect::<Vec<_>>()
            };
            let all: Vec<_> = logs.iter_mut().enumerate().flat_map(said).collect();
            if all.is_empty() {
                return;
            }
            for (from, to, packet) in all {
                logs[to].hear(now, from, packet, prng);
            }
        }
    }

    #[test]
    fn what_an_older_term_sent_confirms_nothing_in_a_later_one() {
        let mut prng = Prng::new(1);
        let mut logs: Vec<Log> = (0..NODES).map(|me| Log::new(me, NODES, &[])).collect();
        logs[0].stand(Time::ZERO, &mut prng);
        talk(&mut logs, Time::ZERO, &mut prng);
        assert_eq!(logs[0].leads(), Some(1));
        for _ in 0..20 {
            logs[0].broadcast(Time::ZERO);
        }
        let (to, late) = logs[0].outgoing().pop().expect("it says that it leads");
        for who in [1, 0] {
            logs[who].stand(Time::ZERO, &mut prng);
            talk(&mut logs, Time::ZERO, &mut prng);
        }
        assert_eq!(logs[0].leads(), Some(3));
        assert!(logs[0].confirm(Time::ZERO, Ticket(7)));
        let _nobody_hears_it = logs[0].outgoing();
        logs[to].hear(Time::ZERO, 0, late, &mut prng);
        let (_, answer) = logs[to].outgoing().pop().expect("it says that its term is a later one");
        logs[0].hear(Time::ZERO, to, answer, &mut prng);
        let count = logs[0].agreed();
        assert_eq!(logs[0].confirmed(count), []);
        logs[0].broadcast(Time::ZERO);
        talk(&mut logs, Time::ZERO, &mut prng);
        assert_eq!(logs[0].confirmed(count), [Ticket(7)]);
    }

    #[test]
    fn a_confirmation_without_a_majority_is_noticed() {
        let breaks = |seed| {
            let mut net = Net::new(seed, true);
            (0..6_000).find_map(|_| net.step().err())
        };
        let broken = (0..20).find_map(breaks).expect("some leader was deposed and did not know");
        assert!(broken.starts_with("claim 7") || broken.starts_with("claim 8"), "{broken}");
    }
}
