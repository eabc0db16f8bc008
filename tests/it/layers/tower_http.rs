//! tower-http's middleware, and tower's for several services, around and inside a sentinel.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::body::Body;
use http::{HeaderName, Request, Response, StatusCode};
use tower::{
    BoxError, Layer, Service, ServiceBuilder, ServiceExt,
    balance::p2c::Balance,
    discover::ServiceList,
    load::{CompleteOnResponse, PendingRequests},
    service_fn,
    steer::Steer,
};
use tower_http::{
    catch_panic::CatchPanicLayer,
    request_id::{MakeRequestUuid, PropagateRequestIdLayer, RequestId, SetRequestIdLayer},
    timeout::TimeoutLayer,
    trace::TraceLayer,
};
use tower_sentinel::{Outcome, Report, SentinelLayer, outcome::OutcomeKind};

use crate::support::{Recorder, Refused, Seen, Unit, call, raise};

const SECOND: Duration = Duration::from_secs(1);

/// Responds with the status of an outcome, and keeps its reports.
#[derive(Clone, Default)]
struct Statuses(Arc<Mutex<Vec<(String, OutcomeKind)>>>);

impl Statuses {
    fn told(&self) -> Vec<(String, OutcomeKind)> {
        self.0.lock().unwrap().clone()
    }

    fn policy<E: Send + 'static>(
        &self,
    ) -> impl Service<
        Report<String, Response<Body>, E>,
        Response = Response<Body>,
        Error = Infallible,
        Future = Ready<Result<Response<Body>, Infallible>>,
    > + Clone
    + use<E> {
        let told = Arc::clone(&self.0);
        service_fn(move |report: Report<String, Response<Body>, E>| {
            let kind = report.outcome.kind();
            told.lock().unwrap().push((report.tag, kind));
            let status = match report.outcome {
                Outcome::Completed(response) => return ready(Ok(response)),
                Outcome::TimedOut(_) => StatusCode::GATEWAY_TIMEOUT,
                _ => StatusCode::INTERNAL_SERVER_ERROR,
            };
            let response = Response::builder().status(status).body(Body::empty());
            ready(Ok(response.unwrap()))
        })
    }
}

/// The tag is the id that a layer outside has set.
fn id(request: &Request<Body>) -> String {
    let id = request.extensions().get::<RequestId>();
    let id = id.and_then(|id| id.header_value().to_str().ok());
    id.unwrap_or("none").to_owned()
}

async fn process(request: Request<Body>) -> Result<Response<Body>, Infallible> {
    match request.uri().path() {
        "/panic" => raise("poison"),
        "/hang" => std::future::pending().await,
        _ => Ok(Response::new(Body::empty())),
    }
}

