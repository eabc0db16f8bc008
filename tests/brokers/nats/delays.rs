//! Delayed retries: by a NAK, which counts toward `max_ack_pending`, and by a schedule, which does not.

use std::time::{Duration, SystemTime};

use futures_util::StreamExt;
use tokio::time::{Instant, timeout};
use tower_sentinel::{
    Job, Verdict,
    broker::{
        Envelope,
        nats::{
            DeliveryError, NoSchedules, Pull, SubscriptionError,
            async_nats::{
                HeaderMap,
                jetstream::{
                    consumer::pull,
                    stream::{self, RetentionPolicy},
                },
            },
        },
    },
    settle::{Messaging, Settle},
};

use super::{Jobs, SOON, jobs, next, reason, settings::consumer, settle};
use crate::log::Log;

const HOUR: Duration = Duration::from_secs(60 * 60);

/// Makes the stream of the jobs anew, with schedules below `delayed`; false if the server has none.
pub(super) async fn with_schedules(jobs: &mut Jobs, max_ack_pending: i64) -> bool {
    let schedules = stream::Config {
        name: "jobs".into(),
        subjects: vec!["jobs".into(), "delayed.*".into()],
        retention: RetentionPolicy::WorkQueue,
        allow_message_schedules: true,
        ..stream::Config::default()
    };
    jobs.context.delete_stream("jobs").await.unwrap();
    let stream = jobs.context.create_stream(schedules).await.unwrap();
    let config = pull::Config {
        durable_name: Some("workers".into()),
        filter_subject: "jobs".into(),
        ack_wait: 6 * SOON,
        max_ack_pending,
        ..pull::Config::default()
    };
    jobs.consumer = stream.create_consumer(config).await.unwrap();
    let has_schedules = stream.cached_info().config.allow_message_schedules;
    if !has_schedules {
        println!("skipped: this nats-server has no message schedules");
    }
    has_schedules
}

fn scheduled(jobs: &Jobs) -> Pull {
    jobs.pull().schedules("delayed")
}

#[tokio::test]
async fn delayed_naks_stall_a_consumer_and_are_warned_of_before() {
    let (log, _guard) = Log::start();
    let mut jobs = jobs(SOON).await;
    let config = pull::Config {
        max_ack_pending: 4,
        ..pull::Config::default()
    };
    consumer(&mut jobs, config).await;
    for i in 0..5 {
        jobs.publish(i.to_string()).await;
    }
    let mut deliveries = jobs.subscribe(1).await;
    let warned = |of: &str| log.lines().iter().filter(|line| line.contains(of)).count();
    for warnings in [0, 1, 1, 1] {
        let job = next(&mut deliveries).await;
        settle(&job, Verdict::retry_after(HOUR)).await.unwrap();
        assert_eq!(
            warned("consumer about to stall"),
            warnings,
            "{:?}",
            log.lines()
        );
    }
    let lines = log.lines();
    let line = lines
        .iter()
        .find(|line| line.contains("about to stall"))
        .unwrap();
    assert!(line.contains("max_ack_pending=4"), "{line}");
    let stalled = async {
        while warned("consumer stalled") == 0 {
            let next = timeout(Duration::from_millis(50), deliveries.next()).await;
            assert!(next.is_err(), "{next:?}");
        }
    };
    timeout(SOON, stalled)
        .await
        .expect("it says that it stalls");
    assert_eq!(jobs.info().await.num_pending, 1);
}

#[tokio::test]
async fn schedules_stall_nothing() {
    let mut jobs = jobs(SOON).await;
    if !with_schedules(&mut jobs, 4).await {
        return;
    }
    for i in 0..12 {
        jobs.publish(i.to_string()).await;
    }
    let mut deliveries = scheduled(&jobs)
        .prefetch(1)
        .subscribe(&jobs.context)
        .await
        .unwrap();
    for i in 0..12 {
        let job = next(&mut deliveries).await;
        assert_eq!(job.payload(), i.to_string().as_bytes());
        settle(&job, Verdict::retry_after(HOUR)).await.unwrap();
    }
    assert_eq!(jobs.info().await.num_ack_pending, 0);
    assert_eq!(jobs.messages("jobs").await, 12, "each waits for its time");
}

#[tokio::test]
async fn a_release_by_a_schedule_is_free() {
    let mut jobs = jobs(SOON).await;
    if !with_schedules(&mut jobs, 4).await {
        return;
    }
    jobs.publish("0").await;
    let mut deliveries = scheduled(&jobs).subscribe(&jobs.context).await.unwrap();
    let at_once = Verdict::release_after(Duration::ZERO);
    let delayed = Verdict::release_after(Duration::from_millis(100));
    let mut wanted = 1;
    for verdict in [
        delayed,
        delayed,
        Verdict::release(),
        delayed,
        at_once,
        delayed,
    ] {
        let job = next(&mut deliveries).await;
        assert_eq!(job.tag().deliveries(), Some(wanted), "before {verdict}");
        wanted += u32::from(job.tag().capabilities().charges(verdict));
        settle(&job, verdict).await.unwrap();
    }
    assert_eq!(wanted, 3, "two were no schedule");
    let job = next(&mut deliveries).await;
    assert_eq!(job.tag().deliveries(), Some(wanted));
}

