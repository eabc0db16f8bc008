//! Acks that go to the server together.

use std::{collections::BTreeSet, future::poll_fn, task::Poll, time::Duration};

use futures_util::future::join_all;
use tokio::{runtime::Builder, time::timeout};
use tower_sentinel::{
    Job, Verdict,
    broker::rabbitmq::{Deliveries, Delivery, DeliveryError, lapin::ConnectionProperties},
    settle::Settle,
};

use super::{KINDS, Scene, close, close_and_recover, named, next, reason, settle, shared};

const JOBS: u16 = 60;

/// Publishes and takes all jobs, whose bodies are their numbers.
async fn take(scene: &Scene) -> (Deliveries, Vec<Delivery>) {
    for number in 0..JOBS {
        scene.publish(&number.to_string()).await;
    }
    scene.declare_dead().await;
    let queue = scene
        .queue()
        .prefetch(JOBS.into())
        .dead_letter(scene.dead());
    let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
    let mut taken = Vec::new();
    for _ in 0..JOBS {
        taken.push(next(&mut jobs).await);
    }
    (jobs, taken)
}

fn number(body: &[u8]) -> u16 {
    std::str::from_utf8(body).unwrap().parse().unwrap()
}

/// Closes the channel when the server has carried out all acks.
///
/// A quorum queue may have some of them still to do when they have arrived, which a channel that is
/// closed takes with it. It delivers one more job for each that it has done.
async fn close_after(acked: usize, scene: &Scene, mut jobs: Deliveries) {
    for number in JOBS..JOBS + acked as u16 {
        scene.publish(&number.to_string()).await;
    }
    for _ in 0..acked {
        assert!(number(next(&mut jobs).await.as_ref()) >= JOBS);
    }
    close(jobs).await;
    // Unsettled jobs go back a moment after: as many as were published later, and those kept.
    scene.wait_for_ready(JOBS.into()).await;
}

/// Returns those of the first jobs that are left in a queue.
async fn left(scene: &Scene, queue: &str) -> BTreeSet<u16> {
    let mut left = BTreeSet::new();
    while let Some(message) = scene.get(queue).await {
        assert!(left.insert(number(&message.delivery.data)), "twice");
    }
    left.into_iter().filter(|number| *number < JOBS).collect()
}

#[tokio::test]
async fn acks_at_once_are_of_their_own_jobs() {
    for kind in KINDS {
        let scene = Scene::new("acks_at_once_are_of_their_own_jobs", kind).await;
        // The oldest, those in the middle and the last; and jobs that are acked in two steps.
        for (kept, rest) in [
            (&[0_u16][..], &[][..]),
            (&[17, 40], &[1, 2, 3, 50]),
            (&[59], &[0]),
            (&[], &[0, 59]),
        ] {
            let (jobs, taken) = take(&scene).await;
            let acks = |part: Vec<&Delivery>| {
                // Backwards, as they need not end in order.
                let tags: Vec<_> = part.iter().rev().map(|job| job.tag()).collect();
                join_all(tags.into_iter().map(|tag| settle(tag, Verdict::Ack)))
            };
            let of = |job: &Delivery| number(job.as_ref());
            let (now, later): (Vec<_>, Vec<_>) = taken
                .iter()
                .filter(|job| !kept.contains(&of(job)))
                .partition(|job| !rest.contains(&of(job)));
            for acked in acks(now).await {
                acked.unwrap();
            }
            for acked in acks(later).await {
                acked.unwrap();
            }
            close_after(taken.len() - kept.len(), &scene, jobs).await;
            // A quorum queue has them back a moment after the channel is closed.
            scene.wait_for_ready(JOBS.into()).await;
            let left = left(&scene, &scene.name).await;
            assert_eq!(left, kept.iter().copied().collect(), "{kind:?}");
        }
    }
}

