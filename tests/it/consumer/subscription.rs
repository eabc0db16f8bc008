//! What the subscription of an adapter inherits, and the texts of what it reports.

use std::{
    error::Error as _,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::Stream;
use tokio::time::sleep;
use tower::{ServiceBuilder, service_fn};
use tower_sentinel::{
    Consumer, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    consumer::{ProbeError, StallKind, Subscription},
};

use super::ends;
use crate::support::{
    Fate, Refused,
    subscription::{Channel, Deliveries, Delivery},
};

const SECOND: Duration = Duration::from_secs(1);

/// A subscription that implements no more than it must.
struct Plain(Deliveries);

impl Stream for Plain {
    type Item = Result<Delivery, Refused>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.0).poll_next(cx)
    }
}

impl Subscription for Plain {
    type Job = Delivery;
    type Error = Refused;

    fn poll_closed(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        Pin::new(&mut self.0).poll_closed(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.0).poll_close(cx)
    }
}

#[tokio::test(start_paused = true)]
async fn a_subscription_without_a_prefetch_does_not_bound_the_calls() {
    let channel = Channel::of(vec![Fate::Value; 10]);
    let handler = ServiceBuilder::new().service(service_fn(|_: Delivery| async {
        sleep(SECOND).await;
        Ok::<_, Refused>(())
    }));
    let consumer = Consumer::new(Plain(channel.subscribe()), handler)
        .sentinel(SentinelLayer::new(SettlePolicy::new(ack_on_success())))
        .with_graceful_shutdown(sleep(10 * SECOND));
    let summary = ends(consumer).await.unwrap();
    assert_eq!(summary.verdicts(Verdict::Ack), 10);
    assert_eq!(channel.most_unsettled(), 10);
}

#[test]
fn a_refused_probe_has_the_error_of_its_adapter_as_its_source() {
    let error = ProbeError::new(Refused);
    assert_eq!(error.to_string(), "the broker can't be probed");
    assert_eq!(format!("{error:#}"), "the broker can't be probed: refused");
    assert!(error.source().unwrap().is::<Refused>());
}

#[test]
fn a_kind_of_stall_is_printed_as_it_is_in_metrics() {
    assert_eq!(StallKind::Silent.to_string(), "silent");
    assert_eq!(StallKind::Hindered.to_string(), "hindered");
}
