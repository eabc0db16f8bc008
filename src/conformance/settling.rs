//! Scenarios of one delivery: the effect of each verdict.

use std::{pin::pin, time::Duration};

use futures_util::{
    StreamExt,
    future::{Either, select},
};
use tokio::time::{Instant, sleep};

use crate::{
    conformance::{
        error::ConformanceError,
        fixture::{DeadLetter, Fixture},
        run::{Run, body, reason, sorted_bodies},
    },
    job::Job,
    outcome::OutcomeKind,
    settle::{Lease, Settle, Verdict},
};

/// Scenario of an ack: the job is gone, for a later subscription too.
///
/// # Errors
///
/// Returns the first expectation that was not met.
pub async fn an_ack_removes_the_job<F: Fixture>(
    fixture: &F,
) -> Result<(), ConformanceError<F::Error>> {
    let run = Run::new("an_ack_removes_the_job", fixture);
    run.publish("one").await?;
    let mut jobs = run.subscribe(5).await?;
    let job = run.take(&mut jobs).await?;
    run.equal("the job", &*body(&job), "one")?;
    run.settle(&job, Verdict::Ack).await?;
    run.left(0).await?;

    run.close(&mut jobs).await?;
    let mut jobs = run.subscribe(5).await?;
    run.quiet(&mut jobs).await
}

/// Scenario of a retry: the job is delivered again, and each delivery counts one more.
///
/// # Errors
///
/// Returns the first expectation that was not met.
pub async fn a_retry_redelivers_with_the_count_raised<F: Fixture>(
    fixture: &F,
) -> Result<(), ConformanceError<F::Error>> {
    let run = Run::new("a_retry_redelivers_with_the_count_raised", fixture);
    run.publish("one").await?;
    let mut jobs = run.subscribe(1).await?;
    for delivery in 1..=3 {
        let job = run.take(&mut jobs).await?;
        run.equal("the job", &*body(&job), "one")?;
        run.delivered(&job.tag(), delivery)?;
        if let Some(redelivered) = job.tag().redelivered() {
            let subject = format_args!("`redelivered` of delivery {delivery}");
            run.equal(subject, redelivered, delivery > 1)?;
        }
        run.settle(&job, Verdict::retry()).await?;
    }
    run.take(&mut jobs).await?;
    Ok(())
}

/// Scenario of a retry with a delay: the job comes back when it is due, and not before; without the
/// capability the retry is refused.
///
/// # Errors
///
/// Returns the first expectation that was not met.
pub async fn a_delayed_retry_is_not_seen_before_its_time<F: Fixture>(
    fixture: &F,
) -> Result<(), ConformanceError<F::Error>> {
    let run = Run::new("a_delayed_retry_is_not_seen_before_its_time", fixture);
    let delay = Duration::from_secs(1);
    let verdict = Verdict::retry_after(delay);
    run.publish("one").await?;
    let mut jobs = run.subscribe(1).await?;
    let job = run.take(&mut jobs).await?;
    let asked = Instant::now();
    if !fixture.capabilities().has_delay() {
        // Refused, and not replaced with a retry without a delay.
        let settled = run.settled(job.tag(), verdict).await?;
        let expected = "a delay to be refused without the capability";
        run.holds(settled.is_err(), expected, "success")?;
        return run.quiet(&mut jobs).await;
    }
    run.settle(&job, verdict).await?;
    let job = run.take(&mut jobs).await?;
    let waited = asked.elapsed();
    let expected = format_args!(
        "the job after {delay:?} at the earliest and {:?}",
        5 * delay
    );
    run.holds(waited >= delay && waited < 5 * delay, expected, waited)?;
    run.delivered(&job.tag(), 2)?;
    run.settle(&job, Verdict::Ack).await?;
    run.left(0).await
}

/// Scenario of a reject: the job is gone, and its dead letter has the reason.
///
/// # Errors
///
/// Returns the first expectation that was not met.
pub async fn a_reject_is_kept_with_its_reason<F: Fixture>(
    fixture: &F,
) -> Result<(), ConformanceError<F::Error>> {
    let run = Run::new("a_reject_is_kept_with_its_reason", fixture);
    run.publish("poison").await?;
    let mut jobs = run.subscribe(1).await?;
    let job = run.take(&mut jobs).await?;
    let mut why = reason();
    why.kind = OutcomeKind::Panicked;
    why.message = Some("index 7".into());
    let rejecting = job.tag().settle(Verdict::Reject, why);
    let rejected = run.in_time("an end of the reject", rejecting).await?;
    run.succeeds("the reject", rejected.map_err(|unsettled| unsettled.error))?;
    run.left(0).await?;
    run.dead(DeadLetter {
        body: "poison".into(),
        kind: OutcomeKind::Panicked,
        message: Some("index 7".into()),
    })
    .await?;
    run.quiet(&mut jobs).await
}

