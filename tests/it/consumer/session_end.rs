//! Ends of sessions: the time of each drop, the cause that each job gets, and the cost of a panic then.

use std::{
    convert::Infallible,
    error::Error,
    fmt,
    future::{pending, ready},
    pin::Pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures_util::{Stream, future::BoxFuture};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tower::{BoxError, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_sentinel::{
    Consumer,
    consumer::{AfterError, ConsumerError, EndCause, Escalation, Subscription, Summary},
};

use crate::{
    consumer::{
        ends,
        reconnecting::{Broker, Try},
    },
    support::{
        Bomb, Count, Fate, Refused,
        log::Log,
        raise,
        subscription::{Channel, Deliveries, Delivery, End},
    },
};

const MS: fn(u64) -> Duration = Duration::from_millis;

// === drops ===

/// Wrapper that panics in its destructor.
struct Explosive<T>(T, #[allow(dead_code)] Bomb);

impl<T> Explosive<T> {
    fn new(inner: T) -> Self {
        Self(inner, Bomb)
    }
}

impl<T> fmt::Debug for Explosive<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Explosive")
    }
}

impl<T> fmt::Display for Explosive<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("explosive")
    }
}

impl<S: Service<Delivery>> Service<Delivery> for Explosive<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, delivery: Delivery) -> S::Future {
        self.0.call(delivery)
    }
}

impl Stream for Explosive<Deliveries> {
    type Item = Result<Delivery, Refused>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.0).poll_next(cx)
    }
}

impl Subscription for Explosive<Deliveries> {
    type Job = Delivery;
    type Error = Refused;

    fn poll_closed(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        Pin::new(&mut self.0).poll_closed(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.0).poll_close(cx)
    }
}

#[tokio::test(start_paused = true)]
async fn destructors_that_panic_take_no_consumer_down() {
    for tasks in [1, 2] {
        let channel = Channel::of([Fate::Value, Fate::Error, Fate::Value, Fate::Error]);
        // The responses, the errors, the services and the subscription.
        let services = (0..tasks).map(|_| {
            Explosive::new(service_fn(|delivery: Delivery| {
                ready(match delivery.fate {
                    Fate::Value => Ok(Explosive::new(())),
                    _ => Err(Explosive::new(())),
                })
            }))
        });
        let consumer = Consumer::parallel(Explosive::new(channel.subscribe()), services)
            .escalation(|_: &Explosive<()>| Escalation::Call)
            .on_error(AfterError::Continue)
            .with_graceful_shutdown(sleep(MS(500)));
        let summary = ends(consumer).await.unwrap();
        assert_eq!((summary.called, summary.answered), (4, 2));
        assert_eq!((summary.failed, summary.unanswered), (2, 0));
        assert_eq!(channel.closed(), 1, "{tasks} tasks");
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_of_a_drain_that_panics_when_it_is_dropped_is_only_dropped() {
    let channel = Channel::of([Fate::Error; 3]);
    let service = service_fn(|_: Delivery| async {
        sleep(MS(1_000)).await;
        Err::<(), _>(Explosive::new(()))
    });
    let consumer = Consumer::new(channel.subscribe(), service)
        .escalation(|_: &Explosive<()>| Escalation::Channel)
        .with_graceful_shutdown(sleep(MS(500)));
    let summary = ends(consumer).await.unwrap();
    assert_eq!((summary.failed, summary.unanswered), (3, 3));
    assert_eq!(channel.closed(), 1);
}

#[tokio::test(start_paused = true)]
async fn calls_that_are_abandoned_are_dropped_before_the_channel_is_closed() {
    /// Whose destructor asks whether the channel is closed.
    struct Asks(Channel, Count);

    impl Drop for Asks {
        fn drop(&mut self) {
            if self.0.closed() == 0 {
                self.1.add();
            }
        }
    }

    for tasks in [1, 2] {
        let (channel, in_time) = (Channel::of([Fate::Hang; 3]), Count::default());
        let services = (0..tasks).map(|_| {
            let (channel, in_time) = (channel.clone(), in_time.clone());
            service_fn(move |_: Delivery| {
                let asks = Asks(channel.clone(), in_time.clone());
                async move {
                    let _asks = asks;
                    pending::<Result<(), Infallible>>().await
                }
            })
        });
        let consumer = Consumer::parallel(channel.subscribe(), services)
            .drain_timeout(MS(100))
            .with_graceful_shutdown(sleep(MS(500)));
        assert_eq!(ends(consumer).await.unwrap().abandoned, 3);
        assert_eq!((in_time.get(), channel.closed()), (3, 1), "{tasks} tasks");
    }
}

// === optional methods of a subscription ===

#[test]
fn a_subscription_stops_at_once_and_is_not_gone_by_default() {
    let channel = Channel::of([]);
    // It has only the required methods.
    let mut plain = std::mem::ManuallyDrop::new(Explosive::new(channel.subscribe()));
    let mut cx = Context::from_waker(Waker::noop());
    assert!(Pin::new(&mut *plain).poll_stop(&mut cx).is_ready());
    assert!(channel.stops().is_empty());
    channel.lose();
    assert!(!plain.is_gone());
}

// === causes ===

type Cause = EndCause<Refused, BoxError, Refused>;

/// End of a session by a service, or by its subscription.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    StreamEnds,
    StreamFails,
    StreamPanics,
    Unready,
    UnreadyPanics,
    Failed,
    Unanswered,
    Misconfigured,
    CallPanics,
}

const ALL: [By; 9] = [
    By::StreamEnds,
    By::StreamFails,
    By::StreamPanics,
    By::Unready,
    By::UnreadyPanics,
    By::Failed,
    By::Unanswered,
    By::Misconfigured,
    By::CallPanics,
];

struct Ends(By);

impl Service<Delivery> for Ends {
    type Response = ();
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<(), BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        match self.0 {
            By::Unready => Poll::Ready(Err(Refused.into())),
            By::UnreadyPanics => raise("in readiness"),
            _ => Poll::Ready(Ok(())),
        }
    }

    fn call(&mut self, _: Delivery) -> Self::Future {
        let by = self.0;
        Box::pin(async move {
            match by {
                By::CallPanics => raise("in a call"),
                _ => Err(Refused.into()),
            }
        })
    }
}

