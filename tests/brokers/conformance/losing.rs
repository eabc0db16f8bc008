//! Jobs of a connection or a broker that is lost.

use std::{collections::BTreeSet, time::Duration};

use futures_util::{StreamExt, future::join_all, stream};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tower_sentinel::{
    Job, Verdict, ack_on_success,
    consumer::{EndCause, Summary},
    settle::Settle,
};

use super::{
    JobOf, PATIENCE, TestBroker, assert_deliveries, bodies, body, eventually, is_lost, left,
    reason, sorted, take, take_n,
    worker::{Refused, Runs, Setup},
};

async fn publish_n<B: TestBroker>(broker: &B, n: usize) -> Vec<String> {
    let bodies: Vec<_> = (0..n).map(|n| format!("{n:05}")).collect();
    let publishing = stream::iter(&bodies).map(|body| broker.publish(body));
    let publishing = publishing.buffered(64);
    publishing
        .for_each(async |published| published.unwrap())
        .await;
    bodies
}

pub(crate) async fn a_lost_connection_redelivers_what_it_held<B: TestBroker>(broker: &B) {
    let published = publish_n(broker, 3).await;
    let mut jobs = broker.subscribe(3).await.unwrap();
    take_n::<B>(&mut jobs, 3).await;
    broker.cut().await;
    assert!(is_lost::<B>(&mut jobs).await);
    redelivers(broker, published).await;
}

async fn redelivers<B: TestBroker>(broker: &B, published: Vec<String>) {
    let mut jobs = broker.subscribe(3).await.unwrap();
    let again = take_n::<B>(&mut jobs, published.len()).await;
    assert_eq!(sorted(bodies(&again)), published);
    for job in again {
        let tag = job.tag();
        assert_deliveries(
            broker,
            &tag,
            if broker.charges_lost_deliveries() {
                2
            } else {
                1
            },
        );
        assert_ne!(tag.redelivered(), Some(false));
        tag.settle(Verdict::Ack, reason()).await.unwrap();
    }
    left(broker, 0).await;
}

pub(crate) async fn a_stale_tag_is_refused_while_its_twin_settles<B: TestBroker>(broker: &B) {
    broker.publish("one").await.unwrap();
    let mut jobs = broker.subscribe(1).await.unwrap();
    let stale = take::<B>(&mut jobs).await;
    broker.cut().await;
    assert!(is_lost::<B>(&mut jobs).await);
    let mut jobs = broker.subscribe(1).await.unwrap();
    let twin = take::<B>(&mut jobs).await.tag();
    for verdict in [
        Verdict::Ack,
        Verdict::retry(),
        Verdict::release(),
        Verdict::Reject,
    ] {
        let refused = stale.tag().settle(verdict, reason()).await.unwrap_err();
        assert!(refused.tag.is_none(), "{verdict}: {refused}");
    }
    assert_eq!(broker.backlog().await.unwrap().total, 1);
    twin.settle(Verdict::Ack, reason()).await.unwrap();
    left(broker, 0).await;
}

pub(crate) async fn a_cut_in_the_middle_of_a_settlement_loses_nothing<B: TestBroker>(broker: &B) {
    let published = publish_n(broker, 5).await;
    let mut jobs = broker.subscribe(5).await.unwrap();
    let held = take_n::<B>(&mut jobs, 5).await;
    broker.stall().await;
    let settling = held.iter().map(|job| {
        let body = body(job);
        let settled = job.tag().settle(Verdict::Ack, reason());
        async move {
            (
                body,
                timeout(PATIENCE, settled)
                    .await
                    .expect("an answer ends")
                    .is_ok(),
            )
        }
    });
    let (settled, ()) = tokio::join!(join_all(settling), async {
        sleep(Duration::from_millis(200)).await;
        broker.cut().await;
    });
    assert!(is_lost::<B>(&mut jobs).await);

    let proven = settled
        .into_iter()
        .filter(|(_, ok)| *ok && B::ACK_IS_CONFIRMED);
    let proven: BTreeSet<_> = proven.map(|(body, _)| body).collect();
    let mut jobs = broker.subscribe(5).await.unwrap();
    let started = Instant::now();
    while broker.backlog().await.unwrap().total > 0 {
        assert!(
            started.elapsed() < PATIENCE,
            "{:?} is left",
            broker.backlog().await.unwrap()
        );
        let Ok(job) = timeout(Duration::from_millis(100), jobs.next()).await else {
            continue;
        };
        let job = job.unwrap().unwrap();
        assert!(published.contains(&body(&job)));
        assert!(!proven.contains(&body(&job)), "{} was acked", body(&job));
        job.tag().settle(Verdict::Ack, reason()).await.unwrap();
    }
}

/// The job runs until the next one was, and its session may drain for longer than anybody waits here.
pub(crate) async fn a_job_of_a_lost_connection_holds_up_no_other<B: TestBroker + 'static>(
    broker: &B,
) {
    broker.publish("one").await.unwrap();
    let (runs, may_end, stop) = (
        Runs::default(),
        CancellationToken::new(),
        CancellationToken::new(),
    );
    let handler = {
        let (runs, may_end) = (runs.clone(), may_end.clone());
        move |job: JobOf<B>| {
            let is_first = runs.total() == 0;
            runs.begin(&body(&job));
            let may_end = may_end.clone();
            async move {
                if is_first {
                    may_end.cancelled().await;
                }
                Ok::<_, Refused>(())
            }
        }
    };
    let setup = Setup {
        limit: 10 * PATIENCE,
        drain: 10 * PATIENCE,
        ..Setup::new(1, ack_on_success())
    };
    let working = setup.work_on(broker, None, &stop, handler);
    let losing = async {
        eventually(1, async || runs.total()).await;
        broker.cut().await;
        broker.publish("two").await.unwrap();
        eventually(true, async || runs.of_each().contains_key("two")).await;
        left(broker, 0).await;
        assert!(!may_end.is_cancelled());
        may_end.cancel();
        stop.cancel();
    };
    let (ended, ()) = tokio::join!(working, losing);
    let summary = ended.unwrap();
    // The first run of the first job is unsettled.
    assert_eq!((summary.called, summary.verdicts(Verdict::Ack)), (3, 2));
    assert_eq!((summary.unanswered, summary.abandoned), (1, 0));
}

