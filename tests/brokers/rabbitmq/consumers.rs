//! Settings of a consumer.

use tower_sentinel::broker::rabbitmq::{QueueKind, SubscriptionError};

use super::{KINDS, Scene, next, shared};
use crate::conformance::eventually;

#[tokio::test]
async fn a_consumer_has_its_tag() {
    for kind in KINDS {
        let scene = Scene::new("a_consumer_has_its_tag", kind).await;
        let queue = scene.queue().consumer_tag("worker-7");
        let jobs = queue.subscribe(&scene.connection).await.unwrap();
        let line = format!("{}\tworker-7", scene.name);
        let list = ["list_consumers", "queue_name", "consumer_tag"];
        eventually(true, async || {
            shared()
                .list(&list)
                .await
                .lines()
                .any(|found| found == line)
        })
        .await;
        drop(jobs);
    }
}

#[tokio::test]
async fn a_consumer_of_a_higher_priority_comes_first() {
    for kind in KINDS {
        let scene = Scene::new("a_consumer_of_a_higher_priority", kind).await;
        let with = |priority: i32| {
            let queue = scene.queue();
            queue.consumer_argument("x-priority", priority)
        };
        let mut low = with(-1).subscribe(&scene.connection).await.unwrap();
        let mut high = with(1).subscribe(&scene.connection).await.unwrap();
        for _ in 0..10 {
            scene.publish("one").await;
            tokio::select! {
                _ = next(&mut high) => {}
                job = next(&mut low) => panic!("{kind:?}: {job:?}"),
            }
        }
    }
}

#[tokio::test]
async fn an_exclusive_consumer_is_the_only_one() {
    for kind in KINDS {
        let scene = Scene::new("an_exclusive_consumer_is_the_only_one", kind).await;
        let alone = scene.queue().exclusive();
        let jobs = alone.subscribe(&scene.connection).await.unwrap();
        let second = scene.queue().subscribe(&scene.connection).await;
        match kind {
            QueueKind::Quorum => drop(second.unwrap()), // It ignores it.
            _ => {
                let error = second.unwrap_err();
                let is_refused = matches!(error, SubscriptionError::Refused { .. });
                assert!(is_refused, "{error:?}");
            }
        }
        drop(jobs);
    }
}
