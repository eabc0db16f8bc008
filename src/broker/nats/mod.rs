//! NATS JetStream: the messages of a pull consumer as jobs, on the [`async_nats`] crate.
mod channel;
mod connect;
mod dead_letter;
mod deliveries;
mod delivery;
mod error;
mod pull;

pub use ::async_nats;

pub use self::{
    connect::{connect, connect_with},
    deliveries::Deliveries,
    delivery::{Delivery, DeliveryTag, Settlement},
    error::{ConnectError, DeliveryError, SubscriptionError},
    pull::Pull,
};
