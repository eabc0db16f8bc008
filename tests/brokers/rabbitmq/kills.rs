//! A server that is killed.

use std::{future::IntoFuture, time::Duration};

use tokio::{sync::mpsc, time::timeout};
use tower::ServiceBuilder;
use tower_sentinel::{
    Consumer, Job, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::rabbitmq::{
        self, ConnectError, Delivery, DeliveryError, Queue, QueueKind, SubscriptionError,
    },
    settle::Settle,
};

use super::{KINDS, Scene, closed, end, next, quiet, resubscribe, server::Server, settle};

#[tokio::test]
async fn a_killed_server_loses_no_job() {
    let mut server = Server::start("");
    let mut scenes = Vec::new();
    for kind in KINDS {
        let scene = Scene::on(&server, "a_killed_server_loses_no_job", kind).await;
        let is_quorum = kind == QueueKind::Quorum;
        server.has_written(&scene.name, is_quorum).await;
        scene.publish("one").await;
        scene.publish("two").await;
        let mut jobs = scene.subscribe().await;
        let stale = next(&mut jobs).await.tag();
        scenes.push((scene, jobs, stale));
    }
    server.kill();
    let address = server.address_of("guest", "secret");
    let error = rabbitmq::connect(&address).await.unwrap_err();
    assert!(
        matches!(error, ConnectError::Unreachable { .. }),
        "{error:?}"
    );
    let line = format!("{error:#}");
    assert!(line.starts_with("rabbitmq at 127.0.0.1:"), "{line}");
    assert!(!line.contains('\n') && !line.contains("secret"), "{line}");

    let mut stale_tags = Vec::new();
    for (scene, mut jobs, stale) in scenes {
        let error = closed(&mut jobs).await.unwrap_err();
        let is_lost = matches!(error, SubscriptionError::ConnectionLost(_));
        assert!(is_lost, "{error:?}");
        // "two" had come, and is void.
        end(&mut jobs).await;
        stale_tags.push((scene.name, scene.kind, stale));
    }
    server.restart();
    for (name, kind, stale) in stale_tags {
        let error = settle(stale, Verdict::Ack).await;
        assert!(matches!(error, Err(DeliveryError::Stale)), "{error:?}");
        let queue = match kind {
            QueueKind::Quorum => Queue::quorum(&name),
            _ => Queue::classic(&name),
        };
        let mut jobs = resubscribe(&server, queue).await;
        for body in ["one", "two"] {
            let job = next(&mut jobs).await;
            assert_eq!(job.as_ref(), body.as_bytes());
            settle(job.tag(), Verdict::Ack).await.unwrap();
        }
        quiet(&mut jobs).await;
    }
}

#[tokio::test]
async fn a_delayed_retry_outlives_a_kill() {
    let mut server = Server::start("");
    let mut queues = Vec::new();
    for kind in KINDS {
        let scene = Scene::on(&server, "a_delayed_retry_outlives_a_kill", kind).await;
        let is_quorum = kind == QueueKind::Quorum;
        server.has_written(&scene.name, is_quorum).await;
        let mut jobs = scene.subscribe().await;
        scene.publish("one").await;
        let verdict = Verdict::retry_after(Duration::from_secs(3));
        settle(next(&mut jobs).await.tag(), verdict).await.unwrap();
        queues.push(scene.queue());
    }
    // The retry queues were declared for it.
    server.kill();
    server.restart();
    for queue in queues {
        let mut jobs = resubscribe(&server, queue).await;
        let job = next(&mut jobs).await;
        assert_eq!(job.as_ref(), b"one");
        assert_eq!(job.tag().deliveries(), Some(2));
        settle(job.tag(), Verdict::Ack).await.unwrap();
    }
}

#[tokio::test]
async fn no_worker_waits_for_the_dead() {
    // Of the first one the node is killed, or only the connection that publishes is closed.
    for is_killed in [false, true] {
        let mut servers = [Server::start(""), Server::start("")];
        let test = "no_worker_waits_for_the_dead";
        let mut scenes = Vec::new();
        for server in &servers {
            scenes.push(Scene::on(server, test, QueueKind::Classic).await);
        }
        let name = scenes[0].name.clone();
        let addresses = [servers[0].address(), servers[1].address()];
        let mut sessions = 0;
        let connect = move || {
            let (address, name) = (addresses[sessions % 2].clone(), name.clone());
            sessions += 1;
            async move {
                let connection = rabbitmq::connect(&address).await?;
                let jobs = Queue::classic(name).subscribe(&connection).await?;
                Ok::<_, Box<dyn std::error::Error + Send + Sync>>(jobs)
            }
        };
        let (began, mut begun) = mpsc::unbounded_channel();
        let make_service = move |shutdown| {
            let began = began.clone();
            let policy = SettlePolicy::new(ack_on_success());
            ServiceBuilder::new()
                .layer(SentinelLayer::new(policy).no_timeout().shutdown(shutdown))
                .service_fn(move |job: Delivery| {
                    let (began, body) = (began.clone(), job.payload().to_vec());
                    async move {
                        began.send(body.clone()).unwrap();
                        if body == b"long" {
                            std::future::pending::<()>().await;
                        }
                        Ok::<_, std::convert::Infallible>(())
                    }
                })
        };
        let consumer = Consumer::reconnecting(connect, make_service).into_future();
        let working = tokio::spawn(consumer);
        let mut next = async || timeout(Duration::from_secs(20), begun.recv()).await;
        scenes[0].publish("long").await;
        assert_eq!(next().await.unwrap().unwrap(), b"long");
        if is_killed {
            servers[0].kill();
            scenes[1].publish("short").await;
        } else {
            servers[0].close_connection("tower-sentinel: retries and dead letters");
            scenes[0].publish("short").await;
        }
        // The long job goes on for as long as it is let, and the drain would wait for half a minute.
        let short = next().await.expect("the other job begins at once");
        assert_eq!(short.unwrap(), b"short");
        working.abort();
    }
}
