//! Callers that drop the response future: places, times, and the end of the job.

mod first_cause;
mod moments;
mod runtimes;

use std::{fmt::Debug, pin::Pin, time::Duration};

use futures_util::poll;
use tokio::time::sleep;
use tower::{Service, ServiceExt};
use tower_sentinel::{SentinelLayer, outcome::CancelReason, sentinel::OnDrop};

use crate::support::{Recorder, Script, Seen};

const SECOND: Duration = Duration::from_secs(1);
const LIMIT: Duration = Duration::from_secs(10);
const BOTH: [OnDrop; 2] = [OnDrop::Abort, OnDrop::Detach];

fn layer(recorder: &Recorder) -> SentinelLayer<Script> {
    SentinelLayer::new(recorder.policy()).timeout(LIMIT)
}

fn caller_dropped() -> Seen {
    Seen::cancelled(CancelReason::CallerDropped, true)
}

/// Calls `sentinel`, polls the response once and lets `time` pass without a look at it.
async fn call_and_look_away<S, J>(sentinel: &mut S, job: J, time: Duration) -> Pin<Box<S::Future>>
where
    S: Service<J, Error: Debug>,
{
    let mut response = Box::pin(sentinel.ready().await.unwrap().call(job));
    assert!(poll!(&mut response).is_pending());
    sleep(time).await;
    response
}
