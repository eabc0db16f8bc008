//! [`Reopened`]: the connection that publishes.

use std::{
    future::Future,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use lapin::Connection;
use tokio::time::{sleep, timeout};

use super::{connection::Publishing, delivery_error::DeliveryError};

/// Time that a publish waits while the server blocks the connection.
///
/// Together with the wait for a new retry queue it is less than the 5 s of one settlement attempt. So the job
/// is given back, and no other job has to be.
const PATIENCE: Duration = Duration::from_secs(2);

/// Time in which the loss of a connection is noticed.
const NOTICED: Duration = Duration::from_secs(1);

/// The connection that publishes, which is opened anew when it is lost.
pub(super) struct Reopened {
    publishing: Publishing,
    /// The last one that was opened.
    last: Mutex<Arc<Connection>>,
}

impl Reopened {
    pub(super) fn new(publishing: Publishing, opened: Arc<Connection>) -> Self {
        let last = Mutex::new(opened);
        Self { publishing, last }
    }

    /// Returns the largest size of a frame, in bytes.
    pub(super) fn frame_max(&self) -> u32 {
        self.last().configuration().frame_max()
    }

    /// Returns the connection, and opens it anew if it is lost.
    pub(super) async fn get(&self) -> Result<Arc<Connection>, DeliveryError> {
        let last = Arc::clone(&self.last());
        if last.status().connected() {
            return Ok(last);
        }
        let opened = self.publishing.open().await;
        let opened = opened.map_err(|error| DeliveryError::NoPublisher(Box::new(error)))?;
        *self.last() = Arc::clone(&opened);
        Ok(opened)
    }

    /// Makes a `request` once more if the connection or the channel is lost before its response.
    pub(super) async fn again_if_lost<F>(
        &self,
        request: impl Fn() -> F,
    ) -> Result<(), DeliveryError>
    where
        F: Future<Output = Result<(), DeliveryError>>,
    {
        match request().await {
            Err(error) if error.is_lost() => {
                self.noticed().await;
                request().await
            }
            responded => responded,
        }
    }

    /// Waits until the connection is known to be lost: lapin tells the requests that wait before.
    async fn noticed(&self) {
        let lost = async {
            while self.last().status().connected() {
                sleep(NOTICED / 100).await;
            }
        };
        // If only the channel is lost, the connection is used again.
        drop(timeout(NOTICED, lost).await);
    }

    fn is_blocked(&self) -> bool {
        let connection = self.last();
        connection.status().connected() && connection.status().blocked()
    }

    /// Waits until the server does not block the connection: a message that is sent meanwhile can't be called
    /// back, so each new attempt would add a copy.
    pub(super) async fn unblocked(&self) {
        while self.is_blocked() {
            sleep(PATIENCE / 20).await;
        }
    }

    /// Gives `publishing` up if the server blocks the connection for too long.
    pub(super) async fn unless_blocked(
        &self,
        publishing: impl Future<Output = Result<(), DeliveryError>>,
    ) -> Result<(), DeliveryError> {
        let mut publishing = pin!(publishing);
        loop {
            match timeout(PATIENCE, &mut publishing).await {
                Ok(published) => return published,
                Err(_) if self.is_blocked() => return Err(DeliveryError::Blocked),
                Err(_) => {}
            }
        }
    }

    fn last(&self) -> MutexGuard<'_, Arc<Connection>> {
        // Nothing panics while it is held.
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
