//! Time limits, and the ladder by which a job is stopped.

mod blocking;
mod ladder;
mod limits;

use std::{future::Future, time::Duration};

use tower::{Layer, service_fn};
use tower_sentinel::{Outcome, Report, SentinelLayer, outcome::TimedOut};

use crate::support::{Recorder, Refused, Script, Unit, call};

const SECOND: Duration = Duration::from_secs(1);
const LIMIT: Duration = Duration::from_secs(10);
const GRACE: Duration = Duration::from_secs(3);
const STOP_WAIT: Duration = Duration::from_secs(5);

fn layer(recorder: &Recorder) -> SentinelLayer<Script> {
    SentinelLayer::new(recorder.policy())
        .timeout(LIMIT)
        .grace(GRACE)
        .stop_wait(STOP_WAIT)
}

/// Runs a job under `layer`.
async fn run<F>(
    layer: SentinelLayer<Script>,
    job: impl Fn() -> F + Clone + Send + 'static,
) -> Report<Unit, (), Refused>
where
    F: Future<Output = Result<(), Refused>> + Send + 'static,
{
    let mut sentinel = layer.layer(service_fn(move |_: Unit| job()));
    call(&mut sentinel, Unit::default()).await.unwrap()
}

fn timed_out<Tag: std::fmt::Debug>(report: Report<Tag, (), Refused>) -> TimedOut {
    match report.outcome {
        Outcome::TimedOut(timed_out) => timed_out,
        other => panic!("{:?}: {other:?}", report.tag),
    }
}
