//! One job in a child.

use std::{
    future::Future,
    pin::{Pin, pin},
    time::Duration,
};

use super::{
    error::ProcessError,
    frame::Frame,
    lease::Lease,
    worker::{Message, Worker},
};
use tokio::time::{MissedTickBehavior, interval};

/// Time between two looks at a child that runs a job: at its memory, and whether it has ended though its socket is
/// open.
const LOOK: Duration = Duration::from_millis(20);

/// Number of children that a job is offered to, if they end before they have it.
const ATTEMPTS: u32 = 3;

/// End of a job that leaves no child.
enum Loss {
    Crashed,
    /// The child has ended before it had the job.
    Unstarted,
    Garbled,
    OutOfMemory(u64),
}

/// Runs a job in the worker of a lease, which goes back if it can take another job.
///
/// If this is dropped, the worker is killed.
pub(super) async fn call<T, E, C>(
    mut lease: Box<Lease>,
    job: Frame,
    stopped: impl Future<Output = ()>,
    decode: impl Fn(&[u8]) -> Result<Result<T, E>, C>,
) -> Result<T, ProcessError<E, C>> {
    let memory = lease.settings().memory;
    let mut stopped = pin!(stopped);
    let mut attempts = 0;
    let (worker, answer) = loop {
        attempts += 1;
        let mut worker = lease.take().await;
        worker.jobs += 1;
        worker.feed(&job);
        let answer = run(&mut worker, memory, stopped.as_mut()).await;
        // An idle child may have ended just then. That is not the fault of the job.
        if !matches!(answer, Err(Loss::Unstarted)) || attempts == ATTEMPTS {
            break (worker, answer);
        }
    };
    let loss = match answer {
        Ok(Frame::Answer(bytes)) => {
            lease.give_back(worker);
            return match decode(&bytes) {
                Ok(result) => result.map_err(ProcessError::Failed),
                Err(error) => Err(ProcessError::Undecodable(error)),
            };
        }
        Ok(Frame::Panic { message, location }) => {
            lease.give_back(worker);
            return Err(ProcessError::Panicked { message, location });
        }
        // Events are not returned.
        Ok(Frame::Ready | Frame::Started | Frame::Cancel | Frame::Job { .. } | Frame::Event(_)) => {
            Loss::Garbled
        }
        Err(loss) => loss,
    };
    let status = worker.end().await;
    Err(match loss {
        Loss::Crashed | Loss::Unstarted => ProcessError::Crashed { status },
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
    // Of the job, of its stop, and of the child's knowledge of that.
    let (mut is_started, mut is_stopped, mut is_told) = (false, false, false);
    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first is at once.
    looks.tick().await;
    loop {
        // While a large job waits to be read, there is no room yet.
        if is_stopped && !is_told {
            is_told = worker.feed(&Frame::Cancel);
        }
        let lost = match is_started {
            true => Loss::Crashed,
            false => Loss::Unstarted,
        };
        let message = tokio::select! {
            // A child that sends events without end keeps neither of the first two back.
            biased;
            () = &mut stopped, if !is_stopped => {
                is_stopped = true;
                continue;
            }
            _ = looks.tick() => {
                if let Some(limit) = memory {
                    if worker.memory().is_some_and(|used| used > limit) {
                        return Err(Loss::OutOfMemory(limit));
                    }
                }
                if !worker.has_ended() {
                    continue;
                }
                match worker.last_message() {
                    Some(message) => message,
                    None => continue,
                }
            }
            message = worker.answer() => message,
        };
        match message {
            Message::Frame(Frame::Started) if !is_started => is_started = true,
            Message::Frame(frame) => return Ok(frame),
            Message::Garbage => return Err(Loss::Garbled),
            Message::Closed => return Err(lost),
        }
    }
}
