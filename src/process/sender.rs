//! [`Sender`] of frames in a child.

use std::{
    io::{ErrorKind, IoSlice, Result, Write},
    os::unix::net::UnixStream,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};

use super::frame::Frame;

/// Sender of frames, from any thread. It blocks while the parent does not read them.
///
/// What is sent before a crash arrives: nothing waits in this process.
pub(super) struct Sender {
    socket: UnixStream,
    turns: Mutex<Turns>,
    next: Condvar,
}

/// Whose turn it is. A lock alone is not fair: threads that log without end would keep an answer back.
#[derive(Default)]
struct Turns {
    given: u64,
    current: u64,
}

impl Sender {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            turns: Mutex::default(),
            next: Condvar::new(),
        }
    }

    pub(super) fn send(&self, frame: &Frame) -> Result<()> {
        let bytes = frame.encode();
        let length = u32::try_from(bytes.len()).map_err(|_| ErrorKind::InvalidInput)?;
        let mut turns = self.turns();
        let mine = turns.given;
        turns.given += 1;
        let waited = self.next.wait_while(turns, |turns| turns.current != mine);
        drop(waited);
        let length = length.to_be_bytes();
        let sent = self.write(&mut [IoSlice::new(&length), IoSlice::new(&bytes)]);
        let mut turns = self.turns();
        turns.current += 1;
        if turns.current != turns.given {
            self.next.notify_all();
        }
        sent
    }

    fn write(&self, mut bytes: &mut [IoSlice<'_>]) -> Result<()> {
        while !bytes.is_empty() {
            match (&self.socket).write_vectored(bytes) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => IoSlice::advance_slices(&mut bytes, written),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // The socket is shared with its reader, who does not block.
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.writable()?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn writable(&self) -> Result<()> {
        let mut sockets = [PollFd::new(&self.socket, PollFlags::OUT)];
        match poll(&mut sockets, None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
