//! [`Source`] of a consumer's sessions, behind one trait object.

use std::{
    fmt, mem,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, ready},
};

use tokio_util::sync::CancellationToken;
use tower_service::Service;

use super::{
    Classify, connect::Connect, erased::Erased, in_flight::Call, subscription::Subscription,
    supervised::MakeServices, work::Wired,
};
use crate::outcome::{Panic, catch_dyn, drop_quietly};

/// Constructor of the subscription and of the services of each session.
///
/// A trait object, so that the sessions of all consumers are the same code.
pub(super) trait Source: Send {
    /// Returns the shutdown token that the user gave to the layer.
    fn shutdown(&self) -> Option<&CancellationToken>;

    /// Makes the services of the next session.
    fn make_services(
        &mut self,
        tasks: Option<usize>,
        shutdown: &CancellationToken,
    ) -> Result<(), Panic>;

    /// Begins to connect.
    fn connect(&mut self, attempt: u32) -> Result<(), Panic>;

    /// Waits for the connection, and returns it with the services.
    fn poll_connected(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Result<Wired, Erased>, Panic>>;

    /// Drops the attempt to connect.
    fn disconnect(&mut self);

    /// Drops the services that were made for nothing.
    fn drop_services(&mut self);
}

/// The [`Source`] of a connector `K` and a constructor of services `M`.
pub(super) struct Typed<K: Connect, M: MakeServices, C> {
    pub(super) connect: K,
    pub(super) make_services: M,
    pub(super) classify: Arc<Mutex<C>>,
    pub(super) is_bounded: bool,
    pub(super) connecting: Option<Pin<Box<Call<K::Future>>>>,
    pub(super) services: Vec<M::Service>,
}

impl<K, M, C, B, S> Source for Typed<K, M, C>
where
    K: Connect<Subscription = B, Error: fmt::Display + Send + 'static, Future: Send> + Send,
    M: MakeServices<Service = S> + Send,
    B: Subscription<Job: Send, Error: fmt::Display + Send + 'static> + Send + 'static,
    S: Service<B::Job, Response: Send + 'static, Future: Send + 'static> + Send + 'static,
    S::Error: fmt::Display + Send + 'static,
    C: Classify<S::Error> + Send + 'static,
{
    fn shutdown(&self) -> Option<&CancellationToken> {
        self.make_services.shutdown()
    }

    fn make_services(
        &mut self,
        tasks: Option<usize>,
        shutdown: &CancellationToken,
    ) -> Result<(), Panic> {
        catch_dyn(&mut || self.services = self.make_services.make_services(tasks, shutdown))
    }

    fn connect(&mut self, attempt: u32) -> Result<(), Panic> {
        catch_dyn(&mut || {
            let connecting = self.connect.connect(attempt);
            self.connecting = Some(Box::pin(Call::new(connecting)));
        })
    }

    fn poll_connected(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Result<Wired, Erased>, Panic>> {
        let Some(connecting) = &mut self.connecting else {
            return Poll::Pending;
        };
        let connected = ready!(connecting.as_mut().poll(cx));
        self.connecting = None;
        Poll::Ready(connected.map(|connected| match connected {
            Ok(subscription) => {
                let services = mem::take(&mut self.services);
                Ok(Wired::new(
                    subscription,
                    services,
                    &self.classify,
                    self.is_bounded,
                ))
            }
            Err(error) => Err(Erased::new(error)),
        }))
    }

    fn disconnect(&mut self) {
        self.connecting = None;
    }

    fn drop_services(&mut self) {
        while let Some(service) = self.services.pop() {
            drop_quietly(service);
        }
    }
}
