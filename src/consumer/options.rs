//! [`Options`]: how a session ends, and what it does after an error.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// What a [`Consumer`](crate::Consumer) does after an error that concerns
/// [one call alone](crate::consumer::Escalation::Call).
///
/// After one that reaches further it always stops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum AfterError {
    /// It drains, closes and returns the error.
    #[default]
    Stop,
    /// It counts the error in [`Summary::failed`](crate::consumer::Summary::failed) and goes on.
    Continue,
}

#[derive(Clone, Debug)]
pub(super) struct Options {
    pub(super) drain_timeout: Duration,
    pub(super) stop_timeout: Duration,
    pub(super) after_error: AfterError,
    pub(super) shutdown: Option<CancellationToken>,
    /// Whether the consumer bounds its calls by the prefetch of its subscription.
    pub(super) is_bounded: bool,
    /// How many calls of one task may be in flight.
    pub(super) limit: usize,
    /// Whether to warn of a shutdown token that the consumer has and its service's sentinel has not, or
    /// the other way round.
    pub(super) checks_token: bool,
    /// Cancelled when the channel is known to be gone.
    pub(super) gone: CancellationToken,
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
        }
    }
}
