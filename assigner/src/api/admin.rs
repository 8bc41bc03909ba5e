//! The operators' end of the world: `mandoline.v1.Admin`, answered by any node.
//!
//! What needs the leader is passed on to it, one hop: a call that was passed on says so, and is never passed on again, so
//! two nodes that each take the other for the leader cannot play ball with it. A node that knows no leader waits for one,
//! for an election is short. Only a call that was surely not carried out is tried again.
//!
//! Reads are answered from what this node has applied; only the leader knows loads newer than the stored ones and who is
//! connected, so `Status` asks it for those, and does without where it cannot be reached.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::{Stream, stream};
use mandoline_core::brake::Word;
use mandoline_core::command::{Command, NodeId};
use mandoline_core::flags::{Pause, PauseId, PauseOrder, check_release};
use mandoline_core::generation::Generation;
use mandoline_core::load::Load;
use mandoline_core::name::{JobName, TaskName};
use mandoline_core::offers::Totals;
use mandoline_core::pauses::Progress;
use mandoline_core::plan::Move;
use mandoline_core::slice::Slice;
use mandoline_core::spec::JobSpec;
use mandoline_core::state::{Job, Outcome, Refused};
use mandoline_core::task::{Address, SessionId};
use mandoline_core::time::Time;
use mandoline_distributor::connect::{Authorize, Connector};
use mandoline_proto::assignment::{job_name, task_name};
use mandoline_proto::brake::millis;
use mandoline_proto::error::{WireError, need};
use mandoline_proto::flags::pause_id;
use mandoline_proto::pb;
use mandoline_proto::pb::admin_client::AdminClient;
use mandoline_proto::pb::admin_server::{Admin, AdminServer};
use mandoline_proto::update;
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};
use tonic::metadata::MetadataValue;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};
use tracing::info;

use crate::access::MESSAGE_MAX_BYTES;
use crate::metrics::{CallLabels, Code as CodeLabel, Metrics};
use crate::node::{Held, Measure, Node};
use crate::raft::types::Member;
use crate::raft::{ADD_WITHIN, Consensus, Leader, MemberError, ProposeError, Role};

/// How long a call waits for someone to lead: an election takes half a second to a second, and may have to be repeated.
const LEADER_WITHIN: Duration = Duration::from_secs(5);
/// How long `Status` waits for what the leader alone knows.
const LEADER_KNOWS_WITHIN: Duration = Duration::from_secs(1);
/// How long a node that passed a change on waits to have it itself, so that who asks it next sees the change.
const CATCH_UP_WITHIN: Duration = Duration::from_secs(1);
/// The node that passed a call on.
const FORWARDED: &str = "mandoline-forwarded-by";
/// In a refusal: nothing was done, for this node does not lead.
pub const NOT_LEADER: &str = "mandoline-not-leader";

type Client = AdminClient<InterceptedService<Channel, Authorize>>;

/// Answers operators.
#[derive(Clone)]
pub struct AdminService {
    inner: Arc<Inner>,
}

struct Inner {
    consensus: Consensus,
    node: Node,
    connector: Connector,
    metrics: Metrics,
    // One connection a node; a handful, since a cluster has few.
    leaders: Mutex<BTreeMap<String, Client>>,
}

impl AdminService {
    /// Answers for this node, and reaches the leader by `connector` where another leads.
    pub fn new(consensus: Consensus, node: Node, connector: Connector, metrics: Metrics) -> Self {
        let inner = Inner { consensus, node, connector, metrics, leaders: Mutex::default() };
        Self { inner: Arc::new(inner) }
    }

    /// Gives what answers calls.
    pub fn server(self) -> AdminServer<Self> {
        AdminServer::new(self)
            .max_decoding_message_size(MESSAGE_MAX_BYTES)
            .max_encoding_message_size(MESSAGE_MAX_BYTES)
    }

    /// Counts an answer on its way out.
    fn counted<T>(
        &self,
        call: &'static str,
        answer: Result<T, Status>,
    ) -> Result<Response<T>, Status> {
        let code = answer.as_ref().map_or_else(Status::code, |_| Code::Ok);
        let labels = CallLabels { call, code: CodeLabel(code) };
        self.inner.metrics.admin_calls.get_or_create(&labels).inc();
        answer.map(Response::new)
    }
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn apply_job(
        &self,
        request: Request<pb::ApplyJobRequest>,
    ) -> Result<Response<pb::ApplyJobReply>, Status> {
        let answer = self.inner.apply_job(request).await;
        self.counted("ApplyJob", answer)
    }

    async fn get_job(
        &self,
        request: Request<pb::GetJobRequest>,
    ) -> Result<Response<pb::JobStatus>, Status> {
        let answer = self.inner.get_job(&request.into_inner()).await;
        self.counted("GetJob", answer)
    }

