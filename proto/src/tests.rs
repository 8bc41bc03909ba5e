//! Every message there and back, cut short at every byte, and with bytes that nobody wrote.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use mandoline_core::assignment::{Assigned, Assignment, Replica, Replicas};
use mandoline_core::command::{ClusterId, Command, EndReason};
use mandoline_core::confine::{Confined, Crash};
use mandoline_core::delta::{Delta, TaskChange};
use mandoline_core::flags::{
    AtEnd, Count, Flags, HOST_MAX_BYTES, METHOD_MAX_BYTES, METHODS_MAX, PATH_MAX_BYTES, PAUSES_MAX,
    Pause, PauseId, PauseOrder, Phase as PausePhase, Scope, Standing, WHY_MAX_BYTES,
};
use mandoline_core::generation::Generation;
use mandoline_core::kept::Kept;
use mandoline_core::key::SliceKey;
use mandoline_core::load::Load;
use mandoline_core::offers::{Caller, Offer, SliceOffer};
use mandoline_core::pin::Pin;
use mandoline_core::plan::{Edit, Move, Plan, Reason};
use mandoline_core::prng::Prng;
use mandoline_core::report::{HotKey, Report, Size};
use mandoline_core::slice::Slice;
use mandoline_core::spec::{
    Band, BandOf, Consistency, Home, JobSpec, Metric, Ratio, ReplicaBounds, Spill, Unavailable,
};
use mandoline_core::state::{Churn, Job, State};
use mandoline_core::task::{Phase, SessionId, Task, TaskInfo};
use mandoline_core::transit::{Act, HandOffId, Step, Transit};
use prost::Message;

use crate::error::{WireError, decode};
use crate::flags::{self, encode_flags};
use crate::pb;
use crate::task;
use crate::update::{Assembler, PART_MAX_BYTES, Update, encode_delta, encode_full, encode_unknown};

const NOW: Generation = Generation { incarnation: 1, number: 7 };

fn slice(first: u64, last: u64) -> Slice {
    Slice::new(SliceKey(first), SliceKey(last)).unwrap()
}

fn info(id: u64) -> TaskInfo {
    let mut info =
        TaskInfo::new(format!("t{id}").parse().unwrap(), id, format!("h{id}:80").parse().unwrap());
    info.watch = Some("h:81".parse().unwrap());
    info.labels.insert("zone".into(), "a".into());
    info.revision = "v2".into();
    info.prepares = id == 2;
    info
}

fn member(id: u64) -> Arc<Task> {
    let lease = (id == 2).then(|| Duration::from_millis(2_500));
    Arc::new(Task { phase: Phase::Draining, lease, ..Task::new(SessionId(id), info(id)) })
}

fn assigned(sessions: &[u64]) -> Assigned {
    let replicas =
        sessions.iter().map(|id| Replica { session: SessionId(*id), since: NOW }).collect();
    Assigned { replicas, load: Load::from_milli(12_345), token: NOW, transit: None }
}

/// An exclusive job's: one slice on its way to the other task, one that nobody owns.
fn owned() -> Assignment {
    let mut assignment = Assignment::exclusive("lock".parse().unwrap(), NOW);
    assignment.tasks = [1, 2].map(|id| (SessionId(id), member(id))).into();
    let owner = Replica { session: SessionId(1), since: NOW };
    let transit = Transit {
        id: HandOffId { began: NOW, first: SliceKey(0) },
        from: Some(SessionId(1)),
        to: SessionId(2),
        step: Step::Releasing,
    };
    let transit = Some(Arc::new(transit));
    let moving =
        Assigned { replicas: Replicas::Owner(Some(owner)), transit, ..Assigned::unowned() };
    assignment.slices.set(slice(0, 9), moving);
    assignment
}

fn assignment(slices: u64) -> Assignment {
    let mut assignment = Assignment::new("kv".parse().unwrap(), NOW);
    assignment.spill = Some(Ratio::percent(115));
    assignment.tasks = [1, 2].map(|id| (SessionId(id), member(id))).into();
    for at in 1..slices {
        assignment
            .slices
            .set(slice(at << 40, u64::MAX), assigned(if at % 2 == 0 { &[1, 2] } else { &[2] }));
    }
    assignment
}

