//! An outage wastes no more deliveries than the bound.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tower_layer::Layer;
use tower_sentinel::{IntensityLayer, SentinelLayer};

use super::{Fate, Worker, let_it_pause, ms};
use crate::support::{Count, Recorder, Refused, Unit, until};

/// A dependency that responds at once, and refuses while it is down.
#[derive(Clone, Debug, Default)]
struct Dependency {
    is_down: Arc<AtomicBool>,
    wasted: Count,
    served: Count,
}

/// Result of an outage.
#[derive(Debug)]
struct Outage {
    wasted: u64,
    /// From its end to the first job that succeeds.
    until_resumed: Duration,
    /// Number of jobs that succeed in the millisecond after that one.
    served: usize,
}

/// Feeds jobs without end through a gate, with an outage of 10 s from 1 s on.
async fn outage(layer: IntensityLayer, gate: usize, work: Duration) -> Outage {
    let dependency = Dependency::default();
    let Dependency {
        is_down,
        wasted,
        served,
    } = dependency.clone();
    let recorder = Recorder::default();
    let service = service_fn(move |_: Unit| {
        let Dependency {
            is_down,
            wasted,
            served,
        } = dependency.clone();
        async move {
            let fails_at_once = is_down.load(SeqCst);
            if !fails_at_once {
                sleep(work).await;
            }
            match is_down.load(SeqCst) {
                true => {
                    wasted.add();
                    Err(Refused)
                }
                false => {
                    served.add();
                    Ok(())
                }
            }
        }
    });
    let mut stack = ServiceBuilder::new()
        .concurrency_limit(gate)
        .layer(SentinelLayer::new(recorder.policy()))
        .layer(layer)
        .service(service);
    let consumer = tokio::spawn(async move {
        let mut responses = JoinSet::new();
        loop {
            let response = stack.ready().await.unwrap().call(Unit::default());
            responses.spawn(response);
            while responses.try_join_next().is_some() {}
        }
    });
    sleep(Duration::from_secs(1)).await;
    is_down.store(true, SeqCst);
    sleep(Duration::from_secs(10)).await;
    is_down.store(false, SeqCst);
    let (ended, before) = (Instant::now(), served.get());
    until(|| served.get() > before).await;
    let until_resumed = ended.elapsed();
    let before = served.get();
    sleep(work * 10).await;
    consumer.abort();
    Outage {
        wasted: wasted.get() as u64,
        until_resumed,
        served: served.get() - before,
    }
}

const OUTAGE: Duration = Duration::from_secs(10);

#[tokio::test(start_paused = true)]
async fn an_outage_wastes_no_more_than_the_bound() {
    let layer = IntensityLayer::new;
    for (layer, gate, bound, wasted) in [
        // 64 are in flight when it begins, and 10 of these are enough.
        (layer(), 64, 10 + 63 + 6, 64 + 6),
        // One at a time: the bound is reached.
        (layer(), 1, 10 + 6, 10 + 6),
        (layer().window(100).threshold(0.55), 1, 55 + 6, 55 + 6),
        (layer().window(100).minimum_sample(80), 1, 80 + 6, 50 + 6),
        (layer().window(100).threshold(0.55), 8, 55 + 7 + 6, 56 + 6),
        (
            layer().pause(ms(10)..=ms(250)),
            8,
            // 10, 20, … 160 ms, and 250 ms from then on.
            10 + 7 + 5 + (10_000 - 310) / 250,
            16 + 5 + (10_000 - 310) / 250,
        ),
    ] {
        let case = format!("{layer:?} behind {gate}");
        assert_eq!(layer.most_wasted(gate, OUTAGE), bound, "{case}");
        let outage = outage(layer, gate, ms(1)).await;
        assert_eq!(outage.wasted, wasted, "{case}");
        assert!(outage.wasted <= bound, "{case}");
    }
}

