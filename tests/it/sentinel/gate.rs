//! G4: with a concurrency limit outside, jobs running + outcomes not settled never exceed it.
//!
//! A job is counted from the moment that it has its permit until both the job itself and its tag
//! are dropped, and each count is taken with the maximum: there is no moment that a test misses.

use std::{
    convert::Infallible,
    future::{self, Future},
    panic,
    pin::Pin,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering::SeqCst},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use futures_util::poll;
use tokio::{
    runtime::{Builder, Runtime},
    sync::{Barrier, Semaphore, mpsc, oneshot},
    task::{JoinSet, yield_now},
    time::{sleep, timeout},
};
use tower::{
    Service, ServiceBuilder, ServiceExt,
    limit::{ConcurrencyLimitLayer, GlobalConcurrencyLimitLayer},
    service_fn,
};
use tower_sentinel::{
    Job, Outcome, Report, SentinelError, SentinelLayer, TimeLimit,
    cancel::Cancellation,
    outcome::{CancelReason, OutcomeKind},
    sentinel::{OnDrop, Sentinel},
};

use crate::support::paused_time;

/// Unwinds without the panic hook: thousands of messages would say nothing.
fn throw() -> ! {
    panic::resume_unwind(Box::new("thrown"))
}

// === What is counted ===

/// The jobs that run or are not settled now, and the most that ever were at once.
#[derive(Debug, Default)]
struct Gauge {
    now: AtomicUsize,
    max: AtomicUsize,
}

impl Gauge {
    fn enter(self: &Arc<Self>) -> Presence {
        let now = self.now.fetch_add(1, SeqCst) + 1;
        self.max.fetch_max(now, SeqCst);
        Presence(Arc::clone(self))
    }

    fn now(&self) -> usize {
        self.now.load(SeqCst)
    }

    fn max(&self) -> usize {
        self.max.load(SeqCst)
    }
}

#[derive(Debug)]
struct Presence(Arc<Gauge>);

impl Drop for Presence {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, SeqCst);
    }
}

/// What the jobs and the policies of one test share.
#[derive(Debug)]
struct Ledger {
    gauge: Arc<Gauge>,
    /// How often the policy was called for each job.
    calls: Vec<AtomicUsize>,
    /// The policies that never become ready, and so are never called.
    never_ready: AtomicUsize,
    /// Deals out the fates of the policies: one for each clone.
    clones: AtomicUsize,
    /// All that meet here run at once.
    meeting: Barrier,
}

impl Ledger {
    /// For `jobs` jobs of mixed fates, and `permits` more that meet at the end.
    fn new(jobs: usize, permits: usize) -> Arc<Self> {
        Arc::new(Self {
            gauge: Arc::default(),
            calls: (0..jobs + permits).map(|_| AtomicUsize::new(0)).collect(),
            never_ready: AtomicUsize::new(0),
            clones: AtomicUsize::new(0),
            meeting: Barrier::new(permits),
        })
    }

    fn calls(&self) -> Vec<usize> {
        self.calls.iter().map(|calls| calls.load(SeqCst)).collect()
    }

    fn work(self: &Arc<Self>, id: usize, fate: Fate) -> Work {
        Work {
            id,
            fate,
            ledger: Arc::clone(self),
            presence: OnceLock::new(),
        }
    }

    /// A bare policy of this ledger, before any of its clones got a fate.
    fn policy(self: &Arc<Self>) -> Policy {
        Policy {
            fate: PolicyFate::Answers,
            asked: false,
            ledger: Arc::clone(self),
        }
    }
}

// === The jobs ===

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Value,
    ValueLater,
    Error,
    PanicInCall,
    PanicAtOnce,
    PanicLater,
    Hang,
    HangAndPanicInDrop,
    CancelItself,
    /// Not one of the mixed fates: a value, once as many jobs as there are permits run.
    Meet,
}

const FATES: [Fate; 9] = [
    Fate::Value,
    Fate::ValueLater,
    Fate::Error,
    Fate::PanicInCall,
    Fate::PanicAtOnce,
    Fate::PanicLater,
    Fate::Hang,
    Fate::HangAndPanicInDrop,
    Fate::CancelItself,
];

