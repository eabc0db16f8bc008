//! [`Reader`], a task that reads a stream on its own connection.

use std::{future::pending, mem, pin::pin, sync::Arc, time::Duration};

use ::redis::{RedisError, Value, aio::MultiplexedConnection, cmd};
use futures_util::future::{Either, select};
use tokio::{
    sync::{
        mpsc::{UnboundedSender, error::SendError},
        oneshot,
    },
    time::{Instant, sleep, timeout},
};

use super::{
    SubscriptionError,
    channel::Channel,
    delivery::{Delivery, DeliveryTag},
    reply::{DeliveryId, Entry, Past},
    standing::Standing,
};
use crate::{
    job::Job,
    outcome::guard,
    settle::{Reason, Settle, Unsettled, Verdict},
};

/// Interval between two pings of an idle connection. They check that it lives, and keep a server from closing
/// it: its `timeout` is in whole seconds, and only a longer silence exceeds it.
const PING: Duration = Duration::from_secs(1);

/// Time for which a server may be unable to serve the stream. A slot that is moved is not served for milliseconds, and a
/// server that is not in a failover is better than none.
const BUSY: Duration = Duration::from_secs(5);

/// Longest pause before a server that is busy is asked again. A close waits for its end.
const PAUSE: Duration = Duration::from_millis(100);

pub(super) struct Reader {
    pub(super) connection: MultiplexedConnection,
    pub(super) channel: Arc<Channel>,
    incoming: UnboundedSender<Delivery>,
    /// Closes the subscription, and brings the ids of deliveries that nobody has seen.
    close: oneshot::Receiver<Vec<String>>,
    pub(super) timing: Timing,
    payload_field: String,
    /// Time of the next read of parked entries.
    next_due: Instant,
    /// `true` if parked entries took all places: new ones come first then.
    due_took_all: bool,
    /// The same for entries that a read claimed.
    claims_took_all: bool,
    /// Time of the next search for entries that nobody settles.
    next_reclaim: Instant,
    pub(super) cursor: String,
    /// Ids of entries that were read when the subscription was already closed or stopped.
    pub(super) unseen: Vec<String>,
    /// Those of them that are not yet given back.
    unread: Vec<Delivery>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    pub(super) poll_interval: Duration,
    pub(super) min_idle: Duration,
}

impl Timing {
    /// Returns the interval; an entry is reclaimed after one and a half of `min_idle` at the latest.
    fn reclaim_interval(self) -> Duration {
        (self.min_idle / 2).clamp(Duration::from_millis(1), Duration::from_secs(30))
    }
}

/// End of the wait for a free place.
enum Wait {
    Free(usize),
    Closed(Vec<String>),
}

impl Reader {
    pub(super) fn new(
        connection: MultiplexedConnection,
        channel: Arc<Channel>,
        incoming: UnboundedSender<Delivery>,
        close: oneshot::Receiver<Vec<String>>,
        timing: Timing,
        payload_field: String,
    ) -> Self {
        let now = Instant::now();
        Self {
            connection,
            channel,
            incoming,
            close,
            timing,
            payload_field,
            next_due: now,
            due_took_all: false,
            claims_took_all: false,
            next_reclaim: now,
            cursor: "0-0".to_owned(),
            unseen: Vec::new(),
            unread: Vec::new(),
        }
    }

