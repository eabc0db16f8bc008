//! [`JobHandle`], a supervisor's handle to the context of its job, and the reuse of contexts.

use std::{cell::RefCell, ops::Deref, sync::Arc};

use crate::outcome::{drop_quietly, guard};

use super::context::{JobContext, Limit};

/// Handle of a supervisor to the context of its job; the context is reused afterwards.
pub(crate) struct JobHandle(
    // `None` only in the destructor.
    Option<Arc<JobContext>>,
);

thread_local! {
    /// Contexts of jobs that are over, so that a steady flow of jobs allocates none.
    static SPARE: RefCell<Vec<Arc<JobContext>>> = const { RefCell::new(Vec::new()) };
}

/// Number of contexts that a thread keeps: enough for the jobs that end between two calls.
const MOST_SPARE: usize = 16;

impl JobHandle {
    /// Takes a context that no other job uses, and that no earlier job has left a trace in.
    #[inline]
    pub(crate) fn new(limit: Limit) -> Self {
        let spare = SPARE.try_with(|spare| spare.borrow_mut().pop());
        let mut context = spare.ok().flatten().unwrap_or_default();
        // Invariant: a spare context has no other owner.
        if let Some(unique) = Arc::get_mut(&mut context) {
            unique.limit = limit;
        }
        Self(Some(context))
    }
}

impl Deref for JobHandle {
    type Target = Arc<JobContext>;

    #[inline]
    fn deref(&self) -> &Arc<JobContext> {
        // Invariant: only the destructor takes it out.
        self.0.as_ref().expect("a handle has a context")
    }
}

impl Drop for JobHandle {
    /// Keeps the context, unless the job or a [`Cancellation`] still holds it.
    fn drop(&mut self) {
        let Some(mut context) = self.0.take() else {
            return;
        };
        let Some(unique) = Arc::get_mut(&mut context) else {
            // A handle may live long, and does not need the caller's waker.
            drop_quietly(context.supervisor.take());
            return;
        };
        // Now, and not with the next job, so that the caller's waker is released. And before the list is
        // borrowed, since a waker is foreign code.
        guard(|| *unique = JobContext::default());
        // Without effect in a thread that is about to end.
        let _ended = SPARE.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            if spare.len() < MOST_SPARE {
                spare.push(context);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::CancelReason;

    fn spare() -> usize {
        SPARE.with_borrow(Vec::len)
    }

    #[test]
    fn a_thread_keeps_few_contexts_however_many_jobs_end_at_once() {
        for jobs in [1, MOST_SPARE, 1_000] {
            let handles = Vec::from_iter((0..jobs).map(|_| JobHandle::new(Limit::default())));
            assert_eq!(spare(), 0);
            drop(handles);
            assert_eq!(spare(), jobs.min(MOST_SPARE));
            SPARE.take();
        }
    }

    #[test]
    fn a_context_that_is_still_held_is_not_kept() {
        let handle = JobHandle::new(Limit::default());
        let held = Arc::clone(&handle);
        drop(handle);
        assert_eq!((spare(), Arc::strong_count(&held)), (0, 1));
    }

    #[test]
    fn a_context_that_is_kept_has_no_trace_of_its_job() {
        let handle = JobHandle::new(Limit::default());
        handle.ask(CancelReason::Requested, tokio::time::Instant::now());
        handle.block();
        drop(handle);
        let next = JobHandle::new(Limit::default());
        assert_eq!(spare(), 0);
        assert!(next.request().is_none() && next.stopping().is_none());
        assert!(!next.is_blocking() && !next.is_told());
    }
}
