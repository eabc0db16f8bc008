//! tower's own middleware on a policy.

use std::{
    future::{pending, ready},
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::{
    future::{BoxFuture, join_all},
    poll,
};
use tokio::{
    task::{coop, yield_now},
    time::{Instant, advance, sleep},
};
use tower::{
    BoxError, Layer, Service, ServiceBuilder, ServiceExt, buffer::Buffer, retry, service_fn,
};
use tower_sentinel::{Outcome, Report, SentinelError, SentinelLayer, outcome::OutcomeKind};

use super::{PAUSE, SECOND, returns};
use crate::support::{Bomb, Count, Plan, Recorder, Refused, Seen, Unit, call};

#[tokio::test(start_paused = true)]
async fn a_policy_may_be_under_towers_timeout() {
    let recorder = Recorder::default();
    let policy = ServiceBuilder::new()
        .timeout(SECOND)
        .service(recorder.scripted(Plan::Hang, PAUSE));
    let mut sentinel = SentinelLayer::new(policy).layer(returns());
    let started = Instant::now();
    let error = call(&mut sentinel, Unit::default()).await.unwrap_err();
    let SentinelError::Policy(error) = error else {
        panic!("{error:?}");
    };
    assert!(error.is::<tower::timeout::error::Elapsed>());
    assert_eq!(started.elapsed(), SECOND);
    assert_eq!(recorder.reports(), [Seen::completed()]);
}

#[tokio::test(start_paused = true)]
async fn a_policy_may_be_behind_towers_buffer() {
    let recorder = Recorder::default();
    // One worker settles all jobs, in their order, with a policy that need not be `Clone`.
    let policy = Buffer::new(recorder.scripted(Plan::SlowReadiness, PAUSE), 2);
    let sentinel = SentinelLayer::new(policy).layer(returns());
    let jobs = (0..20).map(|_| sentinel.clone().oneshot(Unit::default()));
    for report in join_all(jobs).await {
        assert!(report.unwrap().outcome.is_completed());
    }
    assert_eq!(recorder.reports(), [Seen::completed(); 20]);
}

/// Retries failed calls, a few times.
#[derive(Clone)]
struct Attempts(usize);

impl<Req: Clone, Res> retry::Policy<Req, Res, Refused> for Attempts {
    type Future = std::future::Ready<()>;

    fn retry(&mut self, _: &mut Req, result: &mut Result<Res, Refused>) -> Option<Self::Future> {
        if result.is_ok() {
            return None;
        }
        self.0 = self.0.checked_sub(1)?;
        Some(ready(()))
    }

    fn clone_request(&mut self, request: &Req) -> Option<Req> {
        Some(request.clone())
    }
}

#[tokio::test(start_paused = true)]
async fn a_policy_may_be_retried_over_an_arc_of_the_report() {
    for (failures, attempts, settled) in [(0, 1, true), (2, 3, true), (3, 3, false)] {
        let asked = Count::default();
        let counted = asked.clone();
        let broker = service_fn(move |report: Arc<Report<Unit, (), Refused>>| {
            counted.add();
            ready(match counted.get() > failures {
                true => Ok(report.outcome.kind()),
                false => Err(Refused),
            })
        });
        let policy = ServiceBuilder::new()
            .map_request(Arc::new)
            .retry(Attempts(attempts - 1))
            .service(broker);
        let mut sentinel = SentinelLayer::new(policy).layer(returns());
        match call(&mut sentinel, Unit::default()).await {
            Ok(kind) => assert_eq!((kind, settled), (OutcomeKind::Completed, true)),
            Err(error) => {
                assert!(matches!(error, SentinelError::Policy(Refused)));
                assert!(!settled);
            }
        }
        assert_eq!(asked.get(), attempts.min(failures + 1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_policy_of_boxed_errors_goes_under_towers_timeout_with_its_sentinel() {
    // A plain compile check that pays: no adapter is needed around either of the two timeouts.
    let policy = ServiceBuilder::new().timeout(SECOND).service_fn(
        |report: Report<Unit, (), BoxError>| async move {
            match report.outcome {
                Outcome::Failed(error) => Err(error),
                _ => Ok(()),
            }
        },
    );
    let mut stack = ServiceBuilder::new()
        .timeout(60 * SECOND)
        .layer(SentinelLayer::new(policy))
        .timeout(SECOND)
        .service_fn(|_: Unit| pending::<Result<(), Refused>>());
    let error: BoxError = call(&mut stack, Unit::default()).await.unwrap_err();
    let error = error.downcast::<SentinelError<BoxError, BoxError>>();
    let error = *error.unwrap();
    // The inner timeout failed the job, and the policy passed that on.
    let SentinelError::Policy(error) = error else {
        panic!("{error:?}");
    };
    assert!(error.is::<tower::timeout::error::Elapsed>());
}

#[tokio::test(start_paused = true)]
async fn g6_a_policy_that_never_yields_but_to_its_budget_has_its_limit_too() {
    let policy = service_fn(|_: Report<Unit, (), Refused>| async {
        loop {
            coop::consume_budget().await;
        }
        #[expect(unreachable_code)]
        Ok::<(), Refused>(())
    });
    let mut sentinel = SentinelLayer::new(policy)
        .settle_timeout(SECOND)
        .layer(returns());
    let mut response = Box::pin(sentinel.ready().await.unwrap().call(Unit::default()));
    // Its task is always ready, so time does not pass by itself.
    for _ in 0..8 {
        assert!(poll!(&mut response).is_pending());
        yield_now().await;
    }
    advance(2 * SECOND).await;
    let Poll::Ready(answer) = poll!(&mut response) else {
        panic!("no limit");
    };
    assert!(matches!(answer, Err(SentinelError::PolicyTimedOut(SECOND))));
}

/// A policy whose instance panics when it is dropped after its call.
#[derive(Default)]
struct OnceCalled(Option<Bomb>);

impl Clone for OnceCalled {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl Service<Report<Unit, (), Refused>> for OnceCalled {
    type Response = &'static str;
    type Error = Refused;
    type Future = BoxFuture<'static, Result<&'static str, Refused>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Report<Unit, (), Refused>) -> Self::Future {
        self.0 = Some(Bomb);
        Box::pin(async {
            sleep(SECOND).await;
            Ok("acked")
        })
    }
}

#[tokio::test(start_paused = true)]
async fn g6_a_policy_whose_instance_panics_in_drop_still_settles() {
    let mut sentinel = SentinelLayer::new(OnceCalled::default()).layer(returns());
    let answer = call(&mut sentinel, Unit::default()).await;
    assert_eq!(answer.unwrap(), "acked");
}
