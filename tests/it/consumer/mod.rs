//! Consumers: the run, the end and the sequence of sessions, over a scripted subscription.

mod channel_gone;
mod each_job_ends_once;
mod failing_workers;
mod herd;
mod operated;
mod paused;
mod rebound;
mod reconnecting;
mod session;
mod session_end;
mod subscription;
mod supervised;
mod tasks;
mod totals;
mod watch;
mod watchdog;

use std::{future::IntoFuture, time::Duration};

use tokio::{runtime::Handle, time::timeout};
use tokio_util::sync::CancellationToken;
use tower::{Service, ServiceBuilder};
use tower_sentinel::{
    DecisionExt, SentinelError, SentinelLayer, SettlePolicy, ack_on_success,
    settle::{SettleError, Settled},
};

use crate::support::{Refused, Work, Worker, subscription::Delivery};

pub(crate) type CallError = SentinelError<Refused, SettleError<Refused>>;

/// Longer than anything here takes.
const FOREVER: Duration = Duration::from_secs(10_000);

/// Returns a whole stack with a gate of `gate`.
pub(crate) fn stack(
    gate: usize,
    shutdown: CancellationToken,
    (worker, jobs): (Worker, Handle),
) -> impl Service<Delivery, Response = Settled, Error = CallError, Future: Send + 'static> + Send + 'static
{
    let policy = SettlePolicy::new(ack_on_success().delivery_limit(3));
    let layer = SentinelLayer::new(policy).no_timeout().runtime(jobs);
    ServiceBuilder::new()
        .concurrency_limit(gate)
        .layer(layer.shutdown(shutdown))
        .map_request(|delivery: Delivery| Work::new(delivery.fate))
        .service(worker)
}

pub(crate) fn here() -> (Worker, Handle) {
    (Worker::default(), Handle::current())
}

/// Awaits in virtual time, and fails instead of hanging.
pub(crate) async fn ends<F: IntoFuture>(future: F) -> F::Output {
    let ended = timeout(FOREVER, future.into_future()).await;
    ended.expect("the consumer hangs")
}
