//! A push endpoint, as used by Pub/Sub, CloudEvents and webhooks: the HTTP status is the acknowledgement.
//!
//! ```sh
//! cargo run --example axum -- 127.0.0.1:3000
//! curl -i -X POST -d 'a job' http://127.0.0.1:3000/jobs
//! ```
//!
//! | outcome | status | reaction of the sender |
//! | --- | --- | --- |
//! | completed | 204 | forgets the job |
//! | failed | 503, `Retry-After: 5` | sends it again |
//! | panicked | 500 | sends it again, and dead-letters it in the end |
//! | passed its time limit | 504 | sends it again |
//! | cancelled | 503 | sends it again |

use std::{convert::Infallible, env, fmt, future::ready, time::Duration};

use axum::{
    Router,
    body::{Body, to_bytes},
    error_handling::HandleErrorLayer,
    extract::Request,
    http::{StatusCode, header::RETRY_AFTER},
    response::{IntoResponse, Response},
};
use tokio::net::TcpListener;
use tower::{ServiceBuilder, service_fn};
use tower_sentinel::{Outcome, Report, SentinelError, SentinelLayer, sentinel::OnDrop};

/// Limit of a body, in bytes.
const LONGEST: usize = 64 * 1024;

/// Error of a job.
#[derive(Debug)]
pub struct Refused(String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "refused: {}", self.0)
    }
}

/// The job, which does what its body asks for.
async fn process(request: Request<Body>) -> Result<(), Refused> {
    let body = to_bytes(request.into_body(), LONGEST).await;
    let body = body.map_err(|error| Refused(error.to_string()))?;
    match &*body {
        b"fail" => Err(Refused("no such user".to_owned())),
        b"panic" => panic!("a poison message"),
        b"hang" => std::future::pending().await,
        _ => Ok(()),
    }
}

/// The tag. It is empty, since each request has its own response.
fn tag(_: &Request<Body>) {}

/// The policy, which turns the outcome into the response.
async fn answer(report: Report<(), (), Refused>) -> Result<Response, Infallible> {
    Ok(match report.outcome {
        Outcome::Completed(()) => StatusCode::NO_CONTENT.into_response(),
        Outcome::Failed(error) => (
            StatusCode::SERVICE_UNAVAILABLE,
            [(RETRY_AFTER, "5")],
            error.to_string(),
        )
            .into_response(),
        Outcome::Panicked(panic) => {
            (StatusCode::INTERNAL_SERVER_ERROR, panic.to_string()).into_response()
        }
        Outcome::TimedOut(timed_out) => {
            (StatusCode::GATEWAY_TIMEOUT, timed_out.to_string()).into_response()
        }
        Outcome::Cancelled(cancelled) => {
            (StatusCode::SERVICE_UNAVAILABLE, cancelled.to_string()).into_response()
        }
    })
}

/// Returns the application.
///
/// `on_drop` decides on the job of a client that disconnects, and `hear` is called with each outcome.
pub fn app(limit: Duration, on_drop: OnDrop, hear: fn(&Outcome<(), Refused>)) -> Router {
    let policy = service_fn(move |report: Report<(), (), Refused>| {
        hear(&report.outcome);
        answer(report)
    });
    let sentinel = SentinelLayer::with_tag(policy, tag as fn(&Request<Body>))
        .timeout(limit)
        .on_drop(on_drop);
    let jobs = ServiceBuilder::new()
        // Never called: the policy does not fail and the service is always ready. Router needs `Infallible`.
        .layer(HandleErrorLayer::new(
            |error: SentinelError<Refused, Infallible>| {
                ready((StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
            },
        ))
        .concurrency_limit(64)
        .layer(sentinel)
        .service_fn(process);
    Router::new().route_service("/jobs", jobs)
}

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let address = env::args().nth(1);
    let address = address.as_deref().unwrap_or("127.0.0.1:3000");
    let listener = TcpListener::bind(address).await?;
    println!("post jobs to http://{}/jobs", listener.local_addr()?);
    axum::serve(
        listener,
        app(Duration::from_secs(30), OnDrop::Abort, |_| {}),
    )
    .await
}
