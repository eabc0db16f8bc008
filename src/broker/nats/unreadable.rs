//! Messages whose headers the client can't parse: it closes the connection, or panics.
//!
//! The server stores them as they were published. The search reads them in a form in which headers are text
//! within JSON, which harms no connection.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use async_nats::jetstream::{
    AckKind, ErrorCode,
    consumer::{Info, PullConsumer},
    message::StreamMessage,
    response::Response,
    stream::RawMessage,
};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::{channel::Channel, dead_letter, repeat::repeat};
use crate::{
    outcome::{Outcome, guard},
    settle::Reason,
};

/// Number of messages that are examined at each end of the consumer's delivered ones.
const RANGE: u64 = 500;

/// Greatest number of bytes of payload that are fetched, as base64: they are the cost of a search.
const BYTES: usize = 32 * 1024 * 1024;

/// Time limit of a search.
const SEARCH_LIMIT: Duration = Duration::from_secs(20);

/// Time for which a message without a dead letter is set aside.
const ASIDE: Duration = Duration::from_secs(60 * 60);

/// Search for messages that can't be parsed; nothing is requested while it runs.
#[derive(Default)]
pub(super) struct Search {
    running: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl Search {
    /// Begins the search, unless it runs.
    pub(super) fn begin(&mut self, channel: &Arc<Channel>, consumer: &Arc<PullConsumer>) {
        if self.running.is_none() {
            let searching = search(Arc::clone(channel), Arc::clone(consumer));
            self.running = Some(Box::pin(searching));
        }
    }

    pub(super) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Waits for the end of the search.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(running) = &mut self.running else {
            return Poll::Pending;
        };
        ready!(running.as_mut().poll(cx));
        self.running = None;
        Poll::Ready(())
    }

    pub(super) fn close(&mut self) {
        self.running = None;
    }
}

async fn search(channel: Arc<Channel>, consumer: Arc<PullConsumer>) {
    let searching = async {
        let info = repeat(
            || channel.is_connected(),
            SEARCH_LIMIT,
            true,
            || consumer.get_info(),
        );
        let info = info.await.map_err(explain)?;
        let found = find(&channel, &info).await?;
        for message in &found {
            set_aside(&channel, &info, message).await;
        }
        Ok::<_, String>(found.len())
    };
    let (stream, name) = (&channel.stream, &channel.consumer);
    match timeout(SEARCH_LIMIT, searching).await {
        Ok(Ok(found)) => guard(|| {
            tracing::debug!(
                stream,
                consumer = name,
                found,
                "unreadable messages searched"
            );
        }),
        Ok(Err(error)) => guard(|| {
            tracing::warn!(
                stream,
                consumer = name,
                error,
                "search for unreadable messages failed"
            );
        }),
        Err(_) => guard(|| {
            tracing::warn!(
                stream, consumer = name, limit = ?SEARCH_LIMIT, "search for unreadable messages timed out"
            );
        }),
    }
}

fn explain(error: Option<impl ToString>) -> String {
    let error = error.map(|error| error.to_string());
    error.unwrap_or_else(|| "jetstream does not respond".to_owned())
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

/// Returns the messages that were delivered, may be unacked, and can't be parsed.
///
/// It examines the first and the last of the delivered messages: an old one keeps the ack floor down, and a
/// new one was delivered just now.
async fn find(channel: &Channel, info: &Info) -> Result<Vec<RawMessage>, String> {
    let mut found = Vec::new();
    if info.num_ack_pending == 0 {
        return Ok(found);
    }
    let filter = match info.config.filter_subject.as_str() {
        "" => ">",
        filter => filter,
    };
    let last = info.delivered.stream_sequence;
    let mut seq = info.ack_floor.stream_sequence + 1;
    let mut looked_at = 0;
    let mut bytes = 0;
    let subject = format!("STREAM.MSG.GET.{}", channel.stream);
    while seq <= last {
        let next = Next {
            seq,
            next_by_subj: filter,
        };
        let asking = repeat(
            || channel.is_connected(),
            SEARCH_LIMIT,
            true,
            || channel.context.request(subject.clone(), &next),
        );
        let response: Response<Got> = asking.await.map_err(explain)?;
        let message = match response {
            Response::Ok(got) => got.message,
            Response::Err { error } if error.error_code() == ErrorCode::NO_MESSAGE_FOUND => break,
            Response::Err { error } => return Err(error.to_string()),
        };
        seq = message.sequence + 1;
        looked_at += 1;
        bytes += message.payload.len();
        if bytes > BYTES {
            guard(|| {
                tracing::warn!(
                    stream = channel.stream,
                    consumer = channel.consumer,
                    stream_sequence = message.sequence,
                    bytes,
                    "search for unreadable messages ended early: they are large"
                );
            });
            seq = last + 1;
        }
        if looked_at == RANGE {
            seq = seq.max(last.saturating_sub(RANGE - 1));
        }
        if message.sequence <= last && StreamMessage::try_from(message.clone()).is_err() {
            found.push(message);
        }
    }
    Ok(found)
}

/// Removes a message from the consumer's way: as a dead letter, or else for an hour.
async fn set_aside(channel: &Channel, info: &Info, message: &RawMessage) {
    let sequence = message.sequence;
    let result = match &channel.dead_letter {
        Some(subject) => dead_letter(channel, subject, message).await,
        None => Ok(AckKind::Nak(Some(ASIDE))),
    };
    let kind = match result {
        Ok(kind) => kind,
        Err(error) => {
            guard(|| {
                tracing::error!(
                    stream = channel.stream,
                    consumer = channel.consumer,
                    stream_sequence = sequence,
                    error,
                    "message that the client can't parse is no dead letter: it will break the connection again"
                );
            });
            return;
        }
    };
    // A consumer whose acks are explicit uses the stream's sequence; the other numbers only need to be
    // possible ones.
    let reply = format!(
        "$JS.ACK.{}.{}.1.{sequence}.{}.0.0",
        channel.stream, channel.consumer, info.delivered.consumer_sequence
    );
    let is_kept = channel.dead_letter.is_some();
    let settled = channel.confirm(reply.into(), kind, channel.confirm_timeout);
    match settled.await {
        Ok(()) if is_kept => guard(|| {
            tracing::error!(
                stream = channel.stream,
                consumer = channel.consumer,
                stream_sequence = sequence,
                "message dead-lettered without a run: the client can't parse its headers"
            );
        }),
        Ok(()) => guard(|| {
            tracing::error!(
                stream = channel.stream,
                consumer = channel.consumer,
                stream_sequence = sequence,
                after = ?ASIDE,
                "message set aside: the client can't parse its headers; delete it, or set a dead letter"
            );
        }),
        Err(error) => guard(|| {
            tracing::error!(
                stream = channel.stream,
                consumer = channel.consumer,
                stream_sequence = sequence,
                error = format_args!("{error:#}"),
                "message that the client can't parse is not set aside: it will break the connection again"
            );
        }),
    }
}

/// Publishes the readable parts of a message as a dead letter.
async fn dead_letter(
    channel: &Channel,
    subject: &async_nats::Subject,
    message: &RawMessage,
) -> Result<AckKind, String> {
    let mut readable = message.clone();
    readable.headers = None;
    let readable = StreamMessage::try_from(readable).map_err(|error| error.to_string())?;
    let outcome = Outcome::<(), _>::Failed("the headers of the message can't be parsed");
    let reason = Reason::of(&outcome, Duration::ZERO);
    let publishing = dead_letter::publish_unreadable(channel, subject, readable, &reason);
    publishing.await.map_err(|error| error.to_string())?;
    Ok(AckKind::Term)
}
