//! [`Publisher`] of retries and dead letters.

use std::{
    future::Future,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use lapin::{
    BasicProperties, Channel, Confirmation, Connection,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions},
    types::ShortString,
};
use tokio::{
    sync::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{sleep, sleep_until, timeout},
};

use super::{
    delivery_error::DeliveryError,
    kind::QueueKind,
    retry_queues::{self, RetryQueue, RetryQueues},
};

/// Time that a publish waits while the server blocks the connection.
///
/// Together with the wait for a new retry queue it is less than the 5 s of one settlement attempt. So the job
/// is given back, and no other job has to be.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) exchange: ShortString,
    pub(super) routing_key: ShortString,
}

/// A channel with publisher confirms, on the connection that publishes.
#[derive(Debug)]
pub(super) struct Publisher {
    connection: Arc<Connection>,
    queue: ShortString,
    kind: QueueKind,
    dead_letter: Option<Target>,
    retry_queues: RetryQueues,
    /// Taken exclusively by a publish that may be returned. lapin pairs a returned message with the next
    /// confirmation. So with a second one in flight, that one could get the error, and the returned one could
    /// pass for stored.
    channel: RwLock<Channel>,
    /// Set while a publish may be returned, and stays set if its future is dropped: from then on a return
    /// can't be distinguished from that of another publish.
    is_torn: AtomicBool,
    /// Another channel, since a declaration that the server refuses closes it.
    declaring: Mutex<Option<Channel>>,
}

impl Publisher {
    pub(super) async fn open(
        connection: Arc<Connection>,
        queue: ShortString,
        kind: QueueKind,
        dead_letter: Option<Target>,
        retry_queues: RetryQueues,
    ) -> lapin::Result<Self> {
        let channel = open(&connection).await?;
        Ok(Self {
            connection,
            queue,
            kind,
            dead_letter,
            retry_queues,
            channel: RwLock::new(channel),
            is_torn: AtomicBool::new(false),
            declaring: Mutex::default(),
        })
    }

    pub(super) fn queue(&self) -> &str {
        self.queue.as_str()
    }

    pub(super) fn kind(&self) -> QueueKind {
        self.kind
    }

    pub(super) fn dead_letter(&self) -> Option<&Target> {
        self.dead_letter.as_ref()
    }

    /// Returns the largest size of a frame on the connection, in bytes.
    pub(super) fn frame_max(&self) -> u32 {
        self.connection.configuration().frame_max()
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

    /// Publishes to the retry queue of `delay`, if the original `is_held` until then.
    pub(super) async fn delay(
        &self,
        delay: Duration,
        payload: &[u8],
        properties: BasicProperties,
        is_held: impl Fn() -> Result<(), DeliveryError>,
    ) -> Result<(), DeliveryError> {
        match self.retry_queues.of(delay)? {
            RetryQueue::Own { millis, name } => {
                self.unless_blocked(self.declare(&name, millis)).await?;
                sleep_until(self.retry_queues.written(millis)).await;
                // The wait for a new queue may outlast the channel, and then the job is back already.
                is_held()?;
                // Not mandatory: it was just declared.
                self.store(name, payload, properties).await
            }
            RetryQueue::Given(name) => {
                let target = Target {
                    exchange: "".into(),
                    routing_key: name,
                };
                self.deliver(&target, payload, properties).await
            }
        }
    }

    async fn declare(&self, name: &ShortString, millis: u64) -> Result<(), DeliveryError> {
        let channel = {
            self.unblocked().await;
            let mut declaring = self.declaring.lock().await;
            match declaring.take().filter(|open| open.status().connected()) {
                Some(open) => declaring.insert(open).clone(),
                None => declaring
                    .insert(self.connection.create_channel().await?)
                    .clone(),
            }
        };
        let arguments = retry_queues::arguments(self.queue(), millis);
        let options = QueueDeclareOptions::durable();
        let declared = channel.queue_declare(name.clone(), options, arguments);
        match declared.await {
            Ok(_) => Ok(()),
            Err(error) => Err(self.retry_queues.undeclared(name.as_str(), error)),
        }
    }

    /// Publishes to `target`, and a queue has to take it.
    pub(super) async fn deliver(
        &self,
        target: &Target,
        payload: &[u8],
        properties: BasicProperties,
    ) -> Result<(), DeliveryError> {
        self.unless_blocked(async {
            let channel = self.exclusive().await?;
            self.is_torn.store(true, Ordering::Relaxed);
            let published = publish(&channel, target, true, payload, properties).await;
            self.is_torn.store(false, Ordering::Relaxed);
            published
        })
        .await
    }

    /// Publishes to a queue that exists.
    async fn store(
        &self,
        queue: ShortString,
        payload: &[u8],
        properties: BasicProperties,
    ) -> Result<(), DeliveryError> {
        let target = Target {
            exchange: "".into(),
            routing_key: queue,
        };
        self.unless_blocked(async {
            let channel = self.shared().await?;
            publish(&channel, &target, false, payload, properties).await
        })
        .await
    }

    async fn shared(&self) -> Result<RwLockReadGuard<'_, Channel>, DeliveryError> {
        self.unblocked().await;
        let channel = self.channel.read().await;
        if self.is_usable(&channel) {
            return Ok(channel);
        }
        drop(channel);
        Ok(self.exclusive().await?.downgrade())
    }

