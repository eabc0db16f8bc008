//! Faults on demand.

use std::{
    sync::Arc,
    task::{Context, Wake, Waker},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt};
use tokio::time::{Instant, sleep, timeout};
use tower_sentinel::{
    Job, Verdict,
    broker::memory::{Broker, DeliveryError, DeliveryTag, SettleFault},
    settle::Settle,
};

use super::{SECOND, assert_idle, counts, queue, reason, settle, take, take_all};
use crate::support::paused_time;

#[test]
fn what_is_waited_for_comes_though_the_runtime_ends_in_which_the_wait_began() {
    let queue = queue();
    queue.publish(7);
    let mut jobs = queue.subscribe(1).unwrap();
    let job = take(&mut jobs);
    queue.delay_settlements(SECOND);
    // The clock of each runtime begins at the real time, so it must be far.
    let mut settlement = job
        .tag()
        .settle(Verdict::retry_after(600 * SECOND), reason());
    paused_time().block_on(async { assert!((&mut settlement).now_or_never().is_none()) });
    paused_time().block_on(settlement).unwrap();
    paused_time().block_on(async { assert_idle(&mut jobs) });
    let next = paused_time().block_on(jobs.next());
    assert_eq!(*next.unwrap().unwrap().payload(), 7);
}

#[test]
fn settlements_fail_on_demand() {
    let queue = queue();
    (0..2).for_each(|job| queue.publish(job));
    let mut jobs = queue.subscribe(2).unwrap();
    let held = take_all(&mut jobs);
    let settle = |tag: DeliveryTag<u32>| tag.settle(Verdict::Ack, reason()).now_or_never().unwrap();

    queue.fail_settlements(2, SettleFault::Again);
    queue.fail_settlements(1, SettleFault::Last);
    let again = settle(held[0].tag()).unwrap_err();
    assert_eq!(again.error, DeliveryError::Injected);
    let again = settle(again.tag.unwrap()).unwrap_err();
    let last = settle(again.tag.unwrap()).unwrap_err();
    assert_eq!(last.error, DeliveryError::Injected);
    assert!(last.tag.is_none());
    assert_eq!(counts(&queue), (0, 0, 2, 0, 0, 0));

    settle(held[1].tag()).unwrap();
    assert_eq!(counts(&queue), (0, 0, 1, 1, 0, 0));
    // Only the end of the channel frees the other.
    drop(jobs);
    assert_eq!(counts(&queue), (1, 0, 0, 1, 0, 0));
}

#[test]
fn an_injected_fault_is_kept_for_a_settlement_that_would_succeed() {
    let queue = queue();
    (0..2).for_each(|job| queue.publish(job));
    let mut jobs = queue.subscribe(2).unwrap();
    let held = take_all(&mut jobs);
    settle(&held[0], Verdict::Ack).unwrap();
    queue.fail_settlements(1, SettleFault::Last);
    assert_eq!(
        settle(&held[0], Verdict::Ack),
        Err(DeliveryError::AlreadySettled)
    );
    settle(&held[1], Verdict::Abandon).unwrap();
    queue.publish(3);
    drop(jobs);
    let mut jobs = queue.subscribe(2).unwrap();
    assert_eq!(
        settle(&take(&mut jobs), Verdict::Ack),
        Err(DeliveryError::Injected)
    );
}

#[tokio::test(start_paused = true)]
async fn settlements_are_delayed_on_demand() {
    let broker = Broker::new();
    let queue = broker.queue("jobs").declare();
    (0..3).for_each(|job| queue.publish(job));
    let mut jobs = queue.subscribe(3).unwrap();
    let held = take_all(&mut jobs);
    queue.delay_settlements(SECOND);

    let started = Instant::now();
    held[0].tag().settle(Verdict::Ack, reason()).await.unwrap();
    assert_eq!(started.elapsed(), SECOND);
    assert_eq!(counts(&queue), (0, 0, 2, 1, 0, 0));

    let dropped = held[1].tag().settle(Verdict::Ack, reason());
    timeout(SECOND / 2, dropped).await.unwrap_err();
    assert_eq!(counts(&queue), (0, 0, 2, 1, 0, 0));

    let late = tokio::spawn(held[2].tag().settle(Verdict::Ack, reason()));
    sleep(SECOND / 2).await;
    let lost = Instant::now();
    broker.drop_connections();
    assert_eq!(late.await.unwrap().unwrap_err().error, DeliveryError::Stale);
    assert_eq!(lost.elapsed(), Duration::ZERO);
    assert_eq!(counts(&queue), (2, 0, 0, 1, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_delayed_settlement_keeps_no_waker_once_it_is_made_or_dropped() {
    struct Idle;
    impl Wake for Idle {
        fn wake(self: Arc<Self>) {}
    }
    let queue = queue();
    (0..2).for_each(|job| queue.publish(job));
    let mut jobs = queue.subscribe(2).unwrap();
    let held = take_all(&mut jobs);
    queue.delay_settlements(SECOND);
    for is_dropped in [false, true] {
        let idle = Arc::new(Idle);
        let waker = Waker::from(Arc::clone(&idle));
        let mut cx = Context::from_waker(&waker);
        let tag = held[usize::from(is_dropped)].tag();
        let mut settlement = tag.settle(Verdict::Ack, reason());
        assert!(settlement.poll_unpin(&mut cx).is_pending());
        if !is_dropped {
            sleep(2 * SECOND).await;
            assert!(settlement.poll_unpin(&mut cx).is_ready());
        }
        drop((settlement, waker));
        assert_eq!(Arc::strong_count(&idle), 1, "dropped: {is_dropped}");
    }
}
