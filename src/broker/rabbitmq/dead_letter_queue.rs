//! [`DeadLetterQueue`], to list dead letters, to move them back and to delete them.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use futures_util::future::join_all;
use lapin::{
    Channel,
    message::Delivery,
    options::{BasicAckOptions, BasicGetOptions, BasicNackOptions, QueueDeclareOptions},
    types::{FieldTable, ShortString},
};
use tokio::time::{Instant, sleep};

use super::{
    connection::{Connection, Publishing},
    dead_letter_error::DeadLetterError,
    death,
    delivery_error::DeliveryError,
    delivery_limit::DeliveryLimit,
    headers::Counted,
    kind::QueueKind,
    publish::Target,
    publisher::Publisher,
    republished,
    retry_queues::RetryQueues,
    targets::Targets,
};
use crate::broker::dead_letters::{DeadLetters, Fate, Moved, Pass, Taken};

/// Longest time that a close waits for the queue to have its letters back.
const RETURN_LIMIT: Duration = Duration::from_secs(5);

/// Pause between two looks at the queue.
const RETURN_PAUSE: Duration = Duration::from_millis(5);

/// Dead letters of a queue of RabbitMQ, as [`DeadLetters`].
///
/// It reads those that a worker has written, and those of the server itself: rejected, expired, or over a limit. A
/// letter is moved to the *queue* that it came from, by the default exchange, so that no other queue of its exchange
/// gets a copy.
///
/// A queue can't be browsed. So each run takes the letters with `basic.get`, holds those that stay until its end, and
/// then puts them back; meanwhile nobody else sees them. See [the guide](crate::_guide::dead_letters#rabbitmq) for the
/// limits of that.
///
/// ```no_run
/// use tower_sentinel::broker::{
///     dead_letters::{DeadLetters, Filter, Redrive},
///     rabbitmq::{self, DeadLetterQueue},
/// };
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let connection = rabbitmq::connect("amqp://guest:guest@127.0.0.1:5672/%2f").await?;
/// let dead = DeadLetterQueue::new(&connection, "orders.dead");
/// for letter in dead.list(&Filter::all(), 20).await? {
///     println!("{:?} from {:?}: {:?}", letter.kind, letter.destination, letter.message);
/// }
/// let tally = Redrive::new(Filter::all().kind("timed_out")).rate(50.0).run(&dead).await?;
/// println!("{} moved, {} left", tally.moved, tally.left());
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct DeadLetterQueue {
    consuming: Arc<lapin::Connection>,
    publishing: Publishing,
    name: String,
    delivery_limit: DeliveryLimit,
}

impl DeadLetterQueue {
    /// Creates it for the queue `name`, in which the dead letters lie.
    pub fn new(connection: &Connection, name: impl Into<String>) -> Self {
        Self {
            consuming: connection.consuming(),
            publishing: connection.publisher(),
            name: name.into(),
            delivery_limit: DeliveryLimit::Assumed,
        }
    }

    /// Sets the delivery limit of the queue in which the dead letters lie, its `x-delivery-limit`; `None` if it has none
    /// (`-1`). By default it is taken for the 20 that servers from 4.0 on give to a quorum queue.
    ///
    /// A run that puts letters back [comes nearer to it](crate::_guide::dead_letters#rabbitmq). From half of the limit on
    /// a letter is published anew instead. Without effect on classic queues.
    ///
    /// ```no_run
    /// use tower_sentinel::broker::rabbitmq::{self, DeadLetterQueue};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let connection = rabbitmq::connect("amqp://guest:guest@127.0.0.1:5672/%2f").await?;
    /// let dead = DeadLetterQueue::new(&connection, "orders.dead").delivery_limit(None);
    /// # drop(dead);
    /// # Ok(())
    /// # }
    /// ```
    pub fn delivery_limit(mut self, limit: impl Into<Option<u32>>) -> Self {
        self.delivery_limit = DeliveryLimit::Known(limit.into());
        self
    }
}

impl fmt::Debug for DeadLetterQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeadLetterQueue")
            .field("name", &self.name)
            .field("connected", &self.consuming.status().connected())
            .finish_non_exhaustive()
    }
}

