//! The published scenarios, over an adapter with a fault: each of them finds its fault.

use std::{
    error::Error,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt, Stream, StreamExt, future::BoxFuture};
use tower_sentinel::{
    Job, Verdict,
    broker::memory::{self, Broker, ConnectError, DeliveryError, Queue, SubscriptionError},
    conformance::{self, Backlog, ConformanceError, DeadLetter, Fixture},
    consumer::{Probing, Subscription},
    settle::{Capabilities, Lease, Reason, Settle, Unsettled},
};

/// Fault of an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    AckReleases,
    RetryReleases,
    RetryAcks,
    DelayIsLeftOut,
    ReasonIsLeftOut,
    ReleaseRetries,
    ReleaseFails,
    PrefetchIsIgnored,
    SecondSettlementSucceeds,
    KeepAliveIsNotSent,
    CapabilitiesAreUnknown,
    CloseIsNotSent,
    ProbeCountsAllJobs,
}

/// The embedded broker, behind an adapter with a fault.
struct Faulty {
    fault: Fault,
    broker: Broker<String>,
    queue: Queue<String>,
}

impl Faulty {
    fn new(fault: Fault) -> Self {
        let broker = Broker::new();
        let queue = broker.queue("jobs").dead_letter("dead");
        Self {
            fault,
            queue: queue.lease(Duration::from_secs(2)).declare(),
            broker,
        }
    }
}

impl Fixture for Faulty {
    type Subscription = Deliveries;
    type Error = ConnectError;

    async fn publish(&self, body: &str) -> Result<(), ConnectError> {
        self.queue.publish(body.to_owned());
        Ok(())
    }

    async fn subscribe(&self, prefetch: usize) -> Result<Deliveries, ConnectError> {
        let prefetch = match self.fault {
            Fault::PrefetchIsIgnored => 1_000,
            _ => prefetch,
        };
        Ok(Deliveries {
            fault: self.fault,
            inner: self.queue.subscribe(prefetch)?,
        })
    }

    async fn backlog(&self) -> Result<Backlog, ConnectError> {
        let counts = self.queue.counts();
        Ok(Backlog {
            unacked: counts.unacked,
            total: counts.ready + counts.delayed + counts.unacked,
        })
    }

    async fn dead_letters(&self) -> Result<Vec<DeadLetter>, ConnectError> {
        let letters = self.queue.dead_letters().into_iter();
        let letters = letters.map(|letter| DeadLetter {
            body: letter.payload,
            kind: letter.death.reason.kind,
            message: letter.death.reason.message.clone(),
        });
        Ok(letters.collect())
    }

    fn capabilities(&self) -> Capabilities {
        let free = Capabilities::none().free_release();
        free.delay().dead_letter().keep_alive()
    }

    fn lease(&self) -> Option<Duration> {
        Some(Duration::from_secs(2))
    }
}

struct Deliveries {
    fault: Fault,
    inner: memory::Deliveries<String>,
}

impl Stream for Deliveries {
    type Item = Result<Delivery, SubscriptionError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let fault = self.fault;
        let next = self.inner.poll_next_unpin(cx);
        next.map_ok(|inner| Delivery { fault, inner })
    }
}

impl Subscription for Deliveries {
    type Job = Delivery;
    type Error = SubscriptionError;

    fn poll_closed(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), SubscriptionError>> {
        Pin::new(&mut self.inner).poll_closed(cx)
    }

    fn probe(&self) -> Option<Probing> {
        let (fault, probing) = (self.fault, self.inner.probe()?);
        Some(Box::pin(async move {
            let probe = probing.await?;
            let (waiting, unsettled) = (probe.waiting.unwrap(), probe.unsettled.unwrap());
            match fault {
                Fault::ProbeCountsAllJobs => Ok(probe.waiting(waiting + unsettled)),
                _ => Ok(probe),
            }
        }))
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        match self.fault {
            Fault::CloseIsNotSent => Poll::Ready(()),
            _ => Pin::new(&mut self.inner).poll_close(cx),
        }
    }
}

struct Delivery {
    fault: Fault,
    inner: memory::Delivery<String>,
}

impl AsRef<[u8]> for Delivery {
    fn as_ref(&self) -> &[u8] {
        self.inner.as_ref()
    }
}

impl Job for Delivery {
    type Tag = Tag;

    fn tag(&self) -> Tag {
        Tag {
            fault: self.fault,
            inner: self.inner.tag(),
        }
    }
}

#[derive(Clone, Debug)]
struct Tag {
    fault: Fault,
    inner: memory::DeliveryTag<String>,
}

impl Settle for Tag {
    type Error = DeliveryError;
    type Future = BoxFuture<'static, Result<(), Unsettled<Self, DeliveryError>>>;

