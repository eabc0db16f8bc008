//! Dead letters: scenarios that hold on every broker. Each has its own in its module.

use std::{fmt::Debug, future::Future, ops::ControlFlow, time::Duration};

use futures_util::{Stream, StreamExt};
use tokio::time::timeout;
use tower_sentinel::{
    Job, Verdict,
    broker::{
        Envelope,
        dead_letters::{DeadLetter, DeadLetters, Filter, Pass, Purge, Redrive, Tally},
    },
    outcome::OutcomeKind,
    settle::{Reason, Settle},
};

/// A place for jobs, and the place of their dead letters.
pub(crate) trait Place {
    type Delivery: Envelope<Tag: Settle<Error: Debug>> + AsRef<[u8]>;
    type Error: Debug;
    type Jobs: Stream<Item = Result<Self::Delivery, Self::Error>> + Unpin;
    type Letters: DeadLetters<Pass: Pass> + Sync;

    /// Publishes a job with the header `tenant` of `acme`.
    async fn publish(&self, body: &str);

    /// Returns the subscription to the jobs.
    fn jobs(&mut self) -> &mut Self::Jobs;

    fn letters(&self) -> Self::Letters;

    /// Returns the name of the queue, the subject or the stream of the jobs.
    fn name(&self) -> String;
}

/// Description of a job that was delivered.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) body: String,
    pub(crate) deliveries: Option<u32>,
    pub(crate) redelivered: Option<bool>,
    pub(crate) redriven: Option<String>,
    pub(crate) tenant: Option<String>,
}

pub(crate) async fn next<P: Place>(place: &mut P) -> P::Delivery {
    let next = timeout(Duration::from_secs(20), place.jobs().next()).await;
    next.expect("a job is delivered").unwrap().unwrap()
}

pub(crate) fn reason(kind: OutcomeKind, message: &str) -> Reason {
    let mut reason = Reason::completed(Duration::ZERO);
    reason.kind = kind;
    reason.message = Some(message.to_owned());
    reason
}

/// Takes the next job, and settles it.
pub(crate) async fn settle<P: Place>(place: &mut P, verdict: Verdict, reason: Reason) -> Seen {
    let job = next(place).await;
    for name in ["x-outcome-kind", "x-outcome-message", "x-outcome-time"] {
        assert_eq!(
            job.header(name),
            None,
            "no job has the headers of a dead letter"
        );
    }
    assert_eq!(job.header("x-original-destination"), None);
    let text = |name| job.header(name).map(str::to_owned);
    let seen = Seen {
        body: String::from_utf8(job.as_ref().to_vec()).unwrap(),
        deliveries: job.deliveries(),
        redelivered: job.redelivered(),
        redriven: text("x-redriven"),
        tenant: text("tenant"),
    };
    let settled = job.tag().settle(verdict, reason).await;
    assert!(settled.is_ok(), "{:?}", settled.err().map(|it| it.error));
    seen
}

pub(crate) async fn ack<P: Place>(place: &mut P) -> Seen {
    settle(place, Verdict::Ack, Reason::completed(Duration::ZERO)).await
}

/// Takes the next jobs, and returns their bodies in the order of the alphabet: a batch has no order.
async fn ack_all<P: Place>(place: &mut P, number: usize) -> Vec<String> {
    let mut bodies = Vec::new();
    for _ in 0..number {
        bodies.push(ack(place).await.body);
    }
    bodies.sort();
    bodies
}

fn jobs(numbers: impl IntoIterator<Item = u32>) -> Vec<String> {
    numbers.into_iter().map(|n| format!("job {n}")).collect()
}

pub(crate) async fn reject<P: Place>(place: &mut P, kind: OutcomeKind, message: &str) -> Seen {
    settle(place, Verdict::Reject, reason(kind, message)).await
}

/// Publishes a job and rejects it.
pub(crate) async fn bury<P: Place>(place: &mut P, body: &str, kind: OutcomeKind, message: &str) {
    place.publish(body).await;
    assert_eq!(reject(place, kind, message).await.body, body);
}

