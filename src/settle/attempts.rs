//! [`SettleFuture`]: one settlement with all its tries.

use std::{
    any::type_name,
    convert::Infallible,
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::time::Instant;

use crate::{
    backoff::Delays,
    outcome::{Remains, drop_quietly, guard, print},
    settle::{
        Reach, Settle, Unsettled,
        error::SettleError,
        reason::{Reason, Settled},
    },
    telemetry::{
        GuardedSpan,
        metrics::{Stopwatch, Unfinished},
    },
    time::Timer,
};

/// Limits of a settlement: the time of one try, the time in which tries begin, and the pauses between them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attempts {
    pub(crate) limit: Duration,
    pub(crate) budget: Duration,
    pub(crate) pauses: Delays,
}

// === impl SettleFuture ===

pin_project! {
    /// The future of a [`SettlePolicy`](crate::SettlePolicy): one settlement with all its tries.
    ///
    /// It holds the outcome `O` of the job, and drops it last.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: if it is dropped, the settlement may or may not have reached the broker.
    #[must_use = "a delivery is not settled unless this is polled"]
    pub struct SettleFuture<Tag, F, E, O = Infallible> {
        #[pin]
        state: State<Tag, F, E>,
        // Last, since its destructor may block.
        remains: Remains<O>,
    }
}

impl<Tag, F, E, O> SettleFuture<Tag, F, E, O> {
    #[inline]
    pub(crate) fn new(state: State<Tag, F, E>, remains: Remains<O>) -> Self {
        Self { state, remains }
    }
}

impl<Tag, F, E, O> Future for SettleFuture<Tag, F, E, O>
where
    Tag: Settle<Future = F, Error = E>,
    F: Future<Output = Result<(), Unsettled<Tag, E>>>,
    E: fmt::Display,
{
    type Output = Result<Settled, SettleError<E>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.project().state.poll(cx)
    }
}

impl<Tag, F, E, O> fmt::Debug for SettleFuture<Tag, F, E, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("SettleFuture");
        if let State::Settling { settling, .. } = &self.state {
            debug
                .field("verdict", &settling.settled.verdict)
                .field("tries", &settling.tries);
        }
        debug.finish_non_exhaustive()
    }
}

// === impl State ===

