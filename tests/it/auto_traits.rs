//! Auto traits of the public types. Most of them are checked by compiling.

use std::{
    cell::Cell,
    convert::Infallible,
    error::Error,
    fmt::Debug,
    future::{self, Ready},
    io,
    marker::PhantomData,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    thread,
    time::Duration,
};

use tokio::task::yield_now;
use tower::{BoxError, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_sentinel::{
    Consumer, DecodeLayer, IntensityLayer, Job, KeepAliveLayer, Outcome, Panic, Report,
    SentinelError, SentinelLayer, ServiceBuilderExt, SettlePolicy, TimeLimit,
    cancel::Cancellation,
    consumer::{
        ConnectFn, ConsumerError, Consuming, Probe, ProbeError, Stall, State, Summary, Watch,
    },
    decode::{Decode, DecodeError, DecodeFuture, Decoded, WithJob},
    intensity::{Intensity, IntensityFuture, IntensityState},
    keep_alive::{KeepAlive, KeepAliveFuture},
    outcome::{CancelReason, Cancelled, Failure, OutcomeKind, TimedOut},
    sentinel::{ByJob, CallerSpan, EventOnly, Hooks, OnDrop, ResponseFuture, Sentinel},
    settle::{
        SettleError, SettleFuture,
        decision::{AckOnSuccess, RejectUndecodable},
    },
};
use tracing::Span;

fn send<T: Send>() {}
fn sync<T: Sync>() {}
fn unpin<T: Unpin>() {}
fn is_static<T: 'static>() {}
fn clone<T: Clone>() {}
fn copy<T: Copy>() {}
fn debug<T: Debug>() {}
fn error<T: Error>() {}

/// Does not compile if `$type` has `$trait`: the `_` would be ambiguous.
macro_rules! assert_not {
    ($type:ty: $trait:path) => {{
        trait AmbiguousIf<A> {
            fn check() {}
        }
        impl<T: ?Sized> AmbiguousIf<()> for T {}
        impl<T: ?Sized + $trait> AmbiguousIf<u8> for T {}
        <$type as AmbiguousIf<_>>::check();
    }};
}

/// `Send`, and nothing else: as a response or an error of a service may be.
type SendOnly = Cell<u8>;
/// No trait at all, to show that a bound does not leak.
struct Nothing(PhantomData<Rc<()>>);

/// A service for jobs or policies that is not `Sync`, since tower does not require it.
#[derive(Clone, Debug)]
struct Plain<E>(PhantomData<(SendOnly, fn() -> E)>);

impl<R, E> Service<R> for Plain<E> {
    type Response = SendOnly;
    type Error = E;
    type Future = Ready<Result<SendOnly, E>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), E>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: R) -> Self::Future {
        future::ready(Ok(Cell::new(7)))
    }
}

type PlainSentinel = Sentinel<Plain<&'static str>, Plain<Infallible>>;
type PlainFuture = <PlainSentinel as Service<Arc<u64>>>::Future;

#[test]
fn what_is_moved_between_tasks_is_send() {
    send::<Outcome<SendOnly, SendOnly>>();
    send::<Report<SendOnly, SendOnly, SendOnly>>();
    send::<SentinelError<SendOnly, SendOnly>>();
    send::<Failure<SendOnly>>();
    send::<ConsumerError<SendOnly, SendOnly, SendOnly>>();
    send::<Consuming<SendOnly, SendOnly>>();
    send::<Consumer<SendOnly, SendOnly>>();
    send::<SentinelLayer<SendOnly>>();
    send::<PlainSentinel>();
    send::<PlainFuture>();
    is_static::<PlainFuture>();
    send::<Panic>();
    send::<TimedOut>();
    send::<Cancelled>();
    send::<Cancellation>();
    send::<Intensity<SendOnly>>();
    send::<IntensityFuture<SendOnly>>();
    is_static::<IntensityFuture<SendOnly>>();
    send::<SettlePolicy<SendOnly>>();
    send::<SettleFuture<SendOnly, SendOnly, SendOnly>>();
    send::<SettleError<SendOnly>>();
}

