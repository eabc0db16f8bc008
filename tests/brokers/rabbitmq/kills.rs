//! A server that is killed.

use std::time::Duration;

use tower_sentinel::{
    Job, Verdict,
    broker::rabbitmq::{self, ConnectError, DeliveryError, Queue, QueueKind, SubscriptionError},
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
