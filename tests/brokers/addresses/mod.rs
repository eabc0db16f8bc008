//! Addresses of all brokers: their targets, and the bytes that are sent there.

#[cfg(feature = "rustls")]
mod certificates;
mod folder;
mod limits;
mod literals;
mod output;
mod passwords;
mod renewal;
mod several;
mod tls;

use std::{error::Error, fmt::Write, time::Duration};

use tower_sentinel::broker::{
    nats::{self, async_nats::ConnectOptions},
    rabbitmq,
    redis::ConsumerGroup,
};

/// The brokers, by the schemes of their addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Broker {
    RabbitMq,
    Nats,
    Redis,
}

const BROKERS: [Broker; 3] = [Broker::RabbitMq, Broker::Nats, Broker::Redis];

impl Broker {
    fn address(self, is_encrypted: bool, rest: &str) -> String {
        let scheme = match (self, is_encrypted) {
            (Broker::RabbitMq, false) => "amqp",
            (Broker::RabbitMq, true) => "amqps",
            (Broker::Nats, false) => "nats",
            (Broker::Nats, true) => "tls",
            (Broker::Redis, false) => "redis",
            (Broker::Redis, true) => "rediss",
        };
        format!("{scheme}://{rest}")
    }

    /// Connects with a time limit of half a second, and returns all that an error has to say.
    async fn connect(self, address: &str) -> Result<(), String> {
        let limit = Duration::from_millis(500);
        match self {
            Broker::RabbitMq => {
                let address = format!("{address}?connection_timeout=500");
                let connected = rabbitmq::connect(&address).await;
                connected.map(drop).map_err(|error| all_of(&error))
            }
            Broker::Nats => {
                let options = ConnectOptions::new().connection_timeout(limit);
                let connected = nats::connect_with(options, address).await;
                connected.map(drop).map_err(|error| all_of(&error))
            }
            Broker::Redis => {
                let group = ConsumerGroup::new("jobs", "workers").response_timeout(limit);
                let connected = group.connect(address).await;
                connected.map(drop).map_err(|error| all_of(&error))
            }
        }
    }
}

/// Returns an error as it is displayed and debugged, with all of its sources.
fn all_of(error: &(dyn Error + 'static)) -> String {
    let mut text = String::new();
    let mut next = Some(error);
    while let Some(error) = next {
        write!(text, "{error}\n{error:?}\n{error:#?}\n").unwrap();
        next = error.source();
    }
    text
}
