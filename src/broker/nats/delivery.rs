//! [`Delivery`] and its [`DeliveryTag`].

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use async_nats::{HeaderMap, HeaderName, Message, Subject, jetstream::AckKind};
use tokio::time::Instant;

use super::{DeliveryError, channel::Channel, dead_letter, fetched::Fetched};
use crate::{Capabilities, Job, Lease, Messaging, Reason, Settle, Unsettled, Verdict};

// === impl Delivery ===

/// A message that a pull consumer delivered.
///
pub struct Delivery {
    place: Arc<Place>,
}

impl Delivery {
    pub(super) fn new(channel: Arc<Channel>, fetched: Fetched) -> Self {
        channel.hold();
        let wait = channel.lease(fetched.deliveries);
        let place = Place {
            channel,
            lease: Mutex::new(fetched.since + wait),
            wait,
            answered: AtomicBool::new(false),
            freed: AtomicBool::new(false),
            fetched,
        };
        Self {
            place: Arc::new(place),
        }
    }

    /// Returns the payload.
    pub fn payload(&self) -> &[u8] {
        &self.message().payload
    }

    /// Returns the message.
    pub fn message(&self) -> &Message {
        &self.place.fetched.message
    }

    /// Returns the subject that the message was published to.
    pub fn subject(&self) -> &Subject {
        &self.message().subject
    }

    /// Returns the headers of the message, if it has any.
    pub fn headers(&self) -> Option<&HeaderMap> {
        self.message().headers.as_ref()
    }

    /// Returns the sequence number of the message in its stream.
    pub fn stream_sequence(&self) -> u64 {
        self.place.fetched.sequence
    }
}

/// The payload.
impl AsRef<[u8]> for Delivery {
    fn as_ref(&self) -> &[u8] {
        self.payload()
    }
}

impl Job for Delivery {
    type Tag = DeliveryTag;

    fn tag(&self) -> DeliveryTag {
        DeliveryTag {
            place: Arc::clone(&self.place),
            is_second_try: false,
        }
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("subject", &self.subject().as_str())
            .field("stream_sequence", &self.stream_sequence())
            .field("deliveries", &self.place.fetched.deliveries)
            .finish_non_exhaustive()
    }
}

// === impl Place ===

/// One of the prefetch; given back with the answer, or when nobody has the delivery any more.
struct Place {
    channel: Arc<Channel>,
    fetched: Fetched,
    /// Until when the job is surely ours.
    lease: Mutex<Instant>,
    wait: Duration,
    answered: AtomicBool,
    freed: AtomicBool,
}

impl Place {
    fn lease(&self) -> Instant {
        *self.lease.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn extend(&self, lease: Instant) {
        *self.lease.lock().unwrap_or_else(PoisonError::into_inner) = lease;
    }

    fn is_lapsed(&self) -> bool {
        Instant::now() >= self.lease()
    }

    fn free(&self) {
        if !self.freed.swap(true, Ordering::AcqRel) {
            self.channel.free();
        }
    }

    async fn confirm(&self, kind: AckKind, limit: Duration) -> Result<(), DeliveryError> {
        let reply = self.fetched.reply.clone();
        self.channel.confirm(reply, kind, limit).await
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.free();
    }
}

// === impl DeliveryTag ===

/// Answers for a [`Delivery`].
///
/// What each verdict does is in the [module's documentation](super#verdicts).
///
/// A delivery takes one place of the [prefetch](super::Deliveries::prefetch) until it has its
/// answer, or until it and all of its tags are dropped.
pub struct DeliveryTag {
    place: Arc<Place>,
    /// Whether it came back from a settlement that may be tried again.
    is_second_try: bool,
}

impl DeliveryTag {
    /// Returns the sequence number of the message in its stream.
    pub fn stream_sequence(&self) -> u64 {
        self.place.fetched.sequence
    }

    async fn answer(
        self,
        verdict: Verdict,
        reason: Reason,
    ) -> Result<(), Unsettled<Self, DeliveryError>> {
        let result = match verdict {
            Verdict::Abandon => Ok(()),
            Verdict::Ack => self.finish(AckKind::Ack).await,
            Verdict::Reject => self.reject(&reason).await,
            Verdict::Retry { after } => self.give_back(after).await,
            Verdict::Release => self.give_back(None).await,
        };
        let Err(error) = result else {
            self.place.free();
            return Ok(());
        };
        // An ack and a dead letter mean the message, whoever has it by now, so they may be sent
        // twice. A NAK means the delivery: one that arrived already must not be followed by
        // another, which would take the job from the worker that has it next.
        let may_have_arrived = matches!(
            error,
            DeliveryError::Unconfirmed { .. } | DeliveryError::Request(_)
        );
        let again = match verdict {
            Verdict::Ack | Verdict::Reject => true,
            Verdict::Retry { .. } | Verdict::Release | Verdict::Abandon => {
                !may_have_arrived && !matches!(error, DeliveryError::LeaseLost)
            }
        };
        Err(match again {
            true => Unsettled::again(
                Self {
                    place: Arc::clone(&self.place),
                    is_second_try: true,
                },
                error,
            ),
            false => Unsettled::last(error),
        })
    }

