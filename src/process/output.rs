//! [`Output`] of a child, line by line.

use std::{convert::Infallible, future::pending, os::fd::AsFd, process::Stdio};

use rustix::io::{ioctl_fionread, read};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::{Child, ChildStderr, ChildStdout},
    task::yield_now,
};
use tokio_util::bytes::BytesMut;
use tracing::Level;

use crate::outcome::guard;

/// Number of bytes of the longest line. What is longer is cut.
const LONGEST: usize = 8 << 10;

/// Destination of what the children write to their standard output and standard error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Output {
    /// The standard output and standard error of this process.
    #[default]
    Inherit,
    /// Events of this process: each line of standard output is one at level INFO, and each of standard error one at WARN.
    ///
    /// They are in the span of the job that runs, with the fields `process.pid` and `child.stream` (`stdout` or
    /// `stderr`). A line of more than 8 KiB becomes several events. Bytes that are no UTF-8 are replaced.
    ///
    /// Nothing is kept: a child that writes faster than the events are handled waits. Between two jobs nobody reads;
    /// what a child writes there is read before its next job.
    Events,
}

impl Output {
    pub(super) fn stdio(self) -> Stdio {
        match self {
            Output::Inherit => Stdio::inherit(),
            Output::Events => Stdio::piped(),
        }
    }
}

/// Pipes of a child whose output becomes events, until they end.
pub(super) struct Pipes {
    stdout: Option<Pipe<ChildStdout>>,
    stderr: Option<Pipe<ChildStderr>>,
}

struct Pipe<R> {
    reader: R,
    /// Start of a line.
    bytes: BytesMut,
    emit: fn(Option<u32>, &str),
    pid: Option<u32>,
}

impl Pipes {
    pub(super) fn of(process: &mut Child) -> Self {
        let pid = process.id();
        Self {
            stdout: process.stdout.take().map(|it| Pipe::new(it, out, pid)),
            stderr: process.stderr.take().map(|it| Pipe::new(it, err, pid)),
        }
    }

    /// Reads lines, and never returns.
    ///
    /// Cancel safe.
    pub(super) async fn read(&mut self) -> Infallible {
        loop {
            // In random order, so that neither keeps the other back.
            tokio::select! {
                () = next(&mut self.stdout) => {}
                () = next(&mut self.stderr) => {}
            }
        }
    }

    /// Reads what has been written so far.
    pub(super) fn drain(&mut self) {
        if let Some(pipe) = &mut self.stdout {
            pipe.drain();
        }
        if let Some(pipe) = &mut self.stderr {
            pipe.drain();
        }
    }
}

/// Reads some bytes, or sees the end of the pipe.
async fn next<R: AsyncRead + Unpin>(pipe: &mut Option<Pipe<R>>) {
    let Some(open) = pipe else {
        return pending().await;
    };
    open.bytes.reserve(LONGEST - open.bytes.len());
    match open.reader.read_buf(&mut open.bytes).await {
        Ok(0) | Err(_) => {
            open.flush();
            *pipe = None;
        }
        Ok(_) => {
            open.emit_lines();
            // Many lines at once: now it is the turn of others.
            yield_now().await;
        }
    }
}

impl<R> Pipe<R> {
    fn new(reader: R, emit: fn(Option<u32>, &str), pid: Option<u32>) -> Self {
        Self {
            reader,
            bytes: BytesMut::new(),
            emit,
            pid,
        }
    }

    /// Emits the lines that have ended, and one that is full.
    fn emit_lines(&mut self) {
        while let Some(end) = self.bytes.iter().position(|byte| *byte == b'\n') {
            let line = self.bytes.split_to(end + 1);
            self.emit_line(&line[..end]);
        }
        if self.bytes.len() >= LONGEST {
            self.flush();
        }
    }

    /// Emits the start of a line.
    fn flush(&mut self) {
        if !self.bytes.is_empty() {
            let line = self.bytes.split();
            self.emit_line(&line);
        }
    }

    fn emit_line(&self, line: &[u8]) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        guard(|| (self.emit)(self.pid, &String::from_utf8_lossy(line)));
    }
}

impl<R: AsFd> Pipe<R> {
    fn drain(&mut self) {
        // Without the runtime, which may not know of it yet.
        let mut left = ioctl_fionread(&self.reader).unwrap_or(0);
        let mut bytes = [0; 4 << 10];
        while left > 0 {
            let room = bytes.len().min(LONGEST - self.bytes.len());
            match read(&self.reader, &mut bytes[..room]) {
                Ok(length) if length > 0 => {
                    self.bytes.extend_from_slice(&bytes[..length]);
                    self.emit_lines();
                    left = left.saturating_sub(length as u64);
                }
                Ok(_) | Err(_) => break,
            }
        }
        self.flush();
    }
}

fn out(pid: Option<u32>, line: &str) {
    tracing::event!(
        target: "tower_sentinel::process",
        Level::INFO,
        process.pid = pid,
        child.stream = "stdout",
        "{line}"
    );
}

fn err(pid: Option<u32>, line: &str) {
    tracing::event!(
        target: "tower_sentinel::process",
        Level::WARN,
        process.pid = pid,
        child.stream = "stderr",
        "{line}"
    );
}
