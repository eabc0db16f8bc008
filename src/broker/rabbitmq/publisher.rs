//! [`Publisher`] of retries and dead letters.

use std::{
    collections::HashMap,
    fmt,
    future::{Future, poll_fn},
    pin::pin,
    sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError},
    task::Poll,
    time::Duration,
};

use futures_util::{
    FutureExt,
    future::{Shared, maybe_done},
};
use lapin::{
    BasicProperties, Channel, Connection, options::QueueDeclareOptions, types::ShortString,
};
use tokio::{
    runtime::Handle,
    sync::{Mutex, oneshot},
    time::{Instant, sleep_until, timeout},
};

use super::{
    channels::{Channels, open},
    connection::Publishing,
    delivery_error::DeliveryError,
    kind::QueueKind,
    moves::Moves,
    publish::{Target, publish},
    reopened::Reopened,
    retry_queues::{self, RetryQueue, RetryQueues},
    targets::Targets,
};

/// Time that a job waits for its retry queue, before a longer one is used. It covers the wait for a new one.
const DECLARED: Duration = Duration::from_secs(3);

/// Time after which a declaration is begun anew.
const DECLARATION: Duration = Duration::from_secs(60);

/// Time from which a retry queue that is being declared can be used.
type Declaring = Shared<oneshot::Receiver<Result<Instant, DeliveryError>>>;

/// Channels with publisher confirms, on the connection that publishes.
pub(super) struct Publisher {
    connection: Reopened,
    queue: ShortString,
    kind: QueueKind,
    targets: Targets,
    retry_queues: RetryQueues,
    /// Shared by all publishes to queues that are known to exist.
    shared: Mutex<Channel>,
    /// For dead letters and suspects, which no retry waits for.
    rejects: Channels,
    /// For declarations, and for publishes to retry queues that may be gone.
    retries: Channels,
    /// Declarations on their way, by their delays.
    declaring: StdMutex<HashMap<u64, Declaring>>,
    /// Runtime that drives the connection; jobs may run on another one.
    runtime: Handle,
}

impl Publisher {
    /// Creates it for a connection that is open.
    ///
    /// # Panics
    ///
    /// Panics outside of a tokio runtime.
    pub(super) async fn open(
        (publishing, connection): (Publishing, Arc<Connection>),
        queue: ShortString,
        kind: QueueKind,
        targets: Targets,
        retry_queues: RetryQueues,
    ) -> lapin::Result<Self> {
        let channel = open(&connection).await?;
        Ok(Self {
            connection: Reopened::new(publishing, connection),
            queue,
            kind,
            targets,
            retry_queues,
            shared: Mutex::new(channel),
            rejects: Channels::new(),
            retries: Channels::new(),
            declaring: StdMutex::default(),
            runtime: Handle::current(),
        })
    }

    pub(super) fn queue(&self) -> &str {
        self.queue.as_str()
    }

    pub(super) fn kind(&self) -> QueueKind {
        self.kind
    }

    pub(super) fn dead_letter(&self) -> Option<&Target> {
        self.targets.dead_letter.as_ref()
    }

    pub(super) fn suspects(&self) -> Option<&(Target, Moves)> {
        self.targets.suspects.as_ref()
    }

    /// Returns the largest size of a frame on the connection, in bytes.
    pub(super) fn frame_max(&self) -> u32 {
        self.connection.frame_max()
    }

    /// Publishes to the end of the original's queue.
    ///
    /// Not mandatory: if the queue is gone, so is the original.
    pub(super) async fn retry(
        &self,
        payload: &[u8],
        properties: BasicProperties,
    ) -> Result<(), DeliveryError> {
        self.store(self.queue.clone(), payload, properties).await
    }

    /// Publishes a dead letter or a suspect, and a queue has to take it.
    pub(super) async fn reject(
        &self,
        target: &Target,
        payload: &[u8],
        properties: BasicProperties,
    ) -> Result<(), DeliveryError> {
        self.deliver(&self.rejects, target, payload, properties)
            .await
    }

    /// Publishes to the retry queue of `delay`, if the original `is_held` until then.
    ///
    /// If that queue can't be declared in time, it is the next longer one that is known.
    pub(super) async fn delay(
        self: &Arc<Self>,
        delay: Duration,
        payload: &[u8],
        properties: BasicProperties,
        is_held: impl Fn() -> Result<(), DeliveryError>,
    ) -> Result<(), DeliveryError> {
        match self.retry_queues.of(delay)? {
            RetryQueue::Own { millis, name } => {
                let declared = self.declare(millis, name.clone());
                let usable = self.connection.unless_blocked(async {
                    // Its runtime has ended.
                    let written = declared.await.unwrap_or(Err(DeliveryError::NotSent))?;
                    sleep_until(written).await;
                    Ok(())
                });
                let mut usable = pin!(usable);
                match timeout(DECLARED, &mut usable).await {
                    Ok(usable) => usable?,
                    Err(_) => {
                        for (millis, longer) in self.retry_queues.longer(millis) {
                            is_held()?;
                            match self.given(longer, payload, properties.clone()).await {
                                Err(DeliveryError::Unroutable { .. }) => {
                                    self.retry_queues.forget(millis);
                                }
                                published => return published,
                            }
                        }
                        usable.await?;
                    }
                }
                // The wait for a new queue may outlast the channel, and then the job is back already.
                is_held()?;
                // Not mandatory: it was just declared.
                self.store(name, payload, properties).await
            }
            RetryQueue::Given(name) => self.given(name, payload, properties).await,
        }
    }

