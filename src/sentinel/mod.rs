//! Middleware that supervises each call of a service and settles its outcome with a policy.
//!
//! See [`SentinelLayer`].

mod abandoned;
mod arrival;
mod base;
mod builder;
mod cause;
mod course;
mod error;
mod future;
mod hooks;
mod isolate;
mod layer;
mod lease;
pub(crate) mod listening;
mod orphan;
pub(crate) mod roll_call;
mod runtimes;
mod service;
mod settings;
mod settlement;
mod shutdown;
mod supervision;
mod task;

pub use self::{
    arrival::LimitedDeliveries,
    builder::ServiceBuilderExt,
    error::SentinelError,
    future::ResponseFuture,
    hooks::{ByJob, CallerSpan, EventOnly, Hooks, MakeSpan, OnUnsettled, Tagging},
    layer::SentinelLayer,
    roll_call::RunningJob,
    service::Sentinel,
    settings::OnDrop,
};
