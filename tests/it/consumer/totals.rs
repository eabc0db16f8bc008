//! The counts and the states of a consumer that has several tasks, or no limit.

use std::{
    convert::Infallible,
    future::{Ready, pending, ready},
    task::{Context, Poll},
    time::Duration,
};

use tokio::{task::yield_now, time::sleep};
use tower::{Layer, Service, ServiceBuilder, service_fn};
use tower_sentinel::{
    Consumer, DecisionExt, Job, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::memory::{Broker, Delivery},
    consumer::{Pauser, State},
    settle::Settle,
};

use super::ends;
use crate::support::{Refused, call, tag::Tag};

const LEASE: Duration = Duration::from_secs(30);

#[tokio::test(start_paused = true)]
async fn a_settlement_that_is_moot_is_in_the_summary_of_all_tasks() {
    let queue = Broker::new().queue("jobs").lease(LEASE).declare();
    queue.publish(7);
    let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success())).no_timeout();
    let service =
        ServiceBuilder::new()
            .layer(layer)
            .service_fn(|delivery: Delivery<u32>| async move {
                // Until its lease is over and its twin has ended.
                if delivery.tag().deliveries() == Some(1) {
                    sleep(2 * LEASE).await;
                }
                Ok::<_, Refused>(())
            });
    let subscription = queue.subscribe(2).unwrap();
    let consumer =
        Consumer::parallel(subscription, vec![service; 2]).with_graceful_shutdown(sleep(4 * LEASE));
    let summary = ends(consumer).await.unwrap();
    assert_eq!((summary.called, summary.answered), (2, 1));
    assert_eq!((summary.failed, summary.moot), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn each_attempt_that_the_broker_counts_is_in_the_summary_of_all_tasks() {
    let queue = Broker::new().queue("jobs").declare();
    (0..6).for_each(|job| queue.publish(job));
    let decision = ack_on_success().on_error(|_: &Refused| Verdict::retry());
    let layer = SentinelLayer::new(SettlePolicy::new(decision));
    let service = service_fn(|job: Delivery<u32>| async move {
        sleep(Duration::from_secs(1)).await;
        match job.tag().deliveries() {
            Some(1 | 2) => Err(Refused),
            _ => Ok(()),
        }
    });
    let consumer = Consumer::parallel(queue.subscribe(3).unwrap(), vec![service; 3])
        .sentinel(layer)
        .with_graceful_shutdown(sleep(LEASE));
    let summary = ends(consumer).await.unwrap();
    assert_eq!((summary.called, summary.charged), (18, 12));
    assert_eq!(summary.verdicts(Verdict::retry()), 12);
}

#[tokio::test(start_paused = true)]
async fn a_thousand_tags_of_jobs_that_did_not_stop_are_kept() {
    let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
    let mut sentinel = layer.layer(service_fn(|_: Tag| ready(Ok::<_, Refused>(()))));
    let settled = call(&mut sentinel, Tag::new()).await.unwrap();
    for tasks in [1, 2] {
        let queue = Broker::new().queue("jobs").declare();
        (0..1_200).for_each(|job| queue.publish(job));
        let settled = settled.clone();
        let service = service_fn(move |job: Delivery<u32>| {
            let mut settled = settled.clone();
            settled.stopped = false;
            settled.tag = Some(job.payload().to_string().into());
            async move {
                // Each of the tasks takes some.
                yield_now().await;
                Ok::<_, Infallible>(settled)
            }
        });
        let consumer = Consumer::parallel(queue.subscribe(1_200).unwrap(), vec![service; tasks])
            .with_graceful_shutdown(sleep(LEASE));
        let summary = ends(consumer).await.unwrap();
        assert_eq!(summary.not_stopped, 1_200);
        assert_eq!(summary.not_stopped_tags.len(), 1_000);
    }
}

#[tokio::test(start_paused = true)]
async fn a_consumer_without_a_limit_has_no_number_of_free_places() {
    let queue = Broker::new().queue("jobs").declare();
    queue.publish(7);
    let service = service_fn(|_: Delivery<u32>| pending::<Result<(), Infallible>>());
    let consumer = Consumer::new(queue.subscribe(4).unwrap(), service);
    let watch = consumer.watch();
    tokio::spawn(consumer.run());
    sleep(LEASE).await;
    let State::Consuming(progress) = watch.state() else {
        panic!("{watch:?}");
    };
    assert_eq!((progress.running, progress.free), (1, None));
}

/// A service that is never ready.
#[derive(Clone)]
struct Unready;

impl Service<Delivery<u32>> for Unready {
    type Response = ();
    type Error = Infallible;
    type Future = Ready<Result<(), Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Pending
    }

    fn call(&mut self, _: Delivery<u32>) -> Self::Future {
        unreachable!("it was never ready")
    }
}

#[tokio::test(start_paused = true)]
async fn a_consumer_that_runs_nothing_is_paused_by_its_service_and_not_saturated() {
    let queue = Broker::new().queue("jobs").declare();
    queue.publish(7);
    let consumer = Consumer::new(queue.subscribe(4).unwrap(), Unready);
    let watch = consumer.watch();
    tokio::spawn(consumer.run());
    sleep(LEASE).await;
    let State::Paused { by, progress } = watch.state() else {
        panic!("{watch:?}");
    };
    assert_eq!((by, progress.running), (Pauser::Service, 0));
}
