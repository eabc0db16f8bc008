//! Callers that drop.

use std::{
    convert::Infallible,
    panic,
    sync::{Arc, Mutex, atomic::Ordering::SeqCst},
    task::Poll,
    time::Duration,
};

use futures_util::poll;
use tokio::{
    sync::Semaphore,
    task::{JoinSet, yield_now},
    time::{sleep, timeout},
};
use tower::{
    Service, ServiceBuilder, ServiceExt,
    limit::{ConcurrencyLimitLayer, GlobalConcurrencyLimitLayer},
    service_fn,
};
use tower_sentinel::{
    Outcome, Report, SentinelError, SentinelLayer, outcome::OutcomeKind, sentinel::OnDrop,
};

use super::{FATES, Fate, Ledger, Work, meet, process, sentinel};

#[derive(Clone, Copy, Debug, PartialEq)]
enum When {
    BeforeTheFirstPoll,
    Running,
    Settling,
}

async fn a_drop_frees_the_permit(on_drop: OnDrop, when: When) {
    let permits = Arc::new(Semaphore::new(1));
    // The job returns, and the policy responds, once the test allows it.
    let (run, settle) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let reports = Arc::new(Mutex::new(Vec::new()));
    let policy = {
        let (reports, settle) = (Arc::clone(&reports), Arc::clone(&settle));
        service_fn(move |report: Report<Arc<u64>, (), Infallible>| {
            let settle = Arc::clone(&settle);
            let reports = Arc::clone(&reports);
            async move {
                reports
                    .lock()
                    .unwrap()
                    .push((*report.tag, report.outcome.kind(), "called"));
                settle.acquire().await.unwrap().forget();
                reports
                    .lock()
                    .unwrap()
                    .push((*report.tag, report.outcome.kind(), "settled"));
                Ok::<_, Infallible>(())
            }
        })
    };
    let mut service = ServiceBuilder::new()
        .layer(GlobalConcurrencyLimitLayer::with_semaphore(Arc::clone(
            &permits,
        )))
        .layer(SentinelLayer::new(policy).on_drop(on_drop))
        .service_fn({
            let run = Arc::clone(&run);
            move |_job: Arc<u64>| {
                let run = Arc::clone(&run);
                async move {
                    run.acquire().await.unwrap().forget();
                    Ok::<_, Infallible>(())
                }
            }
        });

    if when == When::Settling {
        run.add_permits(1);
    }
    let mut response = Box::pin(service.ready().await.unwrap().call(Arc::new(7)));
    if when != When::BeforeTheFirstPoll {
        for _ in 0..10 {
            assert!(poll!(&mut response).is_pending());
            yield_now().await;
        }
    }
    let called = usize::from(when == When::Settling);
    assert_eq!(reports.lock().unwrap().len(), called);
    assert_eq!(permits.available_permits(), 0);

    drop(response);
    // At once: before anybody else was polled.
    assert_eq!(permits.available_permits(), 1);
    assert_eq!(reports.lock().unwrap().len(), called);

    let outcome = match (on_drop, when) {
        (_, When::Settling) | (OnDrop::Detach, _) => OutcomeKind::Completed,
        (OnDrop::Abort, _) => OutcomeKind::Cancelled,
    };
    // A second job is let in while the first is not settled: this is the meaning of the permit.
    let second = service.ready().await.unwrap().call(Arc::new(8));
    run.add_permits(2);
    settle.add_permits(2);
    second.await.unwrap();
    sleep(Duration::from_millis(1)).await;
    let mut reports = reports.lock().unwrap().clone();
    reports.sort();
    assert_eq!(
        reports,
        [
            (7, outcome, "called"),
            (7, outcome, "settled"),
            (8, OutcomeKind::Completed, "called"),
            (8, OutcomeKind::Completed, "settled"),
        ]
    );
    assert_eq!(permits.available_permits(), 1);
}

#[tokio::test(start_paused = true)]
async fn g4_a_drop_frees_its_permit_at_once_when_jobs_are_aborted() {
    for when in [When::BeforeTheFirstPoll, When::Running, When::Settling] {
        a_drop_frees_the_permit(OnDrop::Abort, when).await;
    }
}

#[tokio::test(start_paused = true)]
async fn g4_a_drop_frees_its_permit_at_once_when_jobs_are_detached() {
    for when in [When::BeforeTheFirstPoll, When::Running, When::Settling] {
        a_drop_frees_the_permit(OnDrop::Detach, when).await;
    }
}

