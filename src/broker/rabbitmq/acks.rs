//! [`Acks`] of a channel, sent in few frames.

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
use tokio::{sync::oneshot, time::Instant};

use crate::broker::gathering::Gathering;

/// The acks of a channel.
///
/// Acks that come at the same time are [gathered](Gathering). Those of the oldest unsettled deliveries of the
/// channel need only one frame, with `multiple` set: in AMQP 0-9-1 it stands for all deliveries up to its
/// tag. Each of the others has its own frame.
///
/// `multiple` must not include a delivery that is still unsettled, or that was settled in another way by a
/// frame that is yet to be sent. So a delivery is entered before anybody can settle it, and struck out when
/// the frame that settles it is on its way. Frames are handed over under the lock, in the order in which they
/// are made: to the server, a second ack of a delivery would be an unknown tag.
pub(super) struct Acks {
    state: Mutex<State>,
    gathering: Gathering<Ack>,
}

/// A delivery of a channel, ordered by its arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    /// Number of times that the channel was opened anew: the tags begin again then.
    epoch: u32,
    tag: u64,
}

struct State {
    /// `None` after `give_up`: the last handle of a channel closes it.
    channel: Option<Arc<Channel>>,
    epoch: u32,
    /// The last tag that was entered.
    last: u64,
    /// Unsettled deliveries. Those that the client has received and the stream has not yielded come after all
    /// of these.
    unanswered: BTreeSet<Place>,
    /// Time at which the last settlement was handed over.
    last_sent: Option<Instant>,
}

struct Ack {
    place: Place,
    acker: Acker,
    answer: oneshot::Sender<lapin::Result<bool>>,
}

/// A frame on its way, and its acks.
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
        };
        Self {
            state: Mutex::new(state),
            gathering: Gathering::new(),
        }
    }

    /// Enters a delivery, in the order in which they came.
    pub(super) fn enter(&self, tag: u64) -> Place {
        let mut state = self.state();
        if tag <= state.last {
            // The channel was opened anew, and the earlier deliveries are void.
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

    /// Strikes out a delivery that was settled in another way.
    pub(super) fn strike_out(&self, place: Place) {
        let mut state = self.state();
        state.unanswered.remove(&place);
        state.last_sent = Some(Instant::now());
    }

    /// Returns the time at which the last settlement was handed over.
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
    /// Once it was polled, the ack is sent, whether or not anybody waits for its result.
    pub(super) async fn ack(self: &Arc<Self>, place: Place, acker: Acker) -> lapin::Result<bool> {
        let (answer, answered) = oneshot::channel();
        let ack = Ack {
            place,
            acker,
            answer,
        };
        let this = Arc::clone(self);
        self.gathering.add(ack, |acks| this.send(acks));
        let answer = answered.await;
        // Its task has ended with its runtime, before or after it handed the frame over.
        answer.unwrap_or_else(|_| match self.state().unanswered.contains(&place) {
            true => Ok(false),
            false => Err(io::Error::from(io::ErrorKind::BrokenPipe).into()),
        })
    }

    async fn send(self: Arc<Self>, mut acks: Vec<Ack>) {
        let frames = poll_fn(|cx| Poll::Ready(self.state().send(mem::take(&mut acks), cx)));
        for frame in frames.await {
            frame.finish().await;
        }
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
    /// Returns the acks of each frame, first those of the oldest unsettled deliveries.
    fn frames(&self, mut acks: Vec<Ack>) -> impl Iterator<Item = Vec<Ack>> + use<> {
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

    /// Hands frames for `acks` over to the client.
    fn send(&mut self, acks: Vec<Ack>, cx: &mut Context<'_>) -> Vec<Frame> {
        let mut frames = Vec::new();
        for acks in self.frames(acks) {
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
        // The acker knows whether its tag still belongs to this channel.
        let last = acks.last().filter(|last| !last.acker.poisoned());
        let target = channel.zip(last.map(|last| last.place.tag));
        let multiple = acks.len() > 1;
        // Not by the acker: it hands its ack to a task, in no order.
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

    /// Waits until the frame is sent, and passes the result to those who wait.
    async fn finish(mut self) {
        let mut sent = Pin::new(&mut self.sent);
        sent.as_mut().await;
        let sent = sent.take_output().unwrap_or(Ok(false));
        for ack in self.acks {
            // A settlement that no longer waits has reported that it does not know the result.
            drop(ack.answer.send(sent.clone()));
        }
    }
}
