//! All traces, logs and metrics of a consumer and its jobs have the consumer's name.

use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tower::{Service, ServiceBuilder};
use tower_sentinel::{
    Consumer, SentinelError, SentinelLayer, SettlePolicy, ack_on_success,
    broker::memory::{Broker, ConnectError, Deliveries, Delivery, DeliveryError, Queue},
    settle::{SettleError, Settled},
};

use crate::{
    consumer::ends,
    support::{Refused, log::Log},
};

const SECOND: Duration = Duration::from_secs(1);

type CallError = SentinelError<Refused, SettleError<DeliveryError>>;

/// Returns a stack whose jobs fail.
fn service(
    has_span: bool,
    shutdown: CancellationToken,
) -> impl Service<Delivery<u32>, Response = Settled, Error = CallError, Future: Send + 'static>
+ Clone
+ Send
+ 'static {
    let sentinel = SentinelLayer::new(SettlePolicy::new(ack_on_success())).shutdown(shutdown);
    let builder = ServiceBuilder::new().concurrency_limit(1);
    let failing = |_: Delivery<u32>| async {
        sleep(SECOND).await;
        tracing::info!("the handler works");
        Err::<(), _>(Refused)
    };
    match has_span {
        true => {
            let inner = builder.layer(sentinel.process_span()).service_fn(failing);
            tower::util::BoxCloneService::new(inner)
        }
        false => tower::util::BoxCloneService::new(builder.layer(sentinel).service_fn(failing)),
    }
}

fn queue() -> (Broker<u32>, Queue<u32>) {
    let broker = Broker::new();
    let queue = broker.queue("jobs").declare();
    (0..5).for_each(|job| queue.publish(job));
    (broker, queue)
}

fn connect(
    broker: &Broker<u32>,
    queue: &Queue<u32>,
) -> impl FnMut() -> std::future::Ready<Result<Deliveries<u32>, ConnectError>> + Send + 'static {
    let (broker, queue) = (broker.clone(), queue.clone());
    move || {
        let connected = broker.connect();
        std::future::ready(connected.and_then(|it| it.subscribe(&queue, 2)))
    }
}

/// Returns the lines of a plain consumer and of one that reconnects, of several tasks each.
async fn lines(name: Option<&str>, has_span: bool) -> Vec<String> {
    let (log, _guard) = Log::start();
    for tasks in [1, 2] {
        let (_broker, queue) = queue();
        let shutdown = CancellationToken::new();
        let services = vec![service(has_span, shutdown.clone()); tasks];
        let mut consumer = Consumer::parallel(queue.subscribe(2).unwrap(), services)
            .shutdown(shutdown)
            .with_graceful_shutdown(sleep(5 * SECOND));
        if let Some(name) = name {
            consumer = consumer.name(name);
        }
        ends(consumer).await.unwrap();

        let (broker, queue) = self::queue();
        let mut consumer = Consumer::reconnecting(connect(&broker, &queue), move |shutdown| {
            service(has_span, shutdown)
        })
        .tasks(tasks)
        .with_graceful_shutdown(sleep(9 * SECOND));
        if let Some(name) = name {
            consumer = consumer.name(name);
        }
        let losing = async {
            sleep(5 * SECOND / 2).await;
            broker.drop_connections();
        };
        let (ended, ()) = tokio::join!(ends(consumer), losing);
        ended.unwrap();
    }
    log.lines()
}

#[tokio::test(start_paused = true)]
async fn every_event_of_a_consumer_bears_its_name() {
    for has_span in [false, true] {
        let lines = lines(Some("orders"), has_span).await;
        for said in [
            "connecting",
            "the handler works",
            "the job failed",
            "drain starting",
            "draining beside the next one",
            "session ended",
        ] {
            let about = lines.iter().filter(|line| line.contains(said));
            assert!(about.count() > 0, "{said}: {lines:#?}");
        }
        for line in &lines {
            assert!(line.contains("consumer.name=\"orders\""), "{line}");
            // Each job is a separate trace.
            assert_ne!(
                line.contains(" consumer{"),
                line.contains(" process{"),
                "{line}"
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_consumer_without_a_name_is_in_no_span_of_its_own() {
    for has_span in [false, true] {
        for line in lines(None, has_span).await {
            assert!(
                !line.contains("consumer.name") && !line.contains("consumer{"),
                "{line}"
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_span_of_the_callers_stays_the_parent() {
    use tracing::Instrument;

    let (log, _guard) = Log::start();
    let (_broker, queue) = queue();
    let consumer = Consumer::new(
        queue.subscribe(1).unwrap(),
        service(true, CancellationToken::new()),
    )
    .name("orders")
    .with_graceful_shutdown(sleep(2 * SECOND));
    ends(consumer)
        .instrument(tracing::info_span!("main"))
        .await
        .unwrap();
    let lines = log.lines();
    for of in [" main:consumer{", " main:process{"] {
        assert!(lines.iter().any(|line| line.contains(of)), "{lines:#?}");
    }
    assert!(lines.iter().all(|line| line.contains(" main:")));
}

#[cfg(feature = "metrics")]
#[tokio::test(start_paused = true)]
async fn every_metric_of_a_consumer_bears_its_name() {
    use metrics_util::debugging::DebuggingRecorder;

    let recorder = DebuggingRecorder::new();
    let _guard = metrics::set_default_local_recorder(&recorder);
    for name in ["orders", "bills"] {
        let (_broker, queue) = queue();
        let service = service(true, CancellationToken::new());
        let consumer = Consumer::new(queue.subscribe(1).unwrap(), service)
            .name(name)
            .with_graceful_shutdown(sleep(3 * SECOND));
        ends(consumer).await.unwrap();
    }
    let mut seen = std::collections::BTreeMap::<_, Vec<_>>::new();
    for (key, ..) in recorder.snapshotter().snapshot().into_vec() {
        let (_, key) = key.into_parts();
        let label = key.labels().find(|label| label.key() == "consumer.name");
        let name = label.unwrap_or_else(|| panic!("{key}")).value().to_owned();
        seen.entry(key.name().to_owned()).or_default().push(name);
    }
    assert!(seen.contains_key("tower_sentinel.running"), "{seen:?}");
    assert!(seen.contains_key("tower_sentinel.verdicts"), "{seen:?}");
    for names in seen.values() {
        assert!(names.contains(&"orders".to_owned()) && names.contains(&"bills".to_owned()));
    }
}
