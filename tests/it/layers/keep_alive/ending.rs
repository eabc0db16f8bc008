//! End of the keep-alives.

use std::{
    future::poll_fn,
    mem,
    sync::{Arc, Mutex, mpsc},
    task::Poll,
    thread,
    time::Duration,
};

use futures_util::future::{BoxFuture, join};
use tokio::{
    runtime::{Builder, Handle, Runtime},
    task::yield_now,
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_sentinel::{
    Job, KeepAliveLayer, Verdict,
    outcome::OutcomeKind,
    sentinel::OnDrop,
    settle::{Capabilities, Lease, Reason, Settle, Unsettled},
};

use super::{Ask, Delivery, INTERVAL, SECOND, SLOW, Seen, Tag, sentinel, work};
use crate::support::{
    Blocked, Fate, Refused, WORK, Work, Worker, call, current_thread, idle, log::Log, until,
    wait_until,
};

/// Cause of a job's end while a keep-alive is in flight.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Itself,
    TimeLimit,
    Drop,
    Shutdown,
}

#[tokio::test(start_paused = true)]
async fn a_keep_alive_in_flight_never_reaches_the_broker_whatever_becomes_of_the_job() {
    use Verdict::Ack;
    const RELEASE: Verdict = Verdict::release();
    let retry = Verdict::retry();
    for (fate, end, verdict) in [
        (Fate::Value, End::Itself, Ack),
        (Fate::Error, End::Itself, retry),
        (Fate::PanicLater, End::Itself, retry),
        (Fate::CancelsItself, End::Itself, RELEASE),
        (Fate::Hang, End::TimeLimit, retry),
        (Fate::PanicInDrop, End::TimeLimit, retry),
        (Fate::Hang, End::Drop, RELEASE),
        (Fate::PanicInDrop, End::Drop, RELEASE),
        (Fate::Hang, End::Shutdown, RELEASE),
    ] {
        let tag = Tag::new(&[Ask::Slow]);
        let shutdown = CancellationToken::new();
        let mut layer = sentinel().shutdown(shutdown.clone());
        if end == End::TimeLimit {
            layer = layer.timeout(WORK);
        }
        let job = Worker::default().map_request(move |_: Delivery| Work::new(fate));
        let keep_alive = KeepAliveLayer::new(WORK - SLOW / 2).try_timeout(INTERVAL);
        let mut service = layer.layer(keep_alive.layer(job));
        let delivery = Delivery {
            tag: tag.clone(),
            takes: SECOND,
        };
        let answer = tokio::spawn(service.ready().await.unwrap().call(delivery));
        sleep(WORK).await;
        match end {
            End::Itself | End::TimeLimit => {}
            End::Drop => answer.abort(),
            End::Shutdown => shutdown.cancel(),
        }
        sleep(INTERVAL).await;
        let expected = [Seen::Asked, Seen::Told(verdict)];
        assert_eq!(tag.seen(), expected, "{fate:?}, {end:?}");
        // The task is gone as well, and with it every clone of the tag.
        assert_eq!(Arc::strong_count(&tag.seen), 1, "{fate:?}, {end:?}");
        assert_eq!(Handle::current().metrics().num_alive_tasks(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_that_ends_at_once_leaves_no_ticker_behind() {
    for fate in [Fate::PanicInCall, Fate::PanicFirst] {
        let tag = Tag::new(&[Ask::Held]);
        let job = Worker::default().map_request(move |_: Delivery| Work::new(fate));
        let layer = KeepAliveLayer::new(INTERVAL);
        let mut service = sentinel().layer(layer.layer(job));
        let delivery = Delivery {
            tag: tag.clone(),
            takes: SECOND,
        };
        let settled = call(&mut service, delivery).await.unwrap();
        assert_eq!(settled.kind, OutcomeKind::Panicked);
        sleep(10 * INTERVAL).await;
        assert_eq!(tag.seen(), [Seen::Told(Verdict::retry())]);
        assert_eq!(Handle::current().metrics().num_alive_tasks(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_detached_job_is_kept_alive_without_its_caller() {
    let tag = Tag::new(&[Ask::Held]);
    let layer = sentinel().on_drop(OnDrop::Detach);
    let mut service = layer.layer(KeepAliveLayer::new(INTERVAL).layer(service_fn(work)));
    let delivery = Delivery {
        tag: tag.clone(),
        takes: 3 * INTERVAL - SECOND,
    };
    drop(service.ready().await.unwrap().call(delivery));
    idle(&Handle::current()).await;
    assert_eq!(tag.asked(), [8.0, 16.0]);
    assert_eq!(tag.verdicts(), [Verdict::Ack]);
}

/// A job that blocks its thread though it was cancelled: on its own runtime, with the tickers here.
#[tokio::test]
async fn a_job_that_blocks_a_worker_is_kept_alive_until_it_is_settled_though_it_did_not_stop() {
    let jobs = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let tag = Tag::new(&[Ask::Held]);
    let thread = Blocked::until_released();
    let worker = Worker {
        thread: Arc::clone(&thread),
    };
    let keep_alive = KeepAliveLayer::new(Duration::from_millis(10)).runtime(Handle::current());
    let shutdown = CancellationToken::new();
    let mut service = sentinel()
        .no_timeout()
        .stop_wait(Duration::from_millis(10))
        .shutdown(shutdown.clone())
        .runtime(jobs.handle().clone())
        .layer(keep_alive.layer(worker.map_request(|_: Delivery| Work::new(Fate::BlockFirst))));
    let delivery = Delivery {
        tag: tag.clone(),
        takes: SECOND,
    };
    let stop = async {
        until(|| thread.entered() && tag.asked().len() >= 5).await;
        shutdown.cancel();
    };
    let (settled, ()) = join(call(&mut service, delivery), stop).await;
    assert!(!settled.unwrap().stopped);
    sleep(Duration::from_millis(60)).await;
    assert_eq!(tag.seen().last(), Some(&Seen::Told(Verdict::release())));
    assert_eq!(tag.verdicts(), [Verdict::release()]);
    thread.release();
    jobs.shutdown_background();
}

#[test]
fn a_keep_alive_whose_runtime_fails_it_is_told_of() {
    const TOLD: &str = "ERROR keep-alive ended: its runtime has ended, or has no timers";

    let without_timers = || Builder::new_current_thread().build().unwrap();
    let run = |keep_alive: KeepAliveLayer, runs_on: Runtime, ends: Option<Runtime>| {
        let (log, _guard) = Log::start();
        let tag = Tag::new(&[Ask::Held]);
        let delivery = Delivery {
            tag: tag.clone(),
            takes: SECOND,
        };
        let mut service = keep_alive.layer(service_fn(async |_: Delivery| {
            yield_now().await;
            yield_now().await;
            Ok::<_, Refused>(())
        }));
        runs_on.block_on(async {
            let working = service.ready().await.unwrap().call(delivery);
            if let Some(ends) = ends {
                ends.shutdown_background();
            }
            working.await.unwrap();
        });
        assert_eq!(tag.seen(), []);
        log.lines()
    };

    let layer = KeepAliveLayer::new(INTERVAL);
    assert_eq!(run(layer.clone(), without_timers(), None), [TOLD]);
    let own = current_thread();
    let layer = layer.runtime(own.handle().clone());
    assert_eq!(run(layer.clone(), without_timers(), Some(own)), [TOLD]);
    // It has ended by now.
    assert_eq!(run(layer, without_timers(), None), [TOLD]);
    // Stopped with its job, it reports nothing.
    let layer = KeepAliveLayer::new(INTERVAL);
    assert_eq!(run(layer, current_thread(), None), [""; 0]);
}

#[test]
fn a_job_that_blocks_a_current_thread_runtime_is_not_kept_alive() {
    let tag = Tag::new(&[Ask::Held]);
    let job = service_fn(|_: Delivery| async {
        // At once: an await before it might last an interval, where the machine is busy.
        thread::sleep(Duration::from_millis(100));
        Ok::<_, Refused>(())
    });
    let keep_alive = KeepAliveLayer::new(Duration::from_millis(10));
    let mut service = sentinel().layer(keep_alive.layer(job));
    let delivery = Delivery {
        tag: tag.clone(),
        takes: SECOND,
    };
    current_thread().block_on(async {
        call(&mut service, delivery).await.unwrap();
    });
    assert_eq!(tag.seen(), [Seen::Told(Verdict::Ack)]);
}

/// A tag whose keep-alive is caught in the act: it waits in a poll until it is let go.
#[derive(Clone, Debug)]
struct Caught {
    entered: mpsc::Sender<()>,
    seen: Arc<Mutex<Vec<&'static str>>>,
}

impl Settle for Caught {
    type Error = Refused;
    type Future = BoxFuture<'static, Result<(), Unsettled<Self, Refused>>>;

    fn settle(self, _: Verdict, _: Reason) -> Self::Future {
        self.seen.lock().unwrap().push("told");
        Box::pin(async { Ok(()) })
    }

    async fn keep_alive(&self) -> Result<Lease, Refused> {
        self.entered.send(()).unwrap();
        // Long enough for the job to end, and its settlement to come if nothing holds it up.
        thread::sleep(Duration::from_millis(200));
        self.seen.lock().unwrap().push("sent");
        // Woken at once, unlike by `yield_now`: as by a connection that has more to read.
        let mut woken = false;
        poll_fn(|cx| match mem::replace(&mut woken, true) {
            true => Poll::Ready(()),
            false => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
        })
        .await;
        self.seen.lock().unwrap().push("sent later");
        Ok(Lease::Held)
    }

    fn deliveries(&self) -> Option<u32> {
        None
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::none().keep_alive()
    }
}

impl Job for Caught {
    type Tag = Self;

    fn tag(&self) -> Self {
        self.clone()
    }
}

#[test]
fn a_settlement_waits_for_the_poll_of_a_keep_alive_on_another_thread() {
    let (jobs, tickers) = (current_thread(), Builder::new_multi_thread());
    let tickers = { tickers }.worker_threads(1).enable_all().build().unwrap();
    let (entered, wait) = mpsc::channel();
    let seen = Arc::default();
    let wait = Arc::new(Mutex::new(wait));
    let job = service_fn(move |_: Caught| {
        let wait = Arc::clone(&wait);
        async move {
            wait.lock().unwrap().recv().unwrap();
            Ok::<_, Refused>(())
        }
    });
    let keep_alive =
        KeepAliveLayer::new(Duration::from_millis(1)).runtime(tickers.handle().clone());
    let mut service = sentinel().layer(keep_alive.layer(job));
    let caught = Caught {
        entered,
        seen: Arc::clone(&seen),
    };
    jobs.block_on(async {
        call(&mut service, caught).await.unwrap();
    });
    assert!(wait_until(|| tickers.metrics().num_alive_tasks() == 0));
    assert_eq!(*seen.lock().unwrap(), ["sent", "told"]);
}

#[tokio::test(start_paused = true)]
async fn tries_in_turn_have_a_ticker_each_and_none_outlives_its_try() {
    #[derive(Clone)]
    struct Often(usize);

    impl tower::retry::Policy<Tag, (), Refused> for Often {
        type Future = std::future::Ready<()>;

        fn retry(&mut self, _: &mut Tag, result: &mut Result<(), Refused>) -> Option<Self::Future> {
            self.0 = self.0.checked_sub(1)?;
            result.is_err().then(|| std::future::ready(()))
        }

        fn clone_request(&mut self, tag: &Tag) -> Option<Tag> {
            Some(tag.clone())
        }
    }

    let tag = Tag::new(&[Ask::Held]);
    let most = Arc::new(Mutex::new(0));
    let counted = Arc::clone(&most);
    let failing = service_fn(move |tag: Tag| {
        let most = Arc::clone(&counted);
        async move {
            sleep(INTERVAL + SECOND).await;
            let mut most = most.lock().unwrap();
            *most = (*most).max(Arc::strong_count(&tag.seen));
            Err::<(), _>(Refused)
        }
    });
    let mut service = ServiceBuilder::new()
        .layer(sentinel())
        .retry(Often(9))
        .layer(KeepAliveLayer::new(INTERVAL))
        .service(failing);
    call(&mut service, tag.clone()).await.unwrap();
    assert_eq!(tag.asked().len(), 10);
    // Mine, the sentinel's, that of the retry, the job's and the ticker's.
    assert_eq!(*most.lock().unwrap(), 5);
    assert_eq!(tag.verdicts(), [Verdict::retry()]);
}
