//! The embedded broker.

mod conformance;