impl Fate {
    fn kind(self) -> OutcomeKind {
        match self {
            Fate::Value | Fate::ValueLater | Fate::Meet => OutcomeKind::Completed,
            Fate::Error => OutcomeKind::Failed,
            Fate::PanicInCall | Fate::PanicAtOnce | Fate::PanicLater => OutcomeKind::Panicked,
            Fate::Hang | Fate::HangAndPanicInDrop => OutcomeKind::TimedOut,
            Fate::CancelItself => OutcomeKind::Cancelled,
        }
    }
}

#[derive(Debug)]
struct Work {
    id: usize,
    fate: Fate,
    ledger: Arc<Ledger>,
    /// Begins when the gated sentinel reads the tag, which is when the job has its permit.
    presence: OnceLock<Arc<Presence>>,
}

#[derive(Debug)]
struct Tag {
    id: usize,
    _presence: Arc<Presence>,
}

impl Job for Work {
    type Tag = Tag;

    fn tag(&self) -> Tag {
        let enter = || Arc::new(self.ledger.gauge.enter());
        Tag {
            id: self.id,
            _presence: Arc::clone(self.presence.get_or_init(enter)),
        }
    }

    fn time_limit(&self) -> TimeLimit {
        match self.fate {
            // Only those that hang are meant to meet the limit, however busy the machine is.
            Fate::Hang | Fate::HangAndPanicInDrop => TimeLimit::Inherit,
            _ => TimeLimit::Never,
        }
    }
}

struct PanicInDrop;

impl Drop for PanicInDrop {
    fn drop(&mut self) {
        throw();
    }
}

type WorkFuture = Pin<Box<dyn Future<Output = Result<(), &'static str>> + Send>>;

fn process(work: Work) -> WorkFuture {
    if work.fate == Fate::PanicInCall {
        throw();
    }
    Box::pin(async move {
        // Moved in as a whole, so that the job is counted until its future is dropped.
        let work = work;
        match work.fate {
            Fate::Value | Fate::PanicInCall => {}
            Fate::ValueLater => yield_now().await,
            Fate::Error => return Err("failed"),
            Fate::PanicAtOnce => throw(),
            Fate::PanicLater => {
                yield_now().await;
                throw();
            }
            Fate::Hang => future::pending().await,
            Fate::HangAndPanicInDrop => {
                let _guard = PanicInDrop;
                future::pending::<()>().await;
            }
            Fate::CancelItself => {
                Cancellation::current().cancel(CancelReason::Requested);
                future::pending::<()>().await;
            }
            Fate::Meet => {
                work.ledger.meeting.wait().await;
            }
        }
        Ok(())
    })
}

// === The policies ===

#[derive(Clone, Copy, Debug, PartialEq)]
enum PolicyFate {
    Answers,
    AnswersLate,
    ReadyLate,
    Fails,
    PanicsInCall,
    PanicsLater,
    Hangs,
    Unready,
    UnreadyPanics,
    NeverReady,
}

/// As many as are coprime to the nine fates of a job: each meets each.
const POLICY_FATES: [PolicyFate; 10] = [
    PolicyFate::Answers,
    PolicyFate::AnswersLate,
    PolicyFate::ReadyLate,
    PolicyFate::Fails,
    PolicyFate::PanicsInCall,
    PolicyFate::PanicsLater,
    PolicyFate::Hangs,
    PolicyFate::Unready,
    PolicyFate::UnreadyPanics,
    PolicyFate::NeverReady,
];

impl PolicyFate {
    fn is_called(self) -> bool {
        use PolicyFate::{NeverReady, Unready, UnreadyPanics};
        !matches!(self, Unready | UnreadyPanics | NeverReady)
    }
}

#[derive(Debug)]
struct Policy {
    fate: PolicyFate,
    asked: bool,
    ledger: Arc<Ledger>,
}

impl Clone for Policy {
    fn clone(&self) -> Self {
        let number = self.ledger.clones.fetch_add(1, SeqCst);
        Self {
            fate: POLICY_FATES[number % POLICY_FATES.len()],
            asked: false,
            ledger: Arc::clone(&self.ledger),
        }
    }
}

type Answer = Pin<Box<dyn Future<Output = Result<OutcomeKind, &'static str>> + Send>>;

