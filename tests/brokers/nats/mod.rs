//! `broker::nats` against a private `nats-server`.

mod breaking;
mod conformance;
mod delayed;
mod priorities;
pub(crate) mod server;
mod settings;
mod unreadable;

use std::{
    collections::HashMap,
    future::poll_fn,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tower::{Service, ServiceBuilder, ServiceExt};
use tower_sentinel::{
    Job, Outcome, Panic, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::nats::{
        ConnectError, Deliveries, Delivery, DeliveryError, Pull, SubscriptionError,
        async_nats::{
            Client, HeaderMap,
            jetstream::{
                self, Context,
                consumer::{self, PullConsumer, pull},
                stream::{self, RetentionPolicy},
            },
        },
        connect,
    },
    consumer::Subscription,
    settle::{Lease, Messaging, Reason, Settle},
};

use self::server::{Server, free_port};

const SOON: Duration = Duration::from_secs(10);

struct Jobs {
    server: Server,
    client: Client,
    context: Context,
    consumer: PullConsumer,
}

/// Starts a server with a work queue `jobs`, a stream `dead`, and a consumer.
async fn jobs(ack_wait: Duration) -> Jobs {
    jobs_of(RetentionPolicy::WorkQueue, ack_wait).await
}

async fn jobs_of(retention: RetentionPolicy, ack_wait: Duration) -> Jobs {
    let server = Server::start();
    let client = connect(&server.address()).await.unwrap();
    let context = jetstream::new(client.clone());
    for (name, retention) in [("jobs", retention), ("dead", RetentionPolicy::Limits)] {
        let config = stream::Config {
            name: name.into(),
            subjects: vec![name.into()],
            retention,
            ..stream::Config::default()
        };
        context.create_stream(config).await.unwrap();
    }
    let config = pull::Config {
        durable_name: Some("workers".into()),
        ack_wait,
        ..pull::Config::default()
    };
    let consumer = context.create_consumer_on_stream(config, "jobs");
    let consumer = consumer.await.unwrap();
    Jobs {
        server,
        client,
        context,
        consumer,
    }
}

impl Jobs {
    fn pull(&self) -> Pull {
        Pull::new("jobs", "workers").idle_heartbeat(Duration::from_millis(250))
    }

    async fn subscribe(&self, prefetch: usize) -> Deliveries {
        let pull = self.pull().prefetch(prefetch);
        pull.subscribe(&self.context).await.unwrap()
    }

    async fn publish(&self, payload: impl Into<String>) {
        let ack = self.context.publish("jobs", payload.into().into()).await;
        ack.unwrap().await.unwrap();
    }

    async fn info(&self) -> consumer::Info {
        self.consumer.get_info().await.unwrap()
    }

    async fn messages(&self, stream: &str) -> u64 {
        let stream = self.context.get_stream(stream).await.unwrap();
        stream.get_info().await.unwrap().state.messages
    }
}

async fn next(deliveries: &mut Deliveries) -> Delivery {
    let next = timeout(SOON, deliveries.next()).await;
    next.expect("a job is delivered").unwrap().unwrap()
}

async fn nothing_within(deliveries: &mut Deliveries, time: Duration) {
    let next = timeout(time, deliveries.next()).await;
    assert!(next.is_err(), "nothing is delivered: {next:?}");
}

async fn settle(delivery: &Delivery, verdict: Verdict) -> Result<(), DeliveryError> {
    let settling = delivery.tag().settle(verdict, reason("it failed"));
    settling.await.map_err(|unsettled| unsettled.error)
}

fn reason(message: &str) -> Reason {
    Reason::of(&Outcome::<(), _>::Failed(message), Duration::ZERO)
}

async fn closed(deliveries: &mut Deliveries) -> Result<(), SubscriptionError> {
    let closed = poll_fn(|cx| Pin::new(&mut *deliveries).poll_closed(cx));
    timeout(SOON, closed).await.expect("the end is noticed")
}

async fn stop(deliveries: &mut Deliveries) {
    let stop = poll_fn(|cx| Pin::new(&mut *deliveries).poll_stop(cx));
    timeout(SOON, stop).await.expect("it stops");
}

async fn close(deliveries: &mut Deliveries) {
    let close = poll_fn(|cx| Pin::new(&mut *deliveries).poll_close(cx));
    timeout(SOON, close).await.expect("it closes");
}

#[tokio::test]
async fn an_ack_removes() {
    let jobs = jobs(SOON).await;
    jobs.publish("a").await;
    let mut deliveries = jobs.subscribe(2).await;
    let job = next(&mut deliveries).await;
    assert_eq!(job.as_ref(), b"a");
    assert_eq!(job.subject().as_str(), "jobs");
    assert_eq!(job.tag().deliveries(), Some(1));
    assert_eq!(job.tag().redelivered(), Some(false));
    settle(&job, Verdict::Ack).await.unwrap();
    assert_eq!(jobs.messages("jobs").await, 0);
    assert_eq!(jobs.info().await.num_ack_pending, 0);
}

#[tokio::test]
async fn retry_and_release_redeliver_and_count() {
    let jobs = jobs(SOON).await;
    jobs.publish("a").await;
    let mut deliveries = jobs.subscribe(2).await;
    let job = next(&mut deliveries).await;
    assert!(!job.tag().capabilities().release_is_free());
    settle(&job, Verdict::retry()).await.unwrap();
    let job = next(&mut deliveries).await;
    assert_eq!(job.tag().deliveries(), Some(2));
    settle(&job, Verdict::release()).await.unwrap();
    let job = next(&mut deliveries).await;
    assert_eq!(job.tag().deliveries(), Some(3));
    assert_eq!(job.tag().redelivered(), Some(true));
    settle(&job, Verdict::Ack).await.unwrap();
}

#[tokio::test]
async fn a_delayed_retry_is_not_seen_before_its_time() {
    let jobs = jobs(SOON).await;
    jobs.publish("a").await;
    let mut deliveries = jobs.subscribe(2).await;
    let job = next(&mut deliveries).await;
    let delay = Duration::from_millis(700);
    let start = Instant::now();
    settle(&job, Verdict::retry_after(delay)).await.unwrap();
    let job = next(&mut deliveries).await;
    let elapsed = start.elapsed();
    assert!(elapsed >= delay, "{elapsed:?}");
    assert!(elapsed < delay * 2, "{elapsed:?}");
    assert_eq!(job.tag().deliveries(), Some(2));
}

#[tokio::test]
async fn a_reject_without_a_dead_letter_subject_drops() {
    let jobs = jobs(SOON).await;
    jobs.publish("a").await;
    let mut deliveries = jobs.subscribe(2).await;
    let job = next(&mut deliveries).await;
    assert!(!job.tag().capabilities().has_dead_letter());
    settle(&job, Verdict::Reject).await.unwrap();
    assert_eq!(jobs.messages("jobs").await, 0);
    assert_eq!(jobs.messages("dead").await, 0);
}

#[tokio::test]
async fn a_reject_keeps_the_message_and_its_reason() {
    let jobs = jobs(SOON).await;
    let mut headers = jobs_headers();
    headers.insert("Nats-Msg-Id", "original");
    headers.insert("Nats-Expected-Stream", "jobs");
    let ack = jobs
        .context
        .publish_with_headers("jobs", headers, "a".into());
    ack.await.unwrap().await.unwrap();
    let pull = jobs.pull().prefetch(2).dead_letter("dead");
    let mut deliveries = pull.subscribe(&jobs.context).await.unwrap();
    let job = next(&mut deliveries).await;
    settle(&job, Verdict::retry()).await.unwrap();
    let job = next(&mut deliveries).await;
    assert!(job.tag().capabilities().has_dead_letter());

    let outcome = Outcome::<(), &str>::Panicked(Panic::new("index 7\nis out of range"));
    let reason = Reason::of(&outcome, Duration::ZERO);
    job.tag().settle(Verdict::Reject, reason).await.unwrap();
    assert_eq!(jobs.messages("jobs").await, 0);

    let dead = jobs.context.get_stream("dead").await.unwrap();
    let dead = dead.get_raw_message(1).await.unwrap();
    let header = |name| dead.headers.get(name).map(|value| value.as_str());
    assert_eq!(&dead.payload[..], b"a");
    assert_eq!(header("x-outcome-kind"), Some("panicked"));
    assert_eq!(header("x-outcome-message"), Some("index 7 is out of range"));
    assert_eq!(header("x-deliveries"), Some("2"));
    assert_eq!(header("trace"), Some("1"));
    assert_eq!(header("Nats-Expected-Stream"), None);
    assert_ne!(header("Nats-Msg-Id"), Some("original"));
    assert_eq!(header("x-original-message-id"), Some("original"));
    let time = header("x-outcome-time").unwrap().parse::<u128>().unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let age = now.unwrap().as_millis() - time;
    assert!(age < SOON.as_millis(), "{age}");
}

fn jobs_headers() -> tower_sentinel::broker::nats::async_nats::HeaderMap {
    let mut headers = tower_sentinel::broker::nats::async_nats::HeaderMap::new();
    headers.insert("trace", "1");
    headers
}

#[tokio::test]
async fn a_reject_that_is_tried_again_leaves_one_dead_letter() {
    let mut jobs = jobs(SOON * 6).await;
    jobs.publish("a").await;
    let pull = jobs
        .pull()
        .dead_letter("dead")
        .confirm_timeout(Duration::from_millis(300));
    let mut deliveries = pull.subscribe(&jobs.context).await.unwrap();
    let job = next(&mut deliveries).await;

    // Two tries are sent, both after the restart.
    jobs.server.kill();
    let unsettled = job.tag().settle(Verdict::Reject, reason("bad")).await;
    let unsettled = unsettled.unwrap_err();
    assert!(
        matches!(unsettled.error, DeliveryError::Unconfirmed { .. }),
        "{unsettled}"
    );
    jobs.server.restart();
    let mut tag = unsettled.tag.expect("a reject may be tried again");
    while let Err(unsettled) = tag.settle(Verdict::Reject, reason("bad")).await {
        tag = unsettled.tag.expect("a reject may be tried again");
        sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(jobs.messages("jobs").await, 0);
    assert_eq!(jobs.messages("dead").await, 1);
}

#[tokio::test]
async fn a_dead_letter_that_no_stream_keeps_is_told_before_the_first_job() {
    let jobs = jobs(SOON).await;
    let error = jobs
        .pull()
        .dead_letter("nowhere")
        .subscribe(&jobs.context)
        .await;
    let error = error.unwrap_err();
    assert!(
        matches!(&error, SubscriptionError::NoDeadLetterStream { subject, .. } if subject == "nowhere"),
        "{error}"
    );
}

#[tokio::test]
async fn a_job_whose_dead_letter_is_not_kept_is_not_rejected() {
    let jobs = jobs(SOON).await;
    jobs.publish("a").await;
    let pull = jobs.pull().dead_letter("dead");
    let mut deliveries = pull.subscribe(&jobs.context).await.unwrap();
    let job = next(&mut deliveries).await;
    jobs.context.delete_stream("dead").await.unwrap();
    let unsettled = job.tag().settle(Verdict::Reject, reason("bad")).await;
    let unsettled = unsettled.unwrap_err();
    assert!(
        matches!(unsettled.error, DeliveryError::DeadLetter(_)),
        "{unsettled}"
    );
    assert!(unsettled.tag.is_some());
    assert_eq!(jobs.messages("jobs").await, 1);
}

#[tokio::test]
async fn an_abandoned_job_comes_back_after_the_ack_wait() {
    let ack_wait = Duration::from_secs(1);
    let jobs = jobs(ack_wait).await;
    jobs.publish("a").await;
    let mut deliveries = jobs.subscribe(1).await;
    let start = Instant::now();
    let job = next(&mut deliveries).await;
    settle(&job, Verdict::Abandon).await.unwrap();
    let job = next(&mut deliveries).await;
    assert!(start.elapsed() >= ack_wait - Duration::from_millis(50));
    assert_eq!(job.tag().deliveries(), Some(2));
}

#[tokio::test]
async fn a_second_settlement_is_refused() {
    let jobs = jobs(SOON).await;
    jobs.publish("a").await;
    let mut deliveries = jobs.subscribe(2).await;
    let job = next(&mut deliveries).await;
    let twin = job.tag().clone();
    settle(&job, Verdict::Ack).await.unwrap();
    for tag in [job.tag(), twin] {
        let unsettled = tag.settle(Verdict::retry(), reason("again")).await;
        let unsettled = unsettled.unwrap_err();
        assert!(matches!(unsettled.error, DeliveryError::AlreadySettled));
        assert!(unsettled.tag.is_none());
    }
}

#[tokio::test]
async fn the_order_of_answers_is_free() {
    let jobs = jobs(SOON).await;
    let mut deliveries = jobs.subscribe(8).await;
    for i in 0..8 {
        jobs.publish(i.to_string()).await;
    }
    let mut taken = Vec::new();
    for _ in 0..8 {
        taken.push(next(&mut deliveries).await);
    }
    for i in [7, 0, 5, 2, 6, 1, 4, 3] {
        settle(&taken[i], Verdict::Ack).await.unwrap();
    }
    assert_eq!(jobs.messages("jobs").await, 0);
}

#[tokio::test]
async fn no_more_is_fetched_than_there_are_places() {
    let jobs = jobs(SOON).await;
    for i in 0..20 {
        jobs.publish(i.to_string()).await;
    }
    let mut deliveries = jobs.subscribe(5).await;
    let mut taken = Vec::new();
    for _ in 0..5 {
        taken.push(next(&mut deliveries).await);
    }
    nothing_within(&mut deliveries, Duration::from_millis(500)).await;
    assert_eq!(jobs.info().await.num_ack_pending, 5);

    // An answer frees one place, a delivery that is dropped with its tags another.
    settle(&taken.pop().unwrap(), Verdict::Ack).await.unwrap();
    taken.push(next(&mut deliveries).await);
    nothing_within(&mut deliveries, Duration::from_millis(300)).await;
    assert_eq!(jobs.info().await.num_ack_pending, 5);
    let tag = taken.pop().unwrap().tag();
    nothing_within(&mut deliveries, Duration::from_millis(300)).await;
    drop(tag);
    taken.push(next(&mut deliveries).await);
    nothing_within(&mut deliveries, Duration::from_millis(300)).await;
    assert_eq!(jobs.info().await.num_ack_pending, 6);
}

/// A client that fetches ahead lets the ack wait of what it has fetched pass.
#[tokio::test]
async fn a_slow_worker_gets_each_job_once() {
    let jobs = jobs(Duration::from_millis(600)).await;
    for i in 0..40 {
        jobs.publish(i.to_string()).await;
    }
    let deliveries = jobs.subscribe(4).await;
    let counts = Arc::new(Mutex::new(HashMap::new()));
    let run = run(deliveries, Arc::clone(&counts), Duration::from_millis(100));
    let worker = tokio::spawn(run);
    let mut most = 0;
    while jobs.messages("jobs").await > 0 {
        most = most.max(jobs.info().await.num_ack_pending);
        sleep(Duration::from_millis(10)).await;
    }
    worker.abort();
    assert_eq!(most, 4);
    let counts = counts.lock().unwrap();
    assert_eq!(counts.len(), 40);
    assert!(counts.values().all(|&count| count == 1), "{counts:?}");
}

#[tokio::test]
async fn what_nobody_polled_for_the_ack_wait_is_not_run() {
    let jobs = jobs(Duration::from_millis(500)).await;
    let mut deliveries = jobs.subscribe(3).await;
    for payload in ["a", "b", "c"] {
        jobs.publish(payload).await;
    }
    let first = next(&mut deliveries).await;
    settle(&first, Verdict::Ack).await.unwrap();
    // They are seen, and wait here, while the worker is not ready.
    assert!(
        timeout(Duration::from_millis(700), closed_now(&mut deliveries))
            .await
            .is_err()
    );
    for _ in 0..2 {
        let job = next(&mut deliveries).await;
        assert_eq!(job.tag().deliveries(), Some(2), "{job:?}");
        settle(&job, Verdict::Ack).await.unwrap();
    }
    assert_eq!(jobs.messages("jobs").await, 0);
}

async fn closed_now(deliveries: &mut Deliveries) -> Result<(), SubscriptionError> {
    poll_fn(|cx| Pin::new(&mut *deliveries).poll_closed(cx)).await
}

#[tokio::test]
async fn a_keep_alive_holds_a_job_past_the_ack_wait() {
    let jobs = jobs(Duration::from_secs(1)).await;
    jobs.publish("a").await;
    let mut deliveries = jobs.subscribe(2).await;
    let job = next(&mut deliveries).await;
    for _ in 0..8 {
        nothing_within(&mut deliveries, Duration::from_millis(400)).await;
        assert_eq!(job.tag().keep_alive().await.unwrap(), Lease::Held);
    }
    settle(&job, Verdict::Ack).await.unwrap();
    assert_eq!(jobs.messages("jobs").await, 0);
}

#[tokio::test]
async fn a_lost_lease_is_known_and_gives_nothing_back() {
    let jobs = jobs(Duration::from_millis(400)).await;
    jobs.publish("a").await;
    let mut deliveries = jobs.subscribe(2).await;
    let job = next(&mut deliveries).await;
    let twin = next(&mut deliveries).await;
    assert_eq!(twin.tag().deliveries(), Some(2));
    assert_eq!(job.tag().keep_alive().await.unwrap(), Lease::Lost);
    assert_eq!(twin.tag().keep_alive().await.unwrap(), Lease::Held);
    // JetStream would take the job from the second.
    let unsettled = job.tag().settle(Verdict::retry(), reason("late")).await;
    let unsettled = unsettled.unwrap_err();
    assert!(
        matches!(unsettled.error, DeliveryError::LeaseLost),
        "{unsettled}"
    );
    assert!(unsettled.tag.is_none());
    nothing_within(&mut deliveries, Duration::from_millis(200)).await;
    settle(&twin, Verdict::Ack).await.unwrap();
}

#[tokio::test]
async fn a_late_ack_counts() {
    let jobs = jobs(Duration::from_millis(400)).await;
    jobs.publish("a").await;
    let mut deliveries = jobs.subscribe(2).await;
    let job = next(&mut deliveries).await;
    sleep(Duration::from_millis(600)).await;
    settle(&job, Verdict::Ack).await.unwrap();
    assert_eq!(jobs.messages("jobs").await, 0);
}

#[tokio::test]
async fn closing_gives_back_what_nobody_took_and_makes_tags_stale() {
    let jobs = jobs(Duration::from_secs(2)).await;
    for i in 0..4 {
        jobs.publish(i.to_string()).await;
    }
    let mut deliveries = jobs.subscribe(4).await;
    let taken = next(&mut deliveries).await;
    while jobs.info().await.num_ack_pending < 4 {
        sleep(Duration::from_millis(10)).await;
    }
    close(&mut deliveries).await;
    assert!(deliveries.next().await.is_none());
    closed(&mut deliveries).await.unwrap();
    let error = settle(&taken, Verdict::Ack).await.unwrap_err();
    assert!(matches!(error, DeliveryError::Stale), "{error}");
    assert_eq!(taken.tag().keep_alive().await.unwrap(), Lease::Lost);

    let mut deliveries = jobs.subscribe(4).await;
    let start = Instant::now();
    for payload in ["1", "2", "3", "0"] {
        let job = next(&mut deliveries).await;
        assert_eq!(job.as_ref(), payload.as_bytes());
        assert_eq!(job.tag().deliveries(), Some(2));
        let elapsed = start.elapsed();
        assert_eq!(
            payload == "0",
            elapsed > Duration::from_secs(1),
            "{payload} {elapsed:?}"
        );
    }
}

#[tokio::test]
async fn stopping_gives_back_what_nobody_took_and_leaves_the_tags_valid() {
    let jobs = jobs(Duration::from_secs(60)).await;
    for i in 0..4 {
        jobs.publish(i.to_string()).await;
    }
    let mut stopped = jobs.subscribe(4).await;
    let (zero, one) = (next(&mut stopped).await, next(&mut stopped).await);
    while jobs.info().await.num_ack_pending < 4 {
        sleep(Duration::from_millis(10)).await;
    }
    stop(&mut stopped).await;
    stop(&mut stopped).await;
    assert!(stopped.next().await.is_none());
    settle(&zero, Verdict::release()).await.unwrap();

    let mut deliveries = jobs.subscribe(4).await;
    for payload in ["2", "3", "0"] {
        let job = next(&mut deliveries).await;
        assert_eq!(job.as_ref(), payload.as_bytes());
        assert_eq!(job.tag().deliveries(), Some(2));
        settle(&job, Verdict::Ack).await.unwrap();
    }
    assert_eq!(one.tag().keep_alive().await.unwrap(), Lease::Held);
    settle(&one, Verdict::Ack).await.unwrap();
    assert_eq!(jobs.messages("jobs").await, 0);
    close(&mut stopped).await;
}

#[tokio::test]
async fn what_was_requested_before_a_stop_goes_to_others() {
    let jobs = jobs(Duration::from_secs(60)).await;
    jobs.publish("0").await;
    let mut stopped = jobs.subscribe(4).await;
    let zero = next(&mut stopped).await;
    // The request is open.
    nothing_within(&mut stopped, Duration::from_millis(100)).await;
    while jobs.info().await.num_waiting == 0 {
        sleep(Duration::from_millis(10)).await;
    }
    stop(&mut stopped).await;
    for i in 1..=4 {
        jobs.publish(i.to_string()).await;
    }
    let mut deliveries = jobs.subscribe(4).await;
    for payload in ["1", "2", "3", "4"] {
        let job = next(&mut deliveries).await;
        assert_eq!(job.as_ref(), payload.as_bytes());
        assert_eq!(job.tag().deliveries(), Some(1));
        settle(&job, Verdict::Ack).await.unwrap();
    }
    settle(&zero, Verdict::Ack).await.unwrap();
    close(&mut stopped).await;
    let error = settle(&zero, Verdict::Ack).await.unwrap_err();
    assert!(
        matches!(error, DeliveryError::Stale | DeliveryError::AlreadySettled),
        "{error}"
    );
}

#[tokio::test]
async fn a_deleted_consumer_ends_the_stream_while_it_waits() {
    let jobs = jobs(SOON).await;
    let mut deliveries = jobs.subscribe(4).await;
    let mut next = Box::pin(deliveries.next());
    assert!(
        timeout(Duration::from_millis(100), &mut next)
            .await
            .is_err()
    );
    jobs.context
        .delete_consumer_from_stream("workers", "jobs")
        .await
        .unwrap();
    let error = timeout(SOON, next).await.unwrap().unwrap().unwrap_err();
    assert!(
        matches!(error, SubscriptionError::ConsumerDeleted),
        "{error}"
    );
    assert!(deliveries.next().await.is_none());
}

#[tokio::test]
async fn a_deleted_consumer_or_stream_is_noticed_while_nobody_pulls() {
    for stream in [false, true] {
        let jobs = jobs(SOON).await;
        jobs.publish("a").await;
        let mut deliveries = jobs.subscribe(1).await;
        let _job = next(&mut deliveries).await;
        match stream {
            true => drop(jobs.context.delete_stream("jobs").await.unwrap()),
            false => drop(
                jobs.context
                    .delete_consumer_from_stream("workers", "jobs")
                    .await
                    .unwrap(),
            ),
        }
        let error = closed(&mut deliveries).await.unwrap_err();
        match stream {
            true => assert!(matches!(error, SubscriptionError::StreamDeleted), "{error}"),
            false => assert!(
                matches!(error, SubscriptionError::ConsumerDeleted),
                "{error}"
            ),
        }
        let error = deliveries.next().await.unwrap().unwrap_err().to_string();
        assert_eq!(
            error,
            match stream {
                true => "the stream does not exist",
                false => "the consumer does not exist",
            }
        );
        assert!(deliveries.next().await.is_none());
    }
}

#[tokio::test]
async fn an_answer_to_a_deleted_consumer_is_an_error() {
    let jobs = jobs(SOON).await;
    jobs.publish("a").await;
    let mut deliveries = jobs.subscribe(1).await;
    let job = next(&mut deliveries).await;
    jobs.context
        .delete_consumer_from_stream("workers", "jobs")
        .await
        .unwrap();
    let error = settle(&job, Verdict::Ack).await.unwrap_err();
    assert!(matches!(error, DeliveryError::NoConsumer), "{error}");
}

#[tokio::test]
async fn a_drained_client_ends_the_stream() {
    let jobs = jobs(SOON).await;
    let mut deliveries = jobs.subscribe(1).await;
    jobs.client.drain().await.unwrap();
    let error = closed(&mut deliveries).await.unwrap_err();
    assert!(matches!(error, SubscriptionError::ClientClosed), "{error}");
}

#[tokio::test]
async fn a_server_that_stays_away_ends_the_stream() {
    let mut jobs = jobs(SOON).await;
    let pull = jobs.pull().reconnect_limit(Duration::from_secs(1));
    let mut deliveries = pull.subscribe(&jobs.context).await.unwrap();
    assert!(deliveries.next().now_or_never().is_none());
    jobs.server.kill();
    let error = closed(&mut deliveries).await.unwrap_err();
    assert!(
        matches!(error, SubscriptionError::Unreachable { .. }),
        "{error}"
    );
}

#[tokio::test]
async fn a_consumer_that_wants_no_answers_is_refused() {
    let jobs = jobs(SOON).await;
    let config = pull::Config {
        durable_name: Some("all".into()),
        ack_policy: consumer::AckPolicy::All,
        ..pull::Config::default()
    };
    let consumer = jobs.context.create_consumer_on_stream(config, "dead");
    consumer.await.unwrap();
    let subscribing = Pull::new("dead", "all").subscribe(&jobs.context);
    let error = subscribing.await.unwrap_err();
    assert!(matches!(error, SubscriptionError::NotExplicit), "{error}");
}

#[tokio::test]
async fn a_server_that_is_down_at_the_start_is_named() {
    let port = free_port();
    let error = connect(&format!("nats://user:secret@127.0.0.1:{port}")).await;
    let error = error.unwrap_err();
    assert!(
        matches!(error, ConnectError::Unreachable { .. }),
        "{error:?}"
    );
    let message = format!("{error:#}");
    let start = format!("nats at 127.0.0.1:{port} can't be reached: ");
    assert!(message.starts_with(&start), "{message}");
    assert!(
        !message.contains("secret") && !message.contains('\n'),
        "{message}"
    );
}

#[tokio::test]
async fn wrong_credentials_are_told_from_a_server_that_is_down() {
    let server = Server::start_with(&["--user", "worker", "--pass", "r@ght"]);
    let address = server.address();
    for login in ["worker:wrong@", ""] {
        let error = connect(&format!("nats://{login}{address}")).await;
        let error = error.unwrap_err();
        assert!(matches!(error, ConnectError::Denied { .. }), "{error:?}");
        let message = format!("{error:#}");
        let start = format!("nats at {address} refuses the credentials: ");
        assert!(message.starts_with(&start), "{message}");
        assert!(!message.contains("wrong"), "{message}");
    }
    connect(&format!("nats://worker:r%40ght@{address}"))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_tag_outlives_its_connection() {
    let mut jobs = jobs(SOON * 6).await;
    jobs.publish("a").await;
    jobs.publish("b").await;
    let mut deliveries = jobs.subscribe(1).await;
    let job = next(&mut deliveries).await;
    jobs.server.kill();
    jobs.server.restart();
    let mut tag = job.tag();
    // The first try may have gone to the server that was killed.
    while let Err(unsettled) = tag.settle(Verdict::Ack, reason("")).await {
        tag = unsettled.tag.expect("an ack may be tried again");
    }
    let job = next(&mut deliveries).await;
    assert_eq!(job.as_ref(), b"b");
    settle(&job, Verdict::Ack).await.unwrap();
    assert_eq!(jobs.messages("jobs").await, 0);
}

#[tokio::test]
async fn a_nak_is_not_sent_while_there_is_no_connection() {
    let mut jobs = jobs(SOON * 6).await;
    jobs.publish("a").await;
    let pull = jobs.pull().confirm_timeout(Duration::from_millis(400));
    let mut deliveries = pull.subscribe(&jobs.context).await.unwrap();
    let job = next(&mut deliveries).await;
    jobs.server.kill();
    while jobs.client.connection_state().to_string() == "connected" {
        sleep(Duration::from_millis(10)).await;
    }
    let unsettled = job.tag().settle(Verdict::retry(), reason("down")).await;
    let unsettled = unsettled.unwrap_err();
    assert!(
        matches!(unsettled.error, DeliveryError::Disconnected { .. }),
        "{unsettled}"
    );
    jobs.server.restart();
    nothing_within(&mut deliveries, Duration::from_secs(1)).await;
    let tag = unsettled.tag.expect("nothing was sent");
    tag.settle(Verdict::retry(), reason("down")).await.unwrap();
    assert_eq!(next(&mut deliveries).await.tag().deliveries(), Some(2));
}

/// Runs jobs until the stream ends, and counts how often each ran.
async fn run(
    mut deliveries: Deliveries,
    counts: Arc<Mutex<HashMap<String, u32>>>,
    work: Duration,
) -> Result<(), SubscriptionError> {
    let policy = SettlePolicy::new(ack_on_success());
    let mut worker = ServiceBuilder::new()
        .layer(deliveries.gate())
        .layer(SentinelLayer::new(policy))
        .service_fn(move |job: Delivery| {
            let counts = Arc::clone(&counts);
            async move {
                if !work.is_zero() {
                    sleep(work).await;
                }
                let name = String::from_utf8(job.as_ref().to_vec()).unwrap();
                *counts.lock().unwrap().entry(name).or_default() += 1;
                Ok::<_, String>(())
            }
        });
    let mut settling = JoinSet::new();
    loop {
        let ready = worker.ready().await.unwrap();
        let Some(job) = deliveries.next().await else {
            return Ok(());
        };
        settling.spawn(ready.call(job?));
        while settling.try_join_next().is_some() {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_killed_again_and_again_loses_no_job() {
    const JOBS: usize = 10_000;
    // A killed server of 2.9 brings removed messages of a work queue back, and keeps others that
    // are gone as unacked.
    let mut jobs = jobs_of(RetentionPolicy::Limits, Duration::from_secs(2)).await;
    for batch in 0..JOBS / 1_000 {
        let mut acks = Vec::new();
        for i in 0..1_000 {
            let payload = (batch * 1_000 + i).to_string().into();
            acks.push(jobs.context.publish("jobs", payload).await.unwrap());
        }
        for ack in acks {
            ack.await.unwrap();
        }
    }
    let counts = Arc::new(Mutex::new(HashMap::new()));
    let deliveries = jobs.subscribe(64).await;
    let worker = tokio::spawn(run(
        deliveries,
        Arc::clone(&counts),
        Duration::from_millis(5),
    ));
    let mut kills = 0;
    let deadline = Instant::now() + Duration::from_secs(90);
    loop {
        let done = counts.lock().unwrap().len();
        if done >= JOBS {
            break;
        }
        assert!(Instant::now() < deadline, "{done} of {JOBS} jobs ran");
        if kills < 5 && done > kills * 1_500 + 500 {
            kills += 1;
            jobs.server.kill();
            sleep(Duration::from_millis(100)).await;
            jobs.server.restart();
        }
        sleep(Duration::from_millis(5)).await;
    }
    let settled = async {
        loop {
            let info = jobs.info().await;
            if info.num_pending == 0 && info.num_ack_pending == 0 {
                return;
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(SOON * 2, settled)
        .await
        .expect("every job is settled");
    assert!(!worker.is_finished(), "{:?}", worker.await);
    worker.abort();
    let counts = counts.lock().unwrap();
    assert_eq!(kills, 5);
    let duplicates: u32 = counts.values().map(|count| count - 1).sum();
    // More than were unanswered: the server confirms an ack before it writes it.
    println!("{JOBS} jobs, {kills} kills: {duplicates} ran once more");
}

// === what traces say of it ===

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[tokio::test]
async fn a_tag_says_its_stream_the_id_of_the_message_and_the_trace_of_its_sender() {
    let jobs = jobs(SOON).await;
    let mut deliveries = jobs.subscribe(2).await;

    jobs.publish("one").await;
    let job = next(&mut deliveries).await;
    let expected = Messaging::new("nats", "jobs").message_id("1");
    assert_eq!(job.tag().messaging(), Some(expected));

    let mut headers = HeaderMap::new();
    // As Go's client writes it.
    headers.insert("Traceparent", TRACEPARENT);
    headers.insert("tracestate", "k=v");
    headers.insert("Nats-Msg-Id", "m-7");
    let ack = jobs
        .context
        .publish_with_headers("jobs", headers, "two".into());
    ack.await.unwrap().await.unwrap();
    let job = next(&mut deliveries).await;
    let expected = Messaging::new("nats", "jobs")
        .message_id("m-7")
        .traceparent(Some(TRACEPARENT))
        .tracestate(Some("k=v"));
    assert_eq!(job.tag().messaging(), Some(expected));
}

#[tokio::test]
async fn a_job_that_passes_the_default_limit_is_settled_within_its_ack_wait() {
    let ack_wait = Duration::from_secs(3);
    let jobs = jobs(ack_wait).await;
    jobs.publish("a").await;
    let mut deliveries = jobs.subscribe(1).await;
    let mut worker = ServiceBuilder::new()
        .layer(SentinelLayer::new(SettlePolicy::new(ack_on_success())))
        .service_fn(|_: Delivery| std::future::pending::<Result<(), DeliveryError>>());
    let job = next(&mut deliveries).await;
    assert_eq!(job.lease(), Some(ack_wait));
    let settled = worker.ready().await.unwrap().call(job).await.unwrap();
    assert_eq!(settled.verdict, Verdict::retry());
    let job = next(&mut deliveries).await;
    assert_eq!(job.tag().deliveries(), Some(2));
    settle(&job, Verdict::Ack).await.unwrap();
}

#[tokio::test]
async fn a_job_has_the_lease_that_the_backoff_has_for_its_delivery() {
    let jobs = jobs(SOON).await;
    let backoff = [5, 7].map(Duration::from_secs);
    let config = pull::Config {
        durable_name: Some("patient".into()),
        filter_subject: "jobs".into(),
        backoff: backoff.to_vec(),
        max_deliver: 9,
        ..pull::Config::default()
    };
    // A work queue has one consumer.
    let stream = jobs.context.get_stream("jobs").await.unwrap();
    stream.delete_consumer("workers").await.unwrap();
    stream.create_consumer(config).await.unwrap();
    jobs.publish("a").await;
    let pull = Pull::new("jobs", "patient");
    let mut deliveries = pull.subscribe(&jobs.context).await.unwrap();
    for lease in [backoff[0], backoff[1], backoff[1]] {
        let job = next(&mut deliveries).await;
        assert_eq!(job.lease(), Some(lease));
        settle(&job, Verdict::retry()).await.unwrap();
    }
}
