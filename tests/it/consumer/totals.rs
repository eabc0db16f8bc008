//! The counts and the states of a consumer that has several tasks, or no limit.

use std::{
    convert::Infallible,
    future::{Ready, pending},
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::sleep;
use tower::{Service, ServiceBuilder, service_fn};
use tower_sentinel::{
    Consumer, Job, SentinelLayer, SettlePolicy, ack_on_success,
    broker::memory::{Broker, Delivery},
    consumer::{Pauser, State},
    settle::Settle,
};

use super::ends;
use crate::support::Refused;

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
