//! Consumers and streams that are deleted, and connections that are lost.

use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use tokio::time::{sleep, timeout};
use tower_sentinel::{
    Job, Verdict,
    broker::nats::{DeliveryError, SubscriptionError, async_nats::jetstream, connect},
    settle::Settle,
};

use super::{SOON, closed, jobs, next, nothing_within, reason, settle};
use crate::proxy::Proxy;

#[tokio::test]
async fn a_deleted_consumer_ends_the_stream_while_it_waits() {
    let jobs = jobs(SOON).await;
    let mut deliveries = jobs.subscribe(4).await;
    let mut next = Box::pin(deliveries.next());
    assert!(
        timeout(Duration::from_millis(100), &mut next)
            .await
            .is_err()
    );
    jobs.context
        .delete_consumer_from_stream("workers", "jobs")
        .await
        .unwrap();
    let error = timeout(SOON, next).await.unwrap().unwrap().unwrap_err();
    assert!(
        matches!(error, SubscriptionError::ConsumerDeleted),
        "{error}"
    );
    assert!(deliveries.next().await.is_none());
}

#[tokio::test]
async fn a_deleted_consumer_or_stream_is_noticed_while_nobody_pulls() {
    for stream in [false, true] {
        let jobs = jobs(SOON).await;
        jobs.publish("a").await;
        let mut deliveries = jobs.subscribe(1).await;
        let _job = next(&mut deliveries).await;
        match stream {
            true => drop(jobs.context.delete_stream("jobs").await.unwrap()),
            false => drop(
                jobs.context
                    .delete_consumer_from_stream("workers", "jobs")
                    .await
                    .unwrap(),
            ),
        }
        let error = closed(&mut deliveries).await.unwrap_err();
        match stream {
            true => assert!(matches!(error, SubscriptionError::StreamDeleted), "{error}"),
            false => assert!(
                matches!(error, SubscriptionError::ConsumerDeleted),
                "{error}"
            ),
        }
        let error = deliveries.next().await.unwrap().unwrap_err().to_string();
        assert_eq!(
            error,
            match stream {
                true => "the stream does not exist",
                false => "the consumer does not exist",
            }
        );
        assert!(deliveries.next().await.is_none());
    }
}

#[tokio::test]
async fn an_answer_to_a_deleted_consumer_is_an_error() {
    let jobs = jobs(SOON).await;
    jobs.publish("a").await;
    let pull = jobs.pull().confirm_timeout(Duration::from_secs(1));
    let mut deliveries = pull.subscribe(&jobs.context).await.unwrap();
    let job = next(&mut deliveries).await;
    jobs.context
        .delete_consumer_from_stream("workers", "jobs")
        .await
        .unwrap();
    let error = settle(&job, Verdict::Ack).await.unwrap_err();
    assert!(matches!(error, DeliveryError::NoConsumer), "{error}");
}

