//! [`Acks`]: what is acked at the same time goes to the server in few frames.

use std::{
    collections::BTreeSet,
    fmt,
    future::{Future, poll_fn},
    io, mem,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use futures_util::future::{BoxFuture, MaybeDone, maybe_done};
use lapin::{Acker, Channel, options::BasicAckOptions};
use tokio::{runtime::Handle, sync::oneshot, task::yield_now, time::Instant};

/// The acks of a channel.
///
/// The first of them begins a task that lets all that is ready to run have its turn, without a timer,
/// and then sends what has gathered. Those that are the oldest of the channel which have no answer
/// need only one frame, with `multiple` set; AMQP 0-9-1 lets it stand for all deliveries up to its
/// tag. Each of the others has a frame of its own. No task waits for the frames of the one before.
///
/// `multiple` must not hit a delivery that is still to be answered, or was answered otherwise by a
/// frame that is yet to be sent. So a delivery is entered before anybody can answer it, and struck
/// out when the frame that answers it is on its way. Frames are handed over under the lock, in the
/// order in which they are made: to the server, an ack of what is acked already would be an unknown
/// tag.
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

struct State {
    /// `None` once it is given up: the last handle of a channel closes it.
    channel: Option<Arc<Channel>>,
    epoch: u32,
    /// The tag that was entered last.
    last: u64,
    /// What has no answer. What the client has received and the stream has not given out comes
    /// after all of these.
    unanswered: BTreeSet<Place>,
    /// When the last settlement was handed over.
    last_sent: Option<Instant>,
    /// What the next task will send: there is one unless this is empty.
    waiting: Vec<Ack>,
}

struct Ack {
    place: Place,
    acker: Acker,
    answer: oneshot::Sender<lapin::Result<bool>>,
}

/// A frame on its way, and the acks that it stands for.
struct Frame {
    acks: Vec<Ack>,
    sent: MaybeDone<BoxFuture<'static, lapin::Result<bool>>>,
}

impl Acks {
    /// Creates it for a channel without deliveries.
    ///
    /// # Panics
    ///
    /// Panics outside of a tokio runtime.
    pub(super) fn new(channel: Channel) -> Self {
        let state = State {
            channel: Some(Arc::new(channel)),
            epoch: 0,
            last: 0,
            unanswered: BTreeSet::new(),
            last_sent: None,
            waiting: Vec::new(),
        };
        Self {
            state: Mutex::new(state),
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
        let mut state = self.state();
        state.unanswered.remove(&place);
        state.last_sent = Some(Instant::now());
    }

    /// Returns when the last settlement was handed over.
    pub(super) fn last_sent(&self) -> Option<Instant> {
        self.state().last_sent
    }

    /// Lets go of the channel; no ack is sent any more.
    pub(super) fn give_up(&self) {
        let channel = self.state().channel.take();
        // Not under the lock, as this may close it.
        drop(channel);
    }

    /// Acks a delivery. `Ok(false)` means that nothing was sent.
    ///
    /// # Cancel safety
    ///
    /// Once it was polled, the ack goes out whether or not anybody waits for its answer.
    pub(super) async fn ack(self: &Arc<Self>, place: Place, acker: Acker) -> lapin::Result<bool> {
        let (answer, answered) = oneshot::channel();
        let begins = {
            let waiting = &mut self.state().waiting;
            waiting.push(Ack {
                place,
                acker,
                answer,
            });
            waiting.len() == 1
        };
        if begins {
            let gathering = Gathering {
                acks: Arc::clone(self),
                is_over: false,
            };
            self.runtime.spawn(gathering.run());
        }
        // Its task has ended with its runtime after it had handed the frame over.
        answered
            .await
            .unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::BrokenPipe).into()))
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

impl State {
    /// Takes what waits, those first that are the oldest without an answer.
    fn take(&mut self) -> impl Iterator<Item = Vec<Ack>> + use<> {
        let mut acks = mem::take(&mut self.waiting);
        acks.sort_unstable_by_key(|ack| ack.place);
        let oldest = self.unanswered.iter().zip(&acks);
        let oldest = oldest
            .take_while(|(place, ack)| **place == ack.place)
            .count();
        let others = acks.split_off(oldest);
        let oldest = Some(acks).filter(|acks| !acks.is_empty());
        oldest
            .into_iter()
            .chain(others.into_iter().map(|ack| vec![ack]))
    }

    /// Hands frames for all that waits over to the client.
    fn send(&mut self, cx: &mut Context<'_>) -> Vec<Frame> {
        let mut frames = Vec::new();
        for acks in self.take() {
            let mut frame = Frame::new(acks, self.channel.clone());
            // The first poll hands it over.
            let _pending = Pin::new(&mut frame.sent).poll(cx);
            if let MaybeDone::Future(_) | MaybeDone::Done(Ok(true)) = frame.sent {
                for ack in &frame.acks {
                    self.unanswered.remove(&ack.place);
                }
            }
            frames.push(frame);
            self.last_sent = Some(Instant::now());
        }
        frames
    }
}

impl Frame {
    fn new(acks: Vec<Ack>, channel: Option<Arc<Channel>>) -> Self {
        // It knows whether the channel is still the one that its tag is of.
        let last = acks.last().filter(|last| !last.acker.poisoned());
        let target = channel.zip(last.map(|last| last.place.tag));
        let multiple = acks.len() > 1;
        // Not by the acker, which hands its ack to a task, in no order.
        let sent = async move {
            match target {
                Some((channel, tag)) => {
                    let options = BasicAckOptions { multiple };
                    channel.basic_ack(tag, options).await.map(|()| true)
                }
                None => Ok(false),
            }
        };
        Self {
            acks,
            sent: maybe_done(Box::pin(sent)),
        }
    }

    /// Waits until it is sent, and tells those who wait.
    async fn finish(mut self) {
        let mut sent = Pin::new(&mut self.sent);
        sent.as_mut().await;
        let sent = sent.take_output().unwrap_or(Ok(false));
        for ack in self.acks {
            // Whoever has stopped waiting has told that it doesn't know.
            drop(ack.answer.send(sent.clone()));
        }
    }
}

/// The task that sends what waits when its turn comes.
struct Gathering {
    acks: Arc<Acks>,
    is_over: bool,
}

impl Gathering {
    async fn run(mut self) {
        // Comes back after all that can run now.
        yield_now().await;
        let frames = poll_fn(|cx| {
            self.is_over = true;
            Poll::Ready(self.acks.state().send(cx))
        });
        for frame in frames.await {
            frame.finish().await;
        }
    }
}

impl Drop for Gathering {
    /// Answers what waits, and lets another task begin, if this one's runtime has ended.
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        let waiting = mem::take(&mut self.acks.state().waiting);
        for ack in waiting {
            drop(ack.answer.send(Ok(false)));
        }
    }
}