    async fn list_jobs(
        &self,
        _: Request<pb::ListJobsRequest>,
    ) -> Result<Response<pb::ListJobsReply>, Status> {
        let jobs = self.inner.jobs().await;
        self.counted("ListJobs", Ok(pb::ListJobsReply { jobs }))
    }

    async fn drain_task(
        &self,
        request: Request<pb::DrainTaskRequest>,
    ) -> Result<Response<pb::DrainTaskReply>, Status> {
        let answer = self.inner.drain_task(request).await;
        self.counted("DrainTask", answer)
    }

    async fn may_restart(
        &self,
        request: Request<pb::MayRestartRequest>,
    ) -> Result<Response<pb::MayRestartReply>, Status> {
        let answer = self.inner.may_restart(request).await;
        self.counted("MayRestart", answer)
    }

    async fn freeze_job(
        &self,
        request: Request<pb::FreezeJobRequest>,
    ) -> Result<Response<pb::FreezeJobReply>, Status> {
        let answer = self.inner.freeze_job(request).await;
        self.counted("FreezeJob", answer)
    }

    async fn pin_slice(
        &self,
        request: Request<pb::PinSliceRequest>,
    ) -> Result<Response<pb::PinSliceReply>, Status> {
        let answer = self.inner.pin_slice(request).await;
        self.counted("PinSlice", answer)
    }

    async fn unpin_slice(
        &self,
        request: Request<pb::UnpinSliceRequest>,
    ) -> Result<Response<pb::UnpinSliceReply>, Status> {
        let answer = self.inner.unpin_slice(request).await;
        self.counted("UnpinSlice", answer)
    }

    async fn believe_lost(
        &self,
        request: Request<pb::BelieveLostRequest>,
    ) -> Result<Response<pb::BelieveLostReply>, Status> {
        let answer = self.inner.believe_lost(request).await;
        self.counted("BelieveLost", answer)
    }

    async fn release_slice(
        &self,
        request: Request<pb::ReleaseSliceRequest>,
    ) -> Result<Response<pb::ReleaseSliceReply>, Status> {
        let answer = self.inner.release_slice(request).await;
        self.counted("ReleaseSlice", answer)
    }

    type GetAssignmentStream = Pin<Box<dyn Stream<Item = Result<pb::Part, Status>> + Send>>;

    async fn get_assignment(
        &self,
        request: Request<pb::GetAssignmentRequest>,
    ) -> Result<Response<Self::GetAssignmentStream>, Status> {
        let answer = self.inner.assignment(&request.into_inner()).map(|parts| {
            let parts: Self::GetAssignmentStream =
                Box::pin(stream::iter(parts.into_iter().map(Ok)));
            parts
        });
        self.counted("GetAssignment", answer)
    }

    async fn list_moves(
        &self,
        request: Request<pb::ListMovesRequest>,
    ) -> Result<Response<pb::ListMovesReply>, Status> {
        let answer = self.inner.moves(&request.into_inner());
        self.counted("ListMoves", answer)
    }

    async fn status(
        &self,
        request: Request<pb::StatusRequest>,
    ) -> Result<Response<pb::StatusReply>, Status> {
        let answer = self.inner.status(&request).await;
        self.counted("Status", Ok(answer))
    }

    async fn add_member(
        &self,
        request: Request<pb::AddMemberRequest>,
    ) -> Result<Response<pb::AddMemberReply>, Status> {
        let answer = self.inner.add_member(request).await;
        self.counted("AddMember", answer)
    }

    async fn remove_member(
        &self,
        request: Request<pb::RemoveMemberRequest>,
    ) -> Result<Response<pb::RemoveMemberReply>, Status> {
        let answer = self.inner.remove_member(request).await;
        self.counted("RemoveMember", answer)
    }

    async fn transfer(
        &self,
        request: Request<pb::TransferRequest>,
    ) -> Result<Response<pb::TransferReply>, Status> {
        let answer = self.inner.transfer(request).await;
        self.counted("Transfer", answer)
    }

    async fn add_pause(
        &self,
        request: Request<pb::AddPauseRequest>,
    ) -> Result<Response<pb::AddPauseReply>, Status> {
        let answer = self.inner.add_pause(request).await;
        self.counted("AddPause", answer)
    }

    async fn end_pause(
        &self,
        request: Request<pb::EndPauseRequest>,
    ) -> Result<Response<pb::EndPauseReply>, Status> {
        let answer = self.inner.end_pause(request).await;
        self.counted("EndPause", answer)
    }

    async fn list_pauses(
        &self,
        request: Request<pb::ListPausesRequest>,
    ) -> Result<Response<pb::ListPausesReply>, Status> {
        let answer = self.inner.list_pauses(request).await;
        self.counted("ListPauses", answer)
    }
}

