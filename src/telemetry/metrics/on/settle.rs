//! [`SettleInstruments`] of a settle policy.

use std::{
    fmt,
    sync::{Arc, OnceLock},
};

use ::metrics::{Counter, Histogram, Label, counter, histogram};
use tokio::time::Instant;

use super::{
    describe::{MOOT, SETTLE_DURATION, VERDICTS},
    labels::{ERROR_TYPE, Labels, OPERATION, of_delivery, with},
};
use crate::{
    outcome::guard,
    telemetry::{messaging::Messaging, metrics::Unfinished},
};

const OPERATION_TYPE: &str = "messaging.operation.type";

/// Metrics of one policy, cloned with it for each job.
#[derive(Clone)]
pub(crate) struct SettleInstruments(Arc<Settlements>);

struct Settlements {
    labels: Labels,
    names: [&'static str; 5],
    /// Looked up for the first settlement: before its labels are set, a policy has other labels, which must
    /// not be seen.
    verdicts: OnceLock<Verdicts>,
}

struct Verdicts {
    /// Those of all metrics.
    labels: Labels,
    /// In the order of the names.
    settled: [(Counter, Histogram); 5],
}

impl SettleInstruments {
    /// Creates the metrics of a policy, with the `names` of the verdicts by index.
    pub(crate) fn new(labels: Labels, names: [&'static str; 5]) -> Self {
        let verdicts = OnceLock::new();
        Self(Arc::new(Settlements {
            labels,
            names,
            verdicts,
        }))
    }

    /// Returns the same metrics, to be looked up anew.
    pub(super) fn anew(&self) -> Self {
        let Settlements { labels, names, .. } = &*self.0;
        Self::new(labels.clone(), *names)
    }

    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Begins to measure a settlement with the verdict that has this index.
    pub(crate) fn begin<'a>(
        self,
        verdict: u8,
        describe: impl FnOnce() -> Option<Messaging<'a>>,
    ) -> Stopwatch {
        let Settlements {
            labels,
            names,
            verdicts,
        } = &*self.0;
        if verdicts.get().is_none() {
            guard(|| {
                verdicts.get_or_init(|| Verdicts::new(of_delivery(labels, describe), names));
            });
        }
        Stopwatch {
            instruments: self,
            verdict,
            unfinished: None,
            started: Instant::now(),
        }
    }
}

impl Verdicts {
    fn new(labels: Labels, names: &[&'static str; 5]) -> Self {
        let settled = names.map(|name| {
            let verdicts = counter!(VERDICTS, with(&labels, [(OPERATION, name)]));
            (
                verdicts,
                histogram!(SETTLE_DURATION, operation(&labels, name)),
            )
        });
        Self { labels, settled }
    }
}

/// Returns the labels of the duration of a settlement.
fn operation(labels: &Labels, name: &'static str) -> Labels {
    with(labels, [(OPERATION, name), (OPERATION_TYPE, "settle")])
}

/// Stopwatch of one settlement.
pub(crate) struct Stopwatch {
    instruments: SettleInstruments,
    // Small, since it is part of each settlement.
    verdict: u8,
    /// `None` once it has a result.
    unfinished: Option<Unfinished>,
    started: Instant,
}

impl Stopwatch {
    /// Sets the error with which the settlement counts if it is dropped without a result.
    pub(crate) fn set_unfinished(&mut self, error: Unfinished) {
        self.unfinished = Some(error);
    }

    /// Counts the settlement.
    pub(crate) fn settled(&mut self) {
        self.unfinished = None;
        if let Some(verdicts) = self.instruments.0.verdicts.get() {
            let (verdicts, duration) = &verdicts.settled[usize::from(self.verdict)];
            guard(|| verdicts.increment(1));
            guard(|| duration.record(self.started.elapsed()));
        }
    }

    /// Measures a settlement that has failed.
    pub(crate) fn failed(&mut self, error_type: &'static str) {
        self.unfinished = None;
        // Rare, so it is looked up each time.
        let Settlements {
            names, verdicts, ..
        } = &*self.instruments.0;
        if let Some(verdicts) = verdicts.get() {
            let elapsed = self.started.elapsed();
            guard(|| {
                let mut labels = operation(&verdicts.labels, names[usize::from(self.verdict)]);
                labels.push(Label::from_static_parts(ERROR_TYPE, error_type));
                histogram!(SETTLE_DURATION, labels).record(elapsed);
            });
        }
    }

    /// Counts a settlement that the broker did not wait for any more.
    pub(crate) fn moot(&self) {
        let Settlements {
            names, verdicts, ..
        } = &*self.instruments.0;
        // Rare, so it is looked up each time.
        if let Some(verdicts) = verdicts.get() {
            let name = names[usize::from(self.verdict)];
            guard(|| {
                counter!(MOOT, with(&verdicts.labels, [(OPERATION, name)])).increment(1);
            });
        }
    }
}

impl Drop for Stopwatch {
    fn drop(&mut self) {
        match self.unfinished {
            Some(Unfinished::Dropped) => self.failed("dropped"),
            Some(Unfinished::Panicked) => self.failed("panic"),
            None => {}
        }
    }
}

impl fmt::Debug for SettleInstruments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SettleInstruments")
    }
}
