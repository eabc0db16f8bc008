//! Consumption of one subscription, by one task or by several.

use std::{
    future::{Future, poll_fn},
    panic::resume_unwind,
    pin::{Pin, pin},
    task::Poll,
    time::Duration,
};

use tokio::{
    task::{JoinError, JoinSet},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    Summary,
    erased::Cause,
    options::Options,
    session::Session,
    share::share_of,
    signals::{Asked, Signals},
    work::Wired,
};
use crate::{
    outcome::{drop_quietly, guard},
    telemetry::consumer_name::carried,
};

/// Session that has begun to end: it takes no more jobs.
pub(super) struct Ending {
    /// `None` if the end was requested.
    pub(super) cause: Option<Cause>,
    /// Number of calls that have succeeded.
    pub(super) answered: u64,
    /// Time from its beginning to the cause of its end.
    pub(super) lasted: Duration,
    /// The drain and the close.
    pub(super) rest: Rest,
}

pub(super) type Rest = Pin<Box<dyn Future<Output = Ended> + Send>>;

/// End of a session.
pub(super) struct Ended {
    /// The gravest error of a call during the drain.
    pub(super) cause: Option<Cause>,
    pub(super) summary: Summary,
}

/// Consumes until something ends it: on this task, or on one task for each service if there are several.
///
/// A cancelled `stop` cuts the drain short.
pub(super) async fn consume(
    wired: Wired,
    mut options: Options,
    signals: &mut Signals,
    stop: CancellationToken,
) -> Ending {
    let started = Instant::now();
    let shutdown = options.shutdown.clone();
    let Wired {
        mut works,
        prefetch,
    } = wired;
    let tasks = works.len();
    let limit = |task| prefetch.map_or(usize::MAX, |prefetch| share_of(prefetch, task, tasks));
    if let Some(watched) = options.watched.get() {
        watched.consume(tasks, prefetch);
    }
    signals.watch_shutdown(shutdown.clone());
    let (cause, answered, rest): (_, _, Rest) = if tasks == 1 {
        // Invariant: there is exactly one.
        let work = works.pop().expect("a vector of one is not empty");
        options.limit = limit(0);
        options.checks_token = !options.is_bounded;
        let mut session = Session::new(work, options);
        let cause = session.run(signals).await;
        (cause, session.answered(), Box::pin(session.end(stop)))
    } else {
        let drain = CancellationToken::new();
        let mut running = JoinSet::new();
        for (task, work) in works.into_iter().enumerate() {
            let limit = limit(task);
            let options = Options {
                limit,
                // Once for all tasks.
                checks_token: task == 0 && !options.is_bounded,
                watchdog: options.watchdog.filter(|_| task == 0),
                ..options.clone()
            };
            let mut session = Session::new(work, options).among(drain.clone());
            let mut signals = Signals::default();
            signals.watch(drain.clone());
            let run = async move { (session.run(&mut signals).await, session) };
            running.spawn(carried(run));
        }
        let (cause, sessions) = begin_to_end(running, signals, drain).await;
        let answered = sessions.iter().map(Session::answered).sum();
        let ends = sessions.into_iter().map(move |it| it.end(stop.clone()));
        (cause, answered, Box::pin(end_all(ends)))
    };
    signals.watch_shutdown(None);
    let lasted = started.elapsed();
    let rest = async move {
        let ended = rest.await;
        // The running calls have finished, or are stopped already; no new one may begin.
        if let Some(token) = shutdown {
            guard(|| token.cancel());
        }
        ended
    };
    Ending {
        cause,
        answered,
        lasted,
        rest: Box::pin(rest),
    }
}

/// Waits for the end of the last session. If its channel is gone, `stop` cuts that short: nothing can be
/// settled any more, and no session follows it.
pub(super) async fn end_last(
    rest: &mut Rest,
    gone: &CancellationToken,
    stop: &CancellationToken,
) -> Ended {
    let mut gone = pin!(gone.cancelled());
    poll_fn(|cx| {
        if !stop.is_cancelled() && gone.as_mut().poll(cx).is_ready() {
            stop.cancel();
        }
        rest.as_mut().poll(cx)
    })
    .await
}

/// Waits until no task takes jobs any more, and passes requests on to the tasks.
async fn begin_to_end(
    mut running: JoinSet<(Option<Cause>, Session)>,
    signals: &mut Signals,
    drain: CancellationToken,
) -> (Option<Cause>, Vec<Session>) {
    let (mut cause, mut sessions) = (None, Vec::new());
    let mut is_asked_for = false;
    poll_fn(|cx| {
        // Unless an error came first.
        if signals.poll(cx) != Asked::Nothing && !drain.is_cancelled() {
            is_asked_for = true;
            drain.cancel();
        }
        while let Poll::Ready(Some(joined)) = running.poll_join_next(cx) {
            let other = match joined {
                Ok((cause, session)) => {
                    sessions.push(session);
                    cause
                }
                Err(error) => Some(gone(error)),
            };
            cause = match is_asked_for {
                true => {
                    drop_quietly(cause.take());
                    drop_quietly(other);
                    None
                }
                false => Cause::graver(cause.take(), other),
            };
        }
        match running.is_empty() {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    })
    .await;
    (cause, sessions)
}

/// Lets the sessions of all tasks drain and close.
async fn end_all<F>(ends: impl Iterator<Item = F>) -> Ended
where
    F: Future<Output = Ended> + Send + 'static,
{
    let (mut cause, mut summary) = (None, Summary::default());
    let mut ending = JoinSet::new();
    ends.for_each(|end| drop(ending.spawn(carried(end))));
    while let Some(joined) = ending.join_next().await {
        let other = match joined {
            Ok(ended) => {
                summary.add(ended.summary);
                ended.cause
            }
            Err(error) => Some(gone(error)),
        };
        cause = Cause::graver(cause, other);
    }
    Ended { cause, summary }
}

/// Returns the cause for a task that ended with its runtime.
fn gone(error: JoinError) -> Cause {
    match error.try_into_panic() {
        // Panics of user code are caught where it is called.
        Ok(payload) => resume_unwind(payload),
        Err(_) => Cause::RuntimeGone,
    }
}