#[tokio::test(start_paused = true)]
async fn g4_callers_that_drop_outrun_a_gate_that_they_own_themselves() {
    // The reason for the outer sentinel of the test below.
    const PERMITS: usize = 4;
    let ledger = Ledger::new(2 * PERMITS, PERMITS);
    let mut service = ServiceBuilder::new()
        .layer(ConcurrencyLimitLayer::new(PERMITS))
        .layer(sentinel(&ledger, Duration::from_millis(50)).on_drop(OnDrop::Detach))
        .service_fn(process);
    for id in 0..2 * PERMITS {
        drop(
            service
                .ready()
                .await
                .unwrap()
                .call(ledger.work(id, Fate::Hang)),
        );
    }
    assert_eq!(ledger.gauge.max(), 2 * PERMITS);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(ledger.gauge.now(), 0);
}

/// A generator that is the same on every run (Knuth's MMIX constants).
struct Lcg(u64);

impl Lcg {
    fn below(&mut self, bound: u64) -> u64 {
        let Lcg(state) = self;
        *state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (*state >> 33) % bound
    }
}

/// Response of a policy that forwards to the caller: the outcome of the whole gated stack.
type Forwarded = Outcome<OutcomeKind, SentinelError<&'static str, &'static str>>;

async fn drop_at_random(permits: usize, jobs: usize, limit: Duration) {
    let ledger = Ledger::new(jobs, permits);
    let gated = ServiceBuilder::new()
        .layer(ConcurrencyLimitLayer::new(permits))
        .layer(sentinel(&ledger, limit))
        .service_fn(process);
    let forward = service_fn(|report: Report<usize, _, _>| async move {
        let outcome: Forwarded = report.outcome;
        Ok::<_, Infallible>(outcome)
    });
    let mut service = ServiceBuilder::new()
        .layer(
            SentinelLayer::with_tag(forward, |work: &Work| work.id)
                .on_drop(OnDrop::Detach)
                .no_timeout(),
        )
        .service(gated);

    let mut random = Lcg(7);
    let (mut dropped, mut forwarded) = (0, 0);
    let mut responses = JoinSet::new();
    for id in 0..jobs {
        let fate = FATES[random.below(FATES.len() as u64) as usize];
        let work = ledger.work(id, fate);
        let response = service.ready().await.unwrap().call(work);
        match random.below(4) {
            0 => {
                drop(response);
                dropped += 1;
            }
            1 => {
                let mut response = Box::pin(response);
                match poll!(&mut response) {
                    Poll::Ready(answer) => drop(answer.unwrap()),
                    Poll::Pending => dropped += 1,
                }
            }
            2 => {
                let patience = limit.mul_f64(random.below(300) as f64 / 100.0);
                responses.spawn(async move { timeout(patience, response).await.ok() });
            }
            _ => {
                responses.spawn(async move { Some(response.await) });
            }
        }
    }
    for answer in responses.join_all().await {
        match answer {
            None => dropped += 1,
            Some(answer) => match answer.unwrap() {
                Outcome::Completed(_)
                | Outcome::Failed(
                    SentinelError::Policy(_)
                    | SentinelError::PolicyPanicked(_)
                    | SentinelError::PolicyTimedOut(_),
                ) => forwarded += 1,
                other => panic!("the gated stack itself has no fate: {other:?}"),
            },
        }
    }
    // Not a test of patience: many were dropped and many were not.
    assert!(
        dropped > jobs / 2 && forwarded > jobs / 4,
        "{dropped} {forwarded}"
    );

    meet(&mut service, &ledger, jobs, permits).await;
    // The jobs that met had permits, so the jobs that had them before are settled.
    assert_eq!(ledger.gauge.max(), permits);
    let calls = ledger.calls();
    assert!(calls.iter().all(|&calls| calls <= 1));
    let never_ready = ledger.never_ready.load(SeqCst);
    assert_eq!(calls.iter().sum::<usize>() + never_ready, jobs + permits);
}

#[tokio::test(start_paused = true)]
async fn g4_the_gate_holds_though_callers_drop_if_a_detached_sentinel_owns_it() {
    drop_at_random(8, 3_000, Duration::from_millis(50)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn g4_the_gate_holds_though_callers_drop_on_many_threads() {
    // A settle timeout may be late for its policy here, which only adds to the mix; but no policy
    // may be mistaken for one that was never ready, so the limit is not as short as it could be.
    drop_at_random(16, 2_000, Duration::from_millis(20)).await;
}
