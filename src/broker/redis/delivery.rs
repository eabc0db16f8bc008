//! [`Delivery`]: an entry of a stream, and the tag that answers for it.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{
    DeliveryError,
    channel::{Channel, DeliveryId, Failed},
};
use crate::{Capabilities, Job, Lease, Reason, Settle, Unsettled, Verdict};

/// An entry of a stream that was delivered to this consumer.
///
/// As bytes ([`AsRef`]) it is its payload: the value of the field that
/// [`ConsumerGroup::payload_field`](super::ConsumerGroup::payload_field) names, `payload` by
/// default, and empty if the entry has no such field.
#[derive(Clone, Debug)]
pub struct Delivery {
    tag: DeliveryTag,
    fields: Arc<[(Vec<u8>, Vec<u8>)]>,
    payload: Option<usize>,
}

impl Delivery {
    pub(super) fn new(
        tag: DeliveryTag,
        fields: Vec<(Vec<u8>, Vec<u8>)>,
        payload_field: &str,
    ) -> Self {
        let payload = fields
            .iter()
            .position(|(name, _)| name == payload_field.as_bytes());
        let fields = fields.into();
        Self {
            tag,
            fields,
            payload,
        }
    }

    /// Returns the id of the entry, such as `1526919030474-55`. It is kept when the entry comes back.
    pub fn id(&self) -> &str {
        self.tag.id()
    }

    /// Returns the value of the payload field, if the entry has one.
    pub fn payload(&self) -> Option<&[u8]> {
        self.payload.map(|index| &*self.fields[index].1)
    }

    /// Returns the value of the first field that is called `name`.
    pub fn field(&self, name: impl AsRef<[u8]>) -> Option<&[u8]> {
        let name = name.as_ref();
        let mut fields = self.fields();
        fields.find_map(|(field, value)| (field == name).then_some(value))
    }

    /// Returns all fields, in the order in which they were added.
    pub fn fields(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.fields.iter().map(|(name, value)| (&**name, &**value))
    }
}

impl AsRef<[u8]> for Delivery {
    fn as_ref(&self) -> &[u8] {
        self.payload().unwrap_or_default()
    }
}

impl Job for Delivery {
    type Tag = DeliveryTag;

    fn tag(&self) -> DeliveryTag {
        self.tag.clone()
    }
}

/// What a [`Delivery`] is settled with.
///
/// What each verdict does is in the [module's docs](super#verdicts). A settlement that fails gives
/// the tag back if the server refused it as a whole (it is loading its data, it is out of memory,
/// it is a replica, its master is down): nothing was done then. After any other failure it is not
/// known whether it took effect, and a repeat could hit the entry's next delivery.
#[derive(Clone)]
pub struct DeliveryTag {
    shared: Arc<Shared>,
}

struct Shared {
    id: DeliveryId,
    settled: AtomicBool,
    channel: Arc<Channel>,
}

impl DeliveryTag {
    pub(super) fn new(id: DeliveryId, channel: Arc<Channel>) -> Self {
        let shared = Arc::new(Shared {
            id,
            settled: AtomicBool::new(false),
            channel,
        });
        Self { shared }
    }

    /// Returns the id of the entry.
    pub fn id(&self) -> &str {
        &self.shared.id.entry
    }
}

impl Settle for DeliveryTag {
    type Error = DeliveryError;
    type Future = Pin<Box<dyn Future<Output = Result<(), Unsettled<Self, DeliveryError>>> + Send>>;

    fn settle(self, verdict: Verdict, reason: Reason) -> Self::Future {
        // Taken here and not in the future, so that the call alone uses the tag up.
        let first = !self.shared.settled.swap(true, Ordering::AcqRel);
        Box::pin(async move {
            if !first {
                return Err(Unsettled::last(DeliveryError::AlreadySettled));
            }
            let Shared {
                id,
                settled,
                channel,
            } = &*self.shared;
            match channel.settle(id, verdict, reason).await {
                Ok(()) => Ok(()),
                Err(Failed { error, may_repeat }) if may_repeat => {
                    settled.store(false, Ordering::Release);
                    Err(Unsettled::again(self, error))
                }
                Err(Failed { error, .. }) => Err(Unsettled::last(error)),
            }
        })
    }

    async fn keep_alive(&self) -> Result<Lease, DeliveryError> {
        let Shared { id, channel, .. } = &*self.shared;
        channel.keep_alive(id).await
    }

    fn deliveries(&self) -> Option<u32> {
        Some(self.shared.id.count)
    }

    fn capabilities(&self) -> Capabilities {
        let all = Capabilities::none().free_release().delay().keep_alive();
        match &self.shared.channel.keys.dead {
            Some(_) => all.dead_letter(),
            None => all,
        }
    }
}

impl fmt::Debug for DeliveryTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeliveryTag")
            .field("stream", &self.shared.channel.keys.stream)
            .field("id", &self.shared.id.entry)
            .field("deliveries", &self.shared.id.count)
            .finish()
    }
}
