//! Times of the keep-alives, and the effects of their responses.

use std::time::Duration;

use tokio::{runtime::Builder, time::sleep};
use tower::{Layer, service_fn};
use tower_sentinel::{
    KeepAliveLayer, Verdict, cancelled, outcome::OutcomeKind, settle::Capabilities,
};

use super::{Ask, Delivery, INTERVAL, SECOND, Seen, Tag, run, run_with, sentinel, work};
use crate::support::{Refused, call, log::Log};

// === when it asks ===

#[tokio::test(start_paused = true)]
async fn the_broker_is_asked_every_interval_until_the_job_is_done_and_not_after() {
    let tag = run(&[Ask::Held], 3 * INTERVAL - SECOND).await;
    sleep(10 * INTERVAL).await;
    assert_eq!(tag.asked(), [8.0, 16.0]);
    assert_eq!(tag.verdicts(), [Verdict::Ack]);
}

#[tokio::test(start_paused = true)]
async fn a_job_that_is_done_within_the_first_interval_costs_no_request() {
    let tag = run(&[Ask::Held], INTERVAL - SECOND).await;
    sleep(10 * INTERVAL).await;
    assert_eq!(tag.seen(), [Seen::Told(Verdict::Ack)]);
}

#[tokio::test(start_paused = true)]
async fn the_interval_counts_from_one_request_to_the_next_however_long_the_answer_takes() {
    let tag = run(&[Ask::Slow], 3 * INTERVAL + SECOND).await;
    assert_eq!(tag.asked(), [8.0, 16.0, 24.0]);
}

#[tokio::test(start_paused = true)]
async fn an_interval_that_no_clock_reaches_is_none() {
    let tag = run_with(KeepAliveLayer::new(Duration::MAX), &[Ask::Held], INTERVAL).await;
    assert_eq!(tag.asked(), [0.0; 0]);
    assert_eq!(tag.verdicts(), [Verdict::Ack]);
}

#[test]
#[should_panic(expected = "a keep-alive needs an interval")]
fn an_interval_of_zero_is_refused() {
    drop(KeepAliveLayer::new(Duration::ZERO));
}

#[test]
#[should_panic(expected = "timers are disabled")]
fn a_runtime_without_timers_is_refused() {
    let runtime = Builder::new_current_thread().build().unwrap();
    drop(KeepAliveLayer::new(INTERVAL).runtime(runtime.handle().clone()));
}

// === responses ===

#[tokio::test(start_paused = true)]
async fn a_lost_lease_cancels_the_job_which_is_abandoned_and_no_longer_kept_alive() {
    let (log, _guard) = Log::start();
    let tag = run(&[Ask::Held, Ask::Lost], 10 * INTERVAL).await;
    assert_eq!(tag.started.elapsed(), 2 * INTERVAL);
    sleep(10 * INTERVAL).await;
    let abandoned = Seen::Told(Verdict::Abandon);
    assert_eq!(tag.seen(), [Seen::Asked, Seen::Asked, abandoned]);
    let lines = log.lines();
    assert_eq!(lines.len(), 2, "{lines:#?}");
    assert_eq!(
        lines[0],
        "WARN lease lost: the broker gave the job to another worker"
    );
    assert!(lines[1].starts_with("WARN the job was cancelled verdict=abandon"));
    assert!(lines[1].contains("reason=\"lease_lost\" stopped=true"));
}

#[tokio::test(start_paused = true)]
async fn a_job_that_completes_within_its_grace_after_a_lost_lease_is_acked() {
    let tag = Tag::new(&[Ask::Lost]);
    let job = service_fn(|_: Delivery| async {
        cancelled().await;
        Ok::<_, Refused>(())
    });
    let layer = KeepAliveLayer::new(INTERVAL);
    let mut service = sentinel().grace(SECOND).layer(layer.layer(job));
    let delivery = Delivery {
        tag: tag.clone(),
        takes: SECOND,
    };
    let settled = call(&mut service, delivery).await.unwrap();
    assert_eq!(settled.kind, OutcomeKind::Completed);
    assert_eq!(tag.seen(), [Seen::Asked, Seen::Told(Verdict::Ack)]);
}

