//! Connections that break whenever something is requested.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};
use tower_sentinel::broker::nats::{Pull, SubscriptionError, async_nats::jetstream, connect};

use super::{SOON, jobs};
use crate::log::Log;

/// Forwards connections to `server` and cuts each that requests a message.
async fn cut_requests(server: String) -> (String, JoinSet<()>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((client, _)) = listener.accept().await {
            let server = server.clone();
            connections.spawn(async move {
                let server = TcpStream::connect(server).await.unwrap();
                let (mut from_client, mut to_client) = client.into_split();
                let (mut from_server, mut to_server) = server.into_split();
                let upstream = async {
                    let mut bytes = vec![0; 65_536];
                    while let Ok(n @ 1..) = from_client.read(&mut bytes).await {
                        let request = b".MSG.NEXT.";
                        if bytes[..n]
                            .windows(request.len())
                            .any(|part| part == request)
                        {
                            return;
                        }
                        to_server.write_all(&bytes[..n]).await.unwrap();
                    }
                };
                tokio::select! {
                    () = upstream => {}
                    _ = copy(&mut from_server, &mut to_client) => {}
                }
            });
        }
    });
    (address, tasks)
}

#[tokio::test]
async fn connections_that_break_at_each_request_end_the_stream() {
    let (log, _guard) = Log::start();
    let jobs = jobs(SOON).await;
    let (address, _proxy) = cut_requests(jobs.server.address()).await;
    let context = jetstream::new(connect(&address).await.unwrap());
    let pull = Pull::new("jobs", "workers").idle_heartbeat(Duration::from_millis(250));
    // Silence alone would end it much later.
    let pull = pull.reconnect_limit(100 * SOON);
    let mut deliveries = pull.subscribe(&context).await.unwrap();
    let next = timeout(3 * SOON, futures_util::StreamExt::next(&mut deliveries)).await;
    let error = next.expect("an end").unwrap().unwrap_err();
    assert!(
        matches!(error, SubscriptionError::Breaking { times: 5 }),
        "{error}"
    );
    let is_said = |line: &String| line.contains("connection broken right after a request");
    assert!(log.lines().iter().any(is_said), "{:?}", log.lines());
}
