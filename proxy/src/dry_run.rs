//! What would become of a request, stage by stage and why, by the functions that real requests run through, without sending it: for
//! operators (`mandoline proxy explain`), and for tests that ask everybody who routes for the same keys.

use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::request::Parts;
use mandoline::http::key::Asked;
use mandoline::{Generation, SessionId};
use mandoline_core::extract::Miss;
use mandoline_core::key::SliceKey;
use mandoline_core::task::Task;
use serde_json::{Map, Value, json};

use crate::admit;
use crate::chain;
use crate::client::Host;
use crate::config::error::ConfigError;
use crate::config::{Checked, Config};
use crate::hold::book::Book;
use crate::hold::flights::Facts;
use crate::hold::gates::Gates;
use crate::hold::queue::House;
use crate::identify;
use crate::job::Job;
use crate::key;
use crate::lookup::{Fault, Lookup};
use crate::metrics::counters::Counters;
use crate::pause;
use crate::pool::ConnectionPool;
use crate::refusal::Refusal;
use crate::route;
use crate::setup::{EVERYTHING, Route, Setup, To};
use crate::target::{self, Target};
use crate::upgrade;
use crate::worker::Worker;

/// How many other routes are told of.
const OTHERS_MAX: usize = 8;

/// A proxy that sends nothing.
pub struct DryRun {
    setup: Rc<Setup>,
    pool: ConnectionPool,
    pseudonym: String,
}

/// What would become of a request, stage by stage, in the form that `mandoline proxy explain -o json` prints.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation(pub Value);

impl DryRun {
    /// Goes by a configuration.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        let counters = Arc::new(Counters::default());
        let config: Arc<Checked> = Arc::new(config.check()?);
        let pool = ConnectionPool::new(config.timeouts, config.limits, Arc::clone(&counters));
        let book = Arc::new(Book::new(1, config.limits));
        let house = Rc::new(House::new(book, counters));
        let pseudonym = format!("mandoline-{}", config.id);
        Ok(Self { setup: Rc::new(Setup::new(config, None, &house)), pool, pseudonym })
    }

    /// Gives the task that a request with this head would go to, and the assignment that says so; the status of the answer if it
    /// would go to none.
    pub fn first(&self, mut head: Parts) -> Result<(SessionId, Generation), u16> {
        let target = self.walk().stages(&mut head, None, &mut Told::default());
        target
            .map(|(_, target)| (target.session(), target.generation))
            .map_err(|refusal| refusal.status().as_u16())
    }

    /// Says what would become of a request, as far as that is known without a proxy that runs.
    pub fn explain(&self, head: Parts, client: IpAddr) -> Explanation {
        self.walk().explain(head, client)
    }

    fn walk(&self) -> Walk<'_> {
        let Self { setup, pool, pseudonym } = self;
        Walk { setup, pool, gates: None, pseudonym }
    }
}

/// Says what would become of a request that came to a worker now.
pub(crate) fn explain(worker: &Worker, head: Parts, client: IpAddr) -> Explanation {
    let Worker { pool, gates, pseudonym, .. } = worker;
    Walk { setup: &worker.setup(), pool, gates: Some(gates), pseudonym }.explain(head, client)
}

/// A way through the stages.
struct Walk<'a> {
    setup: &'a Setup,
    pool: &'a ConnectionPool,
    // Nothing where no proxy runs.
    gates: Option<&'a Gates>,
    pseudonym: &'a str,
}

/// What was found on the way.
#[derive(Default)]
struct Told {
    // A trusted proxy, and the client that it speaks for.
    speaks_for: Option<(IpAddr, IpAddr)>,
    // The key is in the body, or may be.
    has_body_key: bool,
    stages: Vec<Map<String, Value>>,
}

impl Told {
    /// Another stage begins.
    fn enters(&mut self, stage: &str) {
        self.stages.push(
            [("stage".to_owned(), stage.into()), ("says".to_owned(), json!([]))]
                .into_iter()
                .collect(),
        );
    }

    fn stage(&mut self) -> &mut Map<String, Value> {
        self.stages.last_mut().expect("a stage has begun")
    }

    /// Adds a sentence for people.
    fn says(&mut self, text: impl Into<String>) {
        let Some(Value::Array(says)) = self.stage().get_mut("says") else { return };
        says.push(Value::String(text.into()));
    }

    /// Adds what a program may want to know.
    fn fact(&mut self, name: &str, value: impl Into<Value>) {
        self.stage().insert(name.to_owned(), value.into());
    }
}

