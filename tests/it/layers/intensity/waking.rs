//! Calls that wait for the end of a pause are woken.

use std::time::Duration;

use tokio::{
    runtime::Builder,
    task::yield_now,
    time::{sleep, timeout},
};
use tower::{Service, ServiceExt, service_fn};
use tower_layer::Layer;
use tower_sentinel::IntensityLayer;

use super::{Fate, Waiting, Worker, is_ready, let_it_pause, ms, strict, waits};
use crate::support::{Count, Refused, Unit, paused_time, raise};

#[tokio::test(start_paused = true)]
async fn all_clones_that_wait_are_woken_when_it_resumes() {
    let worker = Worker::new(Fate::Error);
    let mut service = strict().layer(worker.clone());
    let_it_pause(&mut service).await;
    let mut waiting: Vec<_> = (0..100).map(|_| waits(service.clone())).collect();
    // The probe is any one of them.
    sleep(ms(101)).await;
    let mut probes = Vec::new();
    for _ in 0..100 {
        let task = waiting.remove(0);
        match task.0.is_finished() {
            true => probes.push(task.finish().await),
            false => waiting.push(task),
        }
    }
    assert_eq!(probes.len(), 1);

    // It fails: all the others wait for the next pause, though their timers had fired.
    let _refused = probes[0].call(Unit::default()).await;
    probes.clear();
    sleep(ms(199)).await;
    assert!(waiting.iter().all(|task| !task.0.is_finished()));
    sleep(ms(2)).await;
    let next = waiting.iter().position(|task| task.0.is_finished());
    let mut probe = waiting.remove(next.unwrap()).finish().await;
    assert!(waiting.iter().all(|task| !task.0.is_finished()));

    worker.set(Fate::Ok);
    probe.call(Unit::default()).await.unwrap();
    for task in waiting {
        task.finish().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_that_moves_to_another_task_is_woken_there() {
    let worker = Worker::new(Fate::Ok);
    let mut service = strict().layer(worker);
    let_it_pause(&mut service).await;
    let mut moved = service.clone();
    assert!(!is_ready(&mut moved).await);
    let moved = tokio::spawn(async move {
        moved.ready().await.unwrap();
        moved
    });
    yield_now().await;
    sleep(ms(100)).await;
    drop(Waiting(moved).finish().await);
    // A waiter that is no longer polled does not keep the others from the probe.
    assert!(is_ready(&mut service).await);
}

#[test]
fn a_pause_ends_though_the_runtime_ends_that_it_began_in() {
    let worker = Worker::new(Fate::Ok);
    let mut service = strict().layer(worker);
    paused_time().block_on(let_it_pause(&mut service));
    paused_time().block_on(async {
        service.ready().await.unwrap();
    });
}

#[test]
fn no_wake_up_is_lost_between_threads() {
    let runtime = Builder::new_multi_thread()
        .worker_threads(4)
        .enable_all()
        .build()
        .unwrap();
    let layer = IntensityLayer::new()
        .window(4)
        .minimum_sample(2)
        .pause(Duration::from_micros(1)..=ms(1));
    let done = Count::default();
    let fickle = service_fn(|job: u64| async move {
        yield_now().await;
        match job % 3 {
            0 => Ok(()),
            1 => Err(Refused),
            _ => raise("a bug"),
        }
    });
    let tasks: Vec<_> = (0..16)
        .map(|task| {
            let (mut service, done) = (layer.layer(fickle), done.clone());
            runtime.spawn(async move {
                for job in 0..100 {
                    let mut clone = service.clone();
                    clone.ready().await.unwrap();
                    // Some are ready and do nothing, some are called and dropped.
                    match (task + job) % 7 {
                        0 => drop(clone),
                        1 => drop(clone.call(job)),
                        _ => drop(tokio::spawn(clone.call(job)).await),
                    }
                    done.add();
                }
                service.ready().await.unwrap();
            })
        })
        .collect();
    runtime.block_on(async {
        for task in tasks {
            let limit = Duration::from_secs(60);
            timeout(limit, task).await.expect("a lost wake-up").unwrap();
        }
    });
    assert_eq!(done.get(), 1_600);
}
