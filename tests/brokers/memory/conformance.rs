//! The embedded broker, with all its capabilities and with none.

use std::{future::ready, time::Duration};

use tower_sentinel::{
    broker::memory::{Broker, ConnectError, Deliveries, Queue},
    conformance::{Backlog, DeadLetter, EnvelopeFixture, Fixture, Published},
    settle::Capabilities,
};

use crate::conformance::{Connector, TestBroker, verdicts::MEMORY};

const LEASE: Duration = Duration::from_secs(2);

/// `FULL` with a lease and a dead-letter queue, and else without.
struct Memory<const FULL: bool> {
    broker: Broker<String>,
    queue: Queue<String>,
}

impl<const FULL: bool> Fixture for Memory<FULL> {
    type Subscription = Deliveries<String>;
    type Error = ConnectError;

    async fn publish(&self, body: &str) -> Result<(), ConnectError> {
        self.queue.publish(body.to_owned());
        Ok(())
    }

    async fn subscribe(&self, prefetch: usize) -> Result<Deliveries<String>, ConnectError> {
        self.connector(prefetch)().await
    }

    async fn backlog(&self) -> Result<Backlog, ConnectError> {
        let counts = self.queue.counts();
        Ok(Backlog {
            unacked: counts.unacked,
            total: counts.ready + counts.delayed + counts.unacked,
        })
    }

    async fn dead_letters(&self) -> Result<Vec<DeadLetter>, ConnectError> {
        let letters = self
            .queue
            .dead_letters()
            .into_iter()
            .map(|letter| DeadLetter {
                body: letter.payload,
                kind: letter.death.reason.kind,
                message: letter.death.reason.message.clone(),
            });
        Ok(letters.collect())
    }

    fn capabilities(&self) -> Capabilities {
        let capabilities = Capabilities::none().free_release().delay();
        match FULL {
            true => capabilities.dead_letter().keep_alive(),
            false => capabilities,
        }
    }

    fn lease(&self) -> Option<Duration> {
        FULL.then_some(LEASE)
    }

    fn charges_lost_deliveries(&self) -> bool {
        Self::row().loss_is_charged
    }
}

impl<const FULL: bool> EnvelopeFixture for Memory<FULL> {
    async fn publish_with(
        &self,
        body: &str,
        header: Option<(&str, &str)>,
        _: Option<&str>,
    ) -> Result<Published, ConnectError> {
        self.queue.publish_with_headers(body.to_owned(), header);
        // Jobs are numbered as they are published.
        let counts = self.queue.counts();
        let held = counts.ready + counts.delayed + counts.unacked;
        let number = held as u64 + counts.acked;
        Ok(Published {
            message_id: Some(number.to_string()),
            routing_key: self.queue.name().to_owned(),
        })
    }
}

impl<const FULL: bool> TestBroker for Memory<FULL> {
    const ACK_IS_CONFIRMED: bool = true;
    const MANY: usize = 10_000;

    fn server() -> (&'static str, (u32, u32)) {
        (MEMORY, (0, 0))
    }

    async fn start() -> Self {
        let broker = Broker::new();
        let mut queue = broker.queue("jobs");
        if FULL {
            queue = queue.dead_letter("dead").lease(LEASE);
        }
        let queue = queue.declare();
        Self { broker, queue }
    }

    async fn stop(self) {}

    fn connector(&self, prefetch: usize) -> Connector<Deliveries<String>, ConnectError> {
        let queue = self.queue.clone();
        Box::new(move || Box::pin(ready(queue.subscribe(prefetch))))
    }

    async fn stall(&self) {
        self.queue.delay_settlements(Duration::from_secs(3_600));
    }

    async fn cut(&self) {
        self.queue.delay_settlements(Duration::ZERO);
        self.broker.drop_connections();
    }

    async fn kill(&self) {
        self.broker.refuse_connections(u32::MAX);
        self.cut().await;
    }

    async fn revive(&self) {
        self.broker.refuse_connections(0);
    }
}

mod full {
    use super::Memory;

    crate::conformance::scenarios!(tokio::test(start_paused = true), Memory<true>);
}

mod plain {
    use super::Memory;

    crate::conformance::scenarios!(tokio::test(start_paused = true), Memory<false>);
}
