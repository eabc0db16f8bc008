//! Jobs in processes of their own.
//!
//! See [`ProcessPool`].

#[cfg(not(unix))]
compile_error!(
    "the feature `process` is for unix: it needs signals, process groups and socket pairs"
);

mod call;
mod error;
mod frame;
mod lease;
mod pool;
mod serve;
mod worker;

#[cfg(feature = "json")]
pub use self::serve::serve_json;
pub use self::{
    error::ProcessError,
    pool::ProcessPool,
    serve::{Request, serve},
};
