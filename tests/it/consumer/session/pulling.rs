//! Time at which a job is pulled.

use std::{convert::Infallible, future::IntoFuture, time::Duration};

use tokio::{
    task::yield_now,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::service_fn;
use tower_sentinel::{Consumer, Verdict, outcome::OutcomeKind};

use super::Never;
use crate::{
    consumer::{FOREVER, ends, here, stack},
    support::{
        Fate,
        subscription::{Channel, Delivery},
        until,
    },
};

#[tokio::test(start_paused = true)]
async fn no_more_jobs_are_pulled_than_the_gate_lets_in() {
    for gate in [1, 2, 7, 64] {
        let channel = Channel::of([Fate::Value, Fate::Error, Fate::PanicInCall].repeat(100));
        let service = stack(gate, CancellationToken::new(), here());
        let consumer = Consumer::new(channel.subscribe(), service)
            .with_graceful_shutdown(sleep(Duration::from_secs(1_000)));
        let summary = ends(consumer).await.unwrap();
        assert_eq!(channel.most_unsettled(), gate as u64);
        assert_eq!((summary.called, summary.answered), (300, 300));
        assert_eq!(summary.verdicts(Verdict::Ack), 100);
        assert_eq!(summary.verdicts(Verdict::retry()), 200);
        assert_eq!(summary.charged, 200);
        for kind in [
            OutcomeKind::Completed,
            OutcomeKind::Failed,
            OutcomeKind::Panicked,
        ] {
            assert_eq!(summary.outcomes(kind), 100);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_pulled_while_the_service_is_unready() {
    let channel = Channel::of([Fate::Value]);
    let service = tower::util::BoxService::new(Never);
    let consumer = Consumer::new(channel.subscribe(), service);
    assert!(timeout(FOREVER, consumer.into_future()).await.is_err());
    assert_eq!(channel.taken(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_is_always_ready_starves_nobody() {
    let channel = Channel::of([Fate::Hang; 100_000]);
    let service = service_fn(|_: Delivery| async { Ok::<_, Infallible>(()) });
    let consumer = Consumer::new(channel.subscribe(), service);
    let consuming = tokio::spawn(consumer.into_future());
    yield_now().await;
    // Tokio lets 61 polls pass before it comes back to a task that yields.
    let taken = channel.taken();
    assert!((1..10_000).contains(&taken), "{taken}");
    // Nor does it stop.
    until(|| channel.taken() == 100_000).await;
    assert!(!consuming.is_finished());
    consuming.abort();
}

#[tokio::test(start_paused = true)]
async fn jobs_that_wait_for_each_other_are_all_taken() {
    // More than are taken at once. None ends before all are there, so no settlement brings the next.
    const JOBS: u64 = 1_000;
    let channel = Channel::of([Fate::Value; JOBS as usize]);
    let all = channel.clone();
    let service = service_fn(move |_: Delivery| {
        let all = all.clone();
        async move {
            until(|| all.taken() == JOBS).await;
            Ok::<_, Infallible>(())
        }
    });
    let consumer = Consumer::new(channel.subscribe(), service)
        .with_graceful_shutdown(sleep(Duration::from_secs(1_000)));
    assert_eq!(ends(consumer).await.unwrap().answered, JOBS);
}

#[tokio::test(start_paused = true)]
async fn a_consumer_that_is_dropped_before_its_first_poll_takes_nothing() {
    let channel = Channel::of([Fate::Value]);
    let service = stack(1, CancellationToken::new(), here());
    drop(Consumer::new(channel.subscribe(), service).into_future());
    sleep(FOREVER).await;
    assert_eq!((channel.taken(), channel.closed()), (0, 0));
}