#[test]
fn what_may_be_shared_is_sync() {
    sync::<Outcome<u8, io::Error>>();
    sync::<Outcome<u8, BoxError>>();
    sync::<Report<u8, u8, io::Error>>();
    sync::<SentinelError<io::Error, BoxError>>();
    sync::<Failure<io::Error>>();
    sync::<ConsumerError<io::Error, BoxError>>();
    sync::<Summary>();
    sync::<Watch>();
    sync::<State>();
    sync::<Probe>();
    sync::<Stall>();
    sync::<ProbeError>();
    error::<ProbeError>();
    sync::<ConnectFn<u8>>();
    unpin::<Consuming<io::Error, io::Error>>();
    error::<ConsumerError<io::Error, BoxError, io::Error>>();
    sync::<SentinelLayer<u8>>();
    sync::<Sentinel<u8, u8>>();
    sync::<IntensityLayer>();
    sync::<Intensity<u8>>();
    sync::<IntensityFuture<u8>>();
    sync::<SettlePolicy>();
    sync::<SettleFuture<u8, u8, io::Error>>();
    sync::<SettleError<io::Error>>();
    sync::<Panic>();
    sync::<TimedOut>();
    sync::<Cancelled>();
    sync::<Cancellation>();
    // And not more than that: the assertions above are not vacuous.
    assert_not!(Outcome<SendOnly, u8>: Sync);
    assert_not!(Outcome<u8, SendOnly>: Sync);
    assert_not!(Outcome<Rc<u8>, u8>: Send);
    assert_not!(Sentinel<SendOnly, u8>: Sync);
}

