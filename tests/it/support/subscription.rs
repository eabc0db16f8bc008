//! A scripted subscription, with a ledger of its tags' settlements.

use std::{
    collections::VecDeque,
    fmt,
    future::{Ready, ready},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, Waker},
};

use futures_util::Stream;
use tokio::time::Instant;
use tower_sentinel::{
    Job, Verdict,
    consumer::Subscription,
    settle::{Capabilities, Lease, Reason, Settle, Unsettled},
};

use crate::support::{Fate, Refused, raise};

/// The channel of a subscription, as the test sees it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Channel(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    ready: VecDeque<Fate>,
    end: Option<End>,
    is_gone: bool,
    refuses: Option<Refusal>,
    prefetch: Option<usize>,
    taken: u64,
    settled: Vec<(u64, Verdict)>,
    most_unsettled: u64,
    /// Record of each request to stop the deliveries.
    stops: Vec<Stopped>,
    stopping: Stopping,
    closed: u32,
    closed_at: Option<Instant>,
    never_closes: bool,
    /// Number of requests after the channel was closed, or gone.
    stale: u32,
    wakers: Vec<Waker>,
}

/// End of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Ended,
    Failed,
    Panics,
}

/// Reaction of a subscription to a request to stop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Stopping {
    #[default]
    AtOnce,
    Never,
    Panics,
}

/// State at the time of a request to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stopped {
    pub(crate) at: Instant,
    pub(crate) settled: usize,
}

/// Refusal of a tag to be settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    Fails,
    Panics,
    Unsupported,
}

impl Channel {
    pub(crate) fn of(jobs: impl IntoIterator<Item = Fate>) -> Self {
        let channel = Self::default();
        channel.publish(jobs);
        channel
    }

    pub(crate) fn subscribe(&self) -> Deliveries {
        Deliveries {
            channel: self.clone(),
            is_over: false,
        }
    }

    pub(crate) fn publish(&self, jobs: impl IntoIterator<Item = Fate>) {
        self.change(|state| state.ready.extend(jobs));
    }

    /// Ends the stream; jobs that are ready are void.
    pub(crate) fn end(&self, end: End) {
        self.change(|state| state.end = Some(end));
    }

    /// Loses the channel, which the stream reports by its error if it is polled.
    pub(crate) fn lose(&self) {
        self.change(|state| {
            state.is_gone = true;
            state.end = Some(End::Failed);
        });
    }

    /// Loses the channel, which only its tags report.
    pub(crate) fn lose_silently(&self) {
        self.change(|state| state.is_gone = true);
    }

    /// Lets the next settlement fail.
    pub(crate) fn refuse(&self, refusal: Refusal) {
        self.change(|state| state.refuses = Some(refusal));
    }

    /// Sets the prefetch that its subscriptions report; it yields as many jobs as are pulled all the same.
    pub(crate) fn prefetch(&self, prefetch: usize) {
        self.change(|state| state.prefetch = Some(prefetch));
    }

    pub(crate) fn stop_by(&self, stopping: Stopping) {
        self.change(|state| state.stopping = stopping);
    }

    /// Returns the times of the requests to stop, and the jobs that were settled by then.
    pub(crate) fn stops(&self) -> Vec<Stopped> {
        self.lock().stops.clone()
    }

    pub(crate) fn never_close(&self) {
        self.change(|state| state.never_closes = true);
    }

    pub(crate) fn taken(&self) -> u64 {
        self.lock().taken
    }

    pub(crate) fn most_unsettled(&self) -> u64 {
        self.lock().most_unsettled
    }

    /// Returns the settled jobs, by their number.
    pub(crate) fn settled(&self) -> Vec<(u64, Verdict)> {
        let mut settled = self.lock().settled.clone();
        settled.sort_by_key(|(number, _)| *number);
        settled
    }

    pub(crate) fn verdicts(&self) -> Vec<Verdict> {
        self.settled()
            .into_iter()
            .map(|(_, verdict)| verdict)
            .collect()
    }

    /// Returns whether a settlement is still to fail.
    pub(crate) fn refuses(&self) -> bool {
        self.lock().refuses.is_some()
    }

    /// Returns how often the channel was closed.
    pub(crate) fn closed(&self) -> u32 {
        self.lock().closed
    }

