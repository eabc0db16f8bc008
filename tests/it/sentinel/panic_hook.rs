//! Reports of the panic hook about a panic, and that it takes nothing from the hook before it.
//!
//! A hook belongs to the process, so the tests that need one run as their own processes.

use std::{
    env,
    panic::{PanicHookInfo, catch_unwind, resume_unwind, set_hook},
    pin::Pin,
    process::Command,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::task::yield_now;
use tower::{Layer, service_fn};
use tower_sentinel::{
    IntensityLayer, Outcome, SentinelError, SentinelLayer,
    cancel::Cancellation,
    intensity::IntensityState,
    outcome::{CancelReason, Panic},
    panic_hook,
};

use crate::support::{Plan, Recorder, Refused, Seen, Unit, call};

type Job = Pin<Box<dyn Future<Output = Result<(), Refused>> + Send>>;

/// Runs a job and returns its panic.
async fn panic_of(job: impl Fn() -> Job + Clone + Send + 'static) -> Panic {
    let service = service_fn(move |_: Unit| job());
    let mut sentinel = SentinelLayer::new(Recorder::default().policy()).layer(service);
    match call(&mut sentinel, Unit::default()).await.unwrap().outcome {
        Outcome::Panicked(panic) => panic,
        outcome => panic!("{outcome:?}"),
    }
}

/// Runs the test of this name in its own process, where it returns `true`.
fn is_child(test: &str) -> bool {
    const CHILD: &str = "TOWER_SENTINEL_TEST_HOOK";
    if env::var_os(CHILD).is_some() {
        return true;
    }
    let (_, module) = module_path!().split_once("::").unwrap();
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", &format!("{module}::{test}"), "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{stdout}{stderr}");
    assert!(stdout.contains("1 passed"), "{stdout}{stderr}");
    false
}

/// Records the calls of the hook that was there before, instead of printing them.
fn listen() -> Arc<Mutex<Vec<String>>> {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&heard);
    set_hook(Box::new(move |info: &PanicHookInfo<'_>| {
        told.lock().unwrap().push(info.to_string());
    }));
    heard
}

#[track_caller]
fn assert_is_at(panic: &Panic, line: u32) {
    let location = panic.location().unwrap_or_else(|| panic!("{panic:?}"));
    assert_eq!((location.file(), location.line()), (file!(), line));
    let printed = location.to_string();
    assert_eq!(printed, format!("{}:{line}:{}", file!(), location.column()));
    assert!(format!("{panic:?}").contains(&printed), "{panic:?}");
}

