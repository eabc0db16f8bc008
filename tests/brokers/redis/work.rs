//! Workers that reconnect while servers come and go, and the jobs that they have done.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    sync::oneshot,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tower::service_fn;
use tower_sentinel::{
    Consumer, SentinelLayer, SettlePolicy, ack_on_success,
    broker::redis::{
        Connector, Delivery,
        redis::{Client, Connection, Value, cmd},
    },
    consumer::Summary,
};

use super::STREAM;

/// A worker in this process.
pub(super) struct Work {
    done: Arc<Mutex<HashMap<String, u32>>>,
    end: oneshot::Sender<()>,
    running: JoinHandle<Summary>,
}

impl Work {
    pub(super) fn start(connector: Connector) -> Self {
        let done = Arc::new(Mutex::new(HashMap::new()));
        let (end, ended) = oneshot::channel();
        let all = Arc::clone(&done);
        let process = move |job: Delivery| {
            let payload = String::from_utf8_lossy(job.as_ref()).into_owned();
            *all.lock().unwrap().entry(payload).or_insert(0) += 1;
            async { Ok::<_, Infallible>(()) }
        };
        let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
        let consumer = Consumer::reconnecting(connector, move |_| service_fn(process.clone()))
            .backoff(Duration::from_millis(20)..=Duration::from_millis(200))
            .sentinel(layer)
            .with_graceful_shutdown(async { drop(ended.await) });
        let running = tokio::spawn(async { consumer.await.unwrap() });
        Self { done, end, running }
    }

    /// Waits until all these jobs are done.
    pub(super) async fn has_done(&self, jobs: &[String]) {
        let waiting = async {
            while jobs
                .iter()
                .any(|job| !self.done.lock().unwrap().contains_key(job))
            {
                sleep(Duration::from_millis(10)).await;
            }
        };
        let waited = timeout(Duration::from_secs(60), waiting).await;
        let done = self.done.lock().unwrap().len();
        assert!(waited.is_ok(), "{done} of {} jobs are done", jobs.len());
    }

    /// Ends the worker; returns its summary and the number of jobs that it has done more than once.
    pub(super) async fn end(self) -> (Summary, usize) {
        self.end.send(()).ok();
        let ended = timeout(Duration::from_secs(60), self.running).await;
        let again = self
            .done
            .lock()
            .unwrap()
            .values()
            .filter(|&&n| n > 1)
            .count();
        (ended.expect("the worker does not end").unwrap(), again)
    }
}

/// Adds jobs with the names `name-0`, `name-1`, … at one of the servers that takes them.
///
/// A job whose fate is unknown is added again.
pub(super) async fn publish(urls: &[String], name: &str, number: usize) -> Vec<String> {
    let jobs: Vec<_> = (0..number).map(|n| format!("{name}-{n}")).collect();
    let mut connection: Option<Connection> = None;
    let mut next = 0;
    for job in &jobs {
        loop {
            let added = connection.as_mut().map(|connection| {
                cmd("XADD")
                    .arg(STREAM)
                    .arg("*")
                    .arg("payload")
                    .arg(job)
                    .query::<Value>(connection)
            });
            if let Some(Ok(_)) = added {
                break;
            }
            if added.is_some() {
                sleep(Duration::from_millis(20)).await;
            }
            next += 1;
            let client = Client::open(&*urls[next % urls.len()]).unwrap();
            let opened = client.get_connection_with_timeout(Duration::from_secs(1));
            connection = opened.ok().inspect(|connection| {
                let limit = Some(Duration::from_secs(1));
                connection.set_read_timeout(limit).unwrap();
            });
        }
    }
    jobs
}
