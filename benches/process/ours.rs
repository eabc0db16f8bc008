//! [`ProcessPool`], and the same jobs in tasks.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::sync::Notify;
use tower::{Service, ServiceExt, service_fn};
use tower_layer::Layer;
use tower_sentinel::{
    Consumer, Outcome, Report, SentinelLayer, SettlePolicy, Verdict,
    process::{ProcessPool, Request, serve_json},
};

use super::{BODY, Figures, IN_FLIGHT, PROCESSES, queue::Queue, time};

const LIMIT: Duration = Duration::from_secs(30);

async fn job(body: impl AsRef<[u8]>) -> Result<usize, Infallible> {
    Ok(body.as_ref().len())
}

pub(crate) fn serve() {
    serve_json(service_fn(|request: Request| async move {
        job(request).await.map_err(|never| match never {} as String)
    }));
}

macro_rules! pool {
    () => {
        ProcessPool::json::<usize, String>(PROCESSES)
    };
}

/// Runs `jobs` of them in a service under a sentinel, as the policy of which it returns outcomes.
macro_rules! supervised {
    ($service:expr) => {
        SentinelLayer::with_tag(
            service_fn(|report: Report<(), usize, _>| async move {
                assert!(matches!(report.outcome, Outcome::Completed(3)));
                Ok::<_, Infallible>(())
            }),
            |_: &&str| (),
        )
        .timeout(LIMIT)
        .layer($service)
    };
}

macro_rules! warm {
    ($sentinel:expr) => {
        let mut calls = FuturesUnordered::new();
        for _ in 0..1_000 {
            if calls.len() == PROCESSES {
                calls.next().await;
            }
            calls.push($sentinel.ready().await.expect("it is ready").call(BODY));
        }
        while calls.next().await.is_some() {}
    };
}

macro_rules! one_at_a_time {
    ($sentinel:expr, $jobs:expr) => {{
        let mut sentinel = $sentinel;
        warm!(sentinel);
        tokio::spawn(async move {
            time(async {
                for _ in 0..$jobs {
                    let call = sentinel.ready().await.expect("it is ready").call(BODY);
                    call.await.expect("the policy is content");
                }
            })
            .await
        })
        .await
        .expect("no job panics")
    }};
}

macro_rules! many {
    ($sentinel:expr, $jobs:expr) => {{
        let mut sentinel = $sentinel;
        warm!(sentinel);
        tokio::spawn(async move {
            time(async {
                let mut calls = FuturesUnordered::new();
                for _ in 0..$jobs {
                    if calls.len() == IN_FLIGHT {
                        calls.next().await;
                    }
                    loop {
                        tokio::select! {
                            biased;
                            ready = sentinel.ready() => {
                                ready.expect("it is ready");
                                break;
                            }
                            Some(_) = calls.next() => {}
                        }
                    }
                    calls.push(sentinel.call(BODY));
                }
                while calls.next().await.is_some() {}
            })
            .await
        })
        .await
        .expect("no job panics")
    }};
}

pub(crate) async fn one_at_a_time(figures: &mut Figures, jobs: u32) {
    let time = one_at_a_time!(supervised!(service_fn(job)), jobs);
    figures.add("tower-sentinel, in tasks", time, jobs);
    let time = one_at_a_time!(supervised!(pool!()), jobs);
    figures.add("tower-sentinel, ProcessPool", time, jobs);
}

pub(crate) async fn many(figures: &mut Figures, jobs: u32) {
    let time = many!(supervised!(service_fn(job)), jobs);
    figures.add("tower-sentinel, in tasks", time, jobs);
    let time = many!(supervised!(pool!()), jobs);
    figures.add("tower-sentinel, ProcessPool", time, jobs);
}

pub(crate) async fn queued(figures: &mut Figures, queue: &mut Queue, jobs: u32) {
    let group = queue.publish(jobs).await;
    let deliveries = queue.subscribe(&group).await;
    let (left, last) = (AtomicU32::new(jobs), Notify::new());
    let finish = Arc::new((left, last));
    let finished = Arc::clone(&finish);
    let decision = move |_: &_, outcome: &Outcome<_, _>| {
        if finish.0.fetch_sub(1, Ordering::Relaxed) == 1 {
            finish.1.notify_one();
        }
        match outcome.is_completed() {
            true => Verdict::Ack,
            false => Verdict::Reject,
        }
    };
    let layer = SentinelLayer::new(SettlePolicy::new(decision)).timeout(LIMIT);
    let consumer = Consumer::new(deliveries, pool!())
        .sentinel(layer)
        .with_graceful_shutdown(async move { finished.1.notified().await });
    let time = time(async {
        let summary = consumer.await.expect("the consumer ends well");
        assert_eq!(summary.answered, u64::from(jobs));
    });
    // With the start of the processes.
    figures.add("tower-sentinel, ProcessPool", time.await, jobs);
}
