//! [`Watch`], by which others see and operate a consumer.

use std::{fmt, sync::Arc};

use tokio::{
    sync::{mpsc::unbounded_channel, watch},
    task,
};

use super::{
    inbox::Question,
    state::State,
    watched::{Phase, Watched},
};
use crate::sentinel::RunningJob;

/// Handle to a consumer, to see its state from outside and to operate it.
///
/// It comes from [`Consumer::watch`](crate::Consumer::watch), before the consumer is awaited. Clones are handles to the
/// same consumer. It does not keep the consumer alive.
///
/// # Probes
///
/// - [`is_ready`](Self::is_ready): the consumer has a subscription, and takes jobs.
/// - [`is_live`](Self::is_live): the consumer has not ended, and no stuck jobs keep it from taking others. An outage of
///   the broker is no reason to restart the process, since the consumer connects anew by itself.
///
/// # Costs
///
/// Without a handle, nothing. With one, a task of the consumer updates the counts each time that it has taken or settled
/// jobs, and not once for each job.
///
/// # Examples
///
/// ```
/// use std::{convert::Infallible, time::Duration};
/// use tokio::time::sleep;
/// use tower::service_fn;
/// use tower_sentinel::{
///     Consumer, SentinelLayer, SettlePolicy, ack_on_success,
///     broker::memory::{Broker, Delivery},
///     consumer::State,
/// };
///
/// async fn process(_: Delivery<u32>) -> Result<(), Infallible> {
///     sleep(Duration::from_secs(10)).await;
///     Ok(())
/// }
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// let queue = Broker::new().queue("jobs").declare();
/// queue.publish(7);
/// let consumer = Consumer::new(queue.subscribe(64).unwrap(), service_fn(process))
///     .sentinel(SentinelLayer::new(SettlePolicy::new(ack_on_success())));
/// let watch = consumer.watch();
/// let consumer = tokio::spawn(consumer.run());
///
/// sleep(Duration::from_secs(1)).await;
/// let State::Consuming(progress) = watch.state() else { panic!() };
/// assert_eq!((progress.running, progress.free), (1, Some(63)));
/// assert!(watch.is_ready());
///
/// watch.drain();
/// let summary = consumer.await.unwrap().unwrap();
/// assert_eq!(summary.answered, 1);
/// assert_eq!(watch.state(), State::Ended);
/// assert!(!watch.is_live());
/// # }
/// ```
#[derive(Clone)]
pub struct Watch {
    watched: Arc<Watched>,
    changes: watch::Receiver<Phase>,
}

impl Watch {
    pub(super) fn new(watched: Arc<Watched>) -> Self {
        let changes = watched.phase.subscribe();
        Self { watched, changes }
    }

    /// Returns the present state.
    pub fn state(&self) -> State {
        self.watched.state()
    }

