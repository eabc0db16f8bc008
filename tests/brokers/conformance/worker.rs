//! A worker for the scenarios: the whole stack over one subscription.

use std::{
    fmt,
    future::{Future, poll_fn},
    pin::Pin,
    task::{Poll, ready},
    time::Duration,
};

use futures_util::{Stream, StreamExt, stream::FuturesUnordered};
use tokio_util::sync::CancellationToken;
use tower::{Service, ServiceBuilder, service_fn};
use tower_sentinel::{Decision, SentinelError, SentinelLayer, SettlePolicy, Settled, Subscription};

use super::{TestBroker, close};

/// Why a job of a scenario failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum JobError {
    NotDecoded,
    Refused,
}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            JobError::NotDecoded => "the job cannot be decoded",
            JobError::Refused => "the dependency refused",
        })
    }
}

/// What a worker has done when it ends.
#[derive(Debug, Default)]
pub(super) struct Ended {
    pub(super) settled: Vec<Settled>,
    /// Jobs that are not settled, and why.
    pub(super) errors: Vec<String>,
}

/// Works until `stop`, which cancels what still runs, or until the channel ends or must be given up.
///
/// What runs is settled before it returns, and the subscription is closed.
pub(super) async fn work<B, D, H, F>(
    mut jobs: B::Subscription,
    prefetch: usize,
    decision: D,
    limit: Duration,
    stop: &CancellationToken,
    handler: H,
) -> Ended
where
    B: TestBroker,
    D: Decision<B::Tag, (), JobError> + Clone + Send + 'static,
    H: Fn(B::Job) -> F + Clone + Send + 'static,
    F: Future<Output = Result<(), JobError>> + Send + 'static,
{
    let policy = SettlePolicy::new(decision);
    let mut service = ServiceBuilder::new()
        .concurrency_limit(prefetch)
        .layer(
            SentinelLayer::new(policy)
                .timeout(limit)
                .shutdown(stop.clone()),
        )
        .service(service_fn(handler));
    let mut running = FuturesUnordered::new();
    let mut ended = Ended::default();
    loop {
        let pull = poll_fn(|cx| {
            if Pin::new(&mut jobs).poll_closed(cx).is_ready() {
                return Poll::Ready(None);
            }
            ready!(service.poll_ready(cx)).expect("the service is ready");
            Pin::new(&mut jobs).poll_next(cx)
        });
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(answer) = running.next() => {
                if !ended.record(answer) {
                    break;
                }
            }
            pulled = pull => match pulled {
                Some(Ok(job)) => running.push(service.call(job)),
                Some(Err(_)) | None => break,
            },
        }
    }
    while let Some(answer) = running.next().await {
        ended.record(answer);
    }
    close::<B>(&mut jobs).await;
    ended
}

type Answer<E> = Result<Settled, SentinelError<JobError, tower_sentinel::SettleError<E>>>;

impl Ended {
    /// Returns whether the channel may be used further.
    fn record<E: fmt::Display>(&mut self, answer: Answer<E>) -> bool {
        match answer {
            Ok(settled) => {
                self.settled.push(settled);
                true
            }
            Err(error) => {
                self.errors.push(error.to_string());
                match error {
                    SentinelError::Policy(error) => !error.must_give_up_channel(),
                    _ => false,
                }
            }
        }
    }
}
