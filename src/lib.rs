//! crate docs

mod cancel;
mod error;
mod hooks;
mod isolate;
mod job;
mod outcome;
mod policy;
mod sentinel;
mod supervision;

pub use self::{
    cancel::{CancelReason, Cancellation, cancelled},
    error::SentinelError,
    hooks::{CallerSpan, EventOnly, Hooks, MakeSpan, OnUnsettled},
    job::{ByJob, Job, Tagging, TimeLimit},
    outcome::{Cancelled, Failure, Outcome, OutcomeKind, Panic, TimedOut},
    policy::{AckPolicy, Report},
    sentinel::{ResponseFuture, Sentinel, SentinelLayer, ServiceBuilderExt},
    supervision::OnDrop,
};
