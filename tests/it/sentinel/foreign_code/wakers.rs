//! Wakers that panic.

use std::{
    future::{Future, pending, poll_fn},
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use tokio::{
    runtime::Handle,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tower::{Layer as _, Service, ServiceExt, service_fn};
use tower_sentinel::{
    SentinelLayer, cancel::Cancellation, cancelled, outcome::CancelReason, sentinel::OnDrop,
};

use super::{BadWaker, CALLERS, Caller};
use crate::support::{Answer, Plan, Recorder, Refused, WORK, idle};

#[tokio::test(start_paused = true)]
async fn g1_a_waker_of_the_jobs_own_that_panics_costs_no_policy_call() {
    for caller in CALLERS {
        let recorder = Recorder::default();
        let shutdown = CancellationToken::new();
        let job = service_fn(async |_: Arc<()>| {
            let mut told = pin!(cancelled());
            let waker = Waker::from(Arc::new(BadWaker));
            let _ = told.as_mut().poll(&mut Context::from_waker(&waker));
            pending::<Result<(), Refused>>().await
        });
        let on_drop = match caller {
            Caller::Detaches => OnDrop::Detach,
            _ => OnDrop::Abort,
        };
        let mut sentinel = SentinelLayer::new(recorder.scripted(Plan::Ok, Duration::ZERO))
            .timeout(WORK)
            .on_drop(on_drop)
            .shutdown(shutdown)
            .layer(job);
        let response = sentinel.ready().await.unwrap().call(Arc::new(()));
        let calling = tokio::spawn(async move {
            let mut response = pin!(response);
            if caller == Caller::Waits {
                return response
                    .await
                    .map(drop)
                    .map_err(|error| Answer::from(&error));
            }
            if caller != Caller::Drops {
                let first = poll_fn(|cx| Poll::Ready(response.as_mut().poll(cx).is_ready()));
                assert!(!first.await);
            }
            // The job is polled, and its waker known.
            sleep(WORK / 2).await;
            Ok(())
        });
        let answer = calling.await.expect("no panic on the caller's task");
        assert_eq!(answer, Ok(()), "{caller:?}");
        idle(&Handle::current()).await;
        let reports = recorder.reports();
        assert_eq!(reports.len(), 1, "{caller:?}");
        assert_eq!(reports[0].stopped, Some(true), "{caller:?}");
    }
}

/// Panics when it is woken for the job's own request.
#[tokio::test(start_paused = true)]
async fn a_callers_waker_that_panics_does_not_reach_the_job() {
    let recorder = Recorder::default();
    let job = service_fn(async |_: Arc<()>| {
        sleep(WORK).await;
        Cancellation::current().cancel(CancelReason::Requested);
        pending::<Result<(), Refused>>().await
    });
    let mut sentinel = SentinelLayer::new(recorder.policy()).layer(job);
    let response = sentinel.ready().await.unwrap().call(Arc::new(()));
    let mut response = Box::pin(response);
    let waker = Waker::from(Arc::new(BadWaker));
    assert!(
        response
            .as_mut()
            .poll(&mut Context::from_waker(&waker))
            .is_pending()
    );
    let started = Instant::now();
    sleep(2 * WORK).await;
    response.await.unwrap();
    assert_eq!(started.elapsed(), 2 * WORK);
    let [report] = recorder.reports()[..] else {
        panic!("one report");
    };
    assert_eq!(report.reason, Some(CancelReason::Requested));
    assert!(!report.panic);
}
