//! Keep-alive: its times, the effects of the broker's responses, and its end once the job is settled.

mod asking;
mod ending;
mod service;

use std::{
    fmt,
    future::pending,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::time::{Instant, sleep};
use tower::{Layer, service_fn};
use tower_sentinel::{
    Job, KeepAliveLayer, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    settle::{Capabilities, Lease, Reason, Settle, Unsettled},
};

use crate::support::{Bomb, Refused, call, raise};

const SECOND: Duration = Duration::from_secs(1);

/// The interval of the layers here, unless they say otherwise.
const INTERVAL: Duration = Duration::from_secs(8);

/// Time that a slow keep-alive takes until it sends its request.
const SLOW: Duration = Duration::from_millis(400);

/// Behaviour of one keep-alive.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ask {
    Held,
    Lost,
    Error,
    /// Fails with an error that panics when it is printed, and when it is dropped.
    BadError,
    /// Waits for [`SLOW`], as for a connection, then sends.
    Slow,
    Hang,
    /// Hangs, and panics when it is dropped.
    HangAndPanic,
    PanicInCall,
    PanicInFuture,
}

/// Requests that the broker has seen.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Seen {
    Asked,
    /// By a slow keep-alive.
    Sent,
    Told(Verdict),
}

/// A tag that does its keep-alives in turn, the last of them for ever.
#[derive(Clone)]
struct Tag {
    script: &'static [Ask],
    capabilities: Capabilities,
    started: Instant,
    seen: Arc<Mutex<Vec<(Seen, Duration)>>>,
}

impl Tag {
    fn new(script: &'static [Ask]) -> Self {
        Self {
            script,
            capabilities: Capabilities::none().keep_alive(),
            started: Instant::now(),
            seen: Arc::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(Seen, Duration)>> {
        self.seen.lock().unwrap()
    }

    fn see(&self, seen: Seen) {
        let at = self.started.elapsed();
        self.lock().push((seen, at));
    }

    fn seen(&self) -> Vec<Seen> {
        self.lock().iter().map(|(seen, _)| *seen).collect()
    }

    /// Returns when the broker was asked, in seconds.
    fn asked(&self) -> Vec<f64> {
        let seen = self.lock();
        let asked = seen.iter().filter(|(seen, _)| *seen == Seen::Asked);
        asked.map(|(_, at)| at.as_secs_f64()).collect()
    }

    fn verdicts(&self) -> Vec<Verdict> {
        let told = |seen| match seen {
            Seen::Told(verdict) => Some(verdict),
            _ => None,
        };
        self.seen().into_iter().filter_map(told).collect()
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tag 7")
    }
}

/// An error that can panic in each of its methods.
#[derive(Debug)]
struct Fault(Option<Bomb>);

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("connection reset"),
            Some(_) => raise("in Display"),
        }
    }
}

impl std::error::Error for Fault {}

impl Settle for Tag {
    type Error = Fault;
    type Future = BoxFuture<'static, Result<(), Unsettled<Self, Fault>>>;

    fn settle(self, verdict: Verdict, _: Reason) -> Self::Future {
        self.see(Seen::Told(verdict));
        Box::pin(async { Ok(()) })
    }

    fn keep_alive(&self) -> impl Future<Output = Result<Lease, Fault>> + Send {
        let index = self.asked().len().min(self.script.len() - 1);
        let ask = self.script[index];
        self.see(Seen::Asked);
        if ask == Ask::PanicInCall {
            raise("in keep_alive");
        }
        async move {
            match ask {
                Ask::Held => Ok(Lease::Held),
                Ask::Lost => Ok(Lease::Lost),
                Ask::Error => Err(Fault(None)),
                Ask::BadError => Err(Fault(Some(Bomb))),
                Ask::Slow => {
                    sleep(SLOW).await;
                    self.see(Seen::Sent);
                    Ok(Lease::Held)
                }
                Ask::Hang => pending().await,
                Ask::HangAndPanic => {
                    let _bomb = Bomb;
                    pending().await
                }
                Ask::PanicInCall => unreachable!(),
                Ask::PanicInFuture => raise("in the future of keep_alive"),
            }
        }
    }

    fn deliveries(&self) -> Option<u32> {
        None
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }
}

/// A job that is all in its tag.
impl Job for Tag {
    type Tag = Self;

    fn tag(&self) -> Self {
        self.clone()
    }
}

/// A job that takes its time.
struct Delivery {
    tag: Tag,
    takes: Duration,
}

impl Job for Delivery {
    type Tag = Tag;

    fn tag(&self) -> Tag {
        self.tag.clone()
    }
}

fn sentinel() -> SentinelLayer<SettlePolicy> {
    SentinelLayer::new(SettlePolicy::new(ack_on_success())).no_timeout()
}

async fn work(delivery: Delivery) -> Result<(), Refused> {
    sleep(delivery.takes).await;
    Ok(())
}

/// Runs a job that takes `takes`, and returns its tag.
async fn run(script: &'static [Ask], takes: Duration) -> Tag {
    run_with(KeepAliveLayer::new(INTERVAL), script, takes).await
}

async fn run_with(layer: KeepAliveLayer, script: &'static [Ask], takes: Duration) -> Tag {
    let tag = Tag::new(script);
    let mut service = sentinel().layer(layer.layer(service_fn(work)));
    let delivery = Delivery {
        tag: tag.clone(),
        takes,
    };
    call(&mut service, delivery).await.unwrap();
    tag
}
