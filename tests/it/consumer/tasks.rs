//! A consumer of several tasks looks to its broker like one of one task.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    thread,
    time::Duration,
};

use futures_util::Stream;
use tokio::{sync::Semaphore, time::sleep};
use tokio_util::sync::CancellationToken;
use tower::{Service, ServiceBuilder, service_fn, util::BoxService};
use tower_sentinel::{
    Consumer, Verdict,
    consumer::{EndCause, Escalation, Subscription},
    outcome::OutcomeKind,
    settle::Settled,
};

use crate::{
    consumer::{CallError, ends, here, reconnecting::service, stack},
    support::{
        Fate, Refused, raise,
        subscription::{Channel, Deliveries, Delivery, End, Refusal},
        until, wait_until,
    },
};

const MS: fn(u64) -> Duration = Duration::from_millis;

type Boxed = BoxService<Delivery, Settled, CallError>;

/// Returns a stack for each gate, all with one shutdown token.
fn stacks(gates: &[usize], shutdown: &CancellationToken) -> Vec<Boxed> {
    let stack = |gate: &usize| BoxService::new(stack(*gate, shutdown.clone(), here()));
    gates.iter().map(stack).collect()
}

/// Counts its calls, which end when the semaphore has permits for them.
fn counting(
    calls: &Arc<AtomicU64>,
    end: &Arc<Semaphore>,
) -> impl Service<Delivery, Response = (), Error = Infallible, Future: Send + 'static> + Send + 'static
{
    let (calls, end) = (Arc::clone(calls), Arc::clone(end));
    ServiceBuilder::new()
        .concurrency_limit(1)
        .service(service_fn(move |_: Delivery| {
            calls.fetch_add(1, Ordering::SeqCst);
            let end = Arc::clone(&end);
            async move {
                end.acquire().await.unwrap().forget();
                Ok(())
            }
        }))
}

