//! Time limits of jobs whose broker waits only for a lease.

use std::{future::pending, time::Duration};

use futures_util::{FutureExt, StreamExt};
use tokio::time::{Instant, sleep};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_sentinel::{
    Job, KeepAliveLayer, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::memory::{Broker, Deliveries, Delivery, Queue},
    cancel::{Cancellation, time_left},
    outcome::{CancelReason, OutcomeKind},
    sentinel::Hooks,
    settle::Settle,
};

use crate::support::{Refused, call, log::Log};

const S: fn(u64) -> Duration = Duration::from_secs;

/// Returns a queue with `jobs`, and the subscription to it.
fn queue(lease: Option<Duration>, jobs: u32) -> (Queue<u32>, Deliveries<u32>) {
    let broker = Broker::new();
    let queue = broker.queue("jobs");
    let queue = match lease {
        Some(lease) => queue.lease(lease).declare(),
        None => queue.declare(),
    };
    (0..jobs).for_each(|job| queue.publish(job));
    let deliveries = queue.subscribe(8).unwrap();
    (queue, deliveries)
}

fn take(deliveries: &mut Deliveries<u32>) -> Delivery<u32> {
    let delivery = deliveries.next().now_or_never();
    delivery.expect("a job is ready").unwrap().unwrap()
}

fn layer() -> SentinelLayer<SettlePolicy> {
    SentinelLayer::new(SettlePolicy::new(ack_on_success()))
}

async fn hang(_: Delivery<u32>) -> Result<(), Refused> {
    pending().await
}

