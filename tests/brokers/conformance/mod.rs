//! What every broker must do, as scenarios over a [`TestBroker`].
//!
//! A broker implements the trait and instantiates all scenarios with [`scenarios!`]. What a broker
//! can't do is asserted as the refusal that its documentation promises, so each scenario says
//! something of each broker.
//!
//! Not here, as it is different for each broker: wrong credentials. The death of a consumer's
//! process is in `killed_consumer`, with processes, and an outage of what jobs need in `zombie`.

pub(crate) mod losing;
pub(crate) mod loud;
pub(crate) mod settling;
pub(crate) mod supervising;
pub(crate) mod verdicts;
mod worker;

use std::{error::Error, fmt::Debug, future::poll_fn, pin::Pin, time::Duration};

use futures_util::{StreamExt, future::BoxFuture};
use tokio::time::{Instant, sleep, timeout};
use tower_sentinel::{
    Job,
    consumer::Subscription,
    outcome::OutcomeKind,
    settle::{Capabilities, Reason, Settle},
};

use self::verdicts::Row;

/// How long something may take that is to happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// How long to wait for something that must not happen.
pub(crate) const QUIET: Duration = Duration::from_millis(500);

/// Connects anew and subscribes, at each call; see [`Consumer::reconnecting`].
///
/// [`Consumer::reconnecting`]: tower_sentinel::Consumer::reconnecting
pub(crate) type Connector<S, E> = Box<dyn FnMut() -> BoxFuture<'static, Result<S, E>> + Send>;

/// A broker with one queue, which is empty at first and has a place for dead letters.
///
/// Where a broker has settings of which one scenario needs both, such as a queue with and one
/// without a feature, there is a type for each.
pub(crate) trait TestBroker: Sized {
    type Subscription: Subscription<Job = Self::Job, Error = Self::SubscriptionError>
        + Unpin
        + Send
        + 'static;
    type SubscriptionError: Error + Send + 'static;
    type ConnectError: Error + Send + 'static;
    type Job: Job<Tag = Self::Tag> + AsRef<[u8]> + Send + 'static;
    type Tag: Settle<Error = Self::DeliveryError, Future: Send + 'static>
        + Clone
        + Debug
        + Send
        + 'static;
    type DeliveryError: Error + Send + Sync + 'static;

    /// Whether a tag knows how often its job was delivered.
    const COUNTS_DELIVERIES: bool;

    /// Whether an ack that succeeded is one that the broker has: RabbitMQ confirms none.
    const ACK_IS_CONFIRMED: bool;

    /// How many acks without proof a kill may take back, if that is known.
    const UNPROVEN: Option<usize> = None;

    /// Whether what was given back is no longer [unacked](Backlog::unacked) before it is delivered
    /// again: JetStream's count can't tell them apart.
    const TELLS_GIVEN_BACK: bool = true;

    /// After which time the broker gives a job to another consumer, if it ever does while the
    /// connection lives. About 2 s: scenarios hold jobs for 1 s, and one waits until it is over.
    const REDELIVERY: Option<Duration>;

    /// How many jobs there are in a scenario that is about many.
    const MANY: usize = 2_000;

    /// Returns the kind of queue, and the version of its server: major and minor.
    fn server() -> (&'static str, (u32, u32));

    /// Returns what the documentation says of this server.
    fn row() -> &'static Row {
        let (queue, version) = Self::server();
        verdicts::row(queue, version)
    }

    /// Returns what a tag must say when it is asked.
    fn capabilities() -> Capabilities;

    /// Starts the server, if need be, with an empty queue.
    async fn start() -> Self;

    /// As [`start`](Self::start), with a server that may be killed: where several brokers share one,
    /// one of its own.
    async fn start_mortal() -> Self {
        Self::start().await
    }

    /// Removes all that was made.
    async fn stop(self);

    /// Publishes a job, which the broker has when this returns.
    async fn publish(&self, body: &str);

    /// Returns what connects and subscribes.
    ///
    /// It does not wait for a broker that is down.
    fn connector(&self, prefetch: usize) -> Connector<Self::Subscription, Self::ConnectError>;

    /// Connects and subscribes once.
    async fn subscribe(&self, prefetch: usize) -> Result<Self::Subscription, Self::ConnectError> {
        self.connector(prefetch)().await
    }

    /// Counts what is not acked and not rejected.
    async fn backlog(&self) -> Backlog;

    /// Returns what was rejected, in any order; empty where nothing is kept.
    async fn dead_letters(&self) -> Vec<DeadLetter>;

    /// Holds up what consumers send, so that an answer that is being given gets no further.
    async fn stall(&self);

    /// Breaks the connections of all consumers, which ends a [`stall`](Self::stall) for those that
    /// connect from now on.
    async fn cut(&self);

    /// Kills the broker, as by SIGKILL.
    async fn kill(&self);

    /// Starts the broker again after a [`kill`](Self::kill), on the same data.
    async fn revive(&self);
}

/// How many jobs a queue has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Backlog {
    /// Delivered and not answered, as the broker counts it. Where the broker can't tell them
    /// apart, it may include what was given back and is not delivered again.
    pub(crate) unacked: usize,
    /// All that is not done with: waiting, delayed and unacked.
    pub(crate) total: usize,
}

/// What is kept of a job that was rejected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DeadLetter {
    pub(crate) body: String,
    pub(crate) kind: OutcomeKind,
    pub(crate) message: Option<String>,
}

