//! The drain.

use std::{
    convert::Infallible,
    future::{Future, IntoFuture},
    io,
    pin::{Pin, pin},
    task::Context,
    time::Duration,
};

use tokio::{
    runtime::Builder,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tower::{BoxError, service_fn};
use tower_sentinel::{
    Consumer, Verdict,
    consumer::{AfterError, EndCause, Escalation, Summary},
};

use super::{MS, call_alone, consume, plain};
use crate::{
    consumer::{ends, here, stack},
    support::{
        Count, Fate, Refused, raise,
        subscription::{Channel, Delivery, End, Refusal},
    },
};

#[tokio::test(start_paused = true)]
async fn a_service_that_can_not_be_stopped_is_abandoned() {
    for token in [None, Some(CancellationToken::new())] {
        let channel = Channel::of([Fate::Hang, Fate::PanicInDrop, Fate::Hang]);
        let mut consumer = Consumer::new(channel.subscribe(), service_fn(plain))
            .escalation(call_alone)
            .with_graceful_shutdown(sleep(MS(500)));
        // Without a token no job is cancelled, and the drain waits for none after that.
        let mut after = MS(500 + 30_000);
        if let Some(token) = token {
            consumer = consumer.shutdown(token);
            after += MS(40_000);
        }
        let started = Instant::now();
        let summary = ends(consumer).await.unwrap();
        assert_eq!((summary.called, summary.abandoned), (3, 3));
        let late = started.elapsed().saturating_sub(after);
        assert!(started.elapsed() >= after && late < MS(20), "{late:?} late");
        assert_eq!(channel.closed(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_token_that_is_cancelled_elsewhere_is_a_graceful_signal() {
    for tasks in [1, 3] {
        // Each would be called and released at once, for ever with a broker that delivers it again.
        let channel = Channel::of([Fate::Hang; 1_000]);
        let shutdown = CancellationToken::new();
        let services = (0..tasks).map(|_| stack(2, shutdown.clone(), here()));
        let consumer = Consumer::parallel(channel.subscribe(), services).shutdown(shutdown.clone());
        let consuming = tokio::spawn(ends(consumer));
        sleep(MS(500)).await;
        shutdown.cancel();
        let summary = consuming.await.unwrap().unwrap();
        assert_eq!(summary.called, 2 * tasks);
        assert_eq!(summary.verdicts(Verdict::release()), 2 * tasks);
        assert_eq!((channel.closed(), channel.stale()), (1, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn no_call_that_has_ended_is_abandoned() {
    // They end as the drain begins, which has no time for them.
    for token in [None, Some(CancellationToken::new())] {
        let channel = Channel::of([Fate::Value; 1_000]);
        let service = service_fn(|_: Delivery| async {
            sleep(MS(500)).await;
            Ok::<_, Infallible>(())
        });
        let mut consumer = Consumer::new(channel.subscribe(), service)
            .drain_timeout(Duration::ZERO)
            .stop_timeout(Duration::ZERO)
            .with_graceful_shutdown(sleep(MS(500)));
        if let Some(token) = token {
            consumer = consumer.shutdown(token);
        }
        let summary = ends(consumer).await.unwrap();
        assert_eq!((summary.answered, summary.abandoned), (1_000, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_channel_that_does_not_close_is_left() {
    let channel = Channel::of([]);
    channel.never_close();
    channel.end(End::Failed);
    let started = Instant::now();
    assert!(consume(&channel).await.is_err());
    assert!((MS(5_000)..MS(5_020)).contains(&started.elapsed()));
}

#[tokio::test(start_paused = true)]
async fn a_settlement_that_fails_in_a_drain_is_counted() {
    let channel = Channel::of([Fate::Value, Fate::Hang]);
    channel.refuse(Refusal::Fails);
    let shutdown = CancellationToken::new();
    let service = stack(2, shutdown.clone(), here());
    let consumer = Consumer::new(channel.subscribe(), service)
        .shutdown(shutdown)
        .with_graceful_shutdown(sleep(MS(500)));
    let summary = ends(consumer).await.unwrap();
    assert_eq!((summary.answered, summary.unanswered), (1, 1));
    assert_eq!(
        (channel.verdicts(), channel.closed()),
        (vec![Verdict::release()], 1)
    );
}

#[tokio::test(start_paused = true)]
async fn the_second_signal_is_not_polled_before_the_first() {
    let polled = Count::default();
    let (first, counted) = (CancellationToken::new(), polled.clone());
    let channel = Channel::of([Fate::Hang]);
    let shutdown = CancellationToken::new();
    let service = stack(1, shutdown.clone(), here());
    let consumer = Consumer::new(channel.subscribe(), service)
        .shutdown(shutdown)
        .with_graceful_shutdown(first.clone().cancelled_owned())
        .with_forced_shutdown(async move { counted.add() });
    let consuming = tokio::spawn(ends(consumer));
    sleep(MS(500)).await;
    assert_eq!(polled.get(), 0);
    first.cancel();
    let summary = consuming.await.unwrap().unwrap();
    assert_eq!((polled.get(), summary.verdicts(Verdict::release())), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_signal_that_panics_is_given() {
    let channel = Channel::of([]);
    let service = stack(1, CancellationToken::new(), here());
    let consumer = Consumer::new(channel.subscribe(), service)
        .with_graceful_shutdown(async { raise("in the signal") });
    assert_eq!(ends(consumer).await.unwrap(), Summary::default());
}

#[test]
fn a_runtime_that_ends_is_told_of() {
    let runtime = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let channel = Channel::of([]);
    let mut consuming = {
        let _context = runtime.enter();
        Consumer::new(
            channel.subscribe(),
            stack(1, CancellationToken::new(), here()),
        )
        .into_future()
    };
    let waker = futures_util::task::noop_waker();
    {
        let _context = runtime.enter();
        let polled = Pin::new(&mut consuming).poll(&mut Context::from_waker(&waker));
        assert!(polled.is_pending());
    }
    runtime.shutdown_timeout(MS(1_000));
    let ended = crate::support::block_on(pin!(consuming));
    assert!(matches!(ended.unwrap_err().cause(), EndCause::RuntimeGone));
}

/// Fails or not in turn, once its time is over.
async fn drained_cause(escalations: [Escalation; 3]) -> EndCause<Refused, usize> {
    let channel = Channel::of([Fate::Value; 3]);
    let calls = Count::default();
    let service = service_fn(move |_: Delivery| {
        let call = calls.get();
        calls.add();
        async move {
            sleep(MS(100 * (call as u64 + 1))).await;
            Err::<(), _>(call)
        }
    });
    let consumer = Consumer::new(channel.subscribe(), service)
        .escalation(move |call: &usize| escalations[*call])
        .on_error(AfterError::Continue);
    let (cause, summary) = ends(consumer).await.unwrap_err().into_parts();
    assert_eq!((summary.called, summary.failed), (3, 3));
    cause
}

#[tokio::test(start_paused = true)]
async fn the_graver_of_two_causes_is_reported_and_else_the_first() {
    use Escalation::{Call, Channel, Consumer};

    for (escalations, reported) in [
        ([Channel, Channel, Channel], 0),
        ([Channel, Consumer, Channel], 1),
        ([Channel, Call, Consumer], 2),
        ([Channel, Consumer, Consumer], 1),
        ([Consumer, Channel, Consumer], 0),
        ([Call, Channel, Consumer], 2),
        ([Call, Channel, Call], 1),
    ] {
        match drained_cause(escalations).await {
            EndCause::Unanswered(call) => {
                assert_eq!((call, escalations[call]), (reported, Channel));
            }
            EndCause::Misconfigured(call) => {
                assert_eq!((call, escalations[call]), (reported, Consumer));
            }
            other => panic!("{escalations:?}: {other:?}"),
        }
    }
}

#[test]
fn an_error_prints_its_cause() {
    let cause = EndCause::<io::Error, BoxError>::Failed(Refused.into());
    assert_eq!(cause.to_string(), "a call failed: refused");
}
