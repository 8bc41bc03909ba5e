//! Thousands of random commands, sound and senseless: what holds after each of them.

use super::transcript::{Scene, plan, tokens_grow};
use super::*;
use crate::prng::Prng;

#[test]
fn whatever_is_asked_no_owner_loses_a_slice_that_it_was_not_told_to_release() {
    let mut seen = Seen::default();
    for seed in 0..120 {
        let kind = match seed % 2 {
            0 => Consistency::Exclusive,
            _ => Consistency::Affinity,
        };
        let mut prng = Prng::new(seed);
        let mut scene = Scene::new(kind, "a b+ c+");
        // Slices of some jobs wait for whoever is lost.
        let grace = Duration::from_secs(10 * (seed % 3));
        let spec = JobSpec { consistency: kind, grace, ..JobSpec::new(kv()) };
        scene.apply(Command::ApplyJob { spec, if_version: None });
        for _ in 0..500 {
            let before = scene.state.clone();
            let command = command(&mut prng, &scene);
            // What is checked of each command, `Scene` checks.
            scene.apply(command.clone());
            let (old, new) = (&before.jobs[&kv()].assignment, scene.assignment());
            let changed = before != scene.state;
            seen.commands += u64::from(changed);
            let newest = SessionId(scene.state.last_session);
            let came =
                matches!(command, Command::Register { .. }) && !old.tasks.contains_key(&newest);
            seen.back += u64::from(came && new.of(newest).next().is_some());
            owners_were_told(&command, old, new, &mut seen, seed);
            sessions_are_new(&before, &scene.state, seed);
            if prng.below(200) == 0 {
                restore(&mut prng, &mut scene);
            }
        }
    }
    // Else nothing was tested.
    let Seen { commands, released, lapsed, ended, back } = seen;
    assert!(commands > 10_000 && released > 50 && lapsed > 50, "{seen:?}");
    assert!(ended > 50 && back > 20, "{seen:?}");
}

#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    commands: u64,
    released: u64,
    lapsed: u64,
    ended: u64,
    /// Tasks that began with what had waited for them.
    back: u64,
}

fn pick<T: Copy>(prng: &mut Prng, from: &[T]) -> Option<T> {
    (!from.is_empty()).then(|| from[prng.below(from.len() as u64) as usize])
}

fn command(prng: &mut Prng, scene: &Scene) -> Command {
    let assignment = scene.assignment();
    let job = kv();
    let sessions: Vec<_> = assignment.tasks.keys().copied().collect();
    // Now and then one that has ended, or never was.
    let anyone = SessionId(scene.state.last_session + 1 - prng.below(5));
    let session = pick(prng, &sessions).filter(|_| prng.below(20) > 0).unwrap_or(anyone);
    match prng.below(40) {
        0..=2 => {
            let (name, process) = (prng.below(6), prng.below(3));
            let name = char::from(b'a' + name as u8).to_string();
            let prepares = prng.below(2) == 0;
            let info = info(&name, process, u16::from(name.as_bytes()[0]));
            let stopped = (prng.below(3) == 0).then_some(session);
            Command::Register { job, info: TaskInfo { prepares, ..info }, stopped }
        }
        3 => Command::Drain { job, session },
        4 | 5 => Command::Undrain { job, session },
        6 => Command::End { job, session, reason: EndReason::Lost },
        7 => {
            let base = assignment.generation;
            let loads = assignment.slices.iter().map(|_| Load::from_milli(prng.below(9)));
            Command::StoreLoads { job, base, loads: loads.collect() }
        }
        8 if prng.below(2) == 0 => Command::Settle { incarnation: scene.state.incarnation },
        8 => {
            let kept = scene.state.jobs[&job].kept.iter().next();
            let kept = kept.map(|(task, kept)| (task.clone(), kept.session));
            let (task, session) = kept.unwrap_or_else(|| ("a".parse().unwrap(), session));
            Command::Forget { job, task, session }
        }
        9..=24 => {
            let late = prng.below(20) == 0;
            let base = if late { Generation::ZERO } else { assignment.generation };
            let count = 1 + prng.below(3);
            plan(base, (0..count).map(|_| edit(prng, assignment, &sessions)).collect())
        }
        _ => {
            let count = prng.below(4);
            let steps = (0..count).filter_map(|_| step(prng, assignment, session));
            Command::HandOff { job, steps: steps.collect() }
        }
    }
}