    /// Returns when the channel was closed.
    pub(crate) fn closed_at(&self) -> Instant {
        self.lock().closed_at.unwrap()
    }

    pub(crate) fn stale(&self) -> u32 {
        self.lock().stale
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        let wakers = std::mem::take(&mut state.wakers);
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

/// The subscription.
#[derive(Debug)]
pub(crate) struct Deliveries {
    channel: Channel,
    is_over: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Delivery {
    pub(crate) fate: Fate,
    tag: Tag,
}

#[derive(Clone)]
pub(crate) struct Tag {
    number: u64,
    channel: Channel,
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.number)
    }
}

impl Stream for Deliveries {
    type Item = Result<Delivery, Refused>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        assert!(!self.is_over, "polled after its end");
        let channel = self.channel.clone();
        let mut state = channel.lock();
        if let Some(end) = state.end {
            self.is_over = true;
            drop(state);
            return Poll::Ready(match end {
                End::Ended => None,
                End::Failed => Some(Err(Refused)),
                End::Panics => raise("in the stream"),
            });
        }
        let Some(fate) = state.ready.pop_front() else {
            state.wakers.push(cx.waker().clone());
            return Poll::Pending;
        };
        state.taken += 1;
        let unsettled = state.taken - state.settled.len() as u64;
        state.most_unsettled = state.most_unsettled.max(unsettled);
        let tag = Tag {
            number: state.taken,
            channel: channel.clone(),
        };
        Poll::Ready(Some(Ok(Delivery { fate, tag })))
    }
}

impl Subscription for Deliveries {
    type Job = Delivery;
    type Error = Refused;

    fn poll_closed(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        let mut state = self.channel.lock();
        match state.end {
            None => {
                state.wakers.push(cx.waker().clone());
                Poll::Pending
            }
            Some(End::Ended) => Poll::Ready(Ok(())),
            Some(End::Failed) => Poll::Ready(Err(Refused)),
            Some(End::Panics) => {
                drop(state);
                raise("in the stream")
            }
        }
    }

    fn poll_stop(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        let mut state = self.channel.lock();
        let stopped = Stopped {
            at: Instant::now(),
            settled: state.settled.len(),
        };
        let first = state.stops.is_empty();
        let stopping = state.stopping;
        if first || stopping != Stopping::Never {
            state.stops.push(stopped);
        }
        drop(state);
        // A later pull gets the end of the stream.
        self.is_over = true;
        match stopping {
            Stopping::AtOnce => Poll::Ready(()),
            Stopping::Never => Poll::Pending,
            Stopping::Panics => raise("in the stop"),
        }
    }

    fn prefetch(&self) -> Option<usize> {
        self.channel.lock().prefetch
    }

    fn is_gone(&self) -> bool {
        self.channel.lock().is_gone
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        let mut state = self.channel.lock();
        if state.never_closes {
            return Poll::Pending;
        }
        state.closed += 1;
        state.closed_at = Some(Instant::now());
        Poll::Ready(())
    }
}

impl Job for Delivery {
    type Tag = Tag;

    fn tag(&self) -> Tag {
        self.tag.clone()
    }
}

impl Settle for Tag {
    type Error = Refused;
    type Future = Ready<Result<(), Unsettled<Self, Refused>>>;

    fn settle(self, verdict: Verdict, _: Reason) -> Self::Future {
        let mut state = self.channel.lock();
        if state.closed > 0 || state.is_gone {
            state.stale += 1;
            return ready(Err(Unsettled::last(Refused)));
        }
        match state.refuses.take_if(|it| *it != Refusal::Unsupported) {
            Some(Refusal::Panics) => {
                drop(state);
                raise("in a settlement")
            }
            Some(_) => ready(Err(Unsettled::last(Refused))),
            None => {
                state.settled.push((self.number, verdict));
                ready(Ok(()))
            }
        }
    }

    async fn keep_alive(&self) -> Result<Lease, Refused> {
        Ok(Lease::Held)
    }

    fn deliveries(&self) -> Option<u32> {
        // An unknown count makes a `delivery_limit` undecided.
        (self.channel.lock().refuses != Some(Refusal::Unsupported)).then_some(1)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::none().free_release()
    }
}
