//! Limits of a child, and children that are started ahead.

use std::{
    io,
    os::unix::process::ExitStatusExt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

use rustix::process::getpriority_process;
use tokio::time::sleep;
use tower_sentinel::process::ProcessError;
use tracing_subscriber::fmt::MakeWriter;

use crate::{
    child::pool,
    ends::{gone, ready, run, runs},
    tree::until,
};

#[tokio::test]
async fn an_allocation_beyond_the_address_space_fails() {
    let mut pool = pool(1).address_space(3 << 30);
    for _ in 0..2 {
        match run(&mut pool, "reserve").await {
            Err(ProcessError::Crashed { status }) => assert_eq!(status.unwrap().signal(), Some(6)),
            other => panic!("{other:?}"),
        }
        assert_eq!(run(&mut pool, "leak 1024").await.map(drop).ok(), Some(()));
    }
}

#[tokio::test]
async fn the_cpu_time_is_that_of_one_job() {
    let limit = Duration::from_millis(900);
    let mut pool = pool(1).cpu_time(limit);
    // More than the limit, if it were that of the child, and its rounding.
    let pid = run(&mut pool, "burn 700").await.unwrap();
    for _ in 0..3 {
        assert_eq!(run(&mut pool, "burn 700").await.unwrap(), pid);
    }
    let error = run(&mut pool, "spin").await.unwrap_err();
    assert!(matches!(error, ProcessError::OutOfCpuTime { limit: its } if its == limit));
    assert!(error.is_crash() && error.to_string().contains("900ms of CPU time"));
    assert!(!runs(&pid));
    assert_eq!(run(&mut pool, "four").await.unwrap(), "4");
}

#[tokio::test]
async fn a_cpu_time_without_an_end_is_no_limit() {
    let mut pool = pool(1).cpu_time(Duration::MAX);
    assert_eq!(run(&mut pool, "four").await.unwrap(), "4");
}

#[tokio::test]
async fn files_and_the_nice_value_are_limited() {
    let mut pool = pool(1).open_files(40).nice(3);
    let Err(ProcessError::Failed(text)) = run(&mut pool, "open").await else {
        panic!("it has opened more");
    };
    let (number, error) = text.split_once(' ').unwrap();
    assert!((1..40).contains(&number.parse().unwrap()), "{text}");
    assert!(error.contains("Too many open files"), "{text}");
    let own = getpriority_process(None).unwrap();
    let nice = (own + 3).min(19).to_string();
    assert_eq!(run(&mut pool, "nice").await.unwrap(), nice);
}

/// Writer of events, whose lines can be received.
#[derive(Clone)]
struct Lines(mpsc::Sender<String>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .send(String::from_utf8_lossy(bytes).into_owned())
            .ok();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Lines {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[tokio::test]
async fn a_limit_that_cannot_be_set_makes_it_unready() {
    let (sender, lines) = mpsc::channel();
    let subscriber = tracing_subscriber::fmt()
        .with_writer(Lines(sender))
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    for (pool, reason) in [
        // More than the system has for anybody.
        (
            pool(1).open_files(1 << 40),
            "can't limit the number of open files: ",
        ),
        // No thread can start.
        (pool(1).address_space(1 << 20), "but has ended with "),
        (
            pool(1).program("/bin/sh").arguments(["-c", "exit 3"]),
            "but has ended with exit status: 3: ",
        ),
    ] {
        let mut pool = pool;
        let line = async {
            loop {
                if let Ok(line) = lines.try_recv() {
                    break line;
                }
                sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            _ = ready(&mut pool) => panic!("it is ready"),
            line = line => assert!(line.contains(reason) && line.contains(" WARN "), "{line}"),
        }
    }
}

#[tokio::test]
async fn a_process_that_has_become_too_large_is_replaced_after_its_job() {
    let mut pool = pool(1).max_rss(200 << 20);
    let pid = run(&mut pool, "leak 8").await.unwrap();
    assert_eq!(run(&mut pool, "leak 8").await.unwrap(), pid);
    // The job has its result.
    assert_eq!(run(&mut pool, "leak 300").await.unwrap(), pid);
    gone(&pid).await;
    assert_ne!(run(&mut pool, "pid").await.unwrap(), pid);
}

#[tokio::test]
async fn processes_are_started_ahead_and_again() {
    let number = 3;
    let mut pool = pool(number).warm(10);
    let idle = |pool: &_| {
        let text = format!("{pool:?}");
        let (_, rest) = text.split_once("idle: ").unwrap();
        rest.split_once(',').unwrap().0.parse::<usize>().unwrap()
    };
    assert_eq!(idle(&pool), 0);
    // No more than there are places for.
    run(&mut pool, "four").await.unwrap();
    until(|| idle(&pool), |idle| *idle == number).await;
    for job in ["abort", "abort", "exit 3"] {
        run(&mut pool, job).await.unwrap_err();
        until(|| idle(&pool), |idle| *idle == number).await;
    }
    // A job that is dropped.
    let answer = tokio::spawn({
        let mut pool = pool.clone();
        async move { run(&mut pool, "wait").await }
    });
    until(|| idle(&pool), |idle| *idle < number).await;
    answer.abort();
    until(|| idle(&pool), |idle| *idle == number).await;

    let pid = run(&mut pool, "pid").await.unwrap();
    drop(pool);
    gone(&pid).await;
}

/// Counts events.
#[derive(Clone, Default)]
struct Count(Arc<AtomicUsize>);

impl io::Write for Count {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_started_ahead_is_tried_with_pauses_as_long_as_there_is_a_pool() {
    let count = Count::default();
    let writer = count.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_writer(move || writer.clone())
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let mut pool = pool(2).program("/nonexistent").warm(2);
    tokio::select! {
        _ = ready(&mut pool) => panic!("it is ready"),
        () = sleep(Duration::from_secs(1_000)) => {}
    }
    // A pause is 5 s on average, and there are two places.
    let tries = count.0.load(Ordering::Relaxed);
    assert!((100..1_000).contains(&tries), "{tries}");
    // Without somebody who waits for it, one is tried.
    sleep(Duration::from_secs(1_000)).await;
    let more = count.0.load(Ordering::Relaxed);
    assert!(more > tries);
    drop(pool);
    sleep(Duration::from_secs(1_000)).await;
    assert_eq!(count.0.load(Ordering::Relaxed), more);
}
