//! [`Job`]: the tag, the time limit and the lease of a request, which a sentinel reads before it runs it.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use crate::telemetry::messaging::Messaging;

/// A unit of work, with the tag that its delivery is settled by.
///
/// The sentinel reads the tag and the time limit *before* it hands the job to the inner service. So it has
/// both, even if the job panics or hangs.
///
/// `Arc<T>` is a `Job` whose tag is the `Arc` itself: the policy then sees the whole job. Its time limit is
/// the layer's, even if `T` is a `Job` with its own limit. For foreign types, such as an `http::Request`,
/// see [`SentinelLayer::with_tag`](crate::SentinelLayer::with_tag).
///
/// A panic in [`tag`](Job::tag) or [`time_limit`](Job::time_limit) reaches the caller: it happens in
/// [`Sentinel::call`](crate::sentinel::Sentinel), before anything is spawned.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tower_sentinel::{Job, TimeLimit};
///
/// struct Delivery {
///     delivery_tag: u64,
///     body: Vec<u8>,
/// }
///
/// impl Job for Delivery {
///     type Tag = u64;
///
///     fn tag(&self) -> u64 {
///         self.delivery_tag
///     }
///
///     // A large body gets a minute, all others get the limit of the layer.
///     fn time_limit(&self) -> TimeLimit {
///         match self.body.len() {
///             0..1_000_000 => TimeLimit::Inherit,
///             _ => TimeLimit::After(Duration::from_secs(60)),
///         }
///     }
/// }
///
/// let small = Delivery { delivery_tag: 7, body: vec![0; 10] };
/// assert_eq!(small.tag(), 7);
/// assert_eq!(small.time_limit(), TimeLimit::Inherit);
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a `Job`",
    label = "the sentinel does not know the tag of this request",
    note = "implement `tower_sentinel::Job` for `{Self}`, send it as an `Arc<{Self}>`, or build the layer with `SentinelLayer::with_tag(policy, tag_fn)`"
)]
pub trait Job {
    /// Handle by which the broker recognises the job: a delivery tag, an acker, a message id.
    type Tag: fmt::Debug;

    /// Returns the tag that the policy settles.
    fn tag(&self) -> Self::Tag;

    /// Returns this job's own time limit; [`TimeLimit::Inherit`] by default.
    fn time_limit(&self) -> TimeLimit {
        TimeLimit::Inherit
    }

    /// Returns the time from the delivery on after which the broker gives an unsettled job to another worker.
    ///
    /// `None` by default: the broker waits for ever, or the time is unknown. It is the time for a job that is
    /// not [kept alive](crate::KeepAliveLayer). Jobs of this crate's brokers return it if they know it. For
    /// its effect on time limits see [`SentinelLayer::timeout`](crate::SentinelLayer::timeout).
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_sentinel::Job;
    ///
    /// struct Message { receipt: String }
    ///
    /// impl Job for Message {
    ///     type Tag = String;
    ///     fn tag(&self) -> String { self.receipt.clone() }
    ///
    ///     // The visibility timeout of its queue: without a keep-alive such a job may run for 20 s.
    ///     fn lease(&self) -> Option<Duration> { Some(Duration::from_secs(30)) }
    /// }
    /// ```
    fn lease(&self) -> Option<Duration> {
        None
    }

    /// Returns the description of the delivery, for the labels of the sentinel's metrics; `None` by default.
    ///
    /// Only called with the feature `metrics`, and only for the first job of a sentinel. Spans use
    /// [`Settle::messaging`](crate::settle::Settle::messaging) of the tag. Jobs of this crate's brokers return
    /// the same in both.
    ///
    /// ```
    /// use tower_sentinel::{Job, settle::Messaging};
    ///
    /// struct Message { queue: String, receipt: String }
    ///
    /// impl Job for Message {
    ///     type Tag = String;
    ///     fn tag(&self) -> String { self.receipt.clone() }
    ///     fn messaging(&self) -> Option<Messaging<'_>> { Some(Messaging::new("aws_sqs", &*self.queue)) }
    /// }
    /// ```
    fn messaging(&self) -> Option<Messaging<'_>> {
        None
    }

    /// Returns the time since which the job waits in its queue, if it is delivered for the first time; `None`
    /// by default.
    ///
    /// With the feature `metrics` the sentinel measures the time from then to its `call`, as
    /// [`tower_sentinel.queue.duration`](crate::telemetry::describe_metrics). Return `None` for a job that was
    /// delivered before: its time in the queue would include its earlier runs and the delays of its retries.
    /// Jobs of this crate's brokers return what [`Settle::published_at`](crate::settle::Settle::published_at)
    /// of their tag does, or `None` if they were delivered before.
    ///
    /// ```
    /// use std::time::SystemTime;
    /// use tower_sentinel::Job;
    ///
    /// struct Message { receipt: String, sent: SystemTime, receives: u32 }
    ///
    /// impl Job for Message {
    ///     type Tag = String;
    ///     fn tag(&self) -> String { self.receipt.clone() }
    ///     fn queued_since(&self) -> Option<SystemTime> { (self.receives == 1).then_some(self.sent) }
    /// }
    /// ```
    fn queued_since(&self) -> Option<SystemTime> {
        None
    }
}

impl<T: fmt::Debug + ?Sized> Job for Arc<T> {
    type Tag = Arc<T>;

    fn tag(&self) -> Arc<T> {
        Arc::clone(self)
    }
}

/// Time limit of a job, counted from the sentinel's `call`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TimeLimit {
    /// The limit of the layer applies.
    #[default]
    Inherit,
    /// No limit, regardless of the layer's.
    Never,
    /// This limit, regardless of the layer's.
    ///
    /// `Duration::ZERO` stops the job at once, unless it completes in its first poll. A limit too far in the
    /// future for the clock, such as `Duration::MAX`, is no limit.
    After(Duration),
}
