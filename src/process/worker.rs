//! [`Worker`], a child as its pool sees it.

use std::{
    ffi::OsString,
    fmt,
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{fs::MetadataExt, net::UnixStream as StdUnixStream},
    },
    path::PathBuf,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use futures_util::{FutureExt, SinkExt, StreamExt};
use rustix::{
    io::ioctl_fionread,
    process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid},
};
use tokio::{
    net::UnixStream,
    process::{Child, Command},
    task::{consume_budget, unconstrained},
    time::{Interval, MissedTickBehavior, interval, timeout},
};
use tokio_util::bytes::Bytes;
use tracing::Level;

use super::{
    frame::{Frame, Frames, frames},
    limits::{LIMITS, Limits},
    output::{Output, Pipes},
};

/// Variable with the number of the socket that a process has as standard input, by which it knows that it is a child.
///
/// The id of the parent would be less: `program` may be one that starts the child, in a namespace of its own.
pub(super) const SOCKET: &str = "TOWER_SENTINEL_PROCESS_POOL";

/// Variable with the level of the events that a child sends.
pub(super) const EVENTS: &str = "TOWER_SENTINEL_PROCESS_EVENTS";

/// Time between two looks at a child that runs a job: at its memory, and whether it has ended though its socket is
/// open.
const LOOK: Duration = Duration::from_millis(20);

/// Program of the children, and the time that they have to start.
#[derive(Clone, Debug)]
pub(super) struct Program {
    /// `None` for that of this process.
    pub(super) path: Option<PathBuf>,
    pub(super) arguments: Vec<OsString>,
    pub(super) start_timeout: Duration,
    pub(super) output: Output,
    pub(super) events: Option<Level>,
    pub(super) limits: Limits,
}

/// Reason why a child can't serve jobs.
#[derive(Debug)]
pub(super) enum Unstartable {
    Spawn(io::Error),
    /// It says why.
    Refused(String),
    /// It ended, or sent something else than that it is ready.
    Ended(Option<ExitStatus>),
    TimedOut(Duration),
}

impl fmt::Display for Unstartable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unstartable::Spawn(error) => error.fmt(f),
            Unstartable::Refused(reason) => f.write_str(reason),
            Unstartable::Ended(status) => {
                f.write_str("it does not serve jobs")?;
                if let Some(status) = status {
                    write!(f, ", but has ended with {status}")?;
                }
                f.write_str(": is `process::serve` the first call of its `main`?")
            }
            Unstartable::TimedOut(limit) => write!(f, "it was not ready within {limit:?}"),
        }
    }
}

/// Message of a child, or its end.
#[derive(Debug)]
pub(super) enum Message {
    Frame(Frame),
    /// It sent something that is no frame.
    Garbage,
    /// Its socket is closed.
    Closed,
    /// Its socket is closed, and it has not read all that was sent.
    ///
    /// Linux tells this; elsewhere it may be [`Closed`](Self::Closed), too.
    Unread,
}

/// A child, and the processes that it starts: they are killed when this is dropped.
pub(super) struct Worker {
    process: Child,
    pipes: Pipes,
    frames: Frames,
    /// One for all jobs: a timer for each of them would wake the runtime each time.
    looks: Interval,
    /// Whether it has sent something that belongs to no job.
    pub(super) is_spoilt: bool,
    /// Number of jobs that it was given.
    pub(super) jobs: u64,
}

impl Worker {
    /// Starts a child, and waits until it is ready.
    pub(super) async fn start(program: &Program) -> Result<Self, Unstartable> {
        let mut worker = Self::spawn(program).map_err(Unstartable::Spawn)?;
        let limit = program.start_timeout;
        let message = async {
            loop {
                if let Some(message) = worker.answer().await {
                    break message;
                }
            }
        };
        match timeout(limit, message).await {
            Ok(Message::Frame(Frame::Ready)) => Ok(worker),
            Ok(Message::Frame(Frame::Panic { message, .. })) => Err(Unstartable::Refused(message)),
            Ok(Message::Closed | Message::Unread) => Err(Unstartable::Ended(worker.end().await)),
            Ok(_) => Err(Unstartable::Ended(None)),
            Err(_elapsed) => Err(Unstartable::TimedOut(limit)),
        }
    }

