//! G3 and G5: readiness is respected, and its errors are never outcomes.

use std::{
    convert::Infallible,
    future,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures_util::poll;
use tokio::{
    sync::Semaphore,
    task::yield_now,
    time::{sleep, timeout},
};
use tower::{BoxError, Service, ServiceBuilder, ServiceExt, limit::ConcurrencyLimit, service_fn};
use tower_sentinel::{
    Outcome, Report, SentinelError, SentinelLayer, outcome::OutcomeKind, sentinel::OnDrop,
};
use tower_test::{assert_request_eq, mock};

type Id = Arc<u64>;

/// A policy that responds with the kind of the outcome, and counts its calls.
fn counting<T: Send + 'static, E: Send + 'static>(
    calls: &Arc<AtomicUsize>,
) -> impl Service<Report<Id, T, E>, Response = OutcomeKind, Error = Infallible, Future: Send + 'static>
+ Clone
+ Send
+ Unpin
+ 'static {
    let calls = Arc::clone(calls);
    service_fn(move |report: Report<Id, T, E>| {
        calls.fetch_add(1, SeqCst);
        future::ready(Ok(report.outcome.kind()))
    })
}

// === G3 ===

#[tokio::test(start_paused = true)]
async fn g3_a_readiness_error_comes_back_from_poll_ready_and_is_not_an_outcome() {
    let calls = Arc::default();
    let (mut service, mut handle) =
        mock::spawn_layer::<Id, (), _>(SentinelLayer::new(counting(&calls)));

    for _ in 0..1_000 {
        handle.send_error("no connection");
        let Poll::Ready(Err(SentinelError::Unready(error))) = service.poll_ready() else {
            panic!("a readiness error is the caller's");
        };
        assert_eq!(error.to_string(), "no connection");
    }
    sleep(Duration::from_secs(60)).await;
    assert_eq!(calls.load(SeqCst), 0);

    // The sentinel has no memory of it: a service that is ready again is used again.
    handle.allow(1);
    assert!(matches!(service.poll_ready(), Poll::Ready(Ok(()))));
    let response = tokio::spawn(service.call(Id::new(7)));
    assert_request_eq!(handle, Id::new(7)).send_response(());
    assert_eq!(response.await.unwrap().unwrap(), OutcomeKind::Completed);
    assert_eq!(calls.load(SeqCst), 1);
}

#[tokio::test]
async fn g3_a_pending_service_keeps_the_sentinel_pending_and_wakes_it() {
    let calls = Arc::default();
    let (mut service, mut handle) =
        mock::spawn_layer::<Id, (), _>(SentinelLayer::new(counting::<_, BoxError>(&calls)));
    handle.allow(0);

    assert!(service.poll_ready::<Id>().is_pending());
    assert!(!service.is_woken());
    handle.allow(1);
    assert!(service.is_woken());
    assert!(service.poll_ready::<Id>().is_ready());
    assert_eq!(calls.load(SeqCst), 0);
}

/// Panics when it is polled for readiness, for as long as the counter says.
#[derive(Clone)]
struct PanicsUnready {
    panics: Arc<AtomicUsize>,
}

impl Service<Id> for PanicsUnready {
    type Response = ();
    type Error = Infallible;
    type Future = future::Ready<Result<(), Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        let left = self.panics.load(SeqCst);
        if left > 0 {
            self.panics.store(left - 1, SeqCst);
            panic!("no pool, {left} left");
        }
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Id) -> Self::Future {
        future::ready(Ok(()))
    }
}

#[tokio::test(start_paused = true)]
async fn g3_a_readiness_panic_comes_back_from_poll_ready_and_is_not_an_outcome() {
    let calls = Arc::default();
    let panics = Arc::new(AtomicUsize::new(3));
    let mut service = ServiceBuilder::new()
        .layer(SentinelLayer::new(counting(&calls)))
        .service(PanicsUnready {
            panics: Arc::clone(&panics),
        });

    for left in [3, 2, 1] {
        let Err(SentinelError::UnreadyPanicked(panic)) = service.ready().await.map(drop) else {
            panic!("a readiness panic is the caller's, as an error");
        };
        assert_eq!(panic.message(), format!("no pool, {left} left"));
    }
    sleep(Duration::from_secs(60)).await;
    assert_eq!(calls.load(SeqCst), 0);

    let response = service.ready().await.unwrap().call(Id::new(7));
    assert_eq!(response.await.unwrap(), OutcomeKind::Completed);
    assert_eq!(calls.load(SeqCst), 1);
}

// === G5, the service ===

/// Counts per instance: a `call` needs a `poll_ready` of this very instance that said yes.
struct Strict {
    instance: usize,
    instances: Arc<AtomicUsize>,
    ready: bool,
}

impl Strict {
    fn new() -> Self {
        Self {
            instance: 0,
            instances: Arc::new(AtomicUsize::new(1)),
            ready: false,
        }
    }
}