impl DeadLetters for DeadLetterQueue {
    type Pass = DeadLetterPass;

    async fn pass(&self) -> Result<DeadLetterPass, DeadLetterError> {
        let queue = short(&self.name)?;
        let channel = self.consuming.create_channel().await?;
        let waiting = waiting(&channel, &queue).await;
        let total = waiting.map_err(|error| DeadLetterError::of_queue(&self.name, error))?;
        Ok(DeadLetterPass {
            channel,
            publishing: self.publishing.clone(),
            publisher: None,
            queue,
            delivery_limit: self.delivery_limit,
            total,
            left: total,
            held: 0,
        })
    }
}

/// Pass over a [`DeadLetterQueue`], on a channel of its own.
///
/// If it is dropped, the channel is closed, and the letters that it holds go back.
pub struct DeadLetterPass {
    channel: Channel,
    publishing: Publishing,
    /// Opened when it is needed: a list publishes nothing.
    publisher: Option<Publisher>,
    queue: ShortString,
    delivery_limit: DeliveryLimit,
    total: u64,
    /// Letters that may still be taken. Later ones are behind them.
    left: u64,
    /// Letters that were taken, and neither moved nor deleted.
    held: u64,
}

/// Handle to a dead letter that was taken from a queue.
pub struct DeadLetterKey(Delivery);

impl fmt::Debug for DeadLetterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DeadLetterKey")
            .field(&self.0.delivery_tag)
            .finish()
    }
}

impl DeadLetterPass {
    async fn publisher(&mut self) -> Result<&Publisher, DeadLetterError> {
        let publisher = match self.publisher.take() {
            Some(publisher) => publisher,
            None => {
                let opened = self.publishing.open().await;
                let opened = opened.map_err(|error| DeadLetterError::NoPublisher(error.into()))?;
                let publishing = (self.publishing.clone(), opened);
                // It has no retries.
                let retry_queues = RetryQueues::Given(BTreeMap::new());
                let (queue, kind) = (self.queue.clone(), QueueKind::Classic);
                Publisher::open(publishing, queue, kind, Targets::default(), retry_queues).await?
            }
        };
        Ok(self.publisher.insert(publisher))
    }

    async fn ack(&mut self, message: &Delivery) -> Result<(), DeadLetterError> {
        let options = BasicAckOptions::default();
        let acked = self.channel.basic_ack(message.delivery_tag, options);
        acked.await?;
        self.held -= 1;
        Ok(())
    }

    /// Waits until the queue has the letters that it was given back.
    ///
    /// It takes them back a moment later, and a run that begins before that would not see them.
    async fn returned(&self) -> Result<(), DeadLetterError> {
        let end = Instant::now() + RETURN_LIMIT;
        // Somebody else may take them.
        while waiting(&self.channel, &self.queue).await? < self.held && Instant::now() < end {
            sleep(RETURN_PAUSE).await;
        }
        Ok(())
    }

    /// Moves letters, and returns their fates.
    async fn move_all(
        &mut self,
        letters: Vec<Taken<DeadLetterKey>>,
        fates: &mut Vec<Fate>,
    ) -> Result<(), DeadLetterError> {
        let publisher = self.publisher().await?;
        let moving = letters.iter().map(|taken| async {
            let name = taken.letter.destination.as_deref();
            let Some(name) = name.and_then(|name| ShortString::try_new(name).ok()) else {
                return Ok(Fate::Unroutable);
            };
            let message = &taken.key.0;
            let times = taken.letter.redriven.saturating_add(1);
            let properties = republished::for_redrive(message, times, publisher.frame_max())?;
            let target = Target::of_queue(name);
            match publisher.reject(&target, &message.data, properties).await {
                Ok(()) => Ok(Fate::Moved),
                Err(DeliveryError::Unroutable { .. }) => Ok(Fate::Unroutable),
                Err(error) => Err(error),
            }
        });
        let mut result = Ok(());
        let mut staying = Vec::new();
        for (moved, taken) in join_all(moving).await.into_iter().zip(letters) {
            let fate = match moved {
                Ok(Fate::Moved) => match self.ack(&taken.key.0).await {
                    Ok(()) => Fate::Moved,
                    Err(error) => {
                        result = Err(error);
                        Fate::Unconfirmed
                    }
                },
                Ok(fate) => {
                    staying.push(taken);
                    fate
                }
                Err(error) => {
                    result = Err(DeadLetterError::Publish(error));
                    Fate::Unconfirmed
                }
            };
            fates.push(fate);
        }
        result?;
        self.put_back(staying).await
    }
}