fn delta() -> Delta {
    let tasks = vec![TaskChange::Set(member(3)), TaskChange::Gone(SessionId(1))];
    let slices = vec![(slice(0, 9), assigned(&[3])), (slice(10, 99), assigned(&[]))];
    let spill = Some(Ratio::percent(120));
    Delta { job: "kv".parse().unwrap(), from: NOW, to: NOW.next(), tasks, slices, spill }
}

fn step() -> Move {
    let (from, to) = (Some(SessionId(1)), None);
    let [load, before, after] = [5, 9, 4].map(Load::from_milli);
    Move { slice: slice(1, 2), from, to, reason: Reason::Dereplicate, load, before, after }
}

/// A spec that asks for everything.
fn rich() -> JobSpec {
    let region = || "eu".to_owned();
    JobSpec {
        band: Band::Fixed { ratio: Ratio::from_millionths(25_000), of: BandOf::Hint },
        churn_budget: Ratio::percent(5),
        fill_rate: Ratio::percent(50),
        max_load_hint: Some(Load::from_milli(1_500)),
        reservation: Ratio::percent(10),
        replicas: ReplicaBounds { min: 2, max: ReplicaBounds::ALL },
        spread: Some("zone".to_owned()),
        homes: vec![
            Home { slice: slice(0, 9), region: region() },
            Home { slice: slice(20, u64::MAX), region: region() },
        ],
        metrics: vec![Metric { name: "memory".to_owned(), band: Ratio::percent(20) }],
        spill: Some(Spill { cap: Ratio::percent(115) }),
        lease: Duration::from_secs(30),
        prepare_within: Duration::ZERO,
        grace: Duration::from_millis(1_500),
        brake: Ratio::percent(100),
        max_unavailable: Unavailable::Share(Ratio::percent(10)),
        confine_after: 0,
        ..JobSpec::new("kv".parse().unwrap())
    }
}

/// A spec of the other kind.
fn exclusive() -> JobSpec {
    JobSpec {
        consistency: Consistency::Exclusive,
        max_unavailable: Unavailable::Tasks(7),
        ..JobSpec::new("kv".parse().unwrap())
    }
}

fn commands() -> Vec<Command> {
    let job: mandoline_core::name::JobName = "kv".parse().unwrap();
    let session = SessionId(4);
    let edits = vec![
        Edit::Split { at: SliceKey(5), low: Load::from_milli(1) },
        Edit::Merge(slice(0, 9)),
        Edit::Move(step()),
    ];
    let imbalance = (Ratio::from_millionths(1_500_000), Ratio::from_millionths(1_000_000));
    let plan = Plan { base: NOW, edits, imbalance, total: Load::from_milli(77) };
    let loads = vec![Load::ZERO, Load::from_milli(u64::MAX)];
    vec![
        Command::FoundCluster { id: ClusterId(u128::MAX - 5), nodes: 3, incarnation: 7 },
        Command::MintNode,
        Command::ApplyJob { spec: JobSpec::new(job.clone()), if_version: Some(0) },
        Command::ApplyJob { spec: rich(), if_version: None },
        Command::ApplyJob { spec: exclusive(), if_version: None },
        Command::Register { job: job.clone(), info: info(1), stopped: Some(session) },
        Command::Drain { job: job.clone(), session },
        Command::Undrain { job: job.clone(), session },
        Command::Forget { job: job.clone(), task: "t1".parse().unwrap(), session },
        Command::End { job: job.clone(), session, reason: EndReason::Lost },
        Command::Change { job: job.clone(), plan },
        Command::StoreLoads { job: job.clone(), base: NOW, loads },
        Command::HandOff {
            job: job.clone(),
            steps: [
                Act::Release,
                Act::Acknowledged { by: session },
                Act::Lapsed,
                Act::Switch,
                Act::Abort,
            ]
            .map(|act| (HandOffId { began: NOW, first: SliceKey(9) }, act))
            .into(),
        },
        Command::Settle { incarnation: 8 },
        Command::Freeze { job: job.clone() },
        Command::Unfreeze { job: job.clone() },
        Command::Pin { job: job.clone(), slice: slice(5, 9), task: "t1".parse().unwrap() },
        Command::Unpin { job: job.clone(), slice: slice(5, 9) },
        Command::BelieveLost { job: job.clone(), sessions: vec![session, SessionId(9)] },
        Command::Confine {
            job: job.clone(),
            slices: vec![slice(5, 9), slice(20, 20)],
            task: "t1".parse().unwrap(),
            crashes: vec![crash()],
        },
        Command::Unconfine { job, slice: slice(5, 9) },
        Command::AddPause { order: order() },
        Command::EndPause { id: PauseId(7), over: Duration::from_millis(1_500) },
        Command::ClearPause { id: PauseId(7) },
    ]
}

