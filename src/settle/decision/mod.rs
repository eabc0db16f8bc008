//! [`Decision`], which maps an outcome to a [`Verdict`](crate::Verdict), and ready decisions that compose.

mod combinators;
#[cfg(feature = "process")]
mod crash;
mod decide;

#[cfg(feature = "process")]
pub use self::crash::{Crash, CrashLimit, OnCrash};
pub use self::{
    combinators::{
        AckOnSuccess, Backoff, BoxDecision, DecisionExt, DeliveryLimit, OnError, PoisonOnPanic,
        RejectUndecodable, RetryOnce, ack_on_success,
    },
    decide::{Decision, Undecided},
};
