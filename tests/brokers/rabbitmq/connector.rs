//! A connector: its addresses, its declarations and its subscriptions.

use std::{convert::Infallible, time::Duration};

use tokio::{sync::mpsc, time::timeout};
use tower::service_fn;
use tower_sentinel::{
    Consumer, Job, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::rabbitmq::{
        Connector, ConnectorError, Delivery, Queue, QueueKind, SubscriptionError,
        lapin::types::FieldTable,
    },
    broker::{Envelope, dead_letter::DELIVERIES},
    consumer::Connect,
    settle::Settle,
};

use super::{KINDS, Scene, close, next, server::shared, settle};
use crate::proxy::Proxy;

/// A queue that is not declared yet, and its connector.
async fn undeclared(test: &str, kind: QueueKind) -> (Scene, Connector) {
    let scene = Scene::new(test, kind).await;
    for queue in [scene.name.clone(), scene.dead()] {
        let deleted = scene
            .admin
            .queue_delete(queue.as_str().into(), Default::default());
        deleted.await.unwrap();
    }
    let queue = scene.queue().dead_letter(scene.dead());
    let connector = queue.connector(shared().address());
    (scene, connector)
}

#[tokio::test]
async fn a_connector_declares_what_it_reads_if_it_is_told_to() {
    for kind in KINDS {
        let test = "a_connector_declares_what_it_reads";
        let (scene, mut connector) = undeclared(test, kind).await;
        let error = connector.connect(1).await.unwrap_err();
        assert!(
            format!("{error:#}").starts_with(&format!("rabbitmq at {}: ", shared().host())),
            "{error:#}"
        );
        assert!(
            matches!(
                error,
                ConnectorError::Subscribe {
                    error: SubscriptionError::NoTarget { .. },
                    ..
                }
            ),
            "{error:?}"
        );

        let mut connector = connector.declare_queues();
        let mut jobs = connector.connect(1).await.unwrap();
        scene.publish("one").await;
        let job = next(&mut jobs).await;
        settle(job.tag(), Verdict::Reject).await.unwrap();
        assert!(scene.get(&scene.dead()).await.is_some());
        close(jobs).await;
        // Each of them is of the right kind, and declared in the same way by the next worker.
        let mut other = connector.clone().declare_queues();
        close(other.connect(1).await.unwrap()).await;
        if kind == QueueKind::Quorum {
            close(
                Queue::quorum(scene.dead())
                    .subscribe(&scene.connection)
                    .await
                    .unwrap(),
            )
            .await;
        }
    }
}

