//! One job in a child.

use std::{
    future::Future,
    os::unix::process::ExitStatusExt,
    pin::{Pin, pin},
};

use rustix::process::Signal;
use tokio_util::bytes::Bytes;

use super::{
    error::ProcessError,
    frame::Frame,
    lease::Lease,
    worker::{Message, Worker},
};

/// Number of children that a job is offered to, if they end before they have it.
const ATTEMPTS: u32 = 3;

/// End of a job that leaves no child.
enum Loss {
    Crashed,
    /// The child has ended before it had read the job.
    Unread,
    Garbled,
    OutOfMemory(u64),
}

/// Runs a job, an encoded frame, in the worker of a lease, which goes back if it can take another job.
///
/// If this is dropped, the worker is killed.
pub(super) async fn call<T, E, C>(
    mut lease: Box<Lease>,
    job: Bytes,
    stopped: impl Future<Output = ()>,
    decode: impl Fn(&[u8]) -> Result<Result<T, E>, C>,
) -> Result<T, ProcessError<E, C>> {
    let memory = lease.settings().memory;
    let cpu_time = lease.settings().program.limits.cpu_time;
    let mut stopped = pin!(stopped);
    let mut attempts = 0;
    let (child, answer) = loop {
        attempts += 1;
        let mut child = lease.take().await;
        child.worker.jobs += 1;
        child.worker.feed(job.clone());
        let answer = run(&mut child.worker, memory, stopped.as_mut()).await;
        // An idle child may have ended just then. That is not the fault of the job.
        if !matches!(answer, Err(Loss::Unread)) || attempts == ATTEMPTS {
            break (child, answer);
        }
    };
    let loss = match answer {
        Ok(Frame::Answer { bytes, .. }) => {
            lease.give_back(child);
            return match decode(&bytes) {
                Ok(result) => result.map_err(ProcessError::Failed),
                Err(error) => Err(ProcessError::Undecodable(error)),
            };
        }
        Ok(Frame::Panic {
            message, location, ..
        }) => {
            if lease.settings().keeps_panicked {
                lease.give_back(child);
            }
            return Err(ProcessError::Panicked { message, location });
        }
        // Events are not returned.
        Ok(Frame::Ready | Frame::Cancel | Frame::Job { .. } | Frame::Event(_)) => Loss::Garbled,
        Err(loss) => loss,
    };
    let status = child.worker.end().await;
    Err(match loss {
        Loss::Crashed | Loss::Unread => {
            let signal = status.and_then(|status| status.signal());
            match cpu_time {
                Some(limit) if signal == Some(Signal::XCPU.as_raw()) => {
                    ProcessError::OutOfCpuTime { limit }
                }
                _ => ProcessError::Crashed { status },
            }
        }
        Loss::Garbled => ProcessError::Garbled,
        Loss::OutOfMemory(limit) => ProcessError::OutOfMemory { limit },
    })
}

/// Sends the job that was fed, and waits for the answer.
async fn run(
    worker: &mut Worker,
    memory: Option<u64>,
    mut stopped: Pin<&mut impl Future<Output = ()>>,
) -> Result<Frame, Loss> {
    // Of the job, and of the child's knowledge of that.
    let (mut is_stopped, mut is_told) = (false, false);
    worker.rest();
    loop {
        // While a large job waits to be read, there is no room yet.
        if is_stopped && !is_told {
            is_told = worker.feed(Frame::Cancel.encode());
        }
        let message = tokio::select! {
            // A child that sends events without end does not keep the stop back.
            biased;
            () = &mut stopped, if !is_stopped => {
                is_stopped = true;
                continue;
            }
            message = worker.answer() => message,
        };
        let message = match message {
            Some(message) => message,
            None => match look(worker, memory)? {
                Some(message) => message,
                None => continue,
            },
        };
        return match message {
            Message::Frame(Frame::Answer { job, .. } | Frame::Panic { job, .. })
                if job != worker.jobs =>
            {
                // A second answer to a job before.
                worker.is_spoilt = true;
                continue;
            }
            Message::Frame(frame) => Ok(frame),
            Message::Garbage => Err(Loss::Garbled),
            // What it has not read may be the order to stop.
            Message::Unread if !is_told => Err(Loss::Unread),
            Message::Unread | Message::Closed => Err(Loss::Crashed),
        };
    }
}

/// Looks at a child that runs a job, and returns the last message of one that has ended.
fn look(worker: &mut Worker, memory: Option<u64>) -> Result<Option<Message>, Loss> {
    if let Some(limit) = memory {
        if worker.memory().is_some_and(|used| used > limit) {
            return Err(Loss::OutOfMemory(limit));
        }
    }
    Ok(match worker.has_ended() {
        true => worker.last_message(),
        false => None,
    })
}