/// An order that says everything.
fn order() -> PauseOrder {
    PauseOrder {
        scope: Scope {
            job: Some("kv".parse().unwrap()),
            slice: Some(slice(5, 9)),
            host: Some("*.example.com".into()),
            path: Some("/carts".into()),
            methods: vec!["PUT".into(), "DELETE".into()],
        },
        why: "schema change".into(),
        lasts: Duration::from_millis(30_500),
        at_end: AtEnd::Fail,
        release_over: Duration::from_secs(10),
    }
}

fn flags() -> Flags {
    let over = Duration::ZERO;
    let (go_on, scope) = (AtEnd::GoOn, Scope { job: order().scope.job, ..Scope::default() });
    let pauses = [
        (PauseId(3), order(), PausePhase::Releasing { over }),
        (PauseId(9), PauseOrder { scope, at_end: go_on, ..order() }, PausePhase::Holding),
    ];
    let pauses = pauses.map(|(id, order, phase)| (id, Pause { id, order, phase }));
    Flags { version: NOW, pauses: pauses.into() }
}

#[test]
fn flags_come_back() {
    survives(&flags(), pb::Flags::from(&flags()), Flags::try_from);
    assert_eq!(decode::<pb::Flags>(encode_flags(&flags()), "").unwrap(), (&flags()).into());
}

#[test]
fn as_many_pauses_as_there_may_be_fit_a_message_with_room_to_spare() {
    let long = |max: usize| "x".repeat(max);
    let mut order = order();
    order.scope.path = Some(format!("/{}", long(PATH_MAX_BYTES - 1)).into());
    order.scope.host = Some(long(HOST_MAX_BYTES).into());
    order.scope.job = Some(long(63).parse().unwrap());
    order.scope.methods = vec![long(METHOD_MAX_BYTES).into(); METHODS_MAX];
    order.why = long(WHY_MAX_BYTES).into();
    let pause = |id| {
        let id = PauseId(u64::MAX - id);
        (id, Pause { id, order: order.clone(), phase: PausePhase::Holding })
    };
    let flags = Flags { version: NOW, pauses: (0..PAUSES_MAX as u64).map(pause).collect() };
    let message = encode_flags(&flags);
    // What gRPC takes by default is 4 MiB.
    assert!(message.len() < 3 << 20, "{}", message.len());
    assert_eq!(Flags::try_from(decode::<pb::Flags>(message, "").unwrap()), Ok(flags));
}

#[test]
fn flags_that_make_no_sense_are_refused_by_name() {
    type Bend = fn(&mut pb::Flags);
    let cases: [(Bend, &str); 9] = [
        (|m| m.version = None, "version: is missing"),
        (|m| m.pauses.swap(0, 1), "pauses: p3 is out of order"),
        (|m| m.pauses[0].id = 0, "pauses[0].id: is zero"),
        (|m| m.pauses[0].order = None, "pauses[0].order: is missing"),
        (
            |m| m.pauses[1].order.as_mut().unwrap().lasts_ms = 0,
            "pauses[1].order.pause: a pause that lasts 0ns",
        ),
        (|m| m.pauses[1].order.as_mut().unwrap().at_end = 9, "pauses[1].order.at_end: is not one"),
        (|m| m.pauses[1].order.as_mut().unwrap().scope = None, "pauses[1].order.scope: is missing"),
        (
            |m| m.pauses[1].order.as_mut().unwrap().scope = Some(pb::Scope::default()),
            "pauses[1].order.pause: the pause says of nothing",
        ),
        (
            |m| {
                let order = m.pauses[0].order.as_mut().unwrap();
                let slice = order.scope.as_mut().unwrap().slice.as_mut().unwrap();
                (slice.first, slice.last) = (9, 5);
            },
            "pauses[0].order.scope.",
        ),
    ];
    for (bend, message) in cases {
        let mut flags = pb::Flags::from(&flags());
        bend(&mut flags);
        let error = Flags::try_from(flags).unwrap_err().to_string();
        assert!(error.starts_with(message), "{error}");
    }
}

