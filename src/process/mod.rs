//! Jobs in processes of their own.
//!
//! See [`ProcessPool`].

#[cfg(not(unix))]
compile_error!(
    "the feature `process` is for unix: it needs signals, process groups and socket pairs"
);

mod attendant;
mod call;
mod error;
mod event;
mod forward;
mod frame;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod head;
mod lease;
mod limits;
mod output;
mod pool;
mod request;
mod sender;
mod serve;
mod warm;
mod wire;
mod worker;

#[cfg(feature = "json")]
pub use self::serve::serve_json;
pub use self::{
    error::ProcessError,
    head::{BytesOnly, Crossing, WithHeaders},
    output::Output,
    pool::ProcessPool,
    request::Request,
    serve::serve,
};