fn edit(prng: &mut Prng, assignment: &Assignment, sessions: &[SessionId]) -> Edit {
    let slices = &assignment.slices;
    let at = prng.below(slices.count() as u64) as usize;
    let (slice, assigned) = (slices.slice_at(at), slices.value_at(at));
    match prng.below(8) {
        0 => Edit::Split { at: SliceKey(prng.bits()), low: Load::from_milli(prng.below(9)) },
        1 | 2 => {
            let last = (at + 1 + prng.below(2) as usize).min(slices.count() - 1);
            let last = slices.slice_at(last).last();
            Edit::Merge(Slice::new(slice.first(), last).expect("slices are in order"))
        }
        _ => {
            let held: Vec<_> = assigned.replicas.as_slice().iter().map(|one| one.session).collect();
            let from = pick(prng, &held).filter(|_| prng.below(8) > 0);
            let to = pick(prng, sessions).filter(|_| prng.below(8) > 0);
            let (reason, load, before, after) = (Reason::Load, Load::ZERO, Load::ZERO, Load::ZERO);
            Edit::Move(Move { slice, from, to, reason, load, before, after })
        }
    }
}

fn step(prng: &mut Prng, assignment: &Assignment, anyone: SessionId) -> Option<(HandOffId, Act)> {
    let transits: Vec<Transit> =
        assignment.slices.iter().filter_map(|(_, one)| one.transit.as_deref().copied()).collect();
    let transit = pick(prng, &transits)?;
    let by = transit.from.filter(|_| prng.below(4) > 0).unwrap_or(anyone);
    let acts = [
        Act::Release,
        Act::Release,
        Act::Acknowledged { by },
        Act::Acknowledged { by },
        Act::Lapsed,
        Act::Switch,
        Act::Abort,
    ];
    let act = pick(prng, &acts)?;
    // Now and then one that is over, or never was.
    let id = match prng.below(10) {
        0 => HandOffId { began: transit.id.began.next(), ..transit.id },
        _ => transit.id,
    };
    Some((id, act))
}

/// Whoever had a key and has it no more has ended, or was releasing exactly that to whoever has it now, and said that it has
/// or was given the time.
fn owners_were_told(
    command: &Command,
    old: &Assignment,
    new: &Assignment,
    seen: &mut Seen,
    seed: u64,
) {
    if !old.is_exclusive() {
        return;
    }
    for (slice, before) in old.slices.iter() {
        let Some(owner) = before.replicas.as_slice().first().copied() else { continue };
        for (part, now) in new.slices.touching(slice) {
            let next = now.replicas.as_slice().first().copied();
            if next == Some(owner) {
                continue;
            }
            if !new.tasks.contains_key(&owner.session) {
                seen.ended += 1;
                continue;
            }
            let transit = before.transit.as_deref().copied();
            let Some(transit) = transit.filter(|transit| transit.step == Step::Releasing) else {
                panic!("seed {seed}: {command:?} took {part} from {owner:?}");
            };
            let to = Replica { session: transit.to, since: transit.id.began };
            assert_eq!((next, now.token), (Some(to), new.generation), "seed {seed}");
            let Command::HandOff { steps, .. } = command else {
                panic!("seed {seed}: {command:?}")
            };
            if steps.contains(&(transit.id, Act::Acknowledged { by: owner.session })) {
                seen.released += 1;
            } else {
                assert!(steps.contains(&(transit.id, Act::Lapsed)), "seed {seed}: {command:?}");
                seen.lapsed += 1;
            }
        }
    }
}

/// A session that comes was never there before, and one that went never comes back.
fn sessions_are_new(before: &State, after: &State, seed: u64) {
    let (old, new) = (&before.jobs[&kv()].assignment.tasks, &after.jobs[&kv()].assignment.tasks);
    for session in new.keys().filter(|session| !old.contains_key(session)) {
        assert!(session.0 > before.last_session, "seed {seed}: {session} was minted twice");
        assert!(session.0 <= after.last_session, "seed {seed}: {session} was never minted");
    }
}

fn restore(prng: &mut Prng, scene: &mut Scene) {
    let old = scene.state.clone();
    scene.state = old.restored(ClusterId(prng.bits().into()), prng.below(1_000));
    scene.follow();
    let (before, after) = (&old.jobs[&kv()].assignment, scene.assignment());
    tokens_grow(before, after);
    assert!(after.generation > before.generation && after.tasks.is_empty());
}
