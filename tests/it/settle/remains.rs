//! Remains of a job: the time and the place of its destructors.

use std::{
    convert::Infallible,
    fmt,
    future::pending,
    panic::resume_unwind,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::{
    runtime::{Builder, Handle, Id, Runtime},
    sync::oneshot,
    task::yield_now,
};
use tower::{Layer, service_fn};
use tower_sentinel::{
    Job, Outcome, SentinelError, SentinelLayer, SettlePolicy, Verdict, ack_on_success, cancelled,
    outcome::OutcomeKind,
    settle::{Capabilities, Lease, Reason, Settle, SettleError, Unsettled, decision::Decision},
};

use crate::support::{Blocked, block_on, call, idle, raise, wait_until};

const SECOND: Duration = Duration::from_secs(1);

/// Record of events, in their order.
#[derive(Clone, Debug, Default)]
struct History(Arc<Mutex<Vec<(&'static str, Option<Id>)>>>);

impl History {
    fn note(&self, what: &'static str) {
        let runtime = Handle::try_current().ok().map(|runtime| runtime.id());
        self.0.lock().unwrap().push((what, runtime));
    }

    fn events(&self) -> Vec<&'static str> {
        self.0.lock().unwrap().iter().map(|it| it.0).collect()
    }

    /// Returns the runtime in which the destructor ran.
    fn dropped_in(&self) -> Option<Id> {
        let events = self.0.lock().unwrap();
        let mut dropped = events.iter().filter(|it| it.0 == "dropped");
        let (Some(&(_, runtime)), None) = (dropped.next(), dropped.next()) else {
            panic!("dropped once: {events:?}");
        };
        runtime
    }
}

/// A value, an error or the payload of a panic, with a destructor that is noted.
#[derive(Debug)]
struct Noted {
    history: History,
    /// Thread that it blocks.
    thread: Option<Arc<Blocked>>,
    explodes: bool,
}

impl fmt::Display for Noted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("noted")
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        if let Some(thread) = &self.thread {
            thread.block();
        }
        self.history.note("dropped");
        if self.explodes {
            raise("in the destructor of a value");
        }
    }
}

/// A delivery whose settlement takes its time.
#[derive(Clone, Debug)]
struct Delivery {
    history: History,
    hangs: bool,
}

impl Settle for Delivery {
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<(), Unsettled<Self, Infallible>>>;

    fn settle(self, _: Verdict, _: Reason) -> Self::Future {
        Box::pin(async move {
            if self.hangs {
                pending::<()>().await;
            }
            yield_now().await;
            self.history.note("settled");
            Ok(())
        })
    }

    async fn keep_alive(&self) -> Result<Lease, Infallible> {
        Ok(Lease::Held)
    }

    fn deliveries(&self) -> Option<u32> {
        None
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::none()
    }
}

impl Job for Delivery {
    type Tag = Self;

    fn tag(&self) -> Self {
        self.clone()
    }
}

/// End of a job; each time with a [`Noted`].
#[derive(Clone, Copy, Debug)]
enum End {
    Value,
    Error,
    Panic,
    /// In its grace, after the limit.
    LatePanic,
}

const ENDS: [(End, OutcomeKind); 4] = [
    (End::Value, OutcomeKind::Completed),
    (End::Error, OutcomeKind::Failed),
    (End::Panic, OutcomeKind::Panicked),
    (End::LatePanic, OutcomeKind::TimedOut),
];

async fn work(end: End, noted: Noted) -> Result<Noted, Noted> {
    match end {
        End::Value => Ok(noted),
        End::Error => Err(noted),
        End::Panic => resume_unwind(Box::new(noted)),
        End::LatePanic => {
            cancelled().await;
            resume_unwind(Box::new(noted))
        }
    }
}

fn layer<D: Clone>(policy: SettlePolicy<D>) -> SentinelLayer<SettlePolicy<D>> {
    SentinelLayer::new(policy)
        .timeout(SECOND)
        .grace(SECOND)
        .settle_timeout(60 * SECOND)
}

/// Runs one job, and returns the response of its policy.
async fn run<D>(
    layer: SentinelLayer<SettlePolicy<D>>,
    end: End,
    delivery: Delivery,
    thread: Option<Arc<Blocked>>,
    explodes: bool,
) -> Result<OutcomeKind, SentinelError<Noted, SettleError<Infallible>>>
where
    D: Decision<Delivery, Noted, Noted> + Clone + Send + 'static,
{
    let mut sentinel = layer.layer(service_fn(move |delivery: Delivery| {
        let history = delivery.history;
        let thread = thread.clone();
        work(
            end,
            Noted {
                history,
                thread,
                explodes,
            },
        )
    }));
    call(&mut sentinel, delivery).await.map(|it| it.kind)
}

fn delivery(history: &History) -> Delivery {
    let history = history.clone();
    let hangs = false;
    Delivery { history, hangs }
}