impl By {
    fn channel(self) -> Channel {
        let channel = Channel::of([Fate::Value]);
        match self {
            By::StreamEnds => channel.end(End::Ended),
            By::StreamFails => channel.end(End::Failed),
            By::StreamPanics => channel.end(End::Panics),
            _ => {}
        }
        channel
    }

    fn escalation(self) -> Escalation {
        match self {
            By::Unanswered => Escalation::Channel,
            By::Misconfigured => Escalation::Consumer,
            _ => Escalation::Call,
        }
    }

    fn is<C>(self, cause: &EndCause<Refused, BoxError, C>) -> bool {
        match cause {
            EndCause::StreamEnded => self == By::StreamEnds,
            EndCause::Stream(Refused) => self == By::StreamFails,
            EndCause::StreamPanicked(_) => self == By::StreamPanics,
            EndCause::Unready(_) => self == By::Unready,
            EndCause::UnreadyPanicked(_) => self == By::UnreadyPanics,
            EndCause::Failed(_) => self == By::Failed,
            EndCause::Unanswered(_) => self == By::Unanswered,
            EndCause::Misconfigured(_) => self == By::Misconfigured,
            EndCause::CallPanicked(_) => self == By::CallPanics,
            _ => false,
        }
    }
}

#[tokio::test(start_paused = true)]
async fn each_end_has_its_cause_also_where_it_reconnects() {
    for by in ALL {
        let plain = Consumer::new(by.channel().subscribe(), Ends(by))
            .escalation(move |_: &BoxError| by.escalation());
        let error = ends(plain).await.unwrap_err();
        assert!(by.is(error.cause()), "{by:?}: {error:?}");

        let broker = Broker::new([Try::Channel(by.channel())]);
        let reconnecting = Consumer::reconnecting(move || broker.connect(), move |_| Ends(by))
            .escalation(move |_: &BoxError| by.escalation())
            .max_attempts(1);
        let error: ConsumerError<_, _, Refused> = ends(reconnecting).await.unwrap_err();
        assert!(by.is(error.cause()), "{by:?}: {error:?}");
        let is_unanswered = matches!(by, By::Unanswered | By::Misconfigured | By::CallPanics);
        assert_eq!(error.cause().is_unanswered(), is_unanswered, "{by:?}");
        assert_eq!(
            error.cause().is_transient(),
            by != By::Misconfigured,
            "{by:?}"
        );

        // Its own error, or its panic, is its source.
        let source = error.source().map(ToString::to_string);
        let expected = match by {
            By::StreamEnds => None,
            // An error that is none by its type is printed.
            By::StreamFails => None,
            By::StreamPanics => Some("panicked: in the stream"),
            By::UnreadyPanics => Some("panicked: in readiness"),
            By::CallPanics => Some("panicked: in a call"),
            By::Unready | By::Failed | By::Unanswered | By::Misconfigured => Some("refused"),
        };
        assert_eq!(source.as_deref(), expected, "{by:?}");
        assert!(error.to_string().starts_with("the consumer ended: "));
    }
}

