//! The embedded broker.

mod deliveries;
