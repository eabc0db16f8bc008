//! Jobs that do not stop.

use std::{
    convert::Infallible,
    future::{self},
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    task::{Context, Wake, Waker},
    time::Duration,
};

use futures_util::poll;
use tokio::{
    runtime::{Builder, Runtime},
    sync::{Semaphore, mpsc},
    task::{JoinSet, yield_now},
    time::sleep,
};
use tower::{Service, ServiceBuilder, ServiceExt, limit::GlobalConcurrencyLimitLayer, service_fn};
use tower_sentinel::{Outcome, Report, SentinelLayer, outcome::OutcomeKind, sentinel::Sentinel};

use super::within;
use crate::support::paused_time;

/// A job that blocks its thread until its other end is dropped.
struct Blocker {
    started: mpsc::UnboundedSender<()>,
    released: Receiver<()>,
}

/// A runtime for jobs that block, dropped as one that is not waited for.
struct Jobs(Option<Runtime>);

impl Jobs {
    fn new(threads: usize) -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(threads).build();
        Self(Some(runtime.unwrap()))
    }
}

impl Drop for Jobs {
    fn drop(&mut self) {
        // A plain drop would block, which the runtime of the test does not allow.
        self.0.take().unwrap().shutdown_background();
    }
}

type Stopped = Arc<Mutex<Vec<(OutcomeKind, bool)>>>;

/// A sentinel whose jobs block on a runtime of their own; its policy notes if they stopped.
#[expect(clippy::type_complexity, reason = "there are no aliases for bounds")]
fn blocking(
    jobs: &Jobs,
    max: usize,
    stopped: &Stopped,
) -> Sentinel<
    impl Service<Blocker, Response = (), Error = Infallible, Future: Send + 'static>
    + Clone
    + Send
    + 'static,
    impl Service<
        Report<(), (), Infallible>,
        Response = OutcomeKind,
        Error = Infallible,
        Future: Send + 'static,
    > + Clone
    + Send
    + 'static,
    tower_sentinel::sentinel::Hooks<fn(&Blocker)>,
> {
    let stopped = Arc::clone(stopped);
    let policy = service_fn(move |report: Report<(), (), Infallible>| {
        let kind = report.outcome.kind();
        stopped.lock().unwrap().push(match report.outcome {
            Outcome::TimedOut(timed_out) => (kind, timed_out.stopped()),
            Outcome::Cancelled(cancelled) => (kind, cancelled.stopped()),
            _ => (kind, true),
        });
        future::ready(Ok(kind))
    });
    let layer = SentinelLayer::with_tag(policy, (|_| ()) as fn(&Blocker))
        .timeout(Duration::from_secs(1))
        .stop_wait(Duration::from_secs(1))
        .runtime(jobs.0.as_ref().unwrap().handle().clone())
        .max_abandoned(max);
    ServiceBuilder::new()
        .layer(layer)
        .service_fn(|job: Blocker| async move {
            job.started.send(()).ok();
            job.released.recv().ok();
            Ok(())
        })
}

/// Calls a job and waits until it blocks; the sender releases it.
///
/// The response is not polled meanwhile, so that paused time does not run to its limit.
async fn block<S: Service<Blocker>>(service: &mut S) -> (S::Future, SyncSender<()>)
where
    S::Error: std::fmt::Debug,
{
    let (started, mut is_started) = mpsc::unbounded_channel();
    let (release, released) = sync_channel(1);
    let response = service
        .ready()
        .await
        .unwrap()
        .call(Blocker { started, released });
    within("the job starts", is_started.recv()).await.unwrap();
    (response, release)
}

