//! Settlements under a drain, a drop and a lost lease.

use std::future::pending;

use tokio::{
    runtime::Handle,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tower::{Layer, ServiceExt, service_fn};
use tower_sentinel::{SentinelLayer, SettlePolicy, Verdict, outcome::CancelReason};

use super::{SECOND, TRY, Try, ms, scripted};
use crate::support::{Refused, call, idle, tag::Tag};

#[tokio::test(start_paused = true)]
async fn a_settlement_goes_on_though_a_drain_is_under_way() {
    let shutdown = CancellationToken::new();
    let sentinel = SentinelLayer::new(SettlePolicy::default())
        .shutdown(shutdown.clone())
        .layer(service_fn(async |_: Tag| {
            pending::<Result<(), Refused>>().await
        }));
    let tag = scripted(&[Try::Again, Try::Again, Try::Slow]);
    let response = tokio::spawn(sentinel.oneshot(tag.clone()));
    sleep(SECOND).await;
    assert_eq!(tag.tries(), 0);
    shutdown.cancel();
    let started = Instant::now();
    let settled = response.await.unwrap().unwrap();
    assert_eq!(settled.verdict, Verdict::release());
    assert!(!settled.charged);
    assert_eq!(started.elapsed(), 3 * TRY + ms(300));
    assert_eq!(tag.tries(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_drain_that_begins_while_a_job_settles_does_not_cut_it_short() {
    let shutdown = CancellationToken::new();
    let sentinel = SentinelLayer::new(SettlePolicy::default())
        .shutdown(shutdown.clone())
        .layer(service_fn(async |_: Tag| Ok::<_, Refused>(())));
    let tag = scripted(&[Try::Again, Try::Slow]);
    let started = Instant::now();
    let response = tokio::spawn(sentinel.oneshot(tag.clone()));
    // In the first try; the second is in the drain.
    sleep(TRY / 2).await;
    assert_eq!(tag.tries(), 1);
    shutdown.cancel();
    let settled = response.await.unwrap().unwrap();
    assert_eq!(settled.verdict, Verdict::Ack);
    assert_eq!(started.elapsed(), 2 * TRY + ms(100));
}

#[tokio::test(start_paused = true)]
async fn a_settlement_goes_on_though_the_caller_drops() {
    // While the job runs, in a try, and in a pause.
    for (dropped, ends, verdict) in [
        (ms(500), 500 + 300 + 100 + 300, Verdict::release()),
        (ms(1_100), 1_000 + 300 + 100 + 300, Verdict::Ack),
        (ms(1_350), 1_000 + 300 + 100 + 300, Verdict::Ack),
    ] {
        let sentinel =
            SentinelLayer::new(SettlePolicy::default()).layer(service_fn(async |_: Tag| {
                sleep(SECOND).await;
                Ok::<_, Refused>(())
            }));
        let tag = scripted(&[Try::Again, Try::Slow]);
        let started = Instant::now();
        let response = tokio::spawn(sentinel.oneshot(tag.clone()));
        sleep(dropped).await;
        response.abort();
        assert!(response.await.unwrap_err().is_cancelled());
        idle(&Handle::current()).await;
        let told = tag.told();
        assert!(
            told.iter().all(|told| told.verdict == verdict),
            "{dropped:?}"
        );
        assert_eq!(
            tag.times(started).last(),
            Some(&(ms(ends) - TRY)),
            "{dropped:?}"
        );
        assert_eq!(told.len(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_whose_lease_is_lost_is_abandoned_through_its_tag() {
    let mut sentinel =
        SentinelLayer::new(SettlePolicy::default()).layer(service_fn(async |_: Tag| {
            tower_sentinel::cancel::Cancellation::current().cancel(CancelReason::LeaseLost);
            pending::<Result<(), Refused>>().await
        }));
    let tag = scripted(&[Try::Ok]);
    let settled = call(&mut sentinel, tag.clone()).await.unwrap();
    assert_eq!(settled.verdict, Verdict::Abandon);
    assert!(!settled.charged);
    // The tag gets the verdict, and sends nothing.
    assert_eq!(tag.told()[0].verdict, Verdict::Abandon);
    assert_eq!(tag.tries(), 1);
}