/// Instantiates every scenario for a broker.
///
/// The first argument is the attribute that makes a test of an `async fn`.
macro_rules! scenarios {
    ($test:meta, $broker:ty) => {
        #[$test]
        async fn jobs_are_settled_though_each_event_panics() {
            let test = "jobs_are_settled_though_each_event_panics";
            $crate::conformance::loud::in_a_child::<$broker>(module_path!(), test).await;
        }
        $crate::conformance::scenarios! { @ $test, $broker, start,
            settling {
                an_ack_removes_the_job
                a_retry_redelivers_with_the_count_raised
                a_delayed_retry_is_not_seen_before_its_time
                a_reject_is_kept_with_its_reason
                a_release_is_free_where_the_broker_can_tell
                prefetch_holds
                a_second_settlement_is_refused
                the_order_of_settling_is_free
                keep_alive_holds_a_job_past_the_redelivery_time
                a_tag_tells_what_its_broker_can_do
            }
            supervising {
                each_outcome_settles_as_decided
                a_job_that_cannot_be_decoded_is_rejected_with_a_reason
                a_delivery_limit_ends_a_loop
                a_shutdown_under_load_leaves_nothing_unacked
                a_release_at_drain_is_charged_only_where_the_broker_counts_it
            }
            verdicts {
                each_verdict_does_what_the_table_says
            }
            losing {
                a_lost_connection_redelivers_what_it_held
                a_closed_subscription_redelivers_what_it_held
                a_stale_tag_is_refused_while_its_twin_settles
                a_cut_in_the_middle_of_a_settlement_loses_nothing
                a_job_of_a_lost_connection_holds_up_no_other
            }
        }
        $crate::conformance::scenarios! { @ $test, $broker, start_mortal,
            verdicts {
                a_kill_after_each_verdict_does_what_the_table_says
            }
            losing {
                a_broker_that_is_down_is_an_error_of_connecting
                a_consumer_waits_for_a_broker_that_is_down_at_the_start
                a_consumer_with_a_limit_of_tries_tells_that_the_broker_is_down
                a_killed_broker_ends_the_subscription
                no_job_is_lost_when_the_broker_is_killed
                no_job_is_lost_in_twenty_kills
            }
        }
    };
    (@ $test:meta, $broker:ty, $start:ident, $($module:ident { $($name:ident)* })*) => {
        $($(
            #[$test]
            async fn $name() {
                let broker = <$broker as $crate::conformance::TestBroker>::$start().await;
                $crate::conformance::$module::$name(&broker).await;
                $crate::conformance::TestBroker::stop(broker).await;
            }
        )*)*
    };
}
pub(crate) use scenarios;

// === driving a broker by hand ===

/// Returns the next job, which must come.
pub(crate) async fn take<B: TestBroker>(jobs: &mut B::Subscription) -> B::Job {
    let next = timeout(PATIENCE, jobs.next()).await;
    next.expect("a job is delivered")
        .expect("the stream goes on")
        .expect("the connection lives")
}

/// Returns `n` jobs, which must come.
pub(crate) async fn take_n<B: TestBroker>(jobs: &mut B::Subscription, n: usize) -> Vec<B::Job> {
    let mut taken = Vec::new();
    while taken.len() < n {
        taken.push(take::<B>(jobs).await);
    }
    taken
}

/// Sees to it that no job comes for a while.
pub(crate) async fn assert_quiet<B: TestBroker>(jobs: &mut B::Subscription) {
    let next = timeout(QUIET, jobs.next()).await;
    if let Ok(item) = next {
        panic!("delivered {:?}", item.map(|job| job.map(|job| body(&job))));
    }
}

/// Waits until the subscription is closed, and returns whether it was lost.
pub(crate) async fn is_lost<B: TestBroker>(jobs: &mut B::Subscription) -> bool {
    let closed = poll_fn(|cx| Pin::new(&mut *jobs).poll_closed(cx));
    let closed = timeout(PATIENCE, closed).await;
    closed.expect("the end of a connection is noticed").is_err()
}

/// Gives the subscription up.
pub(crate) async fn close<B: TestBroker>(jobs: &mut B::Subscription) {
    let closed = poll_fn(|cx| Pin::new(&mut *jobs).poll_close(cx));
    timeout(PATIENCE, closed).await.expect("a channel closes");
}

/// Waits until a number of jobs is left, and none of them is unacked.
pub(crate) async fn left<B: TestBroker>(broker: &B, n: usize) {
    let wanted = Backlog {
        unacked: 0,
        total: n,
    };
    eventually(wanted, async || broker.backlog().await).await;
}

/// Waits until `found` is what is wanted.
pub(crate) async fn eventually<T: PartialEq + Debug>(wanted: T, found: impl AsyncFn() -> T) {
    let started = Instant::now();
    loop {
        let found = found().await;
        if found == wanted {
            return;
        }
        assert!(started.elapsed() < PATIENCE, "{found:?} is not {wanted:?}");
        sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) fn body(job: &impl AsRef<[u8]>) -> String {
    String::from_utf8_lossy(job.as_ref()).into_owned()
}

pub(crate) fn bodies<J: AsRef<[u8]>>(jobs: &[J]) -> Vec<String> {
    jobs.iter().map(body).collect()
}

pub(crate) fn sorted(mut bodies: Vec<String>) -> Vec<String> {
    bodies.sort_unstable();
    bodies
}

/// The reason of a verdict where no outcome has one.
pub(crate) fn reason() -> Reason {
    Reason::completed(Duration::from_millis(5))
}
