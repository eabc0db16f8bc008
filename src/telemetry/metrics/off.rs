//! Empty stand-ins for the types of `on`, if the feature `metrics` is off.

use std::time::{Duration, SystemTime};

use super::Unfinished;
use crate::{outcome::OutcomeKind, telemetry::messaging::Messaging};

#[derive(Clone, Debug, Default)]
pub(crate) struct Labels(());

pub(crate) struct Instruments;

impl Instruments {
    pub(crate) const UNBOUNDED: Option<usize> = None;

    pub(crate) fn new(_: &Labels) -> Self {
        Self
    }

    pub(crate) fn begin<'a>(
        &self,
        _: &'static str,
        _: impl FnOnce() -> Option<Messaging<'a>>,
    ) -> InFlightGauge {
        InFlightGauge
    }

    pub(crate) fn waited(&self, _: impl FnOnce() -> Option<SystemTime>) {}

    pub(crate) fn conclude(&self, _: OutcomeKind, _: Duration) -> InFlightGauge {
        InFlightGauge
    }

    pub(crate) fn measured(&self) -> MeasuredBy {
        MeasuredBy(())
    }

    pub(crate) fn abandon(&self) -> InFlightGauge {
        InFlightGauge
    }
}

#[derive(Default)]
pub(crate) struct MeasuredBy(());

impl MeasuredBy {
    pub(crate) fn of_policy(&self, policy: &SettleInstruments) -> SettleInstruments {
        policy.clone()
    }
}

pub(crate) struct InFlightGauge;

#[derive(Clone, Debug)]
pub(crate) struct SettleInstruments;

impl SettleInstruments {
    pub(crate) fn new(_: Labels, _: [&'static str; 5]) -> Self {
        Self
    }

    pub(crate) fn begin<'a>(self, _: u8, _: impl FnOnce() -> Option<Messaging<'a>>) -> Stopwatch {
        Stopwatch
    }
}

pub(crate) struct Stopwatch;

impl Stopwatch {
    pub(crate) fn set_unfinished(&mut self, _: Unfinished) {}

    pub(crate) fn settled(&mut self) {}

    pub(crate) fn failed(&mut self, _: &'static str) {}

    pub(crate) fn moot(&self) {}
}

#[derive(Debug, Default)]
pub(crate) struct IntensityInstruments(());

impl IntensityInstruments {
    pub(crate) fn begin(&self, _: &Labels) {}

    pub(crate) fn change(&self, _: f64) {}
}

pub(crate) struct ConsumerInstruments;

impl ConsumerInstruments {
    pub(crate) fn begin() -> Self {
        Self
    }

    pub(crate) fn connected(&self) -> InFlightGauge {
        InFlightGauge
    }

    pub(crate) fn reconnects(&self) {}
}

pub(crate) fn count_stall(_: &'static str) {}
