//! Subscriptions that are stopped.

use std::{
    convert::Infallible,
    future::{IntoFuture, poll_fn},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{FutureExt, StreamExt};
use tokio::{
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::ServiceBuilder;
use tower_sentinel::{
    Consumer, Job, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::rabbitmq::{Deliveries, Delivery},
    consumer::Subscription,
    settle::Settle,
};

use super::{
    KINDS, Scene, close, close_now, closed, next, server::shared, settle, subscribing::is_held,
};

async fn stop(jobs: &mut Deliveries) {
    let stopped = poll_fn(|cx| Pin::new(&mut *jobs).poll_stop(cx));
    let stopped = timeout(Duration::from_secs(20), stopped).await;
    stopped.expect("a subscription stops within 20 s");
}

#[tokio::test]
async fn what_a_stopped_subscription_gives_back_goes_to_others() {
    for kind in KINDS {
        for watched in [false, true] {
            let test = format!("what_a_stopped_subscription_gives_back.{watched}");
            let scene = Scene::new(&test, kind).await;
            for body in ["one", "two", "three", "four", "five", "six"] {
                scene.publish(body).await;
            }
            scene.wait_for_ready(6).await;
            let queue = scene.queue().prefetch(4);
            let mut stopped = queue.subscribe(&scene.connection).await.unwrap();
            let (one, two) = (next(&mut stopped).await, next(&mut stopped).await);
            scene.wait_for_ready(2).await;
            sleep(Duration::from_millis(100)).await;
            if watched {
                // It takes the jobs that lapin has received.
                let watch = poll_fn(|cx| Pin::new(&mut stopped).poll_closed(cx));
                assert!(watch.now_or_never().is_none());
            }
            stop(&mut stopped).await;
            stop(&mut stopped).await;
            settle(one.tag(), Verdict::release()).await.unwrap();
            assert!(stopped.next().await.is_none());
            closed(&mut stopped).await.unwrap();

            // The first one lives, and has one job to settle.
            let mut jobs = scene.subscribe().await;
            let mut came = Vec::new();
            for _ in 0..5 {
                let job = next(&mut jobs).await;
                let body = String::from_utf8(job.as_ref().to_vec()).unwrap();
                let is_free = job.tag().capabilities().release_is_free();
                let was_delivered = ["one", "three", "four"].contains(&&*body);
                let deliveries = if was_delivered && !is_free { 2 } else { 1 };
                assert_eq!(job.tag().deliveries(), Some(deliveries), "{kind:?} {body}");
                settle(job.tag(), Verdict::Ack).await.unwrap();
                came.push(body);
            }
            came.sort_unstable();
            assert_eq!(came, ["five", "four", "one", "six", "three"]);
            settle(two.tag(), Verdict::Ack).await.unwrap();
            close(stopped).await;
            scene.assert_empty(jobs).await;
        }
    }
}

#[tokio::test]
async fn a_consumer_that_drains_leaves_the_others_what_waits() {
    for kind in KINDS {
        let test = "a_consumer_that_drains_leaves_the_others_what_waits";
        let scene = Scene::new(test, kind).await;
        for n in 0..30 {
            scene.publish(&n.to_string()).await;
        }
        let queue = scene.queue().prefetch(10);
        let jobs = queue.subscribe(&scene.connection).await.unwrap();
        // A place is free for each that ends.
        let begun = Arc::new(AtomicUsize::new(0));
        let end = Arc::new(Semaphore::new(0));
        let service = {
            let (begun, end) = (Arc::clone(&begun), Arc::clone(&end));
            ServiceBuilder::new()
                .layer(jobs.gate())
                .layer(SentinelLayer::new(SettlePolicy::new(ack_on_success())).no_timeout())
                .service_fn(move |_: Delivery| {
                    begun.fetch_add(1, Ordering::SeqCst);
                    let end = Arc::clone(&end);
                    async move {
                        end.acquire().await.unwrap().forget();
                        Ok::<_, Infallible>(())
                    }
                })
        };
        let signal = CancellationToken::new();
        let consumer = Consumer::new(jobs, service)
            .with_graceful_shutdown(signal.clone().cancelled_owned())
            .into_future();
        let draining = tokio::spawn(consumer);
        scene.wait_for_ready(20).await;
        let full = async {
            while begun.load(Ordering::SeqCst) < 10 {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(20), full).await.unwrap();
        signal.cancel();
        // The drain has begun; there is no event for it.
        sleep(Duration::from_millis(200)).await;
        end.add_permits(5);
        sleep(Duration::from_millis(200)).await;
        let mut others = scene.subscribe().await;
        for _ in 0..20 {
            let job = next(&mut others).await;
            assert_eq!(job.tag().redelivered(), Some(false));
            settle(job.tag(), Verdict::Ack).await.unwrap();
        }
        assert!(!draining.is_finished());
        end.add_permits(5);
        let summary = timeout(Duration::from_secs(20), draining).await.unwrap();
        let summary = summary.unwrap().unwrap();
        assert_eq!((summary.answered, begun.load(Ordering::SeqCst)), (10, 10));
        scene.assert_empty(others).await;
    }
}

#[tokio::test]
async fn a_subscription_ends_without_a_queue_that_is_silent() {
    let test = "a_subscription_ends_without_a_queue_that_is_silent";
    let scene = Scene::new(test, KINDS[0]).await;
    let mut jobs = scene.subscribe().await;
    scene.publish("one").await;
    drop(next(&mut jobs).await);
    is_held(shared(), &scene.name, true).await;
    stop(&mut jobs).await;
    drop(close_now(jobs).await);
    is_held(shared(), &scene.name, false).await;
    // The late requests were carried out, and the connection lives.
    let mut jobs = scene.subscribe().await;
    let one = next(&mut jobs).await.tag();
    assert_eq!(one.redelivered(), Some(true));
    settle(one, Verdict::Ack).await.unwrap();
    scene.assert_empty(jobs).await;
}