#[tokio::test]
async fn a_schedule_brings_the_job_back_with_its_headers_id_and_count() {
    let mut jobs = jobs(SOON).await;
    if !with_schedules(&mut jobs, 4).await {
        return;
    }
    let mut headers = HeaderMap::new();
    headers.insert("Nats-Msg-Id", "m-7");
    headers.insert("trace", "1");
    // It counts for nothing: no schedule wrote it.
    headers.insert("x-deliveries", "100");
    headers.insert("x-original-published", "5");
    let before = SystemTime::now();
    let ack = jobs
        .context
        .publish_with_headers("jobs", headers, "a".into());
    ack.await.unwrap().await.unwrap();
    let stored = before..=SystemTime::now();
    let mut deliveries = scheduled(&jobs).subscribe(&jobs.context).await.unwrap();
    let job = next(&mut deliveries).await;
    assert_eq!(job.tag().deliveries(), Some(1));
    let published = job.queued_since().unwrap();
    assert!(stored.contains(&published), "{published:?}: {stored:?}");
    settle(&job, Verdict::retry()).await.unwrap();
    let mut deliveries_before = 2;
    let delay = Duration::from_millis(700);
    for _ in 0..2 {
        let job = next(&mut deliveries).await;
        assert_eq!(job.tag().deliveries(), Some(deliveries_before));
        let start = Instant::now();
        settle(&job, Verdict::retry_after(delay)).await.unwrap();
        let job = next(&mut deliveries).await;
        let elapsed = start.elapsed();
        assert!(elapsed >= delay - Duration::from_millis(20), "{elapsed:?}");
        deliveries_before += 1;
        assert_eq!(job.tag().deliveries(), Some(deliveries_before));
        assert_eq!(job.message_id(), Some("m-7"));
        assert_eq!(job.subject().as_str(), "jobs");
        assert_eq!(job.headers().unwrap().get("trace").unwrap().as_str(), "1");
        let messaging = Messaging::new("nats", "jobs")
            .consumer_group("workers")
            .message_id("m-7");
        assert_eq!(job.tag().messaging(), Some(messaging));
        // The header has whole milliseconds.
        let kept = job.tag().published_at().unwrap();
        let lost = published.duration_since(kept).unwrap();
        assert!(lost < Duration::from_millis(1), "{lost:?}");
        assert_eq!(job.queued_since(), None);
        settle(&job, Verdict::retry()).await.unwrap();
        deliveries_before += 1;
    }
    let job = next(&mut deliveries).await;
    settle(&job, Verdict::Ack).await.unwrap();
    assert_eq!(jobs.messages("jobs").await, 0);
}

#[tokio::test]
async fn a_schedule_takes_no_header_of_the_publisher_for_the_id() {
    let mut jobs = jobs(SOON).await;
    if !with_schedules(&mut jobs, 4).await {
        return;
    }
    let mut headers = HeaderMap::new();
    headers.insert("X-Message-Id", "theirs");
    headers.insert("x-message-id", "theirs");
    // As on a dead letter that somebody publishes anew.
    headers.insert("x-original-message-id", "theirs");
    let ack = jobs
        .context
        .publish_with_headers("jobs", headers.clone(), "a".into());
    ack.await.unwrap().await.unwrap();
    headers.insert("Nats-Msg-Id", "m-7");
    let ack = jobs
        .context
        .publish_with_headers("jobs", headers, "b".into());
    ack.await.unwrap().await.unwrap();
    let mut deliveries = scheduled(&jobs).subscribe(&jobs.context).await.unwrap();
    for round in 0..4 {
        let job = next(&mut deliveries).await;
        let id = (job.payload() == b"b").then_some("m-7");
        assert_eq!(job.message_id(), id, "round {round}");
        assert_eq!(job.header("x-message-id"), Some("theirs"), "round {round}");
        let delay = Duration::from_millis(100);
        settle(&job, Verdict::retry_after(delay)).await.unwrap();
    }
}