impl Walk<'_> {
    fn explain(&self, mut head: Parts, connected: IpAddr) -> Explanation {
        let forwarded = &self.setup.config.forwarded;
        let client = match forwarded.trusts(connected) {
            true => chain::told(&head.headers, forwarded).0.hops.first().copied(),
            false => None,
        };
        chain::strip(&mut head.headers, connected, forwarded);
        let mut told =
            Told { speaks_for: client.map(|client| (connected, client)), ..Told::default() };
        let client = client.unwrap_or(connected);
        let asked = format!("{} {}", head.method, head.uri);
        let end = match self.stages(&mut head, Some(client), &mut told) {
            Ok((route, target)) => self.forward(&route, &target, &mut told),
            Err(Refusal::Key(_)) if told.has_body_key => {
                told.says("that is in the body, of which nothing is known here");
                Value::Null
            }
            // Who serves what, a file cannot tell.
            Err(Refusal::Lookup(Fault::Unasked)) => {
                told.says("what stands for it is not known yet, and nobody asks the table to explain a request");
                Value::Null
            }
            Err(Refusal::Unserved) if self.gates.is_none() => {
                told.says("who owns the key only a proxy that runs knows: ask it with --proxy");
                Value::Null
            }
            Err(refusal) => {
                let status = refusal.status().as_u16();
                told.says(format!("answers {status}: {refusal}"));
                json!({"answers": {"status": status, "text": refusal.to_string()}})
            }
        };
        self.observe(client, &mut told);
        let request = json!({"asked": asked, "client": client.to_string()});
        Explanation(json!({"request": request, "stages": told.stages, "end": end}))
    }

    /// The stages up to where the request would be sent.
    fn stages(
        &self,
        head: &mut Parts,
        client: Option<IpAddr>,
        told: &mut Told,
    ) -> Result<(Rc<Route>, Target), Refusal> {
        told.enters("identify");
        let host = identify::check(self.pseudonym, head)?;
        if let Some((proxy, client)) = told.speaks_for {
            told.fact("speaks_for", client.to_string());
            told.says(format!("it comes from {proxy}, which is trusted and speaks for {client}"));
        }
        told.fact("host", host.as_str());
        told.says(match host.as_str() {
            Some(host) => format!("it is for the host {host}, and can be passed on"),
            None => "it names no host, and can be passed on".to_owned(),
        });

        told.enters("admit");
        let wish = upgrade::wish(head, false)?;
        let route = self.admit(head, &host, told)?;
        let body_bytes = admit::body_bytes(&route, self.setup, head);
        told.fact("body_bytes", body_bytes);
        told.says(match body_bytes {
            Some(most) => format!("its body may have {most} bytes"),
            None => "its body may have any length".to_owned(),
        });
        if let Some(wish) = wish {
            let protocol = upgrade::granted(&wish, &route.upgrades)?.to_str().unwrap_or_default();
            told.fact("upgrade", protocol);
            told.says(format!("its connection may switch to {protocol}, if the task agrees"));
        }

        let (job, from) = match &route.to {
            To::Job { job, key } => (job, key),
            To::Pool { job } => {
                let target = self.any(head, &host, job, told)?;
                return Ok((route, target));
            }
        };
        told.enters("key");
        told.fact("job", job.name.as_str());
        told.fact("from", from.to_string());
        told.says(format!("the key is {}", from.describe()));
        if from.reads_body() {
            // Nor would what is found elsewhere be the key, where the body comes first.
            told.has_body_key = true;
            return Err(Refusal::Key(Miss::NoKey.to_string()));
        }
        let asked = Asked { head, host: host.as_str(), client, body: None };
        let key = match &route.lookup {
            None => key::find(from, &asked)?,
            Some(lookup) => {
                told.fact("lookup", lookup.name());
                told.says(format!("it is translated by the lookup {:?}", lookup.name()));
                let looked_up = key::looked_up(from, &asked)?;
                let facts = Facts::of(head, &host.0, Some(&job.name), None);
                let known = self.known(lookup, &looked_up, facts)?;
                let [asked, answer] =
                    [&looked_up, &*known].map(|text| String::from_utf8_lossy(text).into_owned());
                told.says(format!("{answer:?} stands for {asked:?}"));
                told.fact("looked_up", asked);
                told.fact("stands_for", answer);
                SliceKey::of(&known)
            }
        };
        told.fact("key", key.to_string());
        told.says(format!("it lies at {key}"));

        told.enters("pause");
        self.pause(head, &host, Some(job), Some(key), told);

        told.enters("route");
        let owners = owners(job, key, told);
        let target = route::find(job, key, self.pool, self.setup)?;
        chosen(job, &target, owners, told);
        Ok((Rc::clone(&route), target))
    }

    /// Gives what is known to stand for a key, if it was said after the end of any pause that covered the request: the table is not asked.
    fn known(
        &self,
        lookup: &Lookup,
        looked_up: &[u8],
        mut facts: Facts,
    ) -> Result<Arc<[u8]>, Refusal> {
        let known = lookup.known(looked_up, None);
        facts.key = known.as_ref().ok().map(|known| SliceKey::of(known));
        let ended = self.gates.and_then(|gates| match facts.key {
            Some(_) => gates.ends.last(&facts),
            None => gates.ends.last_of_any_key(&facts),
        });
        lookup.known(looked_up, ended).map_err(Refusal::Lookup)
    }

    /// The same for a pool, any of whose servers will do.
    fn any(
        &self,
        head: &mut Parts,
        host: &Host,
        pool: &Job,
        told: &mut Told,
    ) -> Result<Target, Refusal> {
        told.enters("pause");
        self.pause(head, host, None, None, told);
        told.enters("route");
        told.fact("pool", pool.name.as_str());
        let target = pool.owners.route(EVERYTHING, self.pool).ok_or(Refusal::NoServer)?;
        told.says(format!(
            "any server of the pool {} that is there, such as the one below",
            pool.name
        ));
        Ok(target)
    }

    fn admit(&self, head: &Parts, host: &Host, told: &mut Told) -> Result<Rc<Route>, Refusal> {
        let (routes, table) = (&self.setup.config.routes, self.setup.config.table());
        let found = self.setup.route(head, host.as_str());
        if let Ok(route) = found {
            told.fact("route", &*route.name);
            told.says(format!("the route {:?} takes it", route.name));
        }
        let mut others = Vec::new();
        let all = table.misses(head, host.as_str()).unwrap_or_default();
        let mut is_taken = false;
        for (place, misses) in all {
            let name = &routes[place].name;
            let why = match &misses[..] {
                [] if !std::mem::replace(&mut is_taken, true) => continue,
                [] => "it would take it, but is less specific".to_owned(),
                // Routes that differ in more have nothing to do with it.
                [one] => one.to_string(),
                _ => continue,
            };
            if others.len() == OTHERS_MAX {
                break;
            }
            told.says(format!("not {name:?}: {why}"));
            others.push(json!({"route": &**name, "why": why}));
        }
        told.fact("others", others);
        found.map(Rc::clone).map_err(admit::refusal)
    }

    fn pause(
        &self,
        head: &mut Parts,
        host: &Host,
        job: Option<&Job>,
        key: Option<SliceKey>,
        told: &mut Told,
    ) {
        if pause::is_exempt(&self.setup.config.exempt, head) {
            told.fact("exempt", true);
            return told.says("no pause holds it: it is exempt");
        }
        let Some(gates) = self.gates else {
            return told.says("whether a pause holds it only a proxy that runs knows");
        };
        let facts = Facts::of(head, &host.0, job.map(|job| &job.name), key);
        let (mut pauses, mut waited_at) = (Vec::new(), Vec::new());
        while let Some(gate) = gates.holding(&facts, &waited_at) {
            let account = &gate.account;
            let (scope, left) = (account.order.scope.to_string(), account.left());
            let (id, waiting) = (account.id.to_string(), gate.queue.len());
            waited_at.push(account.id);
            told.says(format!(
                "the pause {id} ({scope}) holds it behind {waiting} others of this worker, for {} at most",
                seconds(left)
            ));
            pauses.push(json!({
                "pause": id, "scope": scope, "waiting": waiting, "lasts_yet": left.as_secs_f64(),
            }));
        }
        let is_behind = job.zip(key).is_some_and(|(job, key)| job.hold.last(key).is_some());
        if is_behind {
            told.says("it waits behind others with its key until the key's slice has settled");
        } else if waited_at.is_empty() {
            told.says("nothing holds it");
        }
        told.fact("pauses", pauses);
        told.fact("behind_others", is_behind);
    }

    /// What applies from where the request would be sent.
    fn forward(&self, route: &Route, target: &Target, told: &mut Told) -> Value {
        told.enters("forward");
        let to = match &target.to {
            target::To::Task(upstream) => upstream.endpoint.to_string(),
            target::To::Region(region) => format!("region {region}"),
        };
        let timeouts = &self.setup.config.timeouts;
        let own = &route.forwarding;
        let total = own.total.map(|total| ("total", total));
        let always = [
            ("connect", timeouts.connect),
            ("response", own.response.unwrap_or(timeouts.response)),
            ("stall", timeouts.stall),
            ("hold", timeouts.hold),
        ];
        let applying: Vec<(&str, Duration)> = always.into_iter().chain(total).collect();
        let all: Vec<String> =
            applying.iter().map(|(name, length)| format!("{name} {}", seconds(*length))).collect();
        told.says(format!("it is sent to {to}"));
        told.says(format!("time-outs: {}", all.join(", ")));
        let facts =
            applying.iter().map(|(name, length)| ((*name).to_owned(), json!(length.as_secs_f64())));
        told.fact("timeouts", Value::Object(facts.collect()));
        let (session, generation) = (target.session().to_string(), target.generation.to_string());
        json!({"sent_to": {"session": session, "address": to, "generation": generation}})
    }

    fn observe(&self, client: IpAddr, told: &mut Told) {
        told.enters("observe");
        match &self.setup.config.access_log {
            None => told.says("there is no access log"),
            Some(log) => {
                let slow = log.slow.map(|slow| format!(", or takes {}", seconds(slow)));
                let slow = slow.unwrap_or_default();
                told.says(format!(
                    "the access log tells of {} of such requests, and of any that fails{slow}",
                    log.share
                ));
            }
        }
        if let Some(debug) = &self.setup.config.debug {
            let header = &debug.header;
            told.says(match debug.trusts(client) {
                true => format!("from {client}, the header {header} asks what became of it"),
                false => format!("from {client}, the header {header} asks in vain"),
            });
        }
    }
}

