//! The seed scenario: a queue with prefetch 5 whose workers throw half of the time.
//!
//! A supervisor with a limit on restarts gives up in this scenario. Here it ends with every job acknowledged.

use std::{
    collections::{HashMap, VecDeque},
    future::{self, Future},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    sync::{Notify, Semaphore},
    task::{JoinSet, yield_now},
    time::{Instant, sleep},
};
use tower::{Service, ServiceBuilder, ServiceExt, limit::GlobalConcurrencyLimitLayer, service_fn};
use tower_sentinel::{Job, Outcome, Report, SentinelError, SentinelLayer, outcome::OutcomeKind};

const JOBS: usize = 100;
const PREFETCH: usize = 5;

// === The queue ===

/// A queue with RabbitMQ's semantics as far as the scenario needs them: a delivery tag for each delivery, one
/// settlement for each tag, and nacked jobs go back.
///
/// It does *not* hold deliveries back at the prefetch: it counts them, and the gate has to hold them.
#[derive(Default)]
struct Queue {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    ready: VecDeque<Message>,
    unacked: HashMap<u64, Message>,
    max_unacked: usize,
    next_tag: u64,
    /// Number of acknowledgements of each job.
    acks: HashMap<usize, usize>,
    nacks: usize,
}

#[derive(Clone, Copy, Debug)]
struct Message {
    job: usize,
    attempt: u32,
}

#[derive(Debug)]
struct Delivery {
    tag: u64,
    message: Message,
}

impl Job for Delivery {
    type Tag = u64;

    fn tag(&self) -> u64 {
        self.tag
    }
}

impl Queue {
    fn with_jobs(jobs: usize) -> Arc<Self> {
        let queue = Self::default();
        queue.publish(0..jobs);
        Arc::new(queue)
    }

    fn publish(&self, jobs: impl Iterator<Item = usize>) {
        let messages = jobs.map(|job| Message { job, attempt: 0 });
        self.lock().ready.extend(messages);
        self.changed.notify_one();
    }

    /// Returns the next delivery; none, once nothing is ready and nothing can come back.
    async fn next(&self) -> Option<Delivery> {
        loop {
            {
                let state = &mut *self.lock();
                if let Some(message) = state.ready.pop_front() {
                    let tag = state.next_tag;
                    state.next_tag += 1;
                    state.unacked.insert(tag, message);
                    state.max_unacked = state.max_unacked.max(state.unacked.len());
                    return Some(Delivery { tag, message });
                }
                if state.unacked.is_empty() {
                    return None;
                }
            }
            self.changed.notified().await;
        }
    }

    /// Settles `tag`. A second settlement of the same tag closes a channel of RabbitMQ.
    fn settle(&self, tag: u64, ack: bool) -> Result<(), &'static str> {
        {
            let state = &mut *self.lock();
            let message = state.unacked.remove(&tag).ok_or("unknown delivery tag")?;
            if ack {
                *state.acks.entry(message.job).or_default() += 1;
            } else {
                state.nacks += 1;
                state.ready.push_back(Message {
                    attempt: message.attempt + 1,
                    ..message
                });
            }
        }
        self.changed.notify_one();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Every one of `jobs` jobs was acknowledged once, and nothing is left over.
    #[track_caller]
    fn assert_done(&self, jobs: usize) {
        let state = self.lock();
        assert_eq!(state.acks.len(), jobs, "a job was lost");
        assert!(state.acks.values().all(|&acks| acks == 1), "acked twice");
        assert!(state.ready.is_empty() && state.unacked.is_empty());
        assert_eq!(state.next_tag as usize, jobs + state.nacks);
    }
}

// === The consumer ===

/// Throws as a worker does: in its `call`, at once, after an await; now and then it just fails.
///
/// With `resume_unwind`, so that the panic hook does not print thousands of messages.
fn throw() -> ! {
    std::panic::resume_unwind(Box::new("thrown"))
}