    /// Publishes to a retry queue that may be gone.
    async fn given(
        &self,
        queue: ShortString,
        payload: &[u8],
        properties: BasicProperties,
    ) -> Result<(), DeliveryError> {
        let target = Target::of_queue(queue);
        self.deliver(&self.retries, &target, payload, properties)
            .await
    }

    /// Declares a retry queue, unless that is on its way. It goes on if nobody waits for it any more.
    fn declare(self: &Arc<Self>, millis: u64, name: ShortString) -> Declaring {
        let mut declaring = lock(&self.declaring);
        if let Some(declared) = declaring.get(&millis) {
            return declared.clone();
        }
        let (done, declared) = oneshot::channel();
        let declared = declared.shared();
        declaring.insert(millis, declared.clone());
        drop(declaring);
        let this = Arc::clone(self);
        self.runtime.spawn(async move {
            let declared = || this.declare_now(name.clone(), millis);
            let declared = this.connection.again_if_lost(declared);
            let declared = timeout(DECLARATION, declared).await;
            lock(&this.declaring).remove(&millis);
            let declared = declared.unwrap_or(Err(DeliveryError::NotYetConfirmed));
            // An error means that no job waits.
            drop(done.send(declared.map(|()| this.retry_queues.written(millis))));
        });
        declared
    }

    async fn declare_now(&self, name: ShortString, millis: u64) -> Result<(), DeliveryError> {
        self.connection.unblocked().await;
        let connection = self.connection.get().await?;
        // A channel of its own: one slow declaration holds up no other.
        let channel = self.retries.take(&connection).await?;
        let arguments = retry_queues::arguments(self.queue(), millis);
        let options = QueueDeclareOptions::durable();
        let declared = channel.queue_declare(name.clone(), options, arguments);
        match declared.await {
            Ok(_) => {
                self.retries.put(channel);
                Ok(())
            }
            Err(error) => Err(self.retry_queues.undeclared(name.as_str(), error)),
        }
    }

    /// Publishes to `target` on one of `channels`, and a queue has to take it.
    async fn deliver(
        &self,
        channels: &Channels,
        target: &Target,
        payload: &[u8],
        properties: BasicProperties,
    ) -> Result<(), DeliveryError> {
        self.republished(|| self.deliver_once(channels, target, payload, properties.clone()))
            .await
    }

    async fn deliver_once(
        &self,
        channels: &Channels,
        target: &Target,
        payload: &[u8],
        properties: BasicProperties,
    ) -> Result<(), DeliveryError> {
        let _place = channels.place().await;
        self.connection.unblocked().await;
        let connection = self.connection.get().await?;
        let channel = channels.take(&connection).await?;
        let published = publish(&channel, target, true, payload, properties).await;
        channels.put(channel);
        published
    }

    /// Publishes to a queue that exists.
    async fn store(
        &self,
        queue: ShortString,
        payload: &[u8],
        properties: BasicProperties,
    ) -> Result<(), DeliveryError> {
        let target = Target::of_queue(queue);
        self.republished(|| self.store_once(&target, payload, properties.clone()))
            .await
    }

    async fn store_once(
        &self,
        target: &Target,
        payload: &[u8],
        properties: BasicProperties,
    ) -> Result<(), DeliveryError> {
        self.connection.unblocked().await;
        let mut shared = self.shared.lock().await;
        if !shared.status().connected() {
            let connection = self.connection.get().await?;
            *shared = open(&connection).await?;
        }
        let channel = shared.clone();
        let published = publish(&channel, target, false, payload, properties);
        let mut published = pin!(maybe_done(published));
        // The first poll hands it over, under the lock: lapin numbers a publish before it queues it, and two
        // at a time could get each other's confirmations.
        let _pending = poll_fn(|cx| Poll::Ready(published.as_mut().poll(cx))).await;
        drop(shared);
        published.as_mut().await;
        // Invariant: it is done, and was not taken.
        published.take_output().expect("a publish is done once")
    }

    /// Publishes, and once more if the connection or the channel is lost before the confirmation.
    ///
    /// The second one may be a copy, as it would be if the job were delivered again.
    async fn republished<F>(&self, publish: impl Fn() -> F) -> Result<(), DeliveryError>
    where
        F: Future<Output = Result<(), DeliveryError>>,
    {
        let published = self.connection.again_if_lost(publish);
        self.connection.unless_blocked(published).await
    }
}

impl fmt::Debug for Publisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publisher")
            .field("queue", &self.queue)
            .field("retry_queues", &self.retry_queues)
            .finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &StdMutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it is held.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
