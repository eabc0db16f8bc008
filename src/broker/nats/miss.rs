//! [`Miss`]: the reason why a request has no result.

use std::error::Error;

use async_nats::{
    client::{RequestError, RequestErrorKind},
    jetstream::{
        self, ErrorCode,
        context::{
            self, ConsumerInfoError, ConsumerInfoErrorKind, CreateStreamError,
            CreateStreamErrorKind, GetStreamByNameError, GetStreamByNameErrorKind, GetStreamError,
            GetStreamErrorKind, PublishError, PublishErrorKind,
        },
        stream::{ConsumerError, ConsumerErrorKind},
    },
};

/// Reason why a request has no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Miss {
    /// Nobody took it: it was not carried out.
    Absent,
    /// There was no response: it may have been carried out.
    Silent,
    /// It was refused.
    Refused,
}

/// Error of a request, by the reason.
pub(super) trait Missed {
    fn miss(&self) -> Miss;
}

/// Returns whether a server refuses since there is no leader or no quorum, and not for good.
fn is_unavailable(error: &jetstream::Error) -> bool {
    const FOR_GOOD: [ErrorCode; 2] = [
        ErrorCode::JETSTREAM_NOT_ENABLED,
        ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT,
    ];
    error.code() == 503 && !FOR_GOOD.contains(&error.error_code())
}

fn by_response(error: &jetstream::Error) -> Miss {
    match is_unavailable(error) {
        true => Miss::Absent,
        false => Miss::Refused,
    }
}

/// Returns the reason that is among the sources of `error`.
fn by_source(error: &(dyn Error + 'static)) -> Miss {
    let mut source = error.source();
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<context::RequestError>() {
            return error.miss();
        }
        if let Some(error) = error.downcast_ref::<RequestError>() {
            return error.miss();
        }
        if let Some(error) = error.downcast_ref::<jetstream::Error>() {
            return by_response(error);
        }
        source = error.source();
    }
    Miss::Refused
}

impl Missed for RequestError {
    fn miss(&self) -> Miss {
        match self.kind() {
            RequestErrorKind::NoResponders => Miss::Absent,
            RequestErrorKind::TimedOut => Miss::Silent,
            _ => Miss::Refused,
        }
    }
}

impl Missed for context::RequestError {
    fn miss(&self) -> Miss {
        match self.kind() {
            context::RequestErrorKind::NoResponders => Miss::Absent,
            context::RequestErrorKind::TimedOut => Miss::Silent,
            _ => Miss::Refused,
        }
    }
}

impl Missed for PublishError {
    fn miss(&self) -> Miss {
        match self.kind() {
            PublishErrorKind::StreamNotFound => Miss::Absent,
            PublishErrorKind::TimedOut | PublishErrorKind::BrokenPipe => Miss::Silent,
            _ => by_source(self),
        }
    }
}

impl Missed for ConsumerError {
    fn miss(&self) -> Miss {
        match self.kind() {
            ConsumerErrorKind::TimedOut => Miss::Silent,
            ConsumerErrorKind::JetStream(error) => by_response(&error),
            _ => by_source(self),
        }
    }
}

impl Missed for ConsumerInfoError {
    fn miss(&self) -> Miss {
        match self.kind() {
            ConsumerInfoErrorKind::NoResponders | ConsumerInfoErrorKind::Offline => Miss::Absent,
            ConsumerInfoErrorKind::TimedOut => Miss::Silent,
            ConsumerInfoErrorKind::JetStream(error) => by_response(&error),
            _ => by_source(self),
        }
    }
}

impl Missed for GetStreamError {
    fn miss(&self) -> Miss {
        match self.kind() {
            GetStreamErrorKind::JetStream(error) => by_response(&error),
            _ => by_source(self),
        }
    }
}

impl Missed for GetStreamByNameError {
    fn miss(&self) -> Miss {
        match self.kind() {
            GetStreamByNameErrorKind::JetStream(error) => by_response(&error),
            _ => by_source(self),
        }
    }
}

impl Missed for CreateStreamError {
    fn miss(&self) -> Miss {
        match self.kind() {
            CreateStreamErrorKind::JetStreamUnavailable => Miss::Absent,
            CreateStreamErrorKind::TimedOut => Miss::Silent,
            CreateStreamErrorKind::JetStream(error) => by_response(&error),
            _ => by_source(self),
        }
    }
}
