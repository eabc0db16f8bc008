//! A server that closes connections on which nothing is sent.

use std::{future::poll_fn, pin::Pin, time::Duration};

use futures_util::FutureExt;
use tokio::time::sleep;
use tower_sentinel::{
    Verdict,
    broker::redis::redis::{Connection, cmd},
    consumer::Subscription,
};

use super::{add, group, next, pending, server::Server, settle};

#[tokio::test]
async fn a_job_longer_than_the_servers_timeout_is_acked() {
    // With each place taken nothing is read; with places free a read may block for long.
    for group in [
        group().prefetch(1),
        group().poll_interval(Duration::from_secs(60)),
    ] {
        let server = Server::with(&["--timeout", "2"]);
        let mut idle = server.inspect();
        add(&mut server.inspect(), "one");
        let mut deliveries = group.connect(server.url()).await.unwrap();
        let delivery = next(&mut deliveries).await;
        // Until the server has closed a connection that was idle for as long as the job runs.
        while is_open(&mut idle) {
            sleep(Duration::from_secs(4)).await;
        }
        let closed = poll_fn(|cx| Pin::new(&mut deliveries).poll_closed(cx));
        assert!(closed.now_or_never().is_none());
        settle(&delivery, Verdict::Ack).await.unwrap();
        assert_eq!(pending(&mut server.inspect()), 0);
    }
}

fn is_open(connection: &mut Connection) -> bool {
    cmd("PING").query::<String>(connection).is_ok()
}
