//! The embedded broker.

mod conformance;
mod dead_letter_queue;
