//! [`IntensityInstruments`] of an intensity layer.

use std::{fmt, sync::OnceLock};

use ::metrics::{Gauge, gauge};

use super::{
    describe::INTENSITY_STATE,
    labels::{Labels, of_consumer},
};
use crate::outcome::guard;

/// Metrics of the services of one layer.
#[derive(Default)]
pub(crate) struct IntensityInstruments {
    /// Looked up for the first service, since each setting makes a new layer and the former is not used.
    state: OnceLock<Gauge>,
}

impl IntensityInstruments {
    /// Begins to report the state, with a service that runs.
    pub(crate) fn begin(&self, labels: &Labels) {
        guard(|| {
            self.state.get_or_init(|| {
                let state = gauge!(INTENSITY_STATE, of_consumer(labels));
                state.set(0.0);
                state
            });
        });
    }

    /// Reports the new state of the services.
    pub(crate) fn change(&self, state: f64) {
        if let Some(gauge) = self.state.get() {
            guard(|| gauge.set(state));
        }
    }
}

impl fmt::Debug for IntensityInstruments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IntensityInstruments")
    }
}
