//! Channels, connections and queues that are closed or lost.

use std::{future::poll_fn, pin::Pin, time::Duration};

use futures_util::StreamExt;
use tokio::time::{sleep, timeout};
use tower_sentinel::{
    Job, Verdict,
    broker::rabbitmq::{
        self, DeliveryError, QueueKind, SubscriptionError,
        lapin::{ConnectionProperties, options::QueueDeleteOptions},
    },
    consumer::Subscription,
    settle::Settle,
};

use super::{
    KINDS, Scene, close, close_and_recover, close_now, closed, end, named, next,
    server::{Server, Version, shared, version},
    settle,
};

#[tokio::test]
async fn a_closed_channel_gives_its_jobs_back() {
    for kind in KINDS {
        let scene = Scene::new("a_closed_channel_gives_its_jobs_back", kind).await;
        let mut jobs = scene.subscribe().await;
        scene.publish("one").await;
        scene.publish("two").await;
        let stale = next(&mut jobs).await.tag();
        close(jobs).await;
        let error = settle(stale, Verdict::Ack).await;
        assert!(matches!(error, Err(DeliveryError::Stale)), "{error:?}");

        // The end of a worker that does not close its channel is that of a drop.
        let mut jobs = scene.subscribe().await;
        let stale = next(&mut jobs).await.tag();
        drop(jobs);
        let error = settle(stale.clone(), Verdict::Ack).await;
        assert!(matches!(error, Err(DeliveryError::Stale)), "{error:?}");

        let mut jobs = scene.subscribe().await;
        for body in ["one", "two"] {
            let job = next(&mut jobs).await;
            assert_eq!(job.as_ref(), body.as_bytes());
            assert_eq!(job.tag().redelivered(), Some(true));
            settle(job.tag(), Verdict::Ack).await.unwrap();
        }
        scene.assert_empty(jobs).await;
        // A tag that lives on had not kept the channel open.
        drop(stale);
    }
}

#[tokio::test]
async fn a_deleted_queue_ends_the_stream() {
    for kind in KINDS {
        let scene = Scene::new("a_deleted_queue_ends_the_stream", kind).await;
        let mut jobs = scene.subscribe().await;
        scene.publish("one").await;
        let job = next(&mut jobs).await;
        let options = QueueDeleteOptions::default();
        let deleted = scene
            .admin
            .queue_delete(scene.name.as_str().into(), options);
        deleted.await.unwrap();
        let error = end(&mut jobs).await;
        assert!(
            matches!(error, SubscriptionError::Cancelled { .. }),
            "{error:?}"
        );
        // Its channel is open until it is given up.
        settle(job.tag(), Verdict::Ack).await.unwrap();
        poll_fn(|cx| Pin::new(&mut jobs).poll_close(cx)).await;
        let error = settle(job.tag(), Verdict::Ack).await;
        assert!(matches!(error, Err(DeliveryError::AlreadySettled)));
    }
}

