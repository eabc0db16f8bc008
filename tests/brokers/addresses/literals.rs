//! IPv6 addresses.

use tokio::net::TcpListener;

use super::{BROKERS, Broker};
use crate::{
    nats::server::Server as Nats, proxy::Proxy, rabbitmq::server::shared as shared_rabbitmq,
    redis::server::Server as Redis,
};

#[tokio::test]
async fn an_ipv6_address_leads_to_its_host() {
    let nats = Nats::start();
    let redis = Redis::start();
    for broker in BROKERS {
        let (server, user) = match broker {
            Broker::RabbitMq => (shared_rabbitmq().host(), "guest:guest@"),
            Broker::Nats => (nats.address(), ""),
            Broker::Redis => (redis.host(), ""),
        };
        let listener = TcpListener::bind("[::1]:0").await.unwrap();
        let place = listener.local_addr().unwrap().to_string();
        let _proxy = Proxy::at(listener, server);
        let address = broker.address(false, &format!("{user}{place}"));
        // It has half a second there: the test is for where it leads.
        let mut connected = broker.connect(&address).await;
        while connected
            .as_ref()
            .is_err_and(|error| error.contains("imed"))
        {
            connected = broker.connect(&address).await;
        }
        connected.unwrap();
    }
}

#[tokio::test]
async fn an_ipv6_address_where_nobody_is_leads_nowhere_else() {
    // Of the range that is kept free for documentation.
    for broker in BROKERS {
        let address = broker.address(false, "guest:guest@[2001:db8::5]:5672");
        let error = broker.connect(&address).await.unwrap_err();
        let line = error.lines().next().unwrap();
        assert!(line.contains(" at [2001:db8::5]:5672 "), "{line}");
    }
}