#[tokio::test(start_paused = true)]
async fn a_job_that_passes_the_default_limit_gets_its_verdict_within_the_lease() {
    for (lease, limit) in [
        (Some(S(30)), S(20)),
        (Some(S(6)), S(4)),
        (Some(S(45)), S(30)),
        (Some(S(3_600)), S(30)),
        (Some(Duration::MAX), S(30)),
        (None, S(30)),
    ] {
        let (queue, mut deliveries) = queue(lease, 2);
        let (log, _guard) = Log::start();
        let mut plain = layer().layer(service_fn(hang));
        let mut limited = layer().delivery_limit(9).layer(service_fn(hang));
        let started = Instant::now();
        let plain = call(&mut plain, take(&mut deliveries));
        let limited = call(&mut limited, take(&mut deliveries));
        let (plain, limited) = futures_util::join!(plain, limited);
        for settled in [plain.unwrap(), limited.unwrap()] {
            assert_eq!(
                (settled.kind, settled.verdict, settled.elapsed),
                (OutcomeKind::TimedOut, Verdict::retry(), limit),
                "{lease:?}"
            );
        }
        assert_eq!(started.elapsed(), limit);
        assert_eq!((queue.counts().ready, queue.counts().unacked), (2, 0));
        assert_eq!(said(&log), [""; 0], "{lease:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_that_is_kept_alive_has_the_whole_default_limit() {
    for (takes, verdict, elapsed) in [
        (S(25), Verdict::Ack, S(25)),
        (Duration::MAX, Verdict::retry(), S(30)),
    ] {
        let (queue, mut deliveries) = queue(Some(S(9)), 1);
        let (log, _guard) = Log::start();
        let mut worker = ServiceBuilder::new()
            .layer(layer())
            .layer(KeepAliveLayer::new(S(3)))
            .service_fn(move |_: Delivery<u32>| async move {
                sleep(takes).await;
                Ok::<_, Refused>(())
            });
        let settled = call(&mut worker, take(&mut deliveries)).await.unwrap();
        assert_eq!((settled.verdict, settled.elapsed), (verdict, elapsed));
        assert_eq!(queue.counts().unacked, 0);
        assert_eq!(said(&log), [""; 0]);
    }
}

#[tokio::test(start_paused = true)]
async fn what_comes_after_the_limit_of_a_lease_is_the_first_cause_of_a_job_that_is_kept_alive() {
    for is_dropped in [false, true] {
        let (_queue, mut deliveries) = queue(Some(S(9)), 1);
        let (reported, mut reports) = tokio::sync::mpsc::unbounded_channel();
        let policy = service_fn(move |report: tower_sentinel::Report<_, (), Refused>| {
            let reason = match report.outcome {
                tower_sentinel::Outcome::Cancelled(cancelled) => Ok(cancelled.reason()),
                other => Err(other.kind()),
            };
            reported.send(reason).unwrap();
            std::future::ready(Ok::<_, Refused>(()))
        });
        let mut worker = ServiceBuilder::new()
            .layer(SentinelLayer::new(policy))
            .layer(KeepAliveLayer::new(S(3)))
            .service_fn(move |_: Delivery<u32>| async move {
                if !is_dropped {
                    sleep(S(8)).await;
                    Cancellation::current().cancel(CancelReason::Requested);
                }
                pending::<Result<(), Refused>>().await
            });
        let worker = worker.ready().await.unwrap();
        let mut supervising = Box::pin(worker.call(take(&mut deliveries)));
        // It is not polled while the limit of the lease passes, and the request comes.
        assert!(supervising.as_mut().now_or_never().is_none());
        sleep(S(10)).await;
        if is_dropped {
            drop(supervising);
        } else {
            supervising.await.unwrap();
        }
        let expected = match is_dropped {
            true => CancelReason::CallerDropped,
            false => CancelReason::Requested,
        };
        assert_eq!(reports.recv().await.unwrap(), Ok(expected));
    }
}

/// Returns the log lines about leases.
fn said(log: &Log) -> Vec<String> {
    let lines = log.lines().into_iter();
    lines.filter(|line| line.contains("lease=")).collect()
}

/// Runs three jobs, of which the first fails, in two services of `layer`.
async fn warnings<M>(layer: SentinelLayer<SettlePolicy, Hooks>, around: M) -> Vec<String>
where
    M: Fn() -> Option<KeepAliveLayer>,
{
    let (_queue, mut deliveries) = queue(Some(S(30)), 3);
    let (log, _guard) = Log::start();
    let handler = service_fn(|job: Delivery<u32>| async move {
        match (*job.payload(), job.tag().deliveries()) {
            (0, Some(1)) => Err(Refused),
            _ => Ok(()),
        }
    });
    for number in 0..3 {
        let mut worker = layer
            .clone()
            .layer(tower::util::option_layer(around()).layer(handler));
        call(&mut worker, take(&mut deliveries)).await.unwrap();
        if number == 0 {
            // It may have ended before there was a keep-alive.
            assert_eq!(said(&log), [""; 0]);
        }
    }
    said(&log)
}

#[tokio::test(start_paused = true)]
async fn a_limit_that_outlasts_the_lease_is_warned_of_once_with_both_numbers() {
    let none = || None;
    for (layer, numbers) in [
        (layer().timeout(S(30)), "limit=30s grace=0ns lease=30s"),
        (
            layer().timeout(S(25)).grace(S(5)),
            "limit=25s grace=5s lease=30s",
        ),
        (layer().grace(S(10)), "limit=20s grace=10s lease=30s"),
        (layer().no_timeout(), "grace=0ns lease=30s"),
    ] {
        let said = warnings(layer.clone(), none).await;
        assert_eq!(said.len(), 1, "{numbers}: {said:?}");
        assert!(said[0].starts_with("WARN"), "{said:?}");
        assert!(said[0].contains(numbers), "{said:?}");
        assert!(said[0].contains("a job may be settled after its lease"));
        // A clone is the same layer.
        assert_eq!(warnings(layer, none).await, [""; 0]);
    }
    for layer in [layer(), layer().timeout(S(29))] {
        assert_eq!(warnings(layer, none).await, [""; 0]);
    }
    for layer in [layer().timeout(S(30)), layer().no_timeout()] {
        let kept_alive = || Some(KeepAliveLayer::new(S(10)));
        assert_eq!(warnings(layer, kept_alive).await, [""; 0]);
    }
}

// === time left ===

/// Runs a job of 5 s under `layer`, and returns the time that it had left at its end.
async fn left_after_5_s(
    layer: SentinelLayer<SettlePolicy>,
    lease: Option<Duration>,
    keep_alive: Option<KeepAliveLayer>,
) -> Option<Duration> {
    let (_queue, mut deliveries) = queue(lease, 1);
    let (left, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let mut worker = ServiceBuilder::new()
        .layer(layer)
        .option_layer(keep_alive)
        .service_fn(move |_: Delivery<u32>| {
            let left = left.clone();
            async move {
                sleep(S(5)).await;
                left.send(time_left()).unwrap();
                Ok::<_, Refused>(())
            }
        });
    call(&mut worker, take(&mut deliveries)).await.unwrap();
    seen.recv().await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_job_is_told_how_much_of_its_limit_is_left() {
    let keep_alive = || Some(KeepAliveLayer::new(S(3)));
    for (limit, lease, keep_alive, left) in [
        (Some(S(8)), None, None, Some(S(3))),
        (Some(S(8)), Some(S(60)), None, Some(S(3))),
        (None, None, None, Some(S(25))),
        (None, Some(S(9)), None, Some(S(1))),
        (None, Some(S(9)), keep_alive(), Some(S(25))),
        (Some(S(8)), Some(S(9)), keep_alive(), Some(S(3))),
    ] {
        let layer = limit.map_or_else(layer, |limit| layer().timeout(limit));
        assert_eq!(left_after_5_s(layer, lease, keep_alive).await, left);
    }
    assert_eq!(
        left_after_5_s(layer().no_timeout(), Some(S(9)), None).await,
        None
    );
    assert_eq!(time_left(), None);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_left_in_the_grace_and_nothing_of_it_to_the_next_job() {
    let (_queue, mut deliveries) = queue(None, 2);
    let (left, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let mut worker =
        layer()
            .timeout(S(1))
            .grace(S(1))
            .layer(service_fn(move |job: Delivery<u32>| {
                let left = left.clone();
                async move {
                    if *job.payload() == 0 {
                        tower_sentinel::cancelled().await;
                    }
                    left.send(time_left()).unwrap();
                    Ok::<_, Refused>(())
                }
            }));
    for _ in 0..2 {
        call(&mut worker, take(&mut deliveries)).await.unwrap();
    }
    assert_eq!(seen.recv().await.unwrap(), Some(Duration::ZERO));
    assert_eq!(seen.recv().await.unwrap(), Some(S(1)));
}