#[tokio::test]
async fn a_settlement_waits_until_somebody_takes_it() {
    // As while a leader is elected.
    for verdict in [Verdict::Ack, Verdict::Reject, Verdict::retry()] {
        let jobs = jobs(SOON * 6).await;
        jobs.publish("a").await;
        let mut deliveries = jobs.subscribe(1).await;
        let job = next(&mut deliveries).await;
        jobs.context
            .delete_consumer_from_stream("workers", "jobs")
            .await
            .unwrap();
        let settling = tokio::spawn(async move { settle(&job, verdict).await });
        sleep(Duration::from_millis(500)).await;
        assert!(!settling.is_finished());
        // A newer server's consumer would not confirm what another one of its name has delivered.
        let mut taken = jobs.client.subscribe("$JS.ACK.jobs.>").await.unwrap();
        let taken = timeout(SOON, taken.next()).await.unwrap().unwrap();
        jobs.client
            .publish(taken.reply.unwrap(), "".into())
            .await
            .unwrap();
        settling.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_dead_letter_waits_until_a_stream_takes_it_and_is_kept_once() {
    let jobs = jobs(SOON * 6).await;
    jobs.publish("a").await;
    let pull = jobs.pull().dead_letter("dead");
    let mut deliveries = pull.subscribe(&jobs.context).await.unwrap();
    let job = next(&mut deliveries).await;
    let dead = jobs.context.get_stream("dead").await.unwrap();
    let config = dead.cached_info().config.clone();
    jobs.context.delete_stream("dead").await.unwrap();
    let settling = tokio::spawn(async move { settle(&job, Verdict::Reject).await });
    sleep(Duration::from_millis(500)).await;
    assert!(!settling.is_finished());
    jobs.context.create_stream(config).await.unwrap();
    settling.await.unwrap().unwrap();
    assert_eq!(jobs.messages("dead").await, 1);
    assert_eq!(jobs.messages("jobs").await, 0);
}

#[tokio::test]
async fn without_a_response_an_ack_comes_back_and_a_nak_is_moot() {
    for (verdict, comes_back) in [
        (Verdict::Ack, true),
        (Verdict::Reject, true),
        (Verdict::retry(), false),
        (Verdict::release_after(Duration::from_secs(1)), false),
    ] {
        let jobs = jobs(SOON * 6).await;
        jobs.publish("a").await;
        let proxy = Proxy::start(jobs.server.address()).await;
        let client = connect(format!("nats://{}", proxy.address()))
            .await
            .unwrap();
        let pull = jobs.pull().confirm_timeout(Duration::from_secs(1));
        let context = jetstream::new(client);
        let mut deliveries = pull.subscribe(&context).await.unwrap();
        let job = next(&mut deliveries).await;
        proxy.stall();
        let settled = job.tag().settle(verdict, reason("it failed")).await;
        let unsettled = settled.unwrap_err();
        assert!(
            matches!(unsettled.error, DeliveryError::Unconfirmed { .. }),
            "{verdict}: {unsettled}"
        );
        assert_eq!(unsettled.tag.is_some(), comes_back, "{verdict}");
        assert_eq!(unsettled.is_moot(), !comes_back, "{verdict}");
    }
}

#[tokio::test]
async fn a_drained_client_ends_the_stream() {
    let jobs = jobs(SOON).await;
    let mut deliveries = jobs.subscribe(1).await;
    jobs.client.drain().await.unwrap();
    let error = closed(&mut deliveries).await.unwrap_err();
    assert!(matches!(error, SubscriptionError::ClientClosed), "{error}");
}

#[tokio::test]
async fn a_server_that_stays_away_ends_the_stream() {
    let mut jobs = jobs(SOON).await;
    let pull = jobs.pull().reconnect_limit(Duration::from_secs(1));
    let mut deliveries = pull.subscribe(&jobs.context).await.unwrap();
    assert!(deliveries.next().now_or_never().is_none());
    jobs.server.kill();
    let error = closed(&mut deliveries).await.unwrap_err();
    assert!(
        matches!(error, SubscriptionError::Unreachable { .. }),
        "{error}"
    );
}

#[tokio::test]
async fn a_tag_outlives_its_connection() {
    // A server that is killed may have forgotten its delivery. It confirms no ack of that, and the job
    // comes back.
    while !acks_after_a_restart().await {}
}

/// Acks a job on a server that was killed and restarted; returns whether it still knew the delivery.
async fn acks_after_a_restart() -> bool {
    let mut jobs = jobs(SOON * 6).await;
    jobs.publish("a").await;
    jobs.publish("b").await;
    let mut deliveries = jobs.subscribe(1).await;
    let job = next(&mut deliveries).await;
    jobs.server.kill();
    jobs.server.restart();
    let mut tag = job.tag();
    // The first try may have gone to the server that was killed.
    while let Err(unsettled) = tag.settle(Verdict::Ack, reason("")).await {
        tag = unsettled.tag.expect("an ack may be tried again");
        let info = jobs.consumer.get_info().await;
        if info.is_ok_and(|info| info.delivered.stream_sequence == 0) {
            return false;
        }
    }
    let job = next(&mut deliveries).await;
    assert_eq!(job.as_ref(), b"b");
    settle(&job, Verdict::Ack).await.unwrap();
    assert_eq!(jobs.messages("jobs").await, 0);
    true
}

#[tokio::test]
async fn a_nak_is_not_sent_while_there_is_no_connection() {
    let jobs = jobs(SOON * 6).await;
    jobs.publish("a").await;
    // A server that is killed may forget the delivery.
    let proxy = Proxy::start(jobs.server.address()).await;
    let client = connect(format!("nats://{}", proxy.address()))
        .await
        .unwrap();
    let pull = jobs.pull().confirm_timeout(Duration::from_secs(2));
    let mut deliveries = pull
        .subscribe(&jetstream::new(client.clone()))
        .await
        .unwrap();
    let job = next(&mut deliveries).await;
    proxy.down();
    while client.connection_state().to_string() == "connected" {
        sleep(Duration::from_millis(10)).await;
    }
    let unsettled = job.tag().settle(Verdict::retry(), reason("down")).await;
    let unsettled = unsettled.unwrap_err();
    assert!(
        matches!(unsettled.error, DeliveryError::Disconnected { .. }),
        "{unsettled}"
    );
    proxy.up();
    nothing_within(&mut deliveries, Duration::from_secs(1)).await;
    let tag = unsettled.tag.expect("nothing was sent");
    tag.settle(Verdict::retry(), reason("down")).await.unwrap();
    assert_eq!(next(&mut deliveries).await.tag().deliveries(), Some(2));
}
