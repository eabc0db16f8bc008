//! Name of the consumer that a task belongs to, for its events, spans and metrics.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
};

use tracing::{Span, span::Id};

use crate::telemetry::span::GuardedSpan;

/// The name of the field and of the label.
#[cfg(feature = "metrics")]
pub(crate) const LABEL: &str = "consumer.name";

tokio::task_local! {
    static CONSUMER: Named;
}

#[derive(Clone)]
struct Named {
    name: Arc<str>,
    /// The consumer's own span; `None` if no subscriber records it.
    span: Option<Id>,
    /// The span in which the consumer was awaited. It lives as long as its child.
    outer: Option<Id>,
}

/// Returns the name of the consumer that calls this, if it has one.
pub(crate) fn current() -> Option<Arc<str>> {
    CONSUMER.try_with(|it| Arc::clone(&it.name)).ok()
}

/// Returns the parent for a job's span if the current span is the consumer's own, and `None` otherwise.
///
/// With the consumer's own span as the parent, all jobs would be one trace, as long as the consumer lives.
pub(crate) fn parent_of_jobs() -> Option<Option<Id>> {
    let named = CONSUMER.try_with(Named::clone).ok()?;
    let is_in_own = named.span.is_some() && named.span == Span::current().id();
    is_in_own.then_some(named.outer)
}

/// Returns `consumer` to be run in a span with its name, or in the current span if it has no name.
pub(crate) fn named<F: Future>(
    name: Option<Arc<str>>,
    consumer: F,
) -> impl Future<Output = F::Output> {
    let outer = GuardedSpan::make(Span::current).id();
    let span = GuardedSpan::make(|| match &name {
        Some(name) => tracing::info_span!("consumer", consumer.name = &**name),
        None => Span::current(),
    });
    let named = name.map(|name| Named {
        name,
        span: span.id(),
        outer,
    });
    scoped(span, named, consumer)
}

/// Returns a part of the consumer for its own task, with the consumer's name and the current span.
pub(crate) fn carried<F: Future>(part: F) -> impl Future<Output = F::Output> {
    let named = CONSUMER.try_with(Named::clone).ok();
    scoped(GuardedSpan::make(Span::current), named, part)
}

async fn scoped<F: Future>(span: GuardedSpan, named: Option<Named>, future: F) -> F::Output {
    let mut future = pin!(future);
    let future = poll_fn(|cx| {
        let _entered = span.enter();
        future.as_mut().poll(cx)
    });
    match named {
        Some(named) => CONSUMER.scope(named, future).await,
        None => future.await,
    }
}
