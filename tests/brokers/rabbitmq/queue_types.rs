//! A queue whose type is not the one that is set.

use tower_sentinel::{
    Job, Verdict,
    broker::rabbitmq::{
        self, Queue, QueueKind, SubscriptionError,
        lapin::{
            options::QueueDeclareOptions,
            types::{AMQPValue, FieldTable},
        },
    },
    settle::Settle,
};

use super::{Scene, close, next, server::shared, settle};

async fn declare_as(scene: &Scene, options: QueueDeclareOptions, arguments: &[(&str, AMQPValue)]) {
    let name = scene.name.as_str();
    let deleted = scene.admin.queue_delete(name.into(), Default::default());
    deleted.await.unwrap();
    let mut table = FieldTable::default();
    for (name, value) in arguments {
        table.insert((*name).into(), value.clone());
    }
    let declared = scene.admin.queue_declare(name.into(), options, table);
    declared.await.unwrap();
}

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

#[tokio::test]
async fn a_classic_queue_is_not_read_as_a_quorum_queue() {
    let scene = Scene::new("a_classic_queue_is_not_read", QueueKind::Classic).await;
    let transient = QueueDeclareOptions::default();
    let durable = QueueDeclareOptions::durable();
    let deleted = QueueDeclareOptions {
        auto_delete: true,
        ..transient
    };
    let kind = ("x-queue-type", text("classic"));
    let others = [
        ("x-expires", AMQPValue::LongInt(600_000)),
        ("x-message-ttl", AMQPValue::LongInt(600_000)),
        ("x-dead-letter-exchange", text("")),
        ("x-max-priority", AMQPValue::LongInt(3)),
    ];
    let cases: [(QueueDeclareOptions, &[_]); 5] = [
        (durable, &[]),
        (durable, std::slice::from_ref(&kind)),
        (durable, &others),
        (transient, &others),
        (deleted, &[]),
    ];
    for (options, arguments) in cases {
        declare_as(&scene, options, arguments).await;
        scene.publish("one").await;
        let limited = Queue::quorum(&scene.name).delivery_limit(None);
        let error = limited.subscribe(&scene.connection).await.unwrap_err();
        assert!(
            matches!(&error, SubscriptionError::NotQuorum { queue } if *queue == scene.name),
            "{options:?}, {arguments:?}: {error:?}"
        );
        let line = error.to_string();
        assert!(
            line.starts_with(&format!("\"{}\" is", scene.name)),
            "{line}"
        );
        assert!(line.contains("`Queue::classic`"), "{line}");
        // Nothing was taken from it, and the connection is as good as before.
        let mut jobs = scene.subscribe().await;
        let job = next(&mut jobs).await;
        assert_eq!(job.tag().redelivered(), Some(false));
        settle(job.tag(), Verdict::Ack).await.unwrap();
        if !options.auto_delete {
            close(jobs).await;
        }
    }
}

#[tokio::test]
async fn a_quorum_queue_is_read_whatever_else_it_is_declared_with() {
    let scene = Scene::new("a_quorum_queue_is_read", QueueKind::Quorum).await;
    let arguments = [
        ("x-queue-type", text("quorum")),
        ("x-dead-letter-exchange", text("")),
        ("x-delivery-limit", AMQPValue::LongInt(7)),
        ("x-single-active-consumer", AMQPValue::Boolean(true)),
    ];
    declare_as(&scene, QueueDeclareOptions::durable(), &arguments).await;
    // Whoever may read it needs no other right.
    let server = shared();
    server.ctl(&["add_user", "reads-only", "secret"]);
    let pattern = format!("^{}$", scene.name.replace('.', "\\."));
    server.ctl(&["set_permissions", "reads-only", "^$", "^$", &pattern]);
    let address = server.address_of("reads-only", "secret");
    let connection = rabbitmq::connect(&address).await.unwrap();
    let mut jobs = scene.queue().subscribe(&connection).await.unwrap();
    scene.publish("one").await;
    settle(next(&mut jobs).await.tag(), Verdict::Ack)
        .await
        .unwrap();
    let as_classic = Queue::classic(&scene.name).subscribe(&scene.connection);
    drop(as_classic.await.unwrap());
}

#[tokio::test]
async fn a_queue_that_is_not_there_is_not_made() {
    let scene = Scene::new("a_queue_that_is_not_there", QueueKind::Quorum).await;
    let queue = Queue::quorum("nowhere");
    let error = queue.subscribe(&scene.connection).await.unwrap_err();
    assert!(
        matches!(error, SubscriptionError::Refused { .. }),
        "{error:?}"
    );
    let list = shared().ctl(&["list_queues", "name"]);
    assert!(!list.lines().any(|line| line == "nowhere"), "{list}");
}
