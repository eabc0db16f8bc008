//! A server that is killed again and again.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::time::{Instant, sleep, timeout};
use tower_sentinel::broker::nats::async_nats::jetstream::stream::RetentionPolicy;

use super::{SOON, jobs_of, run};

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_killed_again_and_again_loses_no_job() {
    const JOBS: usize = 10_000;
    // A killed server of 2.9 brings removed messages of a work queue back, and keeps others that
    // are gone as unacked.
    let mut jobs = jobs_of(RetentionPolicy::Limits, Duration::from_secs(2)).await;
    for batch in 0..JOBS / 1_000 {
        let mut acks = Vec::new();
        for i in 0..1_000 {
            let payload = (batch * 1_000 + i).to_string().into();
            acks.push(jobs.context.publish("jobs", payload).await.unwrap());
        }
        for ack in acks {
            ack.await.unwrap();
        }
    }
    let counts = Arc::new(Mutex::new(HashMap::new()));
    let deliveries = jobs.subscribe(64).await;
    let worker = tokio::spawn(run(
        deliveries,
        Arc::clone(&counts),
        Duration::from_millis(5),
    ));
    let mut kills = 0;
    let deadline = Instant::now() + Duration::from_secs(90);
    loop {
        let done = counts.lock().unwrap().len();
        if done >= JOBS {
            break;
        }
        assert!(Instant::now() < deadline, "{done} of {JOBS} jobs ran");
        if kills < 5 && done > kills * 1_500 + 500 {
            kills += 1;
            jobs.server.kill();
            sleep(Duration::from_millis(100)).await;
            jobs.server.restart();
        }
        sleep(Duration::from_millis(5)).await;
    }
    let settled = async {
        loop {
            let info = jobs.info().await;
            if info.num_pending == 0 && info.num_ack_pending == 0 {
                return;
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(SOON * 2, settled)
        .await
        .expect("every job is settled");
    assert!(!worker.is_finished(), "{:?}", worker.await);
    worker.abort();
    let counts = counts.lock().unwrap();
    assert_eq!(kills, 5);
    let duplicates: u32 = counts.values().map(|count| count - 1).sum();
    // More than the unsettled ones: the server confirms an ack before it writes it.
    println!("{JOBS} jobs, {kills} kills: {duplicates} ran once more");
}
