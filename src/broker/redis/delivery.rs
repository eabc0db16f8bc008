//! [`Delivery`], an entry of a stream, and [`DeliveryTag`], the handle that settles it.

use std::{
    borrow::Cow,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::time::Instant;

use super::{
    DeliveryError,
    channel::{Channel, Failed, Left},
    reply::{DeliveryId, Past},
};
use crate::{
    broker::{dead_letter::SUSPECT_OF, envelope::Envelope, settlement},
    job::Job,
    settle::{Capabilities, Lease, Messaging, Reason, Settle, Unsettled, Verdict},
};

/// Begin of 2018, the year of the first release with streams, in milliseconds since 1970.
const FIRST_STREAMS: u64 = 1_514_764_800_000;

/// An entry of a stream that was delivered to this consumer.
///
/// As bytes ([`AsRef`]) it is its payload: the value of the field with the name of
/// [`ConsumerGroup::payload_field`](super::ConsumerGroup::payload_field), `payload` by default. It is empty
/// if the entry has no such field.
#[derive(Clone, Debug)]
pub struct Delivery {
    tag: DeliveryTag,
    /// Position of the payload in the fields.
    payload: Option<usize>,
}

impl Delivery {
    pub(super) fn new(tag: DeliveryTag, payload_field: &str) -> Self {
        let mut fields = tag.shared.fields.iter();
        let payload = fields.position(|(name, _)| name == payload_field.as_bytes());
        Self { tag, payload }
    }

    /// Returns the id of the entry, such as `1526919030474-55`. It stays the same when the entry comes back.
    pub fn id(&self) -> &str {
        self.tag.id()
    }

    pub(super) fn asked_at(&self) -> Instant {
        self.tag.shared.id.asked_at
    }

    /// Returns the value of the payload field, if the entry has one.
    pub fn payload(&self) -> Option<&[u8]> {
        self.payload.map(|index| &*self.tag.shared.fields[index].1)
    }

    /// Returns the value of the first field with the name `name`.
    pub fn field(&self, name: impl AsRef<[u8]>) -> Option<&[u8]> {
        let name = name.as_ref();
        self.tag.field(|field| field == name)
    }

    /// Returns all fields, in the order in which they were added.
    pub fn fields(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let fields = self.tag.shared.fields.iter();
        fields.map(|(name, value)| (&**name, &**value))
    }
}

impl AsRef<[u8]> for Delivery {
    fn as_ref(&self) -> &[u8] {
        self.payload().unwrap_or_default()
    }
}

impl Envelope for Delivery {
    fn header(&self, name: &str) -> Option<&str> {
        let is_it = |field: &[u8]| field.eq_ignore_ascii_case(name.as_bytes());
        self.tag
            .field(is_it)
            .and_then(|value| std::str::from_utf8(value).ok())
    }

    fn message_id(&self) -> Option<Cow<'_, str>> {
        Some(self.id().into())
    }

    fn routing_key(&self) -> &str {
        let suspect_of = self.header(SUSPECT_OF);
        suspect_of.unwrap_or(&self.tag.shared.channel.link.keys.stream)
    }

    fn deliveries(&self) -> Option<u32> {
        self.tag.deliveries()
    }

    fn redelivered(&self) -> Option<bool> {
        self.tag.redelivered()
    }
}

impl Job for Delivery {
    type Tag = DeliveryTag;

    fn tag(&self) -> DeliveryTag {
        self.tag.clone()
    }

    /// Returns the [`min_idle`](super::ConsumerGroup::min_idle) of the group.
    fn lease(&self) -> Option<Duration> {
        Some(self.tag.shared.channel.link.min_idle)
    }

    fn messaging(&self) -> Option<Messaging<'_>> {
        self.tag.messaging()
    }

    fn queued_since(&self) -> Option<SystemTime> {
        match self.tag.shared.past {
            Past::New => self.tag.published_at(),
            Past::GivenBack | Past::Claimed => None,
        }
    }
}

/// Handle that settles a [`Delivery`].
///
/// It shares the fields with the delivery, since [traces](Settle::messaging) use some of them.
///
/// The [module's docs](super#verdicts) show the effect of each verdict. A failed settlement gives the tag
/// back if the server refused it as a whole (it is loading its data, it is out of memory, it has become a replica, it has
/// lost the stream's hash slot): nothing was done then. It is [moot](Unsettled::moot) if the entry is not pending for
/// this delivery any more ([`Lost`](DeliveryError::Lost), [`SomeLost`](DeliveryError::SomeLost),
/// [`Gone`](DeliveryError::Gone)), or if it is done and [too few replicas](DeliveryError::NotReplicated) have it. After any other failure it is not known whether it took effect, and a
/// second attempt could hit the entry's next delivery.
#[derive(Clone)]
pub struct DeliveryTag {
    shared: Arc<Shared>,
}

