//! [`QueueKind`]: the type of a queue.

/// Type of a queue, as set by the user: RabbitMQ does not report it to a consumer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum QueueKind {
    /// A classic queue, which counts no deliveries.
    Classic,
    /// A quorum queue, which counts failed deliveries in `x-delivery-count`.
    Quorum,
}
