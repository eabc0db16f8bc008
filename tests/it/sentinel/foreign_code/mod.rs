//! Foreign code that is called for a job and panics: a subscriber, a recorder, a waker, a printer. None of it
//! costs a job its policy call, reaches the caller's task, or ends the process.

#[cfg(feature = "metrics")]
mod recorders;
mod subscribers;
mod tags;
mod wakers;

use std::{
    fmt,
    future::{Future, poll_fn},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Poll, Wake},
};

use tower::{Layer as _, Service, ServiceExt};
use tower_sentinel::{
    Job, SentinelLayer, Verdict,
    outcome::OutcomeKind,
    sentinel::OnDrop,
    settle::{Capabilities, Lease, Reason, Settle, Unsettled},
};
use tracing::{Id, span};
use tracing_subscriber::{
    Layer,
    layer::{Context as LayerContext, SubscriberExt},
    util::SubscriberInitExt,
};

use crate::support::{Fate, WORK, Work, Worker, raise};

/// Time at which a subscriber panics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Site {
    Enter,
    Exit,
    Record,
    Event,
    Close,
    Always,
}

/// The last two may abort where spans have parents: one that closes can close its parent, within the
/// subscriber, while the first panic unwinds.
pub(crate) const SITES: [Site; 6] = [
    Site::Enter,
    Site::Exit,
    Site::Record,
    Site::Event,
    Site::Close,
    Site::Always,
];

/// A subscriber's layer that panics from the moment it is armed.
#[derive(Clone)]
pub(crate) struct Burst {
    site: Site,
    armed: Arc<AtomicBool>,
    panics: Arc<AtomicUsize>,
}

impl Burst {
    pub(crate) fn new(site: Site) -> Self {
        Self {
            site,
            armed: Arc::default(),
            panics: Arc::default(),
        }
    }

    pub(crate) fn start(&self) -> tracing::subscriber::DefaultGuard {
        tracing_subscriber::registry()
            .with(self.clone())
            .set_default()
    }

    pub(crate) fn arm(&self) {
        self.armed.store(true, Ordering::SeqCst);
    }

    /// The test's own spans are closed after it.
    pub(crate) fn disarm(&self) {
        self.armed.store(false, Ordering::SeqCst);
    }

    fn at(&self, site: Site) {
        let hits = self.site == site || self.site == Site::Always;
        if hits && self.armed.load(Ordering::SeqCst) {
            self.panics.fetch_add(1, Ordering::SeqCst);
            raise("in the subscriber");
        }
    }
}

impl<S: tracing::Subscriber> Layer<S> for Burst {
    fn on_record(&self, _: &Id, _: &span::Record<'_>, _: LayerContext<'_, S>) {
        self.at(Site::Record);
    }

    fn on_event(&self, _: &tracing::Event<'_>, _: LayerContext<'_, S>) {
        self.at(Site::Event);
    }

    fn on_enter(&self, _: &Id, _: LayerContext<'_, S>) {
        self.at(Site::Enter);
    }

    fn on_exit(&self, _: &Id, _: LayerContext<'_, S>) {
        self.at(Site::Exit);
    }

    fn on_close(&self, _: Id, _: LayerContext<'_, S>) {
        self.at(Site::Close);
    }
}

fn span_of(_: &Fate) -> tracing::Span {
    tracing::info_span!("process", error.type = tracing::field::Empty, otel.status_code = tracing::field::Empty)
}

/// Way in which a caller waits for a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Caller {
    Waits,
    /// Before the first poll.
    Drops,
    /// After the first poll.
    DropsLater,
    Detaches,
}

const CALLERS: [Caller; 4] = [
    Caller::Waits,
    Caller::Drops,
    Caller::DropsLater,
    Caller::Detaches,
];

