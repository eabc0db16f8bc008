//! Effects of each verdict on a job.

use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use tokio::time::{Instant, advance, sleep};
use tower_sentinel::{
    Job, Verdict,
    broker::memory::{Broker, DeliveryError},
    outcome::OutcomeKind,
    settle::{Settle, Unsettled},
};

use super::{
    SECOND, assert_idle, counts, keep_alive, payloads, queue, reason, settle, take, take_all,
};

#[test]
fn an_ack_removes_the_job() {
    let queue = queue();
    queue.publish(1);
    let mut jobs = queue.subscribe(1).unwrap();
    settle(&take(&mut jobs), Verdict::Ack).unwrap();
    assert_eq!(counts(&queue), (0, 0, 0, 1, 0, 0));
    drop(jobs);
    assert_idle(&mut queue.subscribe(1).unwrap());
}

#[test]
fn jobs_are_settled_in_any_order() {
    let queue = queue();
    (0..4).for_each(|job| queue.publish(job));
    let mut jobs = queue.subscribe(4).unwrap();
    let held = take_all(&mut jobs);
    settle(&held[3], Verdict::Ack).unwrap();
    settle(&held[1], Verdict::retry()).unwrap();
    settle(&held[0], Verdict::release()).unwrap();
    settle(&held[2], Verdict::Ack).unwrap();
    assert_eq!(payloads(&take_all(&mut jobs)), [1, 0]);
    assert_eq!(counts(&queue), (0, 0, 2, 2, 0, 0));
}

#[test]
fn a_retry_charges_a_delivery_and_a_release_does_not() {
    let queue = queue();
    queue.publish(1);
    let mut jobs = queue.subscribe(1).unwrap();
    let mut told = Vec::new();
    for verdict in [
        Verdict::release(),
        Verdict::retry(),
        Verdict::release(),
        Verdict::retry(),
    ] {
        let job = take(&mut jobs);
        told.push((job.tag().deliveries(), job.tag().redelivered()));
        settle(&job, verdict).unwrap();
    }
    let last = take(&mut jobs).tag();
    told.push((last.deliveries(), last.redelivered()));
    let flags = [(1, false), (1, true), (2, true), (2, true), (3, true)];
    assert_eq!(told, flags.map(|(count, flag)| (Some(count), Some(flag))));
}

