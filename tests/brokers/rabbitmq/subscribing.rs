//! Subscriptions that are given up before they are made.

use std::time::Duration;

use tokio::time::timeout;
use tower_sentinel::broker::rabbitmq::{
    self, QueueKind, SubscriptionError,
    lapin::{options::QueueDeclareOptions, types::FieldTable},
};

use super::{
    Scene, close,
    server::{Server, shared},
};
use crate::conformance::eventually;

/// Long enough for all requests before that for the consumer.
const LIMIT: Duration = Duration::from_secs(3);

/// Lets the process of a classic queue stand still, or go on: meanwhile a consumer waits for it.
pub(super) async fn is_held(server: &Server, queue: &str, is_held: bool) {
    let act = if is_held { "suspend" } else { "resume" };
    let code = format!(
        r#"Name = rabbit_misc:r(<<"/">>, queue, <<"{queue}">>),
        {{ok, Queue}} = rabbit_amqqueue:lookup(Name),
        sys:{act}(amqqueue:get_pid(Queue))"#
    );
    eventually(Some("ok".to_owned()), async || server.eval(&code).await).await;
}

async fn assert_no_ghost(scene: &Scene) {
    let counts = async || {
        let options = QueueDeclareOptions {
            passive: true,
            ..QueueDeclareOptions::default()
        };
        let name = scene.name.as_str().into();
        let declared = scene
            .admin
            .queue_declare(name, options, FieldTable::default());
        let queue = declared.await.unwrap();
        (queue.consumer_count(), queue.message_count())
    };
    eventually((0, 3), counts).await;
}

#[tokio::test]
async fn a_consumer_that_comes_too_late_is_no_ghost() {
    let server = shared();
    for is_dropped in [false, true] {
        let test = format!("a_consumer_that_comes_too_late.{is_dropped}");
        let scene = Scene::new(&test, QueueKind::Classic).await;
        for body in ["one", "two", "three"] {
            scene.publish(body).await;
        }
        is_held(server, &scene.name, true).await;
        if is_dropped {
            let connection = rabbitmq::connect(&server.address()).await.unwrap();
            let queue = scene.queue();
            let mut subscribing = Box::pin(async move {
                drop(queue.subscribe(&connection).await);
                unreachable!("the queue is held");
            });
            assert!(timeout(LIMIT, &mut subscribing).await.is_err());
            // Outside of any runtime.
            std::thread::spawn(move || drop(subscribing))
                .join()
                .unwrap();
        } else {
            let queue = scene.queue().subscribe_timeout(LIMIT);
            let error = queue.subscribe(&scene.connection).await.unwrap_err();
            let is_late = matches!(error, SubscriptionError::TimedOut { .. });
            assert!(is_late, "{error:?}");
        }
        is_held(server, &scene.name, false).await;
        assert_no_ghost(&scene).await;
        // The connection lives, and its next subscription works.
        close(scene.subscribe().await).await;
    }
}

#[tokio::test]
async fn a_channel_that_the_server_does_not_close_ends_its_connection() {
    let server = shared();
    let test = "a_channel_that_the_server_does_not_close";
    let scene = Scene::new(test, QueueKind::Classic).await;
    for body in ["one", "two", "three"] {
        scene.publish(body).await;
    }
    is_held(server, &scene.name, true).await;
    // The limit follows it.
    let address = format!("amqp://{}/%2f?heartbeat=2", server.host());
    let connection = rabbitmq::connect(&address).await.unwrap();
    let queue = scene.queue().subscribe_timeout(LIMIT);
    queue.subscribe(&connection).await.unwrap_err();
    eventually(false, async || connection.status().connected()).await;
    is_held(server, &scene.name, false).await;
    assert_no_ghost(&scene).await;
}
