//! [`Escalation`]: what a failed call means for the channel, and who says so.

use std::{convert::Infallible, fmt};

use crate::{
    sentinel::SentinelError,
    settle::{SettleError, Unsettled},
};

/// How far the error of a call reaches.
///
/// An error of a call is one of the *answer*: that of a job went to the policy. What matters to a
/// [`Consumer`](crate::Consumer) is whether the broker still waits for an answer that nobody can
/// give any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Escalation {
    /// The broker waits for no answer of this job any more, as after the end of its lease.
    ///
    /// The consumer counts it in [`Summary::moot`](crate::consumer::Summary::moot) and goes on, whatever
    /// [`AfterError`](crate::consumer::AfterError) says.
    Moot,
    /// It concerns this call alone: the broker has its answer, or waits for none.
    ///
    /// [`AfterError`](crate::consumer::AfterError) says whether the consumer goes on.
    Call,
    /// The broker may have no answer: the channel must be given up, so that it redelivers.
    Channel,
    /// The broker may have no answer, and a new channel would not help: the configuration is
    /// wrong.
    Consumer,
}

/// An error that knows how far it reaches.
///
/// Implement it for the error of your own policy. Where you can't, because the error is a
/// `BoxError`, give the consumer a closure: [`Consumer::escalation`](crate::Consumer::escalation).
///
/// ```
/// use tower_sentinel::{SentinelError, consumer::{Escalate, Escalation}};
///
/// #[derive(Debug)]
/// enum PublishError { ChannelClosed, NoSuchExchange }
///
/// impl Escalate for PublishError {
///     fn escalation(&self) -> Escalation {
///         match self {
///             PublishError::ChannelClosed => Escalation::Channel,
///             PublishError::NoSuchExchange => Escalation::Consumer,
///         }
///     }
/// }
///
/// type CallError = SentinelError<std::io::Error, PublishError>;
/// let error = CallError::Policy(PublishError::ChannelClosed);
/// assert_eq!(error.escalation(), Escalation::Channel);
/// assert_eq!(CallError::PolicyTimedOut(Default::default()).escalation(), Escalation::Channel);
/// ```
#[diagnostic::on_unimplemented(
    message = "a `Consumer` can't tell from `{Self}` whether the broker has its answer",
    label = "this error does not say how far it reaches",
    note = "if it is a type of your crate, as the error of a policy may be, implement `tower_sentinel::consumer::Escalate` for it",
    note = "if it is not, as the `BoxError` of a middleware, tell the consumer: `.escalation(|error: &BoxError| Escalation::Channel)`, with the error of its service"
)]
pub trait Escalate {
    /// Returns how far the error reaches.
    fn escalation(&self) -> Escalation;
}

impl Escalate for Infallible {
    fn escalation(&self) -> Escalation {
        match *self {}
    }
}

/// A policy that panicked or took too long may have lost the answer. So has a call that was not
/// ready: its job was taken from the stream.
impl<E, P: Escalate> Escalate for SentinelError<E, P> {
    fn escalation(&self) -> Escalation {
        match self {
            SentinelError::Policy(error) => error.escalation(),
            SentinelError::PolicyPanicked(_)
            | SentinelError::PolicyTimedOut(_)
            | SentinelError::Unready(_)
            | SentinelError::UnreadyPanicked(_)
            | SentinelError::RuntimeGone => Escalation::Channel,
        }
    }
}

/// What is undecided, unsupported or misconfigured comes back to the same configuration.
impl<E> Escalate for SettleError<E> {
    fn escalation(&self) -> Escalation {
        match self {
            SettleError::Moot { .. } => Escalation::Moot,
            SettleError::Undecided(_)
            | SettleError::Unsupported { .. }
            | SettleError::Misconfigured { .. } => Escalation::Consumer,
            error if error.must_give_up_channel() => Escalation::Channel,
            SettleError::TimedOut { .. } | SettleError::Failed { .. } => Escalation::Call,
        }
    }
}

/// A policy that settles by itself passes it on: what may be tried again, and was not, has no answer.
impl<Tag, E> Escalate for Unsettled<Tag, E> {
    fn escalation(&self) -> Escalation {
        if self.is_moot() {
            Escalation::Moot
        } else if self.is_misconfigured() {
            Escalation::Consumer
        } else {
            Escalation::Channel
        }
    }
}

/// Who says how far an error reaches.
///
/// Implemented for [`ByError`] and [`ByClosure`]; a name to read in error messages, not one to implement.
#[diagnostic::on_unimplemented(
    message = "a `Consumer` can't tell from `{E}` whether the broker has its answer",
    label = "nobody says how far this error reaches",
    note = "tell the consumer: `.escalation(|error: &{E}| Escalation::Channel)`"
)]
pub trait Classify<E>: sealed::Sealed {
    /// Returns how far `error` reaches.
    fn classify(&self, error: &E) -> Escalation;
}

mod sealed {
    pub trait Sealed {}

    impl Sealed for super::ByError {}

    impl<F> Sealed for super::ByClosure<F> {}
}

/// The default [`Classify`]: asks the error itself, which is to [`Escalate`].
#[derive(Clone, Copy, Debug, Default)]
pub struct ByError;

impl<E: Escalate> Classify<E> for ByError {
    fn classify(&self, error: &E) -> Escalation {
        error.escalation()
    }
}

/// The [`Classify`] of [`Consumer::escalation`](crate::Consumer::escalation): asks a closure.
// Not the closure itself: an implementation for each `Fn` would be one for `ByError` as well, to the
// compiler, which would then not say which error of an error does not `Escalate`.
#[derive(Clone, Copy)]
pub struct ByClosure<F>(pub(super) F);

impl<E, F: Fn(&E) -> Escalation> Classify<E> for ByClosure<F> {
    fn classify(&self, error: &E) -> Escalation {
        (self.0)(error)
    }
}

impl<F> fmt::Debug for ByClosure<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ByClosure")
    }
}
