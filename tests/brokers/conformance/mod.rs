//! Requirements on every broker, as scenarios over a [`TestBroker`].
//!
//! A broker implements the trait and instantiates all scenarios with [`scenarios!`]: those that the crate
//! publishes, and those that break connections and kill servers. If a broker lacks a capability, the scenario
//! asserts the refusal that its documentation promises, so each scenario checks something of each broker.
//!
//! Wrong credentials are not tested here, as they differ for each broker. The death of a consumer's process
//! is in `killed_consumer`, with processes, and an outage of a dependency of the jobs in `zombie`.

pub(crate) mod losing;
pub(crate) mod loud;
pub(crate) mod verdicts;
mod worker;

use std::{
    error::Error,
    fmt::{self, Debug},
    future::{Future, poll_fn},
    pin::Pin,
    time::Duration,
};

use futures_util::{StreamExt, future::BoxFuture};
use tokio::time::{Instant, sleep, timeout};
use tower_sentinel::{
    Job, Outcome,
    conformance::{Backlog, ConformanceError, EnvelopeFixture, Fixture},
    consumer::Subscription,
    outcome::{CancelReason, Cancelled, OutcomeKind},
    settle::{Reason, Settle},
};

use self::verdicts::Row;

/// Longest time that an expected event may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Error of an adapter that connects before it subscribes.
#[derive(Debug)]
pub(crate) enum NoSubscription<C, S> {
    Connect(C),
    Subscribe(S),
}

impl<C: fmt::Display, S: fmt::Display> fmt::Display for NoSubscription<C, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoSubscription::Connect(error) => error.fmt(f),
            NoSubscription::Subscribe(error) => error.fmt(f),
        }
    }
}

impl<C: Debug + fmt::Display, S: Debug + fmt::Display> Error for NoSubscription<C, S> {}

/// Connects anew and subscribes, at each call; see [`Consumer::reconnecting`].
///
/// [`Consumer::reconnecting`]: tower_sentinel::Consumer::reconnecting
pub(crate) type Connector<S, E> = Box<dyn FnMut() -> BoxFuture<'static, Result<S, E>> + Send>;

/// An [`EnvelopeFixture`] whose dead letters have a place, and whose connections and server can be broken.
///
/// If one scenario needs two settings of a broker, such as a queue with and one without a feature, there is
/// a type for each.
pub(crate) trait TestBroker: EnvelopeFixture<Error: Error + Send> + Sized {
    /// `true` if the broker has each ack that succeeded: RabbitMQ confirms none.
    const ACK_IS_CONFIRMED: bool;

    /// Number of unproven acks that a kill may take back, if it is known.
    const UNPROVEN: Option<usize> = None;

    /// Number of jobs in a scenario with many jobs.
    const MANY: usize = 2_000;

    /// Returns the kind of queue, and the version of its server: major and minor.
    fn server() -> (&'static str, (u32, u32));

    /// Returns the row of the documentation for this server.
    fn row() -> &'static Row {
        let (queue, version) = Self::server();
        verdicts::row(queue, version)
    }

    /// Starts the server, if need be, with an empty queue.
    async fn start() -> Self;

    /// Like [`start`](Self::start), with a server that may be killed: if several brokers share one, it starts
    /// another.
    async fn start_mortal() -> Self {
        Self::start().await
    }

    /// Removes all that was made.
    async fn stop(self);

    /// Returns a function that connects and subscribes.
    ///
    /// It does not wait for a broker that is down.
    fn connector(&self, prefetch: usize) -> Connector<Self::Subscription, Self::Error>;

    /// Holds up the bytes that consumers send, so that a settlement in flight gets no further.
    async fn stall(&self);

    /// Breaks the connections of all consumers, which ends a [`stall`](Self::stall) for those that
    /// connect from now on.
    async fn cut(&self);

    /// Kills the broker, as by SIGKILL.
    async fn kill(&self);

    /// Starts the broker again after a [`kill`](Self::kill), on the same data.
    async fn revive(&self);
}

/// The jobs of a broker.
pub(crate) type JobOf<B> = <<B as Fixture>::Subscription as Subscription>::Job;

