//! The prefetch.

use std::{convert::Infallible, future::pending};

use futures_util::FutureExt;
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tower_sentinel::{Job, Verdict, broker::rabbitmq::QueueKind};

use super::{KINDS, Scene, close, next, quiet, settle};

#[tokio::test]
async fn the_prefetch_holds() {
    for kind in KINDS {
        let scene = Scene::new("the_prefetch_holds", kind).await;
        let queue = scene.queue().prefetch(3);
        let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
        assert_eq!(jobs.prefetch(), 3);
        for number in 0..10 {
            scene.publish(&number.to_string()).await;
        }
        let mut tags = Vec::new();
        for _ in 0..3 {
            tags.push(next(&mut jobs).await.tag());
        }
        quiet(&mut jobs).await;
        // In any order.
        settle(tags.remove(1), Verdict::Ack).await.unwrap();
        tags.push(next(&mut jobs).await.tag());
        quiet(&mut jobs).await;
        close(jobs).await;
    }
}

#[tokio::test]
async fn the_gate_is_as_wide_as_the_prefetch() {
    let test = "the_gate_is_as_wide_as_the_prefetch";
    let scene = Scene::new(test, QueueKind::Classic).await;
    let queue = scene.queue().prefetch(2);
    let jobs = queue.subscribe(&scene.connection).await.unwrap();
    let service = service_fn(|()| pending::<Result<(), Infallible>>());
    let mut service = ServiceBuilder::new().layer(jobs.gate()).service(service);
    let mut calls = Vec::new();
    for _ in 0..2 {
        calls.push(service.ready().await.unwrap().call(()));
    }
    assert!(service.ready().now_or_never().is_none());
    calls.pop();
    assert!(service.ready().now_or_never().is_some());
    close(jobs).await;
}
