//! Tags and errors that panic when they are printed, and subscribers that get them.

use std::{
    future::{IntoFuture, pending},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tower::{Layer as _, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_sentinel::{
    Consumer, IntensityLayer, KeepAliveLayer, Outcome, Report, SentinelLayer, SettlePolicy,
    Verdict, ack_on_success, broker::memory::Broker, intensity::IntensityState,
    outcome::CancelReason,
};

use super::{Burst, Delivery, SITES, Site, Tag};
use crate::support::{Refused, WORK, log::Log};

#[tokio::test(start_paused = true)]
async fn a_settlement_is_tried_again_though_its_event_panics() {
    for site in SITES {
        let burst = Burst::new(site);
        let guard = burst.start();
        let tag = Tag::new(2);
        let policy = SettlePolicy::new(ack_on_success());
        let mut sentinel = SentinelLayer::new(policy)
            .process_span()
            .layer(service_fn(async |_: Delivery| Ok::<_, Refused>(())));
        burst.arm();
        let settled = sentinel.ready().await.unwrap().call(Delivery(tag.clone()));
        let settled = settled.await;
        burst.disarm();
        drop(guard);
        assert_eq!(settled.unwrap().verdict, Verdict::Ack, "{site:?}");
        assert_eq!(tag.told.load(Ordering::SeqCst), 1, "{site:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_settlement_is_tried_again_though_its_error_can_not_be_printed() {
    let (log, guard) = Log::start();
    let tag = Tag::new(2);
    let policy = SettlePolicy::new(ack_on_success());
    let report = Report::new(tag.clone(), Outcome::<_, Refused>::Completed(()), WORK);
    let settled = policy.oneshot(report).await;
    drop(guard);
    assert_eq!(settled.unwrap().verdict, Verdict::Ack);
    assert_eq!(tag.told.load(Ordering::SeqCst), 1);
    let lines = log.lines();
    let told = "the error cannot be printed: in the error's Display";
    assert!(lines.iter().all(|line| line.contains(told)), "{lines:?}");
}

#[tokio::test(start_paused = true)]
async fn a_lost_lease_cancels_its_job_though_the_event_panics() {
    let burst = Burst::new(Site::Event);
    let _guard = burst.start();
    let mut tag = Tag::new(0);
    tag.lost_after = Some(2);
    let exploded = Arc::clone(&tag.explodes);
    let policy = service_fn(async |report: Report<Tag, (), Refused>| {
        Ok::<_, Refused>(match report.outcome {
            Outcome::Cancelled(cancelled) => Some(cancelled.reason()),
            _ => None,
        })
    });
    let mut sentinel = ServiceBuilder::new()
        .layer(SentinelLayer::new(policy).no_timeout())
        .layer(KeepAliveLayer::new(Duration::from_secs(1)))
        .service_fn(async |_: Delivery| {
            pending::<()>().await;
            Ok::<_, Refused>(())
        });
    burst.arm();
    let reason = sentinel.ready().await.unwrap().call(Delivery(tag)).await;
    assert_eq!(reason.unwrap(), Some(CancelReason::LeaseLost));
    assert!(!exploded.load(Ordering::SeqCst), "by the ticker");
    assert!(burst.panics.load(Ordering::SeqCst) > 0);
}

#[tokio::test(start_paused = true)]
async fn a_keep_alive_goes_on_though_its_failure_can_not_be_told() {
    let burst = Burst::new(Site::Event);
    let _guard = burst.start();
    let tag = Tag::new(0);
    let policy = service_fn(async |_: Report<Tag, (), Refused>| Ok::<_, Refused>(()));
    let mut sentinel = ServiceBuilder::new()
        .layer(SentinelLayer::new(policy).no_timeout())
        .layer(KeepAliveLayer::new(Duration::from_secs(1)))
        .service_fn(async |_: Delivery| {
            sleep(Duration::from_secs(30)).await;
            Ok::<_, Refused>(())
        });
    burst.arm();
    let call = sentinel.ready().await.unwrap().call(Delivery(tag.clone()));
    call.await.unwrap();
    assert!(tag.kept.load(Ordering::SeqCst) > 20);
}

#[tokio::test(start_paused = true)]
async fn an_intensity_resumes_for_all_though_its_events_panic() {
    let burst = Burst::new(Site::Event);
    let _guard = burst.start();
    let fails = Arc::new(AtomicBool::new(true));
    let failing = Arc::clone(&fails);
    let layer = IntensityLayer::new().minimum_sample(1).pause(WORK..=WORK);
    let state = layer.watch();
    let service = layer.layer(service_fn(move |()| {
        let fails = failing.load(Ordering::SeqCst);
        async move {
            sleep(WORK).await;
            match fails {
                true => Err(Refused),
                false => Ok(()),
            }
        }
    }));
    burst.arm();
    let mut first = service.clone();
    while *state.borrow() == IntensityState::Running {
        first.ready().await.unwrap().call(()).await.ok();
    }
    fails.store(false, Ordering::SeqCst);
    // All of them wait for the probe of one.
    let others: Vec<_> = (0..4)
        .map(|_| {
            let mut service = service.clone();
            tokio::spawn(async move { service.ready().await.unwrap().call(()).await })
        })
        .collect();
    for other in others {
        assert_eq!(other.await.unwrap(), Ok(()));
    }
    assert!(burst.panics.load(Ordering::SeqCst) >= 3);
}

#[tokio::test(start_paused = true)]
async fn a_consumer_whose_events_panic_consumes_to_the_end() {
    let burst = Burst::new(Site::Event);
    let _guard = burst.start();
    let broker = Broker::new();
    let queue = broker.queue("jobs").declare();
    (0..20).for_each(|job: u32| queue.publish(job));
    let shutdown = CancellationToken::new();
    let service = ServiceBuilder::new()
        .concurrency_limit(2)
        .layer(SentinelLayer::new(SettlePolicy::new(ack_on_success())).shutdown(shutdown.clone()))
        .service_fn(async |_| Ok::<_, Refused>(()));
    burst.arm();
    let emptied = queue.clone();
    let consumer = Consumer::new(queue.subscribe(2).unwrap(), service)
        .shutdown(shutdown)
        .with_graceful_shutdown(async move { emptied.emptied().await });
    let summary = consumer.into_future().await.unwrap();
    assert_eq!((summary.answered, queue.counts().acked), (20, 20));
    assert!(burst.panics.load(Ordering::SeqCst) > 0);
}
