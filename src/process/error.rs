//! [`ProcessError`]: the end of a job in a child, other than a value.

use std::{
    error::Error, fmt, os::unix::process::ExitStatusExt, process::ExitStatus, time::Duration,
};

use crate::settle::decision::Crash;

/// Error of a job that ran in a child of a [`ProcessPool`](crate::process::ProcessPool).
///
/// `E` is the error of the handler, and `C` that of the codec for its results.
///
/// A child that can't be started is no error of a job: the pool is [not ready](crate::process::ProcessPool#contract)
/// then.
#[derive(Debug)]
#[non_exhaustive]
pub enum ProcessError<E, C> {
    /// The handler returned an error.
    Failed(E),
    /// The handler panicked. The child caught that, and goes on, unless
    /// [`reuse_after_panic`](crate::process::ProcessPool::reuse_after_panic) says otherwise.
    ///
    /// For the sentinel, which is outside of the child, this is an error:
    /// [`poison_on_panic`](crate::DecisionExt::poison_on_panic) does not see it.
    Panicked {
        /// Message of the panic.
        message: String,
        /// Place of the panic, if the [panic hook](crate::panic_hook) is installed in the child.
        location: Option<String>,
    },
    /// The child ended before its job: by a signal, an abort, a stack overflow, or an exit.
    Crashed {
        /// How it ended; `None` if that is not known. For the signal and a core dump see
        /// [`ExitStatusExt`].
        status: Option<ExitStatus>,
    },
    /// The child used more memory than its [limit](crate::process::ProcessPool::memory), and was killed.
    OutOfMemory {
        /// The limit in bytes.
        limit: u64,
    },
    /// The job used more CPU time than its [limit](crate::process::ProcessPool::cpu_time), and its child was killed.
    OutOfCpuTime {
        /// The limit.
        limit: Duration,
    },
    /// The child sent something that is no result, and was killed.
    Garbled,
    /// The result of the handler can't be decoded.
    Undecodable(C),
}

impl<E, C> ProcessError<E, C> {
    /// Returns whether the job took its process down, or made it unusable.
    ///
    /// Such a job is likely to do so again: see [`on_crash`](crate::DecisionExt::on_crash) and
    /// [`crash_limit`](crate::DecisionExt::crash_limit).
    pub fn is_crash(&self) -> bool {
        matches!(
            self,
            ProcessError::Crashed { .. }
                | ProcessError::OutOfMemory { .. }
                | ProcessError::OutOfCpuTime { .. }
                | ProcessError::Garbled
        )
    }
}

impl<E, C> Crash for ProcessError<E, C> {
    fn is_crash(&self) -> bool {
        self.is_crash()
    }
}

impl<E: fmt::Display, C> fmt::Display for ProcessError<E, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProcessError::Failed(error) => error.fmt(f),
            ProcessError::Panicked { message, location } => {
                write!(f, "the job panicked in its process: {message}")?;
                match location {
                    Some(location) => write!(f, ", at {location}"),
                    None => Ok(()),
                }
            }
            ProcessError::Crashed { status } => {
                f.write_str("the process of the job ended before its result: ")?;
                match status.map(|status| (status.signal(), status.code(), status)) {
                    Some((Some(signal), _, status)) if status.core_dumped() => {
                        write!(f, "signal {signal}, core dumped")
                    }
                    Some((Some(signal), ..)) => write!(f, "signal {signal}"),
                    Some((None, Some(code), _)) => write!(f, "exit code {code}"),
                    _ => f.write_str("its status is not known"),
                }
            }
            ProcessError::OutOfMemory { limit } => {
                write!(f, "the process of the job used more than {limit} bytes")
            }
            ProcessError::OutOfCpuTime { limit } => {
                write!(
                    f,
                    "the job used more than {limit:?} of CPU time in its process"
                )
            }
            ProcessError::Garbled => {
                f.write_str("the process of the job sent something that is no result")
            }
            ProcessError::Undecodable(_) => f.write_str("the result of the job can't be decoded"),
        }
    }
}

impl<E, C> Error for ProcessError<E, C>
where
    E: Error + 'static,
    C: Error + 'static,
{
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            // Its own text is the one above.
            ProcessError::Failed(error) => error.source(),
            ProcessError::Undecodable(error) => Some(error),
            ProcessError::Panicked { .. }
            | ProcessError::Crashed { .. }
            | ProcessError::OutOfMemory { .. }
            | ProcessError::OutOfCpuTime { .. }
            | ProcessError::Garbled => None,
        }
    }
}
