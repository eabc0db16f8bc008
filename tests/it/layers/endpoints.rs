//! A sentinel in axum and in tonic, through real listeners: the examples of those names.

use std::{net::SocketAddr, sync::Mutex, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tonic::{Code, Request, Status, client::Grpc, transport::Channel};
use tonic_prost::ProstCodec;
use tower_sentinel::{Outcome, outcome::OutcomeKind, sentinel::OnDrop};

use self::{
    axum_example::app,
    tonic_example::{Jobs, RunReply, RunRequest},
};
use crate::support::until;

#[allow(dead_code, unreachable_pub)]
#[path = "../../../examples/axum.rs"]
mod axum_example;
#[allow(dead_code, unreachable_pub)]
#[path = "../../../examples/tonic.rs"]
mod tonic_example;

const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(50);

/// Serves until the test's runtime ends.
async fn serve(app: axum::Router) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}

// === axum ===

async fn post(address: SocketAddr, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!(
        "POST /jobs HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

async fn response(address: SocketAddr, body: &str) -> String {
    let mut response = String::new();
    let mut stream = post(address, body).await;
    stream.read_to_string(&mut response).await.unwrap();
    response.to_lowercase()
}

#[tokio::test]
async fn an_http_status_is_the_answer_for_each_outcome() {
    let long = serve(app(LONG, OnDrop::Abort, |_| {})).await;
    let short = serve(app(SHORT, OnDrop::Abort, |_| {})).await;
    let table = [
        (long, "a job", "http/1.1 204 no content"),
        (long, "fail", "http/1.1 503 service unavailable"),
        (long, "panic", "http/1.1 500 internal server error"),
        (short, "hang", "http/1.1 504 gateway timeout"),
        // The service that panicked has left nothing behind.
        (long, "a job", "http/1.1 204 no content"),
    ];
    for (address, body, status) in table {
        let response = response(address, body).await;
        assert!(response.starts_with(status), "{body}: {response}");
        let retries = response.contains("retry-after: 5");
        assert_eq!(retries, body == "fail", "{body}: {response}");
    }
}

#[tokio::test]
async fn a_job_whose_http_client_disconnects_ends_as_on_drop_says() {
    static ABORTED: Mutex<Vec<OutcomeKind>> = Mutex::new(Vec::new());
    static DETACHED: Mutex<Vec<OutcomeKind>> = Mutex::new(Vec::new());
    let aborts = app(LONG, OnDrop::Abort, |it| {
        ABORTED.lock().unwrap().push(it.kind());
    });
    let detaches = app(SHORT, OnDrop::Detach, |it| {
        DETACHED.lock().unwrap().push(it.kind());
    });
    for (app, heard, kind) in [
        (aborts, &ABORTED, OutcomeKind::Cancelled),
        (detaches, &DETACHED, OutcomeKind::TimedOut),
    ] {
        let address = serve(app).await;
        let stream = post(address, "hang").await;
        // Long enough for the job to begin, and shorter than any limit.
        tokio::time::sleep(SHORT / 2).await;
        drop(stream);
        until(|| !heard.lock().unwrap().is_empty()).await;
        tokio::time::sleep(SHORT).await;
        assert_eq!(*heard.lock().unwrap(), [kind]);
    }
}

// === tonic ===

async fn run(address: SocketAddr, name: &str, timeout: Option<Duration>) -> Result<String, Status> {
    let channel = Channel::from_shared(format!("http://{address}")).unwrap();
    let mut client = Grpc::new(channel.connect().await.unwrap());
    client.ready().await.unwrap();
    let name = name.to_owned();
    let mut request = Request::new(RunRequest { name });
    if let Some(timeout) = timeout {
        request.set_timeout(timeout);
    }
    let path = "/jobs.v1.Jobs/Run".parse().unwrap();
    let codec = ProstCodec::<RunRequest, RunReply>::default();
    let reply = client.unary(request, path, codec).await?;
    Ok(reply.into_inner().result)
}

async fn serve_jobs(limit: Duration, on_drop: OnDrop, hear: Hear) -> SocketAddr {
    let jobs = Jobs::new(limit, on_drop, hear);
    serve(tonic::service::Routes::new(jobs).into_axum_router()).await
}

type Hear = fn(&Outcome<tonic::Response<RunReply>, Status>);

#[tokio::test]
async fn a_grpc_status_is_the_answer_for_each_outcome() {
    let long = serve_jobs(LONG, OnDrop::Abort, |_| {}).await;
    let short = serve_jobs(SHORT, OnDrop::Abort, |_| {}).await;
    let table = [
        (long, "a job", None),
        (long, "fail", Some(Code::NotFound)),
        (long, "panic", Some(Code::Internal)),
        (short, "hang", Some(Code::DeadlineExceeded)),
        (long, "a job", None),
    ];
    for (address, name, code) in table {
        let answer = run(address, name, None).await;
        let answer = answer.map_err(|status| status.code());
        let expected = code.map_or_else(|| Ok("a job is done".to_owned()), Err);
        assert_eq!(answer, expected, "{name}");
    }
}

#[tokio::test]
async fn the_header_grpc_timeout_lowers_the_limit_and_does_not_raise_it() {
    static LIMITS: Mutex<Vec<Duration>> = Mutex::new(Vec::new());
    let hear: Hear = |outcome| {
        // The client counts too, and may hang up at the same moment.
        if let Outcome::TimedOut(timed_out) = outcome {
            LIMITS.lock().unwrap().push(timed_out.limit());
        }
    };
    let long = serve_jobs(LONG, OnDrop::Detach, hear).await;
    let short = serve_jobs(SHORT, OnDrop::Detach, hear).await;
    run(long, "hang", Some(SHORT)).await.unwrap_err();
    until(|| LIMITS.lock().unwrap().len() == 1).await;
    run(short, "hang", Some(LONG)).await.unwrap_err();
    until(|| LIMITS.lock().unwrap().len() == 2).await;
    assert_eq!(*LIMITS.lock().unwrap(), [SHORT, SHORT]);
}