impl Service<Report<Tag, (), &'static str>> for Policy {
    type Response = OutcomeKind;
    type Error = &'static str;
    type Future = Answer;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), &'static str>> {
        let first = !self.asked;
        self.asked = true;
        if first && !self.fate.is_called() {
            self.ledger.never_ready.fetch_add(1, SeqCst);
        }
        match self.fate {
            PolicyFate::Unready => Poll::Ready(Err("unready")),
            PolicyFate::UnreadyPanics => throw(),
            PolicyFate::NeverReady => Poll::Pending,
            PolicyFate::ReadyLate if first => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            _ => Poll::Ready(Ok(())),
        }
    }

    fn call(&mut self, report: Report<Tag, (), &'static str>) -> Answer {
        self.ledger.calls[report.tag.id].fetch_add(1, SeqCst);
        let fate = self.fate;
        if fate == PolicyFate::PanicsInCall {
            throw();
        }
        Box::pin(async move {
            // Moved in as a whole: the job is counted until its settlement is dropped.
            let report = report;
            match fate {
                PolicyFate::Fails => return Err("not acked"),
                PolicyFate::AnswersLate => sleep(Duration::from_millis(1)).await,
                PolicyFate::PanicsLater => {
                    yield_now().await;
                    throw();
                }
                PolicyFate::Hangs => future::pending().await,
                _ => {}
            }
            Ok(report.outcome.kind())
        })
    }
}

// === The gate ===

type Settled = Result<OutcomeKind, SentinelError<&'static str, &'static str>>;

fn sentinel(ledger: &Arc<Ledger>, limit: Duration) -> SentinelLayer<Policy> {
    SentinelLayer::new(ledger.policy())
        .timeout(limit)
        .settle_timeout(limit)
}

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

/// Shows that all permits are back: as many jobs as there were permits run at once.
///
/// Their policies may have any fate: it is their outcomes that count, hence the gauge. Were a
/// permit lost, the meeting would never be complete.
async fn meet<S, R, E>(service: &mut S, ledger: &Arc<Ledger>, jobs: usize, permits: usize)
where
    S: Service<Work, Response = R, Error = E, Future: Send + 'static>,
    R: Send + 'static,
    E: std::fmt::Debug + Send + 'static,
{
    let mut responses = JoinSet::new();
    for id in jobs..jobs + permits {
        let work = ledger.work(id, Fate::Meet);
        responses.spawn(service.ready().await.unwrap().call(work));
    }
    let settled = within("all permits are back", responses.join_all()).await;
    assert_eq!(settled.len(), permits);
    assert_eq!(ledger.gauge.now(), 0);
}