/// A coin for each attempt at each job, the same on every run (the finalizer of SplitMix64).
fn hash(Message { job, attempt }: Message) -> u64 {
    let mut hash = (job as u64) << 32 | u64::from(attempt);
    hash = hash.wrapping_add(0x9e37_79b9_7f4a_7c15);
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

fn throws(message: Message) -> bool {
    hash(message) & 1 == 0
}

type Work = Pin<Box<dyn Future<Output = Result<(), &'static str>> + Send>>;

/// A job that fails in one of four ways, chosen by `number`.
fn fail(number: u64) -> Work {
    match number % 4 {
        0 => throw(),
        1 => Box::pin(async { throw() }),
        2 => Box::pin(async {
            yield_now().await;
            throw()
        }),
        _ => Box::pin(future::ready(Err("no"))),
    }
}

/// Consumes `queue` with the service that `work` is, until all of it is acknowledged, and
/// returns how many deliveries had each outcome.
async fn consume<S>(queue: &Arc<Queue>, work: S) -> HashMap<OutcomeKind, usize>
where
    S: Service<Delivery, Response = (), Error = &'static str, Future: Send + 'static>
        + Clone
        + Send
        + 'static,
{
    let permits = Arc::new(Semaphore::new(PREFETCH));
    let policy = {
        let queue = Arc::clone(queue);
        service_fn(move |report: Report<u64, (), &'static str>| {
            let queue = Arc::clone(&queue);
            async move {
                // An ack is a round trip, during which its job is unsettled.
                yield_now().await;
                queue.settle(report.tag, report.outcome.is_completed())?;
                Ok::<_, &'static str>(report.outcome.kind())
            }
        })
    };
    let mut service = ServiceBuilder::new()
        .layer(GlobalConcurrencyLimitLayer::with_semaphore(Arc::clone(
            &permits,
        )))
        .layer(SentinelLayer::new(policy))
        .service(work);

    let mut responses = JoinSet::new();
    loop {
        // The gate first: a job that is pulled from the queue is unacked.
        service.ready().await.unwrap();
        let Some(delivery) = queue.next().await else {
            break;
        };
        responses.spawn(service.call(delivery));
    }
    let mut kinds = HashMap::new();
    for settled in responses.join_all().await {
        *kinds.entry(settled.unwrap()).or_default() += 1;
    }
    drop(service);
    assert_eq!(permits.available_permits(), PREFETCH);
    kinds
}

/// Returns the most deliveries that were unacked at once.
async fn half_of_all_attempts_throw() -> usize {
    let queue = Queue::with_jobs(JOBS);
    let kinds = consume(
        &queue,
        service_fn(|Delivery { message, .. }: Delivery| -> Work {
            if throws(message) {
                return fail(hash(message) >> 1);
            }
            Box::pin(async {
                yield_now().await;
                Ok(())
            })
        }),
    )
    .await;

    queue.assert_done(JOBS);
    // The coins are known, so the whole run is: each attempt is made once, and none is made
    // after the one that does not throw.
    let failing = (0..JOBS).flat_map(|job| {
        let attempts = (0..).map(move |attempt| Message { job, attempt });
        attempts.take_while(|&message| throws(message))
    });
    let (failed, panicked): (Vec<_>, Vec<_>) =
        failing.partition(|&message| (hash(message) >> 1) % 4 == 3);
    assert!(
        (80..120).contains(&(failed.len() + panicked.len())),
        "a fair coin"
    );
    let expected = HashMap::from([
        (OutcomeKind::Completed, JOBS),
        (OutcomeKind::Failed, failed.len()),
        (OutcomeKind::Panicked, panicked.len()),
    ]);
    assert_eq!(kinds, expected);
    let state = queue.lock();
    assert_eq!(state.nacks, failed.len() + panicked.len());
    state.max_unacked
}

