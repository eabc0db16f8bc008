//! Stops of jobs in their processes, by a sentinel.

use std::{
    convert::Infallible,
    fmt::Display,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio_util::sync::CancellationToken;
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_sentinel::{Outcome, Report, SentinelLayer, process::ProcessError};

use crate::{
    child::{Answer, pool},
    ends::{gone, run, runs},
};

type Outcomes = Outcome<String, ProcessError<String, std::str::Utf8Error>>;

const MILLIS: fn(u64) -> Duration = Duration::from_millis;

/// A limit by which a job has begun, also on a busy machine.
const BEGUN: Duration = Duration::from_millis(500);

macro_rules! layer {
    () => {
        SentinelLayer::with_tag(
            service_fn(
                |report: Report<(), String, ProcessError<String, std::str::Utf8Error>>| async {
                    Ok::<Outcomes, Infallible>(report.outcome)
                },
            ),
            |_: &String| (),
        )
    };
}

#[tokio::test]
async fn a_job_that_cannot_be_stopped_is_stopped_with_its_process() {
    for job in ["spin", "block", "wait"] {
        let mut pool = pool(1);
        let pid = run(&mut pool, "pid").await.unwrap();
        let mut sentinel = layer!().timeout(BEGUN).layer(pool.clone());
        let outcome = sentinel.ready().await.unwrap().call(job.to_owned());
        let Outcome::TimedOut(timed_out) = outcome.await.unwrap() else {
            panic!("{job}");
        };
        assert!(timed_out.stopped() && timed_out.started(), "{job}");
        gone(&pid).await;
        assert_eq!(run(&mut pool, "four").await.unwrap(), "4", "{job}");
    }
}

#[tokio::test]
async fn a_job_is_told_to_stop_in_its_process_and_has_its_grace() {
    let mut pool = pool(1);
    let pid = run(&mut pool, "pid").await.unwrap();
    let layer = layer!().grace(Duration::from_secs(30));
    let limited = layer.clone().timeout(MILLIS(100));
    let mut sentinel = limited.layer(pool.clone());
    let outcome = sentinel.ready().await.unwrap().call("stop".to_owned());
    assert!(matches!(
        outcome.await.unwrap(),
        Outcome::Completed(text) if text == "told to stop"
    ));
    drop(sentinel);

    // One that blocks its thread, and looks itself.
    let shutdown = CancellationToken::new();
    let endless = layer.no_timeout().shutdown(shutdown.clone());
    let mut sentinel = endless.layer(pool.clone());
    let begin = Begin::new("heed");
    let outcome = sentinel.ready().await.unwrap().call(begin.job("heed"));
    let outcome = tokio::spawn(outcome);
    begin.has_begun().await;
    shutdown.cancel();
    assert!(matches!(
        outcome.await.unwrap().unwrap(),
        Outcome::Completed(text) if text == "told to stop"
    ));
    drop(sentinel);
    // It has done well.
    assert_eq!(run(&mut pool, "pid").await.unwrap(), pid);
}

#[tokio::test]
async fn a_stop_is_one_of_its_job_alone() {
    let pool = pool(1);
    let shutdown = CancellationToken::new();
    shutdown.cancel();
    let layer = layer!().no_timeout().grace(Duration::from_secs(1_000));
    let mut stopped = layer.shutdown(shutdown).layer(pool.clone());
    for _ in 0..20 {
        // It ends at the time at which it is told to.
        let outcome = stopped.ready().await.unwrap().call("four".to_owned());
        assert!(matches!(outcome.await.unwrap(), Outcome::Completed(text) if text == "4"));
        assert_eq!(run(&mut pool.clone(), "is told").await.unwrap(), "false");
    }
}

/// File that a job makes when it has begun.
pub(crate) struct Begin(PathBuf);

impl Begin {
    pub(crate) fn new(name: &str) -> Self {
        let name = format!(
            "process-{name}-{}-{}",
            std::process::id(),
            fastrand::u32(..)
        );
        Self(Path::new(env!("CARGO_TARGET_TMPDIR")).join(name))
    }

    fn job(&self, deed: &str) -> String {
        format!("{deed} {}", self.path())
    }

    pub(crate) fn path(&self) -> impl Display {
        self.0.display()
    }

    pub(crate) async fn has_begun(&self) {
        while !self.0.exists() {
            tokio::time::sleep(MILLIS(5)).await;
        }
    }
}

impl Drop for Begin {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.0));
    }
}

#[tokio::test]
async fn a_shutdown_and_a_lost_caller_stop_the_process() {
    let mut pool = pool(1);
    let pid = run(&mut pool, "pid").await.unwrap();
    let shutdown = CancellationToken::new();
    let mut sentinel = layer!()
        .no_timeout()
        .shutdown(shutdown.clone())
        .layer(pool.clone());
    let begin = Begin::new("shutdown");
    let outcome = tokio::spawn(sentinel.ready().await.unwrap().call(begin.job("begin")));
    begin.has_begun().await;
    shutdown.cancel();
    assert!(matches!(outcome.await.unwrap().unwrap(), Outcome::Cancelled(stop) if stop.stopped()));
    gone(&pid).await;

    let pid = run(&mut pool, "pid").await.unwrap();
    let mut sentinel = layer!().no_timeout().layer(pool.clone());
    let begin = Begin::new("caller");
    let outcome = tokio::spawn(sentinel.ready().await.unwrap().call(begin.job("begin")));
    begin.has_begun().await;
    outcome.abort();
    gone(&pid).await;
    assert_eq!(run(&mut pool, "four").await.unwrap(), "4");
}

#[tokio::test]
async fn what_a_stopped_job_has_started_is_stopped_too() {
    let mut pool = pool(1);
    let sleeper = run(&mut pool, "fork").await.unwrap();
    assert!(runs(&sleeper));
    let mut sentinel = layer!().timeout(BEGUN).layer(pool.clone());
    let outcome = sentinel.ready().await.unwrap().call("spin".to_owned());
    assert!(matches!(outcome.await.unwrap(), Outcome::TimedOut(_)));
    gone(&sleeper).await;
}

#[tokio::test]
async fn a_job_knows_the_time_that_it_has() {
    let pool = pool(1);
    let mut sentinel = layer!()
        .timeout(Duration::from_secs(1_000))
        .layer(pool.clone());
    let outcome = sentinel.ready().await.unwrap().call("left".to_owned());
    let Outcome::Completed(left) = outcome.await.unwrap() else {
        panic!("it has failed");
    };
    let left: u128 = left.parse().unwrap();
    assert!((500_000..=1_000_000).contains(&left), "{left}");
    let mut pool = pool;
    drop(sentinel);
    let answer: Answer = run(&mut pool, "left").await;
    assert_eq!(answer.unwrap(), u128::MAX.to_string());
}