/// Scenario of a release: it counts as an attempt only if the capabilities say so.
///
/// # Errors
///
/// Returns the first expectation that was not met.
pub async fn a_release_is_free_where_the_broker_can_tell<F: Fixture>(
    fixture: &F,
) -> Result<(), ConformanceError<F::Error>> {
    let run = Run::new("a_release_is_free_where_the_broker_can_tell", fixture);
    run.publish("one").await?;
    let mut jobs = run.subscribe(1).await?;
    for _ in 0..2 {
        let job = run.take(&mut jobs).await?;
        run.settle(&job, Verdict::release()).await?;
    }
    let job = run.take(&mut jobs).await?;
    let is_free = fixture.capabilities().release_is_free();
    run.delivered(&job.tag(), if is_free { 1 } else { 3 })
}

/// Scenario of a prefetch: no more jobs are delivered than that, and each settlement allows one more.
///
/// # Errors
///
/// Returns the first expectation that was not met.
pub async fn prefetch_holds<F: Fixture>(fixture: &F) -> Result<(), ConformanceError<F::Error>> {
    let run = Run::new("prefetch_holds", fixture);
    run.publish_n(20).await?;
    let mut jobs = run.subscribe(5).await?;
    let mut held = run.take_n(&mut jobs, 5).await?;
    run.quiet(&mut jobs).await?;
    let backlog = run.backlog().await?;
    run.holds(backlog.unacked <= 5, "no more than 5 unacked jobs", backlog)?;
    run.equal("the jobs that are left", backlog.total, 20)?;

    for _ in 1..=15 {
        run.settle(&held.remove(0), Verdict::Ack).await?;
        held.push(run.take(&mut jobs).await?);
        let backlog = run.backlog().await?;
        run.holds(backlog.unacked <= 5, "no more than 5 unacked jobs", backlog)?;
    }
    for job in held {
        run.settle(&job, Verdict::Ack).await?;
    }
    run.left(0).await
}

/// Scenario of a second settlement: it is refused without a message to the broker, and the channel lives.
///
/// # Errors
///
/// Returns the first expectation that was not met.
pub async fn a_second_settlement_is_refused<F: Fixture>(
    fixture: &F,
) -> Result<(), ConformanceError<F::Error>> {
    let run = Run::new("a_second_settlement_is_refused", fixture);
    run.publish_n(3).await?;
    let mut jobs = run.subscribe(3).await?;
    let held = run.take_n(&mut jobs, 3).await?;
    for (job, first) in held.iter().zip([Verdict::Ack, Verdict::Reject]) {
        run.settle(job, first).await?;
        for second in [
            Verdict::Ack,
            Verdict::retry(),
            Verdict::release(),
            Verdict::Reject,
        ] {
            let expected = format_args!("\"{second}\" after \"{first}\" to be refused for good");
            match run.settled(job.tag(), second).await? {
                Ok(()) => return run.violated(expected, "success"),
                Err(unsettled) => {
                    run.holds(unsettled.tag.is_none(), expected, "the tag given back")?;
                }
            }
        }
    }
    // Nothing was sent, so the channel lives.
    run.settle(&held[2], Verdict::Ack).await?;
    run.left(0).await
}

/// Scenario of settlements in another order than that of the deliveries.
///
/// # Errors
///
/// Returns the first expectation that was not met.
pub async fn the_order_of_settling_is_free<F: Fixture>(
    fixture: &F,
) -> Result<(), ConformanceError<F::Error>> {
    let run = Run::new("the_order_of_settling_is_free", fixture);
    run.publish_n(6).await?;
    let mut jobs = run.subscribe(6).await?;
    let held = run.take_n(&mut jobs, 6).await?;
    let back = [1, 4];
    for index in [5, 1, 0, 4, 3, 2] {
        let verdict = match back.contains(&index) {
            true => Verdict::retry(),
            false => Verdict::Ack,
        };
        run.settle(&held[index], verdict).await?;
    }
    let again = run.take_n(&mut jobs, 2).await?;
    let mut expected = back.map(|index| body(&held[index]));
    expected.sort_unstable();
    run.equal("the retried jobs", sorted_bodies(&again), expected.to_vec())?;
    for job in again {
        run.settle(&job, Verdict::Ack).await?;
    }
    run.left(0).await
}

