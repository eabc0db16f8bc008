//! A subscriber that panics at each event of the crate, such as one that prints to a closed pipe: it costs no
//! job and no task.

use std::{
    panic::resume_unwind,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use tracing::{Event, Subscriber};
use tracing_subscriber::{
    Layer,
    layer::{Context, SubscriberExt},
    util::SubscriberInitExt,
};

use tower_sentinel::conformance::each_outcome_settles_as_decided;

use super::{TestBroker, losing, passes};
use crate::child::{Child, setting};

/// Panics, and counts.
#[derive(Clone, Default)]
struct Bursts(Arc<AtomicUsize>);

impl<S: Subscriber> Layer<S> for Bursts {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if event.metadata().target().starts_with("tower_sentinel") {
            self.0.fetch_add(1, Ordering::Relaxed);
            // No `panic!`: its backtrace would be printed each time.
            resume_unwind(Box::new("in the subscriber"));
        }
    }
}

/// Runs scenarios in a process of their own, as the subscriber is that of all of its threads.
pub(crate) async fn in_a_child<B: TestBroker>(module: &str, test: &str) {
    if setting("LOUD").is_none() {
        return Child::start(module, test, &[("LOUD", "")]).end();
    }
    let bursts = Bursts::default();
    tracing_subscriber::registry().with(bursts.clone()).init();
    let broker = B::start().await;
    passes(each_outcome_settles_as_decided(&broker)).await;
    broker.stop().await;
    let broker = B::start().await;
    losing::a_cut_in_the_middle_of_a_settlement_loses_nothing(&broker).await;
    broker.stop().await;
    // One for each outcome that is not `Completed`, at least.
    let count = bursts.0.load(Ordering::Relaxed);
    assert!(count > 4, "{count}");
}