/// Lets every task that can run do so.
async fn settle_down() {
    for _ in 0..100 {
        yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn g4_abandoned_jobs_keep_the_service_unready_until_one_of_them_ends() {
    let jobs = Jobs::new(3);
    let stopped = Stopped::default();
    let mut service = blocking(&jobs, 2, &stopped);

    let (response, first) = block(&mut service).await;
    assert_eq!(response.await.unwrap(), OutcomeKind::TimedOut);
    // One is fewer than two.
    let (response, second) = block(&mut service).await;
    assert_eq!(response.await.unwrap(), OutcomeKind::TimedOut);
    assert_eq!(
        *stopped.lock().unwrap(),
        [(OutcomeKind::TimedOut, false); 2]
    );

    // Clones share the count: all wait, and all are woken when one of the two ends.
    let mut waiting = JoinSet::new();
    for _ in 0..3 {
        let mut clone = service.clone();
        waiting.spawn(async move { clone.ready().await.map(drop).unwrap() });
    }
    settle_down().await;
    assert!(waiting.try_join_next().is_none());
    assert!(poll!(service.ready()).is_pending());

    drop(first);
    within("all clones are woken", waiting.join_all()).await;

    // One of the two still runs, so one more blocks the service again.
    let (response, third) = block(&mut service).await;
    assert_eq!(response.await.unwrap(), OutcomeKind::TimedOut);
    assert!(poll!(service.ready()).is_pending());
    drop((second, third));
    within("the service is ready", service.ready())
        .await
        .unwrap();
    assert_eq!(stopped.lock().unwrap().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn g4_a_job_that_its_caller_dropped_and_that_does_not_stop_is_abandoned_too() {
    let jobs = Jobs::new(1);
    let stopped = Stopped::default();
    let mut service = blocking(&jobs, 1, &stopped);

    let (response, release) = block(&mut service).await;
    drop(response);
    // It is given its time to stop first.
    within("a service with a job that stops", service.ready())
        .await
        .unwrap();
    sleep(Duration::from_millis(1_001)).await;
    assert_eq!(*stopped.lock().unwrap(), [(OutcomeKind::Cancelled, false)]);
    assert!(poll!(service.ready()).is_pending());

    drop(release);
    within("the service is ready", service.ready())
        .await
        .unwrap();
}

#[tokio::test(start_paused = true)]
async fn g4_jobs_that_stop_are_not_abandoned() {
    let policy = service_fn(|report: Report<Arc<()>, (), Infallible>| async move {
        Ok::<_, Infallible>(report.outcome.kind())
    });
    let mut service = ServiceBuilder::new()
        .layer(SentinelLayer::new(policy).max_abandoned(1))
        .service_fn(|_job: Arc<()>| future::pending());
    for _ in 0..3 {
        let response = service.ready().await.unwrap().call(Arc::default());
        assert_eq!(response.await.unwrap(), OutcomeKind::TimedOut);
        assert!(poll!(service.ready()).is_ready());
    }
}

#[tokio::test(start_paused = true)]
async fn g4_a_timed_out_job_that_did_not_stop_frees_its_permit() {
    let jobs = Jobs::new(1);
    let stopped = Stopped::default();
    let permits = Arc::new(Semaphore::new(1));
    let mut service = ServiceBuilder::new()
        .layer(GlobalConcurrencyLimitLayer::with_semaphore(Arc::clone(
            &permits,
        )))
        .service(blocking(&jobs, 1, &stopped));

    let (response, release) = block(&mut service).await;
    assert_eq!(permits.available_permits(), 0);
    assert_eq!(response.await.unwrap(), OutcomeKind::TimedOut);
    assert_eq!(permits.available_permits(), 1);
    // The permit is free and the service is not ready: this is the purpose of `max_abandoned`.
    assert!(poll!(service.ready()).is_pending());
    drop(release);
    within("the service is ready", service.ready())
        .await
        .unwrap();
}

#[test]
#[should_panic(expected = "`max_abandoned(0)` would never let a job in")]
fn g4_max_abandoned_of_zero_panics() {
    drop(SentinelLayer::new(()).max_abandoned(0));
}

struct Silent;

impl Wake for Silent {
    fn wake(self: Arc<Self>) {}
}

#[tokio::test(start_paused = true)]
async fn g4_max_abandoned_keeps_no_waker_but_the_last_of_each_clone() {
    let jobs = Jobs::new(1);
    let mut service = blocking(&jobs, 1, &Stopped::default());
    let (response, release) = block(&mut service).await;
    assert_eq!(response.await.unwrap(), OutcomeKind::TimedOut);

    let (first, last) = (Arc::new(Silent), Arc::new(Silent));
    let mut clone = service.clone();
    for waker in [&first, &last] {
        let waker = Waker::from(Arc::clone(waker));
        let ready = clone.poll_ready(&mut Context::from_waker(&waker));
        assert!(ready.is_pending());
    }
    assert_eq!(
        (Arc::strong_count(&first), Arc::strong_count(&last)),
        (1, 2)
    );
    drop(clone);
    assert_eq!(
        (Arc::strong_count(&first), Arc::strong_count(&last)),
        (1, 1)
    );
    drop(release);
}

#[test]
fn g4_abandoned_jobs_are_counted_though_the_runtime_that_gave_them_up_ends() {
    let jobs = Jobs::new(1);
    let mut service = blocking(&jobs, 1, &Stopped::default());
    let release = paused_time().block_on(async {
        let (response, release) = block(&mut service).await;
        assert_eq!(response.await.unwrap(), OutcomeKind::TimedOut);
        release
    });
    paused_time().block_on(async {
        // It still runs.
        assert!(poll!(service.ready()).is_pending());
        drop(release);
        within("the service is ready", service.ready())
            .await
            .unwrap();
    });
}
