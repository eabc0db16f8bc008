//! Keep-alive: when the broker is asked for more time, what its answers do, and that it is asked no
//! more once it is told.

use std::{
    fmt,
    future::{pending, poll_fn},
    mem,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, mpsc},
    task::Poll,
    thread,
    time::Duration,
};

use futures_util::future::{BoxFuture, join};
use tokio::{
    runtime::{Builder, Handle, Runtime},
    task::yield_now,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_sentinel::{
    Job, KeepAliveLayer, SentinelLayer, SettlePolicy, Verdict, ack_on_success, cancelled,
    outcome::OutcomeKind,
    sentinel::OnDrop,
    settle::{Capabilities, Lease, Reason, Settle, Unsettled},
};

use crate::support::{
    Blocked, Bomb, Fate, Refused, WORK, Work, Worker, call, current_thread, idle, log::Log, raise,
    until, wait_until,
};

const SECOND: Duration = Duration::from_secs(1);
/// The interval of the layers here, unless they say otherwise.
const INTERVAL: Duration = Duration::from_secs(8);
/// How long a slow keep-alive takes until it sends what it has to send.
const SLOW: Duration = Duration::from_millis(400);

// === a tag with a script ===

/// What one keep-alive does.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ask {
    Held,
    Lost,
    Error,
    /// Fails with an error that panics when it is printed, and when it is dropped.
    BadError,
    /// Waits for [`SLOW`], as for a connection, then sends.
    Slow,
    Hang,
    /// Hangs, and panics when it is dropped.
    HangAndPanic,
    PanicInCall,
    PanicInFuture,
}

/// What the broker has seen.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Seen {
    Asked,
    /// By a slow keep-alive.
    Sent,
    Told(Verdict),
}

/// A tag that does its keep-alives in turn, the last of them for ever.
#[derive(Clone)]
struct Tag {
    script: &'static [Ask],
    capabilities: Capabilities,
    started: Instant,
    seen: Arc<Mutex<Vec<(Seen, Duration)>>>,
}

impl Tag {
    fn new(script: &'static [Ask]) -> Self {
        Self {
            script,
            capabilities: Capabilities::none().keep_alive(),
            started: Instant::now(),
            seen: Arc::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(Seen, Duration)>> {
        self.seen.lock().unwrap()
    }

    fn see(&self, seen: Seen) {
        let at = self.started.elapsed();
        self.lock().push((seen, at));
    }

    fn seen(&self) -> Vec<Seen> {
        self.lock().iter().map(|(seen, _)| *seen).collect()
    }

    /// Returns when the broker was asked, in seconds.
    fn asked(&self) -> Vec<f64> {
        let seen = self.lock();
        let asked = seen.iter().filter(|(seen, _)| *seen == Seen::Asked);
        asked.map(|(_, at)| at.as_secs_f64()).collect()
    }

    fn verdicts(&self) -> Vec<Verdict> {
        let told = |seen| match seen {
            Seen::Told(verdict) => Some(verdict),
            _ => None,
        };
        self.seen().into_iter().filter_map(told).collect()
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tag 7")
    }
}

/// An error that can panic in whatever is done with it.
#[derive(Debug)]
struct Fault(Option<Bomb>);

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("connection reset"),
            Some(_) => raise("in Display"),
        }
    }
}

impl std::error::Error for Fault {}

impl Settle for Tag {
    type Error = Fault;
    type Future = BoxFuture<'static, Result<(), Unsettled<Self, Fault>>>;

    fn settle(self, verdict: Verdict, _: Reason) -> Self::Future {
        self.see(Seen::Told(verdict));
        Box::pin(async { Ok(()) })
    }

    fn keep_alive(&self) -> impl Future<Output = Result<Lease, Fault>> + Send {
        let index = self.asked().len().min(self.script.len() - 1);
        let ask = self.script[index];
        self.see(Seen::Asked);
        if ask == Ask::PanicInCall {
            raise("in keep_alive");
        }
        async move {
            match ask {
                Ask::Held => Ok(Lease::Held),
                Ask::Lost => Ok(Lease::Lost),
                Ask::Error => Err(Fault(None)),
                Ask::BadError => Err(Fault(Some(Bomb))),
                Ask::Slow => {
                    sleep(SLOW).await;
                    self.see(Seen::Sent);
                    Ok(Lease::Held)
                }
                Ask::Hang => pending().await,
                Ask::HangAndPanic => {
                    let _bomb = Bomb;
                    pending().await
                }
                Ask::PanicInCall => unreachable!(),
                Ask::PanicInFuture => raise("in the future of keep_alive"),
            }
        }
    }