#[tokio::test]
async fn a_connection_that_the_server_closes_ends_the_stream() {
    for kind in KINDS {
        let test = "a_connection_that_the_server_closes_ends_the_stream";
        let scene = Scene::new(test, kind).await;
        let mut jobs = scene.subscribe().await;
        scene.publish("one").await;
        let stale = next(&mut jobs).await.tag();
        shared().close_connection(&scene.name);
        // Without the stream being polled, as by a consumer whose service is unready.
        let error = closed(&mut jobs).await.unwrap_err();
        let is_closed = matches!(error, SubscriptionError::ConnectionClosed(_));
        assert!(is_closed, "{error:?}");
        let line = format!("{error:#}");
        assert!(line.contains("closed by the test"), "{line}");
        end(&mut jobs).await;
        let error = settle(stale, Verdict::Ack).await;
        assert!(matches!(error, Err(DeliveryError::Stale)), "{error:?}");

        let connection = rabbitmq::connect(&shared().address()).await.unwrap();
        let mut jobs = scene.queue().subscribe(&connection).await.unwrap();
        let twin = next(&mut jobs).await;
        assert_eq!(twin.tag().redelivered(), Some(true));
        settle(twin.tag(), Verdict::Ack).await.unwrap();
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn a_connection_that_the_user_closes_ends_the_stream() {
    let test = "a_connection_that_the_user_closes_ends_the_stream";
    let scene = Scene::new(test, QueueKind::Classic).await;
    let mut jobs = scene.subscribe().await;
    scene.connection.close(200, "OK".into()).await.unwrap();
    let error = end(&mut jobs).await;
    let is_closed = matches!(error, SubscriptionError::ConnectionClosed(_));
    assert!(is_closed, "{error:?}");
}

#[tokio::test]
async fn the_recovery_of_lapin_sends_no_stale_tag() {
    for kind in KINDS {
        let scene = Scene::new("the_recovery_of_lapin_sends_no_stale_tag", kind).await;
        let name = format!("{}.recovering", scene.name);
        let recovering = ConnectionProperties::default().enable_auto_recover();
        let connection = named(shared(), &name, recovering).await;
        let mut jobs = scene.queue().subscribe(&connection).await.unwrap();
        scene.publish("one").await;
        let stale = next(&mut jobs).await.tag();
        close_and_recover(&connection, &name).await;
        let error = settle(stale, Verdict::Ack).await;
        assert!(matches!(error, Err(DeliveryError::Stale)), "{error:?}");
        // The stream ends, or lapin has dropped its error with the jobs that it had received, and goes on.
        let twin = timeout(Duration::from_secs(20), jobs.next()).await;
        drop(twin.expect("an item within 20 s"));
        drop(jobs);
        // lapin may still be about to make the consumer anew, which would outlive the drop.
        drop(connection.close(200, "OK".into()).await);
        let mut jobs = scene.subscribe().await;
        settle(next(&mut jobs).await.tag(), Verdict::Ack)
            .await
            .unwrap();
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn the_consumer_timeout_ends_the_subscription() {
    let settings = "{consumer_timeout, 1000}, {channel_tick_interval, 200}";
    let server = Server::start(settings);
    for kind in KINDS {
        let cancels = version() >= Version::V4_3;
        if cancels && kind == QueueKind::Classic {
            continue; // It has none.
        }
        let test = "the_consumer_timeout_ends_the_subscription";
        let scene = Scene::on(&server, test, kind).await;
        let mut jobs = scene.subscribe().await;
        scene.publish("one").await;
        let stale = next(&mut jobs).await.tag();
        let error = end(&mut jobs).await;
        if cancels {
            let is_cancelled = matches!(error, SubscriptionError::Cancelled { .. });
            assert!(is_cancelled, "{error:?}");
        } else {
            let is_closed = matches!(error, SubscriptionError::ChannelClosed(_));
            assert!(is_closed, "{error:?}");
            let error = settle(stale, Verdict::Ack).await;
            assert!(matches!(error, Err(DeliveryError::Stale)), "{error:?}");
        }
        // The connection lives.
        let mut jobs = scene.subscribe().await;
        settle(next(&mut jobs).await.tag(), Verdict::Ack)
            .await
            .unwrap();
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn a_retry_whose_channel_ends_while_it_waits_is_not_published() {
    let settings = "{consumer_timeout, 1000}, {channel_tick_interval, 200}";
    let server = Server::start(settings);
    let test = "a_retry_whose_channel_ends_while_it_waits";
    let scene = Scene::on(&server, test, QueueKind::Quorum).await;
    let mut jobs = scene.subscribe().await;
    scene.publish("one").await;
    let tag = next(&mut jobs).await.tag();
    // While it waits to use a new retry queue, the server closes the channel.
    let verdict = Verdict::retry_after(Duration::from_millis(200));
    let (settled, ended) = tokio::join!(settle(tag, verdict), end(&mut jobs));
    match version() >= Version::V4_3 {
        true => {
            let is_cancelled = matches!(ended, SubscriptionError::Cancelled { .. });
            assert!(is_cancelled, "{ended:?}");
            assert!(matches!(settled, Err(DeliveryError::Lost)), "{settled:?}");
            drop(close_now(jobs).await);
        }
        false => {
            let is_closed = matches!(ended, SubscriptionError::ChannelClosed(_));
            assert!(is_closed, "{ended:?}");
            assert!(matches!(settled, Err(DeliveryError::Stale)), "{settled:?}");
        }
    }
    let mut jobs = scene.subscribe().await;
    let job = next(&mut jobs).await;
    assert_eq!(job.as_ref(), b"one");
    settle(job.tag(), Verdict::Ack).await.unwrap();
    // For longer than the delay of a second one.
    sleep(Duration::from_millis(500)).await;
    scene.assert_empty(jobs).await;
}
