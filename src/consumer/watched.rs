//! [`Watched`], what a consumer tells its handles.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

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
    pub(super) paused: watch::Sender<bool>,
    /// Cancelled to end the consumer.
    pub(super) drain: CancellationToken,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    progress: Progress,
    /// Number of the present session. Another one may drain beside it.
    session: u64,
    tasks: usize,
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
            paused: watch::Sender::new(false),
            drain: CancellationToken::new(),
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
            free: counts.limit.map(|limit| limit.saturating_sub(counts.here)),
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
            Phase::Consuming if *self.paused.borrow() => State::Paused {
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
            (counts.tasks, counts.limit) = (tasks, limit);
            (counts.here, counts.unready) = (0, 0);
        }
        self.phase.send_replace(Phase::Consuming);
    }

    pub(super) fn drain(&self) {
        self.phase.send_replace(Phase::Draining);
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
    session: u64,
    running: usize,
    called: u64,
    ended: u64,
    is_unready: bool,
    /// Resolves at the end of a pause.
    resumed: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl Part {
    /// Creates it for a task of the present session.
    pub(super) fn new(watched: Arc<Watched>) -> Self {
        let session = watched.counts().session;
        Self {
            watched,
            session,
            running: 0,
            called: 0,
            ended: 0,
            is_unready: false,
            resumed: None,
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

    /// Returns whether the consumer is paused, and registers the waker for the end of the pause.
    pub(super) fn poll_paused(&mut self, cx: &mut Context<'_>) -> bool {
        loop {
            if !*self.watched.paused.borrow() {
                self.resumed = None;
                return false;
            }
            let resumed = self.resumed.get_or_insert_with(|| {
                let mut paused = self.watched.paused.subscribe();
                Box::pin(async move {
                    // An error can't occur, since the task holds the sender.
                    drop(paused.wait_for(|paused| !paused).await);
                })
            });
            match resumed.as_mut().poll(cx) {
                Poll::Pending => return true,
                // It may be paused again by now.
                Poll::Ready(()) => self.resumed = None,
            }
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let (called, ended) = (self.called, self.ended);
        self.note(0, called, ended, false);
    }
}