#[tokio::test(start_paused = true)]
async fn workers_that_throw_half_of_the_time_get_100_of_100_jobs_acked() {
    assert_eq!(half_of_all_attempts_throw().await, PREFETCH);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn workers_that_throw_half_of_the_time_get_100_of_100_jobs_acked_on_many_threads() {
    // Up to the scheduler, unlike above, is only whether there ever were as many as allowed.
    assert!(half_of_all_attempts_throw().await <= PREFETCH);
}

#[tokio::test(start_paused = true)]
async fn a_dependency_that_fails_every_job_for_a_second_leaves_consumption_alive() {
    let queue = Queue::with_jobs(JOBS);
    let began = Instant::now();
    let back = began + Duration::from_secs(1);
    let work = service_fn(move |Delivery { tag, .. }: Delivery| -> Work {
        if Instant::now() < back {
            return match tag % 2 {
                // Refused at once, at any point.
                0 => fail(tag / 2),
                // Or after a round trip.
                _ => Box::pin(async {
                    sleep(Duration::from_millis(1)).await;
                    throw()
                }),
            };
        }
        Box::pin(async {
            sleep(Duration::from_millis(1)).await;
            Ok(())
        })
    });
    let kinds = consume(&queue, work).await;

    // All of it is over soon after the dependency is back, which took thousands of failures.
    let finished = began.elapsed();
    assert!(finished >= Duration::from_secs(1), "{finished:?}");
    assert!(finished < Duration::from_millis(1_100), "{finished:?}");
    queue.assert_done(JOBS);
    let nacks = queue.lock().nacks;
    assert!(nacks >= 2_000, "{nacks} failures within a second");
    assert_eq!(kinds[&OutcomeKind::Completed], JOBS);
    assert_eq!(
        kinds[&OutcomeKind::Failed] + kinds[&OutcomeKind::Panicked],
        nacks
    );
    assert!(kinds[&OutcomeKind::Panicked] > kinds[&OutcomeKind::Failed]);
    assert_eq!(queue.lock().max_unacked, PREFETCH);

    // Jobs that are published afterwards are consumed too.
    queue.publish(JOBS..2 * JOBS);
    let kinds = consume(&queue, work).await;
    assert_eq!(kinds, HashMap::from([(OutcomeKind::Completed, JOBS)]));
    queue.assert_done(2 * JOBS);
}

/// A dependency that says in `poll_ready` whether it is up.
#[derive(Clone)]
struct Dependency {
    back: Instant,
}

impl Service<Delivery> for Dependency {
    type Response = ();
    type Error = &'static str;
    type Future = future::Ready<Result<(), &'static str>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), &'static str>> {
        if Instant::now() < self.back {
            return Poll::Ready(Err("connection refused"));
        }
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Delivery) -> Self::Future {
        future::ready(Ok(()))
    }
}

#[tokio::test(start_paused = true)]
async fn g3_a_dependency_that_is_known_to_be_down_costs_no_job_an_attempt() {
    let queue = Queue::with_jobs(JOBS);
    let policy = {
        let queue = Arc::clone(&queue);
        service_fn(move |report: Report<u64, (), &'static str>| {
            let outcome: Outcome<(), _> = report.outcome;
            let settled = queue.settle(report.tag, outcome.is_completed());
            future::ready(settled.map(|()| outcome.kind()))
        })
    };
    let mut service = ServiceBuilder::new()
        .concurrency_limit(PREFETCH)
        .layer(SentinelLayer::new(policy))
        .service(Dependency {
            back: Instant::now() + Duration::from_secs(1),
        });

    let mut refusals = 0;
    for _ in 0..JOBS {
        while let Err(error) = service.ready().await.map(drop) {
            assert!(matches!(
                error,
                SentinelError::Unready("connection refused")
            ));
            refusals += 1;
            assert_eq!(
                queue.lock().next_tag,
                0,
                "a job was delivered to a dead service"
            );
            sleep(Duration::from_millis(1)).await;
        }
        let delivery = queue.next().await.unwrap();
        assert_eq!(
            service.call(delivery).await.unwrap(),
            OutcomeKind::Completed
        );
    }
    assert!(refusals >= 500, "{refusals}");
    queue.assert_done(JOBS);
    assert_eq!(queue.lock().nacks, 0);
}