impl Pass for DeadLetterPass {
    type Key = DeadLetterKey;
    type Error = DeadLetterError;

    fn total(&self) -> u64 {
        self.total
    }

    async fn next(&mut self, limit: usize) -> Result<Vec<Taken<DeadLetterKey>>, DeadLetterError> {
        let number = usize::try_from(self.left).map_or(limit, |left| left.min(limit));
        let options = BasicGetOptions::default();
        let gets = (0..number).map(|_| self.channel.basic_get(self.queue.clone(), options));
        let mut taken = Vec::with_capacity(number);
        for got in join_all(gets).await {
            // `None` if somebody else took some.
            let Some(message) = got? else {
                self.left = 0;
                continue;
            };
            self.left = self.left.saturating_sub(1);
            self.held += 1;
            taken.push(Taken {
                letter: death::describe(&message.delivery),
                key: DeadLetterKey(message.delivery),
            });
        }
        Ok(taken)
    }

    async fn redrive(&mut self, letters: Vec<Taken<DeadLetterKey>>) -> Moved<DeadLetterError> {
        let number = letters.len();
        let mut fates = Vec::with_capacity(number);
        let moved = self.move_all(letters, &mut fates).await;
        fates.resize(number, Fate::Unconfirmed);
        let error = moved.err();
        Moved { fates, error }
    }

    async fn delete(&mut self, letters: Vec<Taken<DeadLetterKey>>) -> Result<u64, DeadLetterError> {
        for taken in &letters {
            self.ack(&taken.key.0).await?;
        }
        Ok(letters.len() as u64)
    }

    /// Holds letters until the close.
    ///
    /// Before 4.3 a quorum queue counts that as a failed delivery. A letter near the limit would be dropped by it at
    /// last, so it goes to the end of the queue, as a copy.
    async fn put_back(
        &mut self,
        letters: Vec<Taken<DeadLetterKey>>,
    ) -> Result<(), DeadLetterError> {
        for Taken { key, .. } in letters {
            let message = key.0;
            let failed = Counted::read(&message.properties).by_queue.unwrap_or(0);
            if self.delivery_limit.is_near(failed) {
                let target = Target::of_queue(self.queue.clone());
                let properties = republished::for_return(&message);
                let publisher = self.publisher().await?;
                let published = publisher.reject(&target, &message.data, properties);
                published.await.map_err(DeadLetterError::Publish)?;
                self.ack(&message).await?;
            }
        }
        Ok(())
    }

    async fn close(self) -> Result<(), DeadLetterError> {
        // All of the channel.
        let options = BasicNackOptions {
            multiple: true,
            requeue: true,
        };
        self.channel.basic_nack(0, options).await?;
        self.returned().await?;
        self.channel.close(200, "OK".into()).await?;
        Ok(())
    }
}

impl fmt::Debug for DeadLetterPass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeadLetterPass")
            .field("queue", &self.queue)
            .field("total", &self.total)
            .field("left", &self.left)
            .finish_non_exhaustive()
    }
}

/// Returns the number of messages that wait in a queue.
async fn waiting(channel: &Channel, queue: &ShortString) -> lapin::Result<u64> {
    let options = QueueDeclareOptions {
        passive: true,
        ..QueueDeclareOptions::default()
    };
    let declared = channel.queue_declare(queue.clone(), options, FieldTable::default());
    Ok(declared.await?.message_count().into())
}

fn short(name: &str) -> Result<ShortString, DeadLetterError> {
    ShortString::try_new(name).map_err(|_| DeadLetterError::NameTooLong {
        name: name.to_owned(),
    })
}
