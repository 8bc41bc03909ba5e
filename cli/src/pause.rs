//! Requests held by hand: `pause add|list|end|wait`. Every proxy hears of it through the assigners' log.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use mandoline_core::flags::{AtEnd, Pause, PauseId, PauseOrder, Phase, Scope};
use mandoline_core::key::SliceKey;
use mandoline_core::name::JobName;
use mandoline_core::slice::Slice;
use mandoline_proto::flags::millis;
use mandoline_proto::pb;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::client::{Admin, Client};
use crate::failure::Failure;
use crate::keys::Keys;
use crate::operate::AskArgs;
use crate::table::Table;
use crate::text::Text;
use crate::units::Span;

/// Between two looks while `pause wait` waits.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Pauses: proxies hold requests for a while, and let them go gently
#[derive(Debug, Subcommand)]
pub(crate) enum PauseCommand {
    /// Has every proxy hold the requests that fit all that is given, until `pause end` or until it has lasted
    ///
    /// Examples:
    ///   mandoline pause add --job kv --for 30s --why 'schema change'
    ///   mandoline pause add --job kv --slice 0000000000000000..3fffffffffffffff --for 1m --release-over 10s
    ///   mandoline pause add --host shop.example.com --path /carts --method PUT,POST --for 30s --then fail
    ///   mandoline pause add --job kv --for 30s -o json | jq -r .pause      # its id
    #[command(verbatim_doc_comment)]
    Add {
        #[command(flatten)]
        scope: ScopeArgs,
        /// How long it lasts at most, by the clock of each proxy: 1s to 1h
        #[arg(long = "for", value_name = "DURATION")]
        lasts: Span,
        /// Over how long held requests go on at its end
        #[arg(long, default_value = "5s", value_name = "DURATION")]
        release_over: Span,
        /// What happens to held requests when it has lasted
        #[arg(long, value_enum, default_value_t)]
        then: Then,
        /// Why, for whoever wonders
        #[arg(long, default_value = "", value_name = "TEXT", hide_default_value = true)]
        why: String,
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Lists the pauses, with how many requests they hold and how many are in flight
    List {
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Lets go of what a pause holds; once more, with another time, to let go faster or slower
    ///
    /// Examples:
    ///   mandoline pause end p7 --over 10s
    ///   mandoline pause end --all
    #[command(verbatim_doc_comment)]
    End {
        /// Which
        #[arg(required_unless_present = "all")]
        id: Option<Text<PauseId>>,
        /// All that there are
        #[arg(long, conflicts_with = "id")]
        all: bool,
        /// Over how long held requests go on [default: as `pause add` said]
        #[arg(long, value_name = "DURATION")]
        over: Option<Span>,
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Waits until nothing that a pause is for is in flight, in any proxy; ends with 1 if that does not come about
    ///
    /// Each proxy that speaks with the leader has the pause in force by then. A leader that was elected lately waits ten
    /// seconds to hear of all proxies.
    ///
    /// Example: mandoline pause wait p7 --within 20s && ./maintenance.sh
    #[command(verbatim_doc_comment)]
    Wait {
        /// Which
        id: Text<PauseId>,
        /// How long to wait at most
        #[arg(long, default_value = "1m", value_name = "DURATION")]
        within: Span,
        #[command(flatten)]
        ask: AskArgs,
    },
}

/// Which requests. At least one of these.
#[derive(Debug, Args)]
pub(crate) struct ScopeArgs {
    /// Those for this job
    #[arg(long)]
    job: Option<Text<JobName>>,
    /// Those whose keys lie here: FIRST..LAST in hex, both included, or group:GROUP
    #[arg(long, value_name = "FIRST..LAST", conflicts_with = "key")]
    slice: Option<Keys>,
    /// Those for this key
    #[arg(long)]
    key: Option<String>,
    /// Those for this host, without a port; *.example.com for every name below
    #[arg(long)]
    host: Option<String>,
    /// Those for this path and what is below
    #[arg(long)]
    path: Option<String>,
    /// Those with one of these methods
    #[arg(long = "method", value_name = "METHOD,..", value_delimiter = ',')]
    methods: Vec<String>,
}

impl From<ScopeArgs> for Scope {
    fn from(args: ScopeArgs) -> Self {
        let key = args.key.map(|key| {
            let key = SliceKey::of(key.as_bytes());
            Slice::new(key, key).expect("a key is its own slice")
        });
        Self {
            job: args.job.map(|Text(job)| job),
            slice: args.slice.map(|keys| keys.slice).or(key),
            host: args.host.map(|host| host.to_ascii_lowercase().into()),
            path: args.path.map(String::into_boxed_str),
            methods: args.methods.into_iter().map(String::into_boxed_str).collect(),
        }
    }
}

/// What happens to held requests when a pause has lasted.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(crate) enum Then {
    /// They go on, over the time of the release
    #[default]
    GoOn,
    /// They get a 503
    Fail,
}

/// Answers `pause`.
pub(crate) async fn pause(command: PauseCommand) -> Result<ExitCode, Failure> {
    match command {
        PauseCommand::Add { scope, lasts, release_over, then, why, ask } => {
            let order = PauseOrder {
                scope: scope.into(),
                why: why.into(),
                lasts: lasts.0,
                at_end: match then {
                    Then::GoOn => AtEnd::GoOn,
                    Then::Fail => AtEnd::Fail,
                },
                release_over: release_over.0,
            };
            add(&order, &ask).await?;
        }
        PauseCommand::List { ask } => {
            let known = fetch(&Client::new(&ask.client)?).await?;
            let json = known.iter().map(Known::json).collect();
            ask.output.print(&json, table(&known));
        }
        PauseCommand::End { id, over, ask, .. } => end(id, over, &ask).await?,
        PauseCommand::Wait { id: Text(id), within, ask } => return wait(id, within, &ask).await,
    }
    Ok(ExitCode::SUCCESS)
}

/// What shows whether a change was carried out.
const LOOK: &str = "mandoline pause list";

async fn add(order: &PauseOrder, ask: &AskArgs) -> Result<(), Failure> {
    order.check().map_err(|error| Failure::new("this is no pause").because(error))?;
    let request = pb::AddPauseRequest { order: Some(order.into()) };
    let call = async |mut admin: Admin, request| admin.add_pause(request).await;
    let id = PauseId(Client::new(&ask.client)?.change(request, LOOK, call).await?.id);
    let text = format!(
        "pause {id} holds {} for {}; `mandoline pause wait {id}` says when nothing is in flight\n",
        order.scope,
        Span(order.lasts),
    );
    ask.output.print(&order_json(id, order), text);
    Ok(())
}

async fn end(id: Option<Text<PauseId>>, over: Option<Span>, ask: &AskArgs) -> Result<(), Failure> {
    let client = Client::new(&ask.client)?;
    let ids = match id {
        Some(Text(id)) => vec![id],
        None => fetch(&client).await?.iter().map(|known| known.pause.id).collect(),
    };
    for id in &ids {
        let request =
            pb::EndPauseRequest { id: id.0, over_ms: over.map(|Span(over)| millis(over)) };
        let call = async |mut admin: Admin, request| admin.end_pause(request).await;
        client.change(request, LOOK, call).await?;
    }
    let names: Vec<String> = ids.iter().map(ToString::to_string).collect();
    let text = match &names[..] {
        [] => "there is no pause\n".to_owned(),
        names => format!("ended: {}\n", names.join(", ")),
    };
    ask.output.print(&json!({ "ended": names }), text);
    Ok(())
}

async fn wait(id: PauseId, within: Span, ask: &AskArgs) -> Result<ExitCode, Failure> {
    let client = Client::new(&ask.client)?;
    let deadline = Instant::now() + within.0;
    let mut known = fetch(&client).await?;
    loop {
        let found = known.iter().find(|known| known.pause.id == id);
        let Some(found) = found else {
            eprintln!("there is no pause {id}: it is over, or never was (`{LOOK}`)");
            return Ok(ExitCode::from(1));
        };
        if !found.holds() {
            eprintln!("pause {id} holds nothing any more: it was ended");
            return Ok(ExitCode::from(1));
        }
        let progress = found.progress.unwrap_or_default();
        if progress.quiet {
            let pb::PauseProgress { proxies, held, .. } = progress;
            let text = match proxies {
                0 => format!("nothing is in flight for pause {id}: no proxy is there\n"),
                _ => format!(
                    "nothing is in flight for pause {id}, in {proxies} proxies that hold {held} requests\n"
                ),
            };
            ask.output.print(&found.json(), text);
            return Ok(ExitCode::SUCCESS);
        }
        if Instant::now() >= deadline {
            eprintln!("not within {within}: {}", found.waits_for());
            return Ok(ExitCode::from(1));
        }
        tokio::time::sleep(LOOK_EVERY).await;
        known = loop {
            match fetch(&client).await {
                Ok(known) => break known,
                Err(failure) if Instant::now() >= deadline => return Err(failure),
                // It answered before: most likely somebody else is about to lead.
                Err(_) => tokio::time::sleep(LOOK_EVERY).await,
            }
        };
    }
}

/// A pause, and what the leader knows of it.
struct Known {
    pause: Pause,
    progress: Option<pb::PauseProgress>,
}

async fn fetch(client: &Client) -> Result<Vec<Known>, Failure> {
    let call = async |mut admin: Admin, request| admin.list_pauses(request).await;
    let reply = client.ask(pb::ListPausesRequest { id: 0 }, call).await?;
    reply.pauses.into_iter().map(Known::read).collect()
}

impl Known {
    fn read(status: pb::PauseStatus) -> Result<Self, Failure> {
        let pause = status.pause.map(Pause::try_from).transpose();
        let bad = |error: String| {
            Failure::new("the assigner told of a pause that makes no sense").because(error)
        };
        let pause = pause.map_err(|error| bad(error.to_string()))?;
        let pause = pause.ok_or_else(|| bad("it is missing".to_owned()))?;
        Ok(Self { pause, progress: status.progress })
    }

    /// What is still to come before nothing is in flight.
    fn waits_for(&self) -> String {
        match self.progress {
            None => "nobody leads, so nobody knows what proxies have in flight".to_owned(),
            Some(pb::PauseProgress { proxies, heard, in_flight, .. }) => match in_flight {
                0 if heard == proxies => {
                    "the leader is new, and waits to hear of all proxies".to_owned()
                }
                _ => format!(
                    "it is in force in {heard} of {proxies} proxies, {in_flight} requests are in flight there"
                ),
            },
        }
    }

    /// What proxies say of a pause is of one that is in force there, and no more once it is released.
    fn holds(&self) -> bool {
        self.pause.phase == Phase::Holding
    }

    fn state(&self) -> &'static str {
        match self.pause.phase {
            Phase::Holding => "holding",
            Phase::Releasing { .. } => "releasing",
        }
    }

    fn json(&self) -> Value {
        let mut json = order_json(self.pause.id, &self.pause.order);
        json["state"] = self.state().into();
        if let Phase::Releasing { over } = self.pause.phase {
            json["releasing_over"] = Span(over).to_string().into();
        }
        json["progress"] = self.progress.map_or(Value::Null, |progress| {
            let left = Span(Duration::from_millis(progress.left_ms)).to_string();
            if !self.holds() {
                return json!({ "left": left });
            }
            json!({
                "left": left,
                "proxies": progress.proxies,
                "heard": progress.heard,
                "in_flight": progress.in_flight,
                "held": progress.held,
                "quiet": progress.quiet,
            })
        });
        json
    }
}

fn order_json(id: PauseId, order: &PauseOrder) -> Value {
    let Scope { job, slice, host, path, methods } = &order.scope;
    json!({
        "pause": id.to_string(),
        "scope": {
            "job": job.as_ref().map(JobName::as_str),
            "slice": slice.map(|slice| slice.to_string()),
            "host": host,
            "path": path,
            "methods": methods,
        },
        "why": order.why,
        "for": Span(order.lasts).to_string(),
        "then": order.at_end.to_string(),
        "release_over": Span(order.release_over).to_string(),
    })
}

fn table(known: &[Known]) -> Table {
    let heading =
        ["PAUSE", "STATE", "LEFT", "PROXIES", "IN_FLIGHT", "HELD", "THEN", "SCOPE", "WHY"];
    let mut table = Table::new(&heading);
    for known in known {
        let of = |what: &dyn Fn(pb::PauseProgress) -> String| {
            known.progress.map_or_else(String::new, what)
        };
        let while_it_holds = |what: &dyn Fn(pb::PauseProgress) -> String| match known.holds() {
            true => of(what),
            false => String::new(),
        };
        // To the second: it is gone while it is read.
        let left = |progress: pb::PauseProgress| {
            Span(Duration::from_secs(progress.left_ms.div_ceil(1_000))).to_string()
        };
        table.row([
            known.pause.id.to_string(),
            known.state().to_owned(),
            of(&left),
            while_it_holds(&|progress| format!("{}/{}", progress.heard, progress.proxies)),
            while_it_holds(&|progress| progress.in_flight.to_string()),
            while_it_holds(&|progress| progress.held.to_string()),
            known.pause.order.at_end.to_string(),
            known.pause.order.scope.to_string(),
            known.pause.order.why.to_string(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(subcommand)]
        command: PauseCommand,
    }

    fn scope(args: &[&str]) -> Result<Scope, String> {
        let line = [&["", "add", "--for", "30s"], args].concat();
        let line = Line::try_parse_from(line).map_err(|error| error.to_string())?;
        let PauseCommand::Add { scope, .. } = line.command else { panic!("{line:?}") };
        Ok(scope.into())
    }

    #[test]
    fn a_scope_is_given_by_its_parts() {
        let args = "--job kv --slice 0..ff --host Shop.Example.com --path /carts --method GET,PUT";
        let args: Vec<&str> = args.split_whitespace().collect();
        let found = scope(&args).unwrap();
        assert_eq!(
            found.to_string(),
            "job kv, keys 0000000000000000..00000000000000ff, host shop.example.com, path /carts, method GET or PUT"
        );
        let key = scope(&["--key", "apple"]).unwrap().slice.unwrap();
        assert_eq!((key.first(), key.width()), (SliceKey::of(b"apple"), 1));
        assert_eq!(scope(&["--slice", "group:t"]).unwrap().slice, Some(Slice::of_group(b"t")));
        for bad in [&["--slice", "ff..0"][..], &["--slice", "0..1", "--key", "a"], &["--job", "/"]]
        {
            assert!(scope(bad).is_err(), "{bad:?}");
        }
        assert_eq!(scope(&[]).unwrap(), Scope::default(), "which the check refuses");
    }

    #[test]
    fn a_pause_has_an_end_and_an_end_has_a_pause() {
        let parse = |line: &str| Line::try_parse_from(line.split_whitespace());
        assert!(parse("- add --job kv").unwrap_err().to_string().contains("--for"));
        assert!(parse("- end").is_err() && parse("- end p1 --all").is_err());
        for good in ["- end p1", "- end --all --over 3s", "- wait p1 --within 3s", "- list"] {
            parse(good).unwrap();
        }
    }

    #[test]
    fn pauses_are_shown_in_a_row_each() {
        let order = PauseOrder {
            scope: scope(&["--job", "kv"]).unwrap(),
            why: "disk swap".into(),
            lasts: Duration::from_secs(30),
            at_end: AtEnd::Fail,
            release_over: Duration::from_secs(5),
        };
        let pause = |id, phase| Pause { id: PauseId(id), order: order.clone(), phase };
        let progress = pb::PauseProgress {
            left_ms: 12_400,
            proxies: 2,
            heard: 1,
            in_flight: 3,
            held: 40,
            quiet: false,
        };
        let over = Duration::from_secs(10);
        let known = [
            Known { pause: pause(7, Phase::Holding), progress: Some(progress) },
            Known { pause: pause(12, Phase::Releasing { over }), progress: Some(progress) },
            Known { pause: pause(13, Phase::Holding), progress: None },
        ];
        assert_eq!(
            table(&known).to_string(),
            "\
PAUSE  STATE      LEFT  PROXIES  IN_FLIGHT  HELD  THEN  SCOPE   WHY
p7     holding    13s   1/2              3    40  fail  job kv  disk swap
p12    releasing  13s   -                -     -  fail  job kv  disk swap
p13    holding    -     -                -     -  fail  job kv  disk swap
"
        );
        let json = known[0].json();
        assert_eq!(
            (&json["pause"], &json["for"], &json["then"]),
            (&"p7".into(), &"30s".into(), &"fail".into())
        );
        assert_eq!(json["progress"]["held"], 40);
        let json = known[1].json();
        assert_eq!(
            (&json["releasing_over"], &json["progress"]),
            (&"10s".into(), &json!({ "left": "12400ms" }))
        );
        assert!(known[0].waits_for().contains("1 of 2 proxies, 3 requests"));
    }
}