/// Scenario of a keep-alive: it holds a job past its lease, and reports when the lease is lost;
/// without the capability it is refused.
///
/// # Errors
///
/// Returns the first expectation that was not met.
pub async fn keep_alive_holds_a_job_past_the_redelivery_time<F: Fixture>(
    fixture: &F,
) -> Result<(), ConformanceError<F::Error>> {
    let run = Run::new("keep_alive_holds_a_job_past_the_redelivery_time", fixture);
    run.publish("one").await?;
    let mut jobs = run.subscribe(4).await?;
    let mut other = run.subscribe(4).await?;
    let (tag, is_mine) = match select(pin!(run.take(&mut jobs)), pin!(run.take(&mut other))).await {
        Either::Left((job, _)) => (job?.tag(), true),
        Either::Right((job, _)) => (job?.tag(), false),
    };
    let other = if is_mine { &mut other } else { &mut jobs };
    let can_keep_alive = fixture.capabilities().has_keep_alive();
    let Some(lease) = fixture.lease() else {
        run.holds(!can_keep_alive, "no keep-alive without a lease", "one")?;
        let kept = run.in_time("an end of a keep-alive", tag.keep_alive());
        let expected = "a keep-alive to be refused without the capability";
        run.holds(kept.await?.is_err(), expected, "success")?;
        return run.quiet(other).await;
    };
    run.holds(can_keep_alive, "a keep-alive beside a lease", "none")?;
    for _ in 0..8 {
        sleep(lease / 3).await;
        let kept = run.succeeds("a keep-alive", tag.keep_alive().await)?;
        run.equal("the lease of a job that is kept alive", kept, Lease::Held)?;
    }
    run.equal("the unacked jobs", run.backlog().await?.unacked, 1)?;

    // Without it, another consumer gets the job, and the first one's settlement is void.
    let twin = run.take(other).await?.tag();
    let kept = run.succeeds("a keep-alive", tag.keep_alive().await)?;
    let subject = "the lease of a job that another consumer has";
    run.equal(subject, kept, Lease::Lost)?;
    run.settle_tag(tag, Verdict::Abandon).await?;
    run.settle_tag(twin, Verdict::Ack).await?;
    run.left(0).await
}

/// Scenario of a tag's capabilities and its count of deliveries.
///
/// # Errors
///
/// Returns the first expectation that was not met.
pub async fn a_tag_tells_what_its_broker_can_do<F: Fixture>(
    fixture: &F,
) -> Result<(), ConformanceError<F::Error>> {
    let run = Run::new("a_tag_tells_what_its_broker_can_do", fixture);
    run.publish("one").await?;
    let mut jobs = run.subscribe(1).await?;
    let tag = run.take(&mut jobs).await?.tag();
    let expected = fixture.capabilities();
    run.equal("the capabilities", tag.capabilities(), expected)?;
    let expected = fixture.counts_deliveries();
    let subject = "whether there is a count of deliveries";
    run.equal(subject, tag.deliveries().is_some(), expected)
}

/// Scenario of a channel that is closed: the next one is delivered all jobs that this one held.
///
/// # Errors
///
/// Returns the first expectation that was not met.
pub async fn a_closed_subscription_redelivers_what_it_held<F: Fixture>(
    fixture: &F,
) -> Result<(), ConformanceError<F::Error>> {
    let run = Run::new("a_closed_subscription_redelivers_what_it_held", fixture);
    run.publish_n(3).await?;
    let mut jobs = run.subscribe(3).await?;
    let held = sorted_bodies(&run.take_n(&mut jobs, 3).await?);
    run.close(&mut jobs).await?;
    run.closed(&mut jobs).await?;
    let next = run.in_time("the end of the stream", jobs.next()).await?;
    run.holds(next.is_none(), "the end of the stream", "another item")?;

    let mut jobs = run.subscribe(3).await?;
    let again = run.take_n(&mut jobs, 3).await?;
    run.equal("the redelivered jobs", sorted_bodies(&again), held)?;
    for job in again {
        let is_charged = fixture.charges_lost_deliveries();
        run.delivered(&job.tag(), if is_charged { 2 } else { 1 })?;
        let expected = "`redelivered` to be true, or unknown";
        run.holds(job.tag().redelivered() != Some(false), expected, "false")?;
        run.settle(&job, Verdict::Ack).await?;
    }
    run.left(0).await
}