    fn settle(self, verdict: Verdict, reason: Reason) -> Self::Future {
        let Self { fault, inner } = self;
        let (verdict, reason) = match (fault, verdict) {
            (Fault::AckReleases, Verdict::Ack) => (Verdict::release(), reason),
            (Fault::RetryReleases, Verdict::Retry { after }) => {
                (Verdict::Release { after }, reason)
            }
            (Fault::RetryAcks, Verdict::Retry { .. }) => (Verdict::Ack, reason),
            (Fault::DelayIsLeftOut, Verdict::Retry { .. }) => (Verdict::retry(), reason),
            (Fault::ReasonIsLeftOut, _) => (verdict, Reason::completed(reason.elapsed)),
            (Fault::ReleaseRetries, Verdict::Release { after }) => {
                (Verdict::Retry { after }, reason)
            }
            _ => (verdict, reason),
        };
        let fails = fault == Fault::ReleaseFails && matches!(verdict, Verdict::Release { .. });
        let settling = inner.settle(verdict, reason);
        let settled = settling.map(move |settled| match settled {
            Ok(()) if fails => Err(Unsettled::last(DeliveryError::Stale)),
            Err(_) if fault == Fault::SecondSettlementSucceeds => Ok(()),
            settled => settled.map_err(|it| it.map_tag(|inner| Self { fault, inner })),
        });
        settled.boxed()
    }

    async fn keep_alive(&self) -> Result<Lease, DeliveryError> {
        match self.fault {
            Fault::KeepAliveIsNotSent => Ok(Lease::Held),
            _ => self.inner.keep_alive().await,
        }
    }

    fn deliveries(&self) -> Option<u32> {
        self.inner.deliveries()
    }

    fn capabilities(&self) -> Capabilities {
        match self.fault {
            Fault::CapabilitiesAreUnknown => Capabilities::none(),
            _ => self.inner.capabilities(),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_adapter_without_a_fault_passes() {
    let conforms = conformance::all(async || Faulty::new(Fault::None)).await;
    conforms.unwrap_or_else(|error| panic!("{error}"));
}

macro_rules! finds {
    ($($scenario:ident: $fault:ident)*) => {
        $(
            #[tokio::test(start_paused = true)]
            async fn $scenario() {
                finds(conformance::$scenario, Fault::$fault, stringify!($scenario)).await;
            }
        )*
    };
}

/// Runs a scenario on an adapter with a fault, which it has to name, and on one without.
async fn finds(
    scenario: impl AsyncFn(&Faulty) -> Result<(), ConformanceError<ConnectError>>,
    fault: Fault,
    name: &str,
) {
    let error = scenario(&Faulty::new(fault)).await.unwrap_err();
    let violated = matches!(error, ConformanceError::Violated { .. });
    assert!(violated && error.source().is_none(), "{error:?}");
    assert_eq!(error.scenario(), name);
    let printed = error.to_string();
    assert!(
        printed.starts_with(&format!("{name}: expected ")),
        "{printed}"
    );
    scenario(&Faulty::new(Fault::None)).await.unwrap();
}

finds! {
    an_ack_removes_the_job: AckReleases
    a_retry_redelivers_with_the_count_raised: RetryReleases
    a_delayed_retry_is_not_seen_before_its_time: DelayIsLeftOut
    a_reject_is_kept_with_its_reason: ReasonIsLeftOut
    a_release_is_free_where_the_broker_can_tell: ReleaseRetries
    prefetch_holds: PrefetchIsIgnored
    a_second_settlement_is_refused: SecondSettlementSucceeds
    the_order_of_settling_is_free: RetryAcks
    keep_alive_holds_a_job_past_the_redelivery_time: KeepAliveIsNotSent
    a_tag_tells_what_its_broker_can_do: CapabilitiesAreUnknown
    a_closed_subscription_redelivers_what_it_held: CloseIsNotSent
    a_probe_counts_what_waits: ProbeCountsAllJobs
    each_outcome_settles_as_decided: RetryAcks
    a_job_that_cannot_be_decoded_is_rejected_with_a_reason: ReasonIsLeftOut
    a_delivery_limit_ends_a_loop: ReasonIsLeftOut
    a_shutdown_under_load_leaves_nothing_unacked: ReleaseFails
    a_release_at_drain_is_charged_only_where_the_broker_counts_it: ReleaseRetries
}

#[tokio::test(start_paused = true)]
async fn an_error_of_the_fixture_is_none_of_the_adapter() {
    let fixture = Faulty::new(Fault::None);
    fixture.broker.refuse_connections(1);
    let error = conformance::prefetch_holds(&fixture).await.unwrap_err();
    let refused = ConnectError::Refused;
    let source = error.source().map(ToString::to_string);
    assert_eq!(source, Some(refused.to_string()));
    assert_eq!(
        error.to_string(),
        "prefetch_holds: the fixture of the test failed"
    );
    assert_eq!(error.scenario(), "prefetch_holds");
}
