//! One connection of a session to the desk: the messages of the wire, without the wire.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use mandoline_core::command::{Command, EndReason};
use mandoline_core::generation::Generation;
use mandoline_core::leader::Event;
use mandoline_core::state::{Outcome, Refused};
use mandoline_core::task::{Phase, SessionId, TaskInfo};
use mandoline_core::transit::HandOffId;
use mandoline_distributor::hub::Subscription;
use mandoline_proto::pb;
use mandoline_proto::pb::session_reply::Reply;
use mandoline_proto::pb::session_request::Request;
use mandoline_proto::task::report;
use tokio::sync::mpsc;

use crate::link::Caller;
use crate::testing::desk::{Desk, Notice};

/// Serves one connection to its end.
pub(super) async fn serve(desk: Arc<Desk>, mut caller: Caller) {
    let Some(first) = caller.requests.recv().await.and_then(|first| first.request) else { return };
    match Line::open(&desk, first) {
        Ok(line) => line.run(caller).await,
        Err(refused) => drop(caller.replies.send(refused).await),
    }
}

struct Line {
    desk: Arc<Desk>,
    session: SessionId,
    seat: u64,
    notices: mpsc::UnboundedReceiver<Notice>,
    subscription: Subscription,
}

impl Line {
    fn open(desk: &Arc<Desk>, first: Request) -> Result<Self, Reply> {
        let (session, known) = match first {
            Request::Register(register) => (enrol(desk, &register)?, register.known),
            Request::Attach(attach) => (SessionId(attach.session), attach.known),
            _ => return Err(invalid("a session begins with register or attach".to_owned())),
        };
        if !is_there(desk, session) {
            return Err(ended(desk, session));
        }
        let known = known.map(Generation::from);
        let subscription = desk.hub.subscribe(&desk.job, known);
        let subscription = subscription.map_err(|error| invalid(error.to_string()))?;
        let (seat, notices) = desk.take_seat(session);
        Ok(Self { desk: Arc::clone(desk), session, seat, notices, subscription })
    }

    async fn run(mut self, mut caller: Caller) {
        let mut replies = vec![self.attached(), self.drained()];
        loop {
            for reply in replies.drain(..).flatten() {
                if caller.replies.send(reply).await.is_err() {
                    return self.desk.leave_seat(self.session, self.seat);
                }
            }
            tokio::select! {
                biased;
                request = caller.requests.recv() => match request.and_then(|said| said.request) {
                    Some(Request::Leave(_)) => {
                        self.end();
                        break;
                    }
                    Some(request) => replies.push(self.hear(request)),
                    None => break,
                },
                notice = self.notices.recv() => match notice {
                    Some(Notice::Grant { request, generation }) => {
                        let generation = Some(generation.into());
                        replies.push(Some(Reply::Grant(pb::Grant { request, generation })));
                    }
                    Some(Notice::LookAgain) => replies.push(self.drained()),
                    // Another connection has taken the session.
                    None => return,
                },
                frame = self.subscription.next() => {
                    replies.push(Some(Reply::Update(frame.message())));
                    if is_there(&self.desk, self.session) {
                        replies.push(self.drained());
                    } else {
                        replies.push(Some(ended(&self.desk, self.session)));
                    }
                }
            }
        }
        self.desk.leave_seat(self.session, self.seat);
    }

    fn hear(&mut self, request: Request) -> Option<Reply> {
        let (job, session) = (self.desk.job.clone(), self.session);
        match request {
            Request::Heartbeat(pb::Heartbeat { request }) if self.is_owner() => {
                self.desk.tell(Event::Renewed { job, session, request });
            }
            Request::Heartbeat(pb::Heartbeat { request }) => {
                self.desk.tell(Event::Heard { job, session });
                let generation = Some(self.desk.assignment().generation.into());
                return Some(Reply::Grant(pb::Grant { request, generation }));
            }
            Request::Report(measured) => match report(session, measured) {
                Ok(mut report) => {
                    report.clamp();
                    self.desk.tell(Event::Reported { job, report });
                }
                Err(error) => return Some(Reply::Warning(error.to_string())),
            },
            Request::Drain(_) => {
                if let Err(why) = self.desk.propose([Command::Drain { job, session }]) {
                    return Some(Reply::Warning(why.to_string()));
                }
                return self.drained();
            }
            Request::Ready(id) => match HandOffId::try_from(id) {
                Ok(id) => self.desk.tell(Event::Ready { job, session, id }),
                Err(error) => return Some(Reply::Warning(error.to_string())),
            },
            Request::Acknowledge(id) => match HandOffId::try_from(id) {
                Ok(id) => self.desk.tell(Event::Acknowledged { job, session, id }),
                Err(error) => return Some(Reply::Warning(error.to_string())),
            },
            Request::Resync(_) => match self.desk.hub.subscribe(&job, None) {
                Ok(fresh) => self.subscription = fresh,
                Err(error) => return Some(Reply::Warning(error.to_string())),
            },
            Request::Leave(_) | Request::Register(_) | Request::Attach(_) => {
                return Some(Reply::Warning("this stream has a session already".to_owned()));
            }
        }
        None
    }

