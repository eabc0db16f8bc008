//! Messages that are suspects, and others.

use std::time::Duration;

use tower_sentinel::{
    Job, Verdict,
    broker::{
        Envelope,
        nats::{
            Deliveries, Pull, SubscriptionError,
            async_nats::{
                HeaderMap,
                jetstream::{consumer::pull, stream},
            },
        },
    },
    settle::Settle,
};

use super::{Jobs, SOON, delays::with_schedules, jobs, next, settle};
use crate::conformance::suspected;

/// Creates a stream of suspects with a consumer, and subscribes to it.
async fn lane(jobs: &Jobs) -> Deliveries {
    let config = stream::Config {
        name: "suspects".into(),
        ..stream::Config::default()
    };
    let stream = jobs.context.create_stream(config).await.unwrap();
    let config = pull::Config {
        durable_name: Some("workers".into()),
        ..pull::Config::default()
    };
    stream.create_consumer(config).await.unwrap();
    let lane = Pull::new("suspects", "workers").prefetch(1);
    let lane = lane.dead_letter("dead");
    lane.subscribe(&jobs.context).await.unwrap()
}

/// Returns whether a job is a suspect after this verdict.
async fn is_suspect_after(jobs: &Jobs, pull: Pull, verdict: Verdict) -> bool {
    let mut deliveries = pull.subscribe(&jobs.context).await.unwrap();
    jobs.publish("job").await;
    let job = next(&mut deliveries).await;
    assert!(!job.tag().is_suspect());
    settle(&job, verdict).await.unwrap();
    let job = next(&mut deliveries).await;
    assert_eq!(job.redelivered(), Some(true));
    let is_suspect = job.tag().is_suspect();
    settle(&job, Verdict::Ack).await.unwrap();
    is_suspect
}

/// The server does not report why it delivers a message again.
#[tokio::test]
async fn a_job_that_was_given_back_by_a_nak_is_a_suspect_if_there_is_a_subject_for_them() {
    let jobs = jobs(SOON).await;
    let _lane = lane(&jobs).await;
    for verdict in [
        Verdict::retry(),
        Verdict::release(),
        Verdict::retry_after(Duration::from_millis(50)),
    ] {
        let pull = jobs.pull().suspects("suspects");
        assert!(is_suspect_after(&jobs, pull, verdict).await, "{verdict}");
        assert!(!is_suspect_after(&jobs, jobs.pull(), verdict).await);
    }
}

#[tokio::test]
async fn a_job_that_was_given_back_by_a_schedule_is_no_suspect() {
    let mut jobs = jobs(SOON).await;
    if !with_schedules(&mut jobs, 1_000).await {
        return;
    }
    let _lane = lane(&jobs).await;
    let delay = Duration::from_secs(1);
    for verdict in [Verdict::retry_after(delay), Verdict::release_after(delay)] {
        let pull = jobs.pull().schedules("delayed").suspects("suspects");
        assert!(!is_suspect_after(&jobs, pull, verdict).await, "{verdict}");
    }
}

#[tokio::test]
async fn a_suspect_keeps_its_origin_in_the_lane() {
    let jobs = jobs(SOON).await;
    let mut lane = lane(&jobs).await;
    let pull = jobs.pull().suspects("suspects").dead_letter("dead");
    let mut deliveries = pull.subscribe(&jobs.context).await.unwrap();
    let mut headers = HeaderMap::new();
    headers.insert("Nats-Msg-Id", "order-7");
    headers.insert("tenant", "acme");
    let publishing = jobs
        .context
        .publish_with_headers("jobs", headers, "job".into());
    publishing.await.unwrap().await.unwrap();

    let job = next(&mut deliveries).await;
    let settling = job.tag().settle(Verdict::Reject, suspected());
    settling.await.unwrap();
    assert_eq!(jobs.messages("dead").await, 0);
    for deliveries in 1..=2 {
        let job = next(&mut lane).await;
        assert_eq!(job.payload(), b"job");
        assert_eq!(Envelope::message_id(&job).as_deref(), Some("order-7"));
        assert_eq!(
            (job.routing_key(), job.header("tenant")),
            ("jobs", Some("acme"))
        );
        assert_eq!(job.deliveries(), Some(deliveries));
        let verdict = match deliveries {
            1 => Verdict::retry(),
            _ => Verdict::Reject,
        };
        settle(&job, verdict).await.unwrap();
    }
    let dead = jobs.context.get_stream("dead").await.unwrap();
    let letter = dead.get_raw_message(1).await.unwrap();
    let header = |name: &str| letter.headers.get(name).map(|value| value.as_str());
    assert_eq!(header("x-original-destination"), Some("jobs"));
    assert_eq!(header("x-suspect-of"), None);
}

#[tokio::test]
async fn a_subject_of_suspects_that_no_other_stream_keeps_is_told_before_the_first_job() {
    let jobs = jobs(SOON).await;
    let subscribing = jobs.pull().suspects("nowhere").subscribe(&jobs.context);
    let error = subscribing.await.unwrap_err();
    assert!(
        matches!(&error, SubscriptionError::NoStreamOfSuspects { subject, .. } if subject == "nowhere"),
        "{error}"
    );
    let subscribing = jobs.pull().suspects("jobs").subscribe(&jobs.context);
    let error = subscribing.await.unwrap_err();
    assert!(
        matches!(&error, SubscriptionError::SuspectsAmongJobs { stream, .. } if stream == "jobs"),
        "{error}"
    );
}
