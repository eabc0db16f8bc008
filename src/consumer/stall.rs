//! [`Stall`], a finding of the watchdog.

use std::{fmt, time::Duration};

use super::probe::Probe;

/// Finding of a [watchdog](crate::Consumer::watchdog): the consumer looks healthy, and makes no progress.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stall {
    /// What is wrong.
    pub kind: StallKind,
    /// The last probe, empty for [`StallKind::Silent`].
    pub probe: Probe,
    /// Number of jobs of the session that run.
    pub running: usize,
    /// Number of jobs that may be taken beside them, if there is a limit.
    pub free: Option<usize>,
    /// Time since a job was last taken; `None` if none was.
    pub last_delivery: Option<Duration>,
    /// Time for which it was watched, at least.
    pub patience: Duration,
}

/// Kind of a [`Stall`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StallKind {
    /// The broker does not respond: the connection is half-open, or the broker hangs.
    Silent,
    /// Jobs wait at the broker and places are free, and nothing is delivered.
    Undelivered,
    /// The broker counts more unsettled jobs than run, and delivers nothing: a settlement was lost on its way.
    Unsettled,
    /// Jobs wait at the broker, none runs, and the service does not become ready.
    Unready,
    /// Jobs wait at the broker and places are free, and the broker has a [reason](Probe::hindrance) to deliver none of
    /// them. A new session would not help, so there is an event and a count, and the session goes on.
    Hindered,
}

impl StallKind {
    /// Returns the name of the kind, as in the metrics and events.
    pub fn as_str(self) -> &'static str {
        match self {
            StallKind::Silent => "silent",
            StallKind::Undelivered => "undelivered",
            StallKind::Unsettled => "unsettled",
            StallKind::Unready => "unready",
            StallKind::Hindered => "hindered",
        }
    }
}

impl fmt::Display for StallKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Stall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            probe,
            running,
            patience,
            ..
        } = self;
        match self.kind {
            StallKind::Silent => {
                return write!(f, "the broker has not responded for {patience:?}");
            }
            StallKind::Undelivered | StallKind::Hindered => {
                write!(f, "nothing was delivered for {patience:?}")
            }
            StallKind::Unsettled => write!(
                f,
                "the broker has counted more unsettled jobs than run for {patience:?}"
            ),
            StallKind::Unready => write!(f, "the service has not been ready for {patience:?}"),
        }?;
        write!(f, " ({probe}; {running} running)")
    }
}
