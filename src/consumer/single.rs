//! Run of a consumer that has only one session.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::{
    Summary,
    consuming::Run,
    erased::Cause,
    options::Options,
    signals::Signals,
    tasks::{Ended, Ending, consume, end_last},
    work::Wired,
};
use crate::{
    outcome::{Panic, drop_quietly},
    telemetry::metrics::ConsumerInstruments,
};

/// Constructor of the only session's work. It gets the shutdown token of that session.
type Wire = dyn FnOnce(&CancellationToken) -> Result<Wired, Panic> + Send;

/// Returns the run of a consumer that has only one session.
pub(super) fn start(
    wire: Box<Wire>,
    options: Options,
    name: Option<Arc<str>>,
    signals: Signals,
) -> Run {
    let watched = options.watched.get().cloned();
    Run::new(name, signals, watched.clone(), |mut signals| async move {
        let stop = signals.stop_token();
        let shutdown = options.shutdown.clone().unwrap_or_default();
        let wired = match wire(&shutdown) {
            Ok(wired) => wired,
            Err(panic) => {
                return Ended {
                    cause: Some(Cause::MakeServicePanicked(panic)),
                    summary: Summary::default(),
                };
            }
        };
        let _connected = ConsumerInstruments::begin().connected();
        let gone = options.gone.clone();
        let ending = consume(wired, options, &mut signals, stop.clone()).await;
        let Ending {
            cause, mut rest, ..
        } = ending;
        if let Some(watched) = &watched {
            watched.drain();
        }
        let ended = signals.attend(end_last(&mut rest, &gone, &stop)).await;
        let cause = match cause {
            Some(cause) => Some(cause.or_graver(ended.cause)),
            None => {
                drop_quietly(ended.cause);
                None
            }
        };
        let summary = ended.summary;
        Ended { cause, summary }
    })
}
