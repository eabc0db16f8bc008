//! [`Lease`] of a worker, and the workers of a pool.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
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
    pub(super) max_rss: Option<u64>,
    pub(super) keeps_panicked: bool,
    pub(super) warm: usize,
}

/// Settings, places and idle workers of a pool and its clones.
pub(super) struct Shared {
    pub(super) settings: Settings,
    places: Arc<Semaphore>,
    idle: Mutex<Vec<Child>>,
    /// Number of children, which grows under the lock of the idle ones: so it is never more than that of all places.
    children: Arc<AtomicUsize>,
    /// There is a place without a child since.
    lost: Notify,
}

/// A worker, and its part of the number of all.
pub(super) struct Child {
    pub(super) worker: Worker,
    // After the worker.
    _counted: Counted,
}

/// Part of a child that is or will be in the number of all.
pub(super) struct Counted(Arc<AtomicUsize>);

/// Place of a worker, and the worker if it has no job: it goes back to its pool when this is dropped.
pub(super) struct Lease {
    /// `None` while it has a job, and after it has ended.
    child: Option<Child>,
    shared: Arc<Shared>,
    /// `None` in the destructor.
    place: Option<OwnedSemaphorePermit>,
}

/// Waits for a place, and takes an idle worker or starts one.
pub(super) async fn acquire(shared: Arc<Shared>) -> Box<Lease> {
    // Invariant: it is never closed.
    let place = Arc::clone(&shared.places).acquire_owned().await;
    let place = place.expect("the places of a pool are never closed");
    let mut lease = Box::new(Lease::new(shared, place));
    lease.child = Some(lease.take().await);
    lease
}

impl Shared {
    pub(super) fn new(mut settings: Settings, places: usize) -> Self {
        // Idle children have no place.
        settings.warm = settings.warm.min(places);
        Self {
            settings,
            places: Arc::new(Semaphore::new(places.min(Semaphore::MAX_PERMITS))),
            idle: Mutex::default(),
            children: Arc::default(),
            lost: Notify::new(),
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

    /// Returns a place for one more child, if fewer are started than should be.
    pub(super) fn missing(self: &Arc<Self>) -> Option<(Lease, Counted)> {
        // Those who have all the places start children themselves.
        let place = Arc::clone(&self.places).try_acquire_owned().ok()?;
        let _idle = self.idle();
        let is_missing = self.children.load(Ordering::Acquire) < self.settings.warm;
        is_missing.then(|| {
            let counted = Counted::new(&self.children);
            (Lease::new(Arc::clone(self), place), counted)
        })
    }

    /// Waits until a place has become free without a child since the last call.
    pub(super) async fn has_lost_one(&self) {
        self.lost.notified().await;
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Child>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an idle worker, or else the right to start one.
    fn take(&self) -> Result<Child, Counted> {
        loop {
            let mut idle = self.idle();
            let Some(mut child) = idle.pop() else {
                return Err(Counted::new(&self.children));
            };
            drop(idle);
            if child.worker.is_idle() {
                return Ok(child);
            }
        }
    }

    /// Starts a worker, after as many tries as it takes.
    async fn start(&self, counted: Counted) -> Child {
        let mut failures = 0;
        loop {
            let error = match Worker::start(&self.settings.program).await {
                Ok(worker) => {
                    return Child {
                        worker,
                        _counted: counted,
                    };
                }
                Err(error) => error,
            };
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

impl Counted {
    fn new(number: &Arc<AtomicUsize>) -> Self {
        number.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(number))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Lease {
    fn new(shared: Arc<Shared>, place: OwnedSemaphorePermit) -> Self {
        Self {
            child: None,
            shared,
            place: Some(place),
        }
    }

    /// Returns whether the worker can take a job.
    pub(super) fn is_usable(&mut self) -> bool {
        self.child
            .as_mut()
            .is_some_and(|child| child.worker.is_idle())
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    /// Starts a worker for another lease.
    pub(super) async fn start(&mut self, counted: Counted) {
        self.child = Some(self.shared.start(counted).await);
    }

    /// Takes the worker for a job, or another one: it is killed if it does not come back.
    pub(super) async fn take(&mut self) -> Child {
        if let Some(child) = self.child.take() {
            return child;
        }
        match self.shared.take() {
            Ok(child) => child,
            Err(counted) => self.shared.start(counted).await,
        }
    }

    /// Gives the worker back after its job.
    pub(super) fn give_back(&mut self, child: Child) {
        let Settings {
            max_jobs, max_rss, ..
        } = self.settings();
        let worker = &child.worker;
        let is_used_up = worker.is_spoilt
            || max_jobs.is_some_and(|max| worker.jobs >= max)
            || max_rss.is_some_and(|max| worker.memory().is_some_and(|used| used > max));
        if !is_used_up {
            self.child = Some(child);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let child = self.child.take();
        let is_lost = child.is_none();
        // Before its place is free.
        self.shared.idle().extend(child);
        drop(self.place.take());
        if is_lost {
            self.shared.lost.notify_one();
        }
    }
}
