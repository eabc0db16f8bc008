//! A sentinel is a service like any other: services over it, under it and around its policy.

use std::{
    convert::Infallible,
    error::Error,
    fmt, future, io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::time::{Instant, sleep};
use tower::{
    BoxError, Service, ServiceBuilder, ServiceExt, service_fn, timeout::error::Elapsed,
    util::BoxCloneService,
};
use tower_sentinel::{
    Outcome, Panic, Report, SentinelError, SentinelLayer, ServiceBuilderExt,
    outcome::{CancelReason, Cancelled, Failure, OutcomeKind, TimedOut},
};

type Id = Arc<u64>;
type Reports = Arc<Mutex<Vec<(u64, OutcomeKind)>>>;

/// The job: even numbers are doubled, odd ones are errors, and a minute passes for those from 100.
async fn process(id: Id) -> Result<u64, io::Error> {
    if *id >= 100 {
        sleep(Duration::from_secs(60)).await;
    }
    match *id % 2 {
        0 => Ok(*id * 2),
        _ => Err(io::Error::other("odd")),
    }
}

/// A policy that notes its reports, and responds with the kind.
fn noting<E: Send + 'static>(
    reports: &Reports,
) -> impl Service<Report<Id, u64, E>, Response = OutcomeKind, Error = io::Error, Future: Send + 'static>
+ Clone
+ Send
+ Sync
+ Unpin
+ 'static {
    let reports = Arc::clone(reports);
    service_fn(move |report: Report<Id, u64, E>| {
        let kind = report.outcome.kind();
        reports.lock().unwrap().push((*report.tag, kind));
        future::ready(Ok(kind))
    })
}

async fn answer<S, J>(service: &mut S, job: J) -> Result<S::Response, S::Error>
where
    S: Service<J>,
{
    service.ready().await?.call(job).await
}

#[tokio::test(start_paused = true)]
async fn a_sentinel_goes_under_towers_timeout() {
    let reports = Reports::default();
    let mut service = ServiceBuilder::new()
        .timeout(Duration::from_secs(10))
        .sentinel(SentinelLayer::new(noting(&reports)))
        .service_fn(process);

    assert_eq!(
        answer(&mut service, Id::new(2)).await.unwrap(),
        OutcomeKind::Completed
    );
    assert_eq!(
        answer(&mut service, Id::new(3)).await.unwrap(),
        OutcomeKind::Failed
    );
    // A limit outside of a sentinel is a caller that drops: the job is stopped and settled.
    let error = answer(&mut service, Id::new(100)).await.unwrap_err();
    assert!(error.is::<Elapsed>());
    sleep(Duration::from_millis(1)).await;
    let expected = [
        (2, OutcomeKind::Completed),
        (3, OutcomeKind::Failed),
        (100, OutcomeKind::Cancelled),
    ];
    assert_eq!(*reports.lock().unwrap(), expected);
}

#[tokio::test(start_paused = true)]
async fn a_sentinel_goes_over_towers_timeout_and_under_another() {
    // The inner one makes `E` a `BoxError`, which is not itself an `Error`.
    let reports = Reports::default();
    let mut service = ServiceBuilder::new()
        .timeout(Duration::from_secs(100))
        .sentinel(SentinelLayer::new(noting::<BoxError>(&reports)))
        .timeout(Duration::from_secs(10))
        .service_fn(process);

    assert_eq!(
        answer(&mut service, Id::new(100)).await.unwrap(),
        OutcomeKind::Failed
    );
    assert_eq!(*reports.lock().unwrap(), [(100, OutcomeKind::Failed)]);
}

#[tokio::test(start_paused = true)]
async fn a_sentinel_goes_under_buffer() {
    let reports = Reports::default();
    let mut service = ServiceBuilder::new()
        .buffer(8)
        .sentinel(SentinelLayer::new(noting::<BoxError>(&reports)))
        .timeout(Duration::from_secs(10))
        .service_fn(process);

    let mut clone = service.clone();
    assert_eq!(
        answer(&mut service, Id::new(2)).await.unwrap(),
        OutcomeKind::Completed
    );
    assert_eq!(
        answer(&mut clone, Id::new(3)).await.unwrap(),
        OutcomeKind::Failed
    );
    let expected = [(2, OutcomeKind::Completed), (3, OutcomeKind::Failed)];
    assert_eq!(*reports.lock().unwrap(), expected);
}

