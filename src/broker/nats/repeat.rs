//! Requests that are sent again while a cluster elects a leader.
//!
//! During an election nobody listens at a subject of JetStream, so the server reports at once that there are
//! no responders. Or a request reaches a server that is no leader any more, and has no response.

use std::{future::Future, time::Duration};

use async_nats::{Client, connection::State, jetstream::Context};
use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::miss::{Miss, Missed};

/// Pause after a response that nobody takes the request.
const PAUSE: Duration = Duration::from_millis(200);

/// Time without a response after which a request is sent once more.
const SILENCE: Duration = Duration::from_secs(1);

/// The same for each further one.
const LATER_SILENCE: Duration = Duration::from_secs(2);

/// Time for which the requests about a configuration are repeated: longer than the election of a leader, which may take
/// 9 s.
pub(super) const LIMIT: Duration = Duration::from_secs(15);

/// Longest time that a timer has to measure.
const LONGEST: Duration = Duration::from_secs(60 * 60 * 24 * 365);

/// Sends a request until it has a result, and for `limit` at most; `request` sends it.
///
/// An open request stays open beside the next one, so a slow server is not taken for a dead one. One that has
/// no response is repeated only if it `is_idempotent`.
///
/// # Errors
///
/// The error of the last request, if none of them may have been carried out; otherwise `None`.
pub(super) async fn repeat<T, E, F>(
    is_connected: impl Fn() -> bool,
    limit: Duration,
    is_idempotent: bool,
    mut request: impl FnMut() -> F,
) -> Result<T, Option<E>>
where
    F: Future<Output = Result<T, E>>,
    E: Missed,
{
    let end = Instant::now() + limit.min(LONGEST);
    let (silence, later_silence) = match is_idempotent {
        true => (SILENCE, LATER_SILENCE),
        false => (LONGEST, LONGEST),
    };
    let mut next = Instant::now() + silence;
    let mut last = None;
    let mut is_silent = false;
    let mut open = FuturesUnordered::from_iter([request()]);
    while Instant::now() < end {
        let wake = next.min(end);
        let result = match open.is_empty() {
            true => {
                sleep_until(wake).await;
                None
            }
            false => timeout_at(wake, open.next()).await.ok().flatten(),
        };
        match result {
            Some(Ok(result)) => return Ok(result),
            Some(Err(error)) => match error.miss() {
                Miss::Refused => return Err(Some(error)),
                Miss::Absent => {
                    last = Some(error);
                    next = next.min(Instant::now() + PAUSE);
                }
                Miss::Silent if is_idempotent => is_silent = true,
                Miss::Silent => return Err(None),
            },
            None if Instant::now() >= end => {}
            // A client without a connection would keep it, and send both once it has one.
            None if is_connected() => {
                open.push(request());
                next = Instant::now() + later_silence;
            }
            None => next = Instant::now() + PAUSE,
        }
    }
    Err(last.filter(|_| open.is_empty() && !is_silent))
}

/// Requests about a configuration, which share one time [`LIMIT`].
pub(super) struct Asking<'a> {
    pub(super) context: &'a Context,
    client: Client,
    end: Instant,
}

impl<'a> Asking<'a> {
    pub(super) fn new(context: &'a Context) -> Self {
        Self {
            context,
            client: context.client(),
            end: Instant::now() + LIMIT,
        }
    }

    /// Repeats an idempotent request; see [`repeat`].
    pub(super) async fn ask<T, E, F>(&self, request: impl FnMut() -> F) -> Result<T, Option<E>>
    where
        F: Future<Output = Result<T, E>>,
        E: Missed,
    {
        let left = self.end.saturating_duration_since(Instant::now());
        let is_connected = || self.client.connection_state() == State::Connected;
        repeat(is_connected, left, true, request).await
    }
}

#[cfg(test)]
mod tests {
    use std::{
        cell::{Cell, RefCell},
        future::pending,
        time::Duration,
    };

    use tokio::time::{Instant, sleep};

    use super::{Miss, Missed, repeat};

    const LIMIT: Duration = Duration::from_secs(4);

    impl Missed for Miss {
        fn miss(&self) -> Miss {
            *self
        }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_nobody_takes_is_repeated_until_somebody_does() {
        for is_idempotent in [false, true] {
            let start = Instant::now();
            let result = repeat(
                || true,
                LIMIT,
                is_idempotent,
                || async {
                    match start.elapsed() < ms(2_500) {
                        true => Err(Miss::Absent),
                        false => Ok(()),
                    }
                },
            );
            assert_eq!(result.await, Ok(()));
            assert!(start.elapsed() < ms(3_000));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_nobody_takes_for_the_whole_time_was_not_carried_out() {
        let start = Instant::now();
        let result = repeat(
            || true,
            LIMIT,
            true,
            || async { Err::<(), _>(Miss::Absent) },
        );
        assert_eq!(result.await, Err(Some(Miss::Absent)));
        assert_eq!(start.elapsed(), LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_request_is_repeated_only_if_it_is_idempotent() {
        for (is_idempotent, times) in [
            (true, &[0_u64, 1_000, 3_000, 5_000, 7_000] as &[u64]),
            (false, &[0]),
        ] {
            let start = Instant::now();
            let sent = RefCell::new(Vec::new());
            let result = repeat(
                || true,
                2 * LIMIT,
                is_idempotent,
                || {
                    sent.borrow_mut().push(start.elapsed());
                    pending::<Result<(), Miss>>()
                },
            );
            assert_eq!(result.await, Err(None));
            let times: Vec<_> = times.iter().copied().map(ms).collect();
            assert_eq!(*sent.borrow(), times);
            assert_eq!(start.elapsed(), 2 * LIMIT);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_response_to_the_first_of_two_requests_counts() {
        let sent = Cell::new(0);
        let start = Instant::now();
        let result = repeat(
            || true,
            LIMIT,
            true,
            || {
                sent.set(sent.get() + 1);
                let nth = sent.get();
                async move {
                    sleep(ms(1_500)).await;
                    Ok::<_, Miss>(nth)
                }
            },
        );
        assert_eq!(result.await, Ok(1));
        assert_eq!(start.elapsed(), ms(1_500));
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_may_have_been_carried_out_is_not_reported_as_absent() {
        let sent = Cell::new(0);
        let result = repeat(
            || true,
            LIMIT,
            true,
            || {
                sent.set(sent.get() + 1);
                let is_first = sent.get() == 1;
                async move {
                    match is_first {
                        true => pending().await,
                        false => Err::<(), _>(Miss::Absent),
                    }
                }
            },
        );
        assert_eq!(result.await, Err(None));
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_ends_it_and_without_a_connection_nothing_is_sent_again() {
        let result = repeat(
            || true,
            LIMIT,
            true,
            || async { Err::<(), _>(Miss::Refused) },
        );
        assert_eq!(result.await, Err(Some(Miss::Refused)));
        let sent = Cell::new(0);
        let result = repeat(
            || false,
            LIMIT,
            true,
            || {
                sent.set(sent.get() + 1);
                pending::<Result<(), Miss>>()
            },
        );
        assert_eq!(result.await, Err(None));
        assert_eq!(sent.get(), 1);
    }
}
