//! Each job ends in one place, with all faults: the ledger of drawn cases adds up.
//!
//! A case that fails is printed as small as it can be made, with the seed that draws it again:
//! `PROPTEST_RNG_SEED=… cargo test --test it each_job_ends_once`.

use std::{
    env,
    future::{Future, IntoFuture, pending, ready},
    hash::{BuildHasher, RandomState},
    pin::pin,
    process::exit,
    sync::{
        Arc, Mutex,
        mpsc::{RecvTimeoutError, channel},
    },
    task::{Context, Waker},
    thread,
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestRunner};
use tokio::{
    runtime::Handle,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::{
    BoxError, Service, ServiceBuilder, service_fn,
    timeout::{TimeoutLayer, error::Elapsed},
};
use tower_sentinel::{
    Consumer, DecisionExt, IntensityLayer, Job, KeepAliveLayer, Outcome, SentinelError,
    SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::memory::{
        Broker, ConnectError, Connection, Counts, Deliveries, Delivery, DeliveryError, SettleFault,
    },
    cancelled,
    consumer::{AfterError, Escalate, Escalation, Summary},
    sentinel::OnDrop,
    settle::{
        Reason, Settle, SettleError, Settled,
        decision::{Decision, Undecided},
    },
};

use self::{
    case::{Case, End, Failed, Fate, Fault, Patience, Rules, Worker},
    ledger::{Jobs, Ledger, Tracked},
};
use crate::{
    sentinel::foreign_code::{BadWaker, Burst},
    support::{Bomb, paused_time, raise},
};

mod case;
mod ledger;

const CASES: u32 = 10_000;

const MS: fn(u64) -> Duration = Duration::from_millis;

/// Longer than any case takes.
const FOREVER: Duration = Duration::from_secs(20);

/// On the wall clock, for a case that takes milliseconds.
const WATCHDOG: Duration = Duration::from_secs(20);

type CallError = SentinelError<Failed, SettleError<DeliveryError>>;

impl Decision<Tracked, (), Failed> for Rules {
    fn decide(&self, tag: &Tracked, outcome: &Outcome<(), Failed>) -> Result<Verdict, Undecided> {
        let limit = self.delivery_limit.unwrap_or(u32::MAX);
        let decision = ack_on_success().on_error(|failed| match failed {
            Failed::Retry | Failed::Unprintable => Verdict::retry(),
            Failed::Release => Verdict::release(),
            Failed::Reject => Verdict::Reject,
        });
        let half = || 0.5;
        match (
            self.backoff.map(|first| first..=4 * first),
            self.is_panic_poison,
        ) {
            (None, false) => decision.delivery_limit(limit).decide(tag, outcome),
            (None, true) => {
                let decision = decision.poison_on_panic();
                decision.delivery_limit(limit).decide(tag, outcome)
            }
            (Some(backoff), false) => {
                let decision = decision.backoff(backoff).random(half);
                decision.delivery_limit(limit).decide(tag, outcome)
            }
            (Some(backoff), true) => {
                let decision = decision.poison_on_panic().backoff(backoff).random(half);
                decision.delivery_limit(limit).decide(tag, outcome)
            }
        }
    }
}

/// Scene of a case; only the broker outlives the process.
#[derive(Clone)]
struct Scene {
    case: Arc<Case>,
    broker: Broker<usize>,
    queue: Jobs,
    ledger: Ledger,
    intensity: Option<IntensityLayer>,
    /// The connection of each worker.
    connections: Arc<Mutex<Vec<Option<Connection<usize>>>>>,
}

impl Scene {
    fn new(case: Case) -> Self {
        let broker = Broker::new();
        let queue = broker.queue("jobs").dead_letter("dead");
        let queue = match case.lease {
            Some(lease) => queue.lease(lease.length).declare(),
            None => queue.declare(),
        };
        let intensity = case.has_intensity.then(|| {
            let layer = IntensityLayer::new().window(4).minimum_sample(2);
            layer.pause(MS(20)..=MS(80))
        });
        let connections = vec![None; case.workers.len()];
        Self {
            ledger: Ledger::of(case.jobs.len()),
            case: Arc::new(case),
            broker,
            queue,
            intensity,
            connections: Arc::new(Mutex::new(connections)),
        }
    }

    fn prefetch(&self) -> usize {
        self.case.workers.iter().map(|it| it.prefetch).sum()
    }

    fn connect(&self, worker: usize) -> Result<Deliveries<usize>, ConnectError> {
        let connection = self.broker.connect()?;
        self.connections.lock().unwrap()[worker] = Some(connection.clone());
        connection.subscribe(&self.queue, self.case.workers[worker].prefetch)
    }

    fn disconnect(&self, worker: usize) {
        let connection = self.connections.lock().unwrap().get(worker).cloned();
        if let Some(connection) = connection.flatten() {
            connection.drop_now();
        }
    }

    /// Returns the whole stack of one worker.
    fn service(
        &self,
        worker: usize,
        shutdown: CancellationToken,
    ) -> impl Service<Delivery<usize>, Response = Settled, Error = BoxError, Future: Send + 'static>
    + Send
    + 'static
    + use<> {
        let Case {
            rules,
            patience,
            lease,
            ..
        } = *self.case;
        let Patience {
            timeout,
            grace,
            settle_timeout,
            ..
        } = patience;
        let Worker {
            prefetch,
            tasks,
            call_timeout,
            ..
        } = self.case.workers[worker];
        let policy = SettlePolicy::new(rules)
            .try_timeout(patience.try_timeout)
            .retry_budget(patience.retry_budget)
            .retry_backoff(MS(2)..=MS(8));
        let scene = self.clone();
        let sentinel = SentinelLayer::new(policy)
            .timeout(timeout)
            .grace(grace)
            .settle_timeout(settle_timeout)
            .on_drop(match patience.is_detached_on_drop {
                true => OnDrop::Detach,
                false => OnDrop::Abort,
            })
            .shutdown(shutdown)
            // Nobody waits for the settlement that is lost, so the consumer does not learn of it.
            .on_unsettled(move |_: CallError| scene.disconnect(worker));
        let keep_alive = lease.filter(|lease| lease.is_kept_alive);
        let keep_alive = keep_alive.map(|lease| KeepAliveLayer::new(lease.length / 3));
        let scene = self.clone();
        let work = self.clone();
        ServiceBuilder::new()
            .concurrency_limit(prefetch.div_ceil(tasks))
            .option_layer(call_timeout.map(TimeoutLayer::new))
            .map_err(BoxError::from)
            .map_request(move |delivery| {
                scene
                    .ledger
                    .deliver(&scene.queue, scene.prefetch(), &delivery)
            })
            .layer(sentinel)
            .option_layer(keep_alive)
            .option_layer(self.intensity.clone())
            .service(service_fn(move |tracked: Tracked| work.work(&tracked)))
    }

    fn work(&self, tracked: &Tracked) -> BoxFuture<'static, Result<(), Failed>> {
        let fates = &self.case.jobs[tracked.job].fates;
        let fate = fates.get(tracked.attempt).copied();
        let fate = fate.unwrap_or(Fate::Value(Duration::ZERO));
        if let Fate::PanicInCall = fate {
            raise("in call");
        }
        Box::pin(async move {
            match fate {
                Fate::PanicInCall | Fate::PanicFirst => raise("before the first await"),
                Fate::PanicLater(after) => {
                    sleep(after).await;
                    raise("after an await")
                }
                Fate::PanicInDrop => {
                    let _bomb = Bomb;
                    pending().await
                }
                Fate::Hang => pending().await,
                Fate::BadWaker => {
                    let mut told = pin!(cancelled());
                    let waker = Waker::from(Arc::new(BadWaker));
                    let _ = told.as_mut().poll(&mut Context::from_waker(&waker));
                    pending().await
                }
                Fate::StopsWithValue => {
                    cancelled().await;
                    Ok(())
                }
                // A timer of zero takes its time: a caller in a hurry would never get a response.
                Fate::Value(Duration::ZERO) => Ok(()),
                Fate::Value(after) => {
                    sleep(after).await;
                    Ok(())
                }
                Fate::Error(after, failed) => {
                    sleep(after).await;
                    Err(failed)
                }
            }
        })
    }

    /// Consumes until the worker's end, and returns the result, if somebody waited for it.
    async fn consume(self, worker: usize, done: CancellationToken) -> Option<Summary> {
        let Worker {
            tasks,
            reconnects,
            end,
            drain_timeout,
            stop_timeout,
            goes_on,
            ..
        } = self.case.workers[worker];
        let (graceful, forced) = match end {
            End::Done => (None, None),
            End::Graceful(at) => (Some(at), None),
            End::Forced(at, after) => (Some(at), Some(at + after)),
            End::FutureDropped(_) => (None, None),
        };
        let graceful = async move {
            match graceful {
                Some(at) => sleep(at).await,
                None => done.cancelled().await,
            }
        };
        let forced = async move {
            match forced {
                Some(at) => sleep(at).await,
                None => pending().await,
            }
        };
        let after_error = match goes_on {
            true => AfterError::Continue,
            false => AfterError::Stop,
        };
        let consumer: BoxFuture<'static, Summary> = if reconnects {
            let (connecting, making) = (self.clone(), self.clone());
            let consumer = Consumer::reconnecting(
                move || ready(connecting.connect(worker)),
                move |shutdown| making.service(worker, shutdown),
            )
            .tasks(tasks)
            .backoff(MS(5)..=MS(20))
            .random(|| 0.5)
            .with_graceful_shutdown(graceful)
            .with_forced_shutdown(forced)
            .drain_timeout(drain_timeout)
            .stop_timeout(stop_timeout)
            .on_error(after_error)
            .escalation(escalation);
            let ended = consumer.into_future();
            Box::pin(ended.map(|ended| match ended {
                Ok(summary) => summary,
                Err(error) => error.into_parts().1,
            }))
        } else {
            let Ok(deliveries) = self.connect(worker) else {
                return Some(Summary::default());
            };
            let shutdown = CancellationToken::new();
            let services = (0..tasks).map(|_| self.service(worker, shutdown.clone()));
            let consumer = Consumer::parallel(deliveries, services)
                .shutdown(shutdown.clone())
                .with_graceful_shutdown(graceful)
                .with_forced_shutdown(forced)
                .drain_timeout(drain_timeout)
                .stop_timeout(stop_timeout)
                .on_error(after_error)
                .escalation(escalation);
            let ended = consumer.into_future();
            Box::pin(ended.map(|ended| match ended {
                Ok(summary) => summary,
                Err(error) => error.into_parts().1,
            }))
        };
        match end {
            End::FutureDropped(at) => timeout(at, consumer).await.ok(),
            _ => Some(consumer.await),
        }
    }

    /// Publishes the jobs and injects the faults, each at its time.
    async fn drive(self) {
        let start = Instant::now();
        let mut jobs: Vec<_> = self
            .case
            .jobs
            .iter()
            .map(|it| it.published)
            .enumerate()
            .collect();
        jobs.sort_by_key(|(_, at)| *at);
        let mut jobs = jobs.into_iter().peekable();
        let mut faults = self.case.faults.iter().peekable();
        loop {
            let next = jobs.peek().map(|(_, at)| *at);
            let fault = faults.peek().map(|(at, _)| *at);
            if let Some(at) = next.filter(|at| fault.is_none_or(|fault| *at <= fault)) {
                sleep_until(start + at).await;
                if let Some((job, _)) = jobs.next() {
                    self.ledger.publish(job);
                    self.queue.publish(job);
                }
            } else if let Some((at, fault)) = faults.next() {
                sleep_until(start + *at).await;
                match *fault {
                    Fault::DropConnection(worker) => self.disconnect(worker),
                    Fault::DropConnections => self.broker.drop_connections(),
                    Fault::RefuseConnections(n) => self.broker.refuse_connections(n),
                    Fault::FailSettlements(n, fault) => self.queue.fail_settlements(n, fault),
                    Fault::DelaySettlements(delay) => self.queue.delay_settlements(delay),
                }
            } else {
                break;
            }
        }
        self.queue.delay_settlements(Duration::ZERO);
    }

    /// Runs the workers to their ends.
    async fn live(self) -> Result<(), String> {
        let done = CancellationToken::new();
        let workers = 0..self.case.workers.len();
        let workers = workers.map(|worker| self.clone().consume(worker, done.clone()));
        let workers = tokio::spawn(workers.collect::<FuturesUnordered<_>>().collect::<Vec<_>>());
        self.clone().drive().await;
        let lasts = |it: &Worker| it.reconnects && matches!(it.end, End::Done);
        if self.case.workers.iter().any(lasts) {
            let emptied = timeout(FOREVER, self.queue.emptied()).await;
            emptied.map_err(|_| format!("jobs are stuck: {:?}", self.queue.counts()))?;
        }
        done.cancel();
        let ended = timeout(FOREVER, workers).await;
        let ended = ended.map_err(|_| "a consumer hangs")?;
        let summaries = ended.map_err(|error| error.to_string())?;
        for _ in 0..1_000 {
            if Handle::current().metrics().num_alive_tasks() == 0 {
                break;
            }
            sleep(MS(10)).await;
        }
        match Handle::current().metrics().num_alive_tasks() {
            0 => {}
            left => return Err(format!("{left} tasks are left")),
        }
        self.ledger.check_policy()?;
        let mut called = 0;
        for summary in summaries.iter().flatten() {
            let Summary {
                answered,
                failed,
                abandoned,
                ..
            } = *summary;
            if summary.called != answered + failed + abandoned {
                return Err(format!("a summary does not add up: {summary:?}"));
            }
            called += summary.called;
        }
        let deliveries = self.ledger.deliveries();
        if called > deliveries || summaries.iter().all(Option::is_some) && called < deliveries {
            return Err(format!("{called} calls of {deliveries} deliveries"));
        }
        Ok(())
    }

    /// Looks into the queue when all workers are gone, and closes the ledger.
    async fn audit(self) -> Result<(), String> {
        self.broker.refuse_connections(0);
        self.queue.delay_settlements(Duration::ZERO);
        for fault in [SettleFault::Again, SettleFault::Last] {
            self.queue.fail_settlements(0, fault);
        }
        let counts = self.queue.counts();
        if counts.unacked > 0 {
            return Err(format!("a channel is left open: {counts:?}"));
        }
        let left = counts.ready + counts.delayed;
        let mut rest = self.queue.subscribe(1).map_err(|error| error.to_string())?;
        for _ in 0..left {
            let next = timeout(FOREVER, rest.next()).await;
            let Ok(Some(Ok(delivery))) = next else {
                return Err(format!("a job is not delivered: {:?}", self.queue.counts()));
            };
            self.ledger.deliver(&self.queue, 1, &delivery);
            self.ledger.leave(*delivery.payload());
            // At once: it may have a lease, and others come later.
            let reason = Reason::completed(Duration::ZERO);
            let acked = delivery.tag().settle(Verdict::Ack, reason).await;
            acked.map_err(|error| error.to_string())?;
        }
        match self.queue.counts() {
            Counts {
                ready: 0,
                delayed: 0,
                unacked: 0,
                ..
            } => {}
            counts => return Err(format!("there are more jobs than there were: {counts:?}")),
        }
        self.ledger.check(counts, &self.queue.dead_letters())
    }
}