#[tokio::test(start_paused = true)]
async fn a_sentinel_goes_into_a_box_clone_service() {
    let reports = Reports::default();
    let sentinel = ServiceBuilder::new()
        .sentinel(SentinelLayer::new(noting::<BoxError>(&reports)))
        .timeout(Duration::from_secs(10))
        .service_fn(process);
    let mut service: BoxCloneService<Id, OutcomeKind, SentinelError<BoxError, io::Error>> =
        BoxCloneService::new(sentinel.clone());
    let mut clone = service.clone();
    assert_eq!(
        answer(&mut service, Id::new(2)).await.unwrap(),
        OutcomeKind::Completed
    );
    assert_eq!(
        answer(&mut clone, Id::new(100)).await.unwrap(),
        OutcomeKind::Failed
    );

    // The error becomes a `BoxError` by `From`, as any error does.
    let mut service: BoxCloneService<Id, OutcomeKind, BoxError> =
        BoxCloneService::new(sentinel.map_err(BoxError::from));
    assert_eq!(
        answer(&mut service, Id::new(4)).await.unwrap(),
        OutcomeKind::Completed
    );
    assert_eq!(reports.lock().unwrap().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_sentinel_goes_under_load_shed() {
    let reports = Reports::default();
    let mut service = ServiceBuilder::new()
        .load_shed()
        .concurrency_limit(1)
        .sentinel(SentinelLayer::new(noting::<BoxError>(&reports)))
        .timeout(Duration::from_secs(10))
        .service_fn(process);

    let first = tokio::spawn(service.ready().await.unwrap().call(Id::new(100)));
    let error = answer(&mut service, Id::new(2)).await.unwrap_err();
    assert!(error.is::<tower::load_shed::error::Overloaded>());
    assert_eq!(first.await.unwrap().unwrap(), OutcomeKind::Failed);
    assert_eq!(
        answer(&mut service, Id::new(2)).await.unwrap(),
        OutcomeKind::Completed
    );
    // A shed call was no job: the policy settles nothing for it.
    let expected = [(100, OutcomeKind::Failed), (2, OutcomeKind::Completed)];
    assert_eq!(*reports.lock().unwrap(), expected);
}

#[tokio::test(start_paused = true)]
async fn a_sentinel_goes_under_rate_limit() {
    let reports = Reports::default();
    let mut service = ServiceBuilder::new()
        .rate_limit(2, Duration::from_secs(10))
        .sentinel(SentinelLayer::new(noting::<BoxError>(&reports)))
        .timeout(Duration::from_secs(10))
        .service_fn(process);

    let began = Instant::now();
    for id in 0..6 {
        answer(&mut service, Id::new(id)).await.unwrap();
    }
    let elapsed = began.elapsed();
    assert!((20..21).contains(&elapsed.as_secs()), "{elapsed:?}");
    assert_eq!(reports.lock().unwrap().len(), 6);
}

#[tokio::test(start_paused = true)]
async fn all_of_it_stacks_at_once() {
    let reports = Reports::default();
    // The policy has its own middleware, so `P` is a `BoxError` as well.
    let policy = ServiceBuilder::new()
        .timeout(Duration::from_secs(5))
        .concurrency_limit(1)
        .service(noting::<BoxError>(&reports));
    let sentinel = ServiceBuilder::new()
        .timeout(Duration::from_secs(100))
        .buffer(8)
        .rate_limit(100, Duration::from_secs(1))
        .load_shed()
        .concurrency_limit(8)
        .sentinel(SentinelLayer::new(policy).timeout(Duration::from_secs(20)))
        .timeout(Duration::from_secs(10))
        .service_fn(process);
    let mut service: BoxCloneService<Id, OutcomeKind, BoxError> = BoxCloneService::new(sentinel);

    for (id, kind) in [
        (2, OutcomeKind::Completed),
        (3, OutcomeKind::Failed),
        (100, OutcomeKind::Failed),
    ] {
        assert_eq!(answer(&mut service, Id::new(id)).await.unwrap(), kind);
    }
    assert_eq!(reports.lock().unwrap().len(), 3);
}

// === The errors ===

fn as_error<E: Error + Send + Sync + 'static>(error: E) -> E {
    error
}

fn boxed(message: &'static str) -> BoxError {
    io::Error::other(message).into()
}

fn source<E: Error>(error: &E) -> Option<String> {
    error.source().map(ToString::to_string)
}

type Boxed = SentinelError<BoxError, BoxError>;
type Bare = SentinelError<&'static str, io::Error>;

#[test]
fn a_sentinel_error_prints_the_inner_error_and_has_the_source_that_coherence_allows() {
    for (error, display, inner) in [
        (
            Boxed::Unready(boxed("no pool")),
            "the service is not ready: no pool",
            Some("no pool"),
        ),
        (
            Boxed::Policy(boxed("no ack")),
            "the policy failed: no ack",
            Some("no ack"),
        ),
        (
            Boxed::PolicyTimedOut(Duration::from_secs(5)),
            "the policy did not settle within 5s",
            None,
        ),
    ] {
        let error = as_error(error);
        assert_eq!(error.to_string(), display);
        assert_eq!(source(&error).as_deref(), inner);
    }
    for (error, display) in [
        (
            Boxed::UnreadyPanicked(Panic::new("index 7")),
            "the service panicked while it was asked for readiness: index 7",
        ),
        (
            Boxed::PolicyPanicked(Panic::new(String::from("index 7"))),
            "the policy panicked: index 7",
        ),
    ] {
        let error = as_error(error);
        assert_eq!(error.to_string(), display);
        let panic = error.source().unwrap().downcast_ref::<Panic>().unwrap();
        assert_eq!(panic.message(), "index 7");
    }

    // An error that is no `BoxError` is printed, and has no source: the code can't require `E: Error`.
    let error = as_error(Bare::Unready("no pool"));
    assert_eq!(error.to_string(), "the service is not ready: no pool");
    assert_eq!(source(&error), None);
    let error = as_error(Bare::Policy(io::Error::other("no ack")));
    assert_eq!(error.to_string(), "the policy failed: no ack");
    assert_eq!(source(&error), None);
}

#[test]
fn the_source_of_a_boxed_error_is_the_very_error_in_the_box() {
    let error = Boxed::Policy(boxed("no ack"));
    assert!(error.source().unwrap().is::<io::Error>());
    let failure = Failure::Failed(boxed("no pool"));
    assert!(failure.source().unwrap().is::<io::Error>());
}

#[tokio::test]
async fn an_inner_readiness_error_can_be_told_apart_through_the_whole_stack() {
    let inner = service_fn(|_: Id| future::ready(Ok::<_, BoxError>(7_u64)));
    let broken = tower::util::MapErr::new(Broken(inner), |error: &'static str| boxed(error));
    let reports = Reports::default();
    let mut service: BoxCloneService<Id, OutcomeKind, BoxError> = ServiceBuilder::new()
        .boxed_clone()
        .map_err(BoxError::from)
        .sentinel(SentinelLayer::new(noting::<BoxError>(&reports)))
        .service(broken);

    let error = service.ready().await.map(drop).unwrap_err();
    let error: &SentinelError<BoxError, io::Error> = error.downcast_ref().unwrap();
    assert!(matches!(error, SentinelError::Unready(_)));
    assert!(error.source().unwrap().is::<io::Error>());
    assert!(reports.lock().unwrap().is_empty());
}

/// A service that is never ready.
#[derive(Clone)]
struct Broken<S>(S);

impl<S: Service<Id>> Service<Id> for Broken<S> {
    type Response = S::Response;
    type Error = &'static str;
    type Future = future::Pending<Result<S::Response, &'static str>>;

    fn poll_ready(
        &mut self,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<(), &'static str>> {
        std::task::Poll::Ready(Err("broken"))
    }

    fn call(&mut self, _: Id) -> Self::Future {
        future::pending()
    }
}

#[test]
fn a_failure_is_an_error_that_prints_what_the_job_died_of() {
    let limit = Duration::from_secs(5);
    for (failure, display, has_source) in [
        (
            Failure::Failed(boxed("odd")),
            "the job failed: odd",
            Some("odd"),
        ),
        (
            Failure::Panicked(Panic::new("index 7")),
            "the job panicked: index 7",
            None,
        ),
        (
            Failure::TimedOut(TimedOut::new(limit, true)),
            "the job passed its time limit of 5s",
            None,
        ),
        (
            Failure::TimedOut(TimedOut::new(limit, false)),
            "the job passed its time limit of 5s; it is still running",
            None,
        ),
        (
            Failure::Cancelled(Cancelled::new(CancelReason::LeaseLost, true)),
            "the job was cancelled: the lease on the job was lost",
            None,
        ),
    ] {
        let failure = as_error(failure);
        assert_eq!(failure.to_string(), display);
        assert_eq!(source(&failure).as_deref(), has_source);
    }
    let failure = as_error(Failure::Failed("odd"));
    assert_eq!(failure.to_string(), "the job failed: odd");
    assert_eq!(source(&failure), None);
}

#[tokio::test(start_paused = true)]
async fn a_panic_on_the_way_down_is_the_source_of_a_failure() {
    struct PanicInDrop;
    impl Drop for PanicInDrop {
        fn drop(&mut self) {
            panic!("on the way down");
        }
    }
    let forward = service_fn(|report: Report<Id, u64, Infallible>| async move {
        Ok::<_, Infallible>(report.outcome)
    });
    let mut service = ServiceBuilder::new()
        .sentinel(SentinelLayer::new(forward))
        .service_fn(|_: Id| async {
            let _guard = PanicInDrop;
            future::pending().await
        });
    let outcome = answer(&mut service, Id::new(7)).await.unwrap();
    let failure = outcome.into_result().unwrap_err();
    assert_eq!(failure.to_string(), "the job passed its time limit of 30s");
    let panic = failure.source().unwrap().downcast_ref::<Panic>().unwrap();
    assert_eq!(panic.message(), "on the way down");
}

// === Outcomes ===

#[test]
fn an_outcome_knows_its_kind_and_becomes_a_result() {
    type Out = Outcome<u8, &'static str>;
    let limit = Duration::from_secs(5);
    for (outcome, kind, name, result) in [
        (
            Out::Completed(7),
            OutcomeKind::Completed,
            "completed",
            Ok(7),
        ),
        (
            Out::Failed("odd"),
            OutcomeKind::Failed,
            "failed",
            Err("the job failed: odd"),
        ),
        (
            Out::Panicked(Panic::new("index 7")),
            OutcomeKind::Panicked,
            "panicked",
            Err("the job panicked: index 7"),
        ),
        (
            Out::TimedOut(TimedOut::new(limit, true)),
            OutcomeKind::TimedOut,
            "timed_out",
            Err("the job passed its time limit of 5s"),
        ),
        (
            Out::Cancelled(Cancelled::new(CancelReason::Shutdown, true)),
            OutcomeKind::Cancelled,
            "cancelled",
            Err("the job was cancelled: shutdown"),
        ),
    ] {
        assert_eq!(outcome.kind(), kind);
        assert_eq!(kind.as_str(), name);
        assert_eq!(kind.to_string(), name);
        let is = [
            outcome.is_completed(),
            outcome.is_failed(),
            outcome.is_panicked(),
            outcome.is_timed_out(),
            outcome.is_cancelled(),
        ];
        let kinds = [
            OutcomeKind::Completed,
            OutcomeKind::Failed,
            OutcomeKind::Panicked,
            OutcomeKind::TimedOut,
            OutcomeKind::Cancelled,
        ];
        assert_eq!(is, kinds.map(|other| other == kind));
        let actual = outcome.into_result().map_err(|failure| failure.to_string());
        assert_eq!(actual, result.map_err(ToOwned::to_owned));
    }
    assert_eq!(Out::from(Ok(7)).kind(), OutcomeKind::Completed);
    assert_eq!(Out::from(Err("odd")).kind(), OutcomeKind::Failed);
    // Aligned in a column, as a log may want it.
    assert_eq!(format!("[{:<9}]", OutcomeKind::Failed), "[failed   ]");
}

// === Tags ===

#[tokio::test]
async fn the_tag_of_an_arc_is_the_arc_itself() {
    /// Not `Clone`, so it is the very same one that the policy sees.
    #[derive(Debug)]
    struct Order {
        number: u64,
    }

    let policy = service_fn(|report: Report<Arc<Order>, (), Infallible>| async move {
        Ok::<_, Infallible>(report.tag)
    });
    let mut service = ServiceBuilder::new()
        .sentinel(SentinelLayer::new(policy))
        .service_fn(|order: Arc<Order>| {
            assert_eq!(order.number, 7);
            async move {
                drop(order);
                Ok::<_, Infallible>(())
            }
        });
    let order = Arc::new(Order { number: 7 });
    let tag = answer(&mut service, Arc::clone(&order)).await.unwrap();
    assert!(Arc::ptr_eq(&tag, &order));
    // The job and the sentinel have let go of theirs.
    drop(tag);
    assert_eq!(Arc::strong_count(&order), 1);
}

#[tokio::test]
async fn the_tag_of_an_unsized_arc_is_the_arc_itself() {
    trait Line: fmt::Debug + fmt::Display + Send + Sync {}

    impl Line for &str {}

    let policy = service_fn(|report: Report<Arc<dyn Line>, (), Infallible>| {
        future::ready(Ok::<_, Infallible>(report.tag.to_string()))
    });
    let mut service = ServiceBuilder::new()
        .sentinel(SentinelLayer::new(policy))
        .service_fn(|_: Arc<dyn Line>| future::ready(Ok::<_, Infallible>(())));
    assert_eq!(
        answer(&mut service, Arc::new("order 7") as _)
            .await
            .unwrap(),
        "order 7"
    );
}

#[tokio::test]
async fn the_tag_of_a_foreign_type_is_read_by_a_function() {
    // `SocketAddr` is not ours and not a `Job`, as an `http::Request` would be.
    let policy = service_fn(|report: Report<u16, bool, Infallible>| async move {
        Ok::<_, Infallible>((report.tag, report.outcome.into_result().unwrap()))
    });
    let mut service = ServiceBuilder::new()
        .sentinel(SentinelLayer::with_tag(policy, SocketAddr::port))
        .service_fn(|address: SocketAddr| async move { Ok::<_, Infallible>(address.is_ipv4()) });
    let address = SocketAddr::from(([127, 0, 0, 1], 5672));
    assert_eq!(answer(&mut service, address).await.unwrap(), (5672, true));
}
