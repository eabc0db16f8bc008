//! Ends of a job in its process.

use std::{fs, os::unix::process::ExitStatusExt, time::Duration};

use tokio::time::sleep;
use tower::{Service, ServiceExt};
use tower_sentinel::process::{ProcessError, ProcessPool};

use crate::child::{Answer, Decode, pool};

/// Waits for a process.
pub(crate) async fn ready(
    pool: &mut ProcessPool<Decode>,
) -> Result<&mut ProcessPool<Decode>, ProcessError<String, std::str::Utf8Error>> {
    ServiceExt::<String>::ready(pool).await
}

/// Runs a job.
pub(crate) async fn run(pool: &mut ProcessPool<Decode>, job: &str) -> Answer {
    let job = job.to_owned();
    ready(pool).await.unwrap().call(job).await
}

/// Returns whether a process runs, and is no zombie.
pub(crate) fn runs(pid: &str) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    // The first thread of a process is one before the others have ended.
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    threads > 1 || !stat.rsplit_once(") ").unwrap().1.starts_with('Z')
}

/// Waits until a process is gone.
pub(crate) async fn gone(pid: &str) {
    while runs(pid) {
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn results_come_back_from_one_process() {
    let mut pool = pool(1);
    let pid = run(&mut pool, "pid").await.unwrap();
    assert_ne!(pid, std::process::id().to_string());
    assert_eq!(run(&mut pool, "four").await.unwrap(), "4");
    // Larger than the buffer of a socket.
    let large = "x".repeat(10 << 20);
    let length = large.len().to_string();
    assert_eq!(run(&mut pool, &large).await.unwrap(), length);
    assert!(matches!(
        run(&mut pool, "fail").await,
        Err(ProcessError::Failed(text)) if text == "it has failed"
    ));
    assert!(matches!(
        run(&mut pool, "undecodable").await,
        Err(ProcessError::Undecodable(_))
    ));
    let Err(ProcessError::Panicked { message, location }) = run(&mut pool, "panic").await else {
        panic!("it has not panicked");
    };
    assert_eq!(message, "it has panicked");
    assert!(location.unwrap().contains("child.rs"));
    // All of them in the same.
    assert_eq!(run(&mut pool, "pid").await.unwrap(), pid);
}

#[tokio::test]
async fn a_crash_costs_one_job_and_one_process() {
    let mut pool = pool(2).memory(256 << 20);
    // A neighbour, whose job runs all the time.
    let mut neighbour = pool.clone();
    let neighbour = ready(&mut neighbour).await.unwrap().call("wait".to_owned());
    let mut neighbour = tokio::spawn(neighbour);
    for (job, signal, code) in [
        ("abort", Some(6), None),
        ("segv", Some(11), None),
        ("overflow", Some(6), None),
        ("exit 0", None, Some(0)),
        ("exit 3", None, Some(3)),
    ] {
        let pid = run(&mut pool, "pid").await.unwrap();
        match run(&mut pool, job).await {
            Err(error @ ProcessError::Crashed { status }) => {
                let status = status.unwrap();
                assert_eq!((status.signal(), status.code()), (signal, code), "{job}");
                assert!(error.is_crash());
            }
            other => panic!("{job}: {other:?}"),
        }
        assert!(!runs(&pid), "{job}");
        assert_ne!(run(&mut pool, "pid").await.unwrap(), pid, "{job}");
    }
    let pid = run(&mut pool, "pid").await.unwrap();
    let error = run(&mut pool, "allocate").await.unwrap_err();
    assert!(matches!(error, ProcessError::OutOfMemory { limit } if limit == 256 << 20));
    assert!(error.is_crash() && !runs(&pid));
    assert_eq!(run(&mut pool, "four").await.unwrap(), "4");
    assert!(futures_util::poll!(&mut neighbour).is_pending());
    neighbour.abort();
}

#[tokio::test]
async fn a_process_that_holds_the_socket_hides_no_crash() {
    let mut pool = pool(1);
    let error = run(&mut pool, "fork and abort").await.unwrap_err();
    assert!(matches!(error, ProcessError::Crashed { .. }), "{error:?}");
    // What a job starts and leaves behind ends with the process.
    let sleeper = run(&mut pool, "fork").await.unwrap();
    assert!(runs(&sleeper));
    run(&mut pool, "abort").await.unwrap_err();
    gone(&sleeper).await;
}

#[tokio::test]
async fn garbage_and_silence_are_told() {
    let script = |script: &str| {
        // It says that it is ready, takes the job, and then does as the script says.
        let ready = r"printf '\000\000\000\001\000' >&0; dd bs=1M count=1 >/dev/null 2>&1; ";
        let script = format!("{ready}{script}");
        pool(1)
            .program("/bin/sh")
            .arguments(["-c".to_owned(), script])
    };
    for (name, text, is_garbled) in [
        (
            "no frame",
            r"printf '\000\000\000\001\377' >&0; sleep 100",
            true,
        ),
        (
            "an endless frame",
            r"printf '\377\377\377\377' >&0; exit 5",
            false,
        ),
        (
            "a second ready",
            r"printf '\000\000\000\001\000' >&0; sleep 100",
            true,
        ),
        (
            "the end of its socket",
            r"exec 0</dev/null; sleep 100",
            false,
        ),
        ("the end", r"exit 7", false),
    ] {
        let error = run(&mut script(text), "job").await.unwrap_err();
        match is_garbled {
            true => assert!(matches!(error, ProcessError::Garbled), "{name}: {error:?}"),
            false => assert!(
                matches!(error, ProcessError::Crashed { .. }),
                "{name}: {error:?}"
            ),
        }
    }
    // A second answer is none of the next job.
    let twice = r"printf '\000\000\000\013\003\000\000\000\000\000\000\000\001+a\000\000\000\013\003\000\000\000\000\000\000\000\001+b' >&0; sleep 100";
    let mut pool = script(twice);
    assert_eq!(run(&mut pool, "job").await.unwrap(), "a");
    sleep(Duration::from_millis(50)).await;
    assert_eq!(run(&mut pool, "job").await.unwrap(), "a");

    // Nor if it comes when that runs; and its child takes no more jobs.
    let answer = |job: u8, text: &str| {
        format!(r"printf '\000\000\000\013\003\000\000\000\000\000\000\000\00{job}+{text}' >&0;")
    };
    let late = [
        &answer(1, "a"),
        "dd bs=1M count=1 >/dev/null 2>&1;",
        &answer(1, "b"),
        "sleep 0.1;",
        &answer(2, "c"),
        "sleep 100",
    ];
    let mut pool = script(&late.join(" "));
    for expected in ["a", "c", "a"] {
        assert_eq!(run(&mut pool, "job").await.unwrap(), expected);
    }
}

#[tokio::test]
async fn a_second_answer_is_none_of_the_next_job() {
    let mut pool = pool(1);
    // It comes before the next job, while that is sent, or after it.
    for _ in 0..50 {
        assert_eq!(run(&mut pool, "answer twice").await.unwrap(), "first");
        assert_eq!(run(&mut pool, "four").await.unwrap(), "4");
    }
}

#[tokio::test]
async fn a_job_that_no_process_has_read_runs_in_another_one() {
    // The first two end when there is a job for them.
    let ended = format!("{}/ended", env!("CARGO_TARGET_TMPDIR"));
    let script = |ends: usize| {
        let folder = format!("{ended}-{}-{ends}", std::process::id());
        let script = format!(
            r"printf '\000\000\000\001\000' >&0
            if [ $(ls {folder} | wc -l) -lt {ends} ]; then
                touch {folder}/$$; sleep 0.2; kill -9 $$
            fi
            dd bs=1M count=1 >/dev/null 2>&1; printf '\000\000\000\013\003\000\000\000\000\000\000\000\001+a' >&0; sleep 100"
        );
        let pool = pool(1).program("/bin/sh").arguments(["-c", &script]);
        fs::create_dir_all(&folder).unwrap();
        (pool, folder)
    };
    let (mut pool, folder) = script(2);
    assert_eq!(run(&mut pool, "job").await.unwrap(), "a");
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 2);
    fs::remove_dir_all(folder).unwrap();

    // It is not offered for ever.
    let (mut pool, folder) = script(100);
    let error = run(&mut pool, "job").await.unwrap_err();
    assert!(matches!(error, ProcessError::Crashed { .. }), "{error:?}");
    fs::remove_dir_all(folder).unwrap();
}
