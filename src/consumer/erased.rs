//! [`Erased`] errors, and the [`Cause`] of an end with them.

use std::{any::Any, fmt};

use super::EndCause;

/// Cause of an end, as a consumer handles it.
pub(super) type Cause = EndCause<Erased, Erased, Erased>;

/// Error of a subscription, a service or a connector, without its type.
///
/// A consumer only prints an error and returns it. So most of a consumer is compiled once, and not for each type.
pub(super) struct Erased {
    error: Box<dyn Any + Send>,
    print: fn(&(dyn Any + Send), &mut fmt::Formatter<'_>) -> fmt::Result,
}

impl Erased {
    pub(super) fn new<E: fmt::Display + Send + 'static>(error: E) -> Self {
        Self {
            error: Box::new(error),
            print: print::<E>,
        }
    }

    fn typed<E: 'static>(self) -> E {
        // Invariant: a consumer returns the errors of the types that it was made of.
        *self.error.downcast().expect("an error keeps its type")
    }
}

fn print<E: fmt::Display + 'static>(
    error: &(dyn Any + Send),
    f: &mut fmt::Formatter<'_>,
) -> fmt::Result {
    match error.downcast_ref::<E>() {
        Some(error) => error.fmt(f),
        None => Ok(()),
    }
}

impl fmt::Display for Erased {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (self.print)(&*self.error, f)
    }
}

impl Cause {
    /// Returns the same cause with the types of its errors.
    pub(super) fn typed<T: 'static, E: 'static, C: 'static>(self) -> EndCause<T, E, C> {
        match self {
            EndCause::StreamEnded => EndCause::StreamEnded,
            EndCause::Stream(error) => EndCause::Stream(error.typed()),
            EndCause::StreamPanicked(panic) => EndCause::StreamPanicked(panic),
            EndCause::Stalled(stall) => EndCause::Stalled(stall),
            EndCause::Unready(error) => EndCause::Unready(error.typed()),
            EndCause::UnreadyPanicked(panic) => EndCause::UnreadyPanicked(panic),
            EndCause::Failed(error) => EndCause::Failed(error.typed()),
            EndCause::Unanswered(error) => EndCause::Unanswered(error.typed()),
            EndCause::Misconfigured(error) => EndCause::Misconfigured(error.typed()),
            EndCause::CallPanicked(panic) => EndCause::CallPanicked(panic),
            EndCause::Connect(error) => EndCause::Connect(error.typed()),
            EndCause::ConnectTimedOut(limit) => EndCause::ConnectTimedOut(limit),
            EndCause::ConnectPanicked(panic) => EndCause::ConnectPanicked(panic),
            EndCause::MakeServicePanicked(panic) => EndCause::MakeServicePanicked(panic),
            EndCause::RuntimeGone => EndCause::RuntimeGone,
        }
    }
}
