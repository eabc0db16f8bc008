//! [`Lease`] of a worker, and the workers of a pool.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::sleep,
};

use super::worker::{Program, Worker};
use crate::{
    backoff::{Delays, full_jitter},
    outcome::guard,
};

/// Settings of a pool.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) program: Program,
    pub(super) max_jobs: Option<u64>,
    pub(super) memory: Option<u64>,
}

/// Settings, places and idle workers of a pool and its clones.
pub(super) struct Shared {
    pub(super) settings: Settings,
    places: Arc<Semaphore>,
    idle: Mutex<Vec<Worker>>,
}

/// Worker without a job; it goes back to its pool when this is dropped.
pub(super) struct Lease {
    /// `None` while it has a job, and after it has ended.
    worker: Option<Worker>,
    shared: Arc<Shared>,
    // After the worker.
    _place: OwnedSemaphorePermit,
}

/// Waits for a place, and takes an idle worker or starts one.
pub(super) async fn acquire(shared: Arc<Shared>) -> Box<Lease> {
    // Invariant: it is never closed.
    let place = Arc::clone(&shared.places).acquire_owned().await;
    let place = place.expect("the places of a pool are never closed");
    Box::new(Lease {
        worker: Some(worker(&shared).await),
        shared,
        _place: place,
    })
}

/// Takes an idle worker, or starts one.
async fn worker(shared: &Shared) -> Worker {
    let mut failures = 0;
    loop {
        let idle = shared.idle().pop();
        if let Some(mut worker) = idle {
            match worker.is_idle() {
                true => return worker,
                false => continue,
            }
        }
        match Worker::start(&shared.settings.program).await {
            Ok(worker) => return worker,
            Err(error) => {
                failures += 1;
                let pauses = Delays::new(Duration::from_millis(100)..=Duration::from_secs(10));
                let pause = full_jitter(pauses.nth(failures), fastrand::f64());
                guard(|| {
                    tracing::warn!(
                        %error,
                        failures,
                        ?pause,
                        "can't start a process for jobs: trying again after a pause"
                    );
                });
                sleep(pause).await;
            }
        }
    }
}

impl Shared {
    pub(super) fn new(settings: Settings, places: usize) -> Self {
        Self {
            settings,
            places: Arc::new(Semaphore::new(places.min(Semaphore::MAX_PERMITS))),
            idle: Mutex::default(),
        }
    }

    /// Returns the same without a worker, with other settings.
    pub(super) fn with(&self, change: impl FnOnce(&mut Settings)) -> Self {
        let mut settings = self.settings.clone();
        change(&mut settings);
        Self::new(settings, self.places.available_permits())
    }

    pub(super) fn number_idle(&self) -> usize {
        self.idle().len()
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Worker>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lease {
    /// Returns whether the worker can take a job.
    pub(super) fn is_usable(&mut self) -> bool {
        self.worker.as_mut().is_some_and(Worker::is_idle)
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    /// Takes the worker for a job, or another one: it is killed if it does not come back.
    pub(super) async fn take(&mut self) -> Worker {
        match self.worker.take() {
            Some(worker) => worker,
            None => worker(&self.shared).await,
        }
    }

    /// Gives the worker back after its job.
    pub(super) fn give_back(&mut self, worker: Worker) {
        if !worker.is_spoilt && self.settings().max_jobs.is_none_or(|max| worker.jobs < max) {
            self.worker = Some(worker);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.take() {
            self.shared.idle().push(worker);
        }
    }
}
