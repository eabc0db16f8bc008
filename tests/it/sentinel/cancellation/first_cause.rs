//! The first event is the cause, though nobody had polled.

use std::{
    future::{Future, pending, poll_fn},
    panic::catch_unwind,
    pin::pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, Wake, Waker},
    thread,
    time::Duration,
};

use futures_util::poll;
use tokio::{
    runtime::{Builder, Handle},
    task::yield_now,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_sentinel::{cancel::Cancellation, cancelled, outcome::CancelReason};

use super::{LIMIT, SECOND, layer};
use crate::support::{
    Bomb, Fate, Recorder, Refused, Seen, Unit, Work, Worker, call, exhaust_budget, idle, raise,
};

/// Hands out the handle of a job, which then ends as `fate` says.
fn handing_out(
    fate: Fate,
) -> (
    Arc<Mutex<Option<Cancellation>>>,
    impl Service<Unit, Response = (), Error = Refused, Future: Send> + Clone + Send,
) {
    let slot = Arc::<Mutex<Option<Cancellation>>>::default();
    let handed = Arc::clone(&slot);
    let service = service_fn(move |_: Unit| {
        *handed.lock().unwrap() = Some(Cancellation::current());
        async move {
            match fate {
                Fate::PanicFirst => raise("before the request"),
                _ => pending().await,
            }
        }
    });
    (slot, service)
}

async fn settle_down() {
    for _ in 0..8 {
        yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_comes_after_a_panic_does_not_excuse_it() {
    let recorder = Recorder::default();
    let (handle, service) = handing_out(Fate::PanicFirst);
    let mut sentinel = layer(&recorder).layer(service);
    let response = sentinel.ready().await.unwrap().call(Unit::default());
    settle_down().await;
    // The job has ended, so it is not affected.
    let handle = handle.lock().unwrap().take().unwrap();
    handle.cancel(CancelReason::Requested);
    response.await.unwrap();
    assert_eq!(recorder.reports(), [Seen::panicked()]);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_comes_after_the_limit_is_not_the_cause() {
    let recorder = Recorder::default();
    let (handle, service) = handing_out(Fate::Hang);
    let mut sentinel = layer(&recorder).layer(service);
    let response = sentinel.ready().await.unwrap().call(Unit::default());
    sleep(LIMIT + SECOND).await;
    let handle = handle.lock().unwrap().take().unwrap();
    handle.cancel(CancelReason::Requested);
    response.await.unwrap();
    assert_eq!(recorder.reports(), [Seen::timed_out(true)]);
}

/// Cause that may stop a job besides its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    Shutdown,
    LeaseLost,
}

/// Runs a job that is stopped at these times, by this thread or another one, and that is only polled or
/// dropped after that.
async fn look_late(causes: [Option<(Cause, u32)>; 2], elsewhere: bool, polls: bool) -> Seen {
    let recorder = Recorder::default();
    let token = CancellationToken::new();
    let (handle, service) = handing_out(Fate::Hang);
    let mut sentinel = layer(&recorder).shutdown(token.clone()).layer(service);
    let response = sentinel.ready().await.unwrap().call(Unit::default());
    let start = Instant::now();
    settle_down().await;
    for (cause, time) in causes.into_iter().flatten() {
        sleep_until(start + time * SECOND).await;
        let (token, handle) = (token.clone(), Arc::clone(&handle));
        let stop = move || match cause {
            Cause::Shutdown => token.cancel(),
            Cause::LeaseLost => {
                let handle = handle.lock().unwrap().take().unwrap();
                handle.cancel(CancelReason::LeaseLost);
            }
        };
        match elsewhere {
            true => thread::spawn(stop).join().unwrap(),
            false => stop(),
        }
    }
    sleep_until(start + LIMIT + 5 * SECOND).await;
    match polls {
        true => drop(response.await),
        false => drop(response),
    }
    idle(&Handle::current()).await;
    let [seen] = recorder.reports()[..] else {
        panic!("one report");
    };
    seen
}

#[tokio::test(start_paused = true)]
async fn the_first_cause_wins_by_its_time_and_not_by_the_poll_that_sees_it() {
    let shutdown = Seen::cancelled(CancelReason::Shutdown, true);
    let lease_lost = Seen::cancelled(CancelReason::LeaseLost, true);
    let timed_out = Seen::timed_out(true);
    // The limit passes at 10 s.
    for (causes, seen) in [
        ([Some((Cause::Shutdown, 5)), None], shutdown),
        ([Some((Cause::Shutdown, 11)), None], timed_out),
        ([Some((Cause::LeaseLost, 5)), None], lease_lost),
        ([Some((Cause::LeaseLost, 11)), None], timed_out),
        (
            [Some((Cause::Shutdown, 5)), Some((Cause::LeaseLost, 6))],
            shutdown,
        ),
        (
            [Some((Cause::LeaseLost, 5)), Some((Cause::Shutdown, 6))],
            lease_lost,
        ),
        (
            [Some((Cause::Shutdown, 5)), Some((Cause::LeaseLost, 11))],
            shutdown,
        ),
        (
            [Some((Cause::LeaseLost, 5)), Some((Cause::Shutdown, 11))],
            lease_lost,
        ),
        (
            [Some((Cause::Shutdown, 11)), Some((Cause::LeaseLost, 12))],
            timed_out,
        ),
    ] {
        for elsewhere in [false, true] {
            for polls in [true, false] {
                let case = format!("{causes:?}, {elsewhere}, {polls}");
                assert_eq!(look_late(causes, elsewhere, polls).await, seen, "{case}");
            }
        }
    }
}

/// Returns the time by the clock of the wall.
fn wall() -> Instant {
    thread::spawn(Instant::now).join().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_request_by_a_clock_that_is_ahead_comes_before_a_limit_that_has_not_passed() {
    let recorder = Recorder::default();
    let jobs = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let limit = Duration::from_millis(1);
    let (requested, is_requested) = std::sync::mpsc::channel();
    let service = service_fn(move |_: Unit| {
        let start = Instant::now();
        while start.elapsed() <= 2 * limit {}
        Cancellation::current().cancel(CancelReason::Requested);
        requested.send(()).unwrap();
        pending::<Result<(), Refused>>()
    });
    let mut sentinel = layer(&recorder)
        .timeout(limit)
        .runtime(jobs.handle().clone())
        .layer(service);
    let response = sentinel.ready().await.unwrap().call(Unit::default());
    is_requested.recv().unwrap();
    response.await.unwrap();
    let seen = recorder.reports()[0];
    assert_eq!(seen.reason, Some(CancelReason::Requested), "{seen:?}");
    jobs.shutdown_background();
}

#[tokio::test(start_paused = true)]
async fn a_request_from_a_plain_thread_is_timed_by_the_clock_of_its_job() {
    let recorder = Recorder::default();
    let (handle, service) = handing_out(Fate::Hang);
    let limit = Duration::from_millis(1);
    let mut sentinel = layer(&recorder).timeout(limit).layer(service);
    let response = sentinel.ready().await.unwrap().call(Unit::default());
    settle_down().await;
    // The clock of the wall goes beyond the limit, while that of the runtime stands still.
    let start = wall();
    while wall() - start <= 2 * limit {}
    let handle = handle.lock().unwrap().take().unwrap();
    let cancelling = thread::spawn(move || handle.cancel(CancelReason::LeaseLost));
    cancelling.join().unwrap();
    response.await.unwrap();
    let seen = Seen::cancelled(CancelReason::LeaseLost, true);
    assert_eq!(recorder.reports(), [seen]);
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_that_comes_after_a_panic_does_not_excuse_it_in_a_busy_task() {
    let recorder = Recorder::default();
    let token = CancellationToken::new();
    let mut sentinel = layer(&recorder)
        .shutdown(token.clone())
        .layer(Worker::default());
    let service = sentinel.ready().await.unwrap();
    let mut response = pin!(service.call(Work::new(Fate::PanicFirst)));
    settle_down().await;
    token.cancel();
    // tokio reports to a task out of budget that the job has not ended, although it has.
    poll_fn(|cx| {
        exhaust_budget(cx);
        assert!(response.as_mut().poll(cx).is_pending());
        Poll::Ready(())
    })
    .await;
    response.await.unwrap();
    assert_eq!(recorder.reports(), [Seen::panicked()]);
}

#[tokio::test(start_paused = true)]
async fn a_guard_that_cancels_when_it_is_dropped_does_not_excuse_the_panic_that_drops_it() {
    struct CancelsOnDrop(Cancellation);

    impl Drop for CancelsOnDrop {
        fn drop(&mut self) {
            self.0.cancel(CancelReason::Requested);
        }
    }

    let recorder = Recorder::default();
    for in_poll in [true, false] {
        let service = service_fn(move |_: Unit| {
            // For the child tasks of a job, as the `DropGuard` of tokio-util is used.
            let guard = CancelsOnDrop(Cancellation::current());
            let mut guard = Some(guard);
            poll_fn(move |_| {
                // Dropped as the panic unwinds, or with the future thereafter.
                let _guard = in_poll.then(|| guard.take());
                raise("with a guard")
            })
        });
        let service = service.map_future(|it: std::future::PollFn<_>| async move {
            let it: Result<(), Refused> = it.await;
            it
        });
        let mut sentinel = layer(&recorder).layer(service);
        call(&mut sentinel, Unit::default()).await.unwrap();
    }
    assert_eq!(recorder.reports(), [Seen::panicked(); 2]);
}

#[tokio::test(start_paused = true)]
async fn a_panic_that_the_job_caught_does_not_make_the_next_one_the_cause() {
    struct LosesLease;

    impl Drop for LosesLease {
        fn drop(&mut self) {
            Cancellation::current().cancel(CancelReason::LeaseLost);
        }
    }

    for grace in [Duration::ZERO, SECOND] {
        let recorder = Recorder::default();
        let service = service_fn(async |_: Unit| {
            let caught = catch_unwind(|| {
                let _guard = LosesLease;
                raise("and is caught")
            });
            assert!(caught.is_err());
            // Panics in its grace, or in a destructor as it is aborted.
            let _bomb = Bomb;
            yield_now().await;
            cancelled().await;
            yield_now().await;
            Ok::<_, Refused>(())
        });
        let mut sentinel = layer(&recorder).grace(grace).layer(service);
        call(&mut sentinel, Unit::default()).await.unwrap();
        let seen = Seen::cancelled(CancelReason::LeaseLost, true).with_panic(true);
        assert_eq!(recorder.reports(), [seen], "{grace:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_handle_that_outlives_its_job_does_not_keep_the_waker_of_its_caller() {
    struct Silent;

    impl Wake for Silent {
        fn wake(self: Arc<Self>) {}
    }

    let recorder = Recorder::default();
    let (handle, service) = handing_out(Fate::Hang);
    let mut sentinel = layer(&recorder).layer(service);
    let service = sentinel.ready().await.unwrap();
    let mut response = Box::pin(service.call(Unit::default()));
    let silent = Arc::new(Silent);
    let waker = Waker::from(Arc::clone(&silent));
    let mut context = Context::from_waker(&waker);
    assert!(response.as_mut().poll(&mut context).is_pending());
    settle_down().await;
    handle
        .lock()
        .unwrap()
        .as_ref()
        .unwrap()
        .cancel(CancelReason::Requested);
    while response.as_mut().poll(&mut context).is_pending() {
        yield_now().await;
    }
    drop((response, waker));
    assert_eq!(recorder.reports().len(), 1);
    assert_eq!(Arc::strong_count(&silent), 1);
    drop(handle);
}

#[tokio::test(start_paused = true)]
async fn a_job_is_told_of_its_limit_though_the_task_of_its_caller_is_busy() {
    let recorder = Recorder::default();
    let (handle, service) = handing_out(Fate::Hang);
    let mut sentinel = layer(&recorder).grace(SECOND).layer(service);
    let service = sentinel.ready().await.unwrap();
    let mut response = pin!(service.call(Unit::default()));
    assert!(poll!(&mut response).is_pending());
    sleep(LIMIT + SECOND).await;
    // The futures that are polled before the response use up the budget of the task each time.
    poll_fn(|cx| {
        exhaust_budget(cx);
        assert!(response.as_mut().poll(cx).is_pending());
        Poll::Ready(())
    })
    .await;
    assert!(handle.lock().unwrap().as_ref().unwrap().is_cancelled());
}
