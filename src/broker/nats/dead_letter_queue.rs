//! [`DeadLetterQueue`], to list dead letters, to move them back and to delete them.

use std::{
    collections::HashMap,
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use async_nats::{
    HeaderMap, HeaderValue, header,
    jetstream::{
        Context,
        message::{PublishMessage, StreamMessage},
        stream::RawMessage,
    },
};
use futures_util::future::join_all;

use super::{
    dead_letter::is_of_nats,
    dead_letter_error::DeadLetterError,
    dead_letter_requests::Requests,
    fetched::{MESSAGE_ID, first},
};
use crate::broker::{
    dead_letter::{
        DELIVERIES, DESTINATION, OUTCOME_KIND, OUTCOME_MESSAGE, OUTCOME_TIME, REDRIVEN, SUSPECT_OF,
    },
    dead_letters::{DeadLetter, DeadLetters, Fate, Moved, Pass, Taken},
};

/// Headers of a dead letter that a job does not have.
pub(super) const OURS: [&str; 6] = [
    OUTCOME_KIND,
    OUTCOME_MESSAGE,
    OUTCOME_TIME,
    DELIVERIES,
    DESTINATION,
    SUSPECT_OF,
];

/// Dead letters of a subject of JetStream, as [`DeadLetters`].
///
/// The letters stay in their stream until they are moved or deleted. If a run is killed between the two, the next run
/// publishes the same `Nats-Msg-Id` again, and the stream of the jobs drops that copy within its `duplicate_window`.
///
/// ```no_run
/// use tower_sentinel::broker::{
///     dead_letters::{DeadLetters, Filter, Redrive},
///     nats::{DeadLetterQueue, async_nats::jetstream, connect},
/// };
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let context = jetstream::new(connect("nats://127.0.0.1:4222").await?);
/// let dead = DeadLetterQueue::new(&context, "dead.jobs");
/// for letter in dead.list(&Filter::all(), 20).await? {
///     println!("{:?} from {:?}: {:?}", letter.kind, letter.destination, letter.message);
/// }
/// let tally = Redrive::new(Filter::all().kind("timed_out")).rate(50.0).run(&dead).await?;
/// println!("{} moved, {} left", tally.moved, tally.left());
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct DeadLetterQueue {
    context: Context,
    subject: String,
}

impl DeadLetterQueue {
    /// Creates it for the subject that dead letters are published to, as in
    /// [`Pull::dead_letter`](super::Pull::dead_letter). It may have wildcards.
    pub fn new(context: &Context, subject: impl Into<String>) -> Self {
        Self {
            context: context.clone(),
            subject: subject.into(),
        }
    }
}

impl fmt::Debug for DeadLetterQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeadLetterQueue")
            .field("subject", &self.subject)
            .finish_non_exhaustive()
    }
}

impl DeadLetters for DeadLetterQueue {
    type Pass = DeadLetterPass;

    async fn pass(&self) -> Result<DeadLetterPass, DeadLetterError> {
        let requests = Requests::new(&self.context);
        let Some(stream) = requests.stream_of(&self.subject).await? else {
            return Err(DeadLetterError::NoStream {
                subject: self.subject.clone(),
            });
        };
        let state = requests.state(&stream, &self.subject).await?;
        Ok(DeadLetterPass {
            requests,
            subject: self.subject.clone(),
            stream,
            can_delete: state.can_delete,
            total: state.messages,
            next: 1,
            last: state.last,
            destinations: HashMap::new(),
        })
    }
}

/// Pass over a [`DeadLetterQueue`], by the sequence of its stream.
pub struct DeadLetterPass {
    requests: Requests,
    subject: String,
    stream: String,
    can_delete: bool,
    total: u64,
    /// Sequence from which the next letter is searched.
    next: u64,
    /// Last sequence at the beginning.
    last: u64,
    /// Subjects to which letters are moved, and whether a stream stores them.
    destinations: HashMap<String, bool>,
}

/// Handle to a dead letter in a stream.
pub struct DeadLetterKey {
    sequence: u64,
    /// `None` if its headers can't be parsed.
    pub(super) message: Option<StreamMessage>,
}

impl fmt::Debug for DeadLetterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DeadLetterKey")
            .field(&self.sequence)
            .finish()
    }
}

impl DeadLetterPass {
    /// Finds out whether a stream stores `destination`.
    ///
    /// A publish would find that out, too, but not tell it from an election for seconds.
    async fn look_up(&mut self, destination: &str) -> Result<(), DeadLetterError> {
        if self.destinations.contains_key(destination) {
            return Ok(());
        }
        let is_wild = destination
            .split('.')
            .any(|token| matches!(token, "*" | ">"));
        let exists = !is_wild && self.requests.stream_of(destination).await?.is_some();
        self.destinations.insert(destination.to_owned(), exists);
        Ok(())
    }

    /// Publishes a letter to its destination, and deletes it once that is confirmed.
    async fn move_one(&self, taken: &Taken<DeadLetterKey>) -> Result<Fate, DeadLetterError> {
        let destination = taken.letter.destination.as_ref();
        let destination = destination.filter(|it| self.destinations.get(*it) == Some(&true));
        let (Some(destination), Some(message)) = (destination, &taken.key.message) else {
            return Ok(Fate::Unroutable);
        };
        let mut headers = own_headers(&message.headers);
        let times = taken.letter.redriven.saturating_add(1);
        headers.insert(REDRIVEN, times.to_string());
        // A stream that was made anew counts from one again, so the time is part of the name.
        let sequence = taken.key.sequence;
        let id = format!("redriven:{}:{sequence}:{}", self.stream, message.time);
        headers.insert(header::NATS_MESSAGE_ID, id);
        let publish = PublishMessage::build().payload(message.payload.clone());
        let publish = publish.headers(headers);
        let was_there = self.requests.store(destination, publish).await?;
        let deleted = self.requests.delete(&self.stream, sequence).await?;
        // Another run has moved it if neither is ours.
        Ok(match was_there && !deleted {
            true => Fate::Gone,
            false => Fate::Moved,
        })
    }

