//! Times of a worker's pauses, and their traces.

use std::{
    fmt,
    sync::{Arc, Mutex},
    task::Poll,
    thread,
    time::Duration,
};

use tokio::time::sleep;
use tower::{Service, ServiceExt};
use tower_layer::Layer;
use tower_sentinel::{IntensityLayer, intensity::IntensityState};
use tower_test::mock;
use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

use super::{Fate, Worker, is_ready, let_it_pause, ms, paused, strict};
use crate::support::{Refused, Unit, call};

// === when it pauses ===

/// Runs jobs that are ok where `results` has a `.` and fail where it has an `x`, and returns after
/// how many it pauses.
async fn pauses_after(layer: &IntensityLayer, results: &str) -> Option<usize> {
    let worker = Worker::new(Fate::Ok);
    let mut service = layer.clone().window(4).layer(worker.clone());
    for (index, result) in results.chars().enumerate() {
        if !is_ready(&mut service).await {
            return Some(index);
        }
        worker.set(match result {
            'x' => Fate::Error,
            _ => Fate::Ok,
        });
        let _result = service.call(Unit::default()).await;
    }
    (!is_ready(&mut service).await).then_some(results.len())
}

#[tokio::test(start_paused = true)]
async fn it_pauses_once_enough_of_the_last_jobs_failed() {
    let half = IntensityLayer::new().threshold(0.5).minimum_sample(3);
    for (results, expected) in [
        ("", None),
        ("xx", None),
        ("xxx", Some(3)),
        (".x.", None),
        (".xx", Some(3)),
        ("x.x", Some(3)),
        // After a window full of successes, two more.
        ("........xx", Some(10)),
        ("...x...x...x", None),
        ("x..x", Some(4)),
        // The first failure has left the window.
        ("x...x.x", Some(7)),
        ("x...x..", None),
        // A success completes the sample.
        ("xx.", None),
        ("xx.x", Some(4)),
    ] {
        assert_eq!(pauses_after(&half, results).await, expected, "{results}");
    }
    let all = IntensityLayer::new().threshold(1.0).minimum_sample(0);
    assert_eq!(pauses_after(&all, "x").await, Some(1));
    assert_eq!(pauses_after(&all, ".xxx").await, None);
    assert_eq!(pauses_after(&all, ".xxxx").await, Some(5));
    // A sample above the window is the window.
    let patient = IntensityLayer::new().minimum_sample(1_000);
    assert_eq!(pauses_after(&patient, "xxxx").await, Some(4));
}

#[test]
fn settings_that_make_no_sense_panic() {
    type Set = fn(IntensityLayer) -> IntensityLayer;
    let settings: [Set; 7] = [
        |layer| layer.window(0),
        |layer| layer.threshold(0.0),
        |layer| layer.threshold(-0.1),
        |layer| layer.threshold(1.1),
        |layer| layer.threshold(f64::NAN),
        |layer| layer.pause(Duration::ZERO..=ms(1)),
        |layer| layer.pause(ms(2)..=ms(1)),
    ];
    for set in settings {
        let layer = IntensityLayer::new();
        assert!(thread::spawn(move || set(layer)).join().is_err());
    }
}

// === readiness of the inner service ===

