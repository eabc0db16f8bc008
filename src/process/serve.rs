//! [`serve`], the side of the child.

use std::{
    convert::Infallible,
    env, fmt,
    fs::File,
    future::{Ready, poll_fn, ready},
    io,
    os::{fd::AsFd, unix::net::UnixStream as StdUnixStream},
    panic::AssertUnwindSafe,
    process::abort,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, future::BoxFuture};
use rustix::process::{Signal, kill_current_process_group};
use tokio::{
    net::UnixStream,
    runtime::{Builder, Runtime},
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;
use tower_layer::Layer;
use tower_service::Service;
use tracing::subscriber::set_global_default;

use super::{
    attendant::{Attended, attendant},
    forward::Forward,
    frame::{Frame, Frames, frames},
    limits::Limits,
    request::Request,
    sender::Sender,
    worker::{EVENTS, SOCKET, number},
};
use crate::{
    outcome::{Outcome, Panic},
    policy::Report,
    sentinel::{SentinelError, SentinelLayer},
};

/// Serves jobs and ends the process, if it is a child of a [`ProcessPool`](crate::process::ProcessPool); otherwise
/// returns at once.
///
/// Call it first in `main`, before a runtime is made: a child does nothing else of `main`. `encode` makes the bytes of a
/// result, which the pool decodes.
///
/// In the child, [`cancelled()`](crate::cancelled) resolves when the job is told to stop in the parent, and
/// [`time_left`](crate::cancel::time_left) is that of the job. A panic of the handler is caught. Standard input is
/// empty; for standard output and standard error see [`ProcessPool::output`](crate::process::ProcessPool::output). If the
/// pool asks for [events](crate::process::ProcessPool::events), the subscriber that sends them becomes the global default.
/// The child ends when its parent does, also while a job blocks its threads. It holds itself to the limits of the pool,
/// such as [`cpu_time`](crate::process::ProcessPool::cpu_time).
///
/// # Panics
///
/// A panic in `encode` is one of the job.
pub fn serve<S, T, E, F>(service: S, encode: F)
where
    S: Service<Request, Response = T, Error = E> + Clone + Send + 'static,
    S::Future: Send + 'static,
    T: Send + 'static,
    E: fmt::Display + Send + 'static,
    F: Fn(Result<T, E>) -> Vec<u8> + Send + Sync + 'static,
{
    if !is_child() {
        return;
    }
    let encode = Arc::new(encode);
    let handle = move |time_left, request, stop| -> BoxFuture<'static, Answer> {
        let job = outcome(service.clone(), time_left, request, stop);
        let encode = Arc::clone(&encode);
        Box::pin(async move {
            match job.await {
                Ok(Outcome::Completed(value)) => Ok(encode(Ok(value))),
                Ok(Outcome::Failed(error)) => Ok(encode(Err(error))),
                Ok(Outcome::Panicked(panic)) => Err(panicked(&panic)),
                Ok(Outcome::TimedOut(_) | Outcome::Cancelled(_)) => {
                    Err(failed("the job was stopped"))
                }
                Err(unready) => Err(failed(&format!("the handler is not ready: {unready}"))),
            }
        })
    };
    if let Err(error) = run(Box::new(handle)) {
        #[expect(clippy::print_stderr, reason = "the child has no other way to tell")]
        {
            eprintln!("a child of a process pool ended: {error}");
        }
    }
    end();
}

/// The same with results in JSON, for a pool made by [`ProcessPool::json`](crate::process::ProcessPool::json).
///
/// A result that can't be written as JSON is a panic of the job.
#[cfg(feature = "json")]
pub fn serve_json<S, T, E>(service: S)
where
    S: Service<Request, Response = T, Error = E> + Clone + Send + 'static,
    S::Future: Send + 'static,
    T: serde::Serialize + Send + 'static,
    E: serde::Serialize + fmt::Display + Send + 'static,
{
    serve(service, |result| match serde_json::to_vec(&result) {
        Ok(bytes) => bytes,
        Err(error) => panic!("the result of a job can't be written as JSON: {error}"),
    });
}

/// Returns whether a pool has started this process. A process that a child starts has the variable, too, but not the
/// socket.
fn is_child() -> bool {
    let socket = env::var(SOCKET).ok().and_then(|number| number.parse().ok());
    socket.is_some() && socket == number(io::stdin().as_fd()).ok()
}

/// Ends this process and those that it has started, which the pool counts on.
fn end() -> ! {
    // The group is this process's own, or that of the program which has started it.
    kill_current_process_group(Signal::KILL).ok();
    // It has not come back.
    abort()
}

/// The encoded result of a job, or why there is none.
type Answer = Result<Vec<u8>, Panicked>;

struct Panicked {
    message: String,
    location: Option<String>,
}

/// Runs a job with the time that it has and a token that stops it, and returns the answer.
type Handle = Box<
    dyn FnMut(Option<Duration>, Request, CancellationToken) -> BoxFuture<'static, Answer> + Send,
>;