    fn check_deletes(&self) -> Result<(), DeadLetterError> {
        match self.can_delete {
            true => Ok(()),
            false => Err(DeadLetterError::NoDeletes {
                stream: self.stream.clone(),
            }),
        }
    }

    async fn move_all(
        &mut self,
        letters: &[Taken<DeadLetterKey>],
    ) -> Result<Vec<Result<Fate, DeadLetterError>>, DeadLetterError> {
        self.check_deletes()?;
        for taken in letters {
            if let Some(destination) = &taken.letter.destination {
                self.look_up(destination).await?;
            }
        }
        Ok(join_all(letters.iter().map(|taken| self.move_one(taken))).await)
    }
}

impl Pass for DeadLetterPass {
    type Key = DeadLetterKey;
    type Error = DeadLetterError;

    fn total(&self) -> u64 {
        self.total
    }

    async fn next(&mut self, limit: usize) -> Result<Vec<Taken<DeadLetterKey>>, DeadLetterError> {
        let mut taken = Vec::new();
        while taken.len() < limit && self.next <= self.last {
            let found = self.requests.get(&self.stream, self.next, &self.subject);
            let found = found.await?.filter(|raw| raw.sequence <= self.last);
            let Some(raw) = found else {
                self.next = self.last + 1;
                break;
            };
            self.next = raw.sequence + 1;
            taken.push(read(raw));
        }
        Ok(taken)
    }

    async fn redrive(&mut self, letters: Vec<Taken<DeadLetterKey>>) -> Moved<DeadLetterError> {
        let mut error = None;
        let fates = match self.move_all(&letters).await {
            Ok(moved) => moved
                .into_iter()
                .map(|moved| {
                    moved.unwrap_or_else(|failed| {
                        error = Some(failed);
                        Fate::Unconfirmed
                    })
                })
                .collect(),
            Err(failed) => {
                error = Some(failed);
                vec![Fate::Unconfirmed; letters.len()]
            }
        };
        Moved { fates, error }
    }

    async fn delete(&mut self, letters: Vec<Taken<DeadLetterKey>>) -> Result<u64, DeadLetterError> {
        self.check_deletes()?;
        let deleting = letters.iter().map(|taken| {
            let sequence = taken.key.sequence;
            self.requests.delete(&self.stream, sequence)
        });
        let mut number = 0;
        for deleted in join_all(deleting).await {
            number += u64::from(deleted?);
        }
        Ok(number)
    }

    async fn put_back(&mut self, _: Vec<Taken<DeadLetterKey>>) -> Result<(), DeadLetterError> {
        Ok(())
    }

    async fn close(self) -> Result<(), DeadLetterError> {
        Ok(())
    }
}

impl fmt::Debug for DeadLetterPass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeadLetterPass")
            .field("stream", &self.stream)
            .field("subject", &self.subject)
            .field("total", &self.total)
            .field("next", &self.next)
            .field("last", &self.last)
            .finish_non_exhaustive()
    }
}

pub(super) fn read(raw: RawMessage) -> Taken<DeadLetterKey> {
    let (sequence, time) = (raw.sequence, raw.time);
    let message = StreamMessage::try_from(raw).ok();
    let mut letter = DeadLetter::new();
    letter.id = Some(sequence.to_string());
    letter.time = Some(time.into());
    if let Some(message) = &message {
        describe(&mut letter, &message.headers);
    }
    let key = DeadLetterKey { sequence, message };
    Taken { letter, key }
}

/// Adds what the headers say.
pub(super) fn describe(letter: &mut DeadLetter, headers: &HeaderMap) {
    let text = |name| first(headers, name).map(str::to_owned);
    let number = |name| first(headers, name)?.parse().ok();
    letter.kind = text(OUTCOME_KIND);
    letter.message = text(OUTCOME_MESSAGE);
    letter.time = rejected_at(headers).or(letter.time);
    letter.deliveries = number(DELIVERIES);
    letter.destination = text(DESTINATION);
    letter.redriven = number(REDRIVEN).unwrap_or(0);
}

fn rejected_at(headers: &HeaderMap) -> Option<SystemTime> {
    let millis = first(headers, OUTCOME_TIME)?.parse().ok()?;
    UNIX_EPOCH.checked_add(Duration::from_millis(millis))
}

/// Returns the job's own headers. Its first id stays in a header of another name: the stream may still know it, and
/// would drop the job as a duplicate.
pub(super) fn own_headers(letter: &HeaderMap) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, values) in letter.iter() {
        let text: &str = name.as_ref();
        let is_ours = OURS.iter().any(|ours| text.eq_ignore_ascii_case(ours));
        if is_ours || is_of_nats(text) {
            continue;
        }
        for value in values {
            headers.append(name.clone(), value.clone());
        }
    }
    // One that somebody else wrote has the id of its publish.
    let id = first(letter, "Nats-Msg-Id").filter(|_| first(letter, OUTCOME_KIND).is_none());
    if let Some(id) = id.filter(|_| first(letter, MESSAGE_ID).is_none()) {
        headers.insert(MESSAGE_ID, HeaderValue::from(id));
    }
    headers
}
