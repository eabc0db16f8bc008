//! A consumer ends in order, with each cause and with each kind of running job.

mod call_errors;
mod drain;
mod every_end;
mod panics;
mod pulling;

use std::{
    convert::Infallible,
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{future::BoxFuture, task::AtomicWaker};
use tokio::task::yield_now;
use tokio_util::sync::CancellationToken;
use tower::{BoxError, Service};
use tower_sentinel::{
    Consumer, SentinelError,
    consumer::{ConsumerError, Escalation, Summary},
};

use super::{CallError, ends, here, stack};
use crate::support::{
    Bomb, Fate, Refused, raise,
    subscription::{Channel, Delivery},
};

type Ended = Result<Summary, ConsumerError<Refused, CallError>>;
const MS: fn(u64) -> Duration = Duration::from_millis;

/// Becomes unready with an error when it is set to.
#[derive(Clone, Debug, Default)]
struct Switch(Arc<(AtomicBool, AtomicWaker)>);

impl Switch {
    fn fail(&self) {
        self.0.0.store(true, Ordering::SeqCst);
        self.0.1.wake();
    }

    fn around<S>(&self, service: S) -> Switched<S> {
        let switch = self.clone();
        Switched { switch, service }
    }
}

struct Switched<S> {
    switch: Switch,
    service: S,
}

impl<S: Service<Delivery, Error = CallError>> Service<Delivery> for Switched<S> {
    type Response = S::Response;
    type Error = CallError;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), CallError>> {
        let (failed, waker) = &*self.switch.0;
        waker.register(cx.waker());
        match failed.load(Ordering::SeqCst) {
            true => Poll::Ready(Err(SentinelError::Unready(Refused))),
            false => self.service.poll_ready(cx),
        }
    }

    fn call(&mut self, job: Delivery) -> Self::Future {
        self.service.call(job)
    }
}

// === pulling ===

struct Never;

impl Service<Delivery> for Never {
    type Response = ();
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<(), Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Pending
    }

    fn call(&mut self, _: Delivery) -> Self::Future {
        unreachable!()
    }
}

// === errors of calls ===

async fn consume(channel: &Channel) -> Ended {
    let shutdown = CancellationToken::new();
    let service = stack(2, shutdown.clone(), here());
    ends(Consumer::new(channel.subscribe(), service).shutdown(shutdown)).await
}

/// A service without a sentinel, whose jobs fail as their fate says.
async fn plain(delivery: Delivery) -> Result<(), BoxError> {
    match delivery.fate {
        Fate::Value => Ok(()),
        Fate::PanicLater => {
            yield_now().await;
            raise("in a response future")
        }
        Fate::PanicInDrop => {
            let _bomb = Bomb;
            pending().await
        }
        Fate::Hang => pending().await,
        _ => Err(Refused.into()),
    }
}

fn call_alone(_: &BoxError) -> Escalation {
    Escalation::Call
}

// === panics ===

struct Panics {
    in_readiness: bool,
    in_call: bool,
}

impl Service<Delivery> for Panics {
    type Response = ();
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<(), BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        if self.in_readiness {
            raise("in readiness");
        }
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, delivery: Delivery) -> Self::Future {
        if self.in_call {
            raise("in call");
        }
        Box::pin(plain(delivery))
    }
}
