//! The event of a job that has not completed.
//!
//! There is one event: from the policy if that knows more, otherwise from the sentinel.

use std::{any::type_name, fmt, time::Duration};

use tracing::{Level, field};

use crate::{
    outcome::{CancelReason, Cancelled, Outcome, OutcomeKind, Panic, TimedOut, guard},
    settle::{Settle, verdict::Verdict},
    telemetry::{GuardedSpan, messaging::Messaging},
};

/// A policy's knowledge of a job, besides its outcome.
#[derive(Default)]
pub(crate) struct Decided<'a> {
    /// The text of its error, or the reason why it was not run.
    message: Option<&'a str>,
    deliveries: Option<u32>,
    messaging: Option<Messaging<'a>>,
    /// Only for a job without `messaging`.
    tag: Option<&'a dyn fmt::Debug>,
}

impl<'a> Decided<'a> {
    pub(crate) fn new<Tag: Settle + fmt::Debug>(tag: &'a Tag, message: Option<&'a str>) -> Self {
        let messaging = tag.messaging();
        Self {
            message,
            deliveries: tag.deliveries(),
            tag: messaging.is_none().then_some(tag as _),
            messaging,
        }
    }
}

/// Fate of a job that has not completed, as far as it is known.
#[derive(Clone, Copy)]
pub(crate) enum Fate {
    /// The policy does not report it.
    Unknown,
    /// There is no verdict, or none that the broker can carry out.
    Unsettled,
    Verdict {
        verdict: Verdict,
        has_dead_letter: bool,
    },
}

impl Fate {
    fn verdict(self) -> Option<Verdict> {
        match self {
            Fate::Verdict { verdict, .. } => Some(verdict),
            Fate::Unknown | Fate::Unsettled => None,
        }
    }
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fate::Unsettled => ", and is not settled",
            Fate::Verdict {
                verdict: Verdict::Reject,
                has_dead_letter: false,
            } => ", and is dropped: no dead-letter queue is set",
            Fate::Unknown | Fate::Verdict { .. } => "",
        })
    }
}

