//! Who serves what, and the operator's hand in it: `assignment show|freeze|unfreeze|pin|unpin|release`, and `moves`.

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use mandoline_core::assignment::{Assigned, Assignment};
use mandoline_core::key::SliceKey;
use mandoline_core::load::Load;
use mandoline_core::name::{JobName, TaskName};
use mandoline_core::slice::Slice;
use mandoline_core::task::SessionId;
use mandoline_core::transit::Transit;
use mandoline_proto::pb;
use mandoline_proto::update::{Assembler, Update};
use serde_json::{Value, json};

use crate::client::{Admin, Client};
use crate::failure::Failure;
use crate::keys::Keys;
use crate::operate::AskArgs;
use crate::show;
use crate::table::Table;
use crate::text::Text;

/// Assignments: which task serves which keys
#[derive(Debug, Subcommand)]
pub(crate) enum AssignmentCommand {
    /// Shows the slices of a job with the tasks that serve them, their load and since when; ends with 1 if there is none
    ///
    /// The load is as last stored, at most a minute ago.
    ///
    /// Examples:
    ///   mandoline assignment show kv
    ///   mandoline assignment show kv --key user-17
    #[command(verbatim_doc_comment)]
    Show {
        /// The job's name
        job: Text<JobName>,
        /// Only the slice of this key
        #[arg(long, conflicts_with = "task")]
        key: Option<String>,
        /// Only the slices of this task
        #[arg(long)]
        task: Option<Text<TaskName>>,
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Keeps a job's slices where they are, emergencies apart: lost tasks are replaced, load is not evened out
    Freeze {
        /// The job's name
        job: Text<JobName>,
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Takes a freeze back
    Unfreeze {
        /// The job's name
        job: Text<JobName>,
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Nails keys to a task, whatever the load; the same keys again change their task
    ///
    /// The pin is to the task's name: it holds over restarts, and waits while no task has that name.
    ///
    /// Examples:
    ///   mandoline assignment pin kv 0000000000000000..3fffffffffffffff kv-3
    ///   mandoline assignment pin kv key:user-17 kv-3
    ///   mandoline assignment pin kv group:tenant-7 kv-3
    #[command(verbatim_doc_comment)]
    Pin {
        /// The job's name
        job: Text<JobName>,
        /// Which keys: FIRST..LAST in hex, both included, key:KEY or group:GROUP
        keys: Keys,
        /// Which task
        task: Text<TaskName>,
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Takes a pin back
    Unpin {
        /// The job's name
        job: Text<JobName>,
        /// Which keys, exactly as they were pinned
        keys: Keys,
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Lets go of a range of keys that was confined to one task since it crashed several
    ///
    /// Example: mandoline assignment release kv 7700000000000000..77ffffffffffffff
    Release {
        /// The job's name
        job: Text<JobName>,
        /// Which keys, exactly as `mandoline status` shows them
        keys: Keys,
        #[command(flatten)]
        ask: AskArgs,
    },
}

/// Shows what moved lately in a job, with the reason of each move, oldest first
///
/// Example: mandoline moves kv --newest 20
#[derive(Debug, Args)]
pub(crate) struct MovesArgs {
    /// The job's name
    job: Text<JobName>,
    /// At most so many, the newest
    #[arg(short, long, default_value_t = 50, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=1_000))]
    newest: u32,
    #[command(flatten)]
    ask: AskArgs,
}

/// Answers `assignment`.
pub(crate) async fn assignment(command: AssignmentCommand) -> Result<ExitCode, Failure> {
    match command {
        AssignmentCommand::Show { job, key, task, ask } => {
            return show(&job.0, key.as_deref(), task.as_ref().map(|Text(task)| task), &ask).await;
        }
        AssignmentCommand::Freeze { job, ask } => {
            freeze(&job.0, false, &ask).await?;
            let json = json!({ "job": job.0.as_str(), "frozen": true });
            ask.output.print(&json, format!("job {job} is frozen: slices stay where they are\n"));
        }
        AssignmentCommand::Unfreeze { job, ask } => {
            freeze(&job.0, true, &ask).await?;
            let json = json!({ "job": job.0.as_str(), "frozen": false });
            ask.output.print(&json, format!("job {job} is balanced again\n"));
        }
        AssignmentCommand::Pin { job, keys, task, ask } => {
            let request = pb::PinSliceRequest {
                job: job.to_string(),
                slice: Some(keys.slice.into()),
                task: task.to_string(),
            };
            let call = async |mut admin: Admin, request| admin.pin_slice(request).await;
            Client::new(&ask.client)?.change(request, &look(&job.0), call).await?;
            let json = json!({ "job": job.0.as_str(), "slice": keys.slice.to_string(), "task": task.0.as_str() });
            ask.output.print(&json, format!("{keys} of job {job} is pinned to task {task}\n"));
        }
        AssignmentCommand::Unpin { job, keys, ask } => {
            let slice = Some(keys.slice.into());
            let request = pb::UnpinSliceRequest { job: job.to_string(), slice };
            let call = async |mut admin: Admin, request| admin.unpin_slice(request).await;
            Client::new(&ask.client)?.change(request, &look(&job.0), call).await?;
            let json = json!({ "job": job.0.as_str(), "slice": keys.slice.to_string() });
            ask.output.print(&json, format!("{keys} of job {job} is no longer pinned\n"));
        }
        AssignmentCommand::Release { job, keys, ask } => {
            let slice = Some(keys.slice.into());
            let request = pb::ReleaseSliceRequest { job: job.to_string(), slice };
            let call = async |mut admin: Admin, request| admin.release_slice(request).await;
            Client::new(&ask.client)?.change(request, &look(&job.0), call).await?;
            let json = json!({ "job": job.0.as_str(), "slice": keys.slice.to_string() });
            ask.output.print(&json, format!("{keys} of job {job} is no longer confined\n"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Answers `moves`.
pub(crate) async fn moves(args: MovesArgs) -> Result<ExitCode, Failure> {
    let MovesArgs { job, newest, ask } = args;
    let client = Client::new(&ask.client)?;
    if status(&client, &job.0).await?.is_none() {
        return Ok(nothing(&job.0));
    }
    let request = pb::ListMovesRequest { job: job.to_string(), newest };
    let call = async |mut admin: Admin, request| admin.list_moves(request).await;
    let moves = client.ask(request, call).await?.moves;
    let json = moves.iter().map(move_json).collect();
    ask.output.print(&json, moves_table(&moves));
    Ok(ExitCode::SUCCESS)
}

/// What shows whether a change was carried out.
fn look(job: &JobName) -> String {
    format!("mandoline assignment show {job}")
}

fn nothing(job: &JobName) -> ExitCode {
    eprintln!("no job {job}: `mandoline job list` shows those that are");
    ExitCode::from(1)
}

async fn freeze(job: &JobName, unfreeze: bool, ask: &AskArgs) -> Result<(), Failure> {
    let request = pb::FreezeJobRequest { job: job.to_string(), unfreeze };
    let call = async |mut admin: Admin, request| admin.freeze_job(request).await;
    Client::new(&ask.client)?.change(request, &look(job), call).await?;
    Ok(())
}

/// By `Status` and not by `GetJob`: a job that is not there is an answer, and no error.
async fn status(client: &Client, job: &JobName) -> Result<Option<pb::JobStatus>, Failure> {
    let call = async |mut admin: Admin, request| admin.status(request).await;
    let jobs = client.ask(pb::StatusRequest {}, call).await?.jobs;
    let name =
        |status: &pb::JobStatus| status.spec.as_ref().is_some_and(|spec| spec.name == job.as_str());
    Ok(jobs.into_iter().find(name))
}

async fn show(
    job: &JobName,
    key: Option<&str>,
    task: Option<&TaskName>,
    ask: &AskArgs,
) -> Result<ExitCode, Failure> {
    let client = Client::new(&ask.client)?;
    let Some(status) = status(&client, job).await? else { return Ok(nothing(job)) };
    let assignment = fetch(&client, job).await?;
    let key = key.map(|key| SliceKey::of(key.as_bytes()));
    let of = |task: &TaskName| {
        let known = assignment.tasks.values().find(|known| known.info.name == *task);
        known.map(|known| known.session)
    };
    let wanted = match (key, task) {
        (Some(key), _) => Wanted::Key(key),
        (None, None) => Wanted::All,
        (None, Some(task)) => match of(task) {
            Some(session) => Wanted::Session(session),
            None => {
                eprintln!("job {job} has no task {task}: `mandoline task list --job {job}`");
                return Ok(ExitCode::from(1));
            }
        },
    };
    let pins: Vec<(Slice, String)> = status
        .pins
        .into_iter()
        .filter_map(|pin| Some((pin.slice?.try_into().ok()?, pin.task)))
        .collect();
    let (frozen, confined) = (status.frozen, status.confined);
    let page = Page { assignment, wanted, frozen, pins, confined };
    ask.output.print(&page.json(), page.table());
    Ok(ExitCode::SUCCESS)
}

async fn fetch(client: &Client, job: &JobName) -> Result<Assignment, Failure> {
    let request = pb::GetAssignmentRequest { job: job.to_string() };
    // All parts within one call: a node that dies between two of them is one that did not answer.
    let call = async |mut admin: Admin, request| {
        let mut parts = admin.get_assignment(request).await?.into_inner();
        let mut assembler = Assembler::default();
        while let Some(part) = parts.message().await? {
            let update = Some(pb::update::Update::Full(part));
            let whole = assembler.take(pb::Update { update });
            let whole = whole.map_err(|error| tonic::Status::internal(error.to_string()))?;
            if let Some(Update::Full(assignment)) = whole {
                return Ok(tonic::Response::new(assignment));
            }
        }
        Err(tonic::Status::unavailable("the assignment broke off before its end"))
    };
    client.ask(request, call).await
}

/// Which slices to show.
enum Wanted {
    All,
    Key(SliceKey),
    Session(SessionId),
}

/// What `assignment show` shows.
struct Page {
    assignment: Assignment,
    wanted: Wanted,
    frozen: bool,
    pins: Vec<(Slice, String)>,
    confined: Vec<pb::Confined>,
}

impl Page {
    fn slices(&self) -> impl Iterator<Item = (Slice, &Assigned)> {
        self.assignment.slices.iter().filter(|(slice, assigned)| match self.wanted {
            Wanted::All => true,
            Wanted::Key(key) => slice.contains(key),
            Wanted::Session(session) => assigned.replicas.of(session).is_some(),
        })
    }

    fn name(&self, session: SessionId) -> &str {
        self.assignment.tasks.get(&session).map_or("?", |task| task.info.name.as_str())
    }

    /// Who serves a slice, and where it is going if it is on its way.
    fn tasks(&self, assigned: &Assigned) -> String {
        let replicas = assigned.replicas.as_slice().iter();
        let tasks: Vec<&str> = replicas.map(|replica| self.name(replica.session)).collect();
        let transit = assigned.transit.as_ref();
        let transit = transit.map(|to| format!(" -> {} ({})", self.name(to.to), to.step));
        tasks.join(",") + &transit.unwrap_or_default()
    }

    /// The tasks that keys of a slice are pinned to.
    fn pinned(&self, slice: Slice) -> Vec<&str> {
        let start = self.pins.partition_point(|(pin, _)| pin.last() < slice.first());
        let here = self.pins[start..].iter().take_while(|(pin, _)| pin.first() <= slice.last());
        here.map(|(_, task)| task.as_str()).collect()
    }

    fn json(&self) -> Value {
        let replica = |replica: &mandoline_core::assignment::Replica| {
            json!({
                "task": self.name(replica.session),
                "session": replica.session.0,
                "since": replica.since.to_string(),
            })
        };
        let transit = |transit: &Transit| {
            json!({
                "hand_off": transit.id.to_string(),
                "step": transit.step.to_string(),
                "from": transit.from.map(|from| self.name(from)),
                "to": self.name(transit.to),
            })
        };
        let slice = |(slice, assigned): (Slice, &Assigned)| {
            json!({
                "slice": slice.to_string(),
                "replicas": assigned.replicas.as_slice().iter().map(replica).collect::<Vec<_>>(),
                "load": assigned.load.units(),
                "token": assigned.token.to_string(),
                "transit": assigned.transit.as_deref().map(transit),
            })
        };
        let pin =
            |(slice, task): &(Slice, String)| json!({ "slice": slice.to_string(), "task": task });
        let mut page = json!({
            "job": self.assignment.job.as_str(),
            "generation": self.assignment.generation.to_string(),
            "frozen": self.frozen,
            "spill": self.assignment.spill.map(|cap| cap.to_string()),
            "pins": self.pins.iter().map(pin).collect::<Vec<_>>(),
            "confined": self.confined.iter().map(show::confined_json).collect::<Vec<_>>(),
            "slices": self.slices().map(slice).collect::<Vec<_>>(),
        });
        if let Wanted::Key(key) = self.wanted {
            page["slice_key"] = key.to_string().into();
        }
        page
    }

    fn table(&self) -> String {
        let mut table = Table::new(&["SLICE", "TASKS", "LOAD", "SINCE", "PINNED"]);
        for (slice, assigned) in self.slices() {
            let replicas = assigned.replicas.as_slice();
            let since: Vec<String> = replicas.iter().map(|r| r.since.to_string()).collect();
            table.row([
                slice.to_string(),
                self.tasks(assigned),
                format!("{:.1}", assigned.load.units()),
                since.join(","),
                self.pinned(slice).join(","),
            ]);
        }
        let frozen = if self.frozen { "  frozen" } else { "" };
        let key = match self.wanted {
            Wanted::Key(key) => format!("  key at {key}"),
            _ => String::new(),
        };
        let spill =
            self.assignment.spill.map_or_else(String::new, |cap| format!("  spill above {cap}"));
        let Assignment { job, generation, slices, .. } = &self.assignment;
        let mut page = format!(
            "job {job}  generation {generation}  {} slices{frozen}{spill}{key}\n",
            slices.count()
        );
        let mut tasks: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for (slice, task) in &self.pins {
            tasks.entry(task).or_default().push(slice.to_string());
        }
        for (task, slices) in tasks {
            page.push_str(&format!("pinned to {task}: {}\n", slices.join(", ")));
        }
        page.extend(self.confined.iter().map(show::confined_line));
        format!("{page}\n{table}")
    }
}

fn move_json(step: &pb::MoveRecord) -> Value {
    let end = |session: u64, task: &str| {
        (session != 0)
            .then(|| json!({ "session": session, "task": (!task.is_empty()).then_some(task) }))
    };
    json!({
        "generation": generation(step),
        "slice": slice(step),
        "from": end(step.from, &step.from_task),
        "to": end(step.to, &step.to_task),
        "reason": step.reason,
        "load": units(step.load),
        "before": units(step.before),
        "after": units(step.after),
    })
}

fn moves_table(moves: &[pb::MoveRecord]) -> Table {
    let mut table =
        Table::new(&["GENERATION", "SLICE", "FROM", "TO", "REASON", "LOAD", "BEFORE", "AFTER"]);
    let end = |session: u64, task: &str| match (session, task) {
        (0, _) => String::new(),
        (session, "") => format!("s{session}"),
        (_, task) => task.to_owned(),
    };
    for step in moves {
        table.row([
            generation(step),
            slice(step),
            end(step.from, &step.from_task),
            end(step.to, &step.to_task),
            step.reason.clone(),
            format!("{:.1}", units(step.load)),
            format!("{:.1}", units(step.before)),
            format!("{:.1}", units(step.after)),
        ]);
    }
    table
}

fn generation(step: &pb::MoveRecord) -> String {
    let pb::Generation { incarnation, number } = step.generation.unwrap_or_default();
    format!("{incarnation}.{number}")
}

fn slice(step: &pb::MoveRecord) -> String {
    let slice = step.slice.and_then(|slice| Slice::try_from(slice).ok());
    slice.map_or_else(String::new, |slice| slice.to_string())
}

fn units(milli: u64) -> f64 {
    Load::from_milli(milli).units()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mandoline_core::assignment::{Replica, Replicas};
    use mandoline_core::generation::Generation;
    use mandoline_core::task::{Task, TaskInfo};
    use mandoline_core::transit::{HandOffId, Step};

    use super::*;

    fn page(wanted: Wanted) -> Page {
        let number = |number| Generation { incarnation: 1, number };
        let mut assignment = Assignment::new("kv".parse().unwrap(), number(9));
        assignment.spill = Some(mandoline_core::spec::Ratio::percent(115));
        for (id, name) in [(1, "a"), (2, "b")] {
            let session = SessionId(id);
            let address = format!("h:{id}").parse().unwrap();
            let info = TaskInfo::new(name.parse().unwrap(), id, address);
            let task = Task::new(session, info);
            assignment.tasks.insert(session, Arc::new(task));
        }
        let one = |id| Replica { session: SessionId(id), since: number(2 + id) };
        for (slice, replicas) in [
            ("0..ffffffffffffffff", Replicas::One(one(1))),
            ("8000000000000000..ffffffffffffffff", [one(1), one(2)].into_iter().collect()),
        ] {
            let load = Load::from_milli(1_500);
            let assigned = Assigned { replicas, load, token: number(4), transit: None };
            assignment.slices.set(slice.parse().unwrap(), assigned);
        }
        let pins = vec![("0..ff".parse().unwrap(), "a".to_owned())];
        Page { assignment, wanted, frozen: true, pins, confined: vec![] }
    }

    #[test]
    fn an_assignment_is_shown_to_people() {
        let expected = "\
job kv  generation 1.9  2 slices  frozen  spill above 115%
pinned to a: 0000000000000000..00000000000000ff

SLICE                               TASKS  LOAD  SINCE    PINNED
0000000000000000..7fffffffffffffff  a       1.5  1.3      a
8000000000000000..ffffffffffffffff  a,b     1.5  1.3,1.4  -
";
        assert_eq!(page(Wanted::All).table(), expected);
        let of_b = page(Wanted::Session(SessionId(2))).table();
        assert!(of_b.contains("a,b") && !of_b.contains("7fffffffffffffff"), "{of_b}");
    }

    #[test]
    fn what_is_on_its_way_or_confined_is_shown() {
        let mut page = page(Wanted::All);
        let slice: Slice = "8000000000000000..ffffffffffffffff".parse().unwrap();
        let mut assigned = page.assignment.get(slice.first()).1.clone();
        assigned.replicas = Replicas::Owner(assigned.replicas.of(SessionId(1)));
        let began = Generation { incarnation: 1, number: 8 };
        let id = HandOffId { began, first: slice.first() };
        let (from, to) = (Some(SessionId(1)), SessionId(2));
        assigned.transit = Some(Arc::new(Transit { id, from, to, step: Step::Releasing }));
        page.assignment.slices.set(slice, assigned);
        let crash = pb::Crash { session: 7, task: "b".to_owned(), before_ms: 1_500, held_ms: 200 };
        page.confined = vec![pb::Confined {
            slice: Some(pb::Slice { first: 0, last: 255 }),
            task: "a".to_owned(),
            crashes: vec![crash],
        }];
        let (table, json) = (page.table(), page.json());
        assert!(table.contains("  a -> b (releasing)  "), "{table}");
        let confined = "confined to a: 0000000000000000..00000000000000ff, crashed: b (s7) 1.5s before, having held it for 0.2s\n";
        assert!(table.contains(confined), "{table}");
        let transit =
            json!({ "hand_off": id.to_string(), "step": "releasing", "from": "a", "to": "b" });
        assert_eq!(
            (&json["slices"][0]["transit"], &json["slices"][1]["transit"]),
            (&Value::Null, &transit)
        );
        assert_eq!(json["confined"][0]["crashes"][0]["task"], "b");
    }

    #[test]
    fn an_assignment_is_shown_to_programs() {
        let all = page(Wanted::All).json();
        assert_eq!(all["frozen"], true);
        assert_eq!(all["spill"], "115%");
        assert_eq!(all["pins"][0]["task"], "a");
        assert_eq!(all["slices"][1]["replicas"][1]["since"], "1.4");
        assert_eq!(all["slices"][1]["load"], 1.5);
        // From the XXH3 specification: e6c632b61e964e1f.
        let one = page(Wanted::Key(SliceKey::of(b"a"))).json();
        assert_eq!(one["slice_key"], "e6c632b61e964e1f");
        assert_eq!(one["slices"].as_array().unwrap().len(), 1);
        assert_eq!(one["slices"][0]["slice"], "8000000000000000..ffffffffffffffff");
    }

    #[test]
    fn moves_are_shown_with_their_reasons() {
        let step = pb::MoveRecord {
            generation: Some(pb::Generation { incarnation: 1, number: 7 }),
            slice: Some(pb::Slice { first: 0, last: 255 }),
            from: 3,
            to: 2,
            from_task: String::new(),
            to_task: "b".to_owned(),
            reason: "load".to_owned(),
            load: 500,
            before: 2_000,
            after: 1_500,
        };
        let json = move_json(&step);
        assert_eq!((&json["from"]["session"], &json["from"]["task"]), (&json!(3), &Value::Null));
        assert_eq!(json["to"]["task"], "b");
        let expected = "\
GENERATION  SLICE                               FROM  TO  REASON  LOAD  BEFORE  AFTER
       1.7  0000000000000000..00000000000000ff  s3    b   load     0.5     2.0    1.5
";
        assert_eq!(moves_table(&[step]).to_string(), expected);
    }
}
