//! A worker pauses while most of its jobs fail, and wastes few deliveries.

mod bound;
mod calm;
mod failures;
mod pauses;
mod probes;
mod waking;
mod wasted;

use std::{
    fmt,
    future::pending,
    panic::catch_unwind,
    pin::pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{future::BoxFuture, poll};
use tokio::{
    task::JoinHandle,
    time::{sleep, timeout},
};
use tower::{Service, ServiceExt};
use tower_layer::Layer;
use tower_sentinel::{
    IntensityLayer, SentinelLayer,
    cancel::Cancellation,
    intensity::{Intensity, IntensityState},
    outcome::{CancelReason, OutcomeKind},
};

use crate::support::{Blocked, Bomb, Count, Recorder, Refused, Unit, call, raise};

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A layer that pauses after two failures in a row, for 100 ms, 200 ms, 400 ms, and so on.
fn strict() -> IntensityLayer {
    IntensityLayer::new()
        .window(2)
        .threshold(1.0)
        .minimum_sample(2)
        .pause(ms(100)..=ms(30_000))
}

// === jobs ===

/// Behaviour of the next jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Ok,
    Error,
    PanicInCall,
    PanicInFuture,
    Hang,
    /// Hangs, and panics when it is dropped.
    HangWithBomb,
    /// Hangs until it is cancelled, and completes.
    OkWhenTold,
    ErrorWhenTold,
    PanicWhenTold,
    LosesItsLease,
    /// Asks for its cancellation, and panics before anybody could see that.
    CancelsThenPanics,
    /// Panics, and a guard asks for its cancellation as that unwinds.
    CancelsInUnwinding,
    /// As the one before, in `call`.
    CancelsInUnwindingOfCall,
    /// Catches a panic whose guard requests its cancellation, and panics when it is cancelled.
    CatchesThenPanics,
    /// Catches such a panic, and panics when it is dropped.
    CatchesThenHangsWithBomb,
    Blocks,
}

/// A service whose jobs have the fate that was set last.
#[derive(Clone, Debug)]
struct Worker {
    fate: Arc<Mutex<Fate>>,
    calls: Count,
    thread: Arc<Blocked>,
}

impl Worker {
    fn new(fate: Fate) -> Self {
        Self {
            fate: Arc::new(Mutex::new(fate)),
            calls: Count::default(),
            thread: Blocked::until_released(),
        }
    }

    fn set(&self, fate: Fate) {
        *self.fate.lock().unwrap() = fate;
    }
}

struct CancelOnDrop;

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        Cancellation::current().cancel(CancelReason::Requested);
    }
}

impl Service<Unit> for Worker {
    type Response = ();
    type Error = Refused;
    type Future = BoxFuture<'static, Result<(), Refused>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Unit) -> Self::Future {
        self.calls.add();
        let fate = *self.fate.lock().unwrap();
        if fate == Fate::PanicInCall {
            raise("in call");
        }
        if fate == Fate::CancelsInUnwindingOfCall {
            let _guard = CancelOnDrop;
            raise("before its request")
        }
        let thread = Arc::clone(&self.thread);
        Box::pin(async move {
            match fate {
                Fate::Ok => Ok(()),
                Fate::Error => Err(Refused),
                Fate::PanicInCall | Fate::CancelsInUnwindingOfCall => unreachable!(),
                Fate::PanicInFuture => raise("in the future"),
                Fate::Hang => pending().await,
                Fate::HangWithBomb => {
                    let _bomb = Bomb;
                    pending().await
                }
                Fate::OkWhenTold | Fate::ErrorWhenTold | Fate::PanicWhenTold => {
                    tower_sentinel::cancelled().await;
                    match fate {
                        Fate::OkWhenTold => Ok(()),
                        Fate::ErrorWhenTold => Err(Refused),
                        _ => raise("on the way down"),
                    }
                }
                Fate::LosesItsLease => {
                    Cancellation::current().cancel(CancelReason::LeaseLost);
                    pending().await
                }
                Fate::CancelsThenPanics => {
                    Cancellation::current().cancel(CancelReason::Requested);
                    raise("after its request")
                }
                Fate::CancelsInUnwinding => {
                    let _guard = CancelOnDrop;
                    raise("before its request")
                }
                Fate::CatchesThenPanics | Fate::CatchesThenHangsWithBomb => {
                    let caught = catch_unwind(|| {
                        let _guard = CancelOnDrop;
                        raise("and is caught")
                    });
                    assert!(caught.is_err());
                    if fate == Fate::CatchesThenHangsWithBomb {
                        let _bomb = Bomb;
                        pending::<()>().await;
                    }
                    tower_sentinel::cancelled().await;
                    raise("in its grace")
                }
                Fate::Blocks => {
                    thread.block();
                    pending().await
                }
            }
        })
    }
}

/// Returns whether `service` is ready now; the ready instance stays so.
async fn is_ready<S: Service<Unit, Error: fmt::Debug>>(service: &mut S) -> bool {
    matches!(poll!(pin!(service.ready())), Poll::Ready(Ok(_)))
}

fn paused(state: IntensityState) -> Option<Duration> {
    match state {
        IntensityState::Paused { pause, .. } => Some(pause),
        _ => None,
    }
}

/// Lets `service` pause, by jobs that fail.
async fn let_it_pause(service: &mut Intensity<Worker>) {
    let fate = *service.get_ref().fate.lock().unwrap();
    service.get_ref().set(Fate::Error);
    while is_ready(service).await {
        let _refused = service.call(Unit::default()).await;
    }
    service.get_ref().set(fate);
}

// === pauses and probes ===

/// A task that waits until a service is ready.
struct Waiting<S>(JoinHandle<S>);

fn waits<S>(mut service: S) -> Waiting<S>
where
    S: Service<Unit, Error: fmt::Debug> + Send + 'static,
{
    Waiting(tokio::spawn(async move {
        service.ready().await.unwrap();
        service
    }))
}

impl<S> Waiting<S> {
    async fn is_finished_soon(&mut self) -> bool {
        // Far less than any pause, so that it is no timer that wakes it.
        sleep(ms(1)).await;
        self.0.is_finished()
    }

    async fn finish(self) -> S {
        timeout(ms(1), self.0).await.unwrap().unwrap()
    }
}

/// Runs one probe in a sentinel, and returns the state afterwards.
async fn probe(fate: Fate, limit: Duration) -> (IntensityState, OutcomeKind) {
    let worker = Worker::new(Fate::Error);
    let layer = strict();
    let recorder = Recorder::default();
    let mut service = SentinelLayer::new(recorder.policy())
        .timeout(limit)
        .layer(layer.layer(worker.clone()));
    for _ in 0..2 {
        call(&mut service, Unit::default()).await.unwrap();
    }
    worker.set(fate);
    let report = call(&mut service, Unit::default()).await.unwrap();
    (*layer.watch().borrow(), report.outcome.kind())
}
