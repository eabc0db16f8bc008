//! Races of two threads, for tests of what threads share.

use std::{
    hint::spin_loop,
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
    time::Duration,
};

use tokio::time::Instant;

const ROUNDS: u32 = 500;

/// Longer than any thread waits for another one that is alive.
pub(crate) const LOST: Duration = Duration::from_secs(20);

/// Runs `one` and `other` in two threads at the same time, again and again, each time with something new.
pub(crate) fn race<S: Sync>(
    new: impl Fn() -> S,
    one: impl Fn(&S) + Sync,
    other: impl Fn(&S) + Sync,
    check: impl Fn(S),
) {
    for _ in 0..ROUNDS {
        let shared = new();
        let start = Barrier::new(2);
        // Neither has always the same lead.
        let run = |act: &(dyn Fn(&S) + Sync), lead: u32| {
            start.wait();
            (0..lead).for_each(|_| spin_loop());
            act(&shared);
        };
        let (lead, lag) = (fastrand::u32(..200), fastrand::u32(..200));
        thread::scope(|scope| {
            scope.spawn(|| run(&one, lead));
            run(&other, lag);
        });
        check(shared);
    }
}

struct Parked {
    thread: Thread,
    is_woken: AtomicBool,
}

impl Wake for Parked {
    fn wake(self: Arc<Self>) {
        self.is_woken.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

/// Polls in this thread, after the first time only when woken.
///
/// # Panics
///
/// Panics if nobody wakes it.
pub(crate) fn wait<T>(mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> T {
    let parked = Arc::new(Parked {
        thread: thread::current(),
        is_woken: AtomicBool::new(false),
    });
    let waker = Waker::from(Arc::clone(&parked));
    loop {
        if let Poll::Ready(value) = poll(&mut Context::from_waker(&waker)) {
            return value;
        }
        let began = Instant::now();
        while !parked.is_woken.swap(false, Ordering::AcqRel) {
            assert!(began.elapsed() < LOST, "a wake-up is lost");
            thread::park_timeout(LOST);
        }
    }
}