/// An outcome without the types of its job, so that its event is compiled once, and not for each job.
#[derive(Clone, Copy)]
pub(crate) enum End<'a> {
    Completed,
    /// With the type of the error.
    Failed(&'static str),
    Panicked(&'a Panic),
    TimedOut(&'a TimedOut),
    Cancelled(&'a Cancelled),
}

impl<'a> End<'a> {
    pub(crate) fn of<T, E>(outcome: &'a Outcome<T, E>) -> Self {
        match outcome {
            Outcome::Completed(_) => End::Completed,
            Outcome::Failed(_) => End::Failed(type_name::<E>()),
            Outcome::Panicked(panic) => End::Panicked(panic),
            Outcome::TimedOut(timed_out) => End::TimedOut(timed_out),
            Outcome::Cancelled(cancelled) => End::Cancelled(cancelled),
        }
    }

    pub(crate) fn kind(self) -> OutcomeKind {
        match self {
            End::Completed => OutcomeKind::Completed,
            End::Failed(_) => OutcomeKind::Failed,
            End::Panicked(_) => OutcomeKind::Panicked,
            End::TimedOut(_) => OutcomeKind::TimedOut,
            End::Cancelled(_) => OutcomeKind::Cancelled,
        }
    }

    /// Returns the message of the panic, or the reason of the stop.
    pub(super) fn message(self) -> Option<String> {
        match self {
            End::Completed | End::Failed(_) => None,
            End::Panicked(panic) => Some(panic.message().to_owned()),
            End::TimedOut(timed_out) => Some(timed_out.to_string()),
            End::Cancelled(cancelled) => Some(cancelled.to_string()),
        }
    }

    pub(super) fn cancel_reason(self) -> Option<CancelReason> {
        match self {
            End::Cancelled(cancelled) => Some(cancelled.reason()),
            _ => None,
        }
    }

    /// Returns whether the job had stopped running; see [`Outcome::is_stopped`].
    pub(crate) fn is_stopped(self) -> bool {
        self.stopped() != Some(false)
    }

    fn stopped(self) -> Option<bool> {
        match self {
            End::TimedOut(timed_out) => Some(timed_out.stopped()),
            End::Cancelled(cancelled) => Some(cancelled.stopped()),
            End::Completed | End::Failed(_) | End::Panicked(_) => None,
        }
    }
}

/// Marks `span`, which is current, with the outcome, and emits its event unless the policy does
/// (`is_told`).
#[inline]
pub(crate) fn conclude(span: &GuardedSpan, end: End<'_>, is_told: bool) {
    if let End::Completed = end {
        return;
    }
    mark(span, end);
    if !is_told {
        tell(end, Fate::Unknown, &Decided::default);
    }
}

/// Warns of a job that returned `late` after its limit, although it was told to stop.
pub(crate) fn tell_late(kind: OutcomeKind, late: Duration) {
    guard(|| {
        tracing::warn!(
            ?late,
            "the job {kind} {late:?} after its limit: does it block its thread?"
        );
    });
}

/// Emits the event of an outcome that is not `Completed`, in the current span.
///
/// Calls `decided` only if a subscriber listens.
pub(crate) fn tell<'a>(end: End<'_>, fate: Fate, decided: &dyn Fn() -> Decided<'a>) {
    macro_rules! tell {
        ($level:expr) => {
            if tracing::enabled!($level) {
                tell!($level, decided());
            }
        };
        ($level:expr, $decided:expr) => {{
            let Decided {
                message,
                deliveries,
                messaging,
                tag,
            } = $decided;
            let messaging = messaging.as_ref();
            let panic = panic_of(end);
            let location = panic.and_then(|panic| panic.location());
            tracing::event!(
                $level,
                error.type = error_type_of(end),
                error.message = message,
                verdict = fate.verdict().map(field::display),
                deliveries,
                messaging.destination.name = messaging.map(|it| &*it.destination),
                messaging.message.id = messaging.and_then(|it| it.message_id.as_deref()),
                messaging.rabbitmq.message.delivery_tag = messaging.and_then(|it| it.delivery_tag),
                tag = tag.map(field::debug),
                limit = limit_of(end).map(field::debug),
                reason = end.cancel_reason().map(CancelReason::as_str),
                started = has_not_started(end).then_some(false),
                stopped = end.stopped(),
                exception.message = panic.map(|panic| panic.message()),
                exception.stacktrace = panic.and_then(|it| it.backtrace()).map(field::display),
                code.file.path = location.map(|it| it.file()),
                code.line.number = location.map(|it| it.line()),
                "{}{fate}",
                what(end)
            );
        }};
    }

    guard(|| match level(end, fate) {
        Level::ERROR => tell!(Level::ERROR),
        Level::WARN => tell!(Level::WARN),
        _ => tell!(Level::INFO),
    });
}

fn level(end: End<'_>, fate: Fate) -> Level {
    match (end, end.cancel_reason()) {
        // It is rejected, and will be run.
        (_, Some(CancelReason::Suspect)) => Level::WARN,
        _ if fate.verdict() == Some(Verdict::Reject) => Level::ERROR,
        (End::Panicked(_), _) => Level::ERROR,
        // Not a failure of the job.
        (_, Some(CancelReason::Shutdown | CancelReason::CallerDropped)) => Level::INFO,
        _ => Level::WARN,
    }
}

fn what(end: End<'_>) -> &'static str {
    match end {
        End::Completed => "the job completed",
        End::Failed(_) => "the job failed",
        End::Panicked(_) => "the job panicked",
        End::TimedOut(_) => "the job passed its time limit",
        End::Cancelled(cancelled) => match cancelled.reason() {
            CancelReason::DeliveryLimit | CancelReason::Suspect => "the job was not run",
            _ => "the job was cancelled",
        },
    }
}

fn panic_of(end: End<'_>) -> Option<&Panic> {
    match end {
        End::Completed | End::Failed(_) => None,
        End::Panicked(panic) => Some(panic),
        End::TimedOut(timed_out) => timed_out.panic(),
        End::Cancelled(cancelled) => cancelled.panic(),
    }
}

fn error_type_of(end: End<'_>) -> Option<&'static str> {
    match end {
        End::Failed(error_type) => Some(error_type),
        _ => None,
    }
}

fn has_not_started(end: End<'_>) -> bool {
    match end {
        End::TimedOut(timed_out) => !timed_out.started(),
        End::Cancelled(cancelled) => !cancelled.started(),
        End::Completed | End::Failed(_) | End::Panicked(_) => false,
    }
}

fn limit_of(end: End<'_>) -> Option<Duration> {
    match end {
        End::TimedOut(timed_out) => Some(timed_out.limit()),
        _ => None,
    }
}

/// Records in `span` why the job has not completed.
fn mark(span: &GuardedSpan, end: End<'_>) {
    match end {
        End::Completed => {}
        End::Failed(error_type) => span.record_error(error_type),
        End::Panicked(_) => span.record_error("panic"),
        End::TimedOut(_) => span.record_error("timeout"),
        End::Cancelled(cancelled) => match cancelled.reason() {
            // A shutdown is not a failure of the job.
            CancelReason::Shutdown => {}
            reason => span.record(|span| {
                span.record("error.type", reason.as_str());
            }),
        },
    }
}