#[tokio::test(start_paused = true)]
async fn full_throughput_is_back_after_one_probe() {
    let outage = outage(IntensityLayer::new(), 64, ms(1)).await;
    // The seventh pause, of 6.4 s, began 6.3 s after the outage did, and its probe is the first to
    // succeed. `until` looks in steps that grow, up to 75 ms here.
    let expected = ms(100 + 200 + 400 + 800 + 1_600 + 3_200 + 6_400) - OUTAGE;
    assert!(
        (expected..expected + ms(100)).contains(&outage.until_resumed),
        "{outage:?}"
    );
    // 64 in each millisecond.
    assert_eq!(outage.served, 640);
}

/// Jobs of 64 ms, of which one ends in each millisecond, so that each that fails is replaced
/// before the next one does.
#[tokio::test(start_paused = true)]
async fn what_was_let_through_before_a_pause_is_wasted_too() {
    let (failures, recorder) = (Count::default(), Recorder::default());
    let layer = IntensityLayer::new().pause(OUTAGE..=OUTAGE);
    let bound = layer.most_wasted(64, Duration::ZERO);
    let failing = {
        let failures = failures.clone();
        service_fn(move |_: Unit| {
            let failures = failures.clone();
            async move {
                sleep(ms(64)).await;
                failures.add();
                Err::<(), _>(Refused)
            }
        })
    };
    let mut stack = ServiceBuilder::new()
        .concurrency_limit(64)
        .layer(SentinelLayer::new(recorder.policy()))
        .layer(layer)
        .service(failing);
    let consumer = tokio::spawn(async move {
        loop {
            tokio::spawn(stack.ready().await.unwrap().call(Unit::default()));
            sleep(ms(1)).await;
        }
    });
    sleep(OUTAGE / 2).await;
    consumer.abort();
    assert_eq!(failures.get() as u64, bound);
    assert_eq!(bound, 10 + 63);
}

#[test]
fn pauses_below_a_millisecond_grow_in_the_bound_as_they_do() {
    // In whole milliseconds, 0.3 ms doubled is 1, 1, 2, 5, 10, ... and no two alike end the growth.
    let short = IntensityLayer::new().pause(Duration::from_micros(300)..=Duration::from_secs(30));
    let probes = |outage| short.most_wasted(1, outage) - 10;
    assert_eq!(probes(Duration::from_micros(2_300)), 3);
    assert!(
        probes(Duration::from_secs(10)) < 17,
        "{}",
        probes(Duration::from_secs(10))
    );
    let tiny = IntensityLayer::new().pause(Duration::from_nanos(1)..=Duration::from_secs(30));
    let most = tiny.most_wasted(1, Duration::from_secs(10)) - 10;
    assert!(most < 40, "{most}");
}

#[tokio::test(start_paused = true)]
async fn a_bound_is_found_at_once_for_any_setting() {
    let tiny = IntensityLayer::new().pause(Duration::from_nanos(1)..=Duration::from_nanos(1));
    assert_eq!(tiny.most_wasted(1, ms(1)), 10 + 1_000_000);
    assert_eq!(tiny.most_wasted(1, Duration::MAX), u64::MAX);
    let endless = IntensityLayer::new().pause(Duration::MAX..=Duration::MAX);
    assert_eq!(endless.most_wasted(0, OUTAGE), 10);
    assert_eq!(endless.most_wasted(usize::MAX, OUTAGE), u64::MAX);
    // Half of them, and it is found though they can't be tried one by one.
    let huge = IntensityLayer::new().window(usize::MAX);
    let half = huge.most_wasted(1, Duration::ZERO);
    assert!((1 << 62..=1 << 63).contains(&half), "{half}");
    for window in 1..200 {
        for threshold in [0.01, 0.3, 0.5, 0.55, 0.999, 1.0] {
            let layer = IntensityLayer::new().window(window).minimum_sample(1);
            let layer = layer.threshold(threshold);
            let run = (1..=window).find(|it| *it as f64 / window as f64 >= threshold);
            let found = layer.most_wasted(1, Duration::ZERO);
            assert_eq!(found, run.unwrap() as u64, "{threshold} of {window}");
        }
    }

    // A pause that no timer reaches has no end.
    let mut service = endless.layer(Worker::new(Fate::Ok));
    let_it_pause(&mut service).await;
    let patience = Duration::from_secs(60 * 60);
    assert!(timeout(patience, service.ready()).await.is_err());
}
