//! A worker whose jobs all succeed, so that a success counts for nothing: failures still do.

use tokio::time::sleep;
use tower_layer::Layer;

use super::{Fate, Worker, is_ready, ms, strict};
use crate::support::{Unit, call};

#[tokio::test(start_paused = true)]
async fn a_worker_that_resumed_and_calmed_down_pauses_again() {
    let worker = Worker::new(Fate::Error);
    let mut service = strict().layer(worker.clone());
    for round in 0..3 {
        worker.set(Fate::Error);
        for _ in 0..2 {
            assert!(call(&mut service, Unit::default()).await.is_err());
        }
        assert!(!is_ready(&mut service).await, "round {round}");
        sleep(ms(100)).await;
        // The probe, and more than a window.
        worker.set(Fate::Ok);
        for _ in 0..5 {
            call(&mut service, Unit::default()).await.unwrap();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn each_success_counts_until_the_window_is_full() {
    let worker = Worker::new(Fate::Ok);
    let layer = strict().window(4).threshold(0.5).minimum_sample(4);
    let mut service = layer.layer(worker.clone());
    for fate in [Fate::Ok, Fate::Ok, Fate::Error, Fate::Error] {
        assert!(is_ready(&mut service).await);
        worker.set(fate);
        let _result = call(&mut service, Unit::default()).await;
    }
    assert!(!is_ready(&mut service).await);
}
