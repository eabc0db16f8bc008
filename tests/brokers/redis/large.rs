//! Entries of more fields than a script can write at once.

use tower_sentinel::{
    Job, Verdict,
    broker::{
        dead_letter::OUTCOME_MESSAGE,
        redis::{
            DeliveryError,
            redis::{Connection, cmd},
        },
    },
    settle::{Settle, Unsettled},
};

use super::{
    STREAM, add, calls_of, count, dead, forget_calls, group, next, pending, reason, server::Server,
    set_maxmemory, settle, steal,
};

const FIELDS: usize = 5_000;

/// Adds an entry of [`FIELDS`] fields.
pub(super) fn add_large(connection: &mut Connection) -> String {
    let mut add = cmd("XADD");
    add.arg(STREAM).arg("*");
    for n in 0..FIELDS {
        add.arg(n).arg(n + 1);
    }
    add.query(connection).unwrap()
}

#[tokio::test]
async fn each_verdict_settles_an_entry_of_many_fields() {
    let server = Server::start();
    let mut inspect = server.inspect();
    let id = add_large(&mut inspect);
    let mut deliveries = group().connect(server.url()).await.unwrap();
    for (verdict, deliveries_so_far) in [(Verdict::retry(), 1), (Verdict::release(), 2)] {
        let delivery = next(&mut deliveries).await;
        assert_eq!(count(&delivery), deliveries_so_far);
        assert_eq!(delivery.fields().count(), FIELDS);
        settle(&delivery, verdict).await.unwrap();
    }
    settle(&next(&mut deliveries).await, Verdict::Reject)
        .await
        .unwrap();
    assert_eq!(pending(&mut inspect), 0);

    let [mut letter] = dead(&mut inspect).try_into().unwrap();
    assert_eq!(letter.remove("x-entry-id"), Some(id));
    assert_eq!(letter.remove("x-deliveries"), Some("2".to_owned()));
    let stream = letter.remove("x-original-destination");
    assert_eq!(stream.as_deref(), Some(STREAM));
    let ours = ["x-outcome-kind", "x-outcome-message", "x-outcome-time"];
    assert!(ours.iter().all(|name| letter.remove(*name).is_some()));
    assert_eq!(letter.len(), FIELDS);
    assert_eq!(letter["4999"], "5000");
}

#[tokio::test]
async fn a_long_message_is_cut_in_each_dead_letter() {
    let server = Server::start();
    let mut inspect = server.inspect();
    add(&mut inspect, "small");
    add_large(&mut inspect);
    let mut deliveries = group().connect(server.url()).await.unwrap();
    for _ in 0..2 {
        let delivery = next(&mut deliveries).await;
        let mut long = reason();
        long.message = Some("é".repeat(5_000));
        delivery.tag().settle(Verdict::Reject, long).await.unwrap();
    }
    let letters = dead(&mut inspect);
    assert_eq!(letters.len(), 2);
    for letter in letters {
        assert_eq!(letter[OUTCOME_MESSAGE], "é".repeat(2_048));
    }
}

#[tokio::test]
async fn a_large_entry_that_another_consumer_has_is_not_copied() {
    let server = Server::start();
    let mut inspect = server.inspect();
    let id = add_large(&mut inspect);
    let mut deliveries = group().connect(server.url()).await.unwrap();
    let delivery = next(&mut deliveries).await;
    steal(&mut inspect, &id);
    let error = settle(&delivery, Verdict::Reject).await.unwrap_err();
    assert!(matches!(error, DeliveryError::Lost), "{error}");
    assert_eq!(dead(&mut inspect).len(), 0);
    assert_eq!(pending(&mut inspect), 1);
}

#[tokio::test]
async fn a_large_entry_whose_copy_is_refused_stays_pending() {
    let server = Server::start();
    let mut inspect = server.inspect();
    add_large(&mut inspect);
    let mut deliveries = group().connect(server.url()).await.unwrap();
    let delivery = next(&mut deliveries).await;
    forget_calls(&mut inspect);
    set_maxmemory(&mut inspect, "1");
    let unsettled = delivery.tag().settle(Verdict::Reject, reason()).await;
    set_maxmemory(&mut inspect, "0");
    let Unsettled { tag, error, .. } = unsettled.unwrap_err();
    let tag = tag.unwrap_or_else(|| panic!("{error}"));
    assert_eq!(
        (pending(&mut inspect), calls_of(&mut inspect, "xack")),
        (1, 0)
    );
    tag.settle(Verdict::Reject, reason()).await.unwrap();
    assert_eq!((pending(&mut inspect), dead(&mut inspect).len()), (0, 1));
}
