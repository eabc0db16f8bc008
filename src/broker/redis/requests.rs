//! Requests of a [`Reader`] to the server.

use std::time::Duration;

use ::redis::{RedisError, cmd};

use super::{
    link::millis,
    reader::Reader,
    reply::{Entry, Past, counted_entries, cursor_and_entries, new_entries},
    scripts,
};

impl Reader {
    pub(super) async fn read_new(
        &mut self,
        limit: usize,
        block: Duration,
        claims: bool,
    ) -> Result<Vec<Entry>, RedisError> {
        let mut read = cmd("XREADGROUP");
        read.arg("GROUP")
            .arg(&self.channel.link.group)
            .arg(&self.channel.link.consumer)
            .arg("COUNT")
            .arg(limit);
        // A 0 would block for ever.
        if !block.is_zero() {
            read.arg("BLOCK").arg(millis(block));
        }
        if claims {
            read.arg("CLAIM").arg(millis(self.timing.min_idle));
        }
        read.arg("STREAMS")
            .arg(&self.channel.link.keys.stream)
            .arg(">");
        new_entries(read.query_async(&mut self.connection).await?)
    }

    pub(super) async fn take_due(&mut self, limit: usize) -> Result<Vec<Entry>, RedisError> {
        let mut script = scripts::TAKE_DUE.prepare_invoke();
        script
            .key(&self.channel.link.keys.stream)
            .key(&self.channel.link.keys.delayed)
            .arg(&self.channel.link.group)
            .arg(&self.channel.link.consumer)
            .arg(limit);
        let mut due = counted_entries(script.invoke_async(&mut self.connection).await?)?;
        due.iter_mut()
            .for_each(|entry| entry.past = Past::GivenBack);
        Ok(due)
    }

    pub(super) async fn reclaim(&mut self, limit: usize) -> Result<Vec<Entry>, RedisError> {
        let forget_after = self.timing.min_idle.saturating_mul(10);
        let forget_after = forget_after.max(Duration::from_secs(3_600));
        let mut script = scripts::RECLAIM.prepare_invoke();
        script
            .key(&self.channel.link.keys.stream)
            .arg(&self.channel.link.group)
            .arg(&self.channel.link.consumer)
            .arg(limit)
            .arg(millis(self.timing.min_idle))
            .arg(&self.cursor)
            .arg(millis(forget_after));
        let reply = script.invoke_async(&mut self.connection).await?;
        let (cursor, entries) = cursor_and_entries(reply)?;
        self.cursor = cursor;
        Ok(entries)
    }

    /// Gives back all entries of this consumer.
    pub(super) async fn give_back(&self) -> Result<(), RedisError> {
        let mut script = scripts::GIVE_BACK.prepare_invoke();
        script
            .key(&self.channel.link.keys.stream)
            .key(&self.channel.link.keys.delayed)
            .arg(&self.channel.link.group)
            .arg(&self.channel.link.consumer)
            .arg(self.channel.link.newer.nack)
            .arg(&self.unseen);
        // It follows the acks that are still open on this connection.
        self.channel.link.invoke(&script).await
    }
}
