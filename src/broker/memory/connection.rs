//! [`Connection`], over which channels are opened.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{
    deliveries::Deliveries,
    error::ConnectError,
    state::{Declared, Server},
};

/// Handle to a connection to a [`Broker`](super::Broker), for any number of subscriptions.
///
/// Clones are handles to the same connection. Dropping a handle does not end the connection, and its
/// subscriptions live on.
pub struct Connection<P> {
    server: Arc<Server<P>>,
    number: u64,
    is_lost: Arc<AtomicBool>,
}

impl<P> Connection<P> {
    pub(super) fn open(server: &Arc<Server<P>>) -> Result<Self, ConnectError> {
        let number = server.lock().connect()?;
        Ok(Self {
            server: Arc::clone(server),
            number,
            is_lost: Arc::default(),
        })
    }

    /// Subscribes over a new channel.
    #[track_caller]
    pub(super) fn open_channel(
        &self,
        queue: &Arc<Declared<P>>,
        prefetch: usize,
    ) -> Result<Deliveries<P>, ConnectError> {
        assert!(prefetch > 0, "a prefetch of 0 would deliver nothing");
        let is_ours = Arc::ptr_eq(&self.server, &queue.server);
        assert!(is_ours, "the queue is of another broker");
        let mut state = self.server.lock();
        if self.is_lost.load(Ordering::Relaxed) || state.is_severed(self.number) {
            return Err(ConnectError::Disconnected);
        }
        let channel = state.open(self.number, queue.index, prefetch);
        Ok(Deliveries::new(queue, channel, prefetch))
    }

    /// Drops the connection now, as if its socket broke.
    ///
    /// Its unsettled jobs go to the front of their queues, in the order of delivery, with a delivery charged
    /// and the redelivered flag set. Its tags are stale, and its subscriptions end with
    /// [`SubscriptionError::Disconnected`](super::SubscriptionError::Disconnected).
    pub fn drop_now(&self) {
        let mut state = self.server.lock();
        self.is_lost.store(true, Ordering::Relaxed);
        let step = state.sever(Some(self.number));
        drop(state);
        step.finish();
    }
}

impl<P> Clone for Connection<P> {
    fn clone(&self) -> Self {
        Self {
            server: Arc::clone(&self.server),
            number: self.number,
            is_lost: Arc::clone(&self.is_lost),
        }
    }
}

impl<P> fmt::Debug for Connection<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}