pub(crate) async fn a_broker_that_is_down_is_an_error_of_connecting<B: TestBroker>(broker: &B) {
    broker.kill().await;
    let refused = timeout(PATIENCE, broker.subscribe(1)).await;
    assert!(refused.expect("no connection is an answer").is_err());
    broker.revive().await;
    broker.publish("one").await.unwrap();
    let mut jobs = broker.subscribe(1).await.unwrap();
    take::<B>(&mut jobs).await;
}

pub(crate) async fn a_consumer_waits_for_a_broker_that_is_down_at_the_start<B>(broker: &B)
where
    B: TestBroker + 'static,
{
    broker.kill().await;
    let stop = CancellationToken::new();
    let handler = |_: JobOf<B>| async { Ok::<_, Refused>(()) };
    let setup = Setup::new(5, ack_on_success());
    let (ended, ()) = tokio::join!(setup.work_on(broker, None, &stop, handler), async {
        sleep(Duration::from_millis(500)).await;
        broker.revive().await;
        publish_n(broker, 3).await;
        left(broker, 0).await;
        stop.cancel();
    });
    let summary = ended.unwrap();
    assert_eq!((summary.called, summary.verdicts(Verdict::Ack)), (3, 3));
}

pub(crate) async fn a_consumer_with_a_limit_of_tries_tells_that_the_broker_is_down<B>(broker: &B)
where
    B: TestBroker + 'static,
{
    broker.kill().await;
    let handler = |_: JobOf<B>| async { Ok::<_, Refused>(()) };
    let setup = Setup::new(5, ack_on_success());
    let stop = CancellationToken::new();
    let working = setup.work_on(broker, Some(3), &stop, handler);
    let ended = timeout(PATIENCE, working).await;
    let error = ended.expect("three tries end").unwrap_err();
    assert!(matches!(error.cause(), EndCause::Connect(_)), "{error}");
    assert_eq!(*error.summary(), Summary::default());
}

pub(crate) async fn a_killed_broker_ends_the_subscription<B: TestBroker>(broker: &B) {
    let published = publish_n(broker, 2).await;
    let mut jobs = broker.subscribe(2).await.unwrap();
    take_n::<B>(&mut jobs, 2).await;
    broker.kill().await;
    assert!(is_lost::<B>(&mut jobs).await);
    assert!(matches!(jobs.next().await, Some(Err(_))));
    assert!(jobs.next().await.is_none());
    broker.revive().await;

    let mut jobs = broker.subscribe(2).await.unwrap();
    let again = take_n::<B>(&mut jobs, 2).await;
    assert_eq!(sorted(bodies(&again)), published);
    for job in again {
        job.tag().settle(Verdict::Ack, reason()).await.unwrap();
    }
    left(broker, 0).await;
}

pub(crate) async fn no_job_is_lost_when_the_broker_is_killed<B: TestBroker + 'static>(broker: &B) {
    survives(broker, 1).await;
}

pub(crate) async fn no_job_is_lost_in_twenty_kills<B: TestBroker + 'static>(broker: &B) {
    survives(broker, 20).await;
}

/// Works on many jobs with a consumer that reconnects, while the broker is killed.
async fn survives<B: TestBroker + 'static>(broker: &B, kills: usize) {
    const PREFETCH: usize = 50;
    let published = publish_n(broker, B::MANY).await;
    let runs = Runs::default();
    let handler = {
        let runs = runs.clone();
        move |job: JobOf<B>| {
            let runs = runs.clone();
            async move {
                runs.begin(&body(&job));
                sleep(Duration::from_millis(2)).await;
                Ok::<_, Refused>(())
            }
        }
    };
    let stop = CancellationToken::new();
    let setup = Setup {
        limit: PATIENCE,
        ..Setup::new(PREFETCH, ack_on_success())
    };
    let working = setup.work_on(broker, None, &stop, handler);
    let killing = async {
        for kill in 1..=kills {
            let begun = B::MANY * kill / (kills + 1);
            eventually(true, async || runs.of_each().len() >= begun).await;
            broker.kill().await;
            broker.revive().await;
        }
        left(broker, 0).await;
        stop.cancel();
    };
    let (ended, ()) = tokio::join!(working, killing);
    assert_eq!(ended.unwrap().abandoned, 0);

    let of_each = runs.of_each();
    assert!(of_each.keys().eq(&published), "{} ran", of_each.len());
    let duplicates = runs.total() as usize - published.len();
    let (queue, (major, minor)) = B::server();
    println!(
        "{queue} {major}.{minor}: {kills} kills, {} jobs, none lost, {duplicates} run again",
        published.len()
    );
    let unproven = match B::ACK_IS_CONFIRMED {
        true => Some(0),
        false => B::UNPROVEN,
    };
    if let Some(unproven) = unproven {
        // Only jobs that were unsettled, or settled without proof, at a kill.
        assert!(duplicates <= kills * (PREFETCH + unproven));
    }
    assert!(broker.dead_letters().await.unwrap().is_empty());
}