#[tokio::test(start_paused = true)]
async fn readiness_errors_pass_through_in_a_pause_too() {
    let layer = strict();
    let (mut service, mut handle) = mock::spawn_layer::<Unit, (), _>(layer.clone());
    for _ in 0..2 {
        assert!(service.poll_ready().is_ready());
        let response = service.call(Unit::default());
        let (_, send) = handle.next_request().await.unwrap();
        send.send_error(Refused);
        response.await.unwrap_err();
    }
    assert!(paused(*layer.watch().borrow()).is_some());
    assert!(service.poll_ready().is_pending());
    for _ in 0..3 {
        handle.send_error("no connection");
        let Poll::Ready(Err(error)) = service.poll_ready() else {
            panic!("a readiness error is the caller's");
        };
        assert_eq!(error.to_string(), "no connection");
    }
    assert_eq!(paused(*layer.watch().borrow()), Some(ms(100)), "no result");
    // A call that is refused does not keep the probe either.
    sleep(ms(100)).await;
    assert!(service.poll_ready().is_ready());
    handle.send_error("no connection");
    assert!(matches!(service.poll_ready(), Poll::Ready(Err(_))));
    let mut other = layer.layer(Worker::new(Fate::Ok));
    assert!(is_ready(&mut other).await);
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_not_ready_does_not_take_the_probe() {
    let layer = strict();
    let mut service = layer.layer(Worker::new(Fate::Error));
    let_it_pause(&mut service).await;
    sleep(ms(100)).await;
    let (mut never, mut handle) = mock::spawn_layer::<Unit, (), _>(layer.clone());
    handle.allow(0);
    assert!(never.poll_ready().is_pending());
    assert!(is_ready(&mut service).await);
}

// === observations ===

#[tokio::test(start_paused = true)]
async fn the_state_can_be_watched() {
    let layer = strict();
    let mut state = layer.watch();
    let worker = Worker::new(Fate::Error);
    let mut service = layer.layer(worker.clone());
    assert_eq!(*state.borrow_and_update(), IntensityState::Running);
    let_it_pause(&mut service).await;
    assert_eq!(paused(*state.borrow_and_update()), Some(ms(100)));
    service.ready().await.unwrap();
    assert_eq!(*state.borrow_and_update(), IntensityState::Probing);
    let _refused = service.call(Unit::default()).await;
    assert_eq!(paused(*state.borrow_and_update()), Some(ms(200)));
    service.ready().await.unwrap();
    state.mark_unchanged();
    worker.set(Fate::Ok);
    let response = service.call(Unit::default());
    assert!(!state.has_changed().unwrap());
    response.await.unwrap();
    assert_eq!(*state.borrow_and_update(), IntensityState::Running);
    call(&mut service, Unit::default()).await.unwrap();
    assert!(!state.has_changed().unwrap());
    // A layer with other settings is another one.
    drop((layer.window(3), service));
    assert!(state.changed().await.is_err());
}

/// Records events, with their fields.
#[derive(Clone, Default)]
struct Events(Arc<Mutex<Vec<String>>>);

impl Subscriber for Events {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("tower_sentinel")
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn event(&self, event: &Event<'_>) {
        struct Line(String);

        impl Visit for Line {
            fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
                self.0 += &match field.name() {
                    "message" => format!(" {value:?}"),
                    name => format!(" {name}={value:?}"),
                };
            }
        }
        let mut line = Line(event.metadata().level().to_string());
        event.record(&mut line);
        self.0.lock().unwrap().push(line.0);
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

#[tokio::test(start_paused = true)]
async fn each_change_of_state_is_one_event() {
    let events = Events::default();
    let _guard = tracing::subscriber::set_default(events.clone());
    let worker = Worker::new(Fate::Error);
    let mut service = strict().layer(worker.clone());
    let_it_pause(&mut service).await;
    service.ready().await.unwrap();
    let _refused = service.call(Unit::default()).await;
    // A probe that comes back is no change.
    for _ in 0..3 {
        let mut unused = service.clone();
        unused.ready().await.unwrap();
    }
    service.ready().await.unwrap();
    worker.set(Fate::Ok);
    service.call(Unit::default()).await.unwrap();
    call(&mut service, Unit::default()).await.unwrap();
    assert_eq!(
        *events.0.lock().unwrap(),
        [
            "WARN pausing: most jobs fail failures=2 jobs=2 failed_probes=0 pause=100ms",
            "INFO probing with one job",
            "WARN pausing: most jobs fail failures=2 jobs=2 failed_probes=1 pause=200ms",
            "INFO probing with one job",
            "INFO resuming: the probe succeeded",
        ]
    );
}
