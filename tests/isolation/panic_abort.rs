//! Panics of programs that were built with `panic = "abort"`.

use std::{
    env, fs,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, id},
};

use crate::{
    table::{PANICS_TWICE, says},
    worker::{Isolation::*, Worker},
};

/// A child that speaks as `process::serve` does: it is ready, takes jobs, and panics.
const CHILD: &str = r#"
use std::{fs::File, io::{Read, Write, stdin}, os::fd::AsFd};

fn main() {
    let mut socket = File::from(stdin().as_fd().try_clone_to_owned().unwrap());
    socket.write_all(b"\0\0\0\x01\0").unwrap();
    let mut length = [0; 4];
    let mut number = 0_u64;
    while socket.read_exact(&mut length).is_ok() {
        let mut job = vec![0; u32::from_be_bytes(length) as usize];
        socket.read_exact(&mut job).unwrap();
        if job.ends_with(b"panic") {
            panic!("it has panicked");
        }
        number += 1;
        socket.write_all(b"\0\0\0\x0d\x03").unwrap();
        socket.write_all(&number.to_be_bytes()).unwrap();
        socket.write_all(b"good").unwrap();
    }
}
"#;

const PANICS: &str = "fn main() { let _caught = std::panic::catch_unwind(|| panic!()); }";

/// A program that is deleted when this is dropped.
struct Program(PathBuf);

impl Program {
    fn build(source: &str) -> Self {
        let name = format!("panic-abort-{}-{}", id(), fastrand::u64(..));
        let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let file = program.with_extension("rs");
        fs::write(&file, source).unwrap();
        let built = Command::new(env::var_os("RUSTC").unwrap_or("rustc".into()))
            .args(["--edition", "2024", "-C", "panic=abort", "-o"])
            .args([&program, &file])
            .status()
            .unwrap();
        assert!(built.success());
        fs::remove_file(file).unwrap();
        Self(program)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        fs::remove_file(&self.0).ok();
    }
}

#[test]
fn a_panic_that_aborts_cannot_be_caught_and_ends_the_worker() {
    says(PANICS_TWICE, Task, "the worker ends");
    says(PANICS_TWICE, Runtime, "the worker ends");
    let program = Program::build(PANICS);
    let ended = Command::new(&program.0).output().unwrap();
    assert_eq!(ended.status.signal(), Some(6));
}

#[test]
fn a_panic_that_aborts_in_a_process_is_one_outcome() {
    says(PANICS_TWICE, Process, "one outcome, `Crashed`");
    let program = Program::build(CHILD);
    let path = program.0.to_str().unwrap();
    let ended = Worker::start(Process, "panic", &[("PROGRAM", path)]).end();
    let [outcome] = *ended.bad() else {
        panic!("{:?}", ended.lines);
    };
    assert!(outcome.starts_with("Failed(Crashed {"), "{outcome}");
}