    /// Reads until the subscription is closed or lost.
    pub(super) async fn run(mut self) -> Result<(), SubscriptionError> {
        let channel = Arc::clone(&self.channel);
        let read = {
            let (reading, watching) = (pin!(self.read()), pin!(watch(&channel)));
            let read = select(reading, watching).await;
            read.factor_first().0
        };
        let unseen = match read {
            Ok(unseen) => unseen,
            Err(error) => {
                self.channel.link.lost.cancel();
                // After a close nobody needs the reason for the end.
                return match self.close.try_recv() {
                    Ok(_) => Ok(()),
                    Err(_) => Err(error),
                };
            }
        };
        self.unseen.extend(unseen);
        if let Err(error) = self.give_back().await {
            guard(|| {
                tracing::warn!(
                    error = &error as &(dyn std::error::Error + 'static),
                    stream = self.channel.link.keys.stream,
                    consumer = self.channel.link.consumer,
                    "unsettled entries not given back: they will be reclaimed"
                );
            });
        }
        Ok(())
    }

    /// Reads until the subscription is closed; returns the ids of entries that nobody has seen.
    async fn read(&mut self) -> Result<Vec<String>, SubscriptionError> {
        // Time of the first read that a busy server refused.
        let mut busy = None;
        loop {
            let free = match self.wait().await? {
                Wait::Closed(unseen) => return Ok(unseen),
                Wait::Free(free) => free,
            };
            match self.fetch(free).await {
                Ok(()) => busy = None,
                Err(error) if Standing::of(&error) == Some(Standing::Busy) => {
                    if busy.get_or_insert_with(Instant::now).elapsed() >= BUSY {
                        return Err(SubscriptionError::of(error));
                    }
                    sleep(PAUSE.min(self.timing.poll_interval)).await;
                }
                Err(error) => return Err(SubscriptionError::of(error)),
            }
            // If it was stopped meanwhile. After a close all entries go back at once.
            release(mem::take(&mut self.unread)).await;
        }
    }

    /// Waits for a free place; a subscription that was stopped has none.
    async fn wait(&mut self) -> Result<Wait, SubscriptionError> {
        loop {
            let (incoming, free) = (&self.incoming, &self.channel.link.free);
            let free = pin!(async move {
                let permit = free.acquire().await;
                match incoming.is_closed() {
                    true => pending().await,
                    false => permit,
                }
            });
            let lost = pin!(self.channel.link.lost.cancelled());
            let over = select(&mut self.close, lost);
            match timeout(PING, select(over, free)).await {
                Ok(Either::Left((Either::Left((unseen, _)), _))) => {
                    return Ok(Wait::Closed(unseen.unwrap_or_default()));
                }
                Ok(Either::Left((Either::Right(_), _))) => {
                    return Err(self.channel.link.loss());
                }
                Ok(Either::Right((permit, _))) => {
                    drop(permit);
                    return Ok(Wait::Free(self.channel.link.free.available_permits()));
                }
                Err(_) => {
                    let ping: Result<Value, _> =
                        cmd("PING").query_async(&mut self.connection).await;
                    ping.map_err(SubscriptionError::of)?;
                }
            }
        }
    }

    /// Reads at most `free` entries: parked ones that are due, ones that nobody settles, new ones.
    async fn fetch(&mut self, mut free: usize) -> Result<(), RedisError> {
        let new_first = mem::take(&mut self.due_took_all);
        let now = Instant::now();
        if now >= self.next_due && !new_first {
            let due = self.take_due(free).await?;
            self.due_took_all = due.len() >= free;
            if !self.due_took_all {
                self.next_due = now + self.timing.poll_interval;
            }
            free = free.saturating_sub(due.len());
            self.deliver(due, now);
        }
        let now = Instant::now();
        if free > 0 && now >= self.next_reclaim {
            let idle = self.reclaim(free).await?;
            if self.cursor == "0-0" {
                self.next_reclaim = now + self.timing.reclaim_interval();
            }
            free = free.saturating_sub(idle.len());
            self.deliver(idle, now);
        }
        if free > 0 {
            // New ones in thirds: jobs that come all at once are settled all at once, and then the next come
            // all at once, while client and server wait for each other.
            let limit = free.div_ceil(3);
            let now = Instant::now();
            let until = self.next_due.min(self.next_reclaim);
            let mut block = until.saturating_duration_since(now);
            let mut claims = self.channel.link.newer.claim;
            if mem::take(&mut self.claims_took_all) {
                claims = false;
                block = Duration::ZERO;
            }
            let new = self.read_new(limit, block, claims).await?;
            self.claims_took_all =
                new.len() >= limit && new.iter().all(|entry| entry.past != Past::New);
            self.deliver(new, now);
        }
        Ok(())
    }

    fn deliver(&mut self, entries: Vec<Entry>, asked_at: Instant) {
        for Entry {
            id,
            count,
            past,
            fields,
        } in entries
        {
            // Taken for good; the settlement adds it again. Only this task takes permits, and there were as
            // many as the entries that it requested.
            if let Ok(permit) = self.channel.link.free.try_acquire() {
                permit.forget();
            }
            let id = DeliveryId {
                entry: id,
                count,
                asked_at,
            };
            let tag = DeliveryTag::new(id, past, fields, Arc::clone(&self.channel));
            let delivery = Delivery::new(tag, &self.payload_field);
            if let Err(SendError(unread)) = self.incoming.send(delivery) {
                self.unseen.push(unread.id().to_owned());
                self.unread.push(unread);
            }
        }
    }
}

/// Pings the connection for settlements, on which nothing else is sent while jobs run; ends when a connection
/// of the subscription is lost.
async fn watch<T>(channel: &Channel) -> Result<T, SubscriptionError> {
    while timeout(PING, channel.link.lost.cancelled()).await.is_err() {
        // An error of the connection cancels `lost`, and any other shows that it lives.
        drop(channel.link.query::<Value>(&cmd("PING")).await);
    }
    Err(channel.link.loss())
}

/// Gives back deliveries that nobody took, without a charge.
pub(super) async fn release(unread: Vec<Delivery>) {
    for delivery in unread {
        let reason = Reason::completed(Duration::ZERO);
        let released = delivery.tag().settle(Verdict::release(), reason).await;
        if let Err(Unsettled { error, .. }) = released {
            // The close gives them back.
            guard(|| {
                tracing::debug!(
                    error = format_args!("{error:#}"),
                    id = delivery.id(),
                    "deliveries not given back yet: the close gives them back"
                );
            });
        }
    }
}
