//! [`ConsumerInstruments`] of a consumer, and the findings of its watchdog.

use ::metrics::{Counter, Gauge, counter, gauge};

use super::{
    describe::{CONNECTED, RECONNECTS, STALLED},
    in_flight::InFlightGauge,
    labels::{Labels, of_consumer, with},
};
use crate::outcome::guard;

/// Metrics of one consumer; `None` if the recorder panics.
pub(crate) struct ConsumerInstruments(Option<(Gauge, Counter)>);

impl ConsumerInstruments {
    /// Looks the metrics up, inside the consumer.
    pub(crate) fn begin() -> Self {
        let mut metrics = None;
        guard(|| {
            let labels = of_consumer(&Labels::new());
            let connected = gauge!(CONNECTED, labels.clone());
            metrics = Some((connected, counter!(RECONNECTS, labels)));
        });
        Self(metrics)
    }

    /// Counts a session as connected until the guard is dropped.
    pub(crate) fn connected(&self) -> InFlightGauge {
        InFlightGauge::new(self.0.as_ref().map(|(connected, _)| connected))
    }

    /// Counts one more attempt to connect.
    pub(crate) fn reconnects(&self) {
        if let Some((_, reconnects)) = &self.0 {
            guard(|| reconnects.increment(1));
        }
    }
}

/// Counts a finding of the watchdog of the consumer that calls this.
pub(crate) fn count_stall(reason: &'static str) {
    // Rare, so it is looked up each time.
    guard(|| {
        let labels = of_consumer(&Labels::new());
        counter!(STALLED, with(&labels, [("reason", reason)])).increment(1);
    });
}
