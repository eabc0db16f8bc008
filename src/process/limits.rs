//! [`Limits`] of a child, which it sets for itself.

use std::{env, fmt, io, time::Duration};

use rustix::{
    process::{Resource, Rlimit, getrlimit, nice, setrlimit},
    time::{ClockId, clock_gettime},
};

/// Variable with the limits of a child.
pub(super) const LIMITS: &str = "TOWER_SENTINEL_PROCESS_LIMITS";

/// Limits that the system holds a child to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Limits {
    /// In bytes.
    pub(super) address_space: Option<u64>,
    /// Of each job.
    pub(super) cpu_time: Option<Duration>,
    pub(super) open_files: Option<u64>,
    pub(super) nice: Option<i32>,
}

impl Limits {
    /// Returns the limits that the pool has written to the environment of this process.
    pub(super) fn from_env() -> io::Result<Self> {
        let text = env::var(LIMITS).unwrap_or_default();
        Self::parse(&text).ok_or_else(|| io::Error::other(format!("unknown limits: {text}")))
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut limits = Self::default();
        for limit in text.split_whitespace() {
            let (name, value) = limit.split_once('=')?;
            match name {
                "address_space" => limits.address_space = Some(value.parse().ok()?),
                "cpu_time" => {
                    limits.cpu_time = Some(Duration::from_millis(value.parse().ok()?));
                }
                "open_files" => limits.open_files = Some(value.parse().ok()?),
                "nice" => limits.nice = Some(value.parse().ok()?),
                _ => return None,
            }
        }
        Some(limits)
    }

    /// Sets them for this process, whose threads begin after that.
    pub(super) fn set(&self) -> io::Result<()> {
        if let Some(increment) = self.nice {
            of("the nice value", nice(increment).map(drop))?;
        }
        if let Some(number) = self.open_files {
            of("the number of open files", fixed(Resource::Nofile, number))?;
        }
        if let Some(bytes) = self.address_space {
            of("the address space", fixed(Resource::As, bytes))?;
        }
        self.begin_job()
    }

    /// Sets those of the next job.
    pub(super) fn begin_job(&self) -> io::Result<()> {
        let Some(limit) = self.cpu_time else {
            return Ok(());
        };
        // The system counts from the start of the process, in whole seconds.
        let used = clock_gettime(ClockId::ProcessCPUTime);
        let used = Duration::try_from(used).unwrap_or_default();
        let until = used.saturating_add(limit);
        let until = until.as_secs() + u64::from(until.subsec_nanos() > 0);
        let limit = Rlimit {
            current: Some(until),
            // It must stay higher, for the next job.
            maximum: getrlimit(Resource::Cpu).maximum,
        };
        of("the CPU time", setrlimit(Resource::Cpu, limit))
    }
}

/// Sets a limit that this process can't raise again.
fn fixed(resource: Resource, limit: u64) -> rustix::io::Result<()> {
    let limit = Rlimit {
        current: Some(limit),
        maximum: Some(limit),
    };
    setrlimit(resource, limit)
}

fn of(what: &str, result: rustix::io::Result<()>) -> io::Result<()> {
    result.map_err(|error| {
        let error = io::Error::from(error);
        io::Error::new(error.kind(), format!("can't limit {what}: {error}"))
    })
}

/// As [`Limits::from_env`] reads them.
impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(bytes) = self.address_space {
            write!(f, "address_space={bytes} ")?;
        }
        if let Some(limit) = self.cpu_time {
            let millis = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
            write!(f, "cpu_time={millis} ")?;
        }
        if let Some(number) = self.open_files {
            write!(f, "open_files={number} ")?;
        }
        if let Some(increment) = self.nice {
            write!(f, "nice={increment} ")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_as_they_were_written() {
        let all = Limits {
            address_space: Some(1 << 40),
            cpu_time: Some(Duration::from_millis(1_500)),
            open_files: Some(64),
            nice: Some(-5),
        };
        let some = Limits {
            address_space: None,
            nice: None,
            ..all
        };
        let longest = Limits {
            cpu_time: Some(Duration::from_millis(u64::MAX)),
            ..all
        };
        for limits in [Limits::default(), some, all, longest] {
            assert_eq!(Limits::parse(&limits.to_string()), Some(limits));
        }
        let endless = Limits {
            cpu_time: Some(Duration::MAX),
            ..all
        };
        assert_eq!(Limits::parse(&endless.to_string()), Some(longest));
        for text in ["nice", "nice=", "nice=x", "open_files=-1", "other=1"] {
            assert_eq!(Limits::parse(text), None, "{text}");
        }
    }
}
