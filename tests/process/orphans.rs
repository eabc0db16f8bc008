//! The end of the process that has a pool, by a signal that it does not see.

use futures_util::future::join_all;
use rustix::process::{Pid, Signal, kill_process};

use crate::{
    child::pool,
    ends::run,
    stops::Begin,
    tree::{marked, tree, until},
};

/// Jobs that leave nothing to notice the end with, and one that has started a process.
const JOBS: [&str; 4] = ["spin", "block", "spin on all threads", "fork and spin"];

const FILES: &str = "TEST_FILES";

#[tokio::test]
#[ignore = "it is a process that the other test starts, and kills"]
async fn parent() {
    let files = std::env::var(FILES).unwrap();
    // One has no job.
    let pool = pool(JOBS.len() + 1).warm(JOBS.len() + 1);
    let jobs = files.split(' ').zip(JOBS).map(|(file, job)| {
        let mut pool = pool.clone();
        async move { run(&mut pool, &format!("at {file} {job}")).await }
    });
    join_all(jobs).await;
}

#[tokio::test]
async fn children_end_when_their_parent_is_killed() {
    let (mut command, mark) = marked(module_path!(), "parent");
    let files = JOBS.map(|_| Begin::new("orphan"));
    let paths = files.each_ref().map(|file| file.path().to_string());
    let mut parent = command.env(FILES, paths.join(" ")).spawn().unwrap();
    for file in &files {
        file.has_begun().await;
    }
    // Itself, its children, and the process of one of them.
    let number = 1 + JOBS.len() + 1 + 1;
    until(|| tree(&mark).len(), |found| *found == number).await;
    let pid = Pid::from_raw(parent.id().cast_signed()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    parent.wait().unwrap();
    until(|| tree(&mark), Vec::is_empty).await;
}