#[tokio::test]
async fn acks_beside_other_verdicts_are_of_their_own_jobs() {
    for kind in KINDS {
        let scene = Scene::new("acks_beside_other_verdicts", kind).await;
        scene.declare_dead().await;
        for round in 0..10 {
            let (jobs, taken) = take(&scene).await;
            let verdict = |number: u16| match number % (3 + round) {
                0 => Verdict::Reject,
                1 => Verdict::release(),
                _ => Verdict::Ack,
            };
            let settlements = taken.iter().map(|job| {
                let verdict = verdict(number(job.as_ref()));
                tokio::spawn(settle(job.tag(), verdict))
            });
            for settled in join_all(settlements).await {
                settled.unwrap().unwrap();
            }
            close(jobs).await;
            let released = (0..JOBS).filter(|it| verdict(*it) == Verdict::release());
            scene.wait_for_ready(released.count() as u32).await;
            let with = |it| (0..JOBS).filter(move |number| verdict(*number) == it);
            let dead = left(&scene, &scene.dead()).await;
            assert_eq!(dead, with(Verdict::Reject).collect(), "{kind:?}, {round}");
            let back = left(&scene, &scene.name).await;
            assert_eq!(
                back,
                with(Verdict::release()).collect(),
                "{kind:?}, {round}"
            );
        }
    }
}

#[tokio::test]
async fn an_ack_that_nobody_waits_for_goes_out() {
    for kind in KINDS {
        let scene = Scene::new("an_ack_that_nobody_waits_for_goes_out", kind).await;
        let (jobs, taken) = take(&scene).await;
        let mut acks: Vec<_> = taken
            .iter()
            .map(|job| Box::pin(settle(job.tag(), Verdict::Ack)))
            .collect();
        poll_fn(|cx| {
            for ack in &mut acks {
                assert!(ack.as_mut().poll(cx).is_pending());
            }
            Poll::Ready(())
        })
        .await;
        // One out of three waits.
        let waiting = acks.into_iter().step_by(3);
        for acked in join_all(waiting).await {
            acked.unwrap();
        }
        close_after(taken.len(), &scene, jobs).await;
        assert_eq!(left(&scene, &scene.name).await, BTreeSet::new());
    }
}

#[test]
fn an_ack_after_the_end_of_its_runtime_is_an_error() {
    let other = || Builder::new_multi_thread().enable_all().build().unwrap();
    let runtime = other();
    let (scene, jobs, taken) = runtime.block_on(async {
        let scene = Scene::new("an_ack_after_the_end", KINDS[0]).await;
        let (jobs, taken) = take(&scene).await;
        (scene, jobs, taken)
    });
    runtime.shutdown_background();
    other().block_on(async {
        for job in taken.iter().take(3) {
            let answer = job.tag().settle(Verdict::Ack, reason());
            let answer = timeout(Duration::from_secs(20), answer).await;
            let error = answer.expect("an answer").unwrap_err().error;
            assert!(
                matches!(error, DeliveryError::NotSent | DeliveryError::Stale),
                "{error:?}"
            );
        }
    });
    drop((scene, jobs));
}

#[test]
fn an_ack_that_waits_is_void_when_the_channel_is_opened_anew() {
    let name = "an_ack_that_waits_is_void";
    let recovering = ConnectionProperties::default().enable_auto_recover();
    let lapins = Builder::new_multi_thread().enable_all().build().unwrap();
    let connection = lapins.block_on(named(shared(), name, recovering));
    // Nothing runs on this runtime while nobody blocks on it.
    let ours = Builder::new_current_thread().enable_all().build().unwrap();
    let (scene, jobs, ack) = ours.block_on(async {
        let scene = Scene::new(name, KINDS[0]).await;
        scene.publish("one").await;
        let mut jobs = scene.queue().subscribe(&connection).await.unwrap();
        let mut ack = Box::pin(settle(next(&mut jobs).await.tag(), Verdict::Ack));
        let polled = poll_fn(|cx| Poll::Ready(ack.as_mut().poll(cx))).await;
        assert!(polled.is_pending());
        (scene, jobs, ack)
    });
    lapins.block_on(close_and_recover(&connection, name));
    ours.block_on(async {
        let error = timeout(Duration::from_secs(20), ack).await;
        let error = error.expect("an answer within 20 s").unwrap_err();
        assert!(matches!(error, DeliveryError::NotSent), "{error:?}");
        drop(jobs);
        // lapin may still be about to make the consumer anew, which would outlive the drop.
        drop(connection.close(200, "OK".into()).await);
        let mut jobs = scene.subscribe().await;
        settle(next(&mut jobs).await.tag(), Verdict::Ack)
            .await
            .unwrap();
        scene.assert_empty(jobs).await;
    });
}
