//! [`Tag`], whose broker behaves as a test says.

use std::{
    fmt,
    future::{Future, ready},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use futures_util::future::BoxFuture;
use tokio::time::Instant;
use tower_sentinel::{
    Job, Verdict,
    settle::{Capabilities, Lease, Messaging, Reason, Settle, Unsettled},
};

use super::{Count, Refused};

type Settled = Result<(), Unsettled<Tag, Refused>>;
type Settling = dyn Fn(Tag) -> BoxFuture<'static, Settled> + Send + Sync;
type Keeping = dyn Fn() -> BoxFuture<'static, Result<Lease, Refused>> + Send + Sync;

/// A tag that is settled and kept alive as it is set to; also a job that consists of its tag.
///
/// Without settings it is settled at once and held for ever, by a broker that counts no deliveries and has no
/// capabilities. Clones are the same delivery.
#[derive(Clone)]
pub(crate) struct Tag {
    settling: Arc<Settling>,
    keeping: Arc<Keeping>,
    body: &'static str,
    deliveries: Option<u32>,
    redelivered: Option<bool>,
    capabilities: Capabilities,
    messaging: fn() -> Option<Messaging<'static>>,
    published_at: Option<SystemTime>,
    told: Arc<Mutex<Vec<Told>>>,
    asked: Count,
}

/// A call of `settle`, as the broker sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) verdict: Verdict,
    pub(crate) reason: Reason,
    pub(crate) at: Instant,
}

impl Tag {
    pub(crate) fn new() -> Self {
        Self {
            settling: Arc::new(|_| Box::pin(ready(Ok(())))),
            keeping: Arc::new(|| Box::pin(ready(Ok(Lease::Held)))),
            body: "",
            deliveries: None,
            redelivered: None,
            capabilities: Capabilities::none(),
            messaging: || None,
            published_at: None,
            told: Arc::default(),
            asked: Count::default(),
        }
    }

    /// Lets `settle` do this, in its call and in its future.
    pub(crate) fn settling<F>(self, settling: impl Fn(Self) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Settled> + Send + 'static,
    {
        let settling: Arc<Settling> = Arc::new(move |tag| Box::pin(settling(tag)));
        Self { settling, ..self }
    }

    /// Lets each settlement fail so.
    pub(crate) fn failing(
        self,
        failure: impl Fn(Self) -> Unsettled<Self, Refused> + Send + Sync + 'static,
    ) -> Self {
        self.settling(move |tag| ready(Err(failure(tag))))
    }

    /// Lets `keep_alive` do this.
    pub(crate) fn keeping<F>(self, keeping: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<Lease, Refused>> + Send + 'static,
    {
        let keeping: Arc<Keeping> = Arc::new(move || Box::pin(keeping()));
        let capabilities = self.capabilities.keep_alive();
        Self {
            keeping,
            capabilities,
            ..self
        }
    }

    pub(crate) fn body(self, body: &'static str) -> Self {
        Self { body, ..self }
    }

    /// Sets the count of deliveries, this one included.
    pub(crate) fn delivered(self, deliveries: impl Into<Option<u32>>) -> Self {
        let deliveries = deliveries.into();
        Self { deliveries, ..self }
    }

    /// Sets the flag, which is no count.
    pub(crate) fn redelivered(self, redelivered: bool) -> Self {
        let redelivered = Some(redelivered);
        Self {
            redelivered,
            ..self
        }
    }

    pub(crate) fn can(self, capabilities: Capabilities) -> Self {
        Self {
            capabilities,
            ..self
        }
    }

    pub(crate) fn describing(self, messaging: fn() -> Option<Messaging<'static>>) -> Self {
        Self { messaging, ..self }
    }

    pub(crate) fn published(self, at: SystemTime) -> Self {
        let published_at = Some(at);
        Self {
            published_at,
            ..self
        }
    }

    /// Returns the calls of `settle`.
    pub(crate) fn told(&self) -> Vec<Told> {
        self.told.lock().unwrap().clone()
    }

    pub(crate) fn verdicts(&self) -> Vec<Verdict> {
        self.told().iter().map(|told| told.verdict).collect()
    }

    /// Returns how often it was settled, or tried to be.
    pub(crate) fn tries(&self) -> usize {
        self.told.lock().unwrap().len()
    }

    /// Returns when each try was made, from `started` on.
    pub(crate) fn times(&self, started: Instant) -> Vec<Duration> {
        self.told().iter().map(|told| told.at - started).collect()
    }

    /// Returns the number of requests to keep it alive.
    pub(crate) fn asked(&self) -> usize {
        self.asked.get()
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tag 7")
    }
}

impl Settle for Tag {
    type Error = Refused;
    type Future = BoxFuture<'static, Settled>;

    fn settle(self, verdict: Verdict, reason: Reason) -> Self::Future {
        let at = Instant::now();
        self.told.lock().unwrap().push(Told {
            verdict,
            reason,
            at,
        });
        let settling = Arc::clone(&self.settling);
        settling(self)
    }

    fn keep_alive(&self) -> impl Future<Output = Result<Lease, Refused>> + Send {
        self.asked.add();
        (self.keeping)()
    }

    fn deliveries(&self) -> Option<u32> {
        self.deliveries
    }

    fn redelivered(&self) -> Option<bool> {
        self.redelivered
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn messaging(&self) -> Option<Messaging<'_>> {
        (self.messaging)()
    }

    fn published_at(&self) -> Option<SystemTime> {
        self.published_at
    }
}

impl Job for Tag {
    type Tag = Self;

    fn tag(&self) -> Self {
        self.clone()
    }
}

impl AsRef<[u8]> for Tag {
    fn as_ref(&self) -> &[u8] {
        self.body.as_bytes()
    }
}