    fn deliveries(&self) -> Option<u32> {
        None
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }
}

/// A job that is all in its tag.
impl Job for Tag {
    type Tag = Self;

    fn tag(&self) -> Self {
        self.clone()
    }
}

/// A job that takes its time.
struct Delivery {
    tag: Tag,
    takes: Duration,
}

impl Job for Delivery {
    type Tag = Tag;

    fn tag(&self) -> Tag {
        self.tag.clone()
    }
}

fn sentinel() -> SentinelLayer<SettlePolicy> {
    SentinelLayer::new(SettlePolicy::new(ack_on_success())).no_timeout()
}

async fn work(delivery: Delivery) -> Result<(), Refused> {
    sleep(delivery.takes).await;
    Ok(())
}

/// Runs a job that takes `takes`, and returns its tag.
async fn run(script: &'static [Ask], takes: Duration) -> Tag {
    run_with(KeepAliveLayer::new(INTERVAL), script, takes).await
}

async fn run_with(layer: KeepAliveLayer, script: &'static [Ask], takes: Duration) -> Tag {
    let tag = Tag::new(script);
    let mut service = sentinel().layer(layer.layer(service_fn(work)));
    let delivery = Delivery {
        tag: tag.clone(),
        takes,
    };
    call(&mut service, delivery).await.unwrap();
    tag
}

// === when it asks ===

#[tokio::test(start_paused = true)]
async fn the_broker_is_asked_every_interval_until_the_job_is_done_and_not_after() {
    let tag = run(&[Ask::Held], 3 * INTERVAL - SECOND).await;
    sleep(10 * INTERVAL).await;
    assert_eq!(tag.asked(), [8.0, 16.0]);
    assert_eq!(tag.verdicts(), [Verdict::Ack]);
}

#[tokio::test(start_paused = true)]
async fn a_job_that_is_done_within_the_first_interval_costs_no_request() {
    let tag = run(&[Ask::Held], INTERVAL - SECOND).await;
    sleep(10 * INTERVAL).await;
    assert_eq!(tag.seen(), [Seen::Told(Verdict::Ack)]);
}

#[tokio::test(start_paused = true)]
async fn the_interval_counts_from_one_request_to_the_next_however_long_the_answer_takes() {
    let tag = run(&[Ask::Slow], 3 * INTERVAL + SECOND).await;
    assert_eq!(tag.asked(), [8.0, 16.0, 24.0]);
}

#[tokio::test(start_paused = true)]
async fn an_interval_that_no_clock_reaches_is_none() {
    let tag = run_with(KeepAliveLayer::new(Duration::MAX), &[Ask::Held], INTERVAL).await;
    assert_eq!(tag.asked(), [0.0; 0]);
    assert_eq!(tag.verdicts(), [Verdict::Ack]);
}

#[test]
#[should_panic(expected = "a keep-alive needs an interval")]
fn an_interval_of_zero_is_refused() {
    drop(KeepAliveLayer::new(Duration::ZERO));
}

#[test]
#[should_panic(expected = "timers are disabled")]
fn a_runtime_without_timers_is_refused() {
    let runtime = Builder::new_current_thread().build().unwrap();
    drop(KeepAliveLayer::new(INTERVAL).runtime(runtime.handle().clone()));
}

// === what an answer does ===

#[tokio::test(start_paused = true)]
async fn a_lost_lease_cancels_the_job_which_is_abandoned_and_no_longer_kept_alive() {
    let (log, _guard) = Log::start();
    let tag = run(&[Ask::Held, Ask::Lost], 10 * INTERVAL).await;
    assert_eq!(tag.started.elapsed(), 2 * INTERVAL);
    sleep(10 * INTERVAL).await;
    let abandoned = Seen::Told(Verdict::Abandon);
    assert_eq!(tag.seen(), [Seen::Asked, Seen::Asked, abandoned]);
    let lines = log.lines();
    assert_eq!(lines.len(), 2, "{lines:#?}");
    assert_eq!(lines[0], "WARN the broker gave a job to somebody else");
    assert!(lines[1].starts_with("WARN the job was cancelled verdict=abandon"));
    assert!(lines[1].contains("reason=\"lease_lost\" stopped=true"));
}