#[test]
fn what_proxies_say_comes_back() {
    let counts = [(2, 7), (9, 0)].map(|(id, n)| (PauseId(id), Count { in_flight: n, held: n + 1 }));
    let said = Standing { version: NOW, counts: counts.into() };
    let proxy = Caller(5);
    let message = flags::standing_message(proxy, Some(&said));
    let mut odd = message.clone();
    odd.counts.swap(0, 1);
    assert_eq!(flags::standing(odd).unwrap_err().to_string(), "counts: p2 is out of order");
    survives(&(proxy, Some(said)), message, flags::standing);
    assert_eq!(flags::standing(flags::standing_message(proxy, None)), Ok((proxy, None)));
}

#[test]
fn a_disk_without_flags_opens_with_none_of_this_incarnation() {
    let mut message = pb::State::from(&state());
    (message.flags, message.last_pause) = (None, 0);
    let state = State::try_from(message).unwrap();
    assert_eq!((state.flags.version.to_string(), state.flags.pauses.len()), ("2.0".into(), 0));
}

fn crash() -> Crash {
    let (before, held) = (Duration::from_millis(1_500), Duration::from_secs(3));
    Crash { session: SessionId(3), task: "t1".parse().unwrap(), before, held }
}

fn state() -> State {
    let spec = JobSpec::new("kv".parse().unwrap());
    let job = Job {
        version: 3,
        assignment: Arc::new(assignment(5)),
        frozen: true,
        pins: [slice(0, 9), slice(10, 10)]
            .map(|slice| Pin { slice, task: "t9".parse().unwrap() })
            .into(),
        kept: [("t1", 1), ("t2", 9)]
            .map(|(name, id)| {
                let kept = Kept::new(SessionId(id), vec![slice(0, 9), slice(20, 29)]);
                (name.parse().unwrap(), kept.unwrap())
            })
            .into(),
        confined: [slice(0, 9), slice(10, 10)]
            .map(|slice| Confined { slice, task: "t9".parse().unwrap(), crashes: vec![crash()] })
            .into(),
        believed: [SessionId(1), SessionId(7)].into(),
        gone: ["t8", "t7"].map(|name| name.parse().unwrap()).into(),
        churn: Churn { moves: 1, keys: 2, load: 3 },
        history: VecDeque::from([(NOW, step())]),
        ..Job::new(spec.clone(), NOW)
    };
    let lock = JobSpec::new("lock".parse().unwrap());
    let owned = Job { assignment: Arc::new(owned()), ..Job::new(lock.clone(), NOW) };
    let jobs = [(spec.name, job), (lock.name, owned)].into();
    State {
        cluster: Some(ClusterId(9)),
        incarnation: 2,
        last_session: 8,
        last_node: 3,
        hold_off: true,
        jobs,
        flags: Arc::new(flags()),
        last_pause: 11,
    }
}

/// Checks that a message comes back; that no cut and no flipped bit does worse than an error.
fn survives<M, T>(value: &T, message: M, parse: impl Fn(M) -> Result<T, WireError>)
where
    M: Message + Default + Clone,
    T: PartialEq + std::fmt::Debug,
{
    let bytes = message.encode_to_vec();
    let read = |bytes: &[u8]| decode::<M>(bytes, "test").and_then(&parse);
    assert_eq!(read(&bytes).as_ref(), Ok(value));
    for end in 0..bytes.len() {
        // A cut between two fields may still be a message, but never the same one.
        assert_ne!(read(&bytes[..end]).as_ref(), Ok(value), "cut at {end}");
    }
    let mut prng = Prng::new(bytes.len() as u64);
    for _ in 0..2_000 {
        let mut bent = bytes.clone();
        let at = prng.below(bent.len() as u64) as usize;
        bent[at] ^= 1 << prng.below(8);
        drop(read(&bent));
    }
}

#[test]
fn confined_ranges_are_in_order_and_the_evidence_makes_sense() {
    type Bend = fn(&mut pb::Job);
    let cases: [(Bend, &str); 4] = [
        (|m| m.confined.swap(0, 1), "jobs[0].confined: 0000000000000000..0000000000000009 is out"),
        (|m| m.confined[0].crashes[0].session = 0, "jobs[0].confined[0].crashes[0].session: is"),
        (|m| m.confined[0].slice = None, "jobs[0].confined[0].slice: is missing"),
        (|m| m.believed[0] = 0, "jobs[0].sessions: is zero"),
    ];
    for (bend, message) in cases {
        let mut state = pb::State::from(&state());
        bend(&mut state.jobs[0]);
        let error = State::try_from(state).unwrap_err().to_string();
        assert!(error.starts_with(message), "{error}");
    }
}