/// Has a call carried out by the leader: by `$here` if this node leads, else by the same call there.
macro_rules! at_leader {
    ($inner:expr, $request:expr, $call:ident, $here:expr) => {{
        let mut search = Search::new($inner, &$request);
        let message = $request.into_inner();
        loop {
            let answer = match search.next().await? {
                Turn::Here => $here.await,
                Turn::There(mut leader) => {
                    let answer = leader.$call($inner.forwarded(message.clone())).await;
                    answer.map(Response::into_inner).map_err(Problem::from)
                }
            };
            match answer {
                Ok(answer) => break Ok(answer),
                Err(Problem::NotLeader(why)) => search.missed(why),
                Err(Problem::Final(status)) => break Err(status),
            }
        }
    }};
}

impl Inner {
    async fn apply_job(
        &self,
        request: Request<pb::ApplyJobRequest>,
    ) -> Result<pb::ApplyJobReply, Status> {
        let spec = need(request.get_ref().spec.clone(), "spec").map_err(invalid)?;
        let spec = JobSpec::try_from(spec).map_err(invalid)?;
        let (name, if_version) = (spec.name.clone(), request.get_ref().if_version);
        let reply: pb::ApplyJobReply = at_leader!(self, request, apply_job, async {
            let command = Command::ApplyJob { spec: spec.clone(), if_version };
            match self.consensus.propose(command).await?.outcome {
                Outcome::Version(version) => Ok(pb::ApplyJobReply { version }),
                other => unreachable!("a spec is answered by its version, not {other:?}"),
            }
        })?;
        info!(job = %name, version = reply.version, "Job applied");
        self.catch_up(&name, reply.version).await;
        Ok(reply)
    }

    async fn get_job(&self, request: &pb::GetJobRequest) -> Result<pb::JobStatus, Status> {
        let name = job_name(&request.name).map_err(invalid)?;
        let state = self.consensus.state();
        let job = state.job(&name).map_err(|error| refused(&error))?;
        let offered = self.node.offered().remove(&name).unwrap_or_default();
        let brake = self.node.brakes().remove(&name);
        Ok(job_status(job, &self.node.measure(name).await, &offered, brake.as_ref()))
    }

    async fn jobs(&self) -> Vec<pb::JobStatus> {
        let state = self.consensus.state();
        let mut jobs = Vec::with_capacity(state.jobs.len());
        let (mut offered, brakes) = (self.node.offered(), self.node.brakes());
        for (name, job) in &state.jobs {
            let offered = offered.remove(name).unwrap_or_default();
            let measured = self.node.measure(name.clone()).await;
            jobs.push(job_status(job, &measured, &offered, brakes.get(name)));
        }
        jobs
    }

    async fn drain_task(
        &self,
        request: Request<pb::DrainTaskRequest>,
    ) -> Result<pb::DrainTaskReply, Status> {
        let job = job_name(&request.get_ref().job).map_err(invalid)?;
        let task = task_name(&request.get_ref().task).map_err(invalid)?;
        let undrain = request.get_ref().undrain;
        at_leader!(self, request, drain_task, async {
            let session = self.session_of(&job, &task)?;
            let job = job.clone();
            let command = match undrain {
                true => Command::Undrain { job, session },
                false => Command::Drain { job, session },
            };
            self.consensus.propose(command).await?;
            match undrain {
                true => info!(%task, "Task may have slices again"),
                false => info!(%task, "Task drains"),
            }
            Ok(pb::DrainTaskReply {})
        })
    }

    async fn may_restart(
        &self,
        request: Request<pb::MayRestartRequest>,
    ) -> Result<pb::MayRestartReply, Status> {
        let job = job_name(&request.get_ref().job).map_err(invalid)?;
        let task = task_name(&request.get_ref().task).map_err(invalid)?;
        at_leader!(self, request, may_restart, async {
            let gate = self.node.may_restart(job.clone(), task.clone()).await;
            // Who led when it said so must have led: else two leaders say yes to two tasks.
            self.consensus.confirm_leadership().await?;
            let gate = gate.ok_or_else(|| Problem::NotLeader("this node leads no more".into()))?;
            match gate.map_err(|refusal| Problem::Final(refused(&refusal)))? {
                Ok(()) => {
                    info!(%job, %task, "Task may restart");
                    Ok(pb::MayRestartReply { yes: true, reason: String::new() })
                }
                Err(why) => {
                    info!(%job, %task, %why, "Task may not restart now");
                    Ok(pb::MayRestartReply { yes: false, reason: why.to_string() })
                }
            }
        })
    }

    fn session_of(&self, job: &JobName, task: &TaskName) -> Result<SessionId, Problem> {
        let state = self.consensus.state();
        let job = state.job(job).map_err(ProposeError::from)?;
        let found = job.assignment.tasks.values().find(|known| known.info.name == *task);
        found.map(|known| known.session).ok_or_else(|| {
            let text = format!("job {} has no task {task}: `mandoline task list`", job.spec.name);
            Problem::Final(Status::not_found(text))
        })
    }