    /// Waits until the consumer begins to connect, consumes, drains or ends, and returns its state then.
    ///
    /// Changes since the last call, or since [`Consumer::watch`](crate::Consumer::watch), count. Several of them may be
    /// one. Jobs that are taken and settled are no change, nor are pauses. After the end it returns at once.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn changed(&mut self) -> State {
        // An error can't occur, since this holds the sender.
        drop(self.changes.changed().await);
        self.state()
    }

    /// Returns whether the consumer has a subscription and takes jobs, now or as soon as a job ends.
    ///
    /// For a readiness probe: it is `false` while the consumer connects, is paused or drains.
    pub fn is_ready(&self) -> bool {
        matches!(self.state(), State::Consuming(_) | State::Saturated(_))
    }

    /// Returns whether the consumer has not ended, and is not stuck.
    ///
    /// For a liveness probe: it is `true` while the broker is out of reach, and while the consumer is paused. It is stuck
    /// if it takes no jobs because as many of them as [`max_abandoned`](crate::SentinelLayer::max_abandoned) block their
    /// threads and can't be stopped: only a new process is free of them. Without that bound it is not known.
    pub fn is_live(&self) -> bool {
        self.watched.is_live()
    }

    /// Lets the consumer take no more jobs until [`resume`](Self::resume) is called. Jobs that run go on, and the
    /// subscription stays.
    ///
    /// Jobs that the broker has already sent, up to the prefetch, wait in this process and are not given to others. A
    /// broker with a lease or a consumer timeout may take them back.
    pub fn pause(&self) {
        self.watched.pause(true);
    }

    /// Ends a [`pause`](Self::pause).
    ///
    /// ```
    /// # use std::convert::Infallible;
    /// # use tower::service_fn;
    /// # use tower_sentinel::{Consumer, SentinelLayer, SettlePolicy, ack_on_success};
    /// # use tower_sentinel::{broker::memory::{Broker, Delivery}, consumer::State};
    /// # async fn process(_: Delivery<u32>) -> Result<(), Infallible> { Ok(()) }
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// # let queue = Broker::new().queue("jobs").declare();
    /// # let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
    /// let consumer = Consumer::new(queue.subscribe(64).unwrap(), service_fn(process)).sentinel(layer);
    /// let mut watch = consumer.watch();
    /// watch.pause();
    /// let consumer = tokio::spawn(consumer.run());
    /// queue.publish(7);
    /// # tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    /// assert!(!watch.is_ready());
    ///
    /// watch.resume();
    /// queue.emptied().await; // the job is settled
    /// watch.drain();
    /// assert!(consumer.await.unwrap().is_ok());
    /// assert_eq!(watch.changed().await, State::Ended);
    /// # }
    /// ```
    pub fn resume(&self) {
        self.watched.pause(false);
    }

    /// Sets the number of jobs that may run at a time, within the prefetch; no number by default.
    ///
    /// Each task of the consumer has an equal part of it. If a task runs more, they go on, and it takes none until it runs
    /// fewer. A number above the prefetch is the prefetch, and a limit of the service's own still applies. The number also
    /// holds for later sessions. With 0 no job is taken. Jobs that the broker has already sent wait in this process, as in
    /// a [`pause`](Self::pause).
    ///
    /// ```
    /// # use std::{convert::Infallible, future::pending, time::Duration};
    /// # use tokio::time::sleep;
    /// # use tower::service_fn;
    /// # use tower_sentinel::{Consumer, SentinelLayer, SettlePolicy, ack_on_success};
    /// # use tower_sentinel::{broker::memory::{Broker, Delivery}, consumer::State};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// # let queue = Broker::new().queue("jobs").declare();
    /// # (0..10).for_each(|job| queue.publish(job));
    /// # let service = service_fn(|_: Delivery<u32>| pending::<Result<(), Infallible>>());
    /// # let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
    /// let consumer = Consumer::new(queue.subscribe(64).unwrap(), service).sentinel(layer);
    /// let watch = consumer.watch();
    /// watch.resize(4);
    /// tokio::spawn(consumer.run());
    ///
    /// sleep(Duration::from_secs(1)).await;
    /// let State::Saturated(progress) = watch.state() else { panic!() };
    /// assert_eq!(progress.running, 4);
    /// # }
    /// ```
    pub fn resize(&self, size: usize) {
        self.watched.resize(size);
    }

    /// Returns the jobs that run under a sentinel, the oldest first; also those of a session that drains.
    ///
    /// Each task of the consumer is asked, so it waits while one of them is blocked. A job is listed from its call to
    /// its outcome. Jobs behind a middleware that passes them on to other tasks, as a `Buffer` does, are not listed.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    ///
    /// ```
    /// # use std::{convert::Infallible, future::pending, time::Duration};
    /// # use tokio::time::sleep;
    /// # use tower::service_fn;
    /// # use tower_sentinel::{Consumer, SentinelLayer, SettlePolicy, ack_on_success};
    /// # use tower_sentinel::broker::memory::{Broker, Delivery};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// # let queue = Broker::new().queue("jobs").declare();
    /// # queue.publish(7);
    /// # let service = service_fn(|_: Delivery<u32>| pending::<Result<(), Infallible>>());
    /// let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
    /// let consumer = Consumer::new(queue.subscribe(64).unwrap(), service).sentinel(layer);
    /// let watch = consumer.watch();
    /// tokio::spawn(consumer.run());
    ///
    /// sleep(Duration::from_secs(10)).await;
    /// let jobs = watch.jobs().await;
    /// assert_eq!(jobs.len(), 1);
    /// assert_eq!(jobs[0].time_left, Some(Duration::from_secs(20)));
    ///
    /// assert!(watch.cancel(jobs[0].id).await);
    /// # }
    /// ```
    pub async fn jobs(&self) -> Vec<RunningJob> {
        let mut jobs = self.ask(None).await;
        jobs.sort_by_key(|job| job.since);
        jobs
    }

    /// Stops one of the [`jobs`](Self::jobs) as its time limit would, and returns whether it was there.
    ///
    /// The job is told to stop, has its [`grace`](crate::SentinelLayer::grace) and is aborted. It is
    /// [`Cancelled`](crate::Outcome::Cancelled) with [`CancelReason::Requested`](crate::outcome::CancelReason::Requested),
    /// and settled as the policy decides. This does not wait for that.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe. From the first poll on, the job is stopped even if this is dropped.
    pub async fn cancel(&self, id: task::Id) -> bool {
        let jobs = self.ask(Some(id)).await;
        jobs.iter().any(|job| job.id == id)
    }

    async fn ask(&self, stop: Option<task::Id>) -> Vec<RunningJob> {
        let (reply, mut replies) = unbounded_channel();
        self.watched.ask(&Question { stop, reply });
        let mut jobs = Vec::new();
        while let Some(some) = replies.recv().await {
            jobs.extend(some);
        }
        jobs
    }

    /// Ends the consumer as the [graceful signal](crate::Consumer::with_graceful_shutdown) does.
    pub fn drain(&self) {
        self.watched.drain.cancel();
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Watch").field(&self.state()).finish()
    }
}
