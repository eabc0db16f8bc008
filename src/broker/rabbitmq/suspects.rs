//! Settings for suspects: jobs that may have taken their worker down.

use super::{kind::QueueKind, moves::Moves, queue::Queue};

impl Queue {
    /// Sets the queue for [suspects](crate::settle::Settle::is_suspect), which are published to it unless they
    /// are run here; none by default.
    ///
    /// A suspect is a job that the queue delivers again although no worker has given it back. To tell one from
    /// the other, with this setting a job is given back by a publish to the end of the queue: a `Retry` without
    /// a delay on a quorum queue, and a `Release` without a delay except on a quorum queue from 4.3 on.
    /// [`delayed_retry`](Self::delayed_retry) has no effect then. These remain, as nobody publishes them: jobs
    /// that a stop or a lost connection gives back. They are suspects, too.
    ///
    /// As with [`dead_letter`](Self::dead_letter), the queue has to exist at the time of `subscribe`. It takes a
    /// [`SentinelLayer::delivery_limit`](crate::SentinelLayer::delivery_limit) to keep suspects from being run
    /// here, and a worker for the [lane](Self::lane).
    pub fn suspects(mut self, queue: impl Into<String>) -> Self {
        self.suspects = Some((queue.into(), Moves::new()));
        self
    }

    /// Returns the builder for the queue of the [suspects](Self::suspects): a quorum queue with the same dead
    /// letters, read with a prefetch of one.
    ///
    /// It is a quorum queue, as a classic one does not count the deliveries of a worker that is gone. With a
    /// [connector](Self::connector) that declares queues it has no delivery limit of its own. If you declare
    /// it, set `x-delivery-limit` to `-1`, from 4.0 on.
    ///
    /// A worker that reads both must have the lane from here: then it gets a job of the lane only when all that it
    /// is moving there has left the queue. Otherwise a job could take the worker down on its way, and be in both.
    ///
    /// ```
    /// use tower_sentinel::broker::rabbitmq::Queue;
    ///
    /// let orders = Queue::classic("orders").dead_letter("orders.dead").suspects("orders.suspects");
    /// let lane = orders.lane();
    /// # drop((orders, lane));
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if no [suspects](Self::suspects) are set.
    #[track_caller]
    pub fn lane(&self) -> Self {
        let suspects = self.suspects.clone();
        let (suspects, moves) = suspects.expect("the queue has a queue of suspects");
        let mut lane = Self::new(suspects, QueueKind::Quorum)
            .prefetch(1)
            .delivery_limit(None);
        lane.moves = Some(moves);
        lane.dead_letter.clone_from(&self.dead_letter);
        lane.subscribe_timeout = self.subscribe_timeout;
        lane
    }
}
