//! What becomes of a job by each verdict.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tower_sentinel::{
    Job, Verdict,
    outcome::OutcomeKind,
    settle::{Lease, Settle},
};

use super::{
    DeadLetter, TestBroker, assert_quiet, bodies, body, close, eventually, left, reason, sorted,
    take, take_n,
};

pub(crate) async fn an_ack_removes_the_job<B: TestBroker>(broker: &B) {
    broker.publish("one").await;
    let mut jobs = broker.subscribe(5).await.unwrap();
    let job = take::<B>(&mut jobs).await;
    assert_eq!(body(&job), "one");
    job.tag().settle(Verdict::Ack, reason()).await.unwrap();
    left(broker, 0).await;

    close::<B>(&mut jobs).await;
    let mut jobs = broker.subscribe(5).await.unwrap();
    assert_quiet::<B>(&mut jobs).await;
}

pub(crate) async fn a_retry_redelivers_with_the_count_raised<B: TestBroker>(broker: &B) {
    broker.publish("one").await;
    let mut jobs = broker.subscribe(1).await.unwrap();
    for delivery in 1..=3 {
        let job = take::<B>(&mut jobs).await;
        assert_eq!(body(&job), "one");
        assert_deliveries::<B>(&job.tag(), delivery);
        if let Some(redelivered) = job.tag().redelivered() {
            assert_eq!(redelivered, delivery > 1);
        }
        job.tag().settle(Verdict::retry(), reason()).await.unwrap();
    }
    take::<B>(&mut jobs).await;
}

/// Asserts the count, or that there is none where the broker keeps none.
#[track_caller]
pub(crate) fn assert_deliveries<B: TestBroker>(tag: &B::Tag, deliveries: u32) {
    let deliveries = B::COUNTS_DELIVERIES.then_some(deliveries);
    assert_eq!(tag.deliveries(), deliveries);
}

pub(crate) async fn a_delayed_retry_is_not_seen_before_its_time<B: TestBroker>(broker: &B) {
    let delay = Duration::from_secs(1);
    let verdict = Verdict::retry_after(delay);
    broker.publish("one").await;
    let mut jobs = broker.subscribe(1).await.unwrap();
    let job = take::<B>(&mut jobs).await;
    let asked = Instant::now();
    let settled = job.tag().settle(verdict, reason()).await;
    if !B::capabilities().has_delay() {
        // Refused, and not made into a retry at once.
        assert!(settled.is_err());
        assert_quiet::<B>(&mut jobs).await;
        return;
    }
    settled.unwrap();
    let job = take::<B>(&mut jobs).await;
    let waited = asked.elapsed();
    assert!(waited >= delay, "{waited:?}");
    assert!(waited < 5 * delay, "{waited:?}");
    assert_deliveries::<B>(&job.tag(), 2);
    job.tag().settle(Verdict::Ack, reason()).await.unwrap();
    left(broker, 0).await;
}

pub(crate) async fn a_reject_is_kept_with_its_reason<B: TestBroker>(broker: &B) {
    broker.publish("poison").await;
    let mut jobs = broker.subscribe(1).await.unwrap();
    let job = take::<B>(&mut jobs).await;
    let mut why = reason();
    why.kind = OutcomeKind::Panicked;
    why.message = Some("index 7".into());
    job.tag().settle(Verdict::Reject, why).await.unwrap();
    left(broker, 0).await;
    let kept = DeadLetter {
        body: "poison".into(),
        kind: OutcomeKind::Panicked,
        message: Some("index 7".into()),
    };
    let kept = match B::capabilities().has_dead_letter() {
        true => vec![kept],
        false => Vec::new(),
    };
    eventually(kept, async || broker.dead_letters().await).await;
    assert_quiet::<B>(&mut jobs).await;
}

pub(crate) async fn a_release_is_free_where_the_broker_can_tell<B: TestBroker>(broker: &B) {
    broker.publish("one").await;
    let mut jobs = broker.subscribe(1).await.unwrap();
    for _ in 0..2 {
        let job = take::<B>(&mut jobs).await;
        job.tag()
            .settle(Verdict::release(), reason())
            .await
            .unwrap();
    }
    let job = take::<B>(&mut jobs).await;
    let is_free = B::capabilities().release_is_free();
    assert_deliveries::<B>(&job.tag(), if is_free { 1 } else { 3 });
}

