//! Credentials that are renewed while a worker runs.

use std::{
    fs,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::StreamExt;
use tokio::time::timeout;
use tower_sentinel::broker::{
    nats::{
        self,
        async_nats::{Auth, ConnectOptions, Event},
    },
    rabbitmq,
    redis::{ConnectError, ConsumerGroup, redis},
};

use super::folder::Folder;
use crate::{
    nats::server::Server as Nats, rabbitmq::server::shared as shared_rabbitmq,
    redis::server::Server as Redis,
};

const SOON: Duration = Duration::from_secs(30);

/// The server knows passwords alone, which don't run out: it takes the new one, and the connection
/// goes on.
#[tokio::test]
async fn rabbitmq_takes_a_new_secret_on_a_connection() {
    let server = shared_rabbitmq();
    let connection = rabbitmq::connect(&server.address()).await.unwrap();
    let renewed = connection.update_secret("guest".into(), "renewed by the test".into());
    timeout(SOON, renewed).await.unwrap().unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel.close(200, "OK".into()).await.unwrap();
}

#[tokio::test]
async fn nats_asks_for_the_credentials_at_each_connect() {
    let folder = Folder::new();
    let file = folder.0.join("server.conf");
    let write = |password: &str| {
        let users = format!("authorization {{ users = [{{user: me, password: {password}}}] }}\n");
        fs::write(&file, users).unwrap();
    };
    write("first");
    let mut server = Nats::start_with(&["-c", file.to_str().unwrap()]);
    let password = Arc::new(Mutex::new("first".to_owned()));
    let current = Arc::clone(&password);
    let (connected, mut connects) = tokio::sync::mpsc::unbounded_channel();
    let options = ConnectOptions::with_auth_callback(move |_| {
        let password = current.lock().unwrap().clone();
        async move {
            let mut auth = Auth::new();
            auth.username = Some("me".into());
            auth.password = Some(password);
            Ok(auth)
        }
    });
    let options = options.event_callback(move |event| {
        if event == Event::Connected {
            connected.send(()).ok();
        }
        async {}
    });
    let address = server.address();
    let client = nats::connect_with(options, &address).await.unwrap();
    connects.recv().await.unwrap();

    *password.lock().unwrap() = "second".to_owned();
    write("second");
    server.kill();
    server.restart();
    timeout(SOON, connects.recv())
        .await
        .expect("it connects again")
        .unwrap();
    let mut messages = client.subscribe("here").await.unwrap();
    client.publish("here", "a message".into()).await.unwrap();
    timeout(SOON, messages.next()).await.unwrap().unwrap();

    let old = nats::connect(&format!("nats://me:first@{address}")).await;
    assert!(matches!(old, Err(nats::ConnectError::Denied { .. })));
}

/// A worker that connects anew reads the password anew.
#[tokio::test]
async fn redis_gets_the_password_of_the_moment() {
    let server = Redis::start();
    let mut admin = server.inspect();
    let mut set = |rules: &str| {
        let mut command = redis::cmd("ACL");
        command.arg("SETUSER").arg("me");
        for rule in rules.split(' ') {
            command.arg(rule);
        }
        command.query::<()>(&mut admin).unwrap();
    };
    set("on >first ~* +@all");
    let group = ConsumerGroup::new("jobs", "workers");
    let address = |password: &str| format!("redis://me:{password}@127.0.0.1:{}", server.port);
    let mut jobs = group.connect(address("first")).await.unwrap();

    // A password that is no longer valid ends no connection.
    set("resetpass >second");
    let denied = group.connect(address("first")).await.unwrap_err();
    assert!(matches!(denied, ConnectError::Denied { .. }), "{denied:?}");
    let _: String = redis::cmd("XADD")
        .arg("jobs")
        .arg("*")
        .arg("payload")
        .arg("a job")
        .query(&mut server.inspect())
        .unwrap();
    let job = timeout(SOON, jobs.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(job.as_ref(), b"a job");
    drop(group.connect(address("second")).await.unwrap());
}
