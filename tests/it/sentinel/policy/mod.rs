//! The policy: the times of its polls and calls, and the cost of its failures (G5, G6).

mod failures;
mod middleware;
mod readiness;
mod settle_timeout;

use std::{future::ready, time::Duration};

use tower::{Service, service_fn};

use crate::support::{Refused, Unit};

const SECOND: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(100);

fn returns() -> impl Service<Unit, Response = (), Error = Refused, Future: Send> + Clone + Send {
    service_fn(|_: Unit| ready(Ok::<_, Refused>(())))
}
