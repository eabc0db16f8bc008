//! [`Escalation`]: the effect of a failed call on the channel, and the traits that decide it.

use std::{convert::Infallible, fmt};

use crate::{
    sentinel::SentinelError,
    settle::{SettleError, Unsettled},
};

/// Effect of a failed call on its channel and its consumer.
///
/// The error of a call is an error of the *settlement*: the error of a job went to the policy. A
/// [`Consumer`](crate::Consumer) must know whether the delivery is unsettled and nobody can settle it any
/// more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Escalation {
    /// The broker no longer waits for this delivery to be settled, as after the end of its lease.
    ///
    /// The consumer counts it in [`Summary::moot`](crate::consumer::Summary::moot) and goes on, also with
    /// [`AfterError::Stop`](crate::consumer::AfterError::Stop).
    Moot,
    /// It concerns only this call: the delivery is settled, or the broker does not wait for that.
    ///
    /// [`AfterError`](crate::consumer::AfterError) decides whether the consumer goes on.
    Call,
    /// The delivery may be unsettled: the channel must be given up, so that the broker redelivers.
    Channel,
    /// The delivery may be unsettled, and a new channel would not help: the configuration is wrong.
    Consumer,
}

/// Error that knows its [`Escalation`].
///
/// Implement it for the error of your own policy. If you can't, because the error is a `BoxError`, give the
/// consumer a closure: [`Consumer::escalation`](crate::Consumer::escalation).
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
    message = "a `Consumer` can't tell from `{Self}` whether the delivery is settled",
    label = "this error does not implement `Escalate`",
    note = "if it is a type of your crate, as the error of a policy may be, implement `tower_sentinel::consumer::Escalate` for it",
    note = "if it is not, as the `BoxError` of a middleware, give the consumer a closure: `.escalation(|error: &BoxError| Escalation::Channel)`, with the error of its service"
)]
pub trait Escalate {
    /// Returns the effect of the error.
    fn escalation(&self) -> Escalation;
}

impl Escalate for Infallible {
    fn escalation(&self) -> Escalation {
        match *self {}
    }
}

/// A policy that panicked or took too long may have lost the settlement. So may a call that was not ready,
/// since its job was taken from the stream.
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

/// An undecided, unsupported or misconfigured delivery would come back to the same configuration.
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

/// A policy that settles by itself returns this error. A settlement that may be tried again, and was not,
/// leaves the delivery unsettled.
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

/// Function or trait that decides the [`Escalation`] of an error.
///
/// Implemented for [`ByError`] and [`ByClosure`]. The name appears in error messages; it is not meant to be
/// implemented.
#[diagnostic::on_unimplemented(
    message = "a `Consumer` can't tell from `{E}` whether the delivery is settled",
    label = "nothing decides the effect of this error",
    note = "give the consumer a closure: `.escalation(|error: &{E}| Escalation::Channel)`"
)]
pub trait Classify<E>: sealed::Sealed {
    /// Returns the effect of `error`.
    fn classify(&self, error: &E) -> Escalation;
}

mod sealed {
    pub trait Sealed {}

    impl Sealed for super::ByError {}

    impl<F> Sealed for super::ByClosure<F> {}
}

/// The default [`Classify`]: the error decides, by [`Escalate`].
#[derive(Clone, Copy, Debug, Default)]
pub struct ByError;

impl<E: Escalate> Classify<E> for ByError {
    fn classify(&self, error: &E) -> Escalation {
        error.escalation()
    }
}

/// The [`Classify`] of [`Consumer::escalation`](crate::Consumer::escalation): a closure decides.
// Not the closure itself: to the compiler, an implementation for each `Fn` would also be one for `ByError`.
// Its message would then no longer name the error that does not implement `Escalate`.
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