#[test]
fn commands_come_back() {
    for command in commands() {
        survives(&command, pb::Command::from(&command), Command::try_from);
    }
}

#[test]
fn the_state_comes_back() {
    survives(&state(), pb::State::from(&state()), State::try_from);
}

#[test]
fn pins_that_overlap_are_refused() {
    let mut message = pb::State::from(&state());
    message.jobs[0].pins.swap(0, 1);
    let error = State::try_from(message).unwrap_err().to_string();
    assert_eq!(
        error,
        "jobs[0].pins: 0000000000000000..0000000000000009 is out of order or overlaps"
    );
}

#[test]
fn what_waits_for_a_task_is_in_order_and_not_nothing() {
    type BendKept = fn(&mut pb::Kept);
    let cases: [(BendKept, &str); 4] = [
        (|m| m.slices.swap(0, 1), "jobs[0].kept[0].slices: are out of order or overlap"),
        (|m| m.slices.clear(), "jobs[0].kept[0].slices: is missing"),
        (|m| m.session = 0, "jobs[0].kept[0].session: "),
        (|m| m.task.clear(), "jobs[0].kept[0].task: "),
    ];
    for (bend, message) in cases {
        let mut state = pb::State::from(&state());
        bend(&mut state.jobs[0].kept[0]);
        let error = State::try_from(state).unwrap_err().to_string();
        assert!(error.starts_with(message), "{error}");
    }
}

#[test]
fn reports_come_back() {
    let slices = vec![(slice(0, 9), Load::from_milli(1_500)), (slice(10, u64::MAX), Load::ZERO)];
    let window = Duration::from_millis(5_000);
    let hot = [(3, 1_200), (9, 300)];
    let hot = hot.map(|(key, milli)| HotKey { key: SliceKey(key), load: Load::from_milli(milli) });
    let metrics = vec![Load::from_milli(7), Load::ZERO];
    let sizes = vec![
        Size { slice: slice(0, 4), metrics, move_cost: Some(0) },
        Size { slice: slice(5, 9), metrics: vec![], move_cost: None },
    ];
    let report =
        Report { hot: hot.to_vec(), sizes, ..Report::new(SessionId(4), NOW, window, slices) };
    survives(&report, pb::Report::from(&report), |message| task::report(SessionId(4), message));
}

#[test]
fn a_spec_that_an_older_node_wrote_means_what_it_meant() {
    // As the log of the first release has it: fields 1 to 8, all of them set.
    let old = "0a026b7610a08d0618d0860320012801\
               30e8073888274090\
               4e";
    let bytes: Vec<u8> = (0..old.len() / 2)
        .map(|at| u8::from_str_radix(&old[2 * at..2 * at + 2], 16).unwrap())
        .collect();
    let spec = decode::<pb::JobSpec>(bytes.as_slice(), "spec").and_then(JobSpec::try_from).unwrap();
    let expected = JobSpec {
        band: Band::Adaptive(Ratio::percent(10)),
        churn_budget: Ratio::percent(5),
        ..JobSpec::new("kv".parse().unwrap())
    };
    assert_eq!(spec, expected);
}

#[test]
fn an_older_node_takes_a_fixed_band_for_its_ratio() {
    let spec = JobSpec {
        band: Band::Fixed { ratio: Ratio::percent(2), of: BandOf::Mean },
        ..JobSpec::new("kv".parse().unwrap())
    };
    let message = pb::JobSpec { band_of: 0, ..(&spec).into() };
    assert_eq!(JobSpec::try_from(message).unwrap().band, Band::Adaptive(Ratio::percent(2)));
}

