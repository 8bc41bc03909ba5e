//! A little language for hand-offs: a command a line, and what the slices are like after it.

use std::fmt::Write;

use super::*;
use crate::key::SliceKey;

/// Applies the commands of `text` to a job that tasks of these names have joined, one after the other, and checks what each
/// led to. A name with a `+` is that of a task which prepares.
///
/// Commands are `a -> b` (`-` is nobody; `80: a -> b` moves the slice that begins at these digits), `split 80`, `merge`,
/// `drain a`, `undrain a`, `join a`, `again a` (the process registers anew and says that its session has stopped), `end a`,
/// and of hand-offs `release`, `acknowledged a`, `lapsed`, `switch` and `abort`: of the one begun last, or with
/// `of 6` of the one that this generation began. What they lead to is a text such as `a@5 #5, preparing for b`: who serves since when,
/// and the token. `stale` is a hand-off that is not as expected; `no` and a part of a message is any other refusal.
pub(super) fn check(kind: Consistency, names: &str, text: &str) {
    let mut scene = Scene::new(kind, names);
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (command, expected) = line.split_once('|').unwrap();
        let found = scene.act(command.trim());
        let expected = expected.trim();
        match expected.strip_prefix("no ") {
            Some(part) => assert!(found.contains(part), "{line}\nfound: {found}"),
            None => assert_eq!(found, expected, "{line}"),
        }
    }
}

/// A job and what everybody who follows it knows.
pub(super) struct Scene {
    pub(super) state: State,
    followed: Arc<Assignment>,
    began: u64,
    sessions: BTreeMap<String, SessionId>,
}

impl Scene {
    pub(super) fn new(kind: Consistency, names: &str) -> Self {
        let mut state = State::default();
        let spec = JobSpec { consistency: kind, ..JobSpec::new(kv()) };
        state.apply(Command::ApplyJob { spec, if_version: None }).unwrap();
        let followed = Arc::clone(&state.jobs[&kv()].assignment);
        let mut scene = Self { state, followed, began: 0, sessions: BTreeMap::new() };
        for name in names.split_whitespace() {
            scene.act(&format!("join {name}"));
        }
        scene
    }

    /// Knows what is there from now on, as who is told a full assignment.
    pub(super) fn follow(&mut self) {
        self.followed = Arc::clone(&self.state.jobs[&kv()].assignment);
    }

    pub(super) fn assignment(&self) -> &Assignment {
        &self.state.jobs[&kv()].assignment
    }

    pub(super) fn session(&self, name: &str) -> SessionId {
        self.sessions[name]
    }

    pub(super) fn act(&mut self, line: &str) -> String {
        let (line, began) = match line.split_once(" of ") {
            Some((line, began)) => (line, began.parse().unwrap()),
            None => (line, self.began),
        };
        let words: Vec<&str> = line.split_whitespace().collect();
        let id = |first| HandOffId { began: Generation { incarnation: 1, number: began }, first };
        let step = |act| Command::HandOff { job: kv(), steps: vec![(id(SliceKey(0)), act)] };
        let job = kv();
        let command = match words[..] {
            [from, "->", to] => self.change(self.step(Slice::FULL, from, to)),
            [at, from, "->", to] => {
                let slice = self.assignment().get(key(at.trim_end_matches(':'))).0;
                self.change(self.step(slice, from, to))
            }
            ["split", at] => self.change(Edit::Split { at: key(at), low: Load::ZERO }),
            ["merge"] => self.change(Edit::Merge(Slice::FULL)),
            ["join", name] => Command::Register { job, info: process(name), stopped: None },
            ["again", name] => {
                let stopped = Some(self.session(name));
                Command::Register { job, info: process(name), stopped }
            }
            ["drain", name] => Command::Drain { job, session: self.session(name) },
            ["undrain", name] => Command::Undrain { job, session: self.session(name) },
            ["end", name] => {
                Command::End { job, session: self.session(name), reason: EndReason::Lost }
            }
            ["release"] => step(Act::Release),
            ["acknowledged", by] => step(Act::Acknowledged { by: self.session(by) }),
            ["lapsed"] => step(Act::Lapsed),
            ["switch"] => step(Act::Switch),
            ["abort"] => step(Act::Abort),
            _ => panic!("cannot read {line:?}"),
        };
        self.apply(command)
    }