#[test]
fn an_outcome_is_shared_between_threads_though_its_panic_carries_what_is_not_sync() {
    let outcome: Arc<Outcome<u8, io::Error>> =
        Arc::new(Outcome::Panicked(Panic::new(Cell::new(7_u8))));
    let threads = [(); 2].map(|()| {
        let outcome = Arc::clone(&outcome);
        thread::spawn(move || format!("{outcome:?}"))
    });
    for thread in threads {
        assert_eq!(thread.join().unwrap(), r#"Panicked(Panic("Box<dyn Any>"))"#);
    }
    let Some(Outcome::Panicked(panic)) = Arc::into_inner(outcome) else {
        panic!("the threads have ended");
    };
    assert_eq!(
        panic.into_payload().downcast::<Cell<u8>>().unwrap().get(),
        7
    );
}

#[test]
fn the_public_types_are_debug_and_clone_without_bounds_that_leak() {
    debug::<Outcome<u8, u8>>();
    debug::<Report<u8, u8, u8>>();
    debug::<SentinelError<u8, u8>>();
    debug::<Failure<u8>>();
    debug::<Panic>();
    debug::<TimedOut>();
    debug::<Cancelled>();
    debug::<Cancellation>();
    // The hooks are functions, which are not `Debug`, and a future's content is private.
    debug::<SentinelLayer<u8, Nothing>>();
    debug::<Sentinel<u8, u8, Nothing>>();
    debug::<ResponseFuture<Nothing, Nothing, Nothing, Nothing, Nothing>>();

    debug::<IntensityLayer>();
    debug::<Intensity<u8>>();
    debug::<IntensityFuture<Nothing>>();

    clone::<Watch>();
    debug::<Watch>();
    clone::<IntensityLayer>();
    clone::<Intensity<u8>>();
    assert_not!(Intensity<Nothing>: Clone);
    copy::<IntensityState>();
    clone::<Cancellation>();
    clone::<SentinelLayer<u8, u8>>();
    clone::<SentinelLayer<Plain<u8>>>();
    // A sentinel is cloned for every connection or worker: its hooks stay where they are.
    clone::<Sentinel<u8, u8, Nothing>>();
    assert_not!(Sentinel<Nothing, u8>: Clone);
    assert_not!(Sentinel<u8, Nothing>: Clone);
    // One outcome is settled once.
    assert_not!(Outcome<u8, u8>: Clone);
    assert_not!(Report<u8, u8, u8>: Clone);

    copy::<OutcomeKind>();
    copy::<CancelReason>();
    copy::<OnDrop>();
    copy::<TimeLimit>();
    copy::<Hooks<ByJob, CallerSpan, EventOnly>>();
}

#[test]
fn the_errors_are_errors() {
    error::<Panic>();
    error::<TimedOut>();
    error::<Cancelled>();
    error::<Failure<&'static str>>();
    error::<Failure<BoxError>>();
    error::<SentinelError<&'static str, Infallible>>();
    error::<SentinelError<BoxError, BoxError>>();
    assert_not!(SentinelError<Nothing, u8>: Error);
}

#[test]
fn nothing_that_a_user_holds_is_pinned() {
    unpin::<SentinelLayer<u8>>();
    unpin::<Sentinel<u8, u8>>();
    unpin::<Intensity<u8>>();
    unpin::<SentinelError<u8, u8>>();
    unpin::<Outcome<u8, u8>>();
}

struct Delivery(u64);

impl Job for Delivery {
    type Tag = u64;

    fn tag(&self) -> u64 {
        self.0
    }
}

async fn answer<S, J>(mut service: S, job: J) -> S::Response
where
    S: Service<J, Error: Debug>,
{
    service.ready().await.unwrap().call(job).await.unwrap()
}

#[tokio::test]
async fn the_builder_takes_a_layer_of_every_make() {
    let policy = service_fn(|report: Report<u64, u64, Infallible>| async move {
        Ok::<_, Infallible>((report.tag, report.outcome.into_result().unwrap()))
    });
    let process = |job: Delivery| async move { Ok::<_, Infallible>(job.0 * 2) };

    let layer = SentinelLayer::new(policy).timeout(Duration::from_secs(1));
    let layered = ServiceBuilder::new().sentinel(layer).service_fn(process);
    assert_eq!(answer(layered, Delivery(7)).await, (7, 14));

    let seen = Arc::new(AtomicU64::new(0));
    let spanned = Arc::clone(&seen);
    let layer = SentinelLayer::new(policy)
        .make_span(move |tag: &u64| {
            spanned.store(*tag, Ordering::SeqCst);
            Span::none()
        })
        .on_unsettled(|_: SentinelError<Infallible, Infallible>| {});
    let hooked = ServiceBuilder::new().sentinel(layer).service_fn(process);
    assert_eq!(answer(hooked, Delivery(7)).await, (7, 14));
    assert_eq!(seen.load(Ordering::SeqCst), 7);

    // A type of somebody else's; here a tuple, and a tag that depends on more than the job.
    let first = 4;
    let tagged = ServiceBuilder::new()
        .concurrency_limit(1)
        .sentinel(SentinelLayer::with_tag(policy, move |job: &(u64, u64)| {
            first + job.0
        }))
        .service_fn(|job: (u64, u64)| async move { Ok::<_, Infallible>(job.1) });
    assert_eq!(answer(tagged, (3, 9)).await, (7, 9));
}

#[tokio::test]
async fn a_response_future_is_held_across_an_await_in_a_spawned_task() {
    // With a bound on the struct that has a lifetime in it, rustc says of such a task that the
    // "implementation of `Send` is not general enough" (rust-lang/rust#64552).
    let service = Plain::<&'static str>(PhantomData);
    let policy = Plain::<&'static str>(PhantomData);
    let mut sentinel = ServiceBuilder::new()
        .sentinel(SentinelLayer::new(policy))
        .service(service);
    let task = tokio::spawn(async move {
        ServiceExt::<Arc<u64>>::ready(&mut sentinel).await.unwrap();
        let response = sentinel.call(Arc::new(7_u64));
        yield_now().await;
        let answer = response.await.unwrap();
        yield_now().await;
        answer
    });
    assert_eq!(task.await.unwrap().get(), 7);
}

#[test]
fn the_layers_inside_ask_for_no_more_than_they_need() {
    send::<KeepAliveLayer>();
    sync::<KeepAliveLayer>();
    unpin::<KeepAliveLayer>();
    clone::<KeepAliveLayer>();
    debug::<KeepAliveLayer>();
    send::<KeepAlive<SendOnly>>();
    clone::<KeepAlive<Plain<u8>>>();
    debug::<KeepAlive<SendOnly>>();
    send::<KeepAliveFuture<SendOnly>>();
    unpin::<KeepAliveFuture<SendOnly>>();
    debug::<KeepAliveFuture<Nothing>>();

    send::<DecodeLayer<SendOnly, WithJob>>();
    sync::<DecodeLayer<fn(), Nothing>>();
    clone::<DecodeLayer<fn(), Nothing>>();
    debug::<DecodeLayer<Nothing, Nothing>>();
    send::<Decode<SendOnly, SendOnly, Nothing>>();
    clone::<Decode<Plain<u8>, fn(), Nothing>>();
    debug::<Decode<SendOnly, Nothing, Nothing>>();
    send::<DecodeFuture<SendOnly, SendOnly>>();
    unpin::<DecodeFuture<SendOnly, SendOnly>>();
    debug::<DecodeFuture<Nothing, Nothing>>();
    send::<Decoded<SendOnly, SendOnly>>();
    send::<DecodeError<SendOnly, SendOnly>>();
    error::<DecodeError<BoxError, BoxError>>();
    copy::<RejectUndecodable<AckOnSuccess>>();
    debug::<RejectUndecodable<AckOnSuccess>>();
}