pub(crate) async fn list<P: Place>(place: &P, filter: Filter) -> Vec<DeadLetter> {
    place.letters().list(&filter, 1_000).await.unwrap()
}

/// Returns the numbers of a run: total, moved, skipped, refused, left.
pub(crate) fn numbers(tally: Tally) -> [u64; 5] {
    let Tally {
        total,
        moved,
        skipped,
        refused,
        ..
    } = tally;
    [total, moved, skipped, refused, tally.left()]
}

/// Returns a future that a runtime of several threads can run.
fn spawnable<F: Future + Send>(future: F) -> F {
    future
}

/// Waits until the server counts so many letters: a moved letter of RabbitMQ may be acked a moment later.
pub(crate) async fn has_letters<P: Place>(place: &P, number: usize) {
    for _ in 0..200 {
        if list(place, Filter::all()).await.len() == number {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not {number}: {:?}", list(place, Filter::all()).await);
}

/// Makes each scenario a test; `place` returns the [`Place`] for one with this name.
macro_rules! scenarios {
    ($place:path, $test:meta) => {
        crate::dead_letters::scenarios! { $place, $test,
            a_list_tells_the_reason_and_changes_nothing
            a_job_that_is_moved_back_begins_anew
            only_those_that_match_are_moved
            a_letter_that_was_moved_back_three_times_stays
            a_run_ends_though_each_job_fails_at_once
            a_limit_a_dry_run_and_a_break_leave_the_others
            a_purge_deletes_what_matches
            without_a_destination_a_letter_stays
            a_run_that_is_dropped_loses_nothing
        }
    };
    ($place:path, $test:meta, $($name:ident)*) => {
        $(
            #[$test]
            async fn $name() {
                crate::dead_letters::$name($place(stringify!($name)).await).await;
            }
        )*
    };
}

pub(crate) use scenarios;

pub(crate) async fn a_list_tells_the_reason_and_changes_nothing<P: Place>(mut place: P) {
    place.publish("one").await;
    settle(
        &mut place,
        Verdict::retry(),
        reason(OutcomeKind::Failed, "no"),
    )
    .await;
    reject(&mut place, OutcomeKind::Panicked, "index 7").await;
    bury(&mut place, "two", OutcomeKind::Failed, "no such table").await;

    for _ in 0..2 {
        let letters = list(&place, Filter::all()).await;
        let [one, two] = &letters[..] else {
            panic!("{letters:?}");
        };
        assert_eq!(one.kind.as_deref(), Some("panicked"));
        assert_eq!(one.message.as_deref(), Some("index 7"));
        assert_eq!(one.deliveries, Some(2));
        assert_eq!(one.destination, Some(place.name()));
        assert_eq!(one.redriven, 0);
        let age = one.time.unwrap().elapsed().unwrap_or_default();
        assert!(age < Duration::from_secs(60), "{age:?}");
        assert_eq!(two.kind.as_deref(), Some("failed"));
        assert_eq!(two.deliveries, Some(1));
    }
    let first = place.letters().list(&Filter::all(), 1).await.unwrap();
    assert_eq!(first[0].kind.as_deref(), Some("panicked"));
    assert_eq!(list(&place, Filter::all().message("such")).await.len(), 1);
    let hour = Duration::from_secs(3_600);
    assert_eq!(list(&place, Filter::all().older_than(hour)).await, []);
    assert_eq!(
        list(&place, Filter::all().younger_than(hour)).await.len(),
        2
    );
}

pub(crate) async fn a_job_that_is_moved_back_begins_anew<P: Place>(mut place: P) {
    place.publish("one").await;
    settle(
        &mut place,
        Verdict::retry(),
        reason(OutcomeKind::Failed, "no"),
    )
    .await;
    let seen = reject(&mut place, OutcomeKind::Failed, "no").await;
    assert_eq!(seen.deliveries, Some(2));

    let tally = Redrive::new(Filter::all()).run(&place.letters()).await;
    assert_eq!(numbers(tally.unwrap()), [1, 1, 0, 0, 0]);

    let expected = Seen {
        body: "one".to_owned(),
        deliveries: Some(1),
        redelivered: Some(false),
        redriven: Some("1".to_owned()),
        tenant: Some("acme".to_owned()),
    };
    assert_eq!(ack(&mut place).await, expected);
    has_letters(&place, 0).await;
}

pub(crate) async fn only_those_that_match_are_moved<P: Place>(mut place: P) {
    for n in 0..6 {
        let kind = match n % 2 {
            0 => OutcomeKind::Failed,
            _ => OutcomeKind::TimedOut,
        };
        bury(&mut place, &format!("job {n}"), kind, "no").await;
    }
    let redrive = Redrive::new(Filter::all().kind("timed_out")).batch(2);
    let tally = redrive.run(&place.letters()).await.unwrap();
    assert_eq!(numbers(tally), [6, 3, 3, 0, 3]);
    assert_eq!(ack_all(&mut place, 3).await, jobs([1, 3, 5]));
    has_letters(&place, 3).await;
    // Those that were passed over are still there for the next run.
    let tally = Redrive::new(Filter::all()).run(&place.letters()).await;
    assert_eq!(numbers(tally.unwrap()), [3, 3, 0, 0, 0]);
    assert_eq!(ack_all(&mut place, 3).await, jobs([0, 2, 4]));
}

pub(crate) async fn a_letter_that_was_moved_back_three_times_stays<P: Place>(mut place: P) {
    bury(&mut place, "poison", OutcomeKind::Failed, "error 0").await;
    let redrive = Redrive::new(Filter::all());
    for n in 1..=3 {
        let tally = redrive.run(&place.letters()).await.unwrap();
        assert_eq!(numbers(tally), [1, 1, 0, 0, 0]);
        let seen = reject(&mut place, OutcomeKind::Failed, &format!("error {n}")).await;
        assert_eq!(seen.redriven, Some(n.to_string()));
        has_letters(&place, 1).await;
        let letters = list(&place, Filter::all()).await;
        assert_eq!(letters[0].redriven, n);
        // The newest reason counts.
        assert_eq!(letters[0].message, Some(format!("error {n}")));
        assert_eq!(letters[0].deliveries, Some(1));
    }
    let tally = redrive.run(&place.letters()).await.unwrap();
    assert_eq!(numbers(tally), [1, 0, 0, 1, 1]);
    let tally = redrive.max_redrives(None).run(&place.letters()).await;
    assert_eq!(numbers(tally.unwrap()), [1, 1, 0, 0, 0]);
    assert_eq!(ack(&mut place).await.redriven.as_deref(), Some("4"));
}

pub(crate) async fn a_run_ends_though_each_job_fails_at_once<P: Place>(mut place: P) {
    const LETTERS: u64 = 5;
    for n in 0..LETTERS {
        bury(&mut place, &format!("job {n}"), OutcomeKind::Failed, "no").await;
    }
    let letters = place.letters();
    let redrive = Redrive::new(Filter::all()).batch(1).max_redrives(None);
    let mut tally = None;
    // A worker that rejects each job, after each batch of one.
    let running = async { tally = Some(redrive.run(&letters).await.unwrap()) };
    let rejecting = async {
        for _ in 0..LETTERS {
            reject(&mut place, OutcomeKind::Failed, "no").await;
        }
    };
    let both = async { tokio::join!(running, rejecting) };
    timeout(Duration::from_secs(60), both).await.unwrap();
    assert_eq!(numbers(tally.unwrap()), [LETTERS, LETTERS, 0, 0, 0]);
    has_letters(&place, LETTERS as usize).await;
    let letters = list(&place, Filter::all()).await;
    assert!(
        letters.iter().all(|letter| letter.redriven == 1),
        "{letters:?}"
    );
}

pub(crate) async fn a_limit_a_dry_run_and_a_break_leave_the_others<P: Place>(mut place: P) {
    for n in 0..5 {
        bury(&mut place, &format!("job {n}"), OutcomeKind::Failed, "no").await;
    }
    let redrive = Redrive::new(Filter::all()).batch(2);
    let dry = redrive.clone().dry_run().run(&place.letters()).await;
    assert_eq!(numbers(dry.unwrap()), [5, 5, 0, 0, 0]);

    let letters = place.letters();
    let limited = redrive.clone().limit(1);
    let tally = spawnable(limited.run(&letters)).await;
    assert_eq!(numbers(tally.unwrap()), [5, 1, 0, 0, 4]);
    assert_eq!(ack(&mut place).await.body, "job 0");
    has_letters(&place, 4).await;

    let mut calls = Vec::new();
    let letters = place.letters();
    let broken = redrive.run_with(&letters, |tally| {
        calls.push(tally.moved);
        ControlFlow::Break(())
    });
    assert_eq!(numbers(broken.await.unwrap()), [4, 2, 0, 0, 2]);
    assert_eq!(calls, [2]);
    assert_eq!(ack_all(&mut place, 2).await, jobs([1, 2]));
    has_letters(&place, 2).await;
}

pub(crate) async fn a_purge_deletes_what_matches<P: Place>(mut place: P) {
    for n in 0..5 {
        let message = format!("error {}", n % 2);
        bury(&mut place, "job", OutcomeKind::Failed, &message).await;
    }
    let purge = Purge::new(Filter::all().message("error 1")).batch(2);
    let dry = purge.clone().dry_run().run(&place.letters()).await.unwrap();
    assert_eq!((dry.deleted, dry.left()), (2, 3));
    has_letters(&place, 5).await;

    let tally = purge.run(&place.letters()).await.unwrap();
    assert_eq!((tally.deleted, tally.skipped, tally.left()), (2, 3, 3));
    has_letters(&place, 3).await;

    let all = Purge::new(Filter::all());
    let tally = all.clone().limit(1).run(&place.letters()).await.unwrap();
    assert_eq!((tally.deleted, tally.left()), (1, 2));
    let tally = all.run(&place.letters()).await.unwrap();
    assert_eq!((tally.deleted, tally.left()), (2, 0));
    has_letters(&place, 0).await;
}

pub(crate) async fn without_a_destination_a_letter_stays<P: Place>(mut place: P) {
    bury(&mut place, "job", OutcomeKind::Failed, "no").await;
    let redrive = Redrive::new(Filter::all());
    let nowhere = redrive.clone().destination("nowhere-at-all");
    let tally = nowhere.run(&place.letters()).await.unwrap();
    assert_eq!((tally.unroutable, tally.moved, tally.left()), (1, 0, 1));
    has_letters(&place, 1).await;

    let name = place.name();
    let tally = redrive.destination(name).run(&place.letters()).await;
    assert_eq!(numbers(tally.unwrap()), [1, 1, 0, 0, 0]);
    assert_eq!(ack(&mut place).await.body, "job");
}

pub(crate) async fn a_run_that_is_dropped_loses_nothing<P: Place>(mut place: P) {
    for n in 0..4 {
        bury(&mut place, &format!("job {n}"), OutcomeKind::Failed, "no").await;
    }
    let letters = place.letters();
    // A pass that has taken some, as if it were dropped within a batch.
    let mut pass = letters.pass().await.unwrap();
    let taken = pass.next(3).await.unwrap();
    assert_eq!(taken.len(), 3);
    drop((taken, pass));
    has_letters(&place, 4).await;
    let tally = Redrive::new(Filter::all()).run(&letters).await;
    assert_eq!(numbers(tally.unwrap()), [4, 4, 0, 0, 0]);
    assert_eq!(ack_all(&mut place, 4).await, jobs(0..4));
}