    async fn freeze_job(
        &self,
        request: Request<pb::FreezeJobRequest>,
    ) -> Result<pb::FreezeJobReply, Status> {
        let job = job_name(&request.get_ref().job).map_err(invalid)?;
        let unfreeze = request.get_ref().unfreeze;
        at_leader!(self, request, freeze_job, async {
            let command = match unfreeze {
                true => Command::Unfreeze { job: job.clone() },
                false => Command::Freeze { job: job.clone() },
            };
            self.consensus.propose(command).await?;
            match unfreeze {
                true => info!(%job, "Job is balanced again"),
                false => info!(%job, "Job frozen"),
            }
            Ok(pb::FreezeJobReply {})
        })
    }

    async fn pin_slice(
        &self,
        request: Request<pb::PinSliceRequest>,
    ) -> Result<pb::PinSliceReply, Status> {
        let job = job_name(&request.get_ref().job).map_err(invalid)?;
        let slice = some_slice(request.get_ref().slice)?;
        let task = task_name(&request.get_ref().task).map_err(invalid)?;
        at_leader!(self, request, pin_slice, async {
            let command = Command::Pin { job: job.clone(), slice, task: task.clone() };
            self.consensus.propose(command).await?;
            info!(%job, %slice, %task, "Slice pinned");
            Ok(pb::PinSliceReply {})
        })
    }

    async fn unpin_slice(
        &self,
        request: Request<pb::UnpinSliceRequest>,
    ) -> Result<pb::UnpinSliceReply, Status> {
        let job = job_name(&request.get_ref().job).map_err(invalid)?;
        let slice = some_slice(request.get_ref().slice)?;
        at_leader!(self, request, unpin_slice, async {
            self.consensus.propose(Command::Unpin { job: job.clone(), slice }).await?;
            info!(%job, %slice, "Slice no longer pinned");
            Ok(pb::UnpinSliceReply {})
        })
    }

    async fn believe_lost(
        &self,
        request: Request<pb::BelieveLostRequest>,
    ) -> Result<pb::BelieveLostReply, Status> {
        let job = job_name(&request.get_ref().job).map_err(invalid)?;
        at_leader!(self, request, believe_lost, async {
            let state = self.consensus.state();
            let known = state.job(&job).map_err(ProposeError::from)?;
            let Some(held) = self.node.brakes().remove(&job) else {
                let text = format!("job {job} waits for no tasks: its brake does not hold");
                return Err(Problem::Final(Status::failed_precondition(text)));
            };
            let sessions: Vec<SessionId> = held.hold.missing.keys().copied().collect();
            let name = |session| {
                known.assignment.tasks.get(session).map(|task| task.info.name.to_string())
            };
            let mut tasks: Vec<String> = sessions.iter().filter_map(name).collect();
            tasks.sort_unstable();
            let command = Command::BelieveLost { job: job.clone(), sessions };
            self.consensus.propose(command).await?;
            info!(%job, tasks = tasks.len(), "Tasks are taken for lost by an operator's word");
            Ok(pb::BelieveLostReply { tasks })
        })
    }

    async fn release_slice(
        &self,
        request: Request<pb::ReleaseSliceRequest>,
    ) -> Result<pb::ReleaseSliceReply, Status> {
        let job = job_name(&request.get_ref().job).map_err(invalid)?;
        let slice = some_slice(request.get_ref().slice)?;
        at_leader!(self, request, release_slice, async {
            self.consensus.propose(Command::Unconfine { job: job.clone(), slice }).await?;
            info!(%job, %slice, "Slice no longer confined");
            Ok(pb::ReleaseSliceReply {})
        })
    }

    fn assignment(&self, request: &pb::GetAssignmentRequest) -> Result<Vec<pb::Part>, Status> {
        let name = job_name(&request.job).map_err(invalid)?;
        let state = self.consensus.state();
        let job = state.job(&name).map_err(|error| refused(&error))?;
        Ok(update::parts(&job.assignment))
    }

    fn moves(&self, request: &pb::ListMovesRequest) -> Result<pb::ListMovesReply, Status> {
        let name = job_name(&request.job).map_err(invalid)?;
        let state = self.consensus.state();
        let job = state.job(&name).map_err(|error| refused(&error))?;
        let known = job.history.len();
        let newest = match request.newest as usize {
            0 => known,
            newest => newest.min(known),
        };
        let moves = job.history.iter().skip(known - newest).map(|past| move_record(job, past));
        Ok(pb::ListMovesReply { moves: moves.collect() })
    }

    async fn status(&self, request: &Request<pb::StatusRequest>) -> pb::StatusReply {
        let mut reply = self.own_status().await;
        let Role::Follower { leader: Some(leader) } = self.consensus.role().borrow().clone() else {
            return reply;
        };
        if request.metadata().contains_key(FORWARDED) {
            return reply;
        }
        let asked = async {
            let mut client = self.client(&leader)?;
            client.status(self.forwarded(pb::StatusRequest {})).await
        };
        if let Ok(Ok(known)) = timeout(LEADER_KNOWS_WITHIN, asked).await {
            let known = known.into_inner();
            (reply.nodes, reply.jobs) = (known.nodes, known.jobs);
        }
        reply
    }

