//! The broker with the rest of the crate.

use std::panic::catch_unwind;

use futures_util::{FutureExt, StreamExt};
use tower::ServiceBuilder;
use tower_sentinel::{
    DecisionExt, Job, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::memory::{Broker, Delivery},
    outcome::OutcomeKind,
    settle::Settle,
};

use super::{SECOND, assert_idle, counts, reason, settle, take};
use crate::support::call;

#[tokio::test(start_paused = true)]
async fn a_worker_settles_as_it_decides() {
    let broker = Broker::new();
    let queue = broker.queue("jobs").dead_letter("dead").declare();
    let mut jobs = queue.subscribe(2).unwrap();
    let policy = SettlePolicy::new(ack_on_success().delivery_limit(3).poison_on_panic());
    let mut worker = ServiceBuilder::new()
        .layer(jobs.gate())
        .layer(SentinelLayer::new(policy).timeout(SECOND))
        .service_fn(|job: Delivery<u32>| async move {
            match job.payload() {
                1 => panic!("poison"),
                2 => Err("the dependency is down"),
                3 => std::future::pending().await,
                _ => Ok(()),
            }
        });
    (0..4).for_each(|job| queue.publish(job));
    for _ in 0..8 {
        let job = jobs.next().await.unwrap().unwrap();
        call(&mut worker, job).await.unwrap();
    }
    assert_idle(&mut jobs);
    queue.emptied().now_or_never().unwrap();
    assert_eq!(counts(&queue), (0, 0, 0, 1, 3, 0));
    let letters = queue.dead_letters();
    let told = letters
        .iter()
        .map(|it| (it.payload, it.death.reason.kind, it.death.deliveries));
    let told: Vec<_> = told.collect();
    let expected = [
        (1, OutcomeKind::Panicked, 1),
        (2, OutcomeKind::Failed, 3),
        (3, OutcomeKind::TimedOut, 3),
    ];
    assert_eq!(told, expected);
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_an_empty_queue_is_told() {
    let broker = Broker::new();
    let queue = broker.queue("jobs").dead_letter("dead").declare();
    for verdict in [Verdict::Ack, Verdict::Reject] {
        queue.publish(1);
        let mut jobs = queue.subscribe(1).unwrap();
        let waiting = tokio::spawn({
            let queue = queue.clone();
            async move { queue.emptied().await }
        });
        settle(&take(&mut jobs), Verdict::retry_after(SECOND)).unwrap();
        let job = jobs.next().await.unwrap().unwrap();
        assert!(!waiting.is_finished());
        settle(&job, verdict).unwrap();
        waiting.await.unwrap();
    }
}

#[test]
fn a_payload_that_panics_when_it_is_cloned_stays_in_the_queue() {
    #[derive(Debug)]
    struct Sometimes(std::sync::Arc<std::sync::atomic::AtomicBool>);

    impl Clone for Sometimes {
        fn clone(&self) -> Self {
            let panics = self.0.swap(false, std::sync::atomic::Ordering::Relaxed);
            assert!(!panics, "no clone");
            Self(self.0.clone())
        }
    }

    let queue = Broker::new().queue("jobs").declare();
    queue.publish(Sometimes(std::sync::Arc::new(true.into())));
    let mut jobs = queue.subscribe(1).unwrap();
    let cloned = catch_unwind(std::panic::AssertUnwindSafe(|| {
        jobs.next().now_or_never().is_some()
    }));
    assert!(cloned.is_err());
    assert_eq!(queue.counts().ready, 1);
    let job = jobs.next().now_or_never().unwrap().unwrap().unwrap();
    job.tag()
        .settle(Verdict::Ack, reason())
        .now_or_never()
        .unwrap()
        .unwrap();
    assert_eq!(queue.counts().acked, 1);
}

#[test]
fn a_delivery_is_bytes_if_its_payload_is() {
    fn length(bytes: impl AsRef<[u8]>) -> usize {
        bytes.as_ref().len()
    }

    let queue = Broker::new().queue("jobs").declare();
    queue.publish("seven");
    let mut jobs = queue.subscribe(1).unwrap();
    assert_eq!(
        length(jobs.next().now_or_never().unwrap().unwrap().unwrap()),
        5
    );
}
