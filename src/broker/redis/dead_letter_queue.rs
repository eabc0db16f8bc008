//! [`DeadLetterQueue`], to list dead letters, to move them back and to delete them.

use std::{
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use ::redis::{RedisError, Value, aio::ConnectionLike, cmd, pipe};
use futures_util::future::join_all;

use super::{
    dead_letter::OURS,
    reply::{Entry, entries},
    scripts,
};
use crate::broker::{
    dead_letter::{DELIVERIES, DESTINATION, OUTCOME_KIND, OUTCOME_MESSAGE, OUTCOME_TIME, REDRIVEN},
    dead_letters::{DeadLetter, DeadLetters, Fate, Moved, Pass, Taken},
};

/// Dead letters of a stream of Redis or Valkey, as [`DeadLetters`].
///
/// A letter is moved by one script, as a whole or not at all. So no job is ever there twice, even if the process is
/// killed. (The exception is an entry of more than 3 000 fields, which a transaction moves: if two runs move it at the
/// same time, it is there twice.) The destination must exist: no stream is created.
///
/// `C` is a connection of the client: a [`MultiplexedConnection`](::redis::aio::MultiplexedConnection), or one of the
/// client's cluster or of its connection manager. It needs the commands `XRANGE`, `XREVRANGE`, `XLEN`, `XADD`, `XDEL`
/// and `EVALSHA` (or `EVAL`), and `EXISTS`, `MULTI` and `EXEC` for large entries.
///
/// ```no_run
/// use tower_sentinel::broker::{
///     dead_letters::{DeadLetters, Filter, Redrive},
///     redis::{ConsumerGroup, DeadLetterQueue, redis::Client},
/// };
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let client = Client::open("redis://127.0.0.1:6379")?;
/// let connection = client.get_multiplexed_async_connection().await?;
/// let group = ConsumerGroup::new("jobs", "workers");
/// let key = group.dead_letter_key().expect("it keeps dead letters"); // `{jobs}:workers:dead`
/// let dead = DeadLetterQueue::new(connection, key);
/// for letter in dead.list(&Filter::all(), 20).await? {
///     println!("{:?} from {:?}: {:?}", letter.kind, letter.destination, letter.message);
/// }
/// let tally = Redrive::new(Filter::all().kind("timed_out")).rate(50.0).run(&dead).await?;
/// println!("{} moved, {} left", tally.moved, tally.left());
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct DeadLetterQueue<C> {
    connection: C,
    key: String,
}

impl<C> DeadLetterQueue<C> {
    /// Creates it for the stream `key`, in which the dead letters lie:
    /// [`ConsumerGroup::dead_letter_key`](super::ConsumerGroup::dead_letter_key).
    ///
    /// A stream that does not exist has no letters.
    pub fn new(connection: C, key: impl Into<String>) -> Self {
        let key = key.into();
        Self { connection, key }
    }
}

impl<C> fmt::Debug for DeadLetterQueue<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeadLetterQueue")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

impl<C: ConnectionLike + Clone + Send + Sync> DeadLetters for DeadLetterQueue<C> {
    type Pass = DeadLetterPass<C>;

    async fn pass(&self) -> Result<DeadLetterPass<C>, RedisError> {
        let mut connection = self.connection.clone();
        let mut total = cmd("XLEN");
        let total = total.arg(&self.key).query_async(&mut connection).await?;
        let mut last = cmd("XREVRANGE");
        last.arg(&self.key).arg("+").arg("-").arg("COUNT").arg(1);
        let last = entries(last.query_async(&mut connection).await?)?;
        Ok(DeadLetterPass {
            connection,
            key: self.key.clone(),
            total,
            next: "-".to_owned(),
            last: last.into_iter().next().map(|entry| entry.id),
        })
    }
}

/// Pass over a [`DeadLetterQueue`], by the ids of its entries.
pub struct DeadLetterPass<C> {
    connection: C,
    key: String,
    total: u64,
    /// Beginning of the next range.
    next: String,
    /// Last id at the beginning; `None` if there was none, and at the end.
    last: Option<String>,
}

/// Handle to a dead letter in a stream.
#[derive(Clone, Debug)]
pub struct DeadLetterKey {
    id: String,
}

impl<C: ConnectionLike + Clone + Send + Sync> DeadLetterPass<C> {
    async fn move_one(&self, taken: &Taken<DeadLetterKey>) -> Result<Fate, RedisError> {
        let Some(destination) = &taken.letter.destination else {
            return Ok(Fate::Unroutable);
        };
        let id = &taken.key.id;
        let times = taken.letter.redriven.saturating_add(1);
        let mut script = scripts::REDRIVE.prepare_invoke();
        script.key(&self.key).key(destination).arg(id).arg(times);
        script.arg(&OURS[..]).arg(REDRIVEN);
        let mut connection = self.connection.clone();
        let reply: String = script.invoke_async(&mut connection).await?;
        match &*reply {
            "moved" => Ok(Fate::Moved),
            "nowhere" => Ok(Fate::Unroutable),
            "large" => self.move_large(id, destination, times).await,
            _ => Ok(Fate::Gone),
        }
    }

    /// Moves an entry that is too large for a script.
    async fn move_large(
        &self,
        id: &str,
        destination: &str,
        times: u32,
    ) -> Result<Fate, RedisError> {
        let mut connection = self.connection.clone();
        let mut exists = cmd("EXISTS");
        exists.arg(destination);
        if !exists.query_async::<bool>(&mut connection).await? {
            return Ok(Fate::Unroutable);
        }
        let mut range = cmd("XRANGE");
        range.arg(&self.key).arg(id).arg(id);
        let found = entries(range.query_async(&mut connection).await?)?;
        let Some(entry) = found.into_iter().next() else {
            return Ok(Fate::Gone);
        };
        let mut add = cmd("XADD");
        add.arg(destination).arg("*");
        for (name, value) in &entry.fields {
            let is = |other: &&str| other.as_bytes() == name;
            if !(OURS.iter().any(is) || is(&REDRIVEN)) {
                add.arg(name).arg(value);
            }
        }
        add.arg(REDRIVEN).arg(times);
        let mut both = pipe();
        both.atomic().add_command(add);
        both.cmd("XDEL").arg(&self.key).arg(id);
        let _: (Value, Value) = both.query_async(&mut connection).await?;
        Ok(Fate::Moved)
    }
}

impl<C: ConnectionLike + Clone + Send + Sync> Pass for DeadLetterPass<C> {
    type Key = DeadLetterKey;
    type Error = RedisError;

    fn total(&self) -> u64 {
        self.total
    }

    async fn next(&mut self, limit: usize) -> Result<Vec<Taken<DeadLetterKey>>, RedisError> {
        let Some(last) = &self.last else {
            return Ok(Vec::new());
        };
        let mut range = cmd("XRANGE");
        range.arg(&self.key).arg(&self.next).arg(last);
        range.arg("COUNT").arg(limit);
        let found = entries(range.query_async(&mut self.connection).await?)?;
        match found.last() {
            Some(entry) => self.next = format!("({}", entry.id),
            None => self.last = None,
        }
        Ok(found.into_iter().map(read).collect())
    }

    async fn redrive(&mut self, letters: Vec<Taken<DeadLetterKey>>) -> Moved<RedisError> {
        let moving = letters.iter().map(|taken| self.move_one(taken));
        let mut error = None;
        let fates = join_all(moving).await.into_iter().map(|moved| {
            moved.unwrap_or_else(|failed| {
                error = Some(failed);
                Fate::Unconfirmed
            })
        });
        let fates = fates.collect();
        Moved { fates, error }
    }

    async fn delete(&mut self, letters: Vec<Taken<DeadLetterKey>>) -> Result<u64, RedisError> {
        if letters.is_empty() {
            return Ok(0);
        }
        let mut delete = cmd("XDEL");
        delete.arg(&self.key);
        for taken in &letters {
            delete.arg(&taken.key.id);
        }
        delete.query_async(&mut self.connection).await
    }

    async fn put_back(&mut self, _: Vec<Taken<DeadLetterKey>>) -> Result<(), RedisError> {
        Ok(())
    }

    async fn close(self) -> Result<(), RedisError> {
        Ok(())
    }
}

impl<C> fmt::Debug for DeadLetterPass<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeadLetterPass")
            .field("key", &self.key)
            .field("total", &self.total)
            .field("next", &self.next)
            .field("last", &self.last)
            .finish_non_exhaustive()
    }
}

pub(super) fn read(entry: Entry) -> Taken<DeadLetterKey> {
    let Entry { id, fields, .. } = entry;
    let field = |name: &str| {
        let field = fields.iter().find(|(key, _)| key == name.as_bytes());
        field.and_then(|(_, value)| std::str::from_utf8(value).ok())
    };
    let text = |name| field(name).map(str::to_owned);
    let number = |name| field(name)?.parse().ok();
    let mut letter = DeadLetter::new();
    letter.kind = text(OUTCOME_KIND);
    letter.message = text(OUTCOME_MESSAGE);
    // An id begins with the time of the entry.
    let millis = field(OUTCOME_TIME).or(id.split('-').next());
    letter.time = millis.and_then(at);
    letter.deliveries = number(DELIVERIES);
    letter.destination = text(DESTINATION);
    letter.redriven = number(REDRIVEN).unwrap_or(0);
    letter.id = Some(id.clone());
    let key = DeadLetterKey { id };
    Taken { letter, key }
}

fn at(millis: &str) -> Option<SystemTime> {
    UNIX_EPOCH.checked_add(Duration::from_millis(millis.parse().ok()?))
}
