//! [`Supervised`]: handlers under sentinels that the consumer makes itself.

use std::{fmt, mem};

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::sentinel::{Sentinel, SentinelLayer};

/// The most tasks that a consumer takes by itself: each job that arrives wakes all that are idle.
const MAX_TASKS: usize = 4;

/// Services for the tasks of a session.
///
/// Implemented for `FnMut(CancellationToken) -> S` and for [`Supervised`]; a name to read in error
/// messages, not one to implement.
pub trait MakeServices: sealed::Sealed {
    /// The service of one task.
    type Service;

    /// Returns a service for each of `tasks`, or for as many as pay.
    #[doc(hidden)]
    fn make_services(
        &mut self,
        tasks: Option<usize>,
        shutdown: &CancellationToken,
    ) -> Vec<Self::Service>;

    /// Returns whether the sentinels are the consumer's own.
    #[doc(hidden)]
    fn is_supervised(&self) -> bool {
        false
    }

    /// Returns the shutdown token that a layer was given by its user.
    #[doc(hidden)]
    fn shutdown(&self) -> Option<&CancellationToken> {
        None
    }
}

mod sealed {
    pub trait Sealed {}
}

impl<M, S> sealed::Sealed for M where M: FnMut(CancellationToken) -> S {}

impl<M, S> MakeServices for M
where
    M: FnMut(CancellationToken) -> S,
{
    type Service = S;

    fn make_services(&mut self, tasks: Option<usize>, shutdown: &CancellationToken) -> Vec<S> {
        let services = (0..tasks.unwrap_or(1)).map(|_| self(shutdown.clone()));
        services.collect()
    }
}

/// The services of a consumer that has one session.
pub(super) enum Services<S> {
    Given(Vec<S>),
    /// Boxed: the consumer's type names the service, and not how it is made.
    Supervised(Box<dyn MakeServices<Service = S> + Send>),
}

impl<S> sealed::Sealed for Services<S> {}

impl<S> MakeServices for Services<S> {
    type Service = S;

    fn make_services(&mut self, tasks: Option<usize>, shutdown: &CancellationToken) -> Vec<S> {
        match self {
            Services::Given(services) => mem::take(services),
            Services::Supervised(services) => services.make_services(tasks, shutdown),
        }
    }

    fn is_supervised(&self) -> bool {
        matches!(self, Services::Supervised(_))
    }

    fn shutdown(&self) -> Option<&CancellationToken> {
        match self {
            Services::Given(_) => None,
            Services::Supervised(services) => services.shutdown(),
        }
    }
}

impl<S: fmt::Debug> fmt::Debug for Services<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Services::Given(services) => f.debug_list().entries(services).finish(),
            Services::Supervised(_) => f.write_str("Supervised"),
        }
    }
}

/// The [`MakeServices`] of
/// [`ReconnectingConsumer::sentinel`](crate::consumer::ReconnectingConsumer::sentinel): handlers of `M`,
/// each session's under a sentinel of its own.
#[derive(Clone)]
pub struct Supervised<M, P, H> {
    handlers: M,
    layer: SentinelLayer<P, H>,
}

impl<M, P, H> Supervised<M, P, H> {
    pub(super) fn new(handlers: M, layer: SentinelLayer<P, H>) -> Self {
        Self { handlers, layer }
    }
}

impl<M, P, H> sealed::Sealed for Supervised<M, P, H> {}

impl<M, P, H> MakeServices for Supervised<M, P, H>
where
    M: MakeServices<Service: Clone>,
    P: Clone,
    H: Clone,
{
    type Service = Sentinel<M::Service, P, H>;

    fn make_services(
        &mut self,
        tasks: Option<usize>,
        shutdown: &CancellationToken,
    ) -> Vec<Self::Service> {
        let mut handlers = self.handlers.make_services(Some(1), shutdown);
        if let Some(first) = handlers.first().cloned() {
            let tasks = tasks.unwrap_or_else(tasks_that_pay);
            handlers.resize(tasks.max(handlers.len()), first);
        }
        self.layer.layer_each(handlers, shutdown)
    }

    fn is_supervised(&self) -> bool {
        true
    }

    fn shutdown(&self) -> Option<&CancellationToken> {
        self.layer.settings.shutdown.as_ref()
    }
}

impl<M, P: fmt::Debug, H> fmt::Debug for Supervised<M, P, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Supervised")
            .field("layer", &self.layer)
            .finish_non_exhaustive()
    }
}

/// Returns how many tasks a consumer takes by itself: one for each worker of the runtime.
fn tasks_that_pay() -> usize {
    let workers = Handle::try_current().map_or(1, |runtime| runtime.metrics().num_workers());
    workers.min(MAX_TASKS)
}