    /// Applies a command, and checks what holds of each: a refused one changes nothing, any other is a generation of its own
    /// that a delta leads to, and who is given a slice gets a greater token than anyone had.
    pub(super) fn apply(&mut self, command: Command) -> String {
        let before = self.state.clone();
        let joins = match &command {
            Command::Register { info, .. } => Some(info.name.as_str().to_owned()),
            _ => None,
        };
        let applied = match self.state.apply(command) {
            Ok(applied) => applied,
            Err(refused) => {
                assert_eq!(self.state, before, "{refused}");
                let stale = matches!(refused, Refused::StaleHandOff { .. });
                return if stale { "stale".to_owned() } else { refused.to_string() };
            }
        };
        if let (Some(name), Outcome::Session(session)) = (joins, applied.outcome) {
            self.sessions.insert(name, session);
        }
        let old = Arc::clone(&self.followed);
        match applied.delta {
            Some(delta) => {
                self.followed = Arc::new(delta.apply_to(&old).unwrap());
                assert_eq!(self.followed.generation, old.generation.next());
            }
            // Only loads change without anyone being told.
            None => {
                self.follow();
                assert_eq!(self.followed.generation, old.generation);
            }
        }
        let new = Arc::clone(&self.state.jobs[&kv()].assignment);
        assert_eq!(new, self.followed);
        assert_eq!(new.broken_slice(), None);
        tokens_grow(&old, &new);
        if let Some(began) =
            new.slices.iter().find_map(|(_, one)| Some(one.transit.as_ref()?.id.began))
        {
            self.began = began.number;
        }
        shown(&new)
    }

    fn step(&self, slice: Slice, from: &str, to: &str) -> Edit {
        let named = |name: &str| (name != "-").then(|| self.session(name));
        let (from, to, none) = (named(from), named(to), Load::ZERO);
        let reason = Reason::Load;
        Edit::Move(Move { slice, from, to, reason, load: none, before: none, after: none })
    }

    pub(super) fn change(&self, edit: Edit) -> Command {
        plan(self.assignment().generation, vec![edit])
    }
}

/// The change that a plan of these edits is.
pub(super) fn plan(base: Generation, edits: Vec<Edit>) -> Command {
    let even = Ratio::from_millionths(1_000_000);
    let plan = Plan { base, edits, imbalance: (even, even), total: Load::ZERO };
    Command::Change { job: kv(), plan }
}

/// Checks that whoever was given a key got a token greater than any that key had, and that no token ever shrank.
pub(super) fn tokens_grow(old: &Assignment, new: &Assignment) {
    for (slice, now) in new.slices.iter() {
        for (_, before) in old.slices.touching(slice) {
            let had = |replica: &Replica| before.replicas.of(replica.session) == Some(*replica);
            let given = !now.replicas.as_slice().iter().all(had) && !is_merged(before, now);
            assert!(before.token <= now.token, "{slice}: {} to {}", before.token, now.token);
            assert!(!given || before.token < now.token, "{slice} changed hands by {}", now.token);
        }
    }
}

/// Whether the same tasks have it, some since later: what a merge of an affinity job's slices leads to.
fn is_merged(before: &Assigned, now: &Assigned) -> bool {
    let same = |replica: &Replica| before.replicas.of(replica.session).is_some();
    let (old, new) = (before.replicas.as_slice(), now.replicas.as_slice());
    !now.replicas.is_exclusive() && old.len() == new.len() && new.iter().all(same)
}

fn key(digits: &str) -> SliceKey {
    SliceKey(u64::from_str_radix(&format!("{digits:0<16}"), 16).unwrap())
}

/// A process of this name, always the same one.
fn process(name: &str) -> TaskInfo {
    let (plain, number) = (name.trim_end_matches('+'), u64::from(name.as_bytes()[0]));
    TaskInfo { prepares: name != plain, ..info(plain, number, number as u16) }
}

fn shown(assignment: &Assignment) -> String {
    let name = |session| assignment.tasks[&session].info.name.to_string();
    let mut lines = Vec::new();
    for (slice, assigned) in assignment.slices.iter() {
        let serves = |one: &Replica| format!("{}@{}", name(one.session), one.since.number);
        let serve: Vec<String> = assigned.replicas.as_slice().iter().map(serves).collect();
        let mut line = format!("{} #{}", serve.join(" "), assigned.token.number);
        if serve.is_empty() {
            line.insert(0, '-');
        }
        if let Some(transit) = assigned.transit.as_deref() {
            write!(line, ", {} for {}", transit.step, name(transit.to)).unwrap();
        }
        if assignment.slices.count() > 1 {
            line.insert_str(0, &format!("{:02x}: ", slice.first().0 >> 56));
        }
        lines.push(line);
    }
    lines.join("; ")
}
