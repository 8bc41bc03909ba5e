//! The test kit, tested by what a user would do with it.

use std::time::Duration;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn halves() -> (Slice, Slice) {
    Slice::FULL.split_at(SliceKey(1 << 63)).unwrap()
}

#[tokio::test]
async fn a_minute_passes_without_sleeping_and_nobody_is_lost() {
    let service = TestService::builder("kv").tasks(3).start().await.unwrap();
    let began = tokio::time::Instant::now();
    service.advance(60 * SECOND).await;
    assert!(began.elapsed() < 30 * SECOND, "{:?}", began.elapsed());
    assert_eq!(service.assignment().tasks.len(), 3);
}

#[tokio::test]
async fn a_killed_tasks_keys_go_to_the_other() {
    let service = TestService::builder("kv").tasks(2).start().await.unwrap();
    let clerk = service.clerk().unwrap();
    let dead = service.slicelet("kv-0").unwrap();
    service.kill("kv-0").await.unwrap();
    assert_eq!(dead.owned(), 0);
    service.advance(5 * SECOND).await;
    for key in 0..100_u64 {
        assert_eq!(clerk.route(&key.to_le_bytes()).unwrap().name().as_str(), "kv-1");
    }
    assert!(matches!(service.slicelet("kv-0"), Err(Error::Dead(_))));
}

#[tokio::test]
async fn a_paused_owner_loses_its_lease_before_anyone_gets_its_keys() {
    let service = TestService::builder("kv").tasks(2).exclusive().start().await.unwrap();
    let (low, high) = halves();
    service.set_and_freeze([(low, "kv-0"), (high, "kv-1")]).await.unwrap();
    let (old, new) = (service.slicelet("kv-0").unwrap(), service.slicelet("kv-1").unwrap());
    let guard = old.acquire_at(SliceKey(7), 1.0).unwrap();
    service.pause("kv-0").unwrap();
    let mut moved = false;
    for _ in 0..400 {
        service.advance(Duration::from_millis(50)).await;
        assert!(!(guard.still_owned() && new.owns_at(SliceKey(7))), "two owners");
        moved |= new.owns_at(SliceKey(7));
    }
    assert!(moved && !guard.still_owned());
    service.resume("kv-0").await.unwrap();
    service.advance(10 * SECOND).await;
    assert!(matches!(old.state(), State::Attached { .. }), "{:?}", old.state());
}

#[tokio::test]
async fn what_is_frozen_stays_until_it_is_unfrozen() {
    let service = TestService::builder("kv").tasks(2).start().await.unwrap();
    let clerk = service.clerk().unwrap();
    let frozen = service.set_and_freeze([(Slice::FULL, "kv-1")]).await.unwrap();
    service.wait_for(frozen).await.unwrap();
    service.advance(60 * SECOND).await;
    assert_eq!(service.slicelet("kv-0").unwrap().owned(), 0);
    assert_eq!(clerk.route(b"a").unwrap().name().as_str(), "kv-1");
    service.unfreeze().await.unwrap();
    service.advance(60 * SECOND).await;
    assert!(service.slicelet("kv-0").unwrap().owned() > 0);
}

#[tokio::test]
async fn the_leader_is_told_of_the_load_of_a_range() {
    let service = TestService::builder("kv").tasks(2).start().await.unwrap();
    let (low, high) = halves();
    service.set_and_freeze([(low, "kv-0"), (high, "kv-1")]).await.unwrap();
    service.advance(6 * SECOND).await;
    let slicelet = service.slicelet("kv-0").unwrap();
    for _ in 0..50 {
        slicelet.count_at(SliceKey(7), 1.0).unwrap();
    }
    service.advance(5 * SECOND).await;
    assert!(service.attributed_load(low) > Load::ZERO);
    assert_eq!(service.attributed_load(high), Load::ZERO);
    service.rebalance().await.unwrap();
}

#[tokio::test]
async fn a_drained_task_leaves_its_keys_to_others_and_its_name_is_free() {
    for builder in [TestService::builder("kv"), TestService::builder("kv").exclusive()] {
        let service = builder.tasks(2).start().await.unwrap();
        service.drain("kv-0").await.unwrap();
        assert_eq!(service.slicelet("kv-1").unwrap().owned(), service.assignment().slices.count());
        service.add_task("kv-0").await.unwrap();
        assert_eq!(service.assignment().tasks.len(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn it_works_on_a_paused_runtime_of_the_tests_own() {
    let service = TestService::builder("kv").tasks(2).start().await.unwrap();
    service.kill("kv-1").await.unwrap();
    service.advance(5 * SECOND).await;
    assert_eq!(service.assignment().tasks.len(), 1);
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_by_name() {
    let service = TestService::builder("kv").tasks(2).start().await.unwrap();
    let (low, high) = halves();
    let before = service.generation();
    let refused = async |ranges: &[(Slice, &'static str)]| {
        service.set_and_freeze(ranges.iter().copied()).await.unwrap_err()
    };
    assert!(matches!(refused(&[(low, "kv-0")]).await, Error::Gap(gap) if gap == high));
    assert!(matches!(refused(&[(high, "kv-0")]).await, Error::Gap(gap) if gap == low));
    assert!(matches!(refused(&[]).await, Error::Gap(Slice::FULL)));
    let twice = [(Slice::FULL, "kv-0"), (high, "kv-1")];
    assert!(matches!(refused(&twice).await, Error::Overlap(_)));
    let unknown = refused(&[(low, "kv-0"), (high, "kv-9")]).await;
    assert_eq!(unknown.to_string(), "there is no task kv-9: there are kv-0, kv-1");
    assert_eq!(service.generation(), before);
    assert!(matches!(service.add_task("kv-0").await, Err(Error::Taken(_))));
    service.kill("kv-0").await.unwrap();
    assert!(matches!(refused(&[(Slice::FULL, "kv-0")]).await, Error::Dead(_)));
    assert!(matches!(service.pause("kv-0"), Err(Error::Dead(_))));
    assert!(matches!(service.drain("kv-9").await, Err(Error::UnknownTask { .. })));
    assert!(matches!(TestService::builder("no name").start().await, Err(Error::Job(..))));
}