/// Tells who serves the slice of a key, and says how many do.
fn owners(job: &Job, key: SliceKey, told: &mut Told) -> usize {
    let Some(assignment) = job.owners.assignment() else {
        told.says(format!("no assignment of the job {} has come in yet", job.name));
        return 0;
    };
    let (slice, assigned) = assignment.slices.get(key);
    let generation = assignment.generation.to_string();
    let tasks = assigned.replicas.as_slice().iter();
    let tasks: Vec<&Arc<Task>> =
        tasks.filter_map(|replica| assignment.tasks.get(&replica.session)).collect();
    let names: Vec<String> =
        tasks.iter().map(|task| format!("{} at {}", task.info.name, task.info.address)).collect();
    let names = if names.is_empty() { "nobody".to_owned() } else { names.join(", ") };
    told.says(format!("the slice {slice} is served by {names}, as of generation {generation}"));
    let owner = |task: &&Arc<Task>| {
        json!({
            "session": task.session.to_string(),
            "task": task.info.name.as_str(),
            "address": task.info.address.as_str(),
        })
    };
    told.fact("slice", slice.to_string());
    told.fact("generation", generation);
    told.fact("owners", tasks.iter().map(owner).collect::<Vec<_>>());
    if let Some(transit) = &assigned.transit {
        told.says(format!("it is on its way to session {}: {}", transit.to, transit.step));
    }
    tasks.len()
}

