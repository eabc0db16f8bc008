//! [`Requests`] about dead letters, which are sent again while a cluster elects a leader.

use std::{collections::HashMap, future::Future};

use async_nats::{
    Client, connection,
    jetstream::{
        Context, ErrorCode, message::PublishMessage, response::Response, stream::RawMessage,
    },
};
use serde::{Deserialize, Serialize};

use super::{dead_letter_error::DeadLetterError, miss::Missed, repeat};

const UNCONFIRMED: DeadLetterError = DeadLetterError::Unconfirmed {
    limit: repeat::LIMIT,
};

/// Requests of one pass.
pub(super) struct Requests {
    context: Context,
    client: Client,
}

/// State of a stream with dead letters.
pub(super) struct State {
    /// `false` if its configuration forbids deletes.
    pub(super) can_delete: bool,
    /// Number of messages of the subject.
    pub(super) messages: u64,
    /// Sequence of the last message of any subject.
    pub(super) last: u64,
}

#[derive(Serialize)]
struct Subject<'a> {
    subject: &'a str,
}

#[derive(Deserialize)]
struct Names {
    streams: Option<Vec<String>>,
}

#[derive(Serialize)]
struct Subjects<'a> {
    subjects_filter: &'a str,
    offset: usize,
}

#[derive(Deserialize)]
struct Info {
    config: Config,
    state: Counts,
    /// Number of subjects, of which a response has a part.
    #[serde(default)]
    total: usize,
}

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    deny_delete: bool,
    #[serde(default)]
    sealed: bool,
}

#[derive(Deserialize)]
struct Counts {
    last_seq: u64,
    subjects: Option<HashMap<String, u64>>,
}

#[derive(Serialize)]
struct Next<'a> {
    seq: u64,
    next_by_subj: &'a str,
}

#[derive(Deserialize)]
struct Got {
    message: RawMessage,
}

#[derive(Serialize)]
struct Delete {
    seq: u64,
    /// Overwriting the message takes longer, and serves no one here.
    no_erase: bool,
}

#[derive(Serialize)]
struct Exact {
    seq: u64,
}

#[derive(Deserialize)]
struct Deleted {
    success: bool,
}

impl Requests {
    pub(super) fn new(context: &Context) -> Self {
        Self {
            client: context.client(),
            context: context.clone(),
        }
    }

    /// Returns the name of the stream that stores `subject`, if there is one.
    pub(super) async fn stream_of(&self, subject: &str) -> Result<Option<String>, DeadLetterError> {
        let subject = Subject { subject };
        match self.request::<Names>("STREAM.NAMES", &subject).await? {
            Response::Ok(names) => Ok(names.streams.unwrap_or_default().into_iter().next()),
            Response::Err { error } => Err(DeadLetterError::Refused(error)),
        }
    }

    pub(super) async fn state(
        &self,
        stream: &str,
        subject: &str,
    ) -> Result<State, DeadLetterError> {
        let request = format!("STREAM.INFO.{stream}");
        let mut messages = 0;
        let mut offset = 0;
        loop {
            let subjects = Subjects {
                subjects_filter: subject,
                offset,
            };
            let info = match self.request::<Info>(&request, &subjects).await? {
                Response::Ok(info) => info,
                Response::Err { error } => return Err(DeadLetterError::Refused(error)),
            };
            let counts = info.state.subjects.unwrap_or_default();
            messages += counts.values().sum::<u64>();
            offset += counts.len();
            if counts.is_empty() || offset >= info.total {
                return Ok(State {
                    can_delete: !(info.config.deny_delete || info.config.sealed),
                    messages,
                    last: info.state.last_seq,
                });
            }
        }
    }

    /// Repeats an idempotent request until it has a result.
    async fn ask<T, E, F>(&self, request: impl FnMut() -> F) -> Result<T, Option<E>>
    where
        F: Future<Output = Result<T, E>>,
        E: Missed,
    {
        let is_connected = || self.client.connection_state() == connection::State::Connected;
        repeat::repeat(is_connected, repeat::LIMIT, true, request).await
    }

    async fn request<T: for<'de> Deserialize<'de>>(
        &self,
        subject: &str,
        request: &impl Serialize,
    ) -> Result<Response<T>, DeadLetterError> {
        let asked = self.ask(|| self.context.request(subject.to_owned(), request));
        asked.await.map_err(|error| match error {
            Some(error) => DeadLetterError::Request(error.into()),
            None => UNCONFIRMED,
        })
    }

    /// Returns the first message of `subject` from `sequence` on.
    pub(super) async fn get(
        &self,
        stream: &str,
        sequence: u64,
        subject: &str,
    ) -> Result<Option<RawMessage>, DeadLetterError> {
        let next = Next {
            seq: sequence,
            next_by_subj: subject,
        };
        self.got(stream, &next).await
    }

    async fn got(
        &self,
        stream: &str,
        request: &impl Serialize,
    ) -> Result<Option<RawMessage>, DeadLetterError> {
        let subject = format!("STREAM.MSG.GET.{stream}");
        match self.request::<Got>(&subject, request).await? {
            Response::Ok(got) => Ok(Some(got.message)),
            Response::Err { error } if error.error_code() == ErrorCode::NO_MESSAGE_FOUND => {
                Ok(None)
            }
            Response::Err { error } => Err(DeadLetterError::Refused(error)),
        }
    }

    /// Publishes a message, and returns whether its stream had it already.
    ///
    /// It may be sent more than once, so its headers have a `Nats-Msg-Id`.
    pub(super) async fn store(
        &self,
        subject: &str,
        message: PublishMessage,
    ) -> Result<bool, DeadLetterError> {
        let stored = self.ask(|| {
            let sending = self
                .context
                .send_publish(subject.to_owned(), message.clone());
            async { sending.await?.await }
        });
        match stored.await {
            Ok(ack) => Ok(ack.duplicate),
            Err(Some(error)) => Err(DeadLetterError::Publish(error.into())),
            Err(None) => Err(UNCONFIRMED),
        }
    }

    /// Deletes a message, and returns whether it was there.
    pub(super) async fn delete(&self, stream: &str, seq: u64) -> Result<bool, DeadLetterError> {
        let subject = format!("STREAM.MSG.DELETE.{stream}");
        let delete = Delete {
            seq,
            no_erase: true,
        };
        match self.request::<Deleted>(&subject, &delete).await? {
            Response::Ok(deleted) => Ok(deleted.success),
            // Servers have several codes for a message that is gone.
            Response::Err { error } => match self.got(stream, &Exact { seq }).await? {
                None => Ok(false),
                Some(_) => Err(DeadLetterError::Refused(error)),
            },
        }
    }
}