#[test]
fn each_cause_is_printed_as_what_it_is() {
    let causes: [(Cause, &str); 7] = [
        (EndCause::StreamEnded, "the stream ended"),
        (EndCause::Stream(Refused), "the stream failed: refused"),
        (
            EndCause::Unready(Refused.into()),
            "the service is not ready: refused",
        ),
        (
            EndCause::Unanswered(Refused.into()),
            "a job may be unsettled: refused",
        ),
        (EndCause::Connect(Refused), "can't connect: refused"),
        (EndCause::ConnectTimedOut(MS(5)), "no connection within 5ms"),
        (EndCause::RuntimeGone, "the runtime ended"),
    ];
    for (cause, text) in causes {
        assert_eq!(cause.to_string(), text);
    }
}

// === settings of a consumer that reconnects ===

#[tokio::test(start_paused = true)]
async fn a_consumer_that_reconnects_goes_on_after_errors_of_one_call_if_it_is_to() {
    let channel = Channel::of([Fate::Error, Fate::Error, Fate::Value]);
    let broker = Broker::new([Try::Channel(channel.clone())]);
    let connect = broker.clone();
    let make_service = |_: CancellationToken| {
        ServiceBuilder::new()
            .concurrency_limit(1)
            .service_fn(|delivery: Delivery| {
                ready(match delivery.fate {
                    Fate::Value => Ok(()),
                    _ => Err(Refused),
                })
            })
            .map_err(BoxError::from)
    };
    let consumer = Consumer::reconnecting(move || connect.connect(), make_service)
        .name("orders")
        .on_error(AfterError::Continue)
        .escalation(|_: &BoxError| Escalation::Call)
        .with_graceful_shutdown(sleep(MS(500)));
    let (log, _guard) = Log::start();
    let summary = ends(consumer).await.unwrap();
    assert_eq!((summary.answered, summary.failed), (1, 2));
    assert_eq!(broker.asked().len(), 1);
    // Each setting outlives the next.
    for line in log.lines() {
        assert!(
            line.contains("consumer{consumer.name=\"orders\"}"),
            "{line}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_consumer_that_reconnects_waits_as_long_as_it_is_to() {
    for (drain, stop) in [(2_000, 7_000), (7_000, 0), (0, 3_000)] {
        let channel = Channel::of([Fate::Hang]);
        let broker = Broker::new([Try::Channel(channel.clone())]);
        let make_service =
            |_: CancellationToken| service_fn(|_: Delivery| pending::<Result<(), Infallible>>());
        let started = Instant::now();
        let consumer = Consumer::reconnecting(move || broker.connect(), make_service)
            .drain_timeout(MS(drain))
            .stop_timeout(MS(stop))
            .with_graceful_shutdown(sleep(MS(500)));
        let summary: Summary = ends(consumer).await.unwrap();
        assert_eq!((summary.called, summary.abandoned), (1, 1));
        let late = started.elapsed().checked_sub(MS(500 + drain + stop));
        assert!(
            late.is_some_and(|late| late < MS(20)),
            "{drain}, {stop}: {late:?}"
        );
    }
}