/// Tells which of them is chosen, and why.
fn chosen(job: &Job, target: &Target, owners: usize, told: &mut Told) {
    let session = target.session();
    told.fact("chosen", session.to_string());
    let why = match (target.is_releasing, target.is_spilled, owners) {
        (true, ..) => "it lets go of the slice, so the request is held until the next has it",
        (_, true, _) => "whoever serves the slice is loaded above the cap, so it spills",
        (_, _, 0 | 1) => "it is the only one that serves the slice",
        _ => {
            "of those that serve the slice it is near, not avoided, and the less loaded of two drawn"
        }
    };
    told.fact("why", why);
    told.says(format!("session {session} is chosen: {why}"));
    if let target::To::Region(region) = &target.to {
        let gateways = job.owners.gateways().map(|known| known.stats()).unwrap_or_default();
        let there = gateways.gateways.iter().filter(|(gateway, _)| gateway.region == *region);
        let there: Vec<String> = there.map(|(gateway, _)| gateway.address.to_string()).collect();
        told.says(format!("it is in region {region}: by a gateway there ({})", there.join(", ")));
        told.fact("region", region.to_string());
        told.fact("gateways", there);
    }
}

fn seconds(length: Duration) -> String {
    format!("{} s", length.as_millis() as f64 / 1e3)
}
