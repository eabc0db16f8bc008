//! Private servers: own port, own data, killed when they are dropped.

pub(crate) mod nats;
