//! Private servers: own port, own data, killed when their test process ends.

pub(crate) mod nats;
pub(crate) mod rabbitmq;
