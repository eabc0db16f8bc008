//! Many jobs and many kills, in a process of their own. The full numbers are for a quiet machine:
//!
//! ```sh
//! JOBS=100000 MAX_JOBS=100 cargo test --features process --test process -- --ignored --exact figures::many --nocapture
//! KILLS=1000 cargo test --features process --test process -- --ignored --exact figures::kills --nocapture
//! ```

use std::{env, fs, str::FromStr, time::Duration};

use futures_util::{StreamExt, stream};
use rustix::param::page_size;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_sentinel::{Outcome, Report, SentinelLayer, process::ProcessError};

use crate::{
    child::pool,
    ends::{gone, run},
    stops::Begin,
    tree::{children, descriptors, marked, until},
};

const PROCESSES: usize = 2;

fn number<N: FromStr>(name: &str, default: N) -> N {
    let number = env::var(name).ok().and_then(|text| text.parse().ok());
    number.unwrap_or(default)
}

/// Returns the bytes that this process has in memory.
fn memory() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * page_size() as u64
}

#[test]
fn many_jobs_and_processes_leave_nothing_in_their_parent() {
    let (mut command, _) = marked(module_path!(), "many");
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}

#[tokio::test]
#[ignore = "it is a process that the other test starts"]
async fn many() {
    let (jobs, max_jobs) = (number("JOBS", 2_000), number("MAX_JOBS", 5));
    let pool = pool(PROCESSES).max_jobs(max_jobs).warm(PROCESSES);
    let mut found = Vec::new();
    let begin = Instant::now();
    // The first tenth is to warm up.
    for tenth in 0..10 {
        let answers = stream::iter(0..jobs / 10).map(|_| {
            let mut pool = pool.clone();
            async move { run(&mut pool, "four").await.unwrap() }
        });
        let answers: Vec<_> = answers.buffer_unordered(PROCESSES).collect().await;
        assert!(answers.iter().all(|answer| answer == "4"));
        // With one that takes the place of another.
        until(children, |children| children.len() <= PROCESSES).await;
        println!(
            "{} jobs: {} KiB, {} descriptors",
            (tenth + 1) * (jobs / 10),
            memory() >> 10,
            descriptors()
        );
        found.push((memory(), descriptors()));
    }
    println!("{jobs} jobs in {:?}", begin.elapsed());
    let (first, last) = (found[0], found[9]);
    // Each process or job that leaves but 1 KiB would be more.
    assert!(last.0 < first.0 + ((jobs as u64) << 10), "{found:?}");
    // A child whose pool holds its socket, or none.
    assert!(last.1 <= first.1 + PROCESSES, "{found:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "it measures"]
async fn kills() {
    let number = number("KILLS", 100);
    let grace = Duration::from_millis(5);
    let mut pool = pool(1).warm(1);
    let (mut outcomes, mut ends) = (Vec::new(), Vec::new());
    for _ in 0..number {
        let pid = run(&mut pool, "pid").await.unwrap();
        let begin = Begin::new("kill");
        let shutdown = CancellationToken::new();
        let layer = SentinelLayer::with_tag(
            service_fn(
                |report: Report<(), String, ProcessError<String, std::str::Utf8Error>>| async {
                    Ok::<_, std::convert::Infallible>(report.outcome)
                },
            ),
            |_: &String| (),
        );
        let layer = layer.no_timeout().grace(grace).shutdown(shutdown.clone());
        let mut sentinel = layer.layer(pool.clone());
        let job = format!("at {} spin", begin.path());
        let outcome = tokio::spawn(sentinel.ready().await.unwrap().call(job));
        begin.has_begun().await;
        let stop = Instant::now();
        shutdown.cancel();
        let outcome = outcome.await.unwrap().unwrap();
        outcomes.push(stop.elapsed().saturating_sub(grace));
        assert!(matches!(outcome, Outcome::Cancelled(stop) if stop.stopped()));
        gone(&pid).await;
        ends.push(stop.elapsed().saturating_sub(grace));
    }
    for (name, mut times) in [("outcome", outcomes), ("end of the process", ends)] {
        times.sort_unstable();
        let at = |percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)];
        println!(
            "from the grace to the {name}, {number} kills: p50 {:?}, p99 {:?}, max {:?}",
            at(50),
            at(99),
            at(100)
        );
    }
}