#[tokio::test(start_paused = true)]
async fn the_limits_of_the_tasks_add_up() {
    for gates in [&[1, 1][..], &[3, 1], &[2, 2, 2], &[16; 4]] {
        let channel = Channel::of([Fate::Value, Fate::Error, Fate::PanicInCall].repeat(100));
        let shutdown = CancellationToken::new();
        let consumer = Consumer::parallel(channel.subscribe(), stacks(gates, &shutdown))
            .shutdown(shutdown)
            .with_graceful_shutdown(sleep(MS(1_000_000)));
        let summary = ends(consumer).await.unwrap();
        let limit: usize = gates.iter().sum();
        assert_eq!(channel.most_unsettled(), limit as u64, "{gates:?}");
        assert_eq!((summary.called, summary.answered), (300, 300));
        assert_eq!(summary.verdicts(Verdict::Ack), 100);
        assert_eq!(summary.outcomes(OutcomeKind::Panicked), 100);
        assert_eq!(channel.verdicts().len(), 300);
        assert_eq!(channel.closed(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_goes_to_a_task_that_is_ready() {
    let channel = Channel::of([]);
    let (calls, ends_of) = ([(); 3].map(|()| Arc::default()), [(); 3]);
    let end = ends_of.map(|()| Arc::new(Semaphore::new(0)));
    let services = calls
        .iter()
        .zip(&end)
        .map(|(calls, end)| counting(calls, end));
    let consumer = Consumer::parallel(channel.subscribe(), services);
    let consuming = tokio::spawn(ends(consumer.with_graceful_shutdown(sleep(MS(10_000)))));
    let called = || calls.each_ref().map(|calls| calls.load(Ordering::SeqCst));

    // All are idle, so if one takes a job, the next job goes to another.
    for n in 1..=3 {
        channel.publish([Fate::Value]);
        until(|| called().iter().sum::<u64>() == n).await;
    }
    assert_eq!(called(), [1, 1, 1]);
    channel.publish([Fate::Value; 5]);
    sleep(MS(1)).await;
    assert_eq!((called(), channel.taken()), ([1, 1, 1], 3));
    // One that is busy does not keep a job from one that is not.
    for task in [1, 0, 1, 2, 1] {
        let mut expected = called();
        expected[task] += 1;
        end[task].add_permits(1);
        until(|| called() == expected).await;
    }
    end.iter().for_each(|end| end.add_permits(1));
    let summary = consuming.await.unwrap().unwrap();
    assert_eq!((summary.called, summary.answered), (8, 8));
}

#[tokio::test(start_paused = true)]
async fn a_task_that_has_drained_does_not_stop_the_others() {
    for end in [None, Some(End::Ended), Some(End::Failed)] {
        // It finishes after a second, and the drain begins before.
        let channel = Channel::of([Fate::Value]);
        let shutdown = CancellationToken::new();
        let signal = CancellationToken::new();
        let consumer = Consumer::parallel(channel.subscribe(), stacks(&[1, 1], &shutdown))
            .shutdown(shutdown.clone())
            .with_graceful_shutdown(signal.clone().cancelled_owned());
        let consuming = tokio::spawn(ends(consumer));
        until(|| channel.taken() == 1).await;
        match end {
            Some(end) => channel.end(end),
            None => signal.cancel(),
        }
        sleep(MS(500)).await;
        assert!(!shutdown.is_cancelled() && channel.closed() == 0);
        let summary = match (end, consuming.await.unwrap()) {
            (None, Ok(summary)) => summary,
            (Some(_), Err(error)) => error.into_parts().1,
            (_, ended) => panic!("{ended:?}"),
        };
        assert_eq!(summary.verdicts(Verdict::Ack), 1);
        assert_eq!((channel.stale(), channel.closed()), (0, 1));
        assert!(shutdown.is_cancelled());
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_of_one_task_ends_them_all() {
    let channel = Channel::of([Fate::Value; 3]);
    channel.refuse(Refusal::Fails);
    let shutdown = CancellationToken::new();
    let consumer = Consumer::parallel(channel.subscribe(), stacks(&[1, 1, 1, 1], &shutdown));
    let error = ends(consumer.shutdown(shutdown)).await.unwrap_err();
    assert!(matches!(error.cause(), EndCause::Unanswered(_)));
    let summary = error.summary();
    assert_eq!((summary.called, summary.answered), (3, 2));
    assert_eq!((summary.failed, summary.unanswered), (1, 1));
    assert_eq!((channel.closed(), channel.stale()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn what_a_reconnect_would_meet_again_is_reported() {
    // The drain of the first failure meets the second.
    let channel = Channel::of([Fate::Value; 2]);
    let calls = Arc::new(AtomicU64::new(0));
    let service = |_| {
        let calls = Arc::clone(&calls);
        service_fn(move |_: Delivery| {
            let call = calls.fetch_add(1, Ordering::SeqCst);
            async move {
                sleep(MS(100 * (call + 1))).await;
                Err::<(), _>(call)
            }
        })
    };
    let escalation = |call: &u64| match call {
        0 => Escalation::Channel,
        _ => Escalation::Consumer,
    };
    let gated = |n| {
        ServiceBuilder::new()
            .concurrency_limit(1)
            .service(service(n))
    };
    let consumer = Consumer::parallel(channel.subscribe(), [0, 1].map(gated));
    let error = ends(consumer.escalation(escalation)).await.unwrap_err();
    assert!(matches!(error.cause(), EndCause::Misconfigured(1)));
    assert_eq!(error.summary().unanswered, 2);
}

#[tokio::test(start_paused = true)]
async fn it_counts_whether_the_error_or_the_signal_was_first() {
    for is_error_first in [true, false] {
        // The first to end, after a second, loses its settlement. Its task has another one to drain.
        let channel = Channel::of([Fate::Value, Fate::Hang, Fate::Hang]);
        channel.refuse(Refusal::Fails);
        let shutdown = CancellationToken::new();
        let signal = sleep(MS(if is_error_first { 1_500 } else { 500 }));
        let consumer = Consumer::parallel(channel.subscribe(), stacks(&[2, 1], &shutdown))
            .shutdown(shutdown)
            .drain_timeout(MS(1_000))
            .with_graceful_shutdown(signal);
        let summary = match (is_error_first, ends(consumer).await) {
            (true, Err(error)) => {
                assert!(matches!(error.cause(), EndCause::Unanswered(_)));
                error.into_parts().1
            }
            (false, Ok(summary)) => summary,
            (_, ended) => panic!("{ended:?}"),
        };
        assert_eq!((summary.answered, summary.unanswered), (2, 1));
        assert_eq!(channel.verdicts(), [Verdict::release(); 2]);
        assert_eq!((channel.closed(), channel.stale()), (1, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_panics_ends_all_tasks() {
    for jobs in [0, 2] {
        // With jobs the gates are full, and it panics where it is watched.
        let channel = Channel::of(vec![Fate::Hang; jobs]);
        let shutdown = CancellationToken::new();
        let consumer = Consumer::parallel(channel.subscribe(), stacks(&[1, 1], &shutdown))
            .shutdown(shutdown)
            .drain_timeout(MS(100));
        let consuming = tokio::spawn(ends(consumer));
        sleep(MS(1)).await;
        assert_eq!(channel.taken(), jobs as u64);
        channel.end(End::Panics);
        let error = consuming.await.unwrap().unwrap_err();
        assert!(matches!(error.cause(), EndCause::StreamPanicked(_)));
        assert_eq!(channel.verdicts(), vec![Verdict::release(); jobs]);
        assert_eq!((channel.closed(), channel.stale()), (1, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_that_reconnects_has_as_many_tasks_with_one_token() {
    let tokens = Arc::new(Mutex::new(Vec::<CancellationToken>::new()));
    let channels = [0, 1].map(|_| Channel::of([Fate::Hang; 3]));
    let mut connects = channels.clone().into_iter();
    let seen = Arc::clone(&tokens);
    let consumer = Consumer::reconnecting(
        move || {
            let next = connects.next().map(|channel| channel.subscribe());
            async move { next.ok_or(Refused) }
        },
        move |shutdown: CancellationToken| {
            seen.lock().unwrap().push(shutdown.clone());
            stack(1, shutdown, here())
        },
    )
    .tasks(3)
    .drain_timeout(MS(100))
    .max_attempts(1);
    let consuming = tokio::spawn(ends(consumer.random(|| 0.0)));
    for channel in &channels {
        until(|| channel.taken() == 3).await;
        channel.end(End::Failed);
        until(|| channel.closed() == 1).await;
        assert_eq!(channel.verdicts(), [Verdict::release(); 3]);
    }
    // The third has nothing to connect to, and is the first try since a session that worked.
    let error = consuming.await.unwrap().unwrap_err();
    assert!(matches!(error.cause(), EndCause::Connect(Refused)));
    assert_eq!(error.summary().called, 6);
    let tokens = tokens.lock().unwrap();
    assert_eq!(tokens.len(), 9);
    assert!(tokens.iter().all(CancellationToken::is_cancelled));
}

/// Ends, or panics, while another task is about to ask.
struct Contended {
    asked: Arc<AtomicU64>,
    panics: bool,
    is_over: bool,
    polled_late: Arc<AtomicBool>,
}

impl Stream for Contended {
    type Item = Result<(), Refused>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.polled_late.fetch_or(self.is_over, Ordering::SeqCst);
        let asked = self.asked.load(Ordering::SeqCst);
        cx.waker().wake_by_ref();
        let other = || self.asked.load(Ordering::SeqCst) > asked;
        if asked < 2 || !wait_until(other) {
            return Poll::Pending;
        }
        // Another one was polled for readiness, and polls the stream next. There is no event for it.
        thread::sleep(MS(20));
        self.is_over = true;
        match self.panics {
            true => raise("in the stream"),
            false => Poll::Ready(None),
        }
    }
}

impl Subscription for Contended {
    type Job = ();
    type Error = Refused;

    fn poll_closed(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        Poll::Pending
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }
}

/// Counts the polls for its readiness.
struct Asked(Arc<AtomicU64>);

impl Service<()> for Asked {
    type Response = ();
    type Error = Infallible;
    type Future = Ready<Result<(), Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, (): ()) -> Self::Future {
        ready(Ok(()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_is_over_is_polled_no_more() {
    for panics in [false, true] {
        let (asked, polled_late) = (Arc::<AtomicU64>::default(), Arc::default());
        let services = [(); 2].map(|()| Asked(Arc::clone(&asked)));
        let stream = Contended {
            asked,
            panics,
            is_over: false,
            polled_late: Arc::clone(&polled_late),
        };
        let error = Consumer::parallel(stream, services).await.unwrap_err();
        match panics {
            true => assert!(matches!(error.cause(), EndCause::StreamPanicked(_))),
            false => assert!(matches!(error.cause(), EndCause::StreamEnded)),
        }
        assert!(!polled_late.load(Ordering::SeqCst));
    }
}

/// Stream that ends when it is stopped.
struct Stops {
    is_stopped: Arc<AtomicBool>,
    polled_late: Arc<AtomicBool>,
}

impl Stream for Stops {
    type Item = Result<(), Refused>;

    fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let is_stopped = self.is_stopped.load(Ordering::SeqCst);
        self.polled_late.fetch_or(is_stopped, Ordering::SeqCst);
        match is_stopped {
            true => Poll::Ready(None),
            false => Poll::Pending,
        }
    }
}

impl Subscription for Stops {
    type Job = ();
    type Error = Refused;

    fn poll_closed(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        Poll::Pending
    }

    fn poll_stop(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        self.is_stopped.store(true, Ordering::SeqCst);
        Poll::Ready(())
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }
}

/// The first fails once the second is asked, which is ready once the stream was stopped.
struct Late {
    is_first: bool,
    is_asked: Arc<AtomicBool>,
    is_stopped: Arc<AtomicBool>,
}

impl Service<()> for Late {
    type Response = ();
    type Error = Refused;
    type Future = Ready<Result<(), Refused>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        if self.is_first {
            assert!(wait_until(|| self.is_asked.load(Ordering::SeqCst)));
            return Poll::Ready(Err(Refused));
        }
        self.is_asked.store(true, Ordering::SeqCst);
        assert!(wait_until(|| self.is_stopped.load(Ordering::SeqCst)));
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, (): ()) -> Self::Future {
        ready(Ok(()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_is_stopped_is_polled_no_more() {
    let (is_asked, is_stopped) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
    let services = [true, false].map(|is_first| Late {
        is_first,
        is_asked: Arc::clone(&is_asked),
        is_stopped: Arc::clone(&is_stopped),
    });
    let stream = Stops {
        is_stopped,
        polled_late: Arc::default(),
    };
    let polled_late = Arc::clone(&stream.polled_late);
    let consumer = Consumer::parallel(stream, services);
    let consumer = consumer.escalation(|_: &Refused| Escalation::Call);
    let error = consumer.await.unwrap_err();
    assert!(matches!(error.cause(), EndCause::Unready(_)), "{error}");
    // If not, its end might have been reported instead.
    assert!(!polled_late.load(Ordering::SeqCst));
}

#[test]
#[should_panic = "a consumer with 0 tasks would consume nothing"]
fn a_consumer_without_a_task_is_refused() {
    let channel = Channel::of([]);
    let _ = Consumer::parallel(channel.subscribe(), Vec::<Boxed>::new());
}

#[test]
#[should_panic = "`tasks(0)` would consume nothing"]
fn a_session_without_a_task_is_refused() {
    let connect = || ready(Err::<Deliveries, _>(Refused));
    let _ = Consumer::reconnecting(connect, service).tasks(0);
}
