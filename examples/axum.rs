//! A push endpoint, as Pub/Sub, CloudEvents and webhooks use it: the HTTP status is the
//! acknowledgement.
//!
//! ```sh
//! cargo run --example axum -- 127.0.0.1:3000
//! curl -i -X POST -d 'a job' http://127.0.0.1:3000/jobs
//! ```
//!
//! | what became of the job | status | so that the sender |
//! | --- | --- | --- |
//! | it completed | 204 | forgets it |
//! | it failed | 503, `Retry-After: 5` | sends it again |
//! | it panicked | 500 | sends it again, and dead-letters it in the end |
//! | it passed its time limit | 504 | sends it again |
//! | it was cancelled | 503 | sends it again |

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

/// The longest body that is taken, in bytes.
const LONGEST: usize = 64 * 1024;

/// Why a job failed.
#[derive(Debug)]
pub struct Refused(String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "refused: {}", self.0)
    }
}

/// The job: what a body asks for, it does.
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

/// The tag: nothing needs to be told apart, since each request has a response of its own.
fn tag(_: &Request<Body>) {}

/// The policy: the answer to the broker is the response.
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

/// Returns the application. `on_drop` is what happens to the job of a client that disconnects, and
/// `hear` is told of each outcome.
pub fn app(limit: Duration, on_drop: OnDrop, hear: fn(&Outcome<(), Refused>)) -> Router {
    let policy = service_fn(move |report: Report<(), (), Refused>| {
        hear(&report.outcome);
        answer(report)
    });
    let sentinel = SentinelLayer::with_tag(policy, tag as fn(&Request<Body>))
        .timeout(limit)
        .on_drop(on_drop);
    let jobs = ServiceBuilder::new()
        // The policy does not fail and the service is ready, so this is for completeness.
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
