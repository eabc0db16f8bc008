//! A process with all that it starts, marked by a variable that is inherited.

use std::{
    env, fs,
    process::{Command, id},
    time::Duration,
};

use tokio::time::sleep;

use crate::{child::this_test, ends::runs};

const MARK: &str = "TEST_OF_A_TREE";

/// Returns the command for a test of this binary as a process of its own, with a mark.
pub(crate) fn marked(module: &str, test: &str) -> (Command, String) {
    let mark = format!("{}-{}", id(), fastrand::u64(..));
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(this_test(module, test)).env(MARK, &mark);
    (command, mark)
}

/// Returns the mark of this process.
pub(crate) fn mark() -> String {
    env::var(MARK).expect("another test starts it")
}

/// Returns the processes with a mark, apart from this one.
pub(crate) fn tree(mark: &str) -> Vec<String> {
    let mark = format!("{MARK}={mark}");
    let is_marked = |pid: &String| {
        fs::read(format!("/proc/{pid}/environ")).is_ok_and(|text| {
            text.split(|&byte| byte == 0)
                .any(|one| one == mark.as_bytes())
        })
    };
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let name = entry.ok()?.file_name().into_string().ok()?;
        name.bytes()
            .all(|byte| byte.is_ascii_digit())
            .then_some(name)
    });
    pids.filter(|pid| *pid != id().to_string() && is_marked(pid) && runs(pid))
        .collect()
}

/// Returns the children of this process, with those that are not reaped.
pub(crate) fn children() -> Vec<String> {
    let threads = fs::read_dir("/proc/self/task").unwrap();
    let children = threads.filter_map(|thread| {
        let path = thread.ok()?.path().join("children");
        fs::read_to_string(path).ok()
    });
    let children = Vec::from_iter(children).concat();
    children.split_whitespace().map(str::to_owned).collect()
}

/// Returns the number of open files of this process.
pub(crate) fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Waits until a value is as it should be.
pub(crate) async fn until<T>(mut get: impl FnMut() -> T, is_right: impl Fn(&T) -> bool) {
    while !is_right(&get()) {
        sleep(Duration::from_millis(5)).await;
    }
}