pub(crate) async fn prefetch_holds<B: TestBroker>(broker: &B) {
    for n in 0..20 {
        broker.publish(&n.to_string()).await;
    }
    let mut jobs = broker.subscribe(5).await.unwrap();
    let mut held = take_n::<B>(&mut jobs, 5).await;
    assert_quiet::<B>(&mut jobs).await;
    let backlog = broker.backlog().await;
    assert!(backlog.unacked <= 5, "{backlog:?}");
    assert_eq!(backlog.total, 20);

    for done in 1..=15 {
        let tag = held.remove(0).tag();
        tag.settle(Verdict::Ack, reason()).await.unwrap();
        held.push(take::<B>(&mut jobs).await);
        assert_eq!(held.len(), 5);
        let backlog = broker.backlog().await;
        assert!(backlog.unacked <= 5, "{backlog:?} after {done}");
    }
    for job in held {
        job.tag().settle(Verdict::Ack, reason()).await.unwrap();
    }
    left(broker, 0).await;
}

pub(crate) async fn a_second_settlement_is_refused<B: TestBroker>(broker: &B) {
    for n in 0..3 {
        broker.publish(&n.to_string()).await;
    }
    let mut jobs = broker.subscribe(3).await.unwrap();
    let held = take_n::<B>(&mut jobs, 3).await;
    for (job, first) in held.iter().zip([Verdict::Ack, Verdict::Reject]) {
        job.tag().settle(first, reason()).await.unwrap();
        for second in [
            Verdict::Ack,
            Verdict::retry(),
            Verdict::release(),
            Verdict::Reject,
        ] {
            let refused = job.tag().settle(second, reason()).await.unwrap_err();
            assert!(refused.tag.is_none(), "{first}, {second}: {refused}");
        }
    }
    // Nothing was sent, so the channel lives.
    held[2].tag().settle(Verdict::Ack, reason()).await.unwrap();
    left(broker, 0).await;
}

pub(crate) async fn the_order_of_settling_is_free<B: TestBroker>(broker: &B) {
    for n in 0..6 {
        broker.publish(&n.to_string()).await;
    }
    let mut jobs = broker.subscribe(6).await.unwrap();
    let held = take_n::<B>(&mut jobs, 6).await;
    let back = [1, 4];
    for index in [5, 1, 0, 4, 3, 2] {
        let verdict = match back.contains(&index) {
            true => Verdict::retry(),
            false => Verdict::Ack,
        };
        held[index].tag().settle(verdict, reason()).await.unwrap();
    }
    let again = take_n::<B>(&mut jobs, 2).await;
    let wanted = back.map(|index| body(&held[index])).to_vec();
    assert_eq!(sorted(bodies(&again)), sorted(wanted));
    for job in again {
        job.tag().settle(Verdict::Ack, reason()).await.unwrap();
    }
    left(broker, 0).await;
}

pub(crate) async fn keep_alive_holds_a_job_past_the_redelivery_time<B: TestBroker>(broker: &B) {
    broker.publish("one").await;
    let mut jobs = broker.subscribe(4).await.unwrap();
    let mut other = broker.subscribe(4).await.unwrap();
    let (tag, is_mine) = tokio::select! {
        job = take::<B>(&mut jobs) => (job.tag(), true),
        job = take::<B>(&mut other) => (job.tag(), false),
    };
    let other = if is_mine { &mut other } else { &mut jobs };
    let Some(redelivery) = B::REDELIVERY else {
        assert!(!B::capabilities().has_keep_alive());
        tag.keep_alive().await.unwrap_err();
        assert_quiet::<B>(other).await;
        return;
    };
    assert!(B::capabilities().has_keep_alive());
    for _ in 0..8 {
        sleep(redelivery / 3).await;
        assert_eq!(tag.keep_alive().await.unwrap(), Lease::Held);
    }
    assert_eq!(broker.backlog().await.unacked, 1);

    // Without it, another consumer has the job, and what the first one says is void.
    let twin = take::<B>(other).await.tag();
    assert_eq!(tag.keep_alive().await.unwrap(), Lease::Lost);
    tag.settle(Verdict::Abandon, reason()).await.unwrap();
    twin.settle(Verdict::Ack, reason()).await.unwrap();
    left(broker, 0).await;
}

pub(crate) async fn a_tag_tells_what_its_broker_can_do<B: TestBroker>(broker: &B) {
    broker.publish("one").await;
    let mut jobs = broker.subscribe(1).await.unwrap();
    let tag = take::<B>(&mut jobs).await.tag();
    assert_eq!(tag.capabilities(), B::capabilities());
    assert_eq!(tag.deliveries().is_some(), B::COUNTS_DELIVERIES);
}
