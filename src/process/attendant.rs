//! [`Attendant`]: the thread of a child that sees to it that messages are read while a job blocks its thread.

use std::{
    io,
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::runtime::Handle;

/// Time after which a job counts as long.
const LONG: Duration = Duration::from_millis(20);

/// The main thread of a child, while a runtime runs its jobs.
///
/// A worker of the runtime that reads a message runs the job, too: to wake another thread for it would cost more than
/// most of a job. Others sleep, and nobody waits for messages if the job blocks its thread. So this thread wakes one
/// of them, which is then the one that waits for messages, while a job takes long. It also looks whether the parent is
/// there: a job may block all threads of the runtime.
pub(super) struct Attendant {
    socket: UnixStream,
    shared: Arc<Shared>,
    notices: Receiver<Notice>,
}

/// The jobs, as their attendant is told of them.
pub(super) struct Attended {
    shared: Arc<Shared>,
    notices: Sender<Notice>,
}

#[derive(Default)]
struct Shared {
    /// Number of times that a job has begun or ended: odd while one runs.
    turn: AtomicU32,
    /// Whether the attendant waits for the next job.
    rests: AtomicBool,
}

enum Notice {
    Begun,
    Ended(io::Result<()>),
}

/// Returns an attendant for the jobs that come in at `socket`.
pub(super) fn attendant(socket: UnixStream) -> (Attendant, Attended) {
    let shared = Arc::<Shared>::default();
    let (sender, notices) = channel();
    let attended = Attended {
        shared: Arc::clone(&shared),
        notices: sender,
    };
    let attendant = Attendant {
        socket,
        shared,
        notices,
    };
    (attendant, attended)
}

impl Attendant {
    /// Attends to the jobs on a runtime until there are no more, or the parent is gone.
    pub(super) fn attend(self, runtime: &Handle) -> io::Result<()> {
        let mut seen = 0;
        loop {
            match self.notices.recv_timeout(LONG) {
                Ok(Notice::Ended(result)) => return result,
                Ok(Notice::Begun) => {}
                Err(RecvTimeoutError::Timeout) => {
                    let turn = self.shared.turn.load(Ordering::SeqCst);
                    match turn % 2 == 1 {
                        // The same job since the last look.
                        true if turn == seen => {
                            if self.has_no_parent() {
                                return Ok(());
                            }
                            drop(runtime.spawn(async {}));
                        }
                        true => {}
                        false => {
                            if let Some(result) = self.rest(turn) {
                                return result;
                            }
                        }
                    }
                    seen = turn;
                }
                Err(RecvTimeoutError::Disconnected) => return Err(gone()),
            }
        }
    }

    fn has_no_parent(&self) -> bool {
        let mut socket = [PollFd::new(&self.socket, PollFlags::empty())];
        poll(&mut socket, Some(&Timespec::default())).is_ok()
            && socket[0].revents().contains(PollFlags::HUP)
    }

    /// Waits until a job begins, and returns the result if there are no more.
    fn rest(&self, turn: u32) -> Option<io::Result<()>> {
        self.shared.rests.store(true, Ordering::SeqCst);
        // One that began before has not seen that this thread rests.
        if self.shared.turn.load(Ordering::SeqCst) != turn {
            return None;
        }
        match self.notices.recv() {
            Ok(Notice::Begun) => None,
            Ok(Notice::Ended(result)) => Some(result),
            Err(_) => Some(Err(gone())),
        }
    }
}

fn gone() -> io::Error {
    io::Error::other("the task that runs its jobs has panicked")
}

impl Attended {
    pub(super) fn begin(&self) {
        self.shared.turn.fetch_add(1, Ordering::SeqCst);
        if self.shared.rests.swap(false, Ordering::SeqCst) {
            self.tell(Notice::Begun);
        }
    }

    pub(super) fn finish(&self) {
        self.shared.turn.fetch_add(1, Ordering::SeqCst);
    }

    /// Tells that there are no more jobs.
    pub(super) fn end(&self, result: io::Result<()>) {
        self.tell(Notice::Ended(result));
    }

    fn tell(&self, notice: Notice) {
        // The attendant waits for the end.
        self.notices.send(notice).ok();
    }
}