const FATES: [(Fate, OutcomeKind); 7] = [
    (Fate::Value, OutcomeKind::Completed),
    (Fate::Error, OutcomeKind::Failed),
    (Fate::PanicInCall, OutcomeKind::Panicked),
    (Fate::PanicLater, OutcomeKind::Panicked),
    (Fate::PanicInDrop, OutcomeKind::TimedOut),
    (Fate::Hang, OutcomeKind::TimedOut),
    (Fate::CancelsItself, OutcomeKind::Cancelled),
];

/// Runs a job by a caller, and returns the kinds that the policy got.
async fn run(layer: SentinelLayer<crate::support::Script>, fate: Fate, caller: Caller) {
    let on_drop = match caller {
        Caller::Detaches => OnDrop::Detach,
        _ => OnDrop::Abort,
    };
    let layer = layer.on_drop(on_drop).timeout(10 * WORK);
    let mut sentinel = layer.make_span(span_of).layer(Worker::default());
    let response = sentinel.ready().await.unwrap().call(Work::new(fate));
    // On its own task, as a panic on it is the failure to find.
    let calling = tokio::spawn(async move {
        let mut response = pin!(response);
        match caller {
            Caller::Waits => drop(response.await),
            Caller::Drops => {}
            Caller::DropsLater | Caller::Detaches => {
                let polled = poll_fn(|cx| Poll::Ready(response.as_mut().poll(cx).is_ready()));
                polled.await;
            }
        }
    });
    calling.await.expect("no panic on the caller's task");
}

// === a tag of a broker ===

/// A tag whose `Debug`, and whose error's `Display`, panic.
#[derive(Clone)]
struct Tag {
    fails: Arc<AtomicUsize>,
    told: Arc<AtomicUsize>,
    lost_after: Option<usize>,
    kept: Arc<AtomicUsize>,
    /// The next one to be dropped panics.
    explodes: Arc<AtomicBool>,
}

impl Drop for Tag {
    fn drop(&mut self) {
        if self.explodes.swap(false, Ordering::SeqCst) {
            raise("in the tag's destructor");
        }
    }
}

impl Tag {
    fn new(fails: usize) -> Self {
        Self {
            fails: Arc::new(fails.into()),
            told: Arc::default(),
            lost_after: None,
            kept: Arc::default(),
            explodes: Arc::default(),
        }
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        raise("in the tag's Debug")
    }
}

#[derive(Debug)]
struct Unprintable;

impl fmt::Display for Unprintable {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        raise("in the error's Display")
    }
}

impl std::error::Error for Unprintable {}

impl Drop for Unprintable {
    fn drop(&mut self) {
        raise("in the error's destructor");
    }
}

impl Settle for Tag {
    type Error = Unprintable;
    type Future = std::future::Ready<Result<(), Unsettled<Self, Unprintable>>>;

    fn settle(self, _: Verdict, _: Reason) -> Self::Future {
        let left = self.fails.load(Ordering::SeqCst);
        std::future::ready(if left == 0 {
            self.told.fetch_add(1, Ordering::SeqCst);
            Ok(())
        } else {
            self.fails.store(left - 1, Ordering::SeqCst);
            Err(Unsettled::again(self, Unprintable))
        })
    }

    async fn keep_alive(&self) -> Result<Lease, Unprintable> {
        let kept = self.kept.fetch_add(1, Ordering::SeqCst);
        match self.lost_after {
            Some(after) if kept >= after => {
                self.explodes.store(true, Ordering::SeqCst);
                Ok(Lease::Lost)
            }
            Some(_) => Ok(Lease::Held),
            None => Err(Unprintable),
        }
    }

    fn deliveries(&self) -> Option<u32> {
        None
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::none().keep_alive()
    }
}

struct Delivery(Tag);

impl Job for Delivery {
    type Tag = Tag;

    fn tag(&self) -> Tag {
        self.0.clone()
    }
}

// === wakers ===

/// Panics when it is woken.
pub(crate) struct BadWaker;

impl Wake for BadWaker {
    fn wake(self: Arc<Self>) {
        raise("in a waker");
    }
}
