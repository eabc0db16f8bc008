//! [`AckPolicy`]: the service that answers the broker, and the [`Report`] it answers for.

use std::{fmt, time::Duration};

use tower_service::Service;

use crate::outcome::{Elsewhere, Outcome};

/// What a policy receives: the tag of a job and what became of it.
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
    /// The tag to answer for.
    pub tag: Tag,
    /// What became of the job.
    pub outcome: Outcome<T, E>,
    /// The time from the sentinel's `call` to the outcome, stopping included.
    pub elapsed: Duration,
    /// Where to drop the outcome, if it has a destructor and the jobs a runtime of their own.
    pub(crate) elsewhere: Option<Box<Elsewhere<Outcome<T, E>>>>,
}

impl<Tag, T, E> Report<Tag, T, E> {
    /// Creates a report, for tests of a policy.
    pub fn new(tag: Tag, outcome: Outcome<T, E>, elapsed: Duration) -> Self {
        Self {
            tag,
            outcome,
            elapsed,
            elsewhere: None,
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

/// A name for `Service<Report<Tag, T, E>> + Clone`: the service that answers the broker.
///
/// It is implemented for all of them, so `tower::service_fn`, `tower::timeout` and
/// `tower::buffer` stack on a policy like on any service. `tower::retry` must clone its request,
/// which a report is not: let it retry an `Arc<Report<…>>`, made by `map_request(Arc::new)`
/// around it.
///
/// # Contract
///
/// - *Readiness*: each job settles through a clone of the policy of its own, which is driven to
///   readiness when the outcome is known and right before its `call`. No readiness is held while
///   a job runs.
/// - *Calls*: `call` happens once for each job, or never if the policy cannot become ready.
/// - *Cancellation*: a settlement goes on though the caller drops the response future, the job
///   was cancelled, or a shutdown is under way. It has the layer's
///   [`settle_timeout`](crate::SentinelLayer::settle_timeout).
/// - *Panics* are caught and belong to that one settlement, as
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
/// // A policy is a service: it is tested without a sentinel.
/// let report = Report::new(7, Outcome::Completed(()), Duration::ZERO);
/// assert_eq!(policy.ready().await.unwrap().call(report).await.unwrap(), "ack 7");
/// # }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an `AckPolicy` for `Report<{Tag}, {T}, {E}>`",
    label = "this policy cannot answer for these jobs",
    note = "an `AckPolicy<Tag, T, E>` is a `Service<Report<Tag, T, E>>` that is `Clone`, where `Tag` is the job's tag and `T` and `E` are the response and the error of the wrapped service"
)]
pub trait AckPolicy<Tag, T, E>: Service<Report<Tag, T, E>> + Clone {}

impl<P, Tag, T, E> AckPolicy<Tag, T, E> for P where P: Service<Report<Tag, T, E>> + Clone {}