    async fn exclusive(&self) -> Result<RwLockWriteGuard<'_, Channel>, DeliveryError> {
        self.unblocked().await;
        let mut channel = self.channel.write().await;
        if !self.is_usable(&channel) {
            *channel = open(&self.connection).await?;
            self.is_torn.store(false, Ordering::Relaxed);
        }
        Ok(channel)
    }

    fn is_usable(&self, channel: &Channel) -> bool {
        channel.status().connected() && !self.is_torn.load(Ordering::Relaxed)
    }

    /// Waits until the server does not block the connection: a message that is sent meanwhile can't be called
    /// back, so each new attempt would add a copy.
    async fn unblocked(&self) {
        while self.connection.status().blocked() {
            sleep(PATIENCE / 20).await;
        }
    }

    /// Gives `publishing` up if the server blocks the connection for too long.
    async fn unless_blocked(
        &self,
        publishing: impl Future<Output = Result<(), DeliveryError>>,
    ) -> Result<(), DeliveryError> {
        let mut publishing = pin!(publishing);
        loop {
            match timeout(PATIENCE, &mut publishing).await {
                Ok(published) => return published,
                Err(_) if self.connection.status().blocked() => return Err(DeliveryError::Blocked),
                Err(_) => {}
            }
        }
    }
}

async fn open(connection: &Connection) -> lapin::Result<Channel> {
    let channel = connection.create_channel().await?;
    let options = ConfirmSelectOptions::default();
    channel.confirm_select(options).await?;
    Ok(channel)
}

async fn publish(
    channel: &Channel,
    target: &Target,
    mandatory: bool,
    payload: &[u8],
    properties: BasicProperties,
) -> Result<(), DeliveryError> {
    let options = BasicPublishOptions {
        mandatory,
        ..BasicPublishOptions::default()
    };
    let Target {
        exchange,
        routing_key,
    } = target.clone();
    let confirmed = async {
        let confirm = channel.basic_publish(exchange, routing_key, options, payload, properties);
        confirm.await?.await
    };
    match confirmed.await {
        Ok(Confirmation::Ack(None)) => Ok(()),
        Ok(Confirmation::Ack(Some(_)) | Confirmation::Nack(Some(_))) => {
            Err(DeliveryError::Unroutable {
                exchange: target.exchange.to_string(),
                routing_key: target.routing_key.to_string(),
            })
        }
        Ok(Confirmation::Nack(None) | Confirmation::NotRequested) => {
            Err(DeliveryError::NotConfirmed)
        }
        Err(error) => Err(DeliveryError::of_publish(target.exchange.as_str(), error)),
    }
}