impl Clone for Strict {
    fn clone(&self) -> Self {
        Self {
            instance: self.instances.fetch_add(1, SeqCst),
            instances: Arc::clone(&self.instances),
            // Readiness is not cloned: it may stand for a permit or a connection.
            ready: false,
        }
    }
}

impl<R> Service<R> for Strict {
    type Response = usize;
    type Error = Infallible;
    type Future = future::Ready<Result<usize, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.ready = true;
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: R) -> Self::Future {
        assert!(self.ready, "instance {} was not ready", self.instance);
        self.ready = false;
        future::ready(Ok(self.instance))
    }
}

/// A policy that hands the outcome to the caller.
fn forwarding<T: Send + 'static, E: Send + 'static>()
-> impl Service<Report<Id, T, E>, Response = Outcome<T, E>, Error = Infallible, Future: Send + 'static>
+ Clone
+ Send
+ Unpin
+ 'static {
    service_fn(|report: Report<Id, T, E>| future::ready(Ok(report.outcome)))
}

#[tokio::test]
async fn g5_the_instance_that_is_ready_is_the_one_that_is_called() {
    let mut service = ServiceBuilder::new()
        .layer(SentinelLayer::new(forwarding()))
        .service(Strict::new());

    for _ in 0..100 {
        // Polled more than once, as `ready` may be, and through more than one clone.
        let mut clone = service.clone();
        for service in [&mut clone, &mut service] {
            ServiceExt::<Id>::ready(service).await.unwrap();
            ServiceExt::<Id>::ready(service).await.unwrap();
        }
        let (ready, other) = (service.get_ref().instance, clone.get_ref().instance);
        assert_ne!(ready, other);

        let response = service.call(Id::new(7));
        assert_ne!(
            service.get_ref().instance,
            ready,
            "the next call gets another instance"
        );
        let outcome = response.await.unwrap();
        assert!(matches!(outcome, Outcome::Completed(called) if called == ready));

        let outcome = clone.call(Id::new(8)).await.unwrap();
        assert!(matches!(outcome, Outcome::Completed(called) if called == other));
    }
}

#[tokio::test]
async fn g5_a_call_without_poll_ready_panics_in_the_service_and_is_that_jobs_outcome() {
    let permits = Arc::new(Semaphore::new(2));
    let inner = service_fn(|_: Id| future::ready(Ok::<_, Infallible>(())));
    let calls = Arc::default();
    let mut service = ServiceBuilder::new()
        .layer(SentinelLayer::new(counting(&calls)))
        .service(ConcurrencyLimit::with_semaphore(
            inner,
            Arc::clone(&permits),
        ));

    // tower's custom: the service may panic, and here that panic is the job's.
    let kind = service.call(Id::new(7)).await.unwrap();
    assert_eq!(kind, OutcomeKind::Panicked);
    assert_eq!(calls.load(SeqCst), 1);

    let response = service.ready().await.unwrap().call(Id::new(8));
    assert_eq!(response.await.unwrap(), OutcomeKind::Completed);
    // One readiness is good for one call.
    let kind = service.call(Id::new(9)).await.unwrap();
    assert_eq!(kind, OutcomeKind::Panicked);
    assert_eq!(calls.load(SeqCst), 3);
    assert_eq!(permits.available_permits(), 2);
}

/// End of a job that holds a permit of a limit inside of the sentinel.
#[derive(Clone, Copy, Debug)]
enum End {
    Value,
    PanicInCall,
    PanicLater,
    TimeLimit,
    CallerDropped,
}

#[tokio::test(start_paused = true)]
async fn g5_an_inner_permit_is_reserved_by_poll_ready_and_released_when_the_job_ends() {
    for end in [
        End::Value,
        End::PanicInCall,
        End::PanicLater,
        End::TimeLimit,
        End::CallerDropped,
    ] {
        let permits = Arc::new(Semaphore::new(1));
        let inner = service_fn(move |_: Id| {
            assert!(!matches!(end, End::PanicInCall), "in call");
            async move {
                sleep(Duration::from_secs(1)).await;
                match end {
                    End::Value => {}
                    End::PanicInCall | End::PanicLater => panic!("later"),
                    End::TimeLimit | End::CallerDropped => future::pending().await,
                }
                Ok::<_, Infallible>(())
            }
        });
        let free = Arc::new(Mutex::new(Vec::new()));
        let policy = {
            let (permits, free) = (Arc::clone(&permits), Arc::clone(&free));
            service_fn(move |_: Report<Id, (), Infallible>| {
                free.lock().unwrap().push(permits.available_permits());
                future::ready(Ok::<_, Infallible>(()))
            })
        };
        let mut service = ServiceBuilder::new()
            .layer(SentinelLayer::new(policy).timeout(Duration::from_secs(5)))
            .service(ConcurrencyLimit::with_semaphore(
                inner,
                Arc::clone(&permits),
            ));

        service.ready().await.unwrap();
        assert_eq!(permits.available_permits(), 0, "{end:?}: not reserved");
        // Probed with clones: whoever stays in line would be dealt the permit that comes back.
        assert!(poll!(service.clone().ready()).is_pending());
        let response = service.call(Id::new(7));
        assert_eq!(
            permits.available_permits(),
            0,
            "{end:?}: given up by the call"
        );
        // The clone that took its place has no permit itself.
        assert!(poll!(service.clone().ready()).is_pending());

        let patience = match end {
            End::CallerDropped => Duration::from_secs(2),
            _ => Duration::MAX,
        };
        timeout(patience, response).await.ok();
        // After a drop, the job is stopped and settled in the background.
        sleep(Duration::from_millis(1)).await;
        // The policy found it free: it is the job's, not the settlement's.
        assert_eq!(*free.lock().unwrap(), [1], "{end:?}");
        assert!(poll!(service.ready()).is_ready());
    }
}

