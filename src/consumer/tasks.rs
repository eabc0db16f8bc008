//! One subscription, consumed by one task or by several.

use std::{
    fmt,
    future::poll_fn,
    panic::resume_unwind,
    pin::Pin,
    sync::{Arc, Mutex},
    task::Poll,
    time::Duration,
};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tower_service::Service;
use tracing::Instrument;

use super::{
    Classify, EndCause, Summary,
    session::{Options, Session},
    share::Share,
    signals::{Asked, Signals},
};
use crate::{
    panic::{drop_quietly, guard},
    subscription::Subscription,
};

/// The end of a session.
pub(super) struct Ended<T, E> {
    /// None if it was asked to.
    pub(super) cause: Option<EndCause<T, E>>,
    pub(super) summary: Summary,
    /// From its begin to its cause: without the drain and the close.
    pub(super) lasted: Duration,
}

/// Consumes until the end: on this task, or on one for each service if there are several.
pub(super) async fn consume<B, S, C>(
    subscription: Pin<Box<B>>,
    mut services: Vec<S>,
    classify: &Arc<Mutex<C>>,
    options: &Options,
    signals: &mut Signals,
) -> Ended<B::Error, S::Error>
where
    B: Subscription<Job: Send, Error: fmt::Display + Send + 'static> + Send + 'static,
    S: Service<B::Job, Response: Send + 'static> + Send + 'static,
    S::Error: fmt::Display + Send + 'static,
    S::Future: Send + 'static,
    C: Classify<S::Error> + Send + 'static,
{
    let ended = if services.len() == 1 {
        // Invariant: there is one.
        let service = services.pop().expect("a vector of one is not empty");
        let session = Session::new(subscription, service, classify, options);
        session.run(signals).await
    } else {
        let (drain, stop) = (CancellationToken::new(), CancellationToken::new());
        let mut sessions = JoinSet::new();
        for (share, service) in Share::among(services.len(), subscription).zip(services) {
            let (classify, options) = (Arc::clone(classify), options.clone());
            let mut signals = Signals::relayed(drain.clone(), stop.clone());
            let drain = drain.clone();
            let session = async move {
                let session = Session::new(Box::pin(share), service, &classify, &options);
                session.among(drain).run(&mut signals).await
            };
            sessions.spawn(session.in_current_span());
        }
        join(sessions, signals, (drain, stop)).await
    };
    // What runs was let finish, or stopped already; nothing is to begin.
    if let Some(token) = &options.shutdown {
        guard(|| token.cancel());
    }
    ended
}

/// Waits for all sessions, and passes on to them what is asked for.
async fn join<T, E>(
    mut sessions: JoinSet<Ended<T, E>>,
    signals: &mut Signals,
    (drain, stop): (CancellationToken, CancellationToken),
) -> Ended<T, E>
where
    T: 'static,
    E: 'static,
{
    let (mut cause, mut summary, mut lasted) = (None, Summary::default(), Duration::ZERO);
    let mut is_asked_for = false;
    poll_fn(|cx| {
        let asked = signals.poll(cx);
        if asked != Asked::Nothing {
            // Unless an error came first.
            is_asked_for |= !drain.is_cancelled();
            drain.cancel();
        }
        if asked == Asked::Stop {
            stop.cancel();
        }
        while let Poll::Ready(Some(joined)) = sessions.poll_join_next(cx) {
            let other = joined.unwrap_or_else(|error| match error.try_into_panic() {
                // What is the user's is caught where it is called.
                Ok(payload) => resume_unwind(payload),
                Err(_) => Ended {
                    cause: Some(EndCause::RuntimeGone),
                    summary: Summary::default(),
                    lasted: Duration::ZERO,
                },
            });
            summary.add(other.summary);
            lasted = lasted.max(other.lasted);
            match (&cause, other.cause) {
                (_, Some(other)) if is_asked_for => drop_quietly(other),
                (Some(cause), Some(other)) if !other.outranks(cause) => drop_quietly(other),
                (_, Some(other)) => drop_quietly(cause.replace(other)),
                (_, None) => {}
            }
        }
        match sessions.is_empty() {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    })
    .await;
    Ended {
        cause,
        summary,
        lasted,
    }
}
