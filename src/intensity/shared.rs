//! What all services of a layer share: the machine, who waits for it and who watches it.

use std::{
    mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    thread,
    time::Duration,
};

use futures_util::task::AtomicWaker;
use tokio::{sync::watch, time::Instant};

use super::machine::{Change, Limits, Machine, Pass, Phase};
use crate::{
    cancel::{Cancellation, Companion, JobContext, Stopping},
    outcome::guard,
    telemetry::metrics::IntensityInstruments,
    time::Timer,
};

/// Whether an [`Intensity`](crate::intensity::Intensity) lets jobs through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum IntensityState {
    /// Every job is let through.
    Running,
    /// No job is let through, because most of the last ones failed, or the last probe did.
    #[non_exhaustive]
    Paused {
        /// How long the pause is in all.
        pause: Duration,
    },
    /// The pause is over, and one job at a time is let through.
    ///
    /// It begins when a service first asks to be ready after the pause.
    Probing,
}

impl IntensityState {
    /// Returns the value of the gauge that tells the state.
    fn level(self) -> f64 {
        match self {
            IntensityState::Running => 0.0,
            IntensityState::Probing => 1.0,
            IntensityState::Paused { .. } => 2.0,
        }
    }
}

impl From<Phase> for IntensityState {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Running => IntensityState::Running,
            Phase::Paused { pause, .. } => IntensityState::Paused { pause },
            Phase::Probing { .. } => IntensityState::Probing,
        }
    }
}

const RUNNING: u64 = 1;
const CALM: u64 = 2;
const EPOCH: u32 = 2;

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) limits: Limits,
    pub(super) instruments: IntensityInstruments,
    /// What the path of a job that succeeds reads instead of the lock: the epoch and two flags.
    /// Written under the lock only.
    status: AtomicU64,
    inner: Mutex<Inner>,
    state: watch::Sender<IntensityState>,
}

#[derive(Debug)]
struct Inner {
    machine: Machine,
    /// One waker for each clone that waits, and none for a clone that is dropped.
    waiting: Vec<Weak<AtomicWaker>>,
}

impl Shared {
    pub(super) fn new(limits: Limits) -> Self {
        let machine = Machine::new(limits);
        Self {
            limits,
            instruments: IntensityInstruments::default(),
            status: AtomicU64::new(RUNNING),
            inner: Mutex::new(Inner {
                machine,
                waiting: Vec::new(),
            }),
            state: watch::Sender::new(IntensityState::Running),
        }
    }

    pub(super) fn watch(&self) -> watch::Receiver<IntensityState> {
        self.state.subscribe()
    }

    pub(super) fn state(&self) -> IntensityState {
        self.lock().machine.phase().into()
    }

    pub(super) fn is_running(&self) -> bool {
        self.status.load(Ordering::Acquire) & RUNNING != 0
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while it is held: no foreign code runs then.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, epoch: u64, failed: bool) {
        if !failed && self.status.load(Ordering::Acquire) & CALM != 0 {
            return;
        }
        let mut inner = self.lock();
        let change = inner.machine.record(epoch, failed, Instant::now());
        self.after(inner, change, false);
    }

    fn conclude(&self, probe: u64, failed: bool) {
        let mut inner = self.lock();
        let change = inner.machine.conclude(probe, failed, Instant::now());
        self.after(inner, change, false);
    }

    fn give_back(&self, probe: u64) {
        let mut inner = self.lock();
        let is_free = inner.machine.give_back(probe);
        self.after(inner, None, is_free);
    }

    /// Lets everybody know what changed, with the lock released: wakers, watchers and subscribers
    /// are foreign code.
    fn after(&self, mut inner: MutexGuard<'_, Inner>, change: Option<Change>, is_free: bool) {
        let machine = &inner.machine;
        let mut status = machine.epoch() << EPOCH;
        if matches!(machine.phase(), Phase::Running) {
            status |= RUNNING;
        }
        if machine.is_calm() {
            status |= CALM;
        }
        if self.status.load(Ordering::Relaxed) != status {
            self.status.store(status, Ordering::Release);
        }
        let mut waiting = Vec::new();
        if change.is_some() || is_free {
            waiting = mem::take(&mut inner.waiting);
        }
        drop(inner);
        if let Some(change) = change {
            // Reads the phase anew, so that the last of two changes wins.
            let send = || {
                self.state.send_if_modified(|state| {
                    let now = IntensityState::from(self.lock().machine.phase());
                    // Here, where one change waits for the other.
                    self.instruments.change(now.level());
                    mem::replace(state, now) != now
                })
            };
            guard(|| {
                send();
            });
            guard(|| tell(change));
        }
        let waiting = waiting.iter().filter_map(Weak::upgrade);
        waiting.for_each(|waiter| guard(|| waiter.wake()));
    }
}