    fn spawn(program: &Program) -> io::Result<Self> {
        let (ours, theirs) = StdUnixStream::pair()?;
        // The other end is for any program, which may not expect that.
        ours.set_nonblocking(true)?;
        let path = match &program.path {
            Some(path) => path.clone(),
            None => std::env::current_exe()?,
        };
        let theirs = OwnedFd::from(theirs);
        let mut command = Command::new(path);
        match program.events {
            Some(level) => command.env(EVENTS, level.as_str()),
            // That of a pool in whose child this is.
            None => command.env_remove(EVENTS),
        };
        let mut process = command
            .args(&program.arguments)
            .env(SOCKET, number(theirs.as_fd())?.to_string())
            // Also if there are none: this process may be a child, too.
            .env(LIMITS, program.limits.to_string())
            // It is the one descriptor that a child can be given without unsafe code. The child takes it away from there.
            .stdin(Stdio::from(theirs))
            .stdout(program.output.stdio())
            .stderr(program.output.stdio())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self {
            pipes: Pipes::of(&mut process),
            process,
            frames: frames(UnixStream::from_std(ours)?),
            looks,
            is_spoilt: false,
            jobs: 0,
        })
    }

    /// Returns whether it is alive and silent, as one without a job is.
    pub(super) fn is_idle(&mut self) -> bool {
        self.pipes.drain();
        let pid = self.process.id();
        receive(&mut self.frames, pid).now_or_never().is_none() && !self.has_ended()
    }

    /// Adds an encoded frame to those that [`answer`](Self::answer) sends, and returns whether there was room for it. There is
    /// if nothing waits.
    pub(super) fn feed(&mut self, frame: Bytes) -> bool {
        // An error of the socket is seen by the flush.
        self.frames.feed(frame).now_or_never().is_some()
    }

    /// Sends what was added, and waits for the next message; returns `None` when it is time to look at the child. Events
    /// and output that come before are emitted.
    ///
    /// Cancel safe.
    pub(super) async fn answer(&mut self) -> Option<Message> {
        let (frames, pid) = (&mut self.frames, self.process.id());
        let message = async {
            match SinkExt::<Bytes>::flush(frames).await {
                Ok(()) => receive(frames, pid).await,
                // It may have sent something before it closed its socket.
                Err(_) => match receive(frames, pid).await {
                    Message::Closed => Message::Unread,
                    message => message,
                },
            }
        };
        let message = tokio::select! {
            // A child that sends events without end does not keep the look back.
            biased;
            _ = self.looks.tick() => return None,
            message = message => message,
            never = self.pipes.read() => match never {},
        };
        self.pipes.drain();
        Some(message)
    }

    /// Begins the time until the next look anew, if it is over: nobody looks while there is no job.
    pub(super) fn rest(&mut self) {
        self.looks.tick().now_or_never();
    }

    /// Returns the next message of one that has ended; `None` if the runtime has not read it yet. What it has started is
    /// killed, so that nobody writes any more.
    pub(super) fn last_message(&mut self) -> Option<Message> {
        self.kill();
        let message = receive(&mut self.frames, self.process.id());
        let message = unconstrained(message).now_or_never();
        self.pipes.drain();
        message.or_else(|| match ioctl_fionread(self.frames.get_ref()) {
            Ok(1..) => None,
            // A process that it started may hold its socket.
            Ok(0) | Err(_) => Some(Message::Closed),
        })
    }

    /// Returns whether it has ended, though its socket may be held open by a process that it started.
    pub(super) fn has_ended(&self) -> bool {
        let Some(pid) = self.pid() else {
            return true;
        };
        // It is not reaped by this, so that its id stays its own until its group is killed.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        !matches!(waitid(WaitId::Pid(pid), options), Ok(None))
    }

    /// Returns the number of bytes that it has in memory, on Linux.
    pub(super) fn memory(&self) -> Option<u64> {
        let path = format!("/proc/{}/statm", self.pid()?.as_raw_nonzero());
        let statm = std::fs::read_to_string(path).ok()?;
        let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
        pages.checked_mul(rustix::param::page_size() as u64)
    }

    /// Kills it and the processes that it has started, and returns its status.
    pub(super) async fn end(mut self) -> Option<ExitStatus> {
        self.kill();
        self.process.wait().await.ok()
    }

    fn kill(&self) {
        // Not reaped yet, so the group is still its own.
        if let Some(pid) = self.pid() {
            kill_process_group(pid, Signal::KILL).ok();
        }
    }

    /// Returns its id; `None` once it is reaped.
    fn pid(&self) -> Option<Pid> {
        Pid::from_raw(self.process.id()?.try_into().ok()?)
    }
}

/// Returns a number that no other open file of its kind has.
pub(super) fn number(file: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(File::from(file.try_clone_to_owned()?).metadata()?.ino())
}

/// Waits for the next message, and emits the events before it.
///
/// Cancel safe.
async fn receive(frames: &mut Frames, pid: Option<u32>) -> Message {
    loop {
        let frame = match frames.next().await {
            Some(Ok(bytes)) => Frame::decode(bytes.freeze()),
            Some(Err(error)) => match error.kind() {
                io::ErrorKind::InvalidData => None,
                io::ErrorKind::ConnectionReset => return Message::Unread,
                _ => return Message::Closed,
            },
            None => return Message::Closed,
        };
        match frame {
            Some(Frame::Event(event)) => event.emit(pid),
            Some(frame) => return Message::Frame(frame),
            None => return Message::Garbage,
        }
        // A child that sends events without end does not keep the others from the thread.
        consume_budget().await;
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // tokio reaps it.
        self.kill();
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("pid", &self.process.id())
            .field("jobs", &self.jobs)
            .finish_non_exhaustive()
    }
}