pin_project! {
    /// The future without the outcome of the job, so that it is compiled once for each type of tag.
    #[project = StateProjection]
    pub(crate) enum State<Tag, F, E> {
        // `None` once it is returned.
        Refused { error: Option<SettleError<E>> },
        Settling { span: GuardedSpan, stopwatch: Stopwatch, #[pin] settling: Settling<Tag, F> },
    }
}

impl<Tag, F, E> State<Tag, F, E> {
    pub(crate) fn refused(error: SettleError<E>) -> Self {
        State::Refused { error: Some(error) }
    }

    /// Begins to settle in `span`.
    ///
    /// All parts are built in place: the future is large, and made for every job.
    #[inline]
    pub(crate) fn settling(
        span: GuardedSpan,
        mut stopwatch: Stopwatch,
        (tag, settled, message): (Tag, Settled, Option<String>),
        attempts: Attempts,
    ) -> Self
    where
        Tag: Settle<Future = F>,
    {
        let kept = match attempts.budget.is_zero() {
            true => None,
            false => message.as_deref().map(Box::from),
        };
        let reason = settled.reason(message);
        stopwatch.set_unfinished(Unfinished::Panicked);
        let future = {
            let _entered = span.enter();
            tag.settle(settled.verdict, reason)
        };
        stopwatch.set_unfinished(Unfinished::Dropped);
        State::Settling {
            span,
            stopwatch,
            settling: Settling {
                step: Step::Trying { future },
                timer: None,
                since: None,
                tries: 1,
                attempts,
                settled,
                message: kept,
            },
        }
    }
}

impl<Tag: Settle> State<Tag, Tag::Future, Tag::Error> {
    fn poll(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Settled, SettleError<Tag::Error>>> {
        match self.project() {
            StateProjection::Settling {
                span,
                stopwatch,
                settling,
            } => {
                let _entered = span.enter();
                stopwatch.set_unfinished(Unfinished::Panicked);
                let polled = settling.poll(cx);
                stopwatch.set_unfinished(Unfinished::Dropped);
                let result = ready!(polled);
                let error_type = match &result {
                    Ok(_) => {
                        stopwatch.settled();
                        return Poll::Ready(result);
                    }
                    Err(SettleError::TimedOut { .. }) => "timeout",
                    Err(error) => {
                        if let SettleError::Moot { .. } = error {
                            stopwatch.moot();
                        }
                        type_name::<Tag::Error>()
                    }
                };
                stopwatch.failed(error_type);
                span.record_error(error_type);
                Poll::Ready(result)
            }
            StateProjection::Refused { error } => {
                // Invariant: a future is not polled again once it was ready.
                Poll::Ready(Err(error.take().expect("a refusal is returned once")))
            }
        }
    }
}

// === impl Settling ===

pin_project! {
    pub(crate) struct Settling<Tag, F> {
        #[pin]
        step: Step<Tag, F>,
        // The limit of a try, or a pause. A try that is ready at once has none.
        timer: Option<Timer>,
        // Begin of the budget: when the first try was not ready, or failed.
        since: Option<Instant>,
        // Number of tries begun.
        tries: u32,
        attempts: Attempts,
        // The response on success.
        settled: Settled,
        // Message of the reason, for further tries.
        message: Option<Box<str>>,
    }
}

pin_project! {
    #[project = StepProjection]
    enum Step<Tag, F> {
        Trying { #[pin] future: F },
        // `None` once it is tried again.
        Pausing { tag: Option<Tag> },
    }
}

impl<Tag: Settle> Settling<Tag, Tag::Future> {
    fn poll(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Settled, SettleError<Tag::Error>>> {
        loop {
            let this = self.as_mut().project();
            match this.step.project() {
                StepProjection::Trying { future } => {
                    let Poll::Ready(result) = future.poll(cx) else {
                        let limit = this.attempts.limit;
                        let limit = this.timer.get_or_insert_with(|| {
                            this.since.get_or_insert_with(Instant::now);
                            Timer::after(limit)
                        });
                        return match limit.poll(cx) {
                            Some(Poll::Ready(())) => Poll::Ready(Err(self.time_out())),
                            Some(Poll::Pending) | None => Poll::Pending,
                        };
                    };
                    match result {
                        Ok(()) => return Poll::Ready(Ok(this.settled.take())),
                        Err(unsettled) => self.as_mut().fail(unsettled, cx)?,
                    }
                }
                StepProjection::Pausing { tag } => {
                    // No runtime measures the rest of the pause if that of its timer has ended.
                    if let Some(pause) = this.timer.as_mut().and_then(|pause| pause.poll(cx)) {
                        ready!(pause);
                    }
                    // Invariant: the step is left here.
                    let tag = tag.take().expect("a tag is settled again once");
                    self.as_mut().try_again(tag);
                }
            }
        }
    }

    /// Begins the pause before the next try, or returns the error if there is no next try.
    fn fail(
        self: Pin<&mut Self>,
        unsettled: Unsettled<Tag, Tag::Error>,
        cx: &mut Context<'_>,
    ) -> Result<(), SettleError<Tag::Error>> {
        let mut this = self.project();
        let (verdict, tries) = (this.settled.verdict, *this.tries);
        let reach = unsettled.reach();
        let Unsettled { tag, error, .. } = unsettled;
        let now = Instant::now();
        let spent = now - *this.since.get_or_insert(now);
        let pause = this.attempts.pauses.nth(tries);
        let tag = tag.filter(|_| spent.saturating_add(pause) <= this.attempts.budget);
        let mut timer = tag.is_some().then(|| Timer::after(pause));
        // Without timers there would be no pause at all.
        let is_timed = timer.as_mut().is_some_and(|pause| pause.poll(cx).is_some());
        let tag = tag.filter(|_| is_timed);
        let again = tag.is_some();
        guard(|| {
            let printed = || print("error", &error);
            tracing::warn!(%verdict, tries, again, error = %printed(), "settlement failed");
        });
        if tag.is_none() {
            return Err(match reach {
                Reach::Delivery => SettleError::Moot { verdict, error },
                Reach::Channel => SettleError::Failed {
                    verdict,
                    tries,
                    error,
                },
                Reach::Consumer => SettleError::Misconfigured { verdict, error },
            });
        }
        *this.timer = timer;
        this.step.set(Step::Pausing { tag });
        // Last, since its destructor is foreign code.
        drop_quietly(error);
        Ok(())
    }

    fn try_again(self: Pin<&mut Self>, tag: Tag) {
        let mut this = self.project();
        *this.timer = None;
        *this.tries += 1;
        let message = this.message.as_deref().map(str::to_owned);
        let reason = this.settled.reason(message);
        let future = tag.settle(this.settled.verdict, reason);
        this.step.set(Step::Trying { future });
    }

    fn time_out(&self) -> SettleError<Tag::Error> {
        let Self { tries, .. } = *self;
        let Settled { verdict, .. } = self.settled;
        let limit = self.attempts.limit;
        guard(|| tracing::warn!(%verdict, tries, ?limit, "settlement timed out"));
        SettleError::TimedOut { verdict, limit }
    }
}

impl Settled {
    fn reason(&self, message: Option<String>) -> Reason {
        let Self {
            kind,
            cancelled,
            elapsed,
            ..
        } = *self;
        Reason {
            kind,
            message,
            cancelled,
            elapsed,
        }
    }

    fn take(&mut self) -> Self {
        let tag = self.tag.take();
        Self { tag, ..*self }
    }
}