#[tokio::test(start_paused = true)]
async fn what_a_job_leaves_behind_is_dropped_once_it_is_settled() {
    for explodes in [false, true] {
        for (end, kind) in ENDS {
            let history = History::default();
            let layer = layer(SettlePolicy::new(ack_on_success()));
            let settled = run(layer, end, delivery(&history), None, explodes).await;
            assert_eq!(settled.unwrap(), kind, "{end:?}");
            assert_eq!(history.events(), ["settled", "dropped"], "{end:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_job_leaves_behind_is_dropped_though_it_is_never_settled() {
    for explodes in [false, true] {
        for (end, _) in ENDS {
            let history = History::default();
            let mut hanging = delivery(&history);
            hanging.hangs = true;
            let patient = SettlePolicy::new(ack_on_success()).try_timeout(SECOND);
            let settled = run(layer(patient.clone()), end, hanging.clone(), None, explodes).await;
            let error = settled.unwrap_err();
            assert!(
                matches!(error, SentinelError::Policy(SettleError::TimedOut { .. })),
                "{end:?}: {error:?}"
            );
            assert_eq!(history.events(), ["dropped"], "{end:?}");
            let layer = layer(patient).settle_timeout(SECOND / 2);
            let history = History::default();
            hanging.history = history.clone();
            let error = run(layer, end, hanging, None, explodes).await.unwrap_err();
            assert!(
                matches!(error, SentinelError::PolicyTimedOut(_)),
                "{end:?}: {error:?}"
            );
            assert_eq!(history.events(), ["dropped"], "{end:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_job_leaves_behind_is_dropped_though_its_verdict_is_refused() {
    for (end, _) in ENDS {
        let history = History::default();
        let after = Some(SECOND);
        let decision = move |_: &Delivery, _: &Outcome<Noted, Noted>| Verdict::Retry { after };
        let layer = layer(SettlePolicy::new(decision));
        let settled = run(layer, end, delivery(&history), None, true).await;
        let error = settled.unwrap_err();
        assert!(
            matches!(
                error,
                SentinelError::Policy(SettleError::Unsupported { .. })
            ),
            "{end:?}: {error:?}"
        );
        assert_eq!(history.events(), ["dropped"], "{end:?}");
    }
}

fn jobs() -> Runtime {
    let mut runtime = Builder::new_multi_thread();
    runtime.worker_threads(2).enable_all().build().unwrap()
}

#[tokio::test]
async fn g6_a_destructor_that_blocks_delays_nobody_where_jobs_have_a_runtime() {
    let jobs = jobs();
    for (end, kind) in ENDS {
        let history = History::default();
        let thread = Blocked::until_released();
        let layer = layer(SettlePolicy::new(ack_on_success()))
            .timeout(SECOND / 10)
            .runtime(jobs.handle().clone());
        let block = Some(Arc::clone(&thread));
        let settled = run(layer, end, delivery(&history), block, true).await;
        // The caller has its response, though the destructor has not come to its end.
        assert_eq!(settled.unwrap(), kind, "{end:?}");
        assert_eq!(history.events(), ["settled"], "{end:?}");
        thread.release();
        idle(jobs.handle()).await;
        assert_eq!(history.events(), ["settled", "dropped"], "{end:?}");
        assert_eq!(history.dropped_in(), Some(jobs.handle().id()), "{end:?}");
    }
    jobs.shutdown_background();
}

#[test]
fn what_a_job_leaves_behind_is_dropped_though_its_runtime_has_ended() {
    let jobs = jobs();
    let history = History::default();
    let (end_of_runtime, ended) = oneshot::channel::<()>();
    let (delivered, noted) = (delivery(&history), history.clone());
    let ended = Arc::new(Mutex::new(Some(ended)));
    let layer = layer(SettlePolicy::new(
        |_: &Delivery, _: &Outcome<Noted, Noted>| Verdict::Ack,
    ));
    let mut sentinel =
        layer
            .runtime(jobs.handle().clone())
            .layer(service_fn(move |delivery: Delivery| {
                let history = delivery.history;
                let ended = ended.lock().unwrap().take();
                async move {
                    drop(ended);
                    Ok::<_, Noted>(Noted {
                        history,
                        thread: None,
                        explodes: true,
                    })
                }
            }));
    let caller = Builder::new_current_thread().enable_all().build().unwrap();
    let response = {
        let _context = caller.enter();
        tower::Service::call(&mut sentinel, delivered)
    };
    // The job is over, and nobody has polled.
    let mut end_of_runtime = end_of_runtime;
    block_on(end_of_runtime.closed());
    assert!(wait_until(|| jobs.metrics().num_alive_tasks() == 0));
    drop(jobs);
    let settled = caller.block_on(response).unwrap();
    assert_eq!(settled.kind, OutcomeKind::Completed);
    assert_eq!(noted.events(), ["settled", "dropped"]);
}
