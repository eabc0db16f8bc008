//! Jobs that are cancelled: by themselves, their tasks, a token or the end of their runtime.

mod first_cause;
mod handle;
mod requests;
mod shutdown;
mod sources;

use std::{future::Future, time::Duration};

use tower::{Layer, service_fn};
use tower_sentinel::{Report, SentinelLayer};

use crate::support::{Recorder, Refused, Script, Unit, call};

const SECOND: Duration = Duration::from_secs(1);
const LIMIT: Duration = Duration::from_secs(10);

fn layer(recorder: &Recorder) -> SentinelLayer<Script> {
    SentinelLayer::new(recorder.policy()).timeout(LIMIT)
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
