//! [`Base`], what all jobs of a sentinel share.

use std::sync::{Arc, OnceLock};

use crate::{
    sentinel::{abandoned::Abandoned, runtimes::Runtimes, settings::Settings, shutdown::Shutdown},
    telemetry::metrics::Instruments,
};

/// State shared by all clones of a sentinel and their response futures, apart from its hooks.
pub(crate) struct Base {
    pub(crate) settings: Settings,
    pub(crate) runtimes: Runtimes,
    /// Made by the first call that has a token.
    pub(crate) shutdown: OnceLock<Shutdown>,
    pub(crate) abandoned: Option<Arc<Abandoned>>,
    pub(crate) instruments: Arc<Instruments>,
}

impl Base {
    /// Returns the shutdown of the jobs. It is watched from the first call on.
    pub(crate) fn shutdown(&self) -> Option<&Shutdown> {
        let token = self.settings.shutdown.as_ref()?;
        let watch = || Shutdown::new(token, self.runtimes.handle());
        Some(self.shutdown.get_or_init(watch))
    }
}
