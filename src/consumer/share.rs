//! [`Share`] of one subscription, for one of several tasks.

use std::{
    mem,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Wake, Waker},
};

use futures_util::{stream::Stream, task::AtomicWaker};

use crate::consumer::{probe::Probing, subscription::Subscription};

/// Subscription as seen by one of several tasks that take their jobs from it.
///
/// Each job goes to the task that asks. The end is returned to one of them, the first that asks, like to the
/// only reader of a stream. For the others nothing more comes, nor after one of them has begun to stop the
/// subscription. The channel is closed when the last task gives it up, since the tags of all tasks belong to
/// this channel.
pub(super) struct Share<B: ?Sized> {
    common: Arc<Common<B>>,
    task: usize,
    given_up: bool,
}

struct Common<B: ?Sized> {
    held: Mutex<Held<B>>,
    /// Wakes all tasks, since it is not known here which of them is ready for a job.
    waker: Waker,
    wakers: Arc<Wakers>,
}

struct Held<B: ?Sized> {
    subscription: Pin<Box<B>>,
    /// `true` once the end was returned, or a poll panicked.
    is_over: bool,
    /// Progress of the stop.
    stop: Stop,
    /// Number of tasks that have not given up the channel.
    open: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stop {
    Not,
    Stops,
    Stopped,
}

struct Wakers(Box<[AtomicWaker]>);

impl Wake for Wakers {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.iter().for_each(AtomicWaker::wake);
    }
}

impl<B: ?Sized> Share<B> {
    /// Splits `subscription` into shares for `tasks`.
    pub(super) fn among(tasks: usize, subscription: Pin<Box<B>>) -> impl Iterator<Item = Self> {
        let wakers = Arc::new(Wakers((0..tasks).map(|_| AtomicWaker::new()).collect()));
        let common = Arc::new(Common {
            held: Mutex::new(Held {
                subscription,
                is_over: false,
                stop: Stop::Not,
                open: tasks,
            }),
            waker: Arc::clone(&wakers).into(),
            wakers,
        });
        (0..tasks).map(move |task| Self {
            common: Arc::clone(&common),
            task,
            given_up: false,
        })
    }

    /// Polls the subscription until it is over. `is_end` returns whether a ready value is the end.
    fn poll_with<R>(
        &self,
        cx: &mut Context<'_>,
        poll: impl FnOnce(Pin<&mut B>, &mut Context<'_>) -> Poll<R>,
        is_end: impl FnOnce(&R) -> bool,
    ) -> Poll<R> {
        let Common { waker, wakers, .. } = &*self.common;
        wakers.0[self.task].register(cx.waker());
        let mut held = self.common.lock();
        if held.is_over || held.stop != Stop::Not {
            return Poll::Pending;
        }
        // Set first, so that it also holds if this panics.
        held.is_over = true;
        let polled = poll(held.subscription.as_mut(), &mut Context::from_waker(waker));
        held.is_over = matches!(&polled, Poll::Ready(ready) if is_end(ready));
        polled
    }
}

impl<B: ?Sized> Common<B> {
    fn lock(&self) -> MutexGuard<'_, Held<B>> {
        // A subscription that panicked is over; it is only closed and dropped.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B: Subscription + ?Sized> Stream for Share<B> {
    type Item = Result<B::Job, B::Error>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_with(cx, B::poll_next, |item| !matches!(item, Some(Ok(_))))
    }
}

impl<B: Subscription + ?Sized> Subscription for Share<B> {
    type Job = B::Job;
    type Error = B::Error;

    fn poll_closed(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), B::Error>> {
        self.poll_with(cx, B::poll_closed, |_| true)
    }

    /// Driven by any task that polls it.
    fn poll_stop(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Common { waker, wakers, .. } = &*self.common;
        wakers.0[self.task].register(cx.waker());
        let mut held = self.common.lock();
        if held.is_over || held.stop == Stop::Stopped {
            return Poll::Ready(());
        }
        // Set first, so that it also holds if this panics.
        held.stop = Stop::Stopped;
        let polled = held
            .subscription
            .as_mut()
            .poll_stop(&mut Context::from_waker(waker));
        if polled.is_pending() {
            held.stop = Stop::Stops;
        }
        polled
    }

    fn is_gone(&self) -> bool {
        self.common.lock().subscription.is_gone()
    }

    fn probe(&self) -> Option<Probing> {
        self.common.lock().subscription.probe()
    }

    /// Ready at once for all but the last task.
    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let first = !mem::replace(&mut self.given_up, true);
        let mut held = self.common.lock();
        held.open -= usize::from(first);
        match held.open {
            0 => held.subscription.as_mut().poll_close(cx),
            _ => Poll::Ready(()),
        }
    }
}

/// Returns the part of `prefetch` for one of the tasks; the parts differ by at most one.
pub(super) fn share_of(prefetch: usize, task: usize, tasks: usize) -> usize {
    prefetch / tasks + usize::from(task < prefetch % tasks)
}