    async fn own_status(&self) -> pb::StatusReply {
        let status = self.consensus.status();
        let me = status.node.map_or(0, |node| node.0);
        let leader = match &status.role {
            Role::Leader { .. } => me,
            Role::Follower { leader } => leader.as_ref().map_or(0, |leader| leader.node.0),
        };
        let leads = leader == me && me != 0;
        let node = |member: &crate::raft::MemberStatus| pb::NodeStatus {
            node: member.node.0,
            client_address: member.member.client.clone(),
            peer_address: member.member.peer.clone(),
            voter: member.voter,
            leader: member.node.0 == leader,
            reachable: member.node.0 == me || (leads && member.reachable),
            matched: if member.node.0 == me { status.last_log } else { member.matched }
                .unwrap_or_default(),
        };
        pb::StatusReply {
            cluster: status.cluster.map_or_else(String::new, |cluster| cluster.to_string()),
            node: me,
            leader,
            term: status.term,
            last_log: status.last_log.unwrap_or_default(),
            applied: status.applied.unwrap_or_default(),
            nodes: status.members.iter().map(node).collect(),
            jobs: self.jobs().await,
            pauses: self.consensus.state().flags.pauses.keys().map(|id| id.0).collect(),
        }
    }

    async fn add_member(
        &self,
        request: Request<pb::AddMemberRequest>,
    ) -> Result<pb::AddMemberReply, Status> {
        let pb::AddMemberRequest { node, client_address, peer_address } = request.get_ref();
        let node = some_node(*node)?;
        for (field, address) in [("client_address", client_address), ("peer_address", peer_address)]
        {
            let parsed: Result<Address, _> = address.parse();
            parsed.map_err(|error| invalid(WireError::new(field, error)))?;
        }
        let member = Member { client: client_address.clone(), peer: peer_address.clone() };
        at_leader!(self, request, add_member, async {
            self.consensus.add(node, member.clone(), ADD_WITHIN).await?;
            info!(%node, "Node added");
            Ok(pb::AddMemberReply { node: node.0 })
        })
    }

    async fn remove_member(
        &self,
        request: Request<pb::RemoveMemberRequest>,
    ) -> Result<pb::RemoveMemberReply, Status> {
        let node = some_node(request.get_ref().node)?;
        at_leader!(self, request, remove_member, async {
            self.consensus.remove(node).await?;
            info!(%node, "Node removed");
            Ok(pb::RemoveMemberReply {})
        })
    }

    async fn transfer(
        &self,
        request: Request<pb::TransferRequest>,
    ) -> Result<pb::TransferReply, Status> {
        let wanted = request.get_ref().node;
        at_leader!(self, request, transfer, async {
            let heir = match wanted {
                0 => self.heir()?,
                node => NodeId(node),
            };
            self.consensus.transfer_leader(heir).await?;
            info!(node = %heir, "Leadership handed over");
            Ok(pb::TransferReply { leader: heir.0 })
        })
    }

    async fn add_pause(
        &self,
        request: Request<pb::AddPauseRequest>,
    ) -> Result<pb::AddPauseReply, Status> {
        let order = need(request.get_ref().order.clone(), "order").map_err(invalid)?;
        let order = PauseOrder::try_from(order).map_err(invalid)?;
        at_leader!(self, request, add_pause, async {
            let command = Command::AddPause { order: order.clone() };
            match self.consensus.propose(command).await?.outcome {
                Outcome::Pause(pause) => {
                    let PauseOrder { scope, lasts, .. } = &order;
                    info!(%pause, %scope, ?lasts, "Pause begins");
                    Ok(pb::AddPauseReply { id: pause.0 })
                }
                other => unreachable!("a pause is answered by its id, not {other:?}"),
            }
        })
    }

    async fn end_pause(
        &self,
        request: Request<pb::EndPauseRequest>,
    ) -> Result<pb::EndPauseReply, Status> {
        let pb::EndPauseRequest { id, over_ms } = *request.get_ref();
        let id = pause_id(id, "id").map_err(invalid)?;
        let over = over_ms.map(Duration::from_millis);
        let checked = over.map_or(Ok(()), check_release);
        checked.map_err(|error| invalid(WireError::new("over_ms", error)))?;
        at_leader!(self, request, end_pause, async {
            let state = self.consensus.state();
            let known = state.flags.pauses.get(&id).map(|pause| pause.order.release_over);
            // Whoever leads without having applied all knows no time yet; the proposal says what is.
            let over = over.or(known).unwrap_or_default();
            drop(state);
            self.consensus.propose(Command::EndPause { id, over }).await?;
            info!(pause = %id, ?over, "Pause ends");
            Ok(pb::EndPauseReply {})
        })
    }

