//! Texts of the adapters' errors.

use std::{error::Error, io, sync::Arc};

use tower_sentinel::broker::{
    memory,
    nats::{
        self,
        async_nats::{self, client::RequestErrorKind, jetstream::context::PublishErrorKind},
    },
    rabbitmq::{self, lapin},
    redis::{self, redis::RedisError},
};

fn of_lapin() -> lapin::Error {
    io::Error::from(io::ErrorKind::ConnectionRefused).into()
}

fn of_redis() -> RedisError {
    io::Error::from(io::ErrorKind::ConnectionRefused).into()
}

fn address() -> String {
    "host:1".to_owned()
}

/// Returns errors that have a cause, with their own texts.
fn caused() -> Vec<(Box<dyn Error>, &'static str)> {
    let of_nats = Arc::new(async_nats::ConnectErrorKind::TimedOut.into());
    vec![
        (
            rabbitmq::ConnectError::Unreachable {
                address: address(),
                error: of_lapin(),
            }
            .into(),
            "rabbitmq at host:1 can't be reached",
        ),
        (
            nats::ConnectError::Unreachable {
                address: address(),
                error: of_nats,
            }
            .into(),
            "nats at host:1 can't be reached",
        ),
        (
            redis::ConnectError::Unreachable {
                address: address(),
                error: of_redis(),
            }
            .into(),
            "redis at host:1 can't be reached",
        ),
        (
            redis::ConnectError::ReadOnly {
                address: address(),
                error: of_redis(),
            }
            .into(),
            "redis at host:1 is a read-only replica",
        ),
        (
            redis::SubscriptionError::Moved(of_redis()).into(),
            "the server of redis has lost the slot of the stream",
        ),
        (
            redis::DeliveryError::Unavailable(of_redis()).into(),
            "the server of redis can't serve the stream at present",
        ),
        (
            rabbitmq::SubscriptionError::ConnectionLost(of_lapin()).into(),
            "the connection to rabbitmq is lost",
        ),
        (
            redis::SubscriptionError::Disconnected(Some(of_redis())).into(),
            "the connection to redis is lost",
        ),
        (
            rabbitmq::DeliveryError::Client(of_lapin()).into(),
            "the request to rabbitmq failed",
        ),
        (
            nats::DeliveryError::Request(Arc::new(RequestErrorKind::NoResponders.into())).into(),
            "the request to nats failed",
        ),
        (
            nats::DeliveryError::DeadLetter(Arc::new(PublishErrorKind::StreamNotFound.into()))
                .into(),
            "the dead letter is not kept",
        ),
        (
            redis::DeliveryError::Command(of_redis()).into(),
            "the request to redis failed",
        ),
    ]
}

#[test]
fn an_error_prints_its_cause_on_demand_only() {
    for (error, own) in caused() {
        assert_eq!(error.to_string(), own);
        let cause = error.source().expect(own);
        assert_eq!(format!("{error:#}"), format!("{own}: {cause}"));
    }
}

#[test]
fn a_second_settlement_is_refused_in_the_same_words() {
    for text in [
        memory::DeliveryError::AlreadySettled.to_string(),
        nats::DeliveryError::AlreadySettled.to_string(),
        rabbitmq::DeliveryError::AlreadySettled.to_string(),
        redis::DeliveryError::AlreadySettled.to_string(),
    ] {
        assert_eq!(text, "the delivery was settled before");
    }
}
