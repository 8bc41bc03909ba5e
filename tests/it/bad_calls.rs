//! Calls that no careful operator makes: each gets a typed refusal that says what and why, and changes nothing.

use std::time::Duration;

use mandoline_core::spec::JobSpec;
use mandoline_proto::pb;
use mandoline_proto::pb::admin_client::AdminClient;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use crate::kit::{Process, ask, free_ports, local, until};

async fn client(port: u16) -> AdminClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{}", local(port))).unwrap();
    AdminClient::new(endpoint.timeout(Duration::from_secs(20)).connect().await.unwrap())
}

fn spec(name: &str) -> pb::JobSpec {
    let spec = pb::JobSpec::from(&JobSpec::new("kv".parse().unwrap()));
    pb::JobSpec { name: name.to_owned(), ..spec }
}

#[tokio::test]
async fn a_bad_call_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let ports = free_ports(2);
    let (listen, peer) = (local(ports[0]).to_string(), local(ports[1]).to_string());
    let data = dir.path().to_str().unwrap();
    let args =
        ["assigner", "--init", "--data-dir", data, "--listen", &listen, "--peer-listen", &peer];
    let _node = Process::start(&args);
    until("the node to be ready", || {
        ask(local(ports[0]), "GET", "/readyz", "").filter(|answer| answer.status == 200)
    });
    let mut admin = client(ports[0]).await;
    let mut apply = async |spec: Option<pb::JobSpec>, if_version| {
        let request = pb::ApplyJobRequest { spec, if_version };
        match admin.apply_job(request).await {
            Ok(reply) => Ok(reply.into_inner().version),
            Err(status) => Err((status.code(), status.message().to_owned())),
        }
    };
    let check = |refusal: Result<u64, (Code, String)>, code, says: &str| {
        let (found, message) = refusal.expect_err(says);
        assert_eq!(found, code, "{message}");
        assert!(message.contains(says), "{message}");
    };
    check(apply(None, None).await, Code::InvalidArgument, "spec: is missing");
    let long = "x".repeat(64);
    check(apply(Some(spec(&long)), None).await, Code::InvalidArgument, "64 bytes long");
    let band = pb::JobSpec { band: 0, ..spec("kv") };
    check(apply(Some(band), None).await, Code::InvalidArgument, "band is 0%");
    let huge = spec(&"x".repeat(5 << 20));
    check(apply(Some(huge), None).await, Code::OutOfRange, "the limit is: 4194304 bytes");
    check(apply(Some(spec("kv")), Some(3)).await, Code::FailedPrecondition, "at version 0, not 3");
    assert_eq!(apply(Some(spec("kv")), Some(0)).await, Ok(1));

    let unknown = admin.get_job(pb::GetJobRequest { name: "nope".to_owned() }).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
    let drain = |job: &str, task: &str| pb::DrainTaskRequest {
        job: job.to_owned(),
        task: task.to_owned(),
        undrain: false,
    };
    for (request, code) in [
        (drain("nope", "a"), Code::NotFound),
        (drain("kv", "a"), Code::NotFound),
        (drain("kv", ""), Code::InvalidArgument),
        (drain("", "a"), Code::InvalidArgument),
    ] {
        let refusal = admin.drain_task(request).await.unwrap_err();
        assert_eq!(refusal.code(), code, "{refusal}");
    }
    let odd = |first, last| pb::PinSliceRequest {
        job: "kv".to_owned(),
        slice: Some(pb::Slice { first, last }),
        task: "a".to_owned(),
    };
    for (request, code, says) in [
        (odd(9, 5), Code::InvalidArgument, "slice: 0000000000000009 lies behind"),
        (
            pb::PinSliceRequest { slice: None, ..odd(0, 1) },
            Code::InvalidArgument,
            "slice: is missing",
        ),
        (
            pb::PinSliceRequest { task: String::new(), ..odd(0, 1) },
            Code::InvalidArgument,
            "task: the name is empty",
        ),
        (
            pb::PinSliceRequest { job: "nope".to_owned(), ..odd(0, 1) },
            Code::NotFound,
            "no job nope",
        ),
        (odd(0, 1), Code::NotFound, "job kv has no task a"),
    ] {
        let refusal = admin.pin_slice(request).await.unwrap_err();
        assert_eq!(refusal.code(), code, "{refusal}");
        assert!(refusal.message().contains(says), "{refusal}");
    }
    let unknown = || "nope".to_owned();
    let freeze = pb::FreezeJobRequest { job: unknown(), unfreeze: false };
    let moves = pb::ListMovesRequest { job: unknown(), newest: 0 };
    let assignment = pb::GetAssignmentRequest { job: unknown() };
    for refusal in [
        admin.freeze_job(freeze).await.unwrap_err(),
        admin.list_moves(moves).await.unwrap_err(),
        admin.get_assignment(assignment).await.unwrap_err(),
    ] {
        assert_eq!(refusal.code(), Code::NotFound, "{refusal}");
    }
    let add = |node, client: &str| pb::AddMemberRequest {
        node,
        client_address: client.to_owned(),
        peer_address: "a:1".to_owned(),
    };
    for (request, code, says) in [
        (add(0, "a:1"), Code::InvalidArgument, "node: is zero"),
        (add(7, "a"), Code::InvalidArgument, "client_address: "),
        (add(7, "a:1"), Code::FailedPrecondition, "n7 was never minted"),
    ] {
        let refusal = admin.add_member(request).await.unwrap_err();
        assert_eq!(refusal.code(), code, "{refusal}");
        assert!(refusal.message().contains(says), "{refusal}");
    }
    let last = admin.remove_member(pb::RemoveMemberRequest { node: 1 }).await.unwrap_err();
    assert_eq!(last.code(), Code::FailedPrecondition, "{last}");
    let alone = admin.transfer(pb::TransferRequest { node: 0 }).await.unwrap_err();
    assert_eq!(alone.code(), Code::FailedPrecondition, "{alone}");

    let status = admin.status(pb::StatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.jobs.len(), 1, "only the good call changed anything");
    assert_eq!(status.jobs[0].version, 1);
}
