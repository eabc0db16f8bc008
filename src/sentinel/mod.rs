//! Middleware that supervises each call of a service and settles its outcome with a policy.
//!
//! See [`SentinelLayer`].

mod abandoned;
mod arrival;
mod builder;
mod error;
mod future;
mod hooks;
mod isolate;
mod layer;
mod lease;
pub(crate) mod listening;
mod runtimes;
mod service;
mod settlement;
mod shutdown;
mod supervision;

pub use self::{
    arrival::LimitedDeliveries,
    builder::ServiceBuilderExt,
    error::SentinelError,
    future::ResponseFuture,
    hooks::{ByJob, CallerSpan, EventOnly, Hooks, MakeSpan, OnUnsettled, Tagging},
    layer::SentinelLayer,
    service::Sentinel,
    supervision::OnDrop,
};
