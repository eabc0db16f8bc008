//! Dead letters: copies of rejected entries.

use std::time::Duration;

use ::redis::{RedisError, Value, cmd};

use super::{
    link::Link,
    reply::{DeliveryId, Reply},
    scripts,
};
use crate::{
    broker::dead_letter::{
        DELIVERIES, DESTINATION, OUTCOME_KIND, OUTCOME_MESSAGE, OUTCOME_TIME, cut,
    },
    settle::Reason,
};

pub(super) const ENTRY_ID: &str = "x-entry-id";
/// Fields that a dead letter has once, even if the entry had them, too.
pub(super) const OURS: [&str; 6] = [
    OUTCOME_KIND,
    OUTCOME_MESSAGE,
    OUTCOME_TIME,
    DELIVERIES,
    DESTINATION,
    ENTRY_ID,
];

impl Link {
    /// Copies the entry to the stream `dead`, acks it, and frees the delivery's place.
    ///
    /// Returns `None` for an entry that is too large for a script: it is copied, and still has to be acked.
    pub(super) async fn dead_letter(
        &self,
        dead: &str,
        id: &DeliveryId,
        fields: &[(Vec<u8>, Vec<u8>)],
        reason: &Reason,
    ) -> Result<Option<Reply>, RedisError> {
        let kind = reason.kind.as_str();
        let message = reason.message.as_deref();
        let message = message.map(|message| cut(message, usize::MAX));
        let mut script = scripts::DEAD_LETTER.prepare_invoke();
        self.owned(&mut script, id)
            .arg(self.delete_command())
            .arg(kind);
        if let Some(message) = message {
            script.arg(message);
        }
        let reply: String = self.invoke(&script).await?;
        if reply == "large" {
            self.copy(dead, id, fields, kind, message).await?;
            return Ok(None);
        }
        self.free.add_permits(1);
        Ok(Some(self.replicated(Reply::from(&*reply)).await))
    }

    /// Writes a dead letter that is too large for a script.
    async fn copy(
        &self,
        dead: &str,
        id: &DeliveryId,
        fields: &[(Vec<u8>, Vec<u8>)],
        kind: &str,
        message: Option<&str>,
    ) -> Result<(), RedisError> {
        let (seconds, micros): (u64, u64) = self.query(&cmd("TIME")).await?;
        let time = Duration::from_secs(seconds) + Duration::from_micros(micros);
        let mut add = cmd("XADD");
        add.arg(dead).arg("*");
        for (name, value) in fields {
            if !OURS.iter().any(|ours| ours.as_bytes() == name) {
                add.arg(name).arg(value);
            }
        }
        add.arg(OUTCOME_KIND).arg(kind);
        if let Some(message) = message {
            add.arg(OUTCOME_MESSAGE).arg(message);
        }
        add.arg(OUTCOME_TIME).arg(time.as_millis().to_string());
        add.arg(DELIVERIES).arg(id.count);
        add.arg(DESTINATION).arg(&self.keys.stream);
        add.arg(ENTRY_ID).arg(&id.entry);
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
