//! [`Gathering`] of items that come at the same time, to send them together.

use std::{
    future::Future,
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{runtime::Handle, task::yield_now};

/// Items that wait until all tasks that are ready have had their turn, and then are sent together.
///
/// The first of them spawns a task that yields once to all tasks that are ready then, without a timer. So a
/// lone item is sent alone and at once, while those of a busy worker share the round trip and the wake-ups.
/// No task waits for the one before.
///
/// As a task sends them, an item whose future is dropped is sent all the same. If the task ends before its
/// turn, since its runtime ends, the items are dropped, and the next item spawns another task.
pub(super) struct Gathering<T> {
    /// Items for the next task; such a task exists unless this is empty.
    waiting: Arc<Mutex<Vec<T>>>,
    /// Runtime that drives the connection; jobs may run on another one.
    runtime: Handle,
}

impl<T: Send + 'static> Gathering<T> {
    /// Creates it without items.
    ///
    /// # Panics
    ///
    /// Panics outside of a tokio runtime.
    pub(super) fn new() -> Self {
        Self {
            waiting: Arc::default(),
            runtime: Handle::current(),
        }
    }

    /// Adds an item; all gathered items are passed to the `send` of the first.
    pub(super) fn add<F>(&self, item: T, send: impl FnOnce(Vec<T>) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send,
    {
        let is_first = {
            let mut waiting = lock(&self.waiting);
            waiting.push(item);
            waiting.len() == 1
        };
        if is_first {
            let turn = Turn(Some(Arc::clone(&self.waiting)));
            self.runtime.spawn(async move {
                yield_now().await;
                send(turn.take()).await;
            });
        }
    }
}

/// Right to take the waiting items; `None` once it was used.
struct Turn<T>(Option<Arc<Mutex<Vec<T>>>>);

impl<T> Turn<T> {
    fn take(mut self) -> Vec<T> {
        self.empty()
    }

    fn empty(&mut self) -> Vec<T> {
        let waiting = self.0.take();
        waiting.map_or_else(Vec::new, |waiting| mem::take(&mut *lock(&waiting)))
    }
}

impl<T> Drop for Turn<T> {
    fn drop(&mut self) {
        // Not under the lock, as this wakes those who wait for the items.
        drop(self.empty());
    }
}

fn lock<T>(waiting: &Mutex<Vec<T>>) -> MutexGuard<'_, Vec<T>> {
    // Nothing panics while it is held.
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::{
        runtime::Builder,
        sync::{mpsc, oneshot},
        task::yield_now,
    };

    use super::Gathering;

    #[tokio::test]
    async fn what_is_ready_at_once_is_sent_together() {
        let gathering = Arc::new(Gathering::new());
        let (sent, mut batches) = mpsc::unbounded_channel();
        let first = sent.clone();
        gathering.add(0, move |items| async move { first.send(items).unwrap() });
        // They come after the task of the first.
        for item in 1..3 {
            let gathering = Arc::clone(&gathering);
            tokio::spawn(async move { gathering.add(item, |_| async { unreachable!() }) });
        }
        assert_eq!(batches.recv().await, Some(vec![0, 1, 2]));
        gathering.add(3, move |items| async move { sent.send(items).unwrap() });
        assert_eq!(batches.recv().await, Some(vec![3]));
        assert_eq!(batches.recv().await, None);
    }

    #[tokio::test]
    async fn no_batch_waits_for_the_one_before() {
        let gathering = Gathering::new();
        let (first_ends, end) = oneshot::channel::<()>();
        gathering.add(1, |_| async { drop(end.await) });
        // One turn for the task to begin, and one for its own yield.
        yield_now().await;
        yield_now().await;
        let (sent, second) = oneshot::channel();
        gathering.add(2, |items| async { sent.send(items).unwrap() });
        assert_eq!(second.await, Ok(vec![2]));
        first_ends.send(()).unwrap();
    }

    #[test]
    fn what_a_runtime_leaves_behind_is_dropped() {
        let runtime = Builder::new_current_thread().build().unwrap();
        let gathering = runtime.block_on(async { Gathering::new() });
        let (item, mut dropped) = oneshot::channel::<()>();
        gathering.add(item, |_| async { panic!("its runtime does not run") });
        assert!(
            dropped
                .try_recv()
                .is_err_and(|error| error == oneshot::error::TryRecvError::Empty)
        );
        drop(runtime);
        assert!(
            dropped
                .try_recv()
                .is_err_and(|error| error == oneshot::error::TryRecvError::Closed)
        );
        // A later item is not kept either.
        let (item, dropped) = oneshot::channel::<()>();
        gathering.add(item, |_| async { panic!("its runtime has ended") });
        assert!(dropped.blocking_recv().is_err());
    }
}
