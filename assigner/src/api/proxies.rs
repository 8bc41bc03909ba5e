//! What proxies tell of the flags: `mandoline.v1.Proxies`, heard by the node that leads.
//!
//! One short call now and then, and no stream: a proxy that finds another leader begins anew by its next word, and one that
//! falls silent is forgotten after a while.

use mandoline_core::pauses::{STANDING_EVERY, StandingError};
use mandoline_proto::flags::{millis, standing};
use mandoline_proto::pb;
use mandoline_proto::pb::proxies_server::{Proxies, ProxiesServer};
use mandoline_proto::pb::standing_reply::Reply;
use tonic::{Request, Response, Status};

use crate::api::task::leader_of;
use crate::node::{Node, term_of};
use crate::raft::Consensus;

/// Hears proxies while this node leads, and says who leads while it does not.
pub struct ProxyService {
    consensus: Consensus,
    node: Node,
}

impl ProxyService {
    /// Gives what answers calls.
    pub fn new(consensus: Consensus, node: Node) -> ProxiesServer<Self> {
        ProxiesServer::new(Self { consensus, node })
    }

    fn elsewhere(&self) -> Reply {
        Reply::Redirect(leader_of(&self.consensus.role().borrow()))
    }
}

#[tonic::async_trait]
impl Proxies for ProxyService {
    async fn stand(
        &self,
        request: Request<pb::Standing>,
    ) -> Result<Response<pb::StandingReply>, Status> {
        let (proxy, standing) = standing(request.into_inner())
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let leads = term_of(&self.consensus.role().borrow()).is_some();
        let reply = match leads {
            false => self.elsewhere(),
            true => match self.node.stand(proxy, standing).await {
                Some(Ok(())) => Reply::Heard(pb::Heard {
                    version: Some(self.consensus.state().flags.version.into()),
                    every_ms: millis(STANDING_EVERY),
                }),
                Some(Err(error @ StandingError::Proxies)) => {
                    return Err(Status::resource_exhausted(error.to_string()));
                }
                Some(Err(error)) => return Err(Status::invalid_argument(error.to_string())),
                // It leads no more, or not yet.
                None => self.elsewhere(),
            },
        };
        Ok(Response::new(pb::StandingReply { reply: Some(reply) }))
    }
}