    async fn list_pauses(
        &self,
        request: Request<pb::ListPausesRequest>,
    ) -> Result<pb::ListPausesReply, Status> {
        let wanted = request.get_ref().id;
        let was_forwarded = request.metadata().contains_key(FORWARDED);
        let role = self.consensus.role().borrow().clone();
        let mut progress = BTreeMap::new();
        match role {
            Role::Follower { leader: Some(leader) } if !was_forwarded => {
                let asked = async {
                    let mut client = self.client(&leader)?;
                    client.list_pauses(self.forwarded(request.into_inner())).await
                };
                match timeout(LEADER_KNOWS_WITHIN, asked).await {
                    Ok(Ok(known)) => return Ok(known.into_inner()),
                    Ok(Err(status)) if status.code() == Code::NotFound => return Err(status),
                    Ok(Err(_)) | Err(_) => {}
                }
            }
            Role::Follower { .. } => {}
            Role::Leader { .. } => {
                let pauses = self.consensus.state().flags.pauses.keys().copied().collect();
                let known = self.node.progress(pauses).await;
                // Proxies speak with whoever leads: one who did has not heard of any for a while, and would find all quiet.
                if self.consensus.confirm_leadership().await.is_ok() {
                    progress = known;
                }
            }
        }
        let flags = Arc::clone(&self.consensus.state().flags);
        if wanted != 0 && !flags.pauses.contains_key(&PauseId(wanted)) {
            return Err(refused(&Refused::NoSuchPause(PauseId(wanted))));
        }
        let is_wanted = |pause: &&Pause| wanted == 0 || pause.id.0 == wanted;
        let status = |pause: &Pause| pb::PauseStatus {
            pause: Some(pause.into()),
            progress: progress.get(&pause.id).map(pause_progress),
        };
        Ok(pb::ListPausesReply {
            version: Some(flags.version.into()),
            pauses: flags.pauses.values().filter(is_wanted).map(status).collect(),
        })
    }

    /// The voter that has most of the log, this node apart.
    fn heir(&self) -> Result<NodeId, Problem> {
        let status = self.consensus.status();
        let others = status.members.iter().filter(|m| m.voter && Some(m.node) != status.node);
        others.max_by_key(|member| member.matched).map(|member| member.node).ok_or_else(|| {
            Problem::Final(Status::failed_precondition("there is no other voter to lead"))
        })
    }

    fn forwarded<R>(&self, message: R) -> Request<R> {
        let mut request = Request::new(message);
        let me = self.consensus.status().node.map_or(0, |node| node.0);
        request.metadata_mut().insert(FORWARDED, MetadataValue::from(me));
        request
    }

    fn client(&self, leader: &Leader) -> Result<Client, Status> {
        let mut leaders = self.leaders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = leaders.get(&leader.client) {
            return Ok(client.clone());
        }
        let cannot = |error: &dyn std::error::Error| {
            Status::internal(format!("cannot call the leader {leader}: {error}"))
        };
        let address: Address = leader.client.parse().map_err(|error| cannot(&error))?;
        let endpoint = self.connector.endpoint(&address).map_err(|error| cannot(&error))?;
        let client =
            AdminClient::with_interceptor(endpoint.connect_lazy(), self.connector.authorize())
                .max_decoding_message_size(MESSAGE_MAX_BYTES);
        leaders.insert(leader.client.clone(), client.clone());
        Ok(client)
    }

    /// Waits a moment for a change that another node has carried out.
    async fn catch_up(&self, job: &JobName, version: u64) {
        let there =
            || self.consensus.state().jobs.get(job).is_some_and(|job| job.version >= version);
        let caught_up = async {
            while !there() {
                let applied = self.consensus.status().applied.unwrap_or_default();
                if !self.consensus.wait_applied(applied + 1).await {
                    return;
                }
            }
        };
        // If not, the change holds all the same.
        drop(timeout(CATCH_UP_WITHIN, caught_up).await);
    }
}

/// Whose turn it is to carry a call out.
enum Turn {
    /// This node leads.
    Here,
    /// That one does.
    There(Box<Client>),
}

/// Looks for the leader on behalf of one call.
struct Search<'a> {
    inner: &'a Inner,
    role: watch::Receiver<Role>,
    was_forwarded: bool,
    deadline: Instant,
    // Why the last one asked was the wrong one.
    missed: Option<String>,
    // How long to wait after the next that was.
    pause: Duration,
}

impl<'a> Search<'a> {
    fn new<R>(inner: &'a Inner, request: &Request<R>) -> Self {
        let role = inner.consensus.role();
        let was_forwarded = request.metadata().contains_key(FORWARDED);
        let deadline = Instant::now() + LEADER_WITHIN;
        Self { inner, role, was_forwarded, deadline, missed: None, pause: RETRY_FIRST }
    }