/// A limit in real time, which is the only kind that holds while a test blocks or time is paused.
async fn within<F: Future>(what: &str, future: F) -> F::Output {
    let (done, watch) = sync_channel::<()>(1);
    let (late, is_late) = oneshot::channel();
    std::thread::spawn(move || {
        if watch.recv_timeout(Duration::from_secs(60)) == Err(RecvTimeoutError::Timeout) {
            late.send(()).ok();
        }
    });
    tokio::select! {
        output = future => {
            drop(done);
            output
        }
        Ok(()) = is_late => panic!("not within a minute: {what}"),
    }
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

// === Callers that drop ===

#[derive(Clone, Copy, Debug, PartialEq)]
enum When {
    BeforeTheFirstPoll,
    Running,
    Settling,
}

async fn a_drop_frees_the_permit(on_drop: OnDrop, when: When) {
    let permits = Arc::new(Semaphore::new(1));
    // The job returns, and the policy answers, once the test gives them leave.
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
    // A second job is let in while the first is not settled, which is what the permit means.
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
    // Why the test below needs its outer sentinel.
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

/// What a policy that forwards gives to the caller: the outcome of the whole gated stack.
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
    // Those that met had permits, so whoever had them before is settled.
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

// === Jobs that do not stop ===

/// A job that blocks its thread until its other end is dropped.
struct Blocker {
    started: mpsc::UnboundedSender<()>,
    released: Receiver<()>,
}

/// A runtime for jobs that block, dropped as one that is not waited for.
struct Jobs(Option<Runtime>);

impl Jobs {
    fn new(threads: usize) -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(threads).build();
        Self(Some(runtime.unwrap()))
    }
}

impl Drop for Jobs {
    fn drop(&mut self) {
        // A plain drop would block, which the runtime of the test does not allow.
        self.0.take().unwrap().shutdown_background();
    }
}

type Stopped = Arc<Mutex<Vec<(OutcomeKind, bool)>>>;

/// A sentinel whose jobs block on a runtime of their own; its policy notes if they stopped.
#[expect(clippy::type_complexity, reason = "there are no aliases for bounds")]
fn blocking(
    jobs: &Jobs,
    max: usize,
    stopped: &Stopped,
) -> Sentinel<
    impl Service<Blocker, Response = (), Error = Infallible, Future: Send + 'static>
    + Clone
    + Send
    + 'static,
    impl Service<
        Report<(), (), Infallible>,
        Response = OutcomeKind,
        Error = Infallible,
        Future: Send + 'static,
    > + Clone
    + Send
    + 'static,
    tower_sentinel::sentinel::Hooks<fn(&Blocker)>,
> {
    let stopped = Arc::clone(stopped);
    let policy = service_fn(move |report: Report<(), (), Infallible>| {
        let kind = report.outcome.kind();
        stopped.lock().unwrap().push(match report.outcome {
            Outcome::TimedOut(timed_out) => (kind, timed_out.stopped()),
            Outcome::Cancelled(cancelled) => (kind, cancelled.stopped()),
            _ => (kind, true),
        });
        future::ready(Ok(kind))
    });
    let layer = SentinelLayer::with_tag(policy, (|_| ()) as fn(&Blocker))
        .timeout(Duration::from_secs(1))
        .stop_wait(Duration::from_secs(1))
        .runtime(jobs.0.as_ref().unwrap().handle().clone())
        .max_abandoned(max);
    ServiceBuilder::new()
        .layer(layer)
        .service_fn(|job: Blocker| async move {
            job.started.send(()).ok();
            job.released.recv().ok();
            Ok(())
        })
}

/// Calls a job and waits until it blocks; the sender releases it.
///
/// The response is not polled meanwhile, so that paused time does not run to its limit.
async fn block<S: Service<Blocker>>(service: &mut S) -> (S::Future, SyncSender<()>)
where
    S::Error: std::fmt::Debug,
{
    let (started, mut is_started) = mpsc::unbounded_channel();
    let (release, released) = sync_channel(1);
    let response = service
        .ready()
        .await
        .unwrap()
        .call(Blocker { started, released });
    within("the job starts", is_started.recv()).await.unwrap();
    (response, release)
}

/// Lets every task that can run do so.
async fn settle_down() {
    for _ in 0..100 {
        yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn g4_abandoned_jobs_keep_the_service_unready_until_one_of_them_ends() {
    let jobs = Jobs::new(3);
    let stopped = Stopped::default();
    let mut service = blocking(&jobs, 2, &stopped);

    let (response, first) = block(&mut service).await;
    assert_eq!(response.await.unwrap(), OutcomeKind::TimedOut);
    // One is fewer than two.
    let (response, second) = block(&mut service).await;
    assert_eq!(response.await.unwrap(), OutcomeKind::TimedOut);
    assert_eq!(
        *stopped.lock().unwrap(),
        [(OutcomeKind::TimedOut, false); 2]
    );

    // Clones share the count: all wait, and all are woken when one of the two ends.
    let mut waiting = JoinSet::new();
    for _ in 0..3 {
        let mut clone = service.clone();
        waiting.spawn(async move { clone.ready().await.map(drop).unwrap() });
    }
    settle_down().await;
    assert!(waiting.try_join_next().is_none());
    assert!(poll!(service.ready()).is_pending());

    drop(first);
    within("all clones are woken", waiting.join_all()).await;

    // One of the two still runs, so one more blocks the service again.
    let (response, third) = block(&mut service).await;
    assert_eq!(response.await.unwrap(), OutcomeKind::TimedOut);
    assert!(poll!(service.ready()).is_pending());
    drop((second, third));
    within("the service is ready", service.ready())
        .await
        .unwrap();
    assert_eq!(stopped.lock().unwrap().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn g4_a_job_that_its_caller_dropped_and_that_does_not_stop_is_abandoned_too() {
    let jobs = Jobs::new(1);
    let stopped = Stopped::default();
    let mut service = blocking(&jobs, 1, &stopped);

    let (response, release) = block(&mut service).await;
    drop(response);
    // It is given its time to stop first.
    within("a service with a job that stops", service.ready())
        .await
        .unwrap();
    sleep(Duration::from_millis(1_001)).await;
    assert_eq!(*stopped.lock().unwrap(), [(OutcomeKind::Cancelled, false)]);
    assert!(poll!(service.ready()).is_pending());

    drop(release);
    within("the service is ready", service.ready())
        .await
        .unwrap();
}

#[tokio::test(start_paused = true)]
async fn g4_jobs_that_stop_are_not_abandoned() {
    let policy = service_fn(|report: Report<Arc<()>, (), Infallible>| async move {
        Ok::<_, Infallible>(report.outcome.kind())
    });
    let mut service = ServiceBuilder::new()
        .layer(SentinelLayer::new(policy).max_abandoned(1))
        .service_fn(|_job: Arc<()>| future::pending());
    for _ in 0..3 {
        let response = service.ready().await.unwrap().call(Arc::default());
        assert_eq!(response.await.unwrap(), OutcomeKind::TimedOut);
        assert!(poll!(service.ready()).is_ready());
    }
}

#[tokio::test(start_paused = true)]
async fn g4_a_timed_out_job_that_did_not_stop_frees_its_permit() {
    let jobs = Jobs::new(1);
    let stopped = Stopped::default();
    let permits = Arc::new(Semaphore::new(1));
    let mut service = ServiceBuilder::new()
        .layer(GlobalConcurrencyLimitLayer::with_semaphore(Arc::clone(
            &permits,
        )))
        .service(blocking(&jobs, 1, &stopped));

    let (response, release) = block(&mut service).await;
    assert_eq!(permits.available_permits(), 0);
    assert_eq!(response.await.unwrap(), OutcomeKind::TimedOut);
    assert_eq!(permits.available_permits(), 1);
    // The permit is free and the service is not ready: that is what `max_abandoned` is for.
    assert!(poll!(service.ready()).is_pending());
    drop(release);
    within("the service is ready", service.ready())
        .await
        .unwrap();
}

#[test]
#[should_panic(expected = "`max_abandoned(0)` would never let a job in")]
fn g4_max_abandoned_of_zero_panics() {
    drop(SentinelLayer::new(()).max_abandoned(0));
}

struct Silent;

impl Wake for Silent {
    fn wake(self: Arc<Self>) {}
}

#[tokio::test(start_paused = true)]
async fn g4_max_abandoned_keeps_no_waker_but_the_last_of_each_clone() {
    let jobs = Jobs::new(1);
    let mut service = blocking(&jobs, 1, &Stopped::default());
    let (response, release) = block(&mut service).await;
    assert_eq!(response.await.unwrap(), OutcomeKind::TimedOut);

    let (first, last) = (Arc::new(Silent), Arc::new(Silent));
    let mut clone = service.clone();
    for waker in [&first, &last] {
        let waker = Waker::from(Arc::clone(waker));
        let ready = clone.poll_ready(&mut Context::from_waker(&waker));
        assert!(ready.is_pending());
    }
    assert_eq!(
        (Arc::strong_count(&first), Arc::strong_count(&last)),
        (1, 2)
    );
    drop(clone);
    assert_eq!(
        (Arc::strong_count(&first), Arc::strong_count(&last)),
        (1, 1)
    );
    drop(release);
}

#[test]
fn g4_abandoned_jobs_are_counted_though_the_runtime_that_gave_them_up_ends() {
    let jobs = Jobs::new(1);
    let mut service = blocking(&jobs, 1, &Stopped::default());
    let release = paused_time().block_on(async {
        let (response, release) = block(&mut service).await;
        assert_eq!(response.await.unwrap(), OutcomeKind::TimedOut);
        release
    });
    paused_time().block_on(async {
        // It still runs.
        assert!(poll!(service.ready()).is_pending());
        drop(release);
        within("the service is ready", service.ready())
            .await
            .unwrap();
    });
}
