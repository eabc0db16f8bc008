//! [`Pull::subscribe`], which checks the configuration before anything is delivered.

use std::sync::Arc;

use async_nats::jetstream::{
    Context,
    consumer::{PullConsumer, pull},
};

use super::{
    channel::Channel,
    deliveries::Deliveries,
    error::SubscriptionError,
    pull::Pull,
    repeat::{Asking, LIMIT},
    settings,
};
use crate::outcome::guard;

impl Pull {
    /// Reads the consumer's configuration by `context`, and subscribes.
    ///
    /// # Errors
    ///
    /// If there is no such pull consumer, or if its configuration or that of the streams would lose, strand
    /// or stall jobs: see the variants of [`SubscriptionError`]. While a cluster elects a leader, it asks again
    /// for up to 15 s.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: nothing is requested before the stream is polled.
    pub async fn subscribe(self, context: &Context) -> Result<Deliveries, SubscriptionError> {
        self.subscribe_by(&Asking::new(context)).await
    }

    /// Subscribes within the time of other requests.
    pub(super) async fn subscribe_by(
        self,
        asking: &Asking<'_>,
    ) -> Result<Deliveries, SubscriptionError> {
        let context = asking.context;
        let consumer = asking.ask(|| {
            context.get_consumer_from_stream::<pull::Config, _, _>(&self.consumer, &self.stream)
        });
        let consumer: PullConsumer = consumer.await.map_err(|error| match error {
            Some(error) => SubscriptionError::no_consumer(error),
            None => SubscriptionError::Unreachable { silence: LIMIT },
        })?;
        let info = consumer.cached_info();
        settings::check_consumer(info, &self.priority)?;
        if let Some(subject) = &self.dead_letter {
            settings::check_dead_letter(asking, info, subject).await?;
        }
        if let Some(subject) = &self.suspects {
            settings::check_suspects(asking, info, subject).await?;
        }
        if let Some(prefix) = &self.schedules {
            settings::check_schedules(asking, info, prefix).await?;
        }
        let channel = Channel::new(context.clone(), info, &self);
        let (stream, consumer_name) = (self.stream.clone(), self.consumer.clone());
        let prefetch = self.prefetch;
        let deliveries = Deliveries::open(self, consumer, Arc::new(channel)).await?;
        guard(|| {
            let consumer = consumer_name;
            tracing::info!(
                stream,
                consumer,
                prefetch,
                "subscribed to a consumer of nats"
            );
        });
        Ok(deliveries)
    }
}
