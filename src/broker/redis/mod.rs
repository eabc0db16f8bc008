//! Redis Streams: consumer groups on the [`redis`] crate.

mod channel;
mod deliveries;
mod delivery;
mod error;
mod group;
mod reader;
mod reply;
mod scripts;

pub use ::redis;

pub use self::{
    deliveries::Deliveries,
    delivery::{Delivery, DeliveryTag},
    error::{ConnectError, DeliveryError, SubscriptionError},
    group::ConsumerGroup,
};
