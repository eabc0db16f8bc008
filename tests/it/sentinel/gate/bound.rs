//! The gate holds while callers wait.

use std::{
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use tokio::task::JoinSet;
use tower::{Service, ServiceBuilder, ServiceExt, limit::ConcurrencyLimitLayer};
use tower_sentinel::{SentinelError, outcome::OutcomeKind};

use super::{FATES, Ledger, POLICY_FATES, PolicyFate, Work, meet, process, sentinel};

type Settled = Result<OutcomeKind, SentinelError<&'static str, &'static str>>;

/// Calls `jobs` jobs of mixed fates as fast as the gate lets them in, and waits for each.
async fn drive<S>(service: &mut S, ledger: &Arc<Ledger>, jobs: usize) -> Vec<Settled>
where
    S: Service<
            Work,
            Response = OutcomeKind,
            Error = SentinelError<&'static str, &'static str>,
            Future: Send + 'static,
        >,
{
    // The clone that `layer` made had the first number.
    ledger.clones.store(0, SeqCst);
    let mut responses = JoinSet::new();
    for id in 0..jobs {
        let work = ledger.work(id, FATES[id % FATES.len()]);
        let response = service.ready().await.unwrap().call(work);
        responses.spawn(async move { (id, response.await) });
    }
    let mut settled = responses.join_all().await;
    settled.sort_by_key(|(id, _)| *id);
    settled.into_iter().map(|(_, settled)| settled).collect()
}

#[tokio::test(start_paused = true)]
async fn g4_running_and_unsettled_jobs_never_exceed_the_limit_in_paused_time() {
    const PERMITS: usize = 8;
    const JOBS: usize = 40 * FATES.len() * POLICY_FATES.len();
    let limit = Duration::from_millis(50);
    let ledger = Ledger::new(JOBS, PERMITS);
    let mut service = ServiceBuilder::new()
        .layer(ConcurrencyLimitLayer::new(PERMITS))
        .layer(sentinel(&ledger, limit))
        .service_fn(process);

    let settled = drive(&mut service, &ledger, JOBS).await;

    // The gate was used to its full width, and never beyond.
    assert_eq!(ledger.gauge.max(), PERMITS);
    assert_eq!(ledger.gauge.now(), 0);
    for (id, settled) in settled.iter().enumerate() {
        let fate = FATES[id % FATES.len()];
        let policy = POLICY_FATES[id % POLICY_FATES.len()];
        let as_expected = match policy {
            PolicyFate::Answers | PolicyFate::AnswersLate | PolicyFate::ReadyLate => {
                matches!(settled, Ok(kind) if *kind == fate.kind())
            }
            PolicyFate::Fails => matches!(settled, Err(SentinelError::Policy("not acked"))),
            PolicyFate::Unready => matches!(settled, Err(SentinelError::Policy("unready"))),
            PolicyFate::PanicsInCall | PolicyFate::PanicsLater | PolicyFate::UnreadyPanics => {
                matches!(settled, Err(SentinelError::PolicyPanicked(_)))
            }
            PolicyFate::Hangs | PolicyFate::NeverReady => {
                matches!(settled, Err(SentinelError::PolicyTimedOut(after)) if *after == limit)
            }
        };
        assert!(
            as_expected,
            "job {id}: {fate:?} under {policy:?} gave {settled:?}"
        );
        assert_eq!(
            ledger.calls()[id],
            usize::from(policy.is_called()),
            "job {id}"
        );
    }
    meet(&mut service, &ledger, JOBS, PERMITS).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn g4_running_and_unsettled_jobs_never_exceed_the_limit_on_many_threads() {
    const PERMITS: usize = 16;
    const JOBS: usize = 30 * FATES.len() * POLICY_FATES.len();
    let ledger = Ledger::new(JOBS, PERMITS);
    // Long enough for a policy that is merely slow, short enough for hundreds that hang.
    let limit = Duration::from_millis(10);
    let mut service = ServiceBuilder::new()
        .layer(ConcurrencyLimitLayer::new(PERMITS))
        .layer(sentinel(&ledger, limit))
        .service_fn(process);

    let settled = drive(&mut service, &ledger, JOBS).await;

    assert_eq!(settled.len(), JOBS);
    assert_eq!(ledger.gauge.max(), PERMITS);
    assert_eq!(ledger.gauge.now(), 0);
    // On a busy machine the settle timeout may also hit one that would have been ready late.
    let calls = ledger.calls();
    for (id, calls) in calls[..JOBS].iter().enumerate() {
        let policy = POLICY_FATES[id % POLICY_FATES.len()];
        let calls_are_right = match policy {
            PolicyFate::ReadyLate => *calls <= 1,
            _ => *calls == usize::from(policy.is_called()),
        };
        assert!(calls_are_right, "job {id} under {policy:?}: {calls} calls");
    }
    meet(&mut service, &ledger, JOBS, PERMITS).await;
}
