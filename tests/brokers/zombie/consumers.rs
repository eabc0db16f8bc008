//! The dependency of the jobs, and their consumers: with a sentinel, and without.

use std::{
    error::Error,
    fmt, fs,
    future::pending,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use futures_util::StreamExt;
use tokio::time::sleep;
use tower::{ServiceBuilder, util::option_layer};
use tower_sentinel::{
    Consumer, DecisionExt, IntensityLayer, SentinelLayer, Verdict, ack_on_success,
    broker::rabbitmq::{
        self, Delivery, Queue,
        lapin::{
            options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions},
            types::FieldTable,
        },
    },
    outcome::OutcomeKind,
};

use super::PREFETCH;
use crate::child::{Ledger, asked_to_end, recording, setting};

/// A time limit for jobs that hang.
const LIMIT: Duration = Duration::from_millis(500);

// === the dependency ===

/// Is up while its file exists.
#[derive(Clone, Debug)]
pub(super) struct Dependency(pub(super) PathBuf);

impl Dependency {
    pub(super) fn new(kind: &str) -> Self {
        // A test in another tree of .ci/in-suite may have the same id.
        let drawn = fastrand::u32(..);
        let name = format!("dependency-{kind}-{}-{drawn}", std::process::id());
        Self(Path::new(env!("CARGO_TARGET_TMPDIR")).join(name))
    }

    pub(super) fn go_up(&self) {
        fs::write(&self.0, "").unwrap();
    }

    pub(super) fn go_down(&self) {
        fs::remove_file(&self.0).unwrap();
    }

    /// Works on a job. While it is down, a third of the jobs fail, a third panic, a third hang.
    async fn ask(&self) -> Result<(), Down> {
        static FAILURES: AtomicU32 = AtomicU32::new(0);
        sleep(Duration::from_millis(20)).await;
        if self.0.exists() {
            return Ok(());
        }
        match FAILURES.fetch_add(1, Ordering::Relaxed) % 3 {
            0 => Err(Down),
            1 => panic!("{Down}"),
            _ => pending().await,
        }
    }
}

impl Drop for Dependency {
    fn drop(&mut self) {
        // The consumers only look.
        if setting("ROLE").is_none() {
            drop(fs::remove_file(&self.0));
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Down;

impl fmt::Display for Down {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the dependency is down")
    }
}

impl Error for Down {}

// === the consumers ===

/// Settings of a consumer's process.
fn settings() -> (String, String, Dependency) {
    let [address, queue, dependency] =
        ["ADDRESS", "QUEUE", "DEPENDENCY"].map(|name| setting(name).unwrap());
    (address, queue, Dependency(dependency.into()))
}

pub(super) fn intensity() -> IntensityLayer {
    IntensityLayer::new().pause(Duration::from_millis(100)..=Duration::from_secs(1))
}

pub(super) async fn consume(has_intensity: bool) {
    let (address, name, dependency) = settings();
    let queue = match name.starts_with("quorum") {
        true => Queue::quorum(name),
        false => Queue::classic(name),
    };
    let queue = queue.prefetch(PREFETCH);
    let connect = move || {
        let (queue, address) = (queue.clone(), address.clone());
        async move {
            let connection = rabbitmq::connect(&address).await?;
            let deliveries = queue.subscribe(&connection).await?;
            Ok::<_, Box<dyn Error + Send + Sync>>(deliveries)
        }
    };
    let ledger = Ledger::own();
    let decision = ack_on_success().on_error(|_: &Down| Verdict::release());
    let policy = recording(decision, ledger.clone());
    let intensity = has_intensity.then(intensity);
    let make_service = move |shutdown| {
        let dependency = dependency.clone();
        ServiceBuilder::new()
            .concurrency_limit(PREFETCH)
            .layer(
                SentinelLayer::new(policy.clone())
                    .timeout(LIMIT)
                    .shutdown(shutdown),
            )
            .layer(option_layer(intensity.clone()))
            .service_fn(move |job: Delivery| {
                let dependency = dependency.clone();
                async move { dependency.ask().await.map(|()| text(job.as_ref())) }
            })
    };
    let summary = Consumer::reconnecting(connect, make_service)
        .with_graceful_shutdown(asked_to_end())
        .await;
    let summary = summary.unwrap_or_else(|error| panic!("{error}"));
    for kind in [
        OutcomeKind::Failed,
        OutcomeKind::Panicked,
        OutcomeKind::TimedOut,
    ] {
        ledger.write(kind.as_str(), &summary.outcomes(kind).to_string());
    }
    assert_eq!((summary.failed, summary.abandoned), (0, 0), "{summary:?}");
}

/// A frequent mistake: nobody settles a job that does not come to its end.
pub(super) async fn consume_naively() {
    let (address, name, dependency) = settings();
    let ledger = Ledger::own();
    let connection = rabbitmq::connect(&address).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let options = BasicQosOptions::default();
    let prefetch = PREFETCH.try_into().unwrap();
    channel.basic_qos(prefetch, options).await.unwrap();
    let options = BasicConsumeOptions::default();
    let consumer = channel.basic_consume(name.into(), "".into(), options, FieldTable::default());
    let mut jobs = consumer.await.unwrap();
    let consuming = async {
        while let Some(job) = jobs.next().await {
            let job = job.unwrap();
            let (ledger, dependency) = (ledger.clone(), dependency.clone());
            ledger.write("received", &text(&job.data));
            tokio::spawn(async move {
                dependency.ask().await?;
                job.ack(BasicAckOptions::default()).await.unwrap();
                ledger.write("acked", &text(&job.data));
                Ok::<_, Down>(())
            });
        }
    };
    tokio::select! {
        () = consuming => panic!("the stream ended"),
        () = asked_to_end() => {}
    }
}

fn text(body: &[u8]) -> String {
    String::from_utf8(body.to_vec()).unwrap()
}