fn escalation(error: &BoxError) -> Escalation {
    match error.downcast_ref::<CallError>() {
        Some(error) => error.escalation(),
        None if error.is::<Elapsed>() => Escalation::Call,
        None => Escalation::Channel,
    }
}

fn check(case: Case) -> Result<(), String> {
    let killed = case.killed;
    let burst = case.burst.map(Burst::new);
    let _subscriber = burst.as_ref().map(Burst::start);
    if let Some(burst) = &burst {
        burst.arm();
    }
    let scene = Scene::new(case);
    let live = scene.clone().live();
    let process = paused_time();
    process.block_on(async {
        match killed {
            None => live.await,
            Some(at) => timeout(at, live).await.unwrap_or(Ok(())),
        }
    })?;
    drop(process);
    paused_time().block_on(scene.audit())
}

#[test]
fn every_job_is_acked_once_or_dead_once_or_still_queued() {
    let seed = match env::var("PROPTEST_RNG_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => RandomState::new().hash_one(CASES),
    };
    let mut runner = TestRunner::new(Config {
        cases: CASES,
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: None,
        max_shrink_iters: 2_000,
        ..Config::default()
    });
    let (began, cases) = channel::<Case>();
    thread::spawn(move || {
        let mut last = None;
        loop {
            match cases.recv_timeout(WATCHDOG) {
                Ok(case) => last = Some(case),
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
        eprintln!("PROPTEST_RNG_SEED={seed}: a case hangs: {last:#?}");
        exit(101);
    });
    let result = runner.run(&case::case(), |case| {
        // Virtual time can't pass while a task wakes itself again and again.
        began.send(case.clone()).unwrap();
        check(case).map_err(TestCaseError::fail)
    });
    if let Err(error) = result {
        panic!("PROPTEST_RNG_SEED={seed}: {error}");
    }
}