/// The tags of a broker.
pub(crate) type TagOf<B> = <JobOf<B> as Job>::Tag;

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
        $crate::conformance::scenarios! { @published $test, $broker,
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
            each_outcome_settles_as_decided
            a_job_that_cannot_be_decoded_is_rejected_with_a_reason
            a_delivery_limit_ends_a_loop
            a_shutdown_under_load_leaves_nothing_unacked
            a_release_at_drain_is_charged_only_where_the_broker_counts_it
            a_closed_subscription_redelivers_what_it_held
            a_probe_counts_what_waits
            a_job_keeps_its_envelope_when_it_comes_back
        }
        $crate::conformance::scenarios! { @ $test, $broker, start,
            verdicts {
                each_verdict_does_what_the_table_says
            }
            losing {
                a_lost_connection_redelivers_what_it_held
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
    (@published $test:meta, $broker:ty, $($name:ident)*) => {
        $(
            #[$test]
            async fn $name() {
                let broker = <$broker as $crate::conformance::TestBroker>::start().await;
                let passing = tower_sentinel::conformance::$name(&broker);
                $crate::conformance::passes(passing).await;
                $crate::conformance::TestBroker::stop(broker).await;
            }
        )*
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

/// Awaits a published scenario, and panics with its error.
pub(crate) async fn passes<E: Error + 'static>(
    scenario: impl Future<Output = Result<(), ConformanceError<E>>>,
) {
    if let Err(error) = scenario.await {
        let source = error.source().map(ToString::to_string);
        panic!("{error}: {}", source.unwrap_or_default());
    }
}

/// Reads the kind of an outcome from a dead letter.
pub(crate) fn kind(name: &str) -> OutcomeKind {
    let kinds = [
        OutcomeKind::Completed,
        OutcomeKind::Failed,
        OutcomeKind::Panicked,
        OutcomeKind::TimedOut,
        OutcomeKind::Cancelled,
    ];
    let mut kinds = kinds.into_iter();
    kinds.find(|kind| kind.as_str() == name).unwrap()
}

// === driving a broker by hand ===

/// Returns the next job, which must come.
pub(crate) async fn take<B: TestBroker>(jobs: &mut B::Subscription) -> JobOf<B> {
    let next = timeout(PATIENCE, jobs.next()).await;
    next.expect("a job is delivered")
        .expect("the stream goes on")
        .expect("the connection lives")
}

/// Returns `n` jobs, which must come.
pub(crate) async fn take_n<B: TestBroker>(jobs: &mut B::Subscription, n: usize) -> Vec<JobOf<B>> {
    let mut taken = Vec::new();
    while taken.len() < n {
        taken.push(take::<B>(jobs).await);
    }
    taken
}

/// Waits until the subscription is closed, and returns whether it was lost.
pub(crate) async fn is_lost<B: TestBroker>(jobs: &mut B::Subscription) -> bool {
    let closed = poll_fn(|cx| Pin::new(&mut *jobs).poll_closed(cx));
    let closed = timeout(PATIENCE, closed).await;
    closed.expect("the end of a connection is noticed").is_err()
}

/// Waits until a number of jobs is left, and none of them is unacked.
pub(crate) async fn left<B: TestBroker>(broker: &B, n: usize) {
    let wanted = Backlog {
        unacked: 0,
        total: n,
    };
    eventually(wanted, async || broker.backlog().await.unwrap()).await;
}

/// Waits until `found` returns `wanted`.
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

/// Asserts the count, or that there is none where the broker keeps none.
#[track_caller]
pub(crate) fn assert_deliveries<B: TestBroker>(broker: &B, tag: &TagOf<B>, deliveries: u32) {
    let deliveries = broker.counts_deliveries().then_some(deliveries);
    assert_eq!(tag.deliveries(), deliveries);
}

/// The reason of a verdict where no outcome has one.
pub(crate) fn reason() -> Reason {
    Reason::completed(Duration::from_millis(5))
}

/// Returns the reason of a job that is refused as a suspect.
pub(crate) fn suspected() -> Reason {
    let cancelled = Cancelled::new(CancelReason::Suspect, true);
    Reason::of(&Outcome::<(), &str>::Cancelled(cancelled), Duration::ZERO)
}
