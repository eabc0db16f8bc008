//! A channel that is gone does not delay the next one.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tower::{ServiceBuilder, limit::ConcurrencyLimit};
use tower_sentinel::{
    Consumer, SentinelLayer, SettlePolicy, Verdict, ack_on_success, consumer::EndCause,
    outcome::OutcomeKind,
};

use crate::{
    consumer::{
        ends, here,
        reconnecting::{Broker, Try, service},
        stack,
    },
    support::{
        Fate, Work, Worker,
        subscription::{Channel, Delivery, End, Refusal},
        until,
    },
};

const MS: fn(u64) -> Duration = Duration::from_millis;

/// Loses each channel half a second after a job of it was taken.
fn lose_when_busy(channels: &[Channel]) {
    for channel in channels {
        let channel = channel.clone();
        tokio::spawn(async move {
            until(|| channel.taken() > 0).await;
            sleep(MS(500)).await;
            channel.lose();
        });
    }
}

#[tokio::test(start_paused = true)]
async fn the_next_delivery_does_not_wait_for_a_job_of_a_channel_that_is_gone() {
    for tasks in [1, 3] {
        let (lost, next) = (Channel::of([Fate::Hang; 2]), Channel::of([Fate::Value]));
        lose_when_busy(std::slice::from_ref(&lost));
        let broker = Broker::new([Try::Channel(lost.clone()), Try::Channel(next.clone())]);
        let connect = broker.clone();
        let consumer = Consumer::reconnecting(move || connect.connect(), service)
            .tasks(tasks)
            .backoff(MS(100)..=MS(500))
            .random(|| 1.0)
            .with_graceful_shutdown(sleep(MS(60_000)));
        let consuming = tokio::spawn(ends(consumer));
        sleep(MS(2_000)).await;
        assert_eq!(broker.asked(), [0, 600], "{tasks} tasks");
        assert_eq!(next.verdicts(), [Verdict::Ack]);
        assert_eq!((lost.stale(), lost.closed()), (0, 0));
        // The first drains for as long as it may, and is refused.
        let summary = consuming.await.unwrap().unwrap();
        assert_eq!((summary.called, summary.answered), (3, 1));
        assert_eq!((summary.failed, summary.unanswered), (2, 2));
        assert_eq!(
            (lost.stale(), lost.closed(), lost.settled()),
            (2, 1, vec![])
        );
        let drained = lost.closed_at() - broker.started();
        assert!((MS(30_500)..MS(30_600)).contains(&drained), "{drained:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_channel_whose_tags_are_good_drains_first() {
    let (ended, next) = (Channel::of([Fate::Value; 2]), Channel::of([]));
    let ending = ended.clone();
    tokio::spawn(async move {
        sleep(MS(500)).await;
        ending.end(End::Failed);
    });
    let broker = Broker::new([Try::Channel(ended.clone()), Try::Channel(next)]);
    let connect = broker.clone();
    let consumer = Consumer::reconnecting(move || connect.connect(), service)
        .backoff(MS(100)..=MS(500))
        .random(|| 1.0)
        .with_graceful_shutdown(sleep(MS(60_000)));
    let summary = ends(consumer).await.unwrap();
    assert_eq!(broker.asked(), [0, 1_100]);
    assert_eq!(
        (ended.verdicts(), summary.answered),
        (vec![Verdict::Ack; 2], 2)
    );
}

#[tokio::test(start_paused = true)]
async fn a_settlement_may_be_the_first_to_know_that_a_channel_is_gone() {
    let (lost, next) = (Channel::of([Fate::Value, Fate::Hang]), Channel::of([]));
    let losing = lost.clone();
    tokio::spawn(async move {
        sleep(MS(500)).await;
        losing.lose_silently();
    });
    let broker = Broker::new([Try::Channel(lost.clone()), Try::Channel(next)]);
    let connect = broker.clone();
    let consumer = Consumer::reconnecting(move || connect.connect(), service)
        .backoff(MS(100)..=MS(500))
        .random(|| 1.0)
        .with_graceful_shutdown(sleep(MS(60_000)));
    let summary = ends(consumer).await.unwrap();
    assert_eq!(broker.asked(), [0, 1_100]);
    assert_eq!((summary.unanswered, lost.stale()), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn a_channel_may_go_while_it_drains() {
    let (lost, next) = (Channel::of([Fate::Value]), Channel::of([]));
    // The settlement of the first job is lost, which begins the drain, and then the channel is lost.
    lost.refuse(Refusal::Fails);
    let losing = lost.clone();
    tokio::spawn(async move {
        sleep(MS(500)).await;
        losing.publish([Fate::Value, Fate::Hang]);
        sleep(MS(700)).await;
        losing.lose_silently();
    });
    let broker = Broker::new([Try::Channel(lost.clone()), Try::Channel(next)]);
    let connect = broker.clone();
    let make_service = |shutdown| stack(3, shutdown, here());
    let consumer = Consumer::reconnecting(move || connect.connect(), make_service)
        .backoff(MS(100)..=MS(500))
        .random(|| 1.0)
        .with_graceful_shutdown(sleep(MS(60_000)));
    let summary = ends(consumer).await.unwrap();
    assert_eq!(broker.asked(), [0, 1_300]);
    assert_eq!((summary.unanswered, lost.closed()), (3, 1));
}

#[tokio::test(start_paused = true)]
async fn no_more_than_one_session_drains_beside_another() {
    let channels = [(); 4].map(|()| Channel::of([Fate::Hang; 2]));
    lose_when_busy(&channels);
    let broker = Broker::new(channels.clone().map(Try::Channel));
    let connect = broker.clone();
    let consumer = Consumer::reconnecting(move || connect.connect(), service)
        .backoff(MS(100)..=MS(100))
        .random(|| 1.0)
        .max_attempts(20)
        .drain_timeout(MS(1_000_000));
    let consuming = tokio::spawn(ends(consumer));
    for n in 1..4 {
        until(|| channels[n].taken() == 2).await;
        let open = channels[..n].iter().filter(|it| it.closed() == 0);
        assert_eq!(open.count(), 1, "before the {n}th");
    }
    drop(consuming);
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_waits_for_what_drains_beside_and_a_second_one_stops_it() {
    for forced in [false, true] {
        let (lost, next) = (Channel::of([Fate::Hang]), Channel::of([Fate::Value]));
        lose_when_busy(std::slice::from_ref(&lost));
        let broker = Broker::new([Try::Channel(lost.clone()), Try::Channel(next.clone())]);
        let (connect, started) = (broker.clone(), broker.started());
        let mut consumer = Consumer::reconnecting(move || connect.connect(), service)
            .backoff(MS(100)..=MS(500))
            .random(|| 1.0)
            .with_graceful_shutdown(sleep(MS(2_000)));
        if forced {
            consumer = consumer.with_forced_shutdown(sleep(MS(5_000)));
        }
        let summary = ends(consumer).await.unwrap();
        let after = MS(if forced { 5_000 } else { 30_500 });
        let took = started.elapsed();
        assert!((after..after + MS(100)).contains(&took), "{took:?}");
        assert_eq!((summary.answered, summary.unanswered), (1, 1));
        assert_eq!((lost.closed(), next.closed()), (1, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn sessions_whose_channel_goes_at_once_are_tries_that_failed() {
    let channels = [(); 5].map(|()| Channel::of([Fate::Hang]));
    lose_when_busy(&channels);
    let broker = Broker::new(channels.map(Try::Channel));
    let connect = broker.clone();
    let consumer = Consumer::reconnecting(move || connect.connect(), service)
        .backoff(MS(100)..=MS(1_000))
        .random(|| 1.0)
        .max_attempts(3);
    let error = ends(consumer).await.unwrap_err();
    assert!(matches!(error.cause(), EndCause::Stream(_)));
    // All are counted, those too that drained beside another.
    assert_eq!((broker.asked().len(), error.summary().called), (3, 3));
    assert_eq!(error.summary().unanswered, 3);
}

#[tokio::test(start_paused = true)]
async fn the_backoff_starts_over_after_a_session_that_worked_and_whose_channel_went() {
    // A job works for a second.
    for (fates, gaps) in [
        (vec![Fate::Value, Fate::Hang], [1_100, 1_100, 1_100]),
        (vec![Fate::Hang], [1_100, 1_200, 1_400]),
    ] {
        for tasks in [1, 2] {
            let channels = [(); 4].map(|()| Channel::of(fates.clone()));
            for channel in channels.clone() {
                tokio::spawn(async move {
                    until(|| channel.taken() > 0).await;
                    sleep(MS(1_001)).await;
                    channel.lose();
                });
            }
            let broker = Broker::new(channels.map(Try::Channel));
            let connect = broker.clone();
            let consumer = Consumer::reconnecting(move || connect.connect(), service)
                .tasks(tasks)
                .backoff(MS(100)..=MS(10_000))
                .random(|| 1.0)
                .with_graceful_shutdown(sleep(MS(4_000)));
            ends(consumer).await.unwrap();
            let asked = broker.asked();
            let found = asked.windows(2).map(|it| (it[1] - it[0]) / 100 * 100);
            let found: Vec<_> = found.collect();
            assert_eq!(found, gaps, "{tasks} tasks: {fates:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn clones_of_one_service_have_one_gate_also_while_one_session_drains() {
    let (lost, next) = (Channel::of([Fate::Hang]), Channel::of([Fate::Hang; 5]));
    lose_when_busy(std::slice::from_ref(&lost));
    let broker = Broker::new([Try::Channel(lost), Try::Channel(next.clone())]);
    let sentinel = ServiceBuilder::new()
        .layer(SentinelLayer::new(SettlePolicy::new(ack_on_success())).no_timeout())
        .map_request(|delivery: Delivery| Work::new(delivery.fate))
        .service(Worker::default());
    let shared = ConcurrencyLimit::new(sentinel, 3);
    let consumer = Consumer::reconnecting(
        move || broker.connect(),
        move |_: CancellationToken| shared.clone(),
    )
    .stop_timeout(MS(1_000))
    .with_graceful_shutdown(sleep(MS(10_000)));
    let consuming = tokio::spawn(ends(consumer));
    sleep(MS(9_000)).await;
    // One runs from before, and a service may keep the permit of the job that it was ready for.
    assert!((1..=2).contains(&next.taken()), "{}", next.taken());
    let summary = consuming.await.unwrap().unwrap();
    assert_eq!(summary.abandoned, summary.called);
    assert_eq!(summary.outcomes(OutcomeKind::Completed), 0);
}

#[tokio::test(start_paused = true)]
async fn a_plain_consumer_stops_at_once_what_nobody_can_settle() {
    for tasks in [1, 3] {
        for silently in [false, true] {
            let lost = Channel::of([Fate::Hang; 3]);
            let losing = lost.clone();
            tokio::spawn(async move {
                until(|| losing.taken() == 3).await;
                sleep(MS(500)).await;
                match silently {
                    // The drain begins as a settlement fails, which is the first to know.
                    true => {
                        losing.lose_silently();
                        losing.publish([Fate::Value]);
                    }
                    false => losing.lose(),
                }
            });
            let shutdown = CancellationToken::new();
            let services = [(); 3].map(|()| stack(4, shutdown.clone(), here()));
            let consumer = Consumer::parallel(lost.subscribe(), services.into_iter().take(tasks))
                .shutdown(shutdown.clone());
            let started = Instant::now();
            let error = ends(consumer).await.unwrap_err();
            // A job works for a second.
            let most = if silently { MS(1_600) } else { MS(600) };
            assert!(started.elapsed() < most, "{tasks}: {:?}", started.elapsed());
            assert!(shutdown.is_cancelled());
            let summary = error.summary();
            assert_eq!((summary.answered, summary.abandoned), (0, 0));
            assert_eq!((summary.unanswered, lost.closed()), (summary.called, 1));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_drain_ends_early_when_its_channel_goes() {
    for reconnecting in [false, true] {
        let lost = Channel::of([Fate::Hang, Fate::Value]);
        let losing = lost.clone();
        tokio::spawn(async move {
            until(|| losing.taken() == 2).await;
            sleep(MS(700)).await;
            losing.lose_silently();
        });
        let started = Instant::now();
        let signal = sleep(MS(500));
        let summary = if reconnecting {
            let broker = Broker::new([Try::Channel(lost.clone())]);
            let consumer = Consumer::reconnecting(move || broker.connect(), service);
            ends(consumer.with_graceful_shutdown(signal)).await.unwrap()
        } else {
            let shutdown = CancellationToken::new();
            let service = stack(2, shutdown.clone(), here());
            let consumer = Consumer::new(lost.subscribe(), service).shutdown(shutdown);
            ends(consumer.with_graceful_shutdown(signal)).await.unwrap()
        };
        // At the latest, when the second job is done, and is refused.
        let took = started.elapsed();
        assert!((MS(700)..MS(1_100)).contains(&took), "{took:?}");
        assert_eq!((summary.called, summary.unanswered), (2, 2));
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_that_does_not_stop_holds_a_consumer_up_for_a_short_time() {
    let lost = Channel::of([Fate::Hang]);
    lose_when_busy(std::slice::from_ref(&lost));
    let shutdown = CancellationToken::new();
    let policy = SettlePolicy::new(ack_on_success());
    let layer = SentinelLayer::new(policy).grace(MS(3_600_000));
    let service = ServiceBuilder::new()
        .layer(layer.shutdown(shutdown.clone()))
        .map_request(|delivery: Delivery| Work::new(delivery.fate))
        .service(Worker::default());
    let consumer = Consumer::new(lost.subscribe(), service).shutdown(shutdown);
    let started = Instant::now();
    let error = ends(consumer).await.unwrap_err();
    let took = started.elapsed();
    assert!((MS(10_500)..MS(10_600)).contains(&took), "{took:?}");
    assert_eq!(error.summary().abandoned, 1);
}
