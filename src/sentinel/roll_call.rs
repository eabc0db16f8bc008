//! [`RollCall`], by which a consumer learns which jobs its service runs.
//!
//! A consumer knows its service only by the `Service` trait, with middleware around the sentinel. So it polls its calls,
//! and the response futures of a sentinel that are polled meanwhile add their jobs. A job costs nothing for it.

use std::{
    cell::{Cell, RefCell},
    fmt, mem,
    time::Duration,
};

use tokio::{task, time::Instant};

use crate::outcome::print;

thread_local! {
    static IS_ON: Cell<bool> = const { Cell::new(false) };
    static CALLED: RefCell<RollCall> = const { RefCell::new(RollCall::new()) };
}

/// Job that runs under a sentinel, as [`Watch::jobs`](crate::consumer::Watch::jobs) lists it and
/// [`SentinelLayer::on_stuck`](crate::SentinelLayer::on_stuck) gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RunningJob {
    /// Id of the job's task, as in tokio's own tools.
    pub id: task::Id,
    /// Tag of the job, as `Debug` prints it.
    pub tag: Box<str>,
    /// Id of the message, if the sentinel has a [`process_span`](crate::SentinelLayer::process_span) and the message has
    /// an id.
    pub message_id: Option<Box<str>>,
    /// Name of the job's span; `None` if the span is disabled.
    pub span: Option<&'static str>,
    /// Time of the call.
    pub since: Instant,
    /// Time that the job has until its limit; `None` without a limit.
    pub time_left: Option<Duration>,
    /// Whether the job was told to stop.
    pub is_told_to_stop: bool,
    /// Whether a closure of [`spawn_blocking`](crate::spawn_blocking) runs for the job.
    pub is_blocking: bool,
}

/// Jobs that have answered, and those that are to stop.
#[derive(Debug, Default)]
pub(crate) struct RollCall {
    pub(crate) stops: Vec<task::Id>,
    pub(crate) jobs: Vec<RunningJob>,
}

impl RollCall {
    const fn new() -> Self {
        Self {
            stops: Vec::new(),
            jobs: Vec::new(),
        }
    }

    /// Runs `poll`, which catches its panics, and adds the jobs that it polls.
    pub(crate) fn during<R>(&mut self, poll: impl FnOnce() -> R) -> R {
        CALLED.set(mem::take(self));
        IS_ON.set(true);
        let polled = poll();
        IS_ON.set(false);
        *self = CALLED.take();
        polled
    }
}

/// Returns whether a consumer on this thread asks for its jobs.
#[inline]
pub(super) fn is_on() -> bool {
    IS_ON.get()
}

/// Returns whether the job with this id has answered already.
pub(super) fn has_answered(id: task::Id) -> bool {
    CALLED.with_borrow(|call| call.jobs.iter().any(|it| it.id == id))
}

/// Adds a job, and returns whether it is to stop.
pub(super) fn answer(mut job: RunningJob) -> bool {
    CALLED.with_borrow_mut(|call| {
        let stops = call.stops.contains(&job.id);
        job.is_told_to_stop |= stops;
        call.jobs.push(job);
        stops
    })
}

/// Returns the `Debug` of a tag, even if it panics.
pub(super) fn printed(tag: &dyn fmt::Debug) -> Box<str> {
    print("tag", &format_args!("{tag:?}")).into()
}
