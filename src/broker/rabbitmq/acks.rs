//! [`Acks`]: what is acked at the same time goes to the server in few frames.

use std::{
    collections::BTreeSet,
    fmt, mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::future::{OptionFuture, join, join_all};
use lapin::{Acker, options::BasicAckOptions};
use tokio::{runtime::Handle, sync::oneshot, task::yield_now};

/// The acks of a channel.
///
/// One task sends them while there are any: first it lets all that is ready to run have its turn,
/// without a timer, and then it takes what has gathered. Those that are the oldest of the channel
/// which have no answer need only one frame, with `multiple` set; AMQP 0-9-1 lets it stand for all
/// deliveries up to its tag. Each of the others has a frame of its own.
///
/// `multiple` must not hit a delivery that is still to be answered, or was answered otherwise by a
/// frame that is yet to be sent. So a delivery is entered before anybody can answer it, and struck
/// out when the frame that answers it has been sent. As only one task sends acks, no frame hits
/// what another ack is on its way for: to the server that would be an unknown tag.
pub(super) struct Acks {
    state: Mutex<State>,
    runtime: Handle,
}

/// A delivery of a channel, in the order in which they came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    /// How often the channel had been opened anew: the tags begin again then.
    epoch: u32,
    tag: u64,
}

#[derive(Default)]
struct State {
    epoch: u32,
    /// The tag that was entered last.
    last: u64,
    /// What has no answer. What the client has received and the stream has not given out comes
    /// after all of these.
    unanswered: BTreeSet<Place>,
    waiting: Vec<Ack>,
    is_sending: bool,
}

struct Ack {
    place: Place,
    acker: Acker,
    answer: oneshot::Sender<lapin::Result<bool>>,
}

impl Acks {
    /// Creates it for a channel without deliveries.
    ///
    /// # Panics
    ///
    /// Panics outside of a tokio runtime.
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::default(),
            runtime: Handle::current(),
        }
    }

    /// Enters a delivery, in the order in which they came.
    pub(super) fn enter(&self, tag: u64) -> Place {
        let mut state = self.state();
        if tag <= state.last {
            // The channel was opened anew, and what came before is void.
            state.epoch += 1;
            state.unanswered.clear();
        }
        state.last = tag;
        let place = Place {
            epoch: state.epoch,
            tag,
        };
        state.unanswered.insert(place);
        place
    }

    /// Strikes out a delivery that was answered otherwise.
    pub(super) fn strike_out(&self, place: Place) {
        self.state().unanswered.remove(&place);
    }

    /// Acks a delivery.
    ///
    /// # Cancel safety
    ///
    /// Once it was polled, the ack goes out whether or not anybody waits for its answer.
    pub(super) async fn ack(self: &Arc<Self>, place: Place, acker: Acker) -> lapin::Result<bool> {
        let (answer, answered) = oneshot::channel();
        let begins = {
            let mut state = self.state();
            state.waiting.push(Ack {
                place,
                acker,
                answer,
            });
            !mem::replace(&mut state.is_sending, true)
        };
        if begins {
            let sending = Sending {
                acks: Arc::clone(self),
                is_over: false,
            };
            self.runtime.spawn(sending.run());
        }
        // Its task has ended with its runtime, before it sent it.
        answered.await.unwrap_or(Ok(false))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Acks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acks").finish_non_exhaustive()
    }
}

/// The task that sends.
struct Sending {
    acks: Arc<Acks>,
    is_over: bool,
}

impl Sending {
    async fn run(mut self) {
        loop {
            // Comes back after all that can run now.
            yield_now().await;
            let Some((oldest, others)) = self.take() else {
                return;
            };
            let first = oldest.last().map(|last| {
                let multiple = oldest.len() > 1;
                last.acker.ack(BasicAckOptions { multiple })
            });
            let single = |ack: &Ack| {
                let acker = ack.acker.clone();
                async move { acker.ack(BasicAckOptions::default()).await }
            };
            let singles = join_all(others.iter().map(single));
            let (first, singles) = join(OptionFuture::from(first), singles).await;
            let first = first.into_iter().cycle();
            self.answer(oldest.into_iter().zip(first));
            self.answer(others.into_iter().zip(singles));
        }
    }

    /// Takes what waits, those apart that are the oldest without an answer. If there is nothing,
    /// this is over: the next ack begins anew.
    fn take(&mut self) -> Option<(Vec<Ack>, Vec<Ack>)> {
        let mut state = self.acks.state();
        let mut acks = mem::take(&mut state.waiting);
        if acks.is_empty() {
            state.is_sending = false;
            self.is_over = true;
            return None;
        }
        acks.sort_unstable_by_key(|ack| ack.place);
        let oldest = state.unanswered.iter().zip(&acks);
        let oldest = oldest
            .take_while(|(place, ack)| **place == ack.place)
            .count();
        let others = acks.split_off(oldest);
        Some((acks, others))
    }

    fn answer(&self, acks: impl Iterator<Item = (Ack, lapin::Result<bool>)>) {
        for (ack, result) in acks {
            if let Ok(true) = result {
                self.acks.strike_out(ack.place);
            }
            // Whoever has stopped waiting has told that it doesn't know.
            drop(ack.answer.send(result));
        }
    }
}

impl Drop for Sending {
    /// Answers what waits, and lets another task begin, if this one's runtime has ended.
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        let mut state = self.acks.state();
        state.is_sending = false;
        let waiting = mem::take(&mut state.waiting);
        drop(state);
        drop(waiting);
    }
}
