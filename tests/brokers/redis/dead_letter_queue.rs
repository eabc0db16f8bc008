//! Dead letters of Redis Streams.

use std::collections::HashMap;

use tower_sentinel::{
    broker::{
        dead_letters::{DeadLetters, Fate, Filter, Pass, Redrive},
        redis::{
            ConsumerGroup, DeadLetterQueue, Deliveries, Delivery, SubscriptionError,
            redis::{Client, Commands, aio::MultiplexedConnection, cmd},
        },
    },
    outcome::OutcomeKind,
};

use super::server::Server;
use crate::dead_letters;
use crate::dead_letters::{Place, ack, bury, has_letters, numbers, scenarios};

struct Redis {
    server: Server,
    connection: MultiplexedConnection,
    jobs: Deliveries,
}

fn group() -> ConsumerGroup {
    ConsumerGroup::new("jobs", "workers").prefetch(3)
}

async fn place(_: &str) -> Redis {
    let server = Server::start();
    Redis {
        jobs: group().connect(&server.url()).await.unwrap(),
        connection: connect(&server.url()).await,
        server,
    }
}

async fn connect(url: &str) -> MultiplexedConnection {
    let client = Client::open(url).unwrap();
    client.get_multiplexed_async_connection().await.unwrap()
}

impl Place for Redis {
    type Delivery = Delivery;
    type Error = SubscriptionError;
    type Jobs = Deliveries;
    type Letters = DeadLetterQueue<MultiplexedConnection>;

    async fn publish(&self, body: &str) {
        let fields = [("payload", body), ("tenant", "acme")];
        let _: String = self.server.inspect().xadd("jobs", "*", &fields).unwrap();
    }

    fn jobs(&mut self) -> &mut Deliveries {
        &mut self.jobs
    }

    fn letters(&self) -> Self::Letters {
        let key = group().dead_letter_key().unwrap().to_owned();
        DeadLetterQueue::new(self.connection.clone(), key)
    }

    fn name(&self) -> String {
        "jobs".to_owned()
    }
}

scenarios!(place, tokio::test);

#[tokio::test]
async fn an_entry_that_is_too_large_for_a_script_is_moved_too() {
    let mut place = place("").await;
    let mut add = cmd("XADD");
    add.arg("jobs").arg("*").arg("payload").arg("large");
    for n in 0..4_000 {
        add.arg(format!("field {n}")).arg(n);
    }
    let mut connection = place.server.inspect();
    let _: String = add.query(&mut connection).unwrap();
    dead_letters::reject(&mut place, OutcomeKind::Failed, "no").await;
    for times in 1..=2 {
        let nowhere = Redrive::new(Filter::all()).destination("nowhere");
        let tally = nowhere.run(&place.letters()).await.unwrap();
        assert_eq!((tally.unroutable, tally.left()), (1, 1));
        let tally = Redrive::new(Filter::all()).run(&place.letters()).await;
        assert_eq!(numbers(tally.unwrap()), [1, 1, 0, 0, 0]);
        let entries: Vec<(String, HashMap<String, String>)> = cmd("XREVRANGE")
            .arg(&["jobs", "+", "-", "COUNT", "1"])
            .query(&mut connection)
            .unwrap();
        let fields = &entries[0].1;
        assert_eq!(fields.len(), 4_002);
        assert_eq!(fields["x-redriven"], times.to_string());
        dead_letters::reject(&mut place, OutcomeKind::Failed, "no").await;
    }
}

#[tokio::test]
async fn without_the_right_to_delete_nothing_is_moved() {
    let mut place = place("").await;
    bury(&mut place, "job", OutcomeKind::Failed, "no").await;
    let mut connection = place.server.inspect();
    let rights = [
        "SETUSER", "operator", "on", ">secret", "~*", "+@all", "-xdel",
    ];
    let () = cmd("ACL").arg(&rights).query(&mut connection).unwrap();
    let url = place
        .server
        .url()
        .replace("redis://", "redis://operator:secret@");
    let letters = DeadLetterQueue::new(connect(&url).await, group().dead_letter_key().unwrap());
    let error = Redrive::new(Filter::all()).run(&letters).await.unwrap_err();
    assert_eq!((error.tally.seen, error.tally.moved), (1, 0));
    let jobs: usize = connection.xlen("jobs").unwrap();
    assert_eq!(jobs, 1, "no copy");
    has_letters(&place, 1).await;
}

#[tokio::test]
async fn a_letter_that_another_run_has_moved_is_gone() {
    let mut place = place("").await;
    bury(&mut place, "job", OutcomeKind::Failed, "no").await;
    let letters = place.letters();
    let mut slow = letters.pass().await.unwrap();
    let taken = slow.next(10).await.unwrap();
    let tally = Redrive::new(Filter::all()).run(&letters).await;
    assert_eq!(numbers(tally.unwrap()), [1, 1, 0, 0, 0]);
    let moved = slow.redrive(taken).await;
    assert!(moved.error.is_none());
    assert_eq!(moved.fates, [Fate::Gone]);
    assert_eq!(ack(&mut place).await.body, "job");
    let jobs: usize = place.server.inspect().xlen("jobs").unwrap();
    assert_eq!(jobs, 2, "the first, and one copy");
}

#[tokio::test]
async fn no_stream_is_created_for_a_destination_that_is_missing() {
    let mut place = place("").await;
    bury(&mut place, "job", OutcomeKind::Failed, "no").await;
    let redrive = Redrive::new(Filter::all()).destination("mistyped");
    assert_eq!(redrive.run(&place.letters()).await.unwrap().unroutable, 1);
    let exists: bool = place.server.inspect().exists("mistyped").unwrap();
    assert!(!exists);
}
