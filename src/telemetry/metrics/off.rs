//! Empty stand-ins for the types of `on.rs`, if the feature `metrics` is off.

use std::time::Duration;

use crate::outcome::OutcomeKind;

#[derive(Clone, Debug, Default)]
pub(crate) struct Labels(());

pub(crate) struct Instruments;

impl Instruments {
    pub(crate) const UNBOUNDED: Option<usize> = None;

    pub(crate) fn new(_: &Labels) -> Self {
        Self
    }

    pub(crate) fn begin(&self) -> InFlightGauge {
        InFlightGauge
    }

    pub(crate) fn conclude(&self, _: OutcomeKind, _: Duration) -> InFlightGauge {
        InFlightGauge
    }

    pub(crate) fn abandon(&self) -> InFlightGauge {
        InFlightGauge
    }
}

pub(crate) struct InFlightGauge;

#[derive(Clone, Debug)]
pub(crate) struct SettleInstruments;

impl SettleInstruments {
    pub(crate) fn new(_: Labels, _: [&'static str; 5]) -> Self {
        Self
    }

    pub(crate) fn begin(&self) -> Stopwatch {
        Stopwatch
    }
}

pub(crate) struct Stopwatch;

impl Stopwatch {
    pub(crate) fn settled(&self, _: usize) {}

    pub(crate) fn moot(&self, _: usize) {}
}

#[derive(Debug, Default)]
pub(crate) struct IntensityInstruments(());

impl IntensityInstruments {
    pub(crate) fn begin(&self, _: &Labels) {}

    pub(crate) fn change(&self, _: f64) {}
}
