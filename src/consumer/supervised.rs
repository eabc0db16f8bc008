//! [`Supervised`], handlers under sentinels that the consumer makes.

use std::{fmt, mem};

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::sentinel::{Sentinel, SentinelLayer};

/// Maximum number of tasks that a consumer chooses by default. There are few, since each job that arrives
/// wakes all idle ones.
const MAX_TASKS: usize = 4;

/// Constructor of the services for the tasks of a session.
///
/// Implemented for `FnMut(CancellationToken) -> S` and for [`Supervised`]. The name appears in error
/// messages; it is not meant to be implemented.
pub trait MakeServices: sealed::Sealed {
    /// The service of one task.
    type Service;

    /// Returns one service for each of `tasks`, or for the default number.
    #[doc(hidden)]
    fn make_services(
        &mut self,
        tasks: Option<usize>,
        shutdown: &CancellationToken,
    ) -> Vec<Self::Service>;

    /// Returns the shutdown token that the user gave to the layer.
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
        let mut services = Vec::new();
        for _ in 0..tasks.unwrap_or(1) {
            services.push(self(shutdown.clone()));
        }
        services
    }
}

/// Services of a consumer that has only one session.
pub(super) enum Services<S> {
    Given(Vec<S>),
    /// Boxed, since the type of the consumer names the service, and not its constructor.
    Supervised(Box<dyn MakeServices<Service = S> + Send>),
}

impl<S> Services<S> {
    /// Returns whether the consumer makes the sentinels.
    pub(super) fn is_supervised(&self) -> bool {
        matches!(self, Services::Supervised(_))
    }
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
/// [`ReconnectingConsumer::sentinel`](crate::consumer::ReconnectingConsumer::sentinel): handlers from `M`,
/// under a new sentinel for each session.
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
        // Cloned in any case, as by each call: a handler that panics at it is not used at all.
        if let Some(first) = handlers.first().cloned() {
            let tasks = tasks.unwrap_or_else(tasks_that_pay);
            while handlers.len() < tasks {
                handlers.push(first.clone());
            }
        }
        self.layer.layer_each(handlers, shutdown)
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

/// Returns the default number of tasks: one for each worker of the runtime, up to a maximum.
fn tasks_that_pay() -> usize {
    let workers = Handle::try_current().map_or(1, |runtime| runtime.metrics().num_workers());
    workers.min(MAX_TASKS)
}