// === G5, the policy ===

/// Notes each poll for its readiness.
#[derive(Clone)]
struct Asked<P> {
    policy: P,
    asked: Arc<AtomicUsize>,
}

impl<P: Service<R>, R> Service<R> for Asked<P> {
    type Response = P::Response;
    type Error = P::Error;
    type Future = P::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), P::Error>> {
        self.asked.fetch_add(1, SeqCst);
        self.policy.poll_ready(cx)
    }

    fn call(&mut self, report: R) -> P::Future {
        self.policy.call(report)
    }
}

#[tokio::test(start_paused = true)]
async fn g5_the_policy_is_not_asked_for_readiness_while_a_job_runs() {
    let asked = Arc::new(AtomicUsize::new(0));
    let (policy, mut acks) = mock::pair::<Report<Id, (), Infallible>, ()>();
    let run = Arc::new(Semaphore::new(0));
    let mut service = ServiceBuilder::new()
        .layer(SentinelLayer::new(Asked {
            policy,
            asked: Arc::clone(&asked),
        }))
        .service_fn({
            let run = Arc::clone(&run);
            move |_: Id| {
                let run = Arc::clone(&run);
                async move {
                    run.acquire().await.unwrap().forget();
                    Ok::<_, Infallible>(())
                }
            }
        });
    acks.allow(0);

    let mut response = Box::pin(service.ready().await.unwrap().call(Id::new(7)));
    for _ in 0..10 {
        assert!(poll!(&mut response).is_pending());
        yield_now().await;
    }
    assert_eq!(asked.load(SeqCst), 0);

    // Then it is asked, right before its call, and waited for.
    run.add_permits(1);
    yield_now().await;
    assert!(poll!(&mut response).is_pending());
    assert_eq!(asked.load(SeqCst), 1);
    assert!(acks.poll_request().is_pending());
    sleep(Duration::from_secs(10)).await;
    acks.allow(1);
    assert!(poll!(&mut response).is_pending());
    assert_eq!(asked.load(SeqCst), 2);
    let (report, answer) = acks.next_request().await.unwrap();
    assert_eq!(*report.tag, 7);
    assert_eq!(
        report.elapsed,
        Duration::ZERO,
        "waiting for the policy is not the job's time"
    );
    answer.send_response(());
    response.await.unwrap();
    assert_eq!(asked.load(SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn g5_each_job_settles_through_an_instance_of_the_policy_that_is_ready() {
    let mut service = ServiceBuilder::new()
        .layer(SentinelLayer::new(Strict::new()))
        .service_fn(|_: Id| future::ready(Ok::<_, Infallible>(())));

    let mut instances = Vec::new();
    for id in 0..100 {
        let response = service.ready().await.unwrap().call(Id::new(id));
        // `Strict` would have panicked, were another instance called than was asked.
        instances.push(response.await.unwrap());
    }
    instances.dedup();
    assert_eq!(instances.len(), 100, "an instance served two jobs");
}

#[tokio::test(start_paused = true)]
async fn g5_a_policy_with_one_permit_settles_many_jobs_though_their_callers_drop() {
    // Were readiness reserved at the call, the first job that hangs would have it for good.
    let permits = Arc::new(Semaphore::new(1));
    let calls = Arc::new(AtomicUsize::new(0));
    let policy = ConcurrencyLimit::with_semaphore(counting(&calls), Arc::clone(&permits));
    let mut service = ServiceBuilder::new()
        .layer(
            SentinelLayer::new(policy)
                .timeout(Duration::from_secs(1))
                .on_drop(OnDrop::Detach),
        )
        .service_fn(|id: Id| async move {
            if *id % 2 == 0 {
                future::pending::<()>().await;
            }
            Ok::<_, Infallible>(())
        });

    for id in 0..100 {
        drop(service.ready().await.unwrap().call(Id::new(id)));
    }
    assert_eq!(permits.available_permits(), 1);
    sleep(Duration::from_millis(500)).await;
    assert_eq!(calls.load(SeqCst), 50);
    assert_eq!(permits.available_permits(), 1);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(calls.load(SeqCst), 100);
    assert_eq!(permits.available_permits(), 1);
}