fn run(handle: Handle) -> io::Result<()> {
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    let socket = StdUnixStream::from(socket);
    socket.set_nonblocking(true)?;
    let sender = Arc::new(Sender::new(socket.try_clone()?));
    let (limits, runtime) = match start() {
        Ok(started) => started,
        Err(error) => {
            sender.send(&Frame::Panic {
                job: 0,
                message: error.to_string(),
                location: None,
            })?;
            return Err(error);
        }
    };
    if let Some(level) = env::var(EVENTS).ok().and_then(|level| level.parse().ok()) {
        let sender = Arc::clone(&sender);
        // A subscriber that the program has installed stays.
        set_global_default(Forward { level, sender }).ok();
    }
    let (attendant, attended) = attendant(socket.try_clone()?);
    // On a worker of the runtime, so that a job needs no other thread.
    runtime.spawn(async move {
        let result = match UnixStream::from_std(socket) {
            Ok(socket) => jobs(frames(socket), &sender, handle, limits, &attended).await,
            Err(error) => Err(error),
        };
        attended.end(result);
    });
    let result = attendant.attend(runtime.handle());
    // Its destructor would wait for what the jobs have left behind.
    runtime.shutdown_background();
    result
}

/// Sets the limits, and starts the threads on which jobs run.
fn start() -> io::Result<(Limits, Runtime)> {
    let limits = Limits::from_env()?;
    limits.set()?;
    let runtime = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    Ok((limits, runtime))
}

async fn jobs(
    mut frames: Frames,
    sender: &Sender,
    mut handle: Handle,
    limits: Limits,
    attended: &Attended,
) -> io::Result<()> {
    let mut terminations = signal(SignalKind::terminate())?;
    sender.send(&Frame::Ready)?;
    let mut job = 0;
    // One that came while another one ran: the pool has an answer to that already, which was not ours.
    let mut next = None;
    loop {
        let frame = match next.take() {
            Some(frame) => Some(frame),
            None => receive(&mut frames).await,
        };
        let (time_left, request) = match frame {
            Some(Frame::Job {
                time_left,
                head,
                bytes,
            }) => (time_left, Request::new(head, bytes)),
            // It came too late for its job.
            Some(Frame::Cancel) => continue,
            Some(_) | None => return Ok(()),
        };
        job += 1;
        limits.begin_job()?;
        let stop = CancellationToken::new();
        attended.begin();
        // Foreign code encodes the result.
        let running = AssertUnwindSafe(handle(time_left, request, stop.clone()));
        let mut running = running.catch_unwind();
        let answer = loop {
            tokio::select! {
                answer = &mut running => {
                    break answer.unwrap_or_else(|payload| Err(panicked(&Panic::from_payload(payload))));
                }
                frame = receive(&mut frames), if next.is_none() => match frame {
                    Some(Frame::Cancel) => stop.cancel(),
                    Some(frame @ Frame::Job { .. }) => next = Some(frame),
                    // The parent is gone. The job may block its thread, so it is not waited for.
                    Some(_) | None => end(),
                },
                _ = terminations.recv() => stop.cancel(),
            }
        };
        attended.finish();
        sender.send(&match answer {
            Ok(bytes) => Frame::Answer {
                job,
                bytes: bytes.into(),
            },
            Err(Panicked { message, location }) => Frame::Panic {
                job,
                message,
                location,
            },
        })?;
    }
}

/// Returns the next frame; `None` at the end of the parent, or for something else.
async fn receive(frames: &mut Frames) -> Option<Frame> {
    let bytes = frames.next().await?.ok()?;
    Frame::decode(bytes.freeze())
}

/// Runs a job under a sentinel of its own, which catches its panics, and tells it to stop. It is never aborted: the
/// pool kills the process instead.
async fn outcome<S>(
    service: S,
    time_left: Option<Duration>,
    request: Request,
    stop: CancellationToken,
) -> Result<Outcome<S::Response, S::Error>, S::Error>
where
    S: Service<Request> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Response: Send + 'static,
    S::Error: Send + 'static,
{
    let layer = SentinelLayer::with_tag(IntoOutcome, |_: &Request| ())
        .grace(Duration::MAX)
        .shutdown(stop);
    let layer = match time_left {
        Some(limit) => layer.timeout(limit),
        None => layer.no_timeout(),
    };
    let mut sentinel = layer.layer(service);
    match poll_fn(|cx| sentinel.poll_ready(cx)).await {
        Ok(()) => {}
        Err(SentinelError::Unready(error)) => return Err(error),
        Err(error) => panic!("{}", error.brief()),
    }
    match sentinel.call(request).await {
        Ok(outcome) => Ok(outcome),
        // The policy does not fail.
        Err(error) => panic!("{}", error.brief()),
    }
}

/// Policy that returns the outcome.
#[derive(Clone, Copy)]
struct IntoOutcome;

impl<T, E> Service<Report<(), T, E>> for IntoOutcome {
    type Response = Outcome<T, E>;
    type Error = Infallible;
    type Future = Ready<Result<Outcome<T, E>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, report: Report<(), T, E>) -> Self::Future {
        ready(Ok(report.outcome))
    }
}

fn panicked(panic: &Panic) -> Panicked {
    Panicked {
        message: panic.message().to_owned(),
        location: panic.location().map(ToString::to_string),
    }
}

fn failed(message: &str) -> Panicked {
    Panicked {
        message: message.to_owned(),
        location: None,
    }
}