    async fn finish(&self, kind: AckKind) -> Result<(), DeliveryError> {
        let limit = self.place.channel.confirm_timeout;
        self.place.confirm(kind, limit).await
    }

    async fn reject(&self, reason: &Reason) -> Result<(), DeliveryError> {
        if let Some(subject) = &self.place.channel.dead_letter {
            dead_letter::publish(&self.place.channel, subject, &self.place.fetched, reason).await?;
        }
        self.finish(AckKind::Term).await
    }

    async fn give_back(&self, after: Option<Duration>) -> Result<(), DeliveryError> {
        // While there is no connection, the client would keep a NAK and send it whenever it is
        // back, perhaps after the ack wait.
        let left = self.place.channel.connected().await?;
        if self.place.is_lapsed() {
            return Err(DeliveryError::LeaseLost);
        }
        self.place.confirm(AckKind::Nak(after), left).await
    }

    fn refusal(&self) -> Option<DeliveryError> {
        if self.place.channel.is_given_up() {
            return Some(DeliveryError::Stale);
        }
        if self.is_second_try {
            return None;
        }
        let answered = self.place.answered.swap(true, Ordering::AcqRel);
        answered.then_some(DeliveryError::AlreadySettled)
    }
}

impl Settle for DeliveryTag {
    type Error = DeliveryError;
    type Future = Settlement;

    fn settle(self, verdict: Verdict, reason: Reason) -> Settlement {
        Settlement {
            future: match self.refusal() {
                Some(error) => Box::pin(std::future::ready(Err(Unsettled::last(error)))),
                None => Box::pin(self.answer(verdict, reason)),
            },
        }
    }

    /// Extends the ack wait by its whole length, with a confirmed `+WPI`.
    ///
    /// [`Lease::Lost`] once the ack wait has passed, by the clock of this process, or the tag was
    /// settled, or its subscription closed. The server does not tell: it confirms a `+WPI` for a
    /// job that somebody else has by now in the same words.
    async fn keep_alive(&self) -> Result<Lease, DeliveryError> {
        let place = &self.place;
        if place.channel.is_given_up() || place.answered.load(Ordering::Acquire) {
            return Ok(Lease::Lost);
        }
        let sent = Instant::now();
        if sent >= place.lease() {
            return Ok(Lease::Lost);
        }
        self.finish(AckKind::Progress).await?;
        // Confirmed in time, so it arrived in time.
        if place.is_lapsed() {
            return Ok(Lease::Lost);
        }
        place.extend(sent + place.wait);
        Ok(Lease::Held)
    }

    fn deliveries(&self) -> Option<u32> {
        Some(self.place.fetched.deliveries)
    }

    fn capabilities(&self) -> Capabilities {
        let capabilities = Capabilities::none().delay().keep_alive();
        match self.place.channel.dead_letter {
            Some(_) => capabilities.dead_letter(),
            None => capabilities,
        }
    }

    /// The destination is the stream: subjects often have ids in them, and it is in the names of
    /// spans. The message's id is its `Nats-Msg-Id`, or else its sequence number in the stream.
    fn messaging(&self) -> Option<Messaging<'_>> {
        let Place {
            channel, fetched, ..
        } = &*self.place;
        let header = |name: &str| {
            let mut headers = fetched.message.headers.iter().flat_map(HeaderMap::iter);
            // Go's clients write them with a capital.
            let is_it = |key: &HeaderName| AsRef::<str>::as_ref(key).eq_ignore_ascii_case(name);
            let values = headers.find(|(key, _)| is_it(key));
            values.and_then(|(_, values)| Some(values.first()?.as_str()))
        };
        let messaging = Messaging::new("nats", &*channel.stream)
            .traceparent(header("traceparent"))
            .tracestate(header("tracestate"));
        Some(match header("Nats-Msg-Id") {
            Some(id) => messaging.message_id(id),
            None => messaging.message_id(fetched.sequence.to_string()),
        })
    }
}

/// Of the same delivery; all but the first settlement are refused.
impl Clone for DeliveryTag {
    fn clone(&self) -> Self {
        Self {
            place: Arc::clone(&self.place),
            is_second_try: false,
        }
    }
}

impl fmt::Debug for DeliveryTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeliveryTag")
            .field("stream_sequence", &self.stream_sequence())
            .field("deliveries", &self.place.fetched.deliveries)
            .finish_non_exhaustive()
    }
}

// === impl Settlement ===

/// The future of a settlement.
///
/// # Cancel safety
///
/// Not cancel safe: if it is dropped, the server may or may not have the answer.
#[must_use = "a delivery is not settled unless this is polled"]
pub struct Settlement {
    future: Answering,
}

type Answering =
    Pin<Box<dyn Future<Output = Result<(), Unsettled<DeliveryTag, DeliveryError>>> + Send>>;

impl Future for Settlement {
    type Output = Result<(), Unsettled<DeliveryTag, DeliveryError>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.future.as_mut().poll(cx)
    }
}

impl fmt::Debug for Settlement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settlement").finish_non_exhaustive()
    }
}