#[tokio::test]
async fn without_the_hook_there_is_no_location() {
    if !is_child("without_the_hook_there_is_no_location") {
        return;
    }
    let heard = listen();
    let panic = panic_of(|| Box::pin(async { panic!("poison") })).await;
    assert_eq!(panic.location(), None);
    assert!(panic.backtrace().is_none());
    assert_eq!(heard.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn the_hook_tells_where_a_job_panicked() {
    if !is_child("the_hook_tells_where_a_job_panicked") {
        return;
    }
    let heard = listen();
    panic_hook::install();
    panic_hook::install(); // for good measure: to install it twice is to install it once

    let number = 7;
    let in_future = panic_of(move || {
        Box::pin(async move {
            yield_now().await;
            panic!("user {number}")
        })
    });
    let in_future = in_future.await;
    assert_is_at(&in_future, line!() - 4);
    assert_eq!(in_future.message(), "user 7");
    assert!(in_future.backtrace().is_none());

    let in_call = panic_of(|| panic!("in call")).await;
    assert_is_at(&in_call, line!() - 1);

    let of_no_text = panic_of(|| Box::pin(async { std::panic::panic_any(42_u8) })).await;
    assert_is_at(&of_no_text, line!() - 1);

    // The hook before has heard of each of them, once.
    let heard = heard.lock().unwrap();
    assert_eq!(heard.len(), 3, "{heard:?}");
    assert!(heard[0].contains("user 7"), "{heard:?}");
}

#[tokio::test]
async fn the_location_of_another_panic_is_not_taken_for_it() {
    if !is_child("the_location_of_another_panic_is_not_taken_for_it") {
        return;
    }
    listen();
    panic_hook::install();

    // Before the job, on its thread, and caught by somebody else.
    catch_unwind(|| panic!("silent")).unwrap_err();
    let silent = panic_of(|| Box::pin(async { resume_unwind(Box::new("silent")) })).await;
    assert_eq!(silent.location(), None);

    // Caught by the job itself, which then panics without a message.
    let another = panic_of(|| {
        Box::pin(async {
            catch_unwind(|| panic!("loud")).unwrap_err();
            resume_unwind(Box::new("silent"))
        })
    });
    assert_eq!(another.await.location(), None);

    // A panic that the job caught and lets go on keeps its place.
    let same = panic_of(|| {
        Box::pin(async {
            let payload = catch_unwind(|| panic!("loud")).unwrap_err();
            resume_unwind(payload)
        })
    });
    let same = same.await;
    assert_is_at(&same, line!() - 5);
}

#[tokio::test(start_paused = true)]
async fn the_panic_of_a_policy_and_of_the_grace_have_their_location() {
    if !is_child("the_panic_of_a_policy_and_of_the_grace_have_their_location") {
        return;
    }
    listen();
    panic_hook::install();

    let policy =
        service_fn(|_| -> std::future::Ready<Result<(), Refused>> { panic!("no channel") });
    let line = line!() - 1;
    let service = service_fn(|_: Unit| async { Ok::<_, Refused>(()) });
    let mut sentinel = SentinelLayer::new(policy).layer(service);
    let error = call(&mut sentinel, Unit::default()).await.unwrap_err();
    let SentinelError::PolicyPanicked(panic) = error else {
        panic!("{error:?}");
    };
    assert_is_at(&panic, line);

    let service = service_fn(|_: Unit| async {
        tower_sentinel::cancelled().await;
        panic!("in its grace");
        #[expect(unreachable_code, reason = "tells the type of the block")]
        Ok::<(), Refused>(())
    });
    let line = line!() - 4;
    let policy = Recorder::default().scripted(Plan::Ok, Duration::ZERO);
    let mut sentinel = SentinelLayer::new(policy)
        .grace(Duration::from_secs(1))
        .layer(service);
    let report = call(&mut sentinel, Unit::default()).await.unwrap();
    let Outcome::TimedOut(timed_out) = report.outcome else {
        panic!("{report:?}");
    };
    assert_is_at(timed_out.panic().unwrap(), line);
}

#[tokio::test]
async fn a_backtrace_is_captured_if_asked_for() {
    if !is_child("a_backtrace_is_captured_if_asked_for") {
        return;
    }
    listen();
    panic_hook::install_with_backtraces();

    #[inline(never)]
    fn culprit() {
        panic!("poison");
    }
    let panic = panic_of(|| {
        Box::pin(async {
            culprit();
            Ok(())
        })
    });
    let backtrace = panic.await.backtrace().unwrap().to_string();
    assert!(backtrace.contains("culprit"), "{backtrace}");
}

#[tokio::test]
async fn the_event_of_a_panic_tells_what_the_hook_saw() {
    if !is_child("the_event_of_a_panic_tells_what_the_hook_saw") {
        return;
    }
    listen();
    panic_hook::install_with_backtraces();

    let (reader, writer) = std::io::pipe().unwrap();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(Mutex::new(writer))
        .finish();
    let guard = tracing::subscriber::set_default(subscriber);
    let panic = panic_of(|| Box::pin(async { panic!("poison") })).await;
    drop(guard);
    let line = std::io::read_to_string(reader).unwrap();
    for part in [
        "ERROR",
        "the job panicked",
        r#"exception.message="poison""#,
        &format!(r#"code.file.path="{}""#, file!()),
        &format!("code.line.number={}", panic.location().unwrap().line()),
        "exception.stacktrace=",
    ] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
}

#[tokio::test]
async fn a_panic_that_the_job_caught_in_the_same_poll_does_not_make_the_next_one_the_cause() {
    struct LosesLease;

    impl Drop for LosesLease {
        fn drop(&mut self) {
            Cancellation::current().cancel(CancelReason::LeaseLost);
        }
    }

    if !is_child(
        "a_panic_that_the_job_caught_in_the_same_poll_does_not_make_the_next_one_the_cause",
    ) {
        return;
    }
    listen();
    panic_hook::install();
    let is_caught = [true, false];
    for (is_caught, in_call) in is_caught.map(|it| [(it, true), (it, false)]).as_flattened() {
        let (is_caught, in_call) = (*is_caught, *in_call);
        let work = move || {
            let panics = || {
                let _guard = LosesLease;
                panic!("poison")
            };
            match is_caught {
                true => drop(catch_unwind(panics)),
                false => panics(),
            }
            panic!("poison")
        };
        let recorder = Recorder::default();
        let intensity = IntensityLayer::new().minimum_sample(1);
        let state = intensity.watch();
        let service = intensity.layer(service_fn(move |_: Unit| {
            if in_call {
                work();
            }
            async move {
                work();
                Ok::<_, Refused>(())
            }
        }));
        let mut sentinel = SentinelLayer::new(recorder.policy()).layer(service);
        call(&mut sentinel, Unit::default()).await.unwrap();
        let (seen, is_running) = match is_caught {
            true => {
                let seen = Seen::cancelled(CancelReason::LeaseLost, true);
                (seen.with_panic(true), true)
            }
            false => (Seen::panicked(), false),
        };
        assert_eq!(recorder.reports(), [seen], "{is_caught} {in_call}");
        let running = *state.borrow() == IntensityState::Running;
        assert_eq!(running, is_running, "{is_caught} {in_call}");
    }
}
