//! Dead letters in memory.

use std::{cell::RefCell, ops::ControlFlow, time::Duration};

use tokio::time::Instant;
use tower_sentinel::broker::{
    dead_letters::{Filter, Redrive},
    memory::{Broker, DeadLetterQueue, Deliveries, Delivery, Queue, SubscriptionError},
};

use crate::dead_letters::{Place, scenarios};

struct Memory {
    broker: Broker<String>,
    queue: Queue<String>,
    jobs: Deliveries<String>,
}

async fn place(_: &str) -> Memory {
    let broker = Broker::new();
    let queue = broker.queue("jobs").dead_letter("dead").declare();
    Memory {
        jobs: queue.subscribe(8).unwrap(),
        queue,
        broker,
    }
}

impl Place for Memory {
    type Delivery = Delivery<String>;
    type Error = SubscriptionError;
    type Jobs = Deliveries<String>;
    type Letters = DeadLetterQueue<String>;

    async fn publish(&self, body: &str) {
        let headers = [("tenant", "acme")];
        self.queue.publish_with_headers(body.to_owned(), headers);
    }

    fn jobs(&mut self) -> &mut Deliveries<String> {
        &mut self.jobs
    }

    fn letters(&self) -> Self::Letters {
        DeadLetterQueue::new(&self.broker.queue("dead").declare())
    }

    fn name(&self) -> String {
        "jobs".to_owned()
    }
}

scenarios!(place, tokio::test(start_paused = true));

#[tokio::test(start_paused = true)]
async fn a_rate_bounds_the_letters_per_second() {
    let broker = Broker::new();
    let (queue, dead) = (
        broker.queue("jobs").declare(),
        broker.queue("dead").declare(),
    );
    (0..100).for_each(|n| dead.publish(n));
    let start = Instant::now();
    let moved = RefCell::new(Vec::new());
    let redrive = Redrive::new(Filter::all()).destination("jobs").rate(10.0);
    let letters = DeadLetterQueue::new(&dead);
    let tally = redrive.run_with(&letters, |tally| {
        moved.borrow_mut().push((start.elapsed(), tally.moved));
        ControlFlow::Continue(())
    });
    assert_eq!(tally.await.unwrap().moved, 100);
    assert_eq!(queue.counts().ready, 100);
    let moved = moved.into_inner();
    // Half a second's worth at a time.
    assert_eq!(moved.len(), 20);
    for (elapsed, moved) in moved {
        let due = Duration::from_secs_f64((moved - 5) as f64 / 10.0);
        assert_eq!(elapsed.as_millis(), due.as_millis());
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_rate_moves_one_at_a_time() {
    let broker = Broker::new();
    let (_queue, dead) = (
        broker.queue("jobs").declare(),
        broker.queue("dead").declare(),
    );
    (0..3).for_each(|n| dead.publish(n));
    let start = Instant::now();
    let redrive = Redrive::new(Filter::all()).destination("jobs").rate(0.1);
    let mut times = Vec::new();
    let letters = DeadLetterQueue::new(&dead);
    let tally = redrive.run_with(&letters, |_| {
        times.push(start.elapsed().as_secs());
        ControlFlow::Continue(())
    });
    assert_eq!(tally.await.unwrap().moved, 3);
    assert_eq!(times, [0, 10, 20]);
}

#[test]
fn impossible_rates_and_batches_panic() {
    for rate in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let panicked = std::panic::catch_unwind(|| Redrive::new(Filter::all()).rate(rate));
        assert!(panicked.is_err(), "{rate}");
    }
    assert!(std::panic::catch_unwind(|| Redrive::new(Filter::all()).batch(0)).is_err());
}
