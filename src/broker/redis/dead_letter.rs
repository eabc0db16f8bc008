//! Dead letters and suspects: copies of rejected entries.

use std::time::Duration;

use ::redis::{RedisError, Value, cmd};

use super::{
    link::Link,
    reply::{DeliveryId, Reply},
    scripts,
};
use crate::{
    broker::dead_letter::{
        DELIVERIES, DESTINATION, OUTCOME_KIND, OUTCOME_MESSAGE, OUTCOME_TIME, SUSPECT_OF, cut,
    },
    settle::Reason,
};

pub(super) const ENTRY_ID: &str = "x-entry-id";
/// Fields that a copy has once, even if the entry had them, too.
pub(super) const OURS: [&str; 7] = [
    OUTCOME_KIND,
    OUTCOME_MESSAGE,
    OUTCOME_TIME,
    DELIVERIES,
    DESTINATION,
    ENTRY_ID,
    SUSPECT_OF,
];

/// A rejected entry, which becomes a dead letter or goes to the suspects.
pub(super) struct Rejected<'a> {
    pub(super) id: &'a DeliveryId,
    pub(super) fields: &'a [(Vec<u8>, Vec<u8>)],
    pub(super) reason: &'a Reason,
    pub(super) is_suspect: bool,
}

impl Rejected<'_> {
    fn message(&self) -> Option<&str> {
        let message = self.reason.message.as_deref();
        message.map(|message| cut(message, usize::MAX))
    }
}

impl Link {
    /// Copies the entry to the stream `destination`, acks it, and frees the delivery's place.
    ///
    /// Returns `None` for an entry that is too large for a script: it is copied, and still has to be acked.
    pub(super) async fn reject(
        &self,
        destination: &str,
        rejected: Rejected<'_>,
    ) -> Result<Option<Reply>, RedisError> {
        let mut script = scripts::DEAD_LETTER.prepare_invoke();
        self.owned(&mut script, rejected.id)
            .arg(self.delete_command())
            .arg(rejected.reason.kind.as_str())
            .arg(rejected.is_suspect);
        if rejected.is_suspect {
            script.key(destination);
        }
        if let Some(message) = rejected.message() {
            script.arg(message);
        }
        let reply: String = self.invoke(&script).await?;
        if reply == "large" {
            self.copy(destination, rejected).await?;
            return Ok(None);
        }
        self.free.add_permits(1);
        Ok(Some(self.replicated(Reply::from(&*reply)).await))
    }

    /// Writes a copy that is too large for a script.
    async fn copy(&self, destination: &str, rejected: Rejected<'_>) -> Result<(), RedisError> {
        let (seconds, micros): (u64, u64) = self.query(&cmd("TIME")).await?;
        let time = Duration::from_secs(seconds) + Duration::from_micros(micros);
        let mut add = cmd("XADD");
        add.arg(destination).arg("*");
        let mut suspect_of = None;
        for (name, value) in rejected.fields {
            if !OURS.iter().any(|ours| ours.as_bytes() == name) {
                add.arg(name).arg(value);
            } else if name == SUSPECT_OF.as_bytes() && !rejected.is_suspect {
                suspect_of = Some(&**value);
            }
        }
        let stream = &self.keys.stream;
        add.arg(OUTCOME_KIND).arg(rejected.reason.kind.as_str());
        if let Some(message) = rejected.message() {
            add.arg(OUTCOME_MESSAGE).arg(message);
        }
        add.arg(OUTCOME_TIME).arg(time.as_millis().to_string());
        add.arg(DELIVERIES).arg(rejected.id.count);
        add.arg(DESTINATION)
            .arg(suspect_of.unwrap_or(stream.as_bytes()));
        add.arg(ENTRY_ID).arg(&rejected.id.entry);
        if rejected.is_suspect {
            add.arg(SUSPECT_OF).arg(stream);
        }
        self.query::<Value>(&add).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::OURS;

    #[test]
    fn the_script_has_the_names_of_the_fields() {
        let script = include_str!("scripts/dead_letter.lua");
        for name in OURS {
            assert!(script.contains(&format!("['{name}'] = true")), "{name}");
            assert!(script.contains(&format!("add('{name}'")), "{name}");
        }
    }
}
