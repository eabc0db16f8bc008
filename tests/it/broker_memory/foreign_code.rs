//! Wakers and destructors are foreign code, which the broker runs last, without its lock, and guarded.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    task::{Context, Wake, Waker},
    thread,
    time::Duration,
};

use futures_util::{FutureExt, StreamExt};
use tokio::runtime::Builder;
use tower_sentinel::{
    Job, Verdict,
    broker::memory::{Broker, Queue},
    consumer::Subscription,
    settle::Settle,
};

use super::{SECOND, queue, reason, take};
use crate::{sentinel::foreign_code::BadWaker, support::raise};

/// Asks the broker when it is dropped.
struct Asking(Queue<u32>);

impl Wake for Asking {
    fn wake(self: Arc<Self>) {}
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.0.counts();
    }
}

/// Lets `poll` meet one waker after another, each of which asks the broker when it is replaced.
fn replaces_wakers_without_the_lock(
    queue: &Queue<u32>,
    mut poll: impl FnMut(&mut Context<'_>) + Send + 'static,
) {
    let queue = queue.clone();
    let (done, is_done) = mpsc::channel();
    thread::spawn(move || {
        for _ in 0..3 {
            let waker = Waker::from(Arc::new(Asking(queue.clone())));
            poll(&mut Context::from_waker(&waker));
        }
        // With the last of the wakers.
        drop(poll);
        done.send(()).unwrap();
    });
    let done = is_done.recv_timeout(Duration::from_secs(30));
    done.expect("the broker does not wait for its own lock");
}

#[test]
fn a_waker_that_is_replaced_is_dropped_without_the_lock() {
    let queue = queue();
    let mut jobs = queue.subscribe(1).unwrap();
    replaces_wakers_without_the_lock(&queue, move |cx| {
        assert!(jobs.poll_next_unpin(cx).is_pending());
    });

    let mut jobs = queue.subscribe(1).unwrap();
    replaces_wakers_without_the_lock(&queue, move |cx| {
        assert!(Pin::new(&mut jobs).poll_closed(cx).is_pending());
    });

    queue.publish(7);
    let of_future = queue.clone();
    let mut emptied = async move { of_future.emptied().await }.boxed();
    replaces_wakers_without_the_lock(&queue, move |cx| {
        assert!(emptied.poll_unpin(cx).is_pending());
    });

    let mut jobs = queue.subscribe(1).unwrap();
    let mut settlement = take(&mut jobs).tag().settle(Verdict::Ack, reason());
    queue.delay_settlements(SECOND);
    let runtime = Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    replaces_wakers_without_the_lock(&queue, move |cx| {
        let _runtime = runtime.enter();
        assert!(settlement.poll_unpin(cx).is_pending());
    });
}

#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_waker_that_panics_reaches_no_publisher_and_hides_no_job_from_the_others() {
    let queue = queue();
    let mut subscriptions = [(); 3].map(|()| queue.subscribe(1).unwrap());
    let woken = Arc::new(Woken::default());
    let wakers = [
        Waker::from(Arc::new(BadWaker)),
        Waker::from(Arc::new(BadWaker)),
        Waker::from(Arc::clone(&woken)),
    ];
    for (jobs, waker) in subscriptions.iter_mut().zip(&wakers) {
        let next = jobs.poll_next_unpin(&mut Context::from_waker(waker));
        assert!(next.is_pending());
    }
    queue.publish(7);
    assert!(woken.0.load(Ordering::Relaxed));
    assert_eq!(*take(&mut subscriptions[2]).payload(), 7);
}

/// The broker's own copy of it panics when it is dropped.
struct Brittle {
    is_original: bool,
}

impl Clone for Brittle {
    fn clone(&self) -> Self {
        Self { is_original: false }
    }
}

impl Drop for Brittle {
    fn drop(&mut self) {
        if self.is_original {
            raise("in a destructor");
        }
    }
}

#[test]
fn a_payload_that_panics_when_it_is_dropped_is_settled_all_the_same() {
    let queue = Broker::new().queue("jobs").declare();
    queue.publish(Brittle { is_original: true });
    let mut jobs = queue.subscribe(1).unwrap();
    let job = jobs.next().now_or_never().unwrap().unwrap().unwrap();
    let settled = job.tag().settle(Verdict::Ack, reason()).now_or_never();
    settled.expect("no delay was set").unwrap();
    assert_eq!(queue.counts().acked, 1);
}
