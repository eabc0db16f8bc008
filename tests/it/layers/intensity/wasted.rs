//! The number of deliveries that an outage can waste, as it is computed.

use tower_sentinel::IntensityLayer;

use super::{ms, strict};

#[test]
fn a_pause_that_ends_with_the_outage_is_followed_by_a_probe() {
    // Two until the pause; pauses end after 100 ms, 300 ms and 700 ms.
    for (outage, wasted) in [(99, 2), (100, 3), (299, 3), (300, 4), (699, 4), (700, 5)] {
        assert_eq!(strict().most_wasted(1, ms(outage)), wasted, "{outage} ms");
    }
}

#[test]
fn pauses_that_no_longer_grow_are_divided_out() {
    let steady = strict().pause(ms(100)..=ms(100));
    assert_eq!(steady.most_wasted(1, ms(1_000)), 2 + 10);
    assert_eq!(steady.most_wasted(1, ms(1_099)), 2 + 10);
    let growing = strict().pause(ms(100)..=ms(300));
    // 100 ms, 300 ms, then every 300 ms.
    assert_eq!(growing.most_wasted(1, ms(1_200)), 2 + 5);
}

#[test]
fn the_jobs_in_flight_are_wasted_too() {
    let layer: IntensityLayer = strict();
    assert_eq!(layer.most_wasted(0, ms(0)), 2);
    assert_eq!(layer.most_wasted(64, ms(0)), 2 + 63);
}
