//! G4: with a concurrency limit outside, jobs running + outcomes not settled never exceed it.
//!
//! A job is counted from the moment that it has its permit until both the job itself and its tag
//! are dropped, and each count is taken with the maximum: there is no moment that a test misses.

mod abandoned;
mod bound;
mod drops;

use std::{
    future::{self, Future},
    panic,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering::SeqCst},
        mpsc::{RecvTimeoutError, sync_channel},
    },
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    sync::{Barrier, oneshot},
    task::{JoinSet, yield_now},
    time::sleep,
};
use tower::{Service, ServiceExt};
use tower_sentinel::{
    Job, Report, SentinelLayer, TimeLimit,
    cancel::Cancellation,
    outcome::{CancelReason, OutcomeKind},
};

/// Unwinds without the panic hook: thousands of messages would say nothing.
fn throw() -> ! {
    panic::resume_unwind(Box::new("thrown"))
}

// === Counts ===

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

/// State that the jobs and the policies of one test share.
#[derive(Debug)]
struct Ledger {
    gauge: Arc<Gauge>,
    /// Number of calls of the policy for each job.
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

/// A number that is coprime to the nine fates of a job: each meets each.
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

fn sentinel(ledger: &Arc<Ledger>, limit: Duration) -> SentinelLayer<Policy> {
    SentinelLayer::new(ledger.policy())
        .timeout(limit)
        .settle_timeout(limit)
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
