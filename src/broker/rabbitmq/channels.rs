//! [`Channels`], of which each is used by one request at a time.

use std::sync::{Mutex, MutexGuard, PoisonError};

use lapin::{Channel, Connection, options::ConfirmSelectOptions};
use tokio::sync::{Semaphore, SemaphorePermit};

/// The greatest number of publishes at a time.
///
/// If a queue confirms nothing, the others wait here, and no copy of them can arrive late.
const AT_A_TIME: usize = 16;

/// Channels with publisher confirms, each for one request at a time.
///
/// lapin pairs a returned message with the next confirmation of the channel. So with a second publish in
/// flight, that one could get the error, and the returned one could pass for stored. A channel whose request
/// is dropped half-way is not used again, for the same reason.
#[derive(Debug)]
pub(super) struct Channels {
    idle: Mutex<Vec<Channel>>,
    places: Semaphore,
}

impl Channels {
    pub(super) fn new() -> Self {
        Self {
            idle: Mutex::default(),
            places: Semaphore::new(AT_A_TIME),
        }
    }

    /// Waits for the right to publish.
    pub(super) async fn place(&self) -> SemaphorePermit<'_> {
        // Invariant: nobody closes the semaphore.
        self.places.acquire().await.expect("a place will be free")
    }

    /// Takes a channel, or opens one.
    pub(super) async fn take(&self, connection: &Connection) -> lapin::Result<Channel> {
        while let Some(channel) = self.next() {
            // It is of an earlier connection otherwise, or was closed with an error.
            if channel.status().connected() {
                return Ok(channel);
            }
        }
        open(connection).await
    }

    /// Gives a channel back on which no request waits.
    pub(super) fn put(&self, channel: Channel) {
        self.idle().push(channel);
    }

    fn next(&self) -> Option<Channel> {
        self.idle().pop()
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Channel>> {
        // Nothing panics while it is held.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opens a channel with publisher confirms.
pub(super) async fn open(connection: &Connection) -> lapin::Result<Channel> {
    let channel = connection.create_channel().await?;
    let options = ConfirmSelectOptions::default();
    channel.confirm_select(options).await?;
    Ok(channel)
}
