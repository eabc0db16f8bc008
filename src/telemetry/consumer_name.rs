//! The name of the consumer that a task belongs to, for its events, spans and metrics.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
};

use tracing::{Span, span::Id};

use crate::telemetry::span::GuardedSpan;

/// The field and the label of the name.
#[cfg(feature = "metrics")]
pub(crate) const LABEL: &str = "consumer.name";

tokio::task_local! {
    static CONSUMER: Named;
}

#[derive(Clone)]
struct Named {
    name: Arc<str>,
    /// The consumer's own span; none where no subscriber has it.
    span: Option<Id>,
    /// The span in which it was awaited, which lives as long as its child.
    outer: Option<Id>,
}

/// Returns the name of the consumer that this is called by, if it has one.
pub(crate) fn current() -> Option<Arc<str>> {
    CONSUMER.try_with(|it| Arc::clone(&it.name)).ok()
}

/// Returns the parent of a job's span where the current span is the consumer's own: that would make one
/// trace of all jobs, for as long as the consumer lasts.
pub(crate) fn parent_of_jobs() -> Option<Option<Id>> {
    let named = CONSUMER.try_with(Named::clone).ok()?;
    let is_in_own = named.span.is_some() && named.span == Span::current().id();
    is_in_own.then_some(named.outer)
}

/// Returns the consumer of that name, to be run in a span that bears it; in the current span if it has
/// none.
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

/// Returns a part of the consumer that is to run on a task of its own.
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
