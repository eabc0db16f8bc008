//! [`Watched`], what a consumer tells its handles and its watchdog.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::Waker,
};

use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    counts::{Counts, Readiness, Standing, Turn, View},
    inbox::{Inbox, Inboxes, Question},
    share::share_of,
    state::{Pauser, Progress, State},
};

#[derive(Clone, Debug)]
pub(super) enum Phase {
    Idle,
    Connecting {
        attempt: u32,
        since: Instant,
        error: Option<Arc<str>>,
    },
    Consuming,
    Draining,
    Ended,
}

/// State of a consumer that has handles.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) phase: watch::Sender<Phase>,
    paused: AtomicBool,
    /// Number of calls of a session that may be in flight, beside its other limits.
    size: AtomicUsize,
    /// Cancelled to end the consumer.
    pub(super) drain: CancellationToken,
    inboxes: Inboxes,
    counts: Mutex<Counts>,
}

impl Default for Watched {
    fn default() -> Self {
        Self {
            phase: watch::Sender::new(Phase::Idle),
            paused: AtomicBool::new(false),
            size: AtomicUsize::new(usize::MAX),
            drain: CancellationToken::new(),
            inboxes: Inboxes::default(),
            counts: Mutex::default(),
        }
    }
}

impl Watched {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn state(&self) -> State {
        let phase = self.phase.borrow().clone();
        let counts = self.counts();
        let progress = Progress {
            free: self.free(&counts),
            ..counts.progress
        };
        match phase {
            Phase::Idle => State::Idle,
            Phase::Connecting {
                attempt,
                since,
                error,
            } => State::Connecting {
                attempt,
                since,
                error,
            },
            Phase::Consuming if self.is_paused() => State::Paused {
                by: Pauser::Operator,
                progress,
            },
            Phase::Consuming if progress.free == Some(0) => State::Saturated(progress),
            Phase::Consuming if counts.unready() < counts.tasks => State::Consuming(progress),
            Phase::Consuming if counts.is_exhausted() => State::Paused {
                by: Pauser::StuckJobs,
                progress,
            },
            // A limit of the service's own, which counts the same jobs.
            Phase::Consuming if counts.limit.is_none() && counts.here > 0 => {
                State::Saturated(progress)
            }
            Phase::Consuming => State::Paused {
                by: match counts.number_of(Readiness::Throttled) {
                    0 => Pauser::Service,
                    _ => Pauser::Intensity,
                },
                progress,
            },
            Phase::Draining => State::Draining(progress),
            Phase::Ended => State::Ended,
        }
    }

    /// Returns the number of places that no running job of the present session takes, if there is a limit.
    fn free(&self, counts: &Counts) -> Option<usize> {
        let size = Some(self.size()).filter(|&size| size < usize::MAX);
        let limit = [counts.limit, size].into_iter().flatten().min();
        limit.map(|limit| limit.saturating_sub(counts.here))
    }

    /// Returns whether it has not ended, and does not wait for jobs that are stuck.
    pub(super) fn is_live(&self) -> bool {
        match *self.phase.borrow() {
            Phase::Ended => false,
            Phase::Consuming => !self.counts().is_exhausted(),
            Phase::Idle | Phase::Connecting { .. } | Phase::Draining => true,
        }
    }

    /// Returns the state as a watchdog sees it.
    pub(super) fn view(&self) -> View {
        let counts = self.counts();
        let is_unready = counts.number_of(Readiness::Unready) == counts.tasks && counts.here == 0;
        View {
            standing: match counts.number_of(Readiness::Ready) {
                0 if is_unready => Standing::Unready,
                0 => Standing::Other,
                _ => Standing::Takes,
            },
            running: counts.here,
            free: self.free(&counts),
            last_delivery: counts.progress.last_delivery,
            turn: Turn {
                called: counts.progress.called,
                changes: counts.turns,
            },
        }
    }

    /// Counts a stall.
    pub(super) fn note_stall(&self) {
        self.counts().progress.stalls += 1;
    }

    pub(super) fn connect(&self, attempt: u32, error: Option<Arc<str>>) {
        self.phase.send_modify(|phase| {
            let since = match phase {
                Phase::Connecting { since, .. } => *since,
                _ => Instant::now(),
            };
            *phase = Phase::Connecting {
                attempt,
                since,
                error,
            };
        });
    }