fn tell(change: Change) {
    match change {
        Change::Paused {
            failures,
            jobs,
            failed_probes,
            pause,
        } => tracing::warn!(
            failures,
            jobs,
            failed_probes,
            ?pause,
            "most jobs fail: pausing"
        ),
        Change::Probing => tracing::info!("letting one job through"),
        Change::Resumed => tracing::info!("the job succeeded: resuming"),
    }
}

/// Where a clone of a service waits.
#[derive(Debug, Default)]
pub(super) struct Wait {
    waiter: Arc<AtomicWaker>,
    pause: Option<Timer>,
}

impl Wait {
    /// Waits until jobs may be called: any number, or the one of the probe.
    pub(super) fn poll(
        &mut self,
        shared: &Arc<Shared>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Probe>> {
        loop {
            // Before the lock, for it clones and drops wakers, and before the answer, so that no
            // change is missed.
            self.waiter.register(cx.waker());
            let mut inner = shared.lock();
            let (pass, change) = inner.machine.ask(Instant::now());
            let until = match pass {
                Pass::Open => return Poll::Ready(None),
                Pass::Probe(number) => {
                    // Before anything that may panic, so that it comes back.
                    let shared = Arc::clone(shared);
                    let probe = Probe { shared, number };
                    probe.shared.after(inner, change, false);
                    return Poll::Ready(Some(probe));
                }
                Pass::Wait(until) => until,
            };
            let waiter = &self.waiter;
            inner
                .waiting
                .retain(|it| it.strong_count() > 0 && it.as_ptr() != Arc::as_ptr(waiter));
            inner.waiting.push(Arc::downgrade(waiter));
            drop(inner);
            let Some(until) = until else {
                self.pause = None;
                return Poll::Pending;
            };
            let pause = self.pause.get_or_insert_with(|| Timer::until(Some(until)));
            pause.reset(until);
            let polled = pause.poll(cx);
            ready!(polled.expect("a pause is in a tokio runtime with timers"));
        }
    }
}

/// The right to call one job while all others wait.
///
/// Comes back when it is dropped without a result.
#[derive(Debug)]
pub(super) struct Probe {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Probe {
    fn drop(&mut self) {
        // Without effect if it had a result.
        self.shared.give_back(self.number);
    }
}

/// Ends a probe whose job has its outcome but blocks its thread, and so will not be dropped soon.
struct Outlived {
    shared: Arc<Shared>,
    probe: u64,
    job: Arc<JobContext>,
}

impl Companion for Outlived {
    fn stop(&self) {
        // Without effect if the job is gone, for then the probe had its end.
        match self.job.stopping() {
            Some(Stopping::TimeLimit) => self.shared.conclude(self.probe, true),
            _ => self.shared.give_back(self.probe),
        }
    }
}

/// Follows one job from its call to its end, and counts how it ended.
#[derive(Debug)]
pub(super) struct Trial {
    shared: Arc<Shared>,
    epoch: u64,
    probe: Option<Probe>,
    /// Whether the service's code is running; if it is when this is dropped, it panicked.
    entered: bool,
    ended: bool,
}

impl Trial {
    pub(super) fn begin(shared: &Arc<Shared>, probe: Option<Probe>) -> Self {
        if let Some(probe) = &probe {
            if let Some(job) = Cancellation::current().job() {
                job.accompany(Arc::new(Outlived {
                    shared: Arc::clone(shared),
                    probe: probe.number,
                    job: Arc::clone(job),
                }));
            }
        }
        Self {
            shared: Arc::clone(shared),
            epoch: shared.status.load(Ordering::Acquire) >> EPOCH,
            probe,
            entered: false,
            ended: false,
        }
    }

    /// Runs code of the service's.
    pub(super) fn run<R>(&mut self, f: impl FnOnce() -> R) -> R {
        self.entered = true;
        let result = f();
        self.entered = false;
        result
    }

    pub(super) fn end(&mut self, failed: bool) {
        if mem::replace(&mut self.ended, true) {
            return;
        }
        match self.probe.take() {
            Some(probe) => self.shared.conclude(probe.number, failed),
            None => self.shared.record(self.epoch, failed),
        }
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        let has_panicked = self.entered || thread::panicking();
        // As the sentinel will call it.
        let job = Cancellation::current();
        let failed = job.job().map(|job| job.fails(has_panicked));
        if failed.unwrap_or(has_panicked) {
            self.end(true);
        }
    }
}
