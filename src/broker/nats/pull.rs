//! [`Pull`]: how a pull consumer is read.

use std::{sync::Arc, time::Duration};

use async_nats::{
    Subject,
    jetstream::{
        Context,
        consumer::{AckPolicy, PullConsumer},
    },
};
use tower::limit::ConcurrencyLimitLayer;

use super::{Deliveries, SubscriptionError, channel::Channel};

/// A pull consumer of a stream, and how it is read: the builder of [`Deliveries`].
///
/// It knows both by name and needs no connection before [`subscribe`](Self::subscribe). The
/// consumer must exist by then.
///
/// ```no_run
/// use tower_sentinel::broker::nats::{Pull, async_nats::jetstream, connect};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let pull = Pull::new("jobs", "workers").prefetch(64).dead_letter("dead.jobs");
/// let context = jetstream::new(connect("nats://127.0.0.1:4222").await?);
/// let deliveries = pull.subscribe(&context).await?;
/// assert_eq!(deliveries.prefetch(), 64);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "nothing is delivered before `subscribe`"]
pub struct Pull {
    stream: String,
    consumer: String,
    pub(super) prefetch: usize,
    dead_letter: Option<Subject>,
    confirm_timeout: Duration,
    pub(super) idle_heartbeat: Duration,
    pub(super) reconnect_limit: Duration,
}

impl Pull {
    /// Creates the description of `consumer`, which reads `stream`.
    pub fn new(stream: impl Into<String>, consumer: impl Into<String>) -> Self {
        Self {
            stream: stream.into(),
            consumer: consumer.into(),
            prefetch: 64,
            dead_letter: None,
            confirm_timeout: Duration::from_secs(4),
            idle_heartbeat: Duration::from_secs(5),
            reconnect_limit: Duration::from_secs(30),
        }
    }

    /// Sets how many deliveries may be requested, waiting, or unanswered at once; 64 by default.
    ///
    /// # Panics
    ///
    /// Panics if it is zero.
    #[track_caller]
    pub fn prefetch(mut self, prefetch: usize) -> Self {
        assert!(prefetch > 0, "a prefetch of zero delivers nothing");
        self.prefetch = prefetch;
        self
    }

    /// Returns tower's concurrency limit of the [prefetch](Self::prefetch), for the outside of the
    /// sentinel.
    ///
    /// For [`Consumer::reconnecting`](crate::Consumer::reconnecting), whose service is made before
    /// there is a subscription; it is the [`gate`](Deliveries::gate) of what this subscribes.
    pub fn gate(&self) -> ConcurrencyLimitLayer {
        ConcurrencyLimitLayer::new(self.prefetch)
    }

    /// Sets the subject that rejected messages are published to; none by default.
    ///
    /// A stream must keep it, and must not be the one that the jobs come from. Without a subject a
    /// rejected message is terminated and nothing is kept of it.
    pub fn dead_letter(mut self, subject: impl Into<String>) -> Self {
        self.dead_letter = Some(Subject::from(subject.into()));
        self
    }

    /// Sets how long one try to settle waits for the server's confirmation; 4 s by default.
    ///
    /// Shorter than [`SettlePolicy::try_timeout`](crate::SettlePolicy::try_timeout), which drops the
    /// tag: so a settlement can be tried again.
    pub fn confirm_timeout(mut self, limit: Duration) -> Self {
        self.confirm_timeout = limit;
        self
    }

    /// Sets how often the server is to say that a request still waits; 5 s by default.
    ///
    /// After twice this time without a word, what was requested is taken to be lost and requested
    /// anew. It is also how soon a deleted consumer is noticed while nothing is requested.
    ///
    /// # Panics
    ///
    /// Panics below 100 ms.
    #[track_caller]
    pub fn idle_heartbeat(mut self, interval: Duration) -> Self {
        let least = Duration::from_millis(100);
        assert!(interval >= least, "a heartbeat is at least 100 ms apart");
        self.idle_heartbeat = interval;
        self
    }

    /// Sets how long JetStream may be silent before the subscription ends; 30 s by default.
    ///
    /// Until then a lost connection is bridged. No less than three times the
    /// [`idle_heartbeat`](Self::idle_heartbeat) takes effect, as silence is not known before.
    pub fn reconnect_limit(mut self, limit: Duration) -> Self {
        self.reconnect_limit = limit;
        self
    }

    /// Reads the consumer's configuration by `context`, and subscribes.
    ///
    /// # Errors
    ///
    /// If the consumer does not exist, or does not want each message to be answered, or if no
    /// stream keeps the dead letters.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: nothing is requested before the stream is polled.
    pub async fn subscribe(self, context: &Context) -> Result<Deliveries, SubscriptionError> {
        let consumer = context.get_consumer_from_stream(&self.consumer, &self.stream);
        let consumer: PullConsumer = consumer.await.map_err(SubscriptionError::no_consumer)?;
        let info = consumer.cached_info();
        if !matches!(info.config.ack_policy, AckPolicy::Explicit) {
            return Err(SubscriptionError::NotExplicit);
        }
        if let Some(subject) = &self.dead_letter {
            let stream = context.stream_by_subject(subject.as_str()).await;
            stream.map_err(|error| SubscriptionError::NoDeadLetterStream {
                subject: subject.to_string(),
                error: error.into(),
            })?;
        }
        let channel = Channel::new(
            context.clone(),
            info,
            self.dead_letter.clone(),
            self.confirm_timeout,
        );
        Deliveries::open(self, consumer, Arc::new(channel)).await
    }
}
