//! The socket of a child, which a job has no business with.

use std::{
    fs,
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::{Command, Stdio},
};

use rustix::{
    net::sockopt::socket_peercred,
    process::{PidfdFlags, PidfdGetfdFlags, getpid, getppid, pidfd_getfd, pidfd_open},
};

/// Returns the socket of this child, by the process that has made it.
pub(crate) fn socket() -> UnixStream {
    let this = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
    let sockets = fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| {
        let entry = entry.unwrap();
        let target = fs::read_link(entry.path()).ok()?;
        if !target.to_str()?.starts_with("socket:") {
            return None;
        }
        let number = entry.file_name().to_str()?.parse().ok()?;
        pidfd_getfd(&this, number, PidfdGetfdFlags::empty()).ok()
    });
    let is_to_parent =
        |socket: &OwnedFd| socket_peercred(socket).is_ok_and(|peer| Some(peer.pid) == getppid());
    UnixStream::from(sockets.into_iter().find(is_to_parent).unwrap())
}

/// Starts a process that has the socket as its standard input, and outlives the job.
#[expect(clippy::zombie_processes, reason = "it is to outlive its job")]
pub(crate) fn holder() {
    let socket = OwnedFd::from(socket());
    Command::new("sleep")
        .arg("1000")
        .stdin(Stdio::from(socket))
        .spawn()
        .unwrap();
}
