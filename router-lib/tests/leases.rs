//! Long leases and long graces to the end, which no test waited for before: a minute of the service's own time is a second here.

use std::time::Duration;

use mandoline::testing::TestService;
use mandoline::{JobName, SliceKey};
use mandoline_core::slice::Slice;
use mandoline_core::spec::{JobSpec, LEASE_MAX, Ratio};

const SECOND: Duration = Duration::from_secs(1);

fn spec() -> JobSpec {
    let name: JobName = "kv".parse().expect("it is a name");
    JobSpec { brake: Ratio::percent(100), ..JobSpec::new(name) }
}

#[tokio::test]
async fn keys_of_a_crashed_owner_are_nobodys_for_the_longest_lease_and_its_token_is_outdone() {
    let spec = JobSpec { lease: LEASE_MAX, ..spec() };
    let builder = TestService::builder("kv").exclusive().spec(spec).tasks(2);
    let service = builder.start().await.unwrap();
    service.set_and_freeze([(Slice::FULL, "kv-0")]).await.unwrap();
    let (old, new) = (service.slicelet("kv-0").unwrap(), service.slicelet("kv-1").unwrap());
    let token = old.acquire_at(SliceKey(7), 1.0).unwrap().fencing_token();
    service.kill("kv-0").await.unwrap();
    service.advance(LEASE_MAX - 5 * SECOND).await;
    assert!(!new.owns_at(SliceKey(7)), "the one before may still believe that it owns");
    service.advance(10 * SECOND).await;
    assert!(new.acquire_at(SliceKey(7), 1.0).unwrap().fencing_token() > token);
}

#[tokio::test]
async fn slices_wait_for_a_task_that_is_back_within_its_grace_and_for_no_other() {
    let spec = JobSpec { grace: 60 * SECOND, ..spec() };
    let service = TestService::builder("kv").spec(spec).tasks(2).start().await.unwrap();
    service.set_and_freeze([(Slice::FULL, "kv-0")]).await.unwrap();
    let other = service.slicelet("kv-1").unwrap();
    service.kill("kv-0").await.unwrap();
    service.advance(50 * SECOND).await;
    assert_eq!(other.owned(), 0);
    assert!(service.add_task("kv-0").await.unwrap().owned() > 0);
    service.kill("kv-0").await.unwrap();
    service.advance(70 * SECOND).await;
    assert!(other.owned() > 0);
}