#[test]
fn specs_that_make_no_sense_are_named() {
    type BendSpec = fn(&mut pb::JobSpec);
    let cases: [(BendSpec, &str); 9] = [
        (|m| m.band_of = 9, "band_of: is not one of those that this version knows"),
        (|m| m.max_load_hint = None, "spec: band is 2.5% of hint: give max_load_hint"),
        (|m| m.homes[1].slice = None, "homes[1].slice: is missing"),
        (|m| m.homes.swap(0, 1), "spec: homes is 0000000000000014"),
        (|m| m.spill = Some(pb::Spill { cap: 1_000_000 }), "spec: spill.cap is 100%"),
        (|m| m.consistency = 9, "consistency: is not one of those that this version knows"),
        (|m| m.consistency = 1, "spec: replicas is min 2, max 10000 in an exclusive job"),
        (|m| m.max_unavailable = Some(pb::Unavailable { of: None }), "max_unavailable.of: is miss"),
        (|m| m.lease_ms = Some(u64::MAX), "spec: lease is 18446744073709551.615s: give 2s"),
    ];
    for (bend, message) in cases {
        let mut spec = pb::JobSpec::from(&rich());
        bend(&mut spec);
        let error = JobSpec::try_from(spec).unwrap_err().to_string();
        assert!(error.starts_with(message), "{error}");
    }
}

#[test]
fn offers_come_back() {
    let part = |first, last, failed| SliceOffer {
        slice: slice(first, last),
        load: Load::from_milli(1_500),
        failed: Load::from_milli(failed),
    };
    let offer = Offer {
        caller: Caller(u64::MAX),
        window: Duration::from_millis(5_000),
        slices: vec![part(0, 9, 0), part(10, u64::MAX, 1_500)],
        hot: vec![HotKey { key: SliceKey(7), load: Load::from_milli(9) }],
        avoided: vec![SessionId(3), SessionId(8)],
    };
    let job: mandoline_core::name::JobName = "kv".parse().unwrap();
    let both = (job.clone(), offer.clone());
    survives(&both, task::offer_message(&job, &offer), task::offer);
}

#[test]
fn offers_that_make_no_sense_are_named() {
    let offer = |job: &str, load: f64, failed: f64, window_ms: u64| {
        let slices = vec![pb::SliceOffer { slice: Some(slice(0, 9).into()), load, failed }];
        let job = job.to_owned();
        let offer = pb::Offer { job, caller: 1, window_ms, slices, ..Default::default() };
        task::offer(offer).map_err(|error| error.to_string())
    };
    assert!(offer("kv", 2.0, 1.0, 1_000).is_ok());
    let cases = [
        (offer("a/b", 2.0, 1.0, 1_000), "the name \"a/b\" has '/'"),
        (offer("kv", f64::NAN, 1.0, 1_000), "slices[0].load: NaN is no load"),
        (offer("kv", 2.0, f64::INFINITY, 1_000), "slices[0].failed: inf is no load"),
        (offer("kv", 2.0, 3.0, 1_000), "failed than was offered"),
        (offer("kv", 2.0, 1.0, 0), "window is 0ns"),
    ];
    for (found, message) in cases {
        let error = found.unwrap_err();
        assert!(error.contains(message), "{error}");
    }
}

type Bend = fn(&mut pb::Assignment);