#[test]
fn what_comes_back_comes_before_what_was_never_delivered() {
    for verdict in [Verdict::retry(), Verdict::release()] {
        let queue = queue();
        (1..=4).for_each(|job| queue.publish(job));
        let mut jobs = queue.subscribe(2).unwrap();
        let held = take_all(&mut jobs);
        held.iter().for_each(|job| settle(job, verdict).unwrap());
        assert_eq!(payloads(&take_all(&mut jobs)), [1, 2], "{verdict}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_delayed_retry_is_not_seen_before_its_time() {
    let queue = queue();
    queue.publish(1);
    let mut jobs = queue.subscribe(1).unwrap();
    let started = Instant::now();
    settle(&take(&mut jobs), Verdict::retry_after(5 * SECOND)).unwrap();
    assert_eq!(counts(&queue), (0, 1, 0, 0, 0, 0));
    assert_idle(&mut jobs);

    let job = jobs.next().await.unwrap().unwrap();
    assert_eq!(started.elapsed(), 5 * SECOND);
    assert_eq!(job.tag().deliveries(), Some(2));
    assert_eq!(counts(&queue), (0, 0, 1, 0, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_delayed_release_is_not_seen_before_its_time_and_is_free() {
    let queue = queue();
    queue.publish(1);
    let mut jobs = queue.subscribe(1).unwrap();
    let started = Instant::now();
    settle(&take(&mut jobs), Verdict::release_after(5 * SECOND)).unwrap();
    assert_eq!(counts(&queue), (0, 1, 0, 0, 0, 0));
    assert_idle(&mut jobs);

    let tag = jobs.next().await.unwrap().unwrap().tag();
    assert_eq!(started.elapsed(), 5 * SECOND);
    assert_eq!((tag.deliveries(), tag.redelivered()), (Some(1), Some(true)));
}

#[tokio::test(start_paused = true)]
async fn delayed_jobs_come_when_they_are_due() {
    let queue = queue();
    (0..4).for_each(|job| queue.publish(job));
    let mut jobs = queue.subscribe(4).unwrap();
    let held = take_all(&mut jobs);
    let started = Instant::now();
    let waiting = tokio::spawn(async move {
        let mut seen = Vec::new();
        while seen.len() < 4 {
            let job = jobs.next().await.unwrap().unwrap();
            seen.push((*job.payload(), started.elapsed().as_secs()));
        }
        seen
    });
    // It waits without a timer, and then with one that is too late.
    sleep(Duration::ZERO).await;
    for (job, delay) in held.iter().zip([5, 3, 3, 1]) {
        settle(job, Verdict::retry_after(delay * SECOND)).unwrap();
        tokio::task::yield_now().await;
    }
    assert_eq!(waiting.await.unwrap(), [(3, 1), (1, 3), (2, 3), (0, 5)]);
}

#[tokio::test(start_paused = true)]
async fn a_delay_may_be_nothing_or_longer_than_time() {
    let queue = queue();
    (0..2).for_each(|job| queue.publish(job));
    let mut jobs = queue.subscribe(2).unwrap();
    let held = take_all(&mut jobs);
    settle(&held[0], Verdict::retry_after(Duration::ZERO)).unwrap();
    settle(&held[1], Verdict::retry_after(Duration::MAX)).unwrap();
    assert_eq!(counts(&queue), (1, 1, 0, 0, 0, 0));
    advance(Duration::from_secs(86_400 * 365)).await;
    assert_eq!(counts(&queue), (1, 1, 0, 0, 0, 0));
}

#[test]
fn a_reject_lands_in_the_dead_letter_queue_with_its_reason() {
    let broker = Broker::new();
    let queue = broker.queue("jobs").dead_letter("dead").declare();
    (1..=2).for_each(|job| queue.publish(job));
    let mut jobs = queue.subscribe(1).unwrap();
    settle(&take(&mut jobs), Verdict::retry()).unwrap();
    let mut why = reason();
    why.kind = OutcomeKind::Panicked;
    why.message = Some("index 7".into());
    let tag = take(&mut jobs).tag();
    assert!(tag.capabilities().has_dead_letter());
    tag.settle(Verdict::Reject, why.clone())
        .now_or_never()
        .unwrap()
        .unwrap();
    settle(&take(&mut jobs), Verdict::Reject).unwrap();
    assert_eq!(counts(&queue), (0, 0, 0, 0, 2, 0));

    let letters = queue.dead_letters();
    assert_eq!([letters[0].payload, letters[1].payload], [1, 2]);
    assert_eq!(letters[0].death.reason, why);
    assert_eq!(letters[0].death.deliveries, 2);
    assert_eq!(&*letters[0].death.queue, "jobs");

    let dead = broker.queue("dead").declare();
    assert_eq!(counts(&dead), (2, 0, 0, 0, 0, 0));
    let letter = take(&mut dead.subscribe(1).unwrap());
    assert_eq!(letter.death().unwrap().reason, why);
    assert_eq!(letter.tag().deliveries(), Some(1));
}

#[test]
fn a_reject_without_a_dead_letter_queue_drops_the_job() {
    let queue = queue();
    queue.publish(1);
    let job = take(&mut queue.subscribe(1).unwrap());
    drop(job);
    let mut jobs = queue.subscribe(1).unwrap();
    let job = take(&mut jobs);
    assert!(!job.tag().capabilities().has_dead_letter());
    settle(&job, Verdict::Reject).unwrap();
    assert_eq!(counts(&queue), (0, 0, 0, 0, 0, 1));
    assert!(queue.dead_letters().is_empty());
}

#[test]
fn an_abandoned_job_is_held_and_its_tag_used_up() {
    let queue = queue();
    queue.publish(1);
    let mut jobs = queue.subscribe(1).unwrap();
    let job = take(&mut jobs);
    settle(&job, Verdict::Abandon).unwrap();
    assert_eq!(
        settle(&job, Verdict::Ack),
        Err(DeliveryError::AlreadySettled)
    );
    assert_eq!(counts(&queue), (0, 0, 1, 0, 0, 0));
    drop(jobs);
    assert_eq!(counts(&queue), (1, 0, 0, 0, 0, 0));
    settle(&job, Verdict::Abandon).unwrap();
}

#[test]
fn a_second_settlement_is_an_error() {
    let verdicts = [
        Verdict::Ack,
        Verdict::retry(),
        Verdict::retry_after(SECOND),
        Verdict::release(),
        Verdict::Reject,
        Verdict::Abandon,
    ];
    for first in verdicts {
        for second in verdicts {
            let queue = queue();
            (0..2).for_each(|job| queue.publish(job));
            let mut jobs = queue.subscribe(2).unwrap();
            let tag = take(&mut jobs).tag();
            let held = take(&mut jobs);
            let again = tag.clone();
            tag.settle(first, reason()).now_or_never().unwrap().unwrap();
            let before = queue.counts();
            let Unsettled { tag, error, .. } = again
                .settle(second, reason())
                .now_or_never()
                .unwrap()
                .unwrap_err();
            assert_eq!(error, DeliveryError::AlreadySettled, "{first}, {second}");
            assert!(tag.is_none());
            assert_eq!(queue.counts(), before);
            settle(&held, Verdict::Ack).unwrap();
        }
    }
}

#[test]
fn the_tag_of_an_earlier_delivery_does_not_answer_for_the_next() {
    let queue = queue();
    queue.publish(1);
    let mut jobs = queue.subscribe(1).unwrap();
    let first = take(&mut jobs);
    settle(&first, Verdict::retry()).unwrap();
    let second = take(&mut jobs);
    assert_eq!(
        settle(&first, Verdict::Ack),
        Err(DeliveryError::AlreadySettled)
    );
    assert_eq!(keep_alive(&first.tag()), Err(DeliveryError::AlreadySettled));
    settle(&second, Verdict::Ack).unwrap();

    // The next job has the same place in memory.
    queue.publish(2);
    let _third = take(&mut jobs);
    assert_eq!(
        settle(&second, Verdict::Ack),
        Err(DeliveryError::AlreadySettled)
    );
    assert_eq!(counts(&queue), (0, 0, 1, 1, 0, 0));
}
