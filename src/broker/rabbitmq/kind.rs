//! [`QueueKind`]: the type of a queue.

/// Of which type a queue is: RabbitMQ does not tell a consumer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum QueueKind {
    /// A classic queue, which counts no deliveries.
    Classic,
    /// A quorum queue, which counts failed deliveries in `x-delivery-count`.
    Quorum,
}
