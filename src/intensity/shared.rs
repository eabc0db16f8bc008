//! [`Shared`] state of all services of a layer: the machine, its waiting services and its watchers.

use std::{
    mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    thread,
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

use super::machine::{Change, Limits, Machine, Pass, Phase};
use crate::{
    cancel::{Cancellation, Companion, JobContext, Stopping},
    outcome::guard,
    telemetry::metrics::IntensityInstruments,
    time::Timer,
    waiters::{Waiter, Waiters},
};

/// State of an [`Intensity`](crate::intensity::Intensity): letting jobs through, paused or probing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum IntensityState {
    /// Every job is let through.
    Running,
    /// No job is let through, because most of the last jobs failed, or the last probe failed.
    #[non_exhaustive]
    Paused {
        /// The full length of the pause.
        pause: Duration,
    },
    /// The pause is over, and one job at a time is let through.
    ///
    /// This state begins when a service is first polled for readiness after the pause.
    Probing,
}

impl IntensityState {
    /// Returns the value of the state's gauge.
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
    /// The epoch and two flags, which a job that succeeds reads without the lock. Written only under the
    /// lock.
    status: AtomicU64,
    inner: Mutex<Inner>,
    state: watch::Sender<IntensityState>,
}

#[derive(Debug)]
struct Inner {
    machine: Machine,
    waiting: Waiters,
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
                waiting: Waiters::default(),
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
        // Nothing panics while it is held, since no foreign code runs then.
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

    /// Publishes a change with the lock released, since wakers, watchers and subscribers are foreign code.
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
        let mut waiting = Waiters::default();
        if change.is_some() || is_free {
            waiting = mem::take(&mut inner.waiting);
        }
        drop(inner);
        if let Some(change) = change {
            // Reads the phase again, so that the later of two changes wins.
            let send = || {
                self.state.send_if_modified(|state| {
                    let now = IntensityState::from(self.lock().machine.phase());
                    // Inside the closure, where one change waits for the other.
                    self.instruments.change(now.level());
                    mem::replace(state, now) != now
                })
            };
            guard(|| {
                send();
            });
            guard(|| tell(change));
        }
        waiting.wake();
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
            "pausing: most jobs fail"
        ),
        Change::Probing => tracing::info!("probing with one job"),
        Change::Resumed => tracing::info!("resuming: the probe succeeded"),
    }
}

/// Wait of one clone of a service, for a pause to end or the state to change.
#[derive(Debug, Default)]
pub(super) struct Wait {
    waiter: Waiter,
    pause: Option<Timer>,
}

impl Wait {
    /// Waits until jobs may be called: any number (`None`), or one with the probe.
    pub(super) fn poll(
        &mut self,
        shared: &Arc<Shared>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Probe>> {
        loop {
            self.waiter.register(cx.waker());
            let mut inner = shared.lock();
            let (pass, change) = inner.machine.ask(Instant::now());
            let until = match pass {
                Pass::Open => return Poll::Ready(None),
                Pass::Probe(number) => {
                    // Before anything that may panic, so that the probe is given back.
                    let shared = Arc::clone(shared);
                    let probe = Probe { shared, number };
                    probe.shared.after(inner, change, false);
                    return Poll::Ready(Some(probe));
                }
                Pass::Wait(until) => until,
            };
            inner.waiting.add(&self.waiter);
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
/// It is given back when it is dropped without a result.
#[derive(Debug)]
pub(super) struct Probe {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Probe {
    fn drop(&mut self) {
        // No effect if it had a result.
        self.shared.give_back(self.number);
    }
}

/// Companion that ends a probe whose job has its outcome but blocks its thread, so that its future is not
/// dropped soon.
struct Outlived {
    shared: Arc<Shared>,
    probe: u64,
    job: Arc<JobContext>,
}

impl Companion for Outlived {
    fn stop(&self) {
        // No effect if the job has stopped, since then the probe has ended.
        match self.job.stopping() {
            Some(Stopping::TimeLimit) => self.shared.conclude(self.probe, true),
            _ => self.shared.give_back(self.probe),
        }
    }
}

/// One job from its call to its end, which it counts.
#[derive(Debug)]
pub(super) struct Trial {
    shared: Arc<Shared>,
    epoch: u64,
    probe: Option<Probe>,
    /// `true` while the service's code runs; if it is `true` on drop, that code panicked.
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

    /// Runs code of the service.
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
        // By the outcome that the sentinel will give it.
        let job = Cancellation::current();
        let failed = job.job().map(|job| job.fails(has_panicked));
        if failed.unwrap_or(has_panicked) {
            self.end(true);
        }
    }
}
