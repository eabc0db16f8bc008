//! [`Watched`], what a consumer tells its handles.

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
    inbox::{Inbox, Inboxes, Question},
    share::share_of,
};

/// State of a consumer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// It is not awaited yet.
    Idle,
    /// It has no subscription, and tries to make one, or pauses before it tries again.
    Connecting {
        /// Number of the attempt, from 1 on.
        attempt: u32,
        /// Time of the start, or of the end of the last session.
        since: Instant,
        /// Cause of the end of the last session, or of the last failed attempt.
        error: Option<Arc<str>>,
    },
    /// It takes jobs.
    Consuming(Progress),
    /// It takes no job before another one is settled: all places are taken.
    Saturated(Progress),
    /// It has a subscription and takes no jobs.
    Paused {
        /// Who paused it.
        by: Pauser,
        /// Its counts.
        progress: Progress,
    },
    /// It takes no more jobs from this subscription, and lets those that run end.
    Draining(Progress),
    /// Its future has ended, or was dropped.
    Ended,
}

/// Reason for a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Pauser {
    /// [`Watch::pause`](crate::consumer::Watch::pause).
    Operator,
    /// The service is not ready, though no job runs. For example, an [`IntensityLayer`](crate::IntensityLayer) pauses it.
    Service,
}

/// Counts of a consumer, of all its sessions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Number of jobs that were taken and have not ended.
    pub running: usize,
    /// Number of jobs that may be taken beside them; `None` if the consumer does not limit them, as without its [own
    /// sentinel](crate::Consumer::sentinel).
    pub free: Option<usize>,
    /// Number of jobs that were taken since the start.
    pub called: u64,
    /// Number of jobs that have ended since the start.
    pub ended: u64,
    /// Time at which a job was last taken.
    pub last_delivery: Option<Instant>,
    /// Time at which a job last ended: it was settled, or its settlement failed.
    pub last_settled: Option<Instant>,
}

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

#[derive(Debug, Default)]
struct Counts {
    progress: Progress,
    /// Number of the present session. Another one may drain beside it.
    session: u64,
    tasks: usize,
    /// Number of those that have joined.
    joined: usize,
    limit: Option<usize>,
    /// Number of running jobs of the present session.
    here: usize,
    /// Number of its tasks that have room for a job, and whose service is not ready.
    unready: usize,
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
        let size = Some(self.size()).filter(|&size| size < usize::MAX);
        let limit = [counts.limit, size].into_iter().flatten().min();
        let progress = Progress {
            free: limit.map(|limit| limit.saturating_sub(counts.here)),
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
            Phase::Consuming if counts.unready < counts.tasks => State::Consuming(progress),
            // A limit of the service's own, which counts the same jobs.
            Phase::Consuming if counts.limit.is_none() && counts.here > 0 => {
                State::Saturated(progress)
            }
            Phase::Consuming => State::Paused {
                by: Pauser::Service,
                progress,
            },
            Phase::Draining => State::Draining(progress),
            Phase::Ended => State::Ended,
        }
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
            (counts.here, counts.unready) = (0, 0);
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
    is_unready: bool,
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
            is_unready: false,
        }
    }

    /// Notes the numbers of jobs that the task runs, has taken, and has seen the end of.
    pub(super) fn note(&mut self, running: usize, called: u64, ended: u64, is_unready: bool) {
        if (self.running, self.called, self.ended, self.is_unready)
            == (running, called, ended, is_unready)
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
            counts.unready =
                counts.unready + usize::from(is_unready) - usize::from(self.is_unready);
        }
        drop(counts);
        (self.running, self.called, self.ended) = (running, called, ended);
        self.is_unready = is_unready;
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
        self.note(0, called, ended, false);
    }
}
