//! Dead letters, and republished jobs.

use tower_sentinel::{
    Job, Verdict,
    broker::rabbitmq::{
        DeliveryError, QueueKind,
        lapin::{
            BasicProperties,
            types::{AMQPValue, FieldTable},
        },
    },
    outcome::OutcomeKind,
    settle::Settle,
};

use super::{KINDS, Scene, close, next, quiet, reason, server::shared, settle};

#[tokio::test]
async fn what_is_republished_keeps_its_properties() {
    let scene = Scene::new(
        "what_is_republished_keeps_its_properties",
        QueueKind::Classic,
    )
    .await;
    let mut jobs = scene.subscribe().await;
    let mut headers = FieldTable::default();
    headers.insert("x-mine".into(), AMQPValue::LongLongInt(7));
    let properties = BasicProperties::default()
        .with_headers(headers)
        .with_message_id("id".into())
        .with_content_type("text/plain".into())
        .with_user_id("guest".into());
    scene.publish_with("one", properties).await;
    let first = next(&mut jobs).await;
    settle(first.tag(), Verdict::retry()).await.unwrap();

    let second = next(&mut jobs).await;
    let properties = second.properties();
    assert_eq!(properties.message_id(), first.properties().message_id());
    assert_eq!(properties.content_type(), first.properties().content_type());
    assert_eq!(properties.delivery_mode(), &Some(2));
    let headers = properties.headers().as_ref().unwrap().inner();
    assert_eq!(headers["x-mine"], AMQPValue::LongLongInt(7));
    let queue = AMQPValue::LongString(scene.name.as_str().into());
    assert_eq!(headers["x-original-routing-key"], queue);
    settle(second.tag(), Verdict::Ack).await.unwrap();
    scene.assert_empty(jobs).await;
}

#[tokio::test]
async fn a_dead_letter_bears_the_reason() {
    for kind in KINDS {
        let scene = Scene::new("a_dead_letter_bears_the_reason", kind).await;
        scene.declare_dead().await;
        let queue = scene.queue().dead_letter(scene.dead());
        let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
        scene.publish("poison").await;
        settle(next(&mut jobs).await.tag(), Verdict::retry())
            .await
            .unwrap();
        let job = next(&mut jobs).await;
        assert!(job.tag().capabilities().has_dead_letter());
        let mut reason = reason();
        reason.kind = OutcomeKind::Panicked;
        // It is cut at the boundary of a character.
        reason.message = Some(format!("index 7{}", "é".repeat(5_000)));
        job.tag().settle(Verdict::Reject, reason).await.unwrap();

        let letter = scene.get(&scene.dead()).await.unwrap();
        assert_eq!(letter.data, b"poison");
        let headers = letter.properties.headers().as_ref().unwrap().inner();
        let kind = AMQPValue::LongString("panicked".into());
        assert_eq!(headers["x-outcome-kind"], kind);
        let AMQPValue::LongString(message) = &headers["x-outcome-message"] else {
            panic!("{headers:?}");
        };
        assert_eq!(message.len(), 4095);
        assert!(message.as_bytes().starts_with(b"index 7"));
        assert!(
            matches!(headers["x-outcome-time"], AMQPValue::Timestamp(at) if at > 1_700_000_000)
        );
        assert_eq!(headers["x-deliveries"], AMQPValue::LongUInt(2));
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn a_dead_letter_that_is_moved_back_is_counted_anew() {
    let test = "a_dead_letter_that_is_moved_back_is_counted_anew";
    let scene = Scene::new(test, QueueKind::Classic).await;
    scene.declare_dead().await;
    let queue = scene.queue().dead_letter(scene.dead());
    let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
    scene.publish("poison").await;
    settle(next(&mut jobs).await.tag(), Verdict::retry())
        .await
        .unwrap();
    settle(next(&mut jobs).await.tag(), Verdict::Reject)
        .await
        .unwrap();
    let letter = scene.get(&scene.dead()).await.unwrap();
    scene
        .publish_with("poison", letter.properties.clone())
        .await;
    let job = next(&mut jobs).await;
    assert_eq!(job.tag().deliveries(), Some(1));
    settle(job.tag(), Verdict::retry()).await.unwrap();
    let job = next(&mut jobs).await;
    assert_eq!(job.tag().deliveries(), Some(2));
    settle(job.tag(), Verdict::Ack).await.unwrap();
    scene.assert_empty(jobs).await;
}

#[tokio::test]
async fn a_rejected_job_goes_where_the_queue_sends_it() {
    for kind in KINDS {
        let test = "a_rejected_job_goes_where_the_queue_sends_it";
        let mut arguments = FieldTable::default();
        let dead = format!("{test}.{kind:?}.dead").to_lowercase();
        let text = |text: &str| AMQPValue::LongString(text.into());
        arguments.insert("x-dead-letter-exchange".into(), text(""));
        arguments.insert("x-dead-letter-routing-key".into(), text(&dead));
        let scene = Scene::declare(shared(), test, kind, arguments).await;
        scene.declare_dead().await;
        let mut jobs = scene.subscribe().await;
        scene.publish("poison").await;
        let job = next(&mut jobs).await;
        assert!(!job.tag().capabilities().has_dead_letter());
        settle(job.tag(), Verdict::Reject).await.unwrap();
        let mut letter = None;
        while letter.is_none() {
            letter = scene.get(&dead).await;
        }
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn a_dead_letter_that_nobody_takes_is_an_error_and_not_lost() {
    for kind in KINDS {
        let test = "a_dead_letter_that_nobody_takes_is_an_error_and_not_lost";
        let scene = Scene::new(test, kind).await;
        scene.declare_dead().await;
        let queue = scene.queue().dead_letter(scene.dead());
        let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
        let dead = scene.dead().as_str().into();
        let deleted = scene.admin.queue_delete(dead, Default::default());
        deleted.await.unwrap();
        scene.publish("poison").await;
        let tag = next(&mut jobs).await.tag();
        let unsettled = tag.settle(Verdict::Reject, reason()).await.unwrap_err();
        assert!(unsettled.is_misconfigured());
        let error = unsettled.error;
        assert!(
            matches!(error, DeliveryError::Unroutable { .. }),
            "{error:?}"
        );
        // The channel of the subscription is another one.
        quiet(&mut jobs).await;
        close(jobs).await;
        scene.wait_for_ready(1).await;
    }
}
