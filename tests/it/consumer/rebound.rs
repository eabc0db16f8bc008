//! A worker that is busy with the same jobs for ever logs it.

use std::time::Duration;

use tokio::time::sleep;
use tower::ServiceBuilder;
use tower_sentinel::{
    Consumer, DecisionExt, Job, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::memory::{Broker, Delivery},
    consumer::Summary,
    settle::Settle,
};

use crate::{
    consumer::ends,
    support::{Count, Refused, log::Log},
};

const SECOND: Duration = Duration::from_secs(1);

/// Works for 25 s with jobs of 1 ms, one of `of` of which is given back as `verdict`, and returns the
/// warnings.
async fn work(of: usize, verdict: Verdict) -> (Vec<String>, Summary) {
    let broker = Broker::new();
    let queue = broker.queue("jobs").declare();
    queue.publish(());
    let (again, runs) = (queue.clone(), Count::default());
    let decision = ack_on_success().on_error(move |_: &Refused| verdict);
    let service = ServiceBuilder::new()
        .concurrency_limit(1)
        .layer(SentinelLayer::new(SettlePolicy::new(decision)))
        .service_fn(move |_: Delivery<()>| {
            runs.add();
            let (again, run) = (again.clone(), runs.get());
            async move {
                sleep(Duration::from_millis(1)).await;
                if run % of == 0 {
                    return Err(Refused);
                }
                again.publish(());
                Ok(())
            }
        });
    let (log, _guard) = Log::start();
    let consumer = Consumer::new(queue.subscribe(1).unwrap(), service)
        .with_graceful_shutdown(sleep(25 * SECOND));
    let summary = ends(consumer).await.unwrap();
    let lines = log.lines().into_iter();
    let warnings = lines.filter(|line| line.contains("without a delay"));
    (warnings.collect(), summary)
}

#[tokio::test(start_paused = true)]
async fn jobs_that_come_back_at_once_are_warned_of_every_ten_seconds() {
    for verdict in [
        Verdict::release(),
        Verdict::retry(),
        Verdict::retry_after(Duration::ZERO),
    ] {
        let (warnings, summary) = work(1, verdict).await;
        assert_eq!(warnings.len(), 3, "{warnings:?}");
        assert!(warnings[0].contains("others=0"), "{warnings:?}");
        assert!(summary.called > 10_000);
    }
}

#[tokio::test(start_paused = true)]
async fn jobs_that_come_back_after_a_while_or_among_many_others_are_not() {
    let (warnings, summary) = work(1, Verdict::retry_after(Duration::from_millis(1))).await;
    assert!(
        warnings.is_empty() && summary.called > 5_000,
        "{warnings:?}"
    );
    // A third of them all.
    let (warnings, summary) = work(3, Verdict::retry()).await;
    assert!(
        warnings.is_empty() && summary.called > 10_000,
        "{warnings:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_burst_of_them_before_a_long_rest_is_not() {
    let queue = Broker::new().queue("jobs").declare();
    (0..50).for_each(|_| queue.publish(()));
    let decision = ack_on_success().on_error(|_: &Refused| Verdict::retry());
    let service = ServiceBuilder::new()
        .layer(SentinelLayer::new(SettlePolicy::new(decision)))
        .service_fn(|job: Delivery<()>| async move {
            sleep(Duration::from_millis(1)).await;
            match job.tag().deliveries() {
                Some(5) => Ok(()),
                _ => Err(Refused),
            }
        });
    let (log, _guard) = Log::start();
    let (later, subscription) = (queue.clone(), queue.subscribe(50).unwrap());
    let consumer = Consumer::new(subscription, service).with_graceful_shutdown(async move {
        sleep(10 * SECOND).await;
        // The first of these ends the count of 200.
        later.publish(());
        sleep(SECOND).await;
    });
    let summary = ends(consumer).await.unwrap();
    assert_eq!(summary.called, 255);
    let lines = log.lines();
    assert!(!lines.iter().any(|line| line.contains("without a delay")));
}
