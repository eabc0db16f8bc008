//! Out of reach, and documented so: `panic = "abort"` and a double panic end the whole process.
//!
//! No outcome, no call of the policy; the broker redelivers when the connection dies. Each test
//! also runs the same program with a panic that *is* in reach, to show that it could fail.
#![cfg(unix)]

use std::{
    convert::Infallible,
    env, fs, future,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Command, Output},
    sync::Arc,
};

use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tower_sentinel::{Report, SentinelLayer, ServiceBuilderExt};

const SIGABRT: i32 = 6;
const CALLED: &str = "the policy was called: panicked";

#[track_caller]
fn assert_aborted(output: &Output, last_words: &str) {
    let (stdout, stderr) = texts(output);
    assert_eq!(output.status.signal(), Some(SIGABRT), "{stdout}{stderr}");
    // It died for the expected reason, after it got as far as expected.
    assert!(stdout.contains("the job begins"), "{stdout}{stderr}");
    assert!(stderr.contains(last_words), "{stderr}");
    assert!(!stdout.contains("the policy was called"), "{stdout}");
    assert!(!stdout.contains("the end"), "{stdout}");
}

#[track_caller]
fn assert_settled(output: &Output) {
    let (stdout, stderr) = texts(output);
    assert!(output.status.success(), "{stdout}{stderr}");
    assert!(stdout.contains("the job begins"), "{stdout}");
    assert_eq!(stdout.matches(CALLED).count(), 1, "{stdout}");
    assert!(stdout.contains("the end"), "{stdout}");
}

fn texts(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

// === A double panic ===

/// Says to the copy of this test binary which job it is to run.
const CHILD: &str = "TOWER_SENTINEL_TEST_CHILD";

struct PanicInDrop;

impl Drop for PanicInDrop {
    fn drop(&mut self) {
        panic!("a panic in a destructor");
    }
}

/// Behaviour of the child: one job that panics, and with it, in unwinding, its guard.
async fn child(job: &str) {
    let policy = service_fn(|report: Report<Arc<str>, (), Infallible>| {
        println!("the policy was called: {}", report.outcome.kind());
        future::ready(Ok::<_, Infallible>(()))
    });
    let mut service = ServiceBuilder::new()
        .sentinel(SentinelLayer::new(policy))
        .service_fn(|job: Arc<str>| async move {
            println!("the job begins");
            let _guard = (*job == *"double").then_some(PanicInDrop);
            panic!("a panic in a job")
        });
    let response = service.ready().await.unwrap().call(job.into());
    response.await.unwrap();
    println!("the end");
}

/// Runs one test of this same binary, as its own process.
fn rerun(test: &str, job: &str) -> Output {
    let name = format!("{}::{test}", module_path!().split_once("::").unwrap().1);
    Command::new(env::current_exe().unwrap())
        .args(["--exact", &name, "--nocapture"])
        .env(CHILD, job)
        .output()
        .unwrap()
}

#[tokio::test]
async fn a_double_panic_ends_the_process_and_calls_no_policy() {
    if let Ok(job) = env::var(CHILD) {
        return child(&job).await;
    }
    let this = "a_double_panic_ends_the_process_and_calls_no_policy";
    let double = rerun(this, "double");
    assert_aborted(&double, "a panic in a destructor");
    assert_settled(&rerun(this, "single"));
}

// === `panic = "abort"` ===

const PROGRAM: &str = r#"
use std::{convert::Infallible, future, sync::Arc, task::{Context, Poll}};
use tower_sentinel::{Report, SentinelLayer};
use tower_layer::Layer;
use tower_service::Service;

#[derive(Clone)]
struct Work;

impl Service<Arc<u64>> for Work {
    type Response = ();
    type Error = Infallible;
    type Future = future::Ready<Result<(), Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Arc<u64>) -> Self::Future {
        println!("the job begins");
        panic!("a panic in a job")
    }
}

#[derive(Clone)]
struct Policy;

impl Service<Report<Arc<u64>, (), Infallible>> for Policy {
    type Response = ();
    type Error = Infallible;
    type Future = future::Ready<Result<(), Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, report: Report<Arc<u64>, (), Infallible>) -> Self::Future {
        println!("the policy was called: {}", report.outcome.kind());
        future::ready(Ok(()))
    }
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let mut sentinel = SentinelLayer::new(Policy).layer(Work);
        future::poll_fn(|cx| sentinel.poll_ready(cx)).await.unwrap();
        sentinel.call(Arc::new(7)).await.unwrap();
    });
    println!("the end");
}
"#;

/// Builds and runs [`PROGRAM`] with the given panic strategy.
///
/// With the versions of this repository's lock file, which are all on this machine, since this
/// test was built from them.
fn program(panic: &str) -> Output {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let package = Path::new(env!("CARGO_TARGET_TMPDIR")).join("panic-strategy");
    let manifest = format!(
        r#"
[package]
name = "panic-strategy"
edition = "2024"

[dependencies]
tokio = {{ version = "1", default-features = false, features = ["rt", "time"] }}
tower-layer = "0.3"
tower-sentinel = {{ path = {root:?} }}
tower-service = "0.3"

[profile.dev]
debug = false
incremental = false

[workspace]
"#
    );
    fs::create_dir_all(package.join("src")).unwrap();
    fs::write(package.join("Cargo.toml"), manifest).unwrap();
    fs::write(package.join("src/main.rs"), PROGRAM).unwrap();
    fs::copy(root.join("Cargo.lock"), package.join("Cargo.lock")).unwrap();

    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    Command::new(cargo)
        .args(["run", "--quiet", "--offline"])
        .args(["--config", &format!("profile.dev.panic = {panic:?}")])
        .arg("--target-dir")
        .arg(package.join(panic))
        .current_dir(&package)
        .output()
        .unwrap()
}

#[test]
fn panic_abort_ends_the_process_and_calls_no_policy() {
    assert_aborted(&program("abort"), "a panic in a job");
    assert_settled(&program("unwind"));
}
