//! Traces of a delivery.

use std::time::{Duration, SystemTime};

use tower_sentinel::{
    Job, Verdict,
    broker::rabbitmq::lapin::{
        BasicProperties,
        options::BasicPublishOptions,
        types::{AMQPValue, FieldTable},
    },
    settle::{Messaging, Settle},
};

use super::{KINDS, Scene, next, settle};

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[tokio::test]
async fn a_tag_says_where_its_job_is_from_and_the_trace_of_its_sender() {
    let scene = Scene::new("a_tag_says_where_its_job_is_from", KINDS[0]).await;
    let queue = &*scene.name;
    let bind = scene.admin.queue_bind(
        queue.into(),
        "amq.direct".into(),
        "created".into(),
        Default::default(),
        FieldTable::default(),
    );
    bind.await.unwrap();
    let mut jobs = scene.subscribe().await;

    // Through the default exchange, where the routing key is the queue, and without any properties.
    scene.publish("one").await;
    let job = next(&mut jobs).await;
    let number = job.tag().number();
    let expected = Messaging::new("rabbitmq", queue)
        .queue(queue)
        .delivery_tag(number);
    assert_eq!(job.tag().messaging(), Some(expected.clone()));
    assert_eq!(job.messaging(), Some(expected));
    assert_eq!(job.tag().published_at(), None);
    assert_eq!(job.queued_since(), None);
    settle(job.tag(), Verdict::Ack).await.unwrap();

    let mut headers = FieldTable::default();
    for (name, value) in [("traceparent", TRACEPARENT), ("tracestate", "k=v")] {
        headers.insert(name.into(), AMQPValue::LongString(value.into()));
    }
    let confirm = scene.admin.basic_publish(
        "amq.direct".into(),
        "created".into(),
        BasicPublishOptions::default(),
        b"two",
        BasicProperties::default()
            .with_message_id("m-7".into())
            .with_headers(headers),
    );
    assert!(confirm.await.unwrap().await.unwrap().is_ack());
    // The second delivery is of a copy, which was republished through the default exchange.
    for verdict in [
        Verdict::retry_after(Duration::from_millis(50)),
        Verdict::Ack,
    ] {
        let job = next(&mut jobs).await;
        let expected = Messaging::new("rabbitmq", format!("amq.direct:created:{queue}"))
            .queue(queue)
            .message_id("m-7")
            .delivery_tag(job.tag().number())
            .traceparent(Some(TRACEPARENT))
            .tracestate(Some("k=v"));
        assert_eq!(job.tag().messaging(), Some(expected), "{verdict}");
        settle(job.tag(), verdict).await.unwrap();
    }
    scene.assert_empty(jobs).await;
}

#[tokio::test]
async fn the_time_of_the_publish_is_that_of_the_property_or_of_the_header_also_after_a_retry() {
    const SECONDS: u64 = 1_795_884_872;
    let scene = Scene::new("the_time_of_the_publish", KINDS[0]).await;
    let mut jobs = scene.subscribe().await;
    let property = BasicProperties::default().with_timestamp(SECONDS);
    // As the server's interceptor sets both.
    let mut headers = FieldTable::default();
    let millis = i64::try_from(SECONDS).unwrap() * 1_000 + 250;
    headers.insert("timestamp_in_ms".into(), AMQPValue::LongLongInt(millis));
    let both = property.clone().with_headers(headers);
    for (properties, millis) in [(property, 0), (both, 250)] {
        let confirm = scene.admin.basic_publish(
            "".into(),
            (&*scene.name).into(),
            BasicPublishOptions::default(),
            b"one",
            properties,
        );
        assert!(confirm.await.unwrap().await.unwrap().is_ack());
        let published =
            SystemTime::UNIX_EPOCH + Duration::from_secs(SECONDS) + Duration::from_millis(millis);
        // The third delivery is of a copy.
        for (verdict, is_first) in [
            (Verdict::retry(), true),
            (Verdict::retry_after(Duration::from_millis(50)), false),
            (Verdict::Ack, false),
        ] {
            let job = next(&mut jobs).await;
            assert_eq!(job.tag().published_at(), Some(published), "{verdict}");
            let since = is_first.then_some(published);
            assert_eq!(job.queued_since(), since, "{verdict}");
            settle(job.tag(), verdict).await.unwrap();
        }
    }
    scene.assert_empty(jobs).await;
}
