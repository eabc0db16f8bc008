//! [`Opening`]: a channel whose subscription is not made yet.

use std::{sync::Arc, time::Duration};

use futures_util::FutureExt;
use lapin::{Channel, Connection};
use tokio::{runtime::Handle, time::timeout};

/// Time that a server whose heartbeats come has to close a channel.
const LIMIT: Duration = Duration::from_secs(5);

/// Guard that closes a channel if it is dropped before [`made`](Self::made).
///
/// lapin holds a channel open while a request for a consumer waits for its response, also if nobody waits for
/// it any more. So a consumer that comes late would hold jobs for ever.
pub(super) struct Opening {
    connection: Arc<Connection>,
    /// `None` once it is made.
    channel: Option<Channel>,
    runtime: Handle,
}

impl Opening {
    /// Opens a channel.
    ///
    /// # Panics
    ///
    /// Panics outside of a tokio runtime.
    pub(super) async fn open(connection: Arc<Connection>) -> lapin::Result<Self> {
        // If this is dropped, lapin closes the channel as soon as it is open.
        let channel = connection.create_channel().await?;
        Ok(Self {
            connection,
            channel: Some(channel),
            runtime: Handle::current(),
        })
    }

    pub(super) fn channel(&self) -> &Channel {
        // Invariant: only `made` takes it, with the guard.
        self.channel.as_ref().expect("the channel is not made yet")
    }

    pub(super) fn made(mut self) -> Channel {
        // Invariant: as above.
        self.channel.take().expect("the channel is not made yet")
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        let Some(channel) = self.channel.take() else {
            return;
        };
        let mut closing = Box::pin(async move { channel.close(200, "OK".into()).await });
        // The first poll hands the close over, behind the requests that wait. It is done also where there is
        // no runtime any more.
        if closing.as_mut().now_or_never().is_none() {
            let connection = Arc::clone(&self.connection);
            self.runtime.spawn(async move {
                // A server that is silent ends the connection first.
                let heartbeat = u64::from(connection.configuration().heartbeat());
                let limit = LIMIT + Duration::from_secs(2 * heartbeat);
                if timeout(limit, closing).await.is_err() {
                    // An error means that it is lost already.
                    drop(timeout(limit, connection.close(200, "OK".into())).await);
                }
            });
        }
    }
}
