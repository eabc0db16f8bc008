//! How a worker connects to RabbitMQ.

use std::fmt;

use tower_sentinel::{
    broker::rabbitmq::{Deliveries, Queue},
    consumer::Connect,
};

use super::{DEAD, JOBS};
use crate::worker::{PREFETCH, first_then};

pub(crate) fn connector(
    addresses: Vec<String>,
) -> impl Connect<Subscription = Deliveries, Error: fmt::Display + Send, Future: Send> + Send {
    let queue = Queue::quorum(JOBS)
        .prefetch(PREFETCH)
        .dead_letter(DEAD)
        .delivery_limit(None);
    let first = queue.clone().connector(&addresses[..1]);
    first_then(first, queue.connector(addresses))
}
