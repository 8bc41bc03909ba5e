//! The restart gate by plain HTTP: a Kubernetes preStop hook has curl at best. Any node answers; the leader decides.

use axum::Router;
use axum::extract::{Path, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use mandoline_proto::pb;
use mandoline_proto::pb::admin_server::Admin;
use serde_json::json;
use tonic::{Code, Request, Status};

use crate::access::Guard;
use crate::api::admin::AdminService;

#[derive(Clone)]
struct Gate {
    admin: AdminService,
    guard: Guard,
}

/// Gives the gate's route. It asks for the cluster's token as every call does.
pub(crate) fn routes(admin: AdminService, guard: Guard) -> Router {
    Router::new()
        .route("/api/jobs/{job}/tasks/{task}/may-restart", get(may_restart))
        .with_state(Gate { admin, guard })
}

async fn may_restart(
    State(gate): State<Gate>,
    Path((job, task)): Path<(String, String)>,
    headers: HeaderMap,
) -> Response {
    let (status, yes, reason) = match gate.ask(&job, &task, &headers).await {
        Ok(pb::MayRestartReply { yes: true, .. }) => (StatusCode::OK, true, None),
        Ok(pb::MayRestartReply { reason, .. }) => (StatusCode::CONFLICT, false, Some(reason)),
        Err(status) => (code(status.code()), false, Some(status.message().to_owned())),
    };
    let page = json!({ "job": job, "task": task, "may_restart": yes, "reason": reason });
    (status, [(CONTENT_TYPE, "application/json")], format!("{page}\n")).into_response()
}

impl Gate {
    async fn ask(
        mut self,
        job: &str,
        task: &str,
        headers: &HeaderMap,
    ) -> Result<pb::MayRestartReply, Status> {
        self.guard.admit(headers)?;
        let request = pb::MayRestartRequest { job: job.to_owned(), task: task.to_owned() };
        Ok(self.admin.may_restart(Request::new(request)).await?.into_inner())
    }
}

/// What a refusal is by HTTP.
const fn code(code: Code) -> StatusCode {
    match code {
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::InvalidArgument => StatusCode::BAD_REQUEST,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}