struct Shared {
    id: DeliveryId,
    /// The count does not show it: a release leaves it unchanged.
    past: Past,
    fields: Vec<(Vec<u8>, Vec<u8>)>,
    settled: AtomicBool,
    /// `true` once a keep-alive has found that another consumer has it.
    lost: AtomicBool,
    channel: Arc<Channel>,
}

impl DeliveryTag {
    pub(super) fn new(
        id: DeliveryId,
        past: Past,
        fields: Vec<(Vec<u8>, Vec<u8>)>,
        channel: Arc<Channel>,
    ) -> Self {
        let shared = Arc::new(Shared {
            id,
            past,
            fields,
            settled: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            channel,
        });
        Self { shared }
    }

    /// Returns the id of the entry.
    pub fn id(&self) -> &str {
        &self.shared.id.entry
    }

    fn field(&self, is_it: impl Fn(&[u8]) -> bool) -> Option<&[u8]> {
        let mut fields = self.shared.fields.iter();
        fields.find_map(|(field, value)| is_it(field).then_some(&**value))
    }
}

impl Settle for DeliveryTag {
    type Error = DeliveryError;
    type Future = Settlement;

    fn settle(self, verdict: Verdict, reason: Reason) -> Settlement {
        // Taken here and not in the future, so that the call itself uses the tag up.
        let first = !self.shared.settled.swap(true, Ordering::AcqRel);
        Settlement::new(async move {
            if !first {
                return Err(Unsettled::last(DeliveryError::AlreadySettled));
            }
            let Shared {
                id,
                fields,
                settled,
                lost,
                channel,
                ..
            } = &*self.shared;
            let is_lost = lost.load(Ordering::Relaxed);
            let done = channel.settle(id, is_lost, fields, verdict, reason).await;
            match done {
                Ok(()) => Ok(()),
                Err(Failed { error, left }) => Err(match left {
                    Left::Again => {
                        settled.store(false, Ordering::Release);
                        Unsettled::again(self, error)
                    }
                    Left::Nothing => Unsettled::moot(error),
                    Left::Channel => Unsettled::last(error),
                }),
            }
        })
    }

    async fn keep_alive(&self) -> Result<Lease, DeliveryError> {
        let Shared {
            id, lost, channel, ..
        } = &*self.shared;
        let lease = channel.keep_alive(id).await?;
        lost.fetch_or(lease == Lease::Lost, Ordering::Relaxed);
        Ok(lease)
    }

    fn deliveries(&self) -> Option<u32> {
        Some(self.shared.id.deliveries())
    }

    fn redelivered(&self) -> Option<bool> {
        Some(self.shared.past != Past::New)
    }

    /// Returns whether the entry was reclaimed, if [suspects](super::ConsumerGroup::suspects) are set.
    fn is_suspect(&self) -> bool {
        let keys = &self.shared.channel.link.keys;
        keys.suspects.is_some() && self.shared.past == Past::Claimed
    }

    fn capabilities(&self) -> Capabilities {
        let all = Capabilities::none().free_release().delay().keep_alive();
        match &self.shared.channel.link.keys.dead {
            Some(_) => all.dead_letter(),
            None => all,
        }
    }

    /// Returns the stream's key as the destination, and the entry's id as the message's id. The trace context
    /// is in the entry's fields of its names.
    fn messaging(&self) -> Option<Messaging<'_>> {
        let text = |name: &str| {
            let value = self.field(|field| field.eq_ignore_ascii_case(name.as_bytes()))?;
            std::str::from_utf8(value).ok()
        };
        let link = &self.shared.channel.link;
        let messaging = Messaging::new("redis", &*link.keys.stream)
            .consumer_group(&*link.group)
            .message_id(self.id())
            .traceparent(text("traceparent"))
            .tracestate(text("tracestate"));
        Some(messaging)
    }

    /// Returns the time in the id of the entry, which stays the same when the entry comes back.
    ///
    /// `None` if the id has no time, since it was not made by the server: one from before there were streams.
    fn published_at(&self) -> Option<SystemTime> {
        let (millis, _) = self.id().split_once('-')?;
        let millis = millis
            .parse()
            .ok()
            .filter(|millis| *millis >= FIRST_STREAMS)?;
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(millis))
    }
}

impl fmt::Debug for DeliveryTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeliveryTag")
            .field("stream", &self.shared.channel.link.keys.stream)
            .field("id", &self.shared.id.entry)
            .field("deliveries", &self.shared.id.count)
            .finish()
    }
}

/// Future of a [`DeliveryTag`]'s settlement.
///
/// # Cancel safety
///
/// Not cancel safe: the call uses the tag up. An ack is sent once this was polled, also if it is dropped
/// then. After any other verdict the server may or may not have carried it out, and its place of the
/// [prefetch](super::ConsumerGroup::prefetch) may stay taken.
pub type Settlement = settlement::Settlement<DeliveryTag, DeliveryError>;
