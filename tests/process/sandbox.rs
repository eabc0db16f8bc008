//! Children behind a program that starts them, as a sandbox does.

use tower_sentinel::process::{ProcessError, ProcessPool};

use crate::{
    child::{Decode, pool, this_test},
    ends::{gone, run, runs},
};

fn arguments() -> Vec<String> {
    let program = std::env::current_exe().unwrap();
    let mut arguments = vec![program.display().to_string()];
    arguments.extend(this_test("process::child", "child"));
    arguments
}

/// A pool whose children are started by a shell, which waits for them.
fn behind_a_shell() -> ProcessPool<Decode> {
    let script = ["-c", r#""$0" "$@"; exit $?"#].map(str::to_owned);
    let arguments = script.into_iter().chain(arguments());
    pool(1).program("/bin/sh").arguments(arguments)
}

/// A pool whose children are started by bubblewrap.
fn behind_bubblewrap() -> ProcessPool<Decode> {
    let options = "--ro-bind / / --dev /dev --proc /proc --unshare-all --die-with-parent";
    let arguments = options.split(' ').map(str::to_owned).chain(arguments());
    pool(1).program("bwrap").arguments(arguments)
}

async fn serves_and_ends(mut pool: ProcessPool<Decode>) {
    assert_eq!(run(&mut pool, "four").await.unwrap(), "4");
    for job in ["abort", "exit 3"] {
        let error = run(&mut pool, job).await.unwrap_err();
        assert!(matches!(error, ProcessError::Crashed { .. }), "{error:?}");
    }
    assert_eq!(run(&mut pool, "four").await.unwrap(), "4");
}

#[tokio::test]
async fn a_child_may_be_started_by_another_program() {
    let mut pool = behind_a_shell();
    serves_and_ends(pool.clone()).await;
    let pid = run(&mut pool, "pid").await.unwrap();
    let sleeper = run(&mut pool, "fork").await.unwrap();
    assert!(runs(&pid) && runs(&sleeper));
    run(&mut pool, "abort").await.unwrap_err();
    gone(&pid).await;
    gone(&sleeper).await;
}

#[tokio::test]
async fn a_program_that_a_job_starts_is_no_child() {
    let answer = run(&mut pool(1), "start the program again").await;
    assert_eq!(answer.unwrap(), "true");
}

#[tokio::test]
#[ignore = "it needs bubblewrap, and the right to make namespaces"]
async fn a_child_may_be_started_by_bubblewrap() {
    let mut pool = behind_bubblewrap();
    serves_and_ends(pool.clone()).await;
    // An id of its own namespace.
    let pid: u32 = run(&mut pool, "pid").await.unwrap().parse().unwrap();
    assert!(pid < 10, "{pid}");
}
