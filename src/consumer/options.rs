//! [`Options`] of a session: its end, and its reaction to errors.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use super::{watchdog::Timing, watched::Watched};

/// Reaction of a [`Consumer`](crate::Consumer) to an error that concerns [only one
/// call](crate::consumer::Escalation::Call).
///
/// After an error with a wider effect it always stops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum AfterError {
    /// The consumer drains, closes the channel and returns the error.
    #[default]
    Stop,
    /// The consumer counts the error in [`Summary::failed`](crate::consumer::Summary::failed) and goes on.
    Continue,
}

#[derive(Clone, Debug)]
pub(super) struct Options {
    pub(super) drain_timeout: Duration,
    pub(super) stop_timeout: Duration,
    pub(super) after_error: AfterError,
    pub(super) shutdown: Option<CancellationToken>,
    /// `true` if the consumer limits its calls to the prefetch of its subscription.
    pub(super) is_bounded: bool,
    /// Number of calls of one task that may be in flight.
    pub(super) limit: usize,
    /// `true` to warn if only one of the consumer and its service's sentinel has a shutdown token.
    pub(super) checks_token: bool,
    /// Cancelled when the channel is known to be gone.
    pub(super) gone: CancellationToken,
    /// Set once there is a handle to the consumer, or a watchdog.
    pub(super) watched: OnceLock<Arc<Watched>>,
    pub(super) watchdog: Option<Timing>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            drain_timeout: Duration::from_secs(30),
            stop_timeout: Duration::from_secs(40),
            after_error: AfterError::Stop,
            shutdown: None,
            is_bounded: false,
            limit: usize::MAX,
            checks_token: false,
            gone: CancellationToken::new(),
            watched: OnceLock::new(),
            watchdog: None,
        }
    }
}
