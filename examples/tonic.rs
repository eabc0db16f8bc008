//! A gRPC service with supervised calls: each outcome has its status code.
//!
//! ```sh
//! cargo run --example tonic -- 127.0.0.1:50051
//! ```
//!
//! | outcome of the call | status |
//! | --- | --- |
//! | completed | `OK` |
//! | failed | the status that the call returned |
//! | panicked | `INTERNAL` |
//! | passed its time limit, or the client's `grpc-timeout` if that is shorter | `DEADLINE_EXCEEDED` |
//! | cancelled | `UNAVAILABLE` |
//!
//! The messages and the service are written by hand, so that no `protoc` is needed. `tonic-prost-build` would
//! generate them from this:
//!
//! ```proto
//! package jobs.v1;
//! service Jobs { rpc Run(RunRequest) returns (RunReply); }
//! message RunRequest { string name = 1; }
//! message RunReply { string result = 1; }
//! ```

use std::{
    convert::Infallible,
    env,
    future::{pending, ready},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use tokio::net::TcpListener;
use tonic::{
    Request, Response, Status,
    body::Body,
    metadata::MetadataMap,
    server::{Grpc, NamedService},
    service::Routes,
};
use tonic_prost::ProstCodec;
use tower::{BoxError, Service, ServiceBuilder, ServiceExt, service_fn, util::BoxCloneSyncService};
use tower_sentinel::{Job, Outcome, Report, SentinelLayer, TimeLimit, sentinel::OnDrop};

/// Request of one job.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RunRequest {
    /// The name of the job.
    #[prost(string, tag = "1")]
    pub name: String,
}

/// Result of a job.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RunReply {
    /// The result, for a person to read.
    #[prost(string, tag = "1")]
    pub result: String,
}

/// A call, whose time limit is at most the time that the client waits.
pub struct Call {
    request: Request<RunRequest>,
    limit: Duration,
}

impl Job for Call {
    type Tag = ();

    fn tag(&self) {}

    fn time_limit(&self) -> TimeLimit {
        let limit = grpc_timeout(self.request.metadata()).unwrap_or(Duration::MAX);
        TimeLimit::After(limit.min(self.limit))
    }
}

/// Reads the header `grpc-timeout`: up to eight digits and a unit.
fn grpc_timeout(metadata: &MetadataMap) -> Option<Duration> {
    let header = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = header.split_at_checked(header.len().checked_sub(1)?)?;
    let number = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 60 * 60),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

async fn run(call: Call) -> Result<Response<RunReply>, Status> {
    let name = call.request.into_inner().name;
    match &*name {
        "fail" => Err(Status::not_found("no such job")),
        "panic" => panic!("a poison message"),
        "hang" => pending().await,
        _ => Ok(Response::new(RunReply {
            result: format!("{name} is done"),
        })),
    }
}

type Answer = Result<Response<RunReply>, Status>;

/// The policy, which turns the outcome into the response or the status.
fn answer(outcome: Outcome<Response<RunReply>, Status>) -> Answer {
    match outcome {
        Outcome::Completed(reply) => Ok(reply),
        Outcome::Failed(status) => Err(status),
        Outcome::Panicked(panic) => Err(Status::internal(panic.to_string())),
        Outcome::TimedOut(timed_out) => Err(Status::deadline_exceeded(timed_out.to_string())),
        Outcome::Cancelled(cancelled) => Err(Status::unavailable(cancelled.to_string())),
    }
}

/// The service `jobs.v1.Jobs`.
#[derive(Clone)]
pub struct Jobs {
    limit: Duration,
    run: BoxCloneSyncService<Call, Answer, BoxError>,
}

impl Jobs {
    /// Returns the service; `hear` is called with each outcome, before the client gets its response.
    pub fn new(
        limit: Duration,
        on_drop: OnDrop,
        hear: fn(&Outcome<Response<RunReply>, Status>),
    ) -> Self {
        let policy = service_fn(move |report: Report<(), _, _>| {
            hear(&report.outcome);
            ready(Ok::<_, Infallible>(answer(report.outcome)))
        });
        let run = ServiceBuilder::new()
            .boxed_clone_sync()
            .map_err(BoxError::from)
            .concurrency_limit(64)
            .layer(SentinelLayer::new(policy).on_drop(on_drop))
            .service_fn(run);
        Self { limit, run }
    }
}

impl NamedService for Jobs {
    const NAME: &'static str = "jobs.v1.Jobs";
}

impl Service<http::Request<Body>> for Jobs {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<http::Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if request.uri().path() != "/jobs.v1.Jobs/Run" {
            return ready(Ok(Status::unimplemented("no such method").into_http())).boxed();
        }
        let Self { limit, run } = self.clone();
        let unary = service_fn(move |request: Request<RunRequest>| {
            let answer = run.clone().oneshot(Call { request, limit });
            async move {
                match answer.await {
                    Ok(answer) => answer,
                    Err(error) => Err(Status::internal(error.to_string())),
                }
            }
        });
        async move {
            let codec = ProstCodec::<RunReply, RunRequest>::default();
            Ok(Grpc::new(codec).unary(unary, request).await)
        }
        .boxed()
    }
}

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let address = env::args().nth(1);
    let address = address.as_deref().unwrap_or("127.0.0.1:50051");
    let listener = TcpListener::bind(address).await?;
    println!("call jobs.v1.Jobs/Run at {}", listener.local_addr()?);
    let jobs = Jobs::new(Duration::from_secs(30), OnDrop::Abort, |_| {});
    // Not `tonic::transport::Server`: it has its own timer for `grpc-timeout`, which drops the call. Here
    // only the sentinel has a timer.
    axum::serve(listener, Routes::new(jobs).into_axum_router()).await
}