#[tokio::test]
async fn a_schedule_outlives_a_killed_server() {
    let mut jobs = jobs(SOON).await;
    if !with_schedules(&mut jobs, 4).await {
        return;
    }
    jobs.publish("a").await;
    let mut deliveries = scheduled(&jobs).subscribe(&jobs.context).await.unwrap();
    let job = next(&mut deliveries).await;
    settle(&job, Verdict::retry_after(Duration::from_secs(2)))
        .await
        .unwrap();
    jobs.server.kill();
    jobs.server.restart();
    let job = timeout(3 * SOON, deliveries.next())
        .await
        .expect("it comes back");
    let job = job.unwrap().unwrap();
    assert_eq!(
        (job.payload(), job.tag().deliveries()),
        (&b"a"[..], Some(2))
    );
    settle(&job, Verdict::Ack).await.unwrap();
}

#[tokio::test]
async fn a_schedule_that_is_published_twice_is_stored_once() {
    let mut jobs = jobs(SOON).await;
    if !with_schedules(&mut jobs, 4).await {
        return;
    }
    jobs.publish("a").await;
    let mut deliveries = scheduled(&jobs).subscribe(&jobs.context).await.unwrap();
    let job = next(&mut deliveries).await;
    settle(&job, Verdict::retry_after(HOUR)).await.unwrap();
    let stream = jobs.context.get_stream("jobs").await.unwrap();
    let stored = stream.get_last_raw_message_by_subject("delayed.1").await;
    let stored = stored.unwrap();
    let publishing = jobs.context.publish_with_headers(
        "delayed.1",
        stored.headers.clone(),
        stored.payload.clone(),
    );
    assert!(publishing.await.unwrap().await.unwrap().duplicate);
}

/// The server refuses it if the stream has given up its subject.
#[tokio::test]
async fn a_schedule_that_is_refused_is_a_nak() {
    let (log, _guard) = Log::start();
    let mut jobs = jobs(SOON).await;
    if !with_schedules(&mut jobs, 4).await {
        return;
    }
    jobs.publish("a").await;
    let pull = scheduled(&jobs).confirm_timeout(Duration::from_secs(1));
    let mut deliveries = pull.subscribe(&jobs.context).await.unwrap();
    let job = next(&mut deliveries).await;
    let stream = jobs.context.get_stream("jobs").await.unwrap();
    let mut config = stream.cached_info().config.clone();
    config.subjects = vec!["jobs".into()];
    jobs.context.update_stream(config).await.unwrap();
    // As nobody takes it, the stream might be without a leader. The next try doesn't wait for that.
    let verdict = Verdict::retry_after(Duration::from_millis(300));
    let settled = job.tag().settle(verdict, reason("it failed")).await;
    let unsettled = settled.unwrap_err();
    assert!(
        matches!(unsettled.error, DeliveryError::Schedule(_)),
        "{unsettled}"
    );
    let tag = unsettled.tag.expect("nothing was sent");
    tag.settle(verdict, reason("it failed")).await.unwrap();
    assert_eq!(jobs.info().await.num_ack_pending, 1);
    let job = next(&mut deliveries).await;
    assert_eq!(job.tag().deliveries(), Some(2));
    let is_said = |line: &String| line.contains("schedule refused");
    assert!(log.lines().iter().any(is_said), "{:?}", log.lines());
}

#[tokio::test]
async fn schedules_that_a_stream_cant_keep_are_refused() {
    let mut jobs = jobs(SOON).await;
    let refused = async |jobs: &Jobs, prefix: &str| {
        let error = jobs.pull().schedules(prefix).subscribe(&jobs.context).await;
        match error.unwrap_err() {
            SubscriptionError::Schedules { reason, .. } => reason,
            error => panic!("{error}"),
        }
    };
    assert_eq!(refused(&jobs, "delayed").await, NoSchedules::NotAllowed);
    if !with_schedules(&mut jobs, 4).await {
        return;
    }
    assert_eq!(refused(&jobs, "elsewhere").await, NoSchedules::NotInStream);
    let config = pull::Config::default();
    consumer(&mut jobs, config).await;
    assert_eq!(refused(&jobs, "delayed").await, NoSchedules::Jobs);
    for (name, retention) in [
        ("i", RetentionPolicy::Interest),
        ("l", RetentionPolicy::Limits),
    ] {
        let config = stream::Config {
            name: name.into(),
            subjects: vec![name.into(), format!("{name}.*")],
            retention,
            allow_message_schedules: true,
            ..stream::Config::default()
        };
        let stream = jobs.context.create_stream(config).await.unwrap();
        let config = pull::Config {
            durable_name: Some("workers".into()),
            ..pull::Config::default()
        };
        stream.create_consumer(config).await.unwrap();
        let pull = Pull::new(name, "workers").schedules(name);
        let error = pull.subscribe(&jobs.context).await.unwrap_err();
        let reason = NoSchedules::NotWorkQueue;
        assert!(
            matches!(&error, SubscriptionError::Schedules { reason: r, .. } if *r == reason),
            "{error}"
        );
    }
}
