//! Dead letters of NATS JetStream.

use tower_sentinel::{
    Job, Verdict,
    broker::{
        dead_letters::{DeadLetters, Filter, Pass, Purge, Redrive},
        nats::{
            DeadLetterError, DeadLetterQueue, Deliveries, Delivery, Pull, SubscriptionError,
            async_nats::{
                HeaderMap,
                jetstream::{
                    self, Context,
                    consumer::pull,
                    stream::{self, RetentionPolicy},
                },
            },
            connect,
        },
    },
    outcome::OutcomeKind,
    settle::Settle,
};

use super::server::Server;
use crate::dead_letters;
use crate::dead_letters::{Place, bury, has_letters, list, next, numbers, scenarios};

struct Nats {
    _server: Server,
    context: Context,
    jobs: Deliveries,
}

async fn place(_: &str) -> Nats {
    let server = Server::start();
    let context = jetstream::new(connect(&server.address()).await.unwrap());
    streams(&context).await;
    let pull = Pull::new("jobs", "workers").prefetch(1);
    let jobs = pull.dead_letter("dead.jobs").subscribe(&context).await;
    Nats {
        jobs: jobs.unwrap(),
        _server: server,
        context,
    }
}

/// Creates a work queue `jobs`, a stream `dead`, and a consumer.
async fn streams(context: &Context) {
    for (name, subject, retention) in [
        ("jobs", "jobs.>", RetentionPolicy::WorkQueue),
        ("dead", "dead.>", RetentionPolicy::Limits),
    ] {
        let config = stream::Config {
            name: name.into(),
            subjects: vec![subject.into()],
            retention,
            ..stream::Config::default()
        };
        context.create_stream(config).await.unwrap();
    }
    let config = pull::Config {
        durable_name: Some("workers".into()),
        ..pull::Config::default()
    };
    let consumer = context.create_consumer_on_stream(config, "jobs");
    consumer.await.unwrap();
}

impl Place for Nats {
    type Delivery = Delivery;
    type Error = SubscriptionError;
    type Jobs = Deliveries;
    type Letters = DeadLetterQueue;

    async fn publish(&self, body: &str) {
        let mut headers = HeaderMap::new();
        headers.insert("tenant", "acme");
        let sent = self
            .context
            .publish_with_headers("jobs.new", headers, body.to_owned().into());
        sent.await.unwrap().await.unwrap();
    }

    fn jobs(&mut self) -> &mut Deliveries {
        &mut self.jobs
    }

    fn letters(&self) -> Self::Letters {
        DeadLetterQueue::new(&self.context, "dead.jobs")
    }

    fn name(&self) -> String {
        "jobs.new".to_owned()
    }
}

scenarios!(place, tokio::test);

#[tokio::test]
async fn a_letter_whose_delete_was_cut_off_is_not_moved_twice() {
    let mut place = place("").await;
    bury(&mut place, "job", OutcomeKind::Failed, "no").await;
    // As if the process were killed between the two: the letter comes back with its sequence.
    let stream = place.context.get_stream("dead").await.unwrap();
    let letter = stream.get_raw_message(1).await.unwrap();
    let tally = Redrive::new(Filter::all()).run(&place.letters()).await;
    assert_eq!(numbers(tally.unwrap()), [1, 1, 0, 0, 0]);
    let jobs = place.context.get_stream("jobs").await.unwrap();
    let before = jobs.get_info().await.unwrap().state.last_sequence;

    let id = format!("redriven:dead:1:{}", letter.time);
    let mut headers = HeaderMap::new();
    headers.insert("Nats-Msg-Id", id);
    let again = place
        .context
        .publish_with_headers("jobs.new", headers, "job".into());
    assert!(again.await.unwrap().await.unwrap().duplicate);
    let after = jobs.get_info().await.unwrap().state.last_sequence;
    assert_eq!(before, after);
}

#[tokio::test]
async fn the_first_id_stays_and_no_stream_takes_the_job_for_a_duplicate() {
    let mut place = place("").await;
    let mut headers = HeaderMap::new();
    headers.insert("Nats-Msg-Id", "order-7");
    let sent = place
        .context
        .publish_with_headers("jobs.new", headers, "job".into());
    sent.await.unwrap().await.unwrap();
    for _ in 0..2 {
        dead_letters::reject(&mut place, OutcomeKind::Failed, "no").await;
        let tally = Redrive::new(Filter::all()).run(&place.letters()).await;
        assert_eq!(numbers(tally.unwrap()), [1, 1, 0, 0, 0]);
        // A retry leaves it to the next round.
        let job = next(&mut place).await;
        assert_eq!(job.message_id(), Some("order-7"));
        let reason = dead_letters::reason(OutcomeKind::Failed, "no");
        assert!(job.tag().settle(Verdict::retry(), reason).await.is_ok());
    }
}

#[tokio::test]
async fn a_stream_that_allows_no_deletes_is_told_before_anything_is_moved() {
    let mut place = place("").await;
    bury(&mut place, "job", OutcomeKind::Failed, "no").await;
    let mut config = place.context.get_stream("dead").await.unwrap();
    let mut config = config.info().await.unwrap().config.clone();
    config.deny_delete = true;
    place.context.update_stream(config).await.unwrap();
    let error = Redrive::new(Filter::all()).run(&place.letters()).await;
    let error = error.unwrap_err();
    assert!(
        matches!(error.error, DeadLetterError::NoDeletes { .. }),
        "{error:?}"
    );
    assert_eq!(error.tally.moved, 0);
    let purged = Purge::new(Filter::all()).run(&place.letters()).await;
    assert!(matches!(
        purged.unwrap_err().error,
        DeadLetterError::NoDeletes { .. }
    ));
    has_letters(&place, 1).await;
    let jobs = place.context.get_stream("jobs").await.unwrap();
    assert_eq!(jobs.get_info().await.unwrap().state.last_sequence, 1);
}

#[tokio::test]
async fn a_letter_that_another_run_has_moved_is_gone() {
    let mut place = place("").await;
    bury(&mut place, "job", OutcomeKind::Failed, "no").await;
    let letters = place.letters();
    let mut slow = letters.pass().await.unwrap();
    let taken = slow.next(10).await.unwrap();
    let tally = Redrive::new(Filter::all()).run(&letters).await;
    assert_eq!(numbers(tally.unwrap()), [1, 1, 0, 0, 0]);
    let moved = slow.redrive(taken).await;
    assert!(moved.error.is_none());
    assert_eq!(
        moved.fates,
        [tower_sentinel::broker::dead_letters::Fate::Gone]
    );
    let jobs = place.context.get_stream("jobs").await.unwrap();
    assert_eq!(jobs.get_info().await.unwrap().state.messages, 1, "once");
}

#[tokio::test]
async fn a_subject_of_no_stream_is_an_error_that_names_it() {
    let place = place("").await;
    let letters = DeadLetterQueue::new(&place.context, "no.such");
    let error = letters.list(&Filter::all(), 1).await.unwrap_err();
    assert_eq!(error.to_string(), "no stream has the subject \"no.such\"");
    assert_eq!(list(&place, Filter::all()).await, []);
}
