//! How a worker connects to NATS.

use std::fmt;

use tower_sentinel::{
    broker::nats::{Deliveries, Pull},
    consumer::Connect,
};

use super::{DEAD, WORKERS};
use crate::{
    child::setting,
    worker::{PREFETCH, first_then},
};

pub(crate) fn connector(
    addresses: Vec<String>,
) -> impl Connect<Subscription = Deliveries, Error: fmt::Display + Send, Future: Send> + Send {
    let stream = setting("QUEUE").expect("a stream to read");
    let pull = Pull::new(stream, WORKERS)
        .prefetch(PREFETCH)
        .dead_letter(DEAD);
    let first = pull.clone().connector(&addresses[..1]);
    first_then(first, pull.connector(addresses))
}
