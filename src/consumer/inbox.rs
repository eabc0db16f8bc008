//! [`Inbox`] of one task of a consumer, by which handles ask it for something.

use std::{
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::Waker,
};

use futures_util::task::AtomicWaker;
use tokio::{sync::mpsc::UnboundedSender, task};

use crate::{outcome::guard, sentinel::RunningJob};

/// Question about the running jobs. Its sender is dropped once it is answered, or once its task is gone.
#[derive(Clone, Debug)]
pub(super) struct Question {
    /// Job to stop, if it is among them.
    pub(super) stop: Option<task::Id>,
    pub(super) reply: UnboundedSender<Vec<RunningJob>>,
}

/// Questions to one task, and its waker.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    questions: Mutex<Vec<Question>>,
    waker: AtomicWaker,
}

impl Inbox {
    /// Registers the waker, and returns the new questions.
    pub(super) fn open(&self, waker: &Waker) -> Vec<Question> {
        self.waker.register(waker);
        mem::take(&mut *self.questions())
    }

    pub(super) fn put(&self, question: Question) {
        self.questions().push(question);
        self.wake();
    }

    /// Wakes the task, since something that it looks at has changed.
    pub(super) fn wake(&self) {
        guard(|| self.waker.wake());
    }

    fn questions(&self) -> MutexGuard<'_, Vec<Question>> {
        self.questions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Inboxes of all tasks of a consumer.
#[derive(Debug, Default)]
pub(super) struct Inboxes(Mutex<Vec<Weak<Inbox>>>);

impl Inboxes {
    /// Creates the inbox of a new task.
    pub(super) fn add(&self) -> Arc<Inbox> {
        let inbox = Arc::new(Inbox::default());
        let mut inboxes = self.lock();
        inboxes.retain(|it| it.strong_count() > 0);
        inboxes.push(Arc::downgrade(&inbox));
        inbox
    }

    /// Returns those of the tasks that are there.
    pub(super) fn all(&self) -> Vec<Arc<Inbox>> {
        self.lock().iter().filter_map(|it| it.upgrade()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<Inbox>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
