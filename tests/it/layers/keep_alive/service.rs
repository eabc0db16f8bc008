//! The service by itself, and many side by side.

use std::{pin::pin, time::Duration};

use tokio::{
    runtime::{Builder, Handle},
    time::sleep,
};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_sentinel::{KeepAliveLayer, Verdict};

use super::{Ask, Delivery, INTERVAL, SECOND, Seen, Tag, sentinel, work};
use crate::support::{Refused, call, idle, until};

// === outside of a sentinel ===

#[tokio::test(start_paused = true)]
async fn outside_of_a_sentinel_the_ticker_lives_as_long_as_the_inner_future() {
    let deliver = |tag: &Tag| Delivery {
        tag: tag.clone(),
        takes: 2 * INTERVAL + SECOND,
    };
    let mut service = KeepAliveLayer::new(INTERVAL).layer(service_fn(work));

    let tag = Tag::new(&[Ask::Held]);
    call(&mut service, deliver(&tag)).await.unwrap();
    sleep(10 * INTERVAL).await;
    assert_eq!(tag.asked(), [8.0, 16.0]);

    // A future that has returned is done, though it is still there.
    let tag = Tag::new(&[Ask::Held]);
    let mut future = pin!(service.call(deliver(&tag)));
    future.as_mut().await.unwrap();
    sleep(10 * INTERVAL).await;
    assert_eq!(tag.asked(), [8.0, 16.0]);

    let tag = Tag::new(&[Ask::Held]);
    let future = service.call(deliver(&tag));
    // It need not be polled.
    sleep(INTERVAL + SECOND).await;
    drop(future);
    sleep(10 * INTERVAL).await;
    assert_eq!(tag.asked(), [8.0]);
    assert_eq!(Handle::current().metrics().num_alive_tasks(), 0);
}

#[tokio::test(start_paused = true)]
async fn outside_of_a_sentinel_a_lost_lease_ends_the_ticker_alone() {
    let tag = Tag::new(&[Ask::Lost]);
    let mut service = KeepAliveLayer::new(INTERVAL).layer(service_fn(work));
    let delivery = Delivery {
        tag: tag.clone(),
        takes: 5 * INTERVAL,
    };
    call(&mut service, delivery).await.unwrap();
    assert_eq!(tag.started.elapsed(), 5 * INTERVAL);
    assert_eq!(tag.asked(), [8.0]);
}

// === the service ===

#[tokio::test(start_paused = true)]
async fn readiness_is_the_inner_services() {
    let (mock, mut handle) = tower_test::mock::pair::<Tag, ()>();
    let mut service = KeepAliveLayer::new(INTERVAL).layer(mock);
    handle.allow(0);
    let ready = tokio::time::timeout(SECOND, ServiceExt::<Tag>::ready(&mut service)).await;
    assert!(ready.is_err());
    handle.send_error(Refused);
    let error = ServiceExt::<Tag>::ready(&mut service).await.unwrap_err();
    assert!(error.is::<Refused>());
}

#[tokio::test]
async fn many_jobs_side_by_side_on_real_threads_are_never_asked_for_after_they_are_told() {
    let jobs = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let keep_alive = KeepAliveLayer::new(Duration::from_millis(1));
    let service = sentinel()
        .runtime(jobs.handle().clone())
        .layer(keep_alive.layer(service_fn(work)));
    let tags: Vec<_> = (0..200).map(|_| Tag::new(&[Ask::Held])).collect();
    for (index, tag) in tags.iter().enumerate() {
        let delivery = Delivery {
            tag: tag.clone(),
            takes: Duration::from_millis(1 + index as u64 % 7),
        };
        tokio::spawn(service.clone().oneshot(delivery));
    }
    until(|| tags.iter().all(|tag| tag.verdicts().len() == 1)).await;
    idle(jobs.handle()).await;
    for tag in &tags {
        assert_eq!(tag.seen().last(), Some(&Seen::Told(Verdict::Ack)));
    }
    jobs.shutdown_background();
}
