//! [`Moves`] of suspects to their lane, which a worker of both waits for.

use std::sync::Arc;

use tokio::sync::watch;

/// Moves of suspects that are on their way, shared by a queue and its lane.
///
/// A server may deliver the copy of a job before the original is acked. If the copy took the worker down then, the
/// original would come back, and be copied again.
// Not a lock: a stream that is not polled any more must not keep others from a move.
#[derive(Clone, Debug)]
pub(super) struct Moves(Arc<watch::Sender<usize>>);

/// A move that is on its way.
#[derive(Debug)]
pub(super) struct Moving(Moves);

impl Moves {
    pub(super) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }

    /// Begins a move, which ends when it is dropped.
    pub(super) fn begin(&self) -> Moving {
        self.0.send_modify(|count| *count += 1);
        Moving(self.clone())
    }

    /// Waits until none is on its way.
    pub(super) async fn ended(self) {
        let mut count = self.0.subscribe();
        // Invariant: it has a sender of its own.
        drop(count.wait_for(|count| *count == 0).await);
    }
}

impl Drop for Moving {
    fn drop(&mut self) {
        self.0.0.send_modify(|count| *count -= 1);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::Moves;

    #[test]
    fn each_move_is_waited_for() {
        let moves = Moves::new();
        let (first, second) = (moves.begin(), moves.begin());
        let mut ended = Box::pin(moves.clone().ended());
        drop(first);
        assert!((&mut ended).now_or_never().is_none());
        // One that waits, and is not polled, holds nobody up.
        drop(moves.begin());
        drop(second);
        assert!(ended.now_or_never().is_some());
    }
}
