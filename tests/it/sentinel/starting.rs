//! Jobs that find no thread to start on.

use std::{
    future::ready,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_sentinel::{
    DecisionExt, Outcome, SentinelLayer, SettlePolicy, ack_on_success,
    broker::memory::{Broker, Delivery},
    settle::decision::Decision,
};

use crate::support::{Count, Refused, current_thread, idle, turn};

const LIMIT: Duration = Duration::from_secs(10);

/// End of a job that waits for a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Limit,
    CallerDrops,
    Shutdown,
    RuntimeEnds,
}

#[tokio::test(start_paused = true)]
async fn a_job_that_never_started_never_will_and_is_given_back_uncharged() {
    for end in [
        End::Limit,
        End::CallerDrops,
        End::Shutdown,
        End::RuntimeEnds,
    ] {
        let queue = Broker::new().queue("jobs").declare();
        queue.publish(7);
        let mut deliveries = queue.subscribe(1).unwrap();
        let job = deliveries.next().await.unwrap().unwrap();
        // Nobody drives it, as if its threads were all blocked.
        let jobs = current_thread();
        let calls = Count::default();
        let called = calls.clone();
        let shutdown = CancellationToken::new();
        let outcomes = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&outcomes);
        let decide = move |tag: &_, outcome: &Outcome<(), Refused>| {
            let started = match outcome {
                Outcome::TimedOut(timed_out) => timed_out.started(),
                Outcome::Cancelled(cancelled) => cancelled.started(),
                _ => true,
            };
            seen.lock().unwrap().push((started, outcome.is_stopped()));
            ack_on_success()
                .delivery_limit(1)
                .decide(tag, outcome)
                .unwrap()
        };
        let mut sentinel = SentinelLayer::new(SettlePolicy::new(decide))
            .timeout(LIMIT)
            .max_abandoned(1)
            .shutdown(shutdown.clone())
            .runtime(jobs.handle().clone())
            .layer(service_fn(move |_: Delivery<u32>| {
                called.add();
                ready(Ok::<_, Refused>(()))
            }));
        let response = sentinel.ready().await.unwrap().call(job);
        let mut jobs = Some(jobs);
        match end {
            End::Limit => drop(response.await.unwrap()),
            End::CallerDrops => drop(response),
            End::Shutdown => {
                shutdown.cancel();
                drop(response.await.unwrap());
            }
            End::RuntimeEnds => {
                jobs.take().unwrap().shutdown_background();
                drop(response.await.unwrap());
            }
        }
        idle(&Handle::current()).await;
        let outcomes = outcomes.lock().unwrap().clone();
        assert_eq!(outcomes, [(false, true)], "{end:?}");
        let counts = queue.counts();
        assert_eq!((counts.ready, counts.dropped), (1, 0), "{end:?}");
        // It holds no thread, so it is not abandoned either.
        assert!(sentinel.ready().now_or_never().is_some(), "{end:?}");
        if let Some(jobs) = jobs {
            turn(&jobs);
            assert_eq!(jobs.metrics().num_alive_tasks(), 0);
            jobs.shutdown_background();
        }
        assert_eq!(calls.get(), 0, "{end:?}");
    }
}