    /// Finds whose turn it is; waits for a leader while there is none, and after one that was not.
    async fn next(&mut self) -> Result<Turn, Status> {
        loop {
            if let Some(why) = self.missed.take() {
                // News of who leads, or a moment: a leader that was just asked may have to learn it first.
                let until = self.deadline.min(Instant::now() + self.pause);
                self.pause = (2 * self.pause).min(RETRY_MOST);
                let gone = matches!(timeout_at(until, self.role.changed()).await, Ok(Err(_)));
                if gone || Instant::now() >= self.deadline {
                    return Err(nothing_done(format!(
                        "no leader within {} s: {why}; check that more than half of the nodes run",
                        LEADER_WITHIN.as_secs(),
                    )));
                }
            }
            let role = self.role.borrow_and_update().clone();
            match role {
                Role::Leader { .. } => return Ok(Turn::Here),
                // Whoever passed it on looks anew for who leads.
                Role::Follower { .. } if self.was_forwarded => return Err(not_leader()),
                Role::Follower { leader: Some(leader) } => {
                    self.inner.metrics.admin_forwarded.inc();
                    return Ok(Turn::There(Box::new(self.inner.client(&leader)?)));
                }
                Role::Follower { leader: None } => self.missed("nobody leads".to_owned()),
            }
        }
    }

    fn missed(&mut self, why: String) {
        self.missed = Some(why);
    }
}

/// Between two tries to find who leads: the first is short, since whoever was just elected leads once it has committed an
/// entry of its own, milliseconds later; the others are longer each time, up to a tenth of an election.
const RETRY_FIRST: Duration = Duration::from_millis(3);
const RETRY_MOST: Duration = Duration::from_millis(50);

/// Why the leader did not carry something out.
enum Problem {
    /// Nothing was done: another node leads.
    NotLeader(String),
    /// The caller is told.
    Final(Status),
}

impl From<Status> for Problem {
    /// Takes what another node said. Only what was surely not carried out is tried again.
    fn from(status: Status) -> Self {
        if status.metadata().contains_key(NOT_LEADER) || never_arrived(&status) {
            Self::NotLeader(status.message().to_owned())
        } else {
            Self::Final(status)
        }
    }
}

impl From<ProposeError> for Problem {
    fn from(error: ProposeError) -> Self {
        let text = error.to_string();
        Self::Final(match error {
            ProposeError::NotLeader { .. } => return Self::NotLeader(text),
            ProposeError::Refused(refusal) => refused(&refusal),
            ProposeError::Unknown => Status::deadline_exceeded(text),
            ProposeError::TooLarge { .. } => Status::resource_exhausted(text),
            ProposeError::Stopped => Status::unavailable(text),
        })
    }
}

impl From<MemberError> for Problem {
    fn from(error: MemberError) -> Self {
        let text = error.to_string();
        Self::Final(match error {
            MemberError::NotLeader { .. } => return Self::NotLeader(text),
            MemberError::NoSuchMember(_) => Status::not_found(text),
            MemberError::NotMinted(_)
            | MemberError::LastVoter(_)
            | MemberError::NotCaughtUp { .. } => Status::failed_precondition(text),
            MemberError::InProgress => Status::aborted(text),
            MemberError::Unknown => Status::deadline_exceeded(text),
            MemberError::Stopped => Status::unavailable(text),
        })
    }
}

/// What a refusal is to a caller.
fn refused(refusal: &Refused) -> Status {
    let code = match refusal {
        Refused::NoSuchJob(_)
        | Refused::NoSuchSession { .. }
        | Refused::NoSuchTask { .. }
        | Refused::NoSuchPin { .. }
        | Refused::NoSuchConfined { .. }
        | Refused::NoSuchPause(_) => Code::NotFound,
        Refused::Version { .. }
        | Refused::Consistency { .. }
        | Refused::Founded(_)
        | Refused::Pinned { .. }
        | Refused::Confined(_) => Code::FailedPrecondition,
        Refused::Spec(_) | Refused::Task(_) | Refused::Pause(_) => Code::InvalidArgument,
        Refused::NameTaken { .. } | Refused::AddressTaken { .. } => Code::AlreadyExists,
        Refused::Stale { .. } | Refused::StaleHandOff { .. } | Refused::NoHoldOff(_) => {
            Code::Aborted
        }
        Refused::HoldOff(_) => Code::Unavailable,
        Refused::Limit { .. } => Code::ResourceExhausted,
        Refused::Edit(_) | Refused::Taker { .. } | Refused::Loads { .. } => Code::Internal,
    };
    Status::new(code, refusal.to_string())
}

#[allow(clippy::needless_pass_by_value)] // goes into `map_err`
fn invalid(error: WireError) -> Status {
    Status::invalid_argument(error.to_string())
}

fn some_node(node: u64) -> Result<NodeId, Status> {
    match node {
        0 => Err(invalid(WireError::new("node", "is zero: a new node adds itself, by --join"))),
        node => Ok(NodeId(node)),
    }
}