#[test]
fn fields_that_make_no_sense_are_named() {
    let good = pb::Assignment::from(&assignment(3));
    let bend = |bend: Bend| {
        let mut message = good.clone();
        bend(&mut message);
        Assignment::try_from(message).unwrap_err().to_string()
    };
    let cases: [(Bend, &str); 9] = [
        (|m| m.spill_cap = 900_000, "spill_cap: is 90%, which is not above 100%"),
        (|m| m.job = "a/b".into(), "job: the name \"a/b\" has '/'"),
        (|m| m.job = "x".repeat(64), "job: the name is 64 bytes long"),
        (|m| m.generation = None, "generation: is missing"),
        (|m| m.slices.clear(), "slices: the first slice does not begin at"),
        (
            |m| m.slices.swap(1, 2),
            "slices: the slice that begins at 0000010000000000 is out of order",
        ),
        (|m| m.tasks[1].session = 0, "tasks[1].session: is zero"),
        (|m| m.tasks.clear(), "names a task that is unknown"),
        (
            |m| m.tasks[0].info.as_mut().unwrap().address = "nowhere".into(),
            "tasks[0].info.address: \"nowhere\" is no address",
        ),
    ];
    for (change, message) in cases {
        let error = bend(change);
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn loads_that_are_no_numbers_are_refused() {
    let report = |load: f64, window_ms: u64| {
        let slices = vec![pb::SliceLoad { slice: Some(slice(0, 9).into()), load }];
        let generation = Some(NOW.into());
        let report = pb::Report { generation, window_ms, slices, ..pb::Report::default() };
        task::report(SessionId(1), report)
    };
    assert!(report(1.5, 1_000).is_ok());
    for bad in [f64::NAN, f64::INFINITY, -1.0, 1e300] {
        let error = report(bad, 1_000).unwrap_err();
        assert_eq!(error.field, "slices[0].load", "{error}");
    }
    assert_eq!(report(1.0, 0).unwrap_err().field, "report");
}

#[test]
fn hot_keys_and_sizes_that_make_no_sense_are_named() {
    let report = |hot: &[(u64, f64)], metrics: Vec<f64>| {
        let slice: pb::Slice = slice(0, 9).into();
        let report = pb::Report {
            generation: Some(NOW.into()),
            window_ms: 1_000,
            slices: vec![pb::SliceLoad { slice: Some(slice), load: 5.0 }],
            hot: hot.iter().map(|&(key, load)| pb::HotKey { key, load }).collect(),
            sizes: vec![pb::Size { slice: Some(slice), metrics, move_cost: None }],
        };
        task::report(SessionId(1), report).map_err(|error| error.to_string())
    };
    assert!(report(&[(1, 1.0), (9, 4.0)], vec![1.0]).is_ok());
    type Case<'a> = (&'a [(u64, f64)], Vec<f64>, &'a str);
    let cases: [Case<'_>; 6] = [
        (&[(1, f64::NAN)], vec![], "hot[0].load: NaN is no load"),
        (&[(1, 1.0), (2, 1e300)], vec![], "hot[1].load: "),
        (&[(2, 1.0), (1, 1.0)], vec![], "hot keys are out of order or come twice at"),
        (&[(10, 1.0)], vec![], "lies in none of its slices"),
        (&[], vec![-1.0], "sizes[0].metrics: -1 is no load"),
        (&[], vec![1.0; 9], "has 9 metrics"),
    ];
    for (hot, metrics, message) in cases {
        let error = report(hot, metrics).unwrap_err();
        assert!(error.contains(message), "{error}");
    }
    let many: Vec<(u64, f64)> = (0..257).map(|_| (1, 1.0)).collect();
    assert!(report(&many, vec![]).unwrap_err().contains("names 257 hot keys"));
}

#[test]
fn a_full_assignment_travels_in_parts() {
    let large = assignment(40_000);
    let messages = encode_full(&large);
    assert!(
        messages.len() > 1 && messages.iter().all(|message| message.len() <= PART_MAX_BYTES + 16)
    );
    let mut assembler = Assembler::default();
    let (last, first) = messages.split_last().unwrap();
    for message in first {
        assert_eq!(assembler.take_bytes(message), Ok(None));
    }
    assert_eq!(assembler.take_bytes(last), Ok(Some(Update::Full(large))));
    // And deltas after it.
    assert_eq!(assembler.take_bytes(&encode_delta(&delta())), Ok(Some(Update::Delta(delta()))));
    let job: mandoline_core::name::JobName = "kv".parse().unwrap();
    assert_eq!(assembler.take_bytes(&encode_unknown(&job)), Ok(Some(Update::Unknown(job))));
}

#[test]
fn a_delta_between_parts_is_refused() {
    let messages = encode_full(&assignment(40_000));
    let mut assembler = Assembler::default();
    assembler.take_bytes(&messages[0]).unwrap();
    assert_eq!(assembler.take_bytes(&encode_delta(&delta())).unwrap_err().field, "update");
}

#[test]
fn a_second_owner_is_refused() {
    let mut message = pb::Assignment::from(&owned());
    let assigned = message.slices[0].assigned.as_mut().unwrap();
    let second = pb::Replica { session: 2, ..assigned.replicas[0] };
    assigned.replicas.push(second);
    let error = Assignment::try_from(message).unwrap_err().to_string();
    assert_eq!(error, "slices[0].replicas: are 2 of a slice that has one owner at most");
}

#[test]
fn a_hand_off_that_does_not_fit_its_slice_is_refused() {
    let bent: [fn(&mut pb::Transit); 4] =
        [|t| t.to = 1, |t| t.to = 9, |t| t.from = 2, |t| t.step = 0];
    for bend in bent {
        let mut message = pb::Assignment::from(&owned());
        bend(message.slices[0].assigned.as_mut().unwrap().transit.as_mut().unwrap());
        Assignment::try_from(message).unwrap_err();
    }
}