#[tokio::test]
async fn the_server_dead_letters_to_the_same_queue() {
    for kind in KINDS {
        let test = "the_server_dead_letters_to_the_same_queue";
        let (scene, connector) = undeclared(test, kind).await;
        let mut connector = connector.queue_argument("x-message-ttl", 1);
        close(connector.connect(1).await.unwrap()).await;
        scene.publish("late").await;
        let dead = async {
            while scene.get(&scene.dead()).await.is_none() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(Duration::from_secs(20), dead).await.unwrap();
    }
}

/// The default limit of RabbitMQ 4 would drop a job whose connections are lost 20 times.
#[tokio::test]
async fn a_quorum_queue_has_no_delivery_limit_of_its_own() {
    let test = "a_quorum_queue_has_no_delivery_limit";
    let (scene, connector) = undeclared(test, QueueKind::Quorum).await;
    let mut connector = connector.declare_queues();
    close(connector.connect(1).await.unwrap()).await;
    scene.publish("one").await;
    for count in 0..25 {
        // A session whose channel ends with the job unsettled.
        let mut jobs = connector.connect(1).await.unwrap();
        let job = next(&mut jobs).await;
        assert_eq!(job.tag().deliveries(), Some(count + 1));
        close(jobs).await;
    }
    // So no retry has to be published anew either.
    let mut jobs = connector.connect(1).await.unwrap();
    settle(next(&mut jobs).await.tag(), Verdict::retry())
        .await
        .unwrap();
    let job = next(&mut jobs).await;
    assert_eq!(job.tag().deliveries(), Some(27));
    assert_eq!(job.header(DELIVERIES), None);
}

#[tokio::test]
async fn a_queue_that_exists_with_other_arguments_is_named() {
    let test = "a_queue_that_exists_with_other_arguments";
    let scene = Scene::declare(shared(), test, QueueKind::Quorum, FieldTable::default()).await;
    let mut connector = scene
        .queue()
        .connector(shared().address())
        .queue_argument("x-max-length", 10);
    let error = connector.connect(1).await.unwrap_err();
    let text = format!("{error:#}");
    assert!(
        text.contains(&format!("\"{}\" can't be declared", scene.name))
            && text.contains("x-max-length"),
        "{text}"
    );
    // Its delivery limit may be its owner's, and so may be the type of the dead letters.
    scene.declare_dead().await;
    let queue = scene.queue().dead_letter(scene.dead());
    let mut connector = queue.connector(shared().address()).declare_queues();
    close(connector.connect(1).await.unwrap()).await;
}

#[tokio::test]
async fn the_queues_are_declared_again_after_they_were_deleted() {
    let test = "the_queues_are_declared_again";
    let (scene, connector) = undeclared(test, QueueKind::Quorum).await;
    let (ran, mut runs) = mpsc::unbounded_channel();
    let process = move |job: Delivery| {
        let ran = ran.clone();
        async move {
            ran.send(job.as_ref().to_vec()).unwrap();
            Ok::<_, Infallible>(())
        }
    };
    let consumer = Consumer::reconnecting(connector.declare_queues(), move |_| {
        service_fn(process.clone())
    })
    .sentinel(SentinelLayer::new(SettlePolicy::new(ack_on_success())))
    .backoff(Duration::from_millis(1)..=Duration::from_millis(10));
    let consumer = tokio::spawn(consumer.run());
    for round in ["one", "two"] {
        // Published until it is taken: the queue may be the one that is deleted.
        let ran = async {
            loop {
                let confirm = scene.admin.basic_publish(
                    "".into(),
                    scene.name.as_str().into(),
                    Default::default(),
                    round.as_bytes(),
                    Default::default(),
                );
                confirm.await.unwrap().await.unwrap();
                let run = timeout(Duration::from_millis(100), runs.recv()).await;
                if run.is_ok_and(|run| run.as_deref() == Some(round.as_bytes())) {
                    return;
                }
            }
        };
        timeout(Duration::from_secs(30), ran).await.expect(round);
        let deleted = scene
            .admin
            .queue_delete(scene.name.as_str().into(), Default::default());
        deleted.await.unwrap();
    }
    consumer.abort();
}

#[tokio::test]
async fn the_next_address_is_tried_without_a_pause() {
    let scene = Scene::new("the_next_address_is_tried", QueueKind::Classic).await;
    // One that is lost when it subscribes, and one where nobody is.
    let cut = Proxy::without(b"the_next_address_is_tried.classic", shared().host()).await;
    let cut = format!("amqp://guest:guest@{}", cut.address());
    let refused = "amqp://us3r:s3cr3t@127.0.0.1:9".to_owned();
    let works = shared().address();
    let mut connector = scene
        .queue()
        .connector(vec![cut.clone(), refused.clone(), works]);
    for _ in 0..3 {
        let mut jobs = connector.connect(1).await.unwrap();
        scene.publish("one").await;
        settle(next(&mut jobs).await.tag(), Verdict::Ack)
            .await
            .unwrap();
        close(jobs).await;
    }
    let mut none = scene.queue().connector([cut, refused]);
    let error = none.connect(1).await.unwrap_err();
    assert!(
        matches!(&error, ConnectorError::AllFailed { errors } if errors.len() == 2),
        "{error:?}"
    );
    let text = format!("{error:#} {error:?} {none:?}");
    assert!(
        text.contains("rabbitmq at 127.0.0.1:9 can't be reached: "),
        "{text}"
    );
    assert!(!text.contains("s3cr3t"), "{text}");
}

#[tokio::test]
async fn an_invalid_address_is_said_at_each_attempt() {
    let mut connector = Queue::classic("jobs").connector("amqp://us3r:s3/cr3t@host");
    for attempt in 1..3 {
        let error = connector.connect(attempt).await.unwrap_err();
        let text = format!("{error:#}{error:?}{connector:?}");
        assert!(
            text.contains("is not valid") && !text.contains("cr3t"),
            "{text}"
        );
    }
}