#[tokio::test(start_paused = true)]
async fn a_job_that_completes_within_its_grace_after_a_lost_lease_is_acked() {
    let tag = Tag::new(&[Ask::Lost]);
    let job = service_fn(|_: Delivery| async {
        cancelled().await;
        Ok::<_, Refused>(())
    });
    let layer = KeepAliveLayer::new(INTERVAL);
    let mut service = sentinel().grace(SECOND).layer(layer.layer(job));
    let delivery = Delivery {
        tag: tag.clone(),
        takes: SECOND,
    };
    let settled = call(&mut service, delivery).await.unwrap();
    assert_eq!(settled.kind, OutcomeKind::Completed);
    assert_eq!(tag.seen(), [Seen::Asked, Seen::Told(Verdict::Ack)]);
}

#[tokio::test(start_paused = true)]
async fn a_keep_alive_that_fails_is_tried_again_sooner_and_then_as_before() {
    let (log, _guard) = Log::start();
    const SCRIPT: &[Ask] = &[
        Ask::Error,
        Ask::Error,
        Ask::Error,
        Ask::Error,
        Ask::Held,
        Ask::Held,
        Ask::Error,
        Ask::Held,
    ];
    let tag = run(SCRIPT, 46 * SECOND).await;
    assert_eq!(
        tag.asked(),
        [8.0, 9.0, 11.0, 15.0, 19.0, 27.0, 35.0, 36.0, 44.0]
    );
    assert_eq!(tag.verdicts(), [Verdict::Ack]);
    let failed = "WARN a keep-alive failed error=\"connection reset\"";
    assert_eq!(log.lines(), [failed; 5]);
}

#[tokio::test(start_paused = true)]
async fn a_keep_alive_that_fails_for_ever_is_tried_no_more_often_than_every_half_interval() {
    let tag = run(&[Ask::Error], 1_000 * INTERVAL).await;
    let asked = tag.asked();
    assert_eq!(asked.len(), 2_000);
    assert!(asked[4..].windows(2).all(|pair| pair[1] - pair[0] == 4.0));
    assert_eq!(tag.verdicts(), [Verdict::Ack]);
}

#[tokio::test(start_paused = true)]
async fn a_keep_alive_that_hangs_has_a_limit_and_is_tried_again() {
    let (log, _guard) = Log::start();
    for script in [&[Ask::Hang], &[Ask::HangAndPanic]] {
        let tag = run(script, 3 * INTERVAL).await;
        assert_eq!(tag.asked(), [8.0, 13.0, 19.0]);
        assert_eq!(tag.verdicts(), [Verdict::Ack]);
    }
    let late = "WARN a keep-alive got no answer in time limit=4s";
    assert_eq!(log.lines(), [late; 6]);

    let layer = KeepAliveLayer::new(INTERVAL).try_timeout(SECOND);
    let tag = run_with(layer, &[Ask::Hang], 3 * INTERVAL).await;
    assert_eq!(tag.asked(), [8.0, 10.0, 13.0, 18.0, 23.0]);
}