#[tokio::test(start_paused = true)]
async fn a_keep_alive_that_fails_is_tried_again_sooner_and_then_as_before() {
    let (log, _guard) = Log::start();
    const SCRIPT: &[Ask] = &[
        Ask::Error,
        Ask::Error,
        Ask::Error,
        Ask::Error,
        Ask::Held,
        Ask::Held,
        Ask::Error,
        Ask::Held,
    ];
    let tag = run(SCRIPT, 46 * SECOND).await;
    assert_eq!(
        tag.asked(),
        [8.0, 9.0, 11.0, 15.0, 19.0, 27.0, 35.0, 36.0, 44.0]
    );
    assert_eq!(tag.verdicts(), [Verdict::Ack]);
    let failed = "WARN keep-alive failed error=\"connection reset\"";
    assert_eq!(log.lines(), [failed; 5]);
}

#[tokio::test(start_paused = true)]
async fn a_keep_alive_that_fails_for_ever_is_tried_no_more_often_than_every_half_interval() {
    let tag = run(&[Ask::Error], 1_000 * INTERVAL).await;
    let asked = tag.asked();
    assert_eq!(asked.len(), 2_000);
    assert!(asked[4..].windows(2).all(|pair| pair[1] - pair[0] == 4.0));
    assert_eq!(tag.verdicts(), [Verdict::Ack]);
}

#[tokio::test(start_paused = true)]
async fn a_keep_alive_that_hangs_has_a_limit_and_is_tried_again() {
    let (log, _guard) = Log::start();
    for script in [&[Ask::Hang], &[Ask::HangAndPanic]] {
        let tag = run(script, 3 * INTERVAL).await;
        assert_eq!(tag.asked(), [8.0, 13.0, 19.0]);
        assert_eq!(tag.verdicts(), [Verdict::Ack]);
    }
    let late = "WARN keep-alive timed out limit=4s";
    assert_eq!(log.lines(), [late; 6]);

    let layer = KeepAliveLayer::new(INTERVAL).try_timeout(SECOND);
    let tag = run_with(layer, &[Ask::Hang], 3 * INTERVAL).await;
    assert_eq!(tag.asked(), [8.0, 10.0, 13.0, 18.0, 23.0]);
}

#[tokio::test(start_paused = true)]
async fn a_keep_alive_that_panics_is_an_error_event_and_is_tried_again() {
    for (script, message) in [
        (&[Ask::PanicInCall, Ask::Held], "in keep_alive"),
        (
            &[Ask::PanicInFuture, Ask::Held],
            "in the future of keep_alive",
        ),
    ] {
        let (log, _guard) = Log::start();
        let tag = run(script, 3 * INTERVAL).await;
        assert_eq!(tag.asked(), [8.0, 9.0, 17.0]);
        assert_eq!(tag.verdicts(), [Verdict::Ack]);
        let event = format!("ERROR keep-alive panicked panic=\"{message}\"");
        assert_eq!(log.lines(), [event]);
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_that_panics_when_it_is_printed_does_not_end_the_ticker() {
    let (log, _guard) = Log::start();
    let tag = run(&[Ask::BadError, Ask::Held], 3 * INTERVAL).await;
    assert_eq!(tag.asked(), [8.0, 9.0, 17.0]);
    let message = "the error cannot be printed: in Display";
    let event = format!("WARN keep-alive failed error=\"{message}\"");
    assert_eq!(log.lines(), [event]);
}

#[tokio::test(start_paused = true)]
async fn a_broker_without_keep_alive_is_not_asked_which_is_said_once_for_a_layer() {
    let (log, _guard) = Log::start();
    let layer = KeepAliveLayer::new(INTERVAL);
    for _ in 0..2 {
        let mut service = sentinel().layer(layer.clone().layer(service_fn(work)));
        for _ in 0..2 {
            let mut tag = Tag::new(&[Ask::Held]);
            tag.capabilities = Capabilities::none();
            let delivery = Delivery {
                tag: tag.clone(),
                takes: 3 * INTERVAL,
            };
            call(&mut service, delivery).await.unwrap();
            assert_eq!(tag.seen(), [Seen::Told(Verdict::Ack)]);
        }
    }
    let once = "WARN jobs running without keep-alive: the broker has none";
    assert_eq!(log.lines(), [once]);
}
