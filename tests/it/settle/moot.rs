//! Settlements that the broker no longer waits for, and those that fail as misconfigured: their reach.

use std::{error::Error as _, future::IntoFuture, time::Duration};

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tower::{ServiceBuilder, ServiceExt};
use tower_sentinel::{
    Consumer, Job, Outcome, Report, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::memory::{Broker, Delivery},
    consumer::{Escalate, Escalation},
    settle::{Settle, SettleError, Unsettled},
};

use crate::support::{Refused, log::Log, tag::Tag};

const LEASE: Duration = Duration::from_secs(30);

#[tokio::test(start_paused = true)]
async fn a_job_that_outlives_its_lease_costs_no_other_job_its_session() {
    let queue = Broker::new().queue("jobs").lease(LEASE).declare();
    (0..20).for_each(|job| queue.publish(job));
    let end = CancellationToken::new();
    let ending = end.clone();
    let service = ServiceBuilder::new()
        .concurrency_limit(4)
        .layer(SentinelLayer::new(SettlePolicy::new(ack_on_success())).no_timeout())
        .service_fn(move |delivery: Delivery<u32>| {
            let ending = ending.clone();
            let is_first = delivery.tag().deliveries() == Some(1);
            async move {
                match *delivery.payload() {
                    // Until after its twin has begun and ended.
                    7 if is_first => {
                        sleep(2 * LEASE).await;
                        ending.cancel();
                    }
                    _ => sleep(LEASE / 8).await,
                }
                Ok::<_, Refused>(())
            }
        });
    let (log, _guard) = Log::start();
    let subscription = queue.subscribe(4).unwrap();
    let consumer = Consumer::new(subscription, service);
    let consumer = consumer.with_graceful_shutdown(async move { end.cancelled().await });
    let summary = consumer
        .drain_timeout(4 * LEASE)
        .into_future()
        .await
        .unwrap();
    // The late one and its twin.
    assert_eq!((summary.called, summary.answered), (21, 20));
    assert_eq!(
        (summary.failed, summary.moot, summary.unanswered),
        (1, 1, 0)
    );
    assert_eq!(queue.counts().acked, 20);
    let lines = log.lines();
    let said = lines
        .iter()
        .filter(|line| line.contains("consumer continuing"));
    let said: Vec<_> = said.collect();
    assert_eq!(said.len(), 1, "{lines:#?}");
    assert!(said[0].contains("the lease of the delivery is over"));
}

fn moot() -> Tag {
    Tag::new().failing(|_| Unsettled::moot(Refused))
}

fn misconfigured() -> Tag {
    Tag::new().failing(|_| Unsettled::misconfigured(Refused))
}

async fn settle(tag: Tag) -> SettleError<Refused> {
    let outcome = Outcome::<(), Refused>::Completed(());
    let report = Report::new(tag, outcome, Duration::ZERO);
    let policy = SettlePolicy::new(ack_on_success());
    policy.oneshot(report).await.unwrap_err()
}

#[tokio::test(start_paused = true)]
async fn neither_is_tried_again() {
    let started = Instant::now();
    let (moot, misconfigured) = (settle(moot()).await, settle(misconfigured()).await);
    // There was no pause.
    assert_eq!(started.elapsed(), Duration::ZERO);
    let verdict = Verdict::Ack;
    assert!(matches!(moot, SettleError::Moot { verdict: of, error: Refused } if of == verdict));
    assert!(!moot.must_give_up_channel());
    assert_eq!(moot.escalation(), Escalation::Moot);
    assert_eq!(
        moot.to_string(),
        "the broker does not wait for \"ack\" any more: refused"
    );
    assert!(moot.source().unwrap().is::<Refused>());
    assert!(matches!(
        misconfigured,
        SettleError::Misconfigured { verdict: of, error: Refused } if of == verdict
    ));
    assert!(misconfigured.must_give_up_channel());
    assert_eq!(misconfigured.escalation(), Escalation::Consumer);
    assert_eq!(
        misconfigured.to_string(),
        "\"ack\" fails as configured: refused"
    );
    assert!(misconfigured.source().unwrap().is::<Refused>());
}

#[test]
fn a_tag_that_wraps_another_keeps_how_far_a_failure_reaches() {
    let wrap = |tag: u8| u32::from(tag);
    let again = Unsettled::again(7_u8, Refused).map_tag(wrap);
    assert_eq!(again.tag, Some(7));
    assert!(!again.is_moot() && !again.is_misconfigured());
    let last = Unsettled::<u8, _>::last(Refused).map_tag(wrap);
    assert!(!last.is_moot() && !last.is_misconfigured());
    assert!(Unsettled::<u8, _>::moot(Refused).map_tag(wrap).is_moot());
    let misconfigured = Unsettled::<u8, _>::misconfigured(Refused).map_tag(wrap);
    assert!(misconfigured.is_misconfigured());
}

#[cfg(feature = "metrics")]
#[tokio::test]
async fn settlements_that_are_moot_are_counted() {
    use metrics_util::debugging::{DebugValue, DebuggingRecorder};

    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _guard = metrics::set_default_local_recorder(&recorder);
    settle(moot()).await;
    settle(misconfigured()).await;
    settle(moot()).await;
    let counted: Vec<_> = snapshotter
        .snapshot()
        .into_vec()
        .into_iter()
        .filter(|(key, ..)| key.key().name() == "tower_sentinel.moot")
        .collect();
    let [(key, _, _, DebugValue::Counter(2))] = &*counted else {
        panic!("{counted:?}");
    };
    let labels: Vec<_> = key.key().labels().collect();
    assert_eq!((labels.len(), labels[0].value()), (1, "ack"));
}
