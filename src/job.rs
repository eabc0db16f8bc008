//! [`Job`]: what a sentinel must know of a request before it lets it run.

use std::{sync::Arc, time::Duration};

/// A unit of work that carries the tag its broker wants answered.
///
/// The sentinel reads the tag and the time limit *before* it hands the job to the inner service,
/// so that both outlive whatever the job does to itself.
///
/// `Arc<T>` is a `Job` whose tag is the `Arc` itself: the policy then sees the whole job, as the
/// `handle_result` callback of GenTask (Elixir) does. Its time limit is the layer's, also where `T`
/// is a `Job` with a limit of its own. For foreign types, such as an
/// `http::Request`, see [`SentinelLayer::with_tag`](crate::SentinelLayer::with_tag).
///
/// A panic in [`tag`](Job::tag) or [`time_limit`](Job::time_limit) is the caller's: it happens in
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
///     // A large body gets a minute, all others what the layer says.
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
    /// What the broker needs to recognise the job: a delivery tag, an acker, a message id.
    type Tag;

    /// Returns the tag that the policy answers for.
    fn tag(&self) -> Self::Tag;

    /// Returns this job's own time limit; [`TimeLimit::Inherit`] by default.
    fn time_limit(&self) -> TimeLimit {
        TimeLimit::Inherit
    }

    /// Returns how long the broker waits for this job's settlement, from the delivery on, before it
    /// gives the job to somebody else; `None` by default: for ever, or nobody knows.
    ///
    /// It is that of a job that is not [kept alive](crate::KeepAliveLayer). Jobs of this crate's brokers
    /// tell it where they know it. What it does to a time limit is at
    /// [`SentinelLayer::timeout`](crate::SentinelLayer::timeout).
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
}

impl<T: ?Sized> Job for Arc<T> {
    type Tag = Arc<T>;

    fn tag(&self) -> Arc<T> {
        Arc::clone(self)
    }
}

/// How long a job may run, counted from the sentinel's `call`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TimeLimit {
    /// The limit of the layer applies.
    #[default]
    Inherit,
    /// No limit, whatever the layer says.
    Never,
    /// This limit, whatever the layer says.
    ///
    /// `Duration::ZERO` stops the job at once, unless it is found completed in its first poll. A
    /// limit too far in the future for the clock, such as `Duration::MAX`, is none.
    After(Duration),
}
