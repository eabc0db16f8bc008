//! Effects of each verdict on a message.

use tower_sentinel::{
    Job, Verdict,
    broker::rabbitmq::{DeliveryError, QueueKind},
    settle::Settle,
};

use super::{
    KINDS, Scene, close, next,
    server::{Version, version},
    settle,
};

#[tokio::test]
async fn ack_removes() {
    for kind in KINDS {
        let scene = Scene::new("ack_removes", kind).await;
        let mut jobs = scene.subscribe().await;
        scene.publish("one").await;
        let job = next(&mut jobs).await;
        assert_eq!(job.as_ref(), b"one");
        assert_eq!(job.tag().deliveries(), Some(1));
        assert_eq!(job.tag().redelivered(), Some(false));
        settle(job.tag(), Verdict::Ack).await.unwrap();
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn retry_raises_the_count() {
    for kind in KINDS {
        let scene = Scene::new("retry_raises_the_count", kind).await;
        let mut jobs = scene.subscribe().await;
        scene.publish("one").await;
        for deliveries in 1..=3 {
            let job = next(&mut jobs).await;
            assert_eq!(job.as_ref(), b"one");
            assert_eq!(job.tag().deliveries(), Some(deliveries), "{kind:?}");
            assert_eq!(job.tag().redelivered(), Some(deliveries > 1));
            settle(job.tag(), Verdict::retry()).await.unwrap();
        }
        let job = next(&mut jobs).await;
        settle(job.tag(), Verdict::Ack).await.unwrap();
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn release_says_whether_it_is_charged() {
    for kind in KINDS {
        let scene = Scene::new("release_says_whether_it_is_charged", kind).await;
        let mut jobs = scene.subscribe().await;
        scene.publish("one").await;
        let job = next(&mut jobs).await;
        let is_free = job.tag().capabilities().release_is_free();
        settle(job.tag(), Verdict::release()).await.unwrap();

        let job = next(&mut jobs).await;
        assert_eq!(job.tag().redelivered(), Some(true));
        let deliveries = job.tag().deliveries();
        match kind {
            QueueKind::Quorum if version() < Version::V4_3 => {
                assert_eq!((is_free, deliveries), (false, Some(2)));
            }
            _ => assert_eq!((is_free, deliveries), (true, Some(1))),
        }
        settle(job.tag(), Verdict::Ack).await.unwrap();
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn a_second_settlement_is_refused() {
    for kind in KINDS {
        let scene = Scene::new("a_second_settlement_is_refused", kind).await;
        let mut jobs = scene.subscribe().await;
        scene.publish("one").await;
        scene.publish("two").await;
        let job = next(&mut jobs).await;
        settle(job.tag(), Verdict::Ack).await.unwrap();
        for verdict in [
            Verdict::Ack,
            Verdict::retry(),
            Verdict::Reject,
            Verdict::Abandon,
        ] {
            let error = settle(job.tag(), verdict).await;
            assert!(
                matches!(error, Err(DeliveryError::AlreadySettled)),
                "{error:?}"
            );
        }
        // A second ack on the wire would have closed the channel.
        settle(next(&mut jobs).await.tag(), Verdict::Ack)
            .await
            .unwrap();
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn a_keep_alive_is_refused() {
    let scene = Scene::new("a_keep_alive_is_refused", QueueKind::Classic).await;
    let mut jobs = scene.subscribe().await;
    scene.publish("one").await;
    let tag = next(&mut jobs).await.tag();
    assert!(!tag.capabilities().has_keep_alive());
    let error = tag.keep_alive().await;
    assert!(matches!(error, Err(DeliveryError::NoKeepAlive)));
    close(jobs).await;
}
