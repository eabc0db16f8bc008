//! [`Warm`], the children that a pool starts before there are jobs for them.

use std::sync::{Arc, OnceLock};

use tokio_util::task::AbortOnDropHandle;

use super::lease::Shared;

/// Task that keeps a number of children started, until the last clone of its pool is dropped.
#[derive(Debug, Default)]
pub(super) struct Warm {
    task: OnceLock<AbortOnDropHandle<()>>,
}

impl Warm {
    /// Starts the task, if there is none and the pool has such a number.
    pub(super) fn begin(&self, shared: &Arc<Shared>) {
        if shared.settings.warm > 0 {
            self.task.get_or_init(|| {
                let task = tokio::spawn(keep(Arc::clone(shared)));
                AbortOnDropHandle::new(task)
            });
        }
    }
}

async fn keep(shared: Arc<Shared>) {
    loop {
        match shared.missing() {
            // It goes to the idle ones.
            Some((mut lease, counted)) => lease.start(counted).await,
            None => shared.has_lost_one().await,
        }
    }
}
