//! Children of a pool: their number, their start and their replacement.

use std::{collections::BTreeSet, fs, time::Duration};

use futures_util::future::join_all;
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::sleep;
use tower::Service;

use crate::{
    child::pool,
    ends::{gone, ready, run},
};

#[tokio::test]
async fn there_are_no_more_processes_than_are_allowed() {
    let pool = pool(2);
    let jobs = (0..20).map(|_| {
        let mut pool = pool.clone();
        async move { run(&mut pool, "pid").await.unwrap() }
    });
    let pids = join_all(jobs).await;
    let pids: BTreeSet<_> = pids.into_iter().collect();
    assert!(pids.len() <= 2, "{pids:?}");
}

#[tokio::test]
async fn a_process_is_replaced_after_its_jobs() {
    let mut pool = pool(1).max_jobs(3);
    let mut pids = Vec::new();
    for _ in 0..7 {
        pids.push(run(&mut pool, "pid").await.unwrap());
    }
    assert_eq!((&pids[0], &pids[3]), (&pids[2], &pids[5]));
    assert!(pids[2] != pids[3] && pids[5] != pids[6]);
    gone(&pids[0]).await;
    gone(&pids[3]).await;
}

#[tokio::test]
async fn a_process_is_kept_after_a_panic_if_that_is_set() {
    for is_kept in [true, false] {
        let mut pool = pool(1).reuse_after_panic(is_kept);
        let pid = run(&mut pool, "pid").await.unwrap();
        run(&mut pool, "panic").await.unwrap_err();
        assert_eq!(run(&mut pool, "pid").await.unwrap() == pid, is_kept);
        if !is_kept {
            gone(&pid).await;
        }
    }
}

#[tokio::test]
async fn a_program_that_cannot_start_makes_it_unready() {
    for pool in [
        pool(1).program("/nonexistent"),
        // It ends at once, and serves nothing.
        pool(1).program("/bin/true"),
        pool(1)
            .program("/bin/sleep")
            .arguments(["1000"])
            .start_timeout(Duration::from_millis(10)),
    ] {
        let mut pool = pool;
        let is_ready = async { ready(&mut pool).await.map(drop) };
        tokio::select! {
            _ = is_ready => panic!("it is ready"),
            () = sleep(Duration::from_millis(300)) => {}
        }
    }
}

#[tokio::test]
async fn an_idle_process_that_has_ended_is_replaced() {
    let mut pool = pool(1);
    // One that waits in the pool, and one that is held for the next job.
    for is_held in [false, true] {
        let pid = run(&mut pool, "pid").await.unwrap();
        if is_held {
            ready(&mut pool).await.unwrap();
        }
        let id = Pid::from_raw(pid.parse().unwrap()).unwrap();
        kill_process(id, Signal::KILL).unwrap();
        gone(&pid).await;
        assert_eq!(run(&mut pool, "four").await.unwrap(), "4");
    }
}

#[tokio::test]
async fn a_pool_that_is_dropped_leaves_nothing_behind() {
    let mut first = pool(1);
    let pid = run(&mut first, "pid").await.unwrap();
    drop(first);
    gone(&pid).await;

    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let mut many = pool(1).max_jobs(1);
    run(&mut many, "pid").await.unwrap();
    let before = descriptors();
    for _ in 0..20 {
        let pid = run(&mut many, "pid").await.unwrap();
        gone(&pid).await;
    }
    // Those of other tests come and go.
    assert!(descriptors() <= before + 10);
}

#[tokio::test]
async fn a_place_is_free_again_when_a_ready_clone_is_dropped() {
    let pool = pool(1);
    for _ in 0..3 {
        let mut clone = pool.clone();
        ready(&mut clone).await.unwrap();
    }
    let mut clone = pool.clone();
    let answer = ready(&mut clone).await.unwrap().call("four".to_owned());
    assert_eq!(answer.await.unwrap(), "4");
}
