//! Recorders that panic.

use std::sync::{Arc, atomic::Ordering};

use metrics::{
    Counter, CounterFn, Gauge, GaugeFn, Histogram, HistogramFn, Key, KeyName, Metadata,
    SharedString, Unit,
};
use tokio::runtime::Handle;
use tower::{Layer as _, Service, ServiceExt, service_fn};
use tower_sentinel::{SentinelLayer, SettlePolicy, Verdict, ack_on_success};

use super::{CALLERS, Caller, Delivery, FATES, Tag, run};
use crate::support::{Recorder, Refused, idle, raise};

/// A recorder all of whose instruments panic.
struct BadRecorder;

struct BadInstrument;

impl CounterFn for BadInstrument {
    fn increment(&self, _: u64) {
        raise("in a counter")
    }

    fn absolute(&self, _: u64) {
        raise("in a counter")
    }
}

impl GaugeFn for BadInstrument {
    fn increment(&self, _: f64) {
        raise("in a gauge")
    }

    fn decrement(&self, _: f64) {
        raise("in a gauge")
    }

    fn set(&self, _: f64) {
        raise("in a gauge")
    }
}

impl HistogramFn for BadInstrument {
    fn record(&self, _: f64) {
        raise("in a histogram")
    }
}

impl metrics::Recorder for BadRecorder {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(Arc::new(BadInstrument))
    }

    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(Arc::new(BadInstrument))
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(Arc::new(BadInstrument))
    }
}

#[tokio::test(start_paused = true)]
async fn g1_a_recorder_that_panics_costs_no_policy_call() {
    let _guard = metrics::set_default_local_recorder(&BadRecorder);
    for (fate, kind) in FATES {
        for caller in CALLERS {
            let recorder = Recorder::default();
            run(SentinelLayer::new(recorder.policy()), fate, caller).await;
            idle(&Handle::current()).await;
            let reports = recorder.reports();
            assert_eq!(reports.len(), 1, "{fate:?} × {caller:?}");
            if matches!(caller, Caller::Waits | Caller::Detaches) {
                assert_eq!(reports[0].kind, kind, "{fate:?} × {caller:?}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_recorder_that_panics_costs_no_settlement() {
    let _guard = metrics::set_default_local_recorder(&BadRecorder);
    let tag = Tag::new(1);
    let mut sentinel = SentinelLayer::new(SettlePolicy::new(ack_on_success()))
        .layer(service_fn(async |_: Delivery| Ok::<_, Refused>(())));
    let call = sentinel.ready().await.unwrap().call(Delivery(tag.clone()));
    assert_eq!(call.await.unwrap().verdict, Verdict::Ack);
    assert_eq!(tag.told.load(Ordering::SeqCst), 1);
}
