//! [`Envelope`]: a delivery beside its payload, by the same names on every broker.

use std::borrow::Cow;

use crate::{job::Job, settle::Settle};

/// A delivery beside its payload, by the same names on every broker.
///
/// A handler that is generic over it runs on RabbitMQ, NATS and Redis, and in a test over
/// [`memory`](super::memory). It gets the delivery beside the decoded value by
/// [`DecodeLayer::with_job`](crate::DecodeLayer::with_job), and its remaining time by
/// [`time_left`](crate::cancel::time_left).
///
/// | | RabbitMQ | NATS | Redis | memory |
/// | --- | --- | --- | --- | --- |
/// | [`header`](Self::header) | header of the message | header of the message | field of the entry | header of the job |
/// | [`message_id`](Self::message_id) | `message_id` of the properties | `Nats-Msg-Id` | id of the entry | number of the job |
/// | [`routing_key`](Self::routing_key) | routing key of the first publish | subject | stream | queue |
///
/// ```
/// use std::{convert::Infallible, str};
/// use futures_util::StreamExt;
/// use tower::{ServiceBuilder, ServiceExt};
/// use tower_sentinel::{
///     DecodeLayer, SentinelLayer, SettlePolicy, ack_on_success,
///     broker::{Envelope, memory::Broker},
///     decode::Decoded,
/// };
///
/// async fn process(
///     Decoded { job, value }: Decoded<impl Envelope, u32>,
/// ) -> Result<(), Infallible> {
///     assert_eq!((value, job.header("tenant")), (7, Some("acme")));
///     assert_eq!((job.routing_key(), job.deliveries()), ("orders", Some(1)));
///     Ok(())
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let queue = Broker::new().queue("orders").declare();
/// queue.publish_with_headers("7", [("tenant", "acme")]);
///
/// let number = |body: &[u8]| str::from_utf8(body).unwrap_or_default().parse::<u32>();
/// let handler = ServiceBuilder::new()
///     .layer(SentinelLayer::new(SettlePolicy::new(ack_on_success())))
///     .layer(DecodeLayer::new(number).with_job())
///     .service_fn(process);
/// let mut deliveries = queue.subscribe(1).unwrap();
/// let delivery = deliveries.next().await.unwrap().unwrap();
/// assert!(handler.oneshot(delivery).await.is_ok());
/// assert_eq!(queue.counts().acked, 1);
/// # }
/// ```
pub trait Envelope: Job<Tag: Settle> {
    /// Returns the first header called `name`, if its value is text. Case does not matter.
    fn header(&self, name: &str) -> Option<&str>;

    /// Returns the id of the message, if it has one. It stays the same when the job is delivered
    /// again.
    fn message_id(&self) -> Option<Cow<'_, str>>;

    /// Returns the name that the message was published to: a routing key, a subject, a stream or a queue.
    fn routing_key(&self) -> &str;

    /// Returns the number of deliveries of the job, including this one, if the broker reports it.
    fn deliveries(&self) -> Option<u32> {
        self.tag().deliveries()
    }

    /// Returns whether the job was delivered before, if the broker reports it.
    fn redelivered(&self) -> Option<bool> {
        self.tag().redelivered()
    }
}
