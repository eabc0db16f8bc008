//! The sentinel: one outcome for each job, and one call of the policy for each outcome.

mod blocking;
mod cancellation;
mod causality;
mod delivery_limit;
mod drops;
pub(crate) mod foreign_code;
mod gate;
mod late;
mod lease;
mod limited;
mod one_outcome;
mod panic_hook;
mod panics;
mod policy;
mod process_end;
mod readiness;
mod runtimes;
mod starting;
mod stuck;
mod suspects;
mod timeouts;
