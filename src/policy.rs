//! [`AckPolicy`], the service that settles jobs, and its request, the [`Report`].

use std::{fmt, time::Duration};

use tower_service::Service;

use crate::{
    outcome::{Elsewhere, Outcome},
    telemetry::metrics::MeasuredBy,
};

/// Request of a policy: the tag of a job, and its outcome.
///
/// ```
/// use std::time::Duration;
/// use tower_sentinel::{Outcome, Report};
///
/// let report = Report::new(7_u64, Outcome::<_, ()>::Completed("done"), Duration::from_millis(3));
/// let Report { tag, outcome, .. } = report;
/// assert_eq!(tag, 7);
/// assert!(outcome.is_completed());
/// ```
#[non_exhaustive]
pub struct Report<Tag, T, E> {
    /// The tag to settle.
    pub tag: Tag,
    /// The outcome of the job.
    pub outcome: Outcome<T, E>,
    /// The time from the sentinel's `call` to the outcome, including the time to stop the job.
    pub elapsed: Duration,
    /// The runtime to drop the outcome on, if it has a destructor and the jobs have their own runtime.
    pub(crate) elsewhere: Option<Box<Elsewhere<Outcome<T, E>>>>,
    /// The metrics of the sentinel, if there is one.
    pub(crate) measured: MeasuredBy,
}

impl<Tag, T, E> Report<Tag, T, E> {
    /// Creates a report, for tests of a policy.
    pub fn new(tag: Tag, outcome: Outcome<T, E>, elapsed: Duration) -> Self {
        Self {
            tag,
            outcome,
            elapsed,
            elsewhere: None,
            measured: MeasuredBy::default(),
        }
    }
}

impl<Tag: fmt::Debug, T: fmt::Debug, E: fmt::Debug> fmt::Debug for Report<Tag, T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Report")
            .field("tag", &self.tag)
            .field("outcome", &self.outcome)
            .field("elapsed", &self.elapsed)
            .finish()
    }
}

/// Service that settles jobs: a name for `Service<Report<Tag, T, E>> + Clone`.
///
/// It is implemented for every such service. So `tower::service_fn` makes a policy, and `tower::timeout` and
/// `tower::buffer` stack on one as on any service. `tower::retry` must clone its request, and a report is
/// not `Clone`: let it retry an `Arc<Report<…>>`, made by `map_request(Arc::new)` around it.
///
/// # Contract
///
/// - *Readiness*: each job is settled through its own clone of the policy. The clone is driven to readiness
///   when the outcome is known, right before its `call`. No readiness is held while a job runs.
/// - *Calls*: `call` happens once for each job, or never if the policy cannot become ready.
/// - *Cancellation*: a settlement goes on even if the caller drops the response future, the job was
///   cancelled, or a shutdown is in progress. Its limit is the layer's
///   [`settle_timeout`](crate::SentinelLayer::settle_timeout).
/// - *Panics* are caught. They fail that one settlement, with
///   [`SentinelError::PolicyPanicked`](crate::SentinelError::PolicyPanicked).
///
/// # Examples
///
/// ```
/// use std::{convert::Infallible, time::Duration};
/// use tower::{Service, ServiceExt, service_fn};
/// use tower_sentinel::{AckPolicy, Outcome, Report};
///
/// fn is_policy<P: AckPolicy<u64, (), std::io::Error>>(policy: P) -> P { policy }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let mut policy = is_policy(service_fn(|report: Report<u64, (), std::io::Error>| async move {
///     Ok::<_, Infallible>(match report.outcome {
///         Outcome::Completed(()) => format!("ack {}", report.tag),
///         _ => format!("nack {}", report.tag),
///     })
/// }));
///
/// // A policy is a service, so it can be tested without a sentinel.
/// let report = Report::new(7, Outcome::Completed(()), Duration::ZERO);
/// assert_eq!(policy.ready().await.unwrap().call(report).await.unwrap(), "ack 7");
/// # }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an `AckPolicy` for `Report<{Tag}, {T}, {E}>`",
    label = "this policy cannot settle these jobs",
    note = "an `AckPolicy<Tag, T, E>` is a `Service<Report<Tag, T, E>>` that is `Clone`, where `Tag` is the job's tag and `T` and `E` are the response and the error of the wrapped service"
)]
pub trait AckPolicy<Tag, T, E>: Service<Report<Tag, T, E>> + Clone {}

impl<P, Tag, T, E> AckPolicy<Tag, T, E> for P where P: Service<Report<Tag, T, E>> + Clone {}