fn request(path: &str) -> Request<Body> {
    Request::builder().uri(path).body(Body::empty()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn trace_and_request_id_go_outside_and_the_id_is_the_tag() {
    let statuses = Statuses::default();
    let sentinel = SentinelLayer::with_tag(statuses.policy(), id as fn(&Request<Body>) -> String);
    let name = HeaderName::from_static("x-request-id");
    let mut service = ServiceBuilder::new()
        .layer(TraceLayer::new_for_http())
        .layer(SetRequestIdLayer::new(name.clone(), MakeRequestUuid))
        .layer(PropagateRequestIdLayer::new(name.clone()))
        .concurrency_limit(2)
        .layer(sentinel.timeout(SECOND))
        .service_fn(process);
    for (path, status, kind) in [
        ("/", 200, OutcomeKind::Completed),
        ("/panic", 500, OutcomeKind::Panicked),
        ("/hang", 504, OutcomeKind::TimedOut),
    ] {
        let response = call(&mut service, request(path)).await.unwrap();
        assert_eq!(response.status(), status, "{path}");
        let id = response.headers()[&name].to_str().unwrap().to_owned();
        assert_eq!(statuses.told().pop(), Some((id, kind)), "{path}");
    }
    assert_eq!(statuses.told().len(), 3);
}

#[tokio::test]
async fn catch_panic_outside_has_nothing_to_catch_and_inside_hides_the_panic() {
    let statuses = Statuses::default();
    let sentinel = SentinelLayer::with_tag(statuses.policy(), id as fn(&Request<Body>) -> String);
    let mut outside = ServiceBuilder::new()
        .layer(CatchPanicLayer::new())
        .layer(sentinel.clone())
        .service_fn(process);
    let response = call(&mut outside, request("/panic")).await.unwrap();
    assert_eq!(response.status(), 500);
    assert_eq!(statuses.told()[0].1, OutcomeKind::Panicked);

    let caught = |response: Response<_>| response.map(|_| Body::empty());
    let mut inside = ServiceBuilder::new()
        .layer(sentinel)
        .map_response(caught)
        .layer(CatchPanicLayer::new())
        .service_fn(process);
    let response = call(&mut inside, request("/panic")).await.unwrap();
    assert_eq!(response.status(), 500);
    // A job that panicked and has completed: a broker would get an ack.
    assert_eq!(statuses.told()[1].1, OutcomeKind::Completed);
}

#[tokio::test(start_paused = true)]
async fn a_timeout_of_tower_http_inside_is_a_response_and_so_a_completed_job() {
    let statuses = Statuses::default();
    let sentinel = SentinelLayer::with_tag(statuses.policy(), id as fn(&Request<Body>) -> String);
    let timeout = TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, SECOND);
    let mut inside = ServiceBuilder::new()
        .layer(sentinel)
        .layer(timeout)
        .service_fn(process);
    let response = call(&mut inside, request("/hang")).await.unwrap();
    assert_eq!(response.status(), 408);
    assert_eq!(statuses.told()[0].1, OutcomeKind::Completed);
}

// === several services ===

/// Picks each service in turn; clones share the turn.
fn in_turn<S>() -> impl Fn(&Unit, &[S]) -> usize + Clone {
    let turn = Arc::new(AtomicUsize::new(0));
    move |_, services| turn.fetch_add(1, Ordering::SeqCst) % services.len()
}

#[tokio::test]
async fn steer_goes_outside_over_sentinels_or_inside_over_handlers() {
    let handler =
        |answer: Result<(), Refused>| service_fn(move |_: Unit| ready(answer)).boxed_clone();
    let handlers = || vec![handler(Ok(())), handler(Err(Refused))];
    let recorder = Recorder::default();
    let layer = SentinelLayer::new(recorder.policy());
    let sentinels = handlers().into_iter().map(|it| layer.layer(it));
    let mut outside = Steer::new(sentinels, in_turn());
    for _ in 0..4 {
        call(&mut outside, Unit::default()).await.unwrap();
    }
    let both = [Seen::completed(), Seen::failed()];
    assert_eq!(recorder.reports(), both.repeat(2));

    let recorder = Recorder::default();
    let inside = Steer::new(handlers(), in_turn());
    let mut inside = SentinelLayer::new(recorder.policy()).layer(inside);
    for _ in 0..4 {
        call(&mut inside, Unit::default()).await.unwrap();
    }
    assert_eq!(recorder.reports(), both.repeat(2));
}

#[tokio::test]
async fn balance_goes_outside_since_it_is_not_clone() {
    let recorder = Recorder::default();
    let layer = SentinelLayer::new(recorder.policy());
    let sentinels = (0..3).map(|_| {
        let service = layer.layer(service_fn(|_: Unit| ready(Ok::<_, Refused>(()))));
        PendingRequests::new(
            service.map_err(BoxError::from),
            CompleteOnResponse::default(),
        )
    });
    let mut balance = Balance::new(ServiceList::new::<Unit>(sentinels.collect::<Vec<_>>()));
    for _ in 0..10 {
        call(&mut balance, Unit::default()).await.unwrap();
    }
    assert_eq!(recorder.reports(), [Seen::completed()].repeat(10));
}

#[tokio::test(start_paused = true)]
async fn a_rate_limit_goes_outside_where_it_bounds_what_is_taken() {
    let recorder = Recorder::default();
    let started = tokio::time::Instant::now();
    let mut outside = ServiceBuilder::new()
        .rate_limit(1, SECOND)
        .layer(SentinelLayer::new(recorder.policy()))
        .service_fn(|_: Unit| ready(Err::<(), _>(Refused)));
    for _ in 0..3 {
        call(&mut outside, Unit::default()).await.unwrap();
    }
    assert_eq!(started.elapsed(), 2 * SECOND);
    assert_eq!(recorder.reports(), [Seen::failed()].repeat(3));
}