fn some_slice(slice: Option<pb::Slice>) -> Result<Slice, Status> {
    need(slice, "slice").and_then(Slice::try_from).map_err(invalid)
}

fn not_leader() -> Status {
    nothing_done("this node does not lead, though another took it for the leader")
}

/// A refusal after which the same call may be made elsewhere.
fn nothing_done(why: impl Into<String>) -> Status {
    let mut status = Status::unavailable(why);
    status.metadata_mut().insert(NOT_LEADER, MetadataValue::from_static("1"));
    status
}

/// Whether a call surely did not reach the other side: nobody listens there.
fn never_arrived(status: &Status) -> bool {
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<std::io::Error>() {
            return error.kind() == std::io::ErrorKind::ConnectionRefused;
        }
        source = error.source();
    }
    false
}

/// Says how a job is: by what the leader measured, where that is known, else by the stored loads.
fn job_status(
    job: &Job,
    measured: &BTreeMap<SessionId, Measure>,
    offered: &Totals,
    brake: Option<&Held>,
) -> pb::JobStatus {
    let mut carried: BTreeMap<SessionId, (u64, Load)> = BTreeMap::new();
    let mut unserved = 0;
    for (_, assigned) in job.assignment.slices.iter() {
        let replicas = assigned.replicas.as_slice();
        unserved += u64::from(replicas.is_empty());
        for replica in replicas {
            let (slices, load) = carried.entry(replica.session).or_default();
            *slices += 1;
            *load += assigned.load.share(1, replicas.len() as u128);
        }
    }
    let task = |(session, task): (&SessionId, &Arc<mandoline_core::task::Task>)| {
        let (slices, stored) = carried.get(session).copied().unwrap_or_default();
        let measure = measured.get(session);
        pb::TaskStatus {
            task: Some(task.as_ref().into()),
            slices,
            load: measure.map_or(stored, |measure| measure.load).milli(),
            connected: measure.is_some_and(|measure| measure.connected),
            suspect: measure.is_some_and(|measure| measure.suspect),
            avoided_by: measure.map_or(0, |measure| measure.avoided_by as u64),
        }
    };
    pb::JobStatus {
        spec: Some((&job.spec).into()),
        version: job.version,
        generation: Some(job.assignment.generation.into()),
        slices: job.assignment.slices.count() as u64,
        churn: Some(job.churn.into()),
        tasks: job.assignment.tasks.iter().map(task).collect(),
        unserved,
        frozen: job.frozen,
        pins: job.pins.iter().map(pb::Pin::from).collect(),
        callers: offered.callers as u64,
        offered: offered.load.milli(),
        offered_failed: offered.failed.milli(),
        brake: brake.map(|held| brake_status(job, held)),
        confined: job.confined.iter().map(pb::Confined::from).collect(),
    }
}

/// Says how a pause is carried out.
fn pause_progress(progress: &Progress) -> pb::PauseProgress {
    pb::PauseProgress {
        left_ms: millis(progress.left),
        proxies: progress.proxies as u64,
        heard: progress.heard as u64,
        in_flight: progress.count.in_flight,
        held: progress.count.held,
        quiet: progress.is_quiet(),
    }
}

/// Says for whom a job waits, and what is known of them.
fn brake_status(job: &Job, held: &Held) -> pb::Brake {
    let missing = |(session, heard): (&SessionId, &Option<(Word, Time)>)| {
        let word = match heard {
            None => pb::Word::Unspecified,
            Some((Word::Served, _)) => pb::Word::Served,
            Some((Word::Failing, _)) => pb::Word::Failing,
        };
        let task = job.assignment.tasks.get(session);
        pb::Missing {
            task: task.map_or_else(String::new, |task| task.info.name.to_string()),
            session: session.0,
            word: word.into(),
            word_ms: heard.map_or(0, |(_, since)| millis(held.since(since))),
        }
    };
    pb::Brake {
        held_ms: millis(held.held()),
        tasks: held.hold.tasks as u64,
        missing: held.hold.missing.iter().map(missing).collect(),
    }
}

/// Says what moved, with the names of those tasks that still live.
fn move_record(job: &Job, (generation, step): &(Generation, Move)) -> pb::MoveRecord {
    let name = |session: Option<SessionId>| {
        let task = session.and_then(|session| job.assignment.tasks.get(&session));
        task.map_or_else(String::new, |task| task.info.name.to_string())
    };
    pb::MoveRecord {
        generation: Some((*generation).into()),
        slice: Some(step.slice.into()),
        from: step.from.map_or(0, |session| session.0),
        to: step.to.map_or(0, |session| session.0),
        from_task: name(step.from),
        to_task: name(step.to),
        reason: step.reason.to_string(),
        load: step.load.milli(),
        before: step.before.milli(),
        after: step.after.milli(),
    }
}