#[tokio::test(start_paused = true)]
async fn a_keep_alive_that_panics_is_an_error_event_and_is_tried_again() {
    for (script, message) in [
        (&[Ask::PanicInCall, Ask::Held], "in keep_alive"),
        (
            &[Ask::PanicInFuture, Ask::Held],
            "in the future of keep_alive",
        ),
    ] {
        let (log, _guard) = Log::start();
        let tag = run(script, 3 * INTERVAL).await;
        assert_eq!(tag.asked(), [8.0, 9.0, 17.0]);
        assert_eq!(tag.verdicts(), [Verdict::Ack]);
        let event = format!("ERROR a keep-alive panicked panic=\"{message}\"");
        assert_eq!(log.lines(), [event]);
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_that_panics_when_it_is_printed_does_not_end_the_ticker() {
    let (log, _guard) = Log::start();
    let tag = run(&[Ask::BadError, Ask::Held], 3 * INTERVAL).await;
    assert_eq!(tag.asked(), [8.0, 9.0, 17.0]);
    let message = "the error cannot be printed: in Display";
    let event = format!("WARN a keep-alive failed error=\"{message}\"");
    assert_eq!(log.lines(), [event]);
}

#[tokio::test(start_paused = true)]
async fn a_broker_without_keep_alive_is_not_asked_which_is_said_once_for_a_layer() {
    let (log, _guard) = Log::start();
    let layer = KeepAliveLayer::new(INTERVAL);
    for _ in 0..2 {
        let mut service = sentinel().layer(layer.clone().layer(service_fn(work)));
        for _ in 0..2 {
            let mut tag = Tag::new(&[Ask::Held]);
            tag.capabilities = Capabilities::none();
            let delivery = Delivery {
                tag: tag.clone(),
                takes: 3 * INTERVAL,
            };
            call(&mut service, delivery).await.unwrap();
            assert_eq!(tag.seen(), [Seen::Told(Verdict::Ack)]);
        }
    }
    let once = "WARN the broker has no keep-alive: jobs run without it";
    assert_eq!(log.lines(), [once]);
}

// === when it ends ===

/// Who ends the job while a keep-alive is in flight.
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

/// A job that blocks its thread though it is to stop: on a runtime of its own, with the tickers here.
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
    const TOLD: &str = "ERROR a job is not kept alive any more: \
        the runtime of the keep-alive has no timers, or has ended";

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
    // Stopped with its job, it has nothing to tell.
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

// === outside of a sentinel ===

#[tokio::test(start_paused = true)]
async fn outside_of_a_sentinel_the_ticker_lives_as_long_as_the_inner_future() {
    let deliver = |tag: &Tag| Delivery {
        tag: tag.clone(),
        takes: 2 * INTERVAL + SECOND,
    };
    let mut service = KeepAliveLayer::new(INTERVAL).layer(service_fn(work));

    let tag = Tag::new(&[Ask::Held]);
    call(&mut service, deliver(&tag)).await.unwrap();
    sleep(10 * INTERVAL).await;
    assert_eq!(tag.asked(), [8.0, 16.0]);

    // A future that has returned is done, though it is still there.
    let tag = Tag::new(&[Ask::Held]);
    let mut future = pin!(service.call(deliver(&tag)));
    future.as_mut().await.unwrap();
    sleep(10 * INTERVAL).await;
    assert_eq!(tag.asked(), [8.0, 16.0]);

    let tag = Tag::new(&[Ask::Held]);
    let future = service.call(deliver(&tag));
    // It need not be polled.
    sleep(INTERVAL + SECOND).await;
    drop(future);
    sleep(10 * INTERVAL).await;
    assert_eq!(tag.asked(), [8.0]);
    assert_eq!(Handle::current().metrics().num_alive_tasks(), 0);
}

#[tokio::test(start_paused = true)]
async fn outside_of_a_sentinel_a_lost_lease_ends_the_ticker_alone() {
    let tag = Tag::new(&[Ask::Lost]);
    let mut service = KeepAliveLayer::new(INTERVAL).layer(service_fn(work));
    let delivery = Delivery {
        tag: tag.clone(),
        takes: 5 * INTERVAL,
    };
    call(&mut service, delivery).await.unwrap();
    assert_eq!(tag.started.elapsed(), 5 * INTERVAL);
    assert_eq!(tag.asked(), [8.0]);
}

// === the service ===

#[tokio::test(start_paused = true)]
async fn readiness_is_the_inner_services() {
    let (mock, mut handle) = tower_test::mock::pair::<Tag, ()>();
    let mut service = KeepAliveLayer::new(INTERVAL).layer(mock);
    handle.allow(0);
    let ready = tokio::time::timeout(SECOND, ServiceExt::<Tag>::ready(&mut service)).await;
    assert!(ready.is_err());
    handle.send_error(Refused);
    let error = ServiceExt::<Tag>::ready(&mut service).await.unwrap_err();
    assert!(error.is::<Refused>());
}

#[tokio::test]
async fn many_jobs_side_by_side_on_real_threads_are_never_asked_for_after_they_are_told() {
    let jobs = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let keep_alive = KeepAliveLayer::new(Duration::from_millis(1));
    let service = sentinel()
        .runtime(jobs.handle().clone())
        .layer(keep_alive.layer(service_fn(work)));
    let tags: Vec<_> = (0..200).map(|_| Tag::new(&[Ask::Held])).collect();
    for (index, tag) in tags.iter().enumerate() {
        let delivery = Delivery {
            tag: tag.clone(),
            takes: Duration::from_millis(1 + index as u64 % 7),
        };
        tokio::spawn(service.clone().oneshot(delivery));
    }
    until(|| tags.iter().all(|tag| tag.verdicts().len() == 1)).await;
    idle(jobs.handle()).await;
    for tag in &tags {
        assert_eq!(tag.seen().last(), Some(&Seen::Told(Verdict::Ack)));
    }
    jobs.shutdown_background();
}