    /// Begins a session of so many tasks.
    pub(super) fn consume(&self, tasks: usize, limit: Option<usize>) {
        {
            let mut counts = self.counts();
            counts.session += 1;
            (counts.tasks, counts.joined, counts.limit) = (tasks, 0, limit);
            (counts.here, counts.tasks_by) = (0, [tasks, 0, 0, 0, 0]);
        }
        self.phase.send_replace(Phase::Consuming);
    }

    pub(super) fn drain(&self) {
        self.phase.send_replace(Phase::Draining);
    }

    fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    pub(super) fn pause(&self, is_paused: bool) {
        self.paused.store(is_paused, Ordering::Release);
        self.wake();
    }

    fn size(&self) -> usize {
        self.size.load(Ordering::Acquire)
    }

    pub(super) fn resize(&self, size: usize) {
        self.size.store(size, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        self.inboxes.all().iter().for_each(|inbox| inbox.wake());
    }

    /// Passes a question on to each task.
    pub(super) fn ask(&self, question: &Question) {
        let inboxes = self.inboxes.all();
        inboxes.iter().for_each(|inbox| inbox.put(question.clone()));
    }
}

/// Guard that notes the end of a consumer when it is dropped.
#[derive(Debug)]
pub(super) struct UntilEnd(pub(super) Arc<Watched>);

impl Drop for UntilEnd {
    fn drop(&mut self) {
        self.0.phase.send_replace(Phase::Ended);
    }
}

/// One task's part of the counts.
pub(super) struct Part {
    watched: Arc<Watched>,
    inbox: Arc<Inbox>,
    session: u64,
    /// Number of the task within the session, and the number of all.
    task: usize,
    tasks: usize,
    running: usize,
    called: u64,
    ended: u64,
    readiness: Readiness,
}

impl Part {
    /// Creates it for a task of the present session.
    pub(super) fn new(watched: Arc<Watched>) -> Self {
        let mut counts = watched.counts();
        let (session, task, tasks) = (counts.session, counts.joined, counts.tasks);
        counts.joined += 1;
        drop(counts);
        Self {
            inbox: watched.inboxes.add(),
            watched,
            session,
            task,
            tasks,
            running: 0,
            called: 0,
            ended: 0,
            readiness: Readiness::default(),
        }
    }

    /// Notes the numbers of jobs that the task runs, has taken, and has seen the end of.
    pub(super) fn note(&mut self, running: usize, called: u64, ended: u64, readiness: Readiness) {
        if (self.running, self.called, self.ended, self.readiness)
            == (running, called, ended, readiness)
        {
            return;
        }
        let now = Instant::now();
        let mut counts = self.watched.counts();
        let progress = &mut counts.progress;
        progress.running = progress.running + running - self.running;
        if called > self.called {
            progress.called += called - self.called;
            progress.last_delivery = Some(now);
        }
        if ended > self.ended {
            progress.ended += ended - self.ended;
            progress.last_settled = Some(now);
        }
        if counts.session == self.session {
            counts.here = counts.here + running - self.running;
            counts.tasks_by[self.readiness as usize] -= 1;
            counts.tasks_by[readiness as usize] += 1;
            counts.turns += u64::from(self.readiness != readiness);
        }
        drop(counts);
        (self.running, self.called, self.ended) = (running, called, ended);
        self.readiness = readiness;
    }

    /// Registers the waker for everything that handles change, and returns their new questions.
    pub(super) fn questions(&self, waker: &Waker) -> Vec<Question> {
        self.inbox.open(waker)
    }

    pub(super) fn is_paused(&self) -> bool {
        self.watched.is_paused()
    }

    /// Returns the number of calls of this task that may be in flight by the [size](crate::consumer::Watch::resize) of
    /// the consumer.
    pub(super) fn limit(&self) -> usize {
        match self.watched.size() {
            usize::MAX => usize::MAX,
            size => share_of(size, self.task, self.tasks),
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let (called, ended) = (self.called, self.ended);
        self.note(0, called, ended, Readiness::default());
    }
}
