//! Pauses that grow, and the one probe at the end of each.

use std::sync::Arc;

use futures_util::poll;
use tokio::{
    runtime::Builder,
    sync::Semaphore,
    task::{JoinSet, yield_now},
    time::{Instant, sleep},
};
use tower::{Service, ServiceExt, service_fn};
use tower_layer::Layer;
use tower_sentinel::{SentinelLayer, intensity::IntensityState};

use super::{Fate, Worker, is_ready, let_it_pause, ms, paused, probe, strict, waits};
use crate::support::{Recorder, Refused, Unit, call};

#[tokio::test(start_paused = true)]
async fn each_probe_that_fails_makes_the_pause_longer_and_one_that_succeeds_ends_it() {
    let layer = strict().pause(ms(100)..=ms(500));
    let worker = Worker::new(Fate::Error);
    let mut service = layer.layer(worker.clone());
    let_it_pause(&mut service).await;
    for pause in [100, 200, 400, 500, 500].map(ms) {
        let paused_at = Instant::now();
        service.ready().await.unwrap();
        assert_eq!(paused_at.elapsed(), pause);
        assert!(!is_ready(&mut service.clone()).await, "one probe alone");
        let _refused = service.call(Unit::default()).await;
    }
    service.ready().await.unwrap();
    worker.set(Fate::Ok);
    service.call(Unit::default()).await.unwrap();

    // All at once.
    let mut clones: Vec<_> = (0..100).map(|_| service.clone()).collect();
    for clone in &mut clones {
        assert!(is_ready(clone).await);
    }
    // The earlier outcomes are forgotten: one failure is none of two, and the pause is the first.
    worker.set(Fate::Error);
    let _refused = service.ready().await.unwrap().call(Unit::default()).await;
    assert!(is_ready(&mut service).await);
    let_it_pause(&mut service).await;
    assert_eq!(paused(*layer.watch().borrow()), Some(ms(100)));
}

#[tokio::test(start_paused = true)]
async fn jobs_that_were_called_before_a_pause_say_nothing_after_it() {
    let gate = Arc::new(Semaphore::new(0));
    let waiting = Arc::clone(&gate);
    let slow = service_fn(move |fails: bool| {
        let gate = Arc::clone(&waiting);
        async move {
            if fails {
                if let Ok(permit) = gate.acquire().await {
                    permit.forget();
                }
                return Err(Refused);
            }
            Ok(())
        }
    });
    let layer = strict();
    let mut service = layer.layer(slow);
    let mut late = JoinSet::new();
    for _ in 0..6 {
        late.spawn(service.ready().await.unwrap().call(true));
    }
    yield_now().await;
    // Two of them make it pause, two more end in the pause, the last two after it.
    for _ in 0..4 {
        gate.add_permits(1);
        late.join_next().await.unwrap().unwrap().unwrap_err();
    }
    assert_eq!(paused(*layer.watch().borrow()), Some(ms(100)));
    call(&mut service, false).await.unwrap();
    assert_eq!(*layer.watch().borrow(), IntensityState::Running);
    gate.close();
    late.join_all().await;
    assert_eq!(*layer.watch().borrow(), IntensityState::Running);
}

#[tokio::test(start_paused = true)]
async fn the_probe_is_not_cloned_and_comes_back_from_who_does_not_use_it() {
    let worker = Worker::new(Fate::Hang);
    let layer = strict();
    let mut service = layer.layer(worker.clone());
    let_it_pause(&mut service).await;
    sleep(ms(100)).await;

    let mut holder = service.clone();
    assert!(is_ready(&mut holder).await);
    assert!(is_ready(&mut holder).await, "it stays ready");
    assert!(!is_ready(&mut holder.clone()).await);
    let mut waiting = waits(service.clone());
    assert!(!waiting.is_finished_soon().await);

    // Dropped unused.
    drop(holder);
    let mut holder = waiting.finish().await;
    assert_eq!(*layer.watch().borrow(), IntensityState::Probing);

    // Dropped while its future is pending, for a reason that does not count.
    let mut waiting = waits(service.clone());
    assert!(!waiting.is_finished_soon().await);
    let mut response = holder.call(Unit::default());
    assert!(poll!(&mut response).is_pending());
    assert!(!is_ready(&mut holder).await, "it is used up");
    assert!(!waiting.is_finished_soon().await);
    drop(response);
    let mut holder = waiting.finish().await;

    // Dropped before its first poll.
    drop(holder.call(Unit::default()));
    assert!(is_ready(&mut service).await);
    assert_eq!(*layer.watch().borrow(), IntensityState::Probing);
    worker.set(Fate::Ok);
    service.call(Unit::default()).await.unwrap();
    assert_eq!(*layer.watch().borrow(), IntensityState::Running);
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_is_cancelled_comes_back_and_one_that_is_stopped_by_its_limit_failed() {
    for (fate, limit, expected) in [
        (Fate::LosesItsLease, ms(1_000), IntensityState::Probing),
        (Fate::CancelsThenPanics, ms(1_000), IntensityState::Probing),
        (Fate::Ok, ms(1_000), IntensityState::Running),
    ] {
        let (state, _) = probe(fate, limit).await;
        assert_eq!(state, expected, "{fate:?}");
    }
    for fate in [
        Fate::Error,
        Fate::PanicInCall,
        Fate::PanicInFuture,
        Fate::Hang,
        Fate::HangWithBomb,
        Fate::CancelsInUnwinding,
    ] {
        let (state, _) = probe(fate, ms(1_000)).await;
        assert_eq!(paused(state), Some(ms(200)), "{fate:?}");
    }
}

#[test]
fn a_probe_that_blocks_its_thread_has_failed_when_its_limit_has_passed() {
    let jobs = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let worker = Worker::new(Fate::Error);
    let thread = Arc::clone(&worker.thread);
    let layer = strict().pause(ms(10)..=ms(1_000));
    let recorder = Recorder::default();
    let mut service = SentinelLayer::new(recorder.policy())
        .timeout(ms(50))
        .stop_wait(ms(10))
        .runtime(jobs.handle().clone())
        .layer(layer.layer(worker.clone()));
    Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(async {
            // A busy machine may come to a job too late: then it never starts, and is no news.
            while paused(*layer.watch().borrow()).is_none() {
                call(&mut service, Unit::default()).await.unwrap();
            }
            worker.set(Fate::Blocks);
            while !thread.entered() {
                let report = call(&mut service, Unit::default()).await.unwrap();
                assert_eq!(report.outcome.is_stopped(), !thread.entered());
            }
            assert_eq!(paused(*layer.watch().borrow()), Some(ms(20)));
            // The next probe does not wait for its thread.
            worker.set(Fate::Ok);
            while *layer.watch().borrow() != IntensityState::Running {
                call(&mut service, Unit::default()).await.unwrap();
            }
            thread.release();
        });
    // A later outcome changes nothing.
    drop(jobs);
    assert_eq!(*layer.watch().borrow(), IntensityState::Running);
}