    fn end(&self) {
        let (job, session, reason) = (self.desk.job.clone(), self.session, EndReason::Left);
        // One that has ended already is as good.
        drop(self.desk.propose([Command::End { job, session, reason }]));
    }

    fn is_owner(&self) -> bool {
        let assignment = self.desk.assignment();
        assignment.tasks.get(&self.session).is_some_and(|task| task.lease.is_some())
    }

    fn attached(&self) -> Option<Reply> {
        let (spec, assignment) = (self.desk.spec(), self.desk.assignment());
        let lease = assignment.tasks.get(&self.session)?.lease;
        Some(Reply::Attached(pb::Attached {
            session: self.session.0,
            heartbeat_ms: millis(spec.heartbeat),
            report_every_ms: millis(spec.report_every),
            lease_ms: lease.map_or(0, millis),
        }))
    }

    /// What a leaving task waits for: that it has nothing left, or that nobody is there to take what it has.
    fn drained(&self) -> Option<Reply> {
        let assignment = self.desk.assignment();
        let leaves = assignment.tasks.get(&self.session)?.phase == Phase::Draining;
        let alone = assignment.tasks.values().all(|task| task.phase == Phase::Draining);
        let has_none = assignment.has_nothing_for(self.session);
        (leaves && (has_none || alone)).then_some(Reply::Drained(pb::Drained { alone: !has_none }))
    }
}

/// Takes callers in, each on a line of its own, until nobody is left who could call.
pub(super) async fn listen(desk: Arc<Desk>, mut callers: mpsc::Receiver<Caller>) {
    let mut lines = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            caller = callers.recv() => match caller {
                Some(caller) => drop(lines.spawn(serve(Arc::clone(&desk), caller))),
                None => return,
            },
            // A line that panicked has said so.
            Some(_) = lines.join_next() => {}
            else => pending().await,
        }
    }
}

fn enrol(desk: &Desk, register: &pb::Register) -> Result<SessionId, Reply> {
    let info = register.info.clone().ok_or_else(|| invalid("info is missing".to_owned()))?;
    let info = TaskInfo::try_from(info).map_err(|error| invalid(error.to_string()))?;
    let stopped = (register.stopped != 0).then_some(SessionId(register.stopped));
    let job = desk.job.clone();
    match desk.propose([Command::Register { job, info, stopped }]) {
        Ok(Outcome::Session(session)) => Ok(session),
        Ok(outcome) => Err(invalid(format!("registration led to {outcome:?}"))),
        Err(why) => {
            if let Refused::NameTaken { session, .. } | Refused::AddressTaken { session, .. } = why
            {
                desk.tell(Event::Succeeded { job: desk.job.clone(), session });
            }
            let code = match why {
                Refused::NameTaken { .. } => pb::RefusedCode::NameTaken,
                Refused::AddressTaken { .. } => pb::RefusedCode::AddressTaken,
                _ => pb::RefusedCode::Invalid,
            };
            Err(refused(code, why.to_string()))
        }
    }
}

fn is_there(desk: &Desk, session: SessionId) -> bool {
    desk.assignment().tasks.contains_key(&session)
}

fn ended(desk: &Desk, session: SessionId) -> Reply {
    let why = Refused::NoSuchSession { job: desk.job.clone(), session };
    refused(pb::RefusedCode::NoSuchSession, why.to_string())
}

fn invalid(message: String) -> Reply {
    refused(pb::RefusedCode::Invalid, message)
}

fn refused(code: pb::RefusedCode, message: String) -> Reply {
    Reply::Refused(pb::Refused { code: code.into(), message })
}

fn millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}
