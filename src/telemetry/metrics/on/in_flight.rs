//! [`InFlightGauge`], a guard that counts while it lives.

use ::metrics::Gauge;

use crate::outcome::guard;

/// Guard that adds one to a gauge, if there is one, until it is dropped.
pub(crate) struct InFlightGauge(Option<Gauge>);

impl InFlightGauge {
    pub(super) fn new(gauge: Option<&Gauge>) -> Self {
        if let Some(gauge) = gauge {
            guard(|| gauge.increment(1.0));
        }
        Self(gauge.cloned())
    }
}

impl Drop for InFlightGauge {
    fn drop(&mut self) {
        if let Some(gauge) = &self.0 {
            guard(|| gauge.decrement(1.0));
        }
    }
}
