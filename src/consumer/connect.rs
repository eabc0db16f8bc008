//! [`Connect`], the constructor of a session's subscription.

use std::{fmt, future::Future};

use super::subscription::Subscription;

/// Constructor of the subscription for each session of a [`Consumer::reconnecting`](crate::Consumer::reconnecting).
///
/// Each closure that takes nothing and returns such a future is one. [`connect_fn`] makes one of a closure that takes
/// the number of the attempt. The adapters' connectors are ones, too.
///
/// # Contract
///
/// The future is polled to its end or dropped. If it is dropped, it leaves no connection and no subscription behind.
/// An error is an attempt that failed; the consumer prints it in its events, so it holds no password.
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not make subscriptions",
    label = "a closure `FnMut() -> impl Future<Output = Result<impl Subscription, _>>`, or a connector, is expected",
    note = "it is called again for each session: let it clone what its future takes",
    note = "for a closure that takes the number of the attempt, use `tower_sentinel::consumer::connect_fn`"
)]
pub trait Connect {
    /// Subscription of a session.
    type Subscription: Subscription;

    /// Error of an attempt that failed.
    type Error;

    /// Future of an attempt.
    type Future: Future<Output = Result<Self::Subscription, Self::Error>>;

    /// Begins an attempt. The `attempt` is 1 after a session that worked, and at the start; it is one more after each
    /// failure.
    fn connect(&mut self, attempt: u32) -> Self::Future;
}

impl<F, Fut, B, X> Connect for F
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<B, X>>,
    B: Subscription,
{
    type Subscription = B;
    type Error = X;
    type Future = Fut;

    fn connect(&mut self, _: u32) -> Fut {
        self()
    }
}

/// Returns a [`Connect`] by a function of the attempt's number, for example to use another address each time.
///
/// ```
/// use std::{convert::Infallible, time::Duration};
/// use tower::service_fn;
/// use tower_sentinel::{
///     Consumer, SentinelLayer, SettlePolicy, ack_on_success,
///     broker::memory::{Broker, Delivery},
///     consumer::connect_fn,
/// };
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// let queue = Broker::new().queue("jobs").declare();
/// queue.publish(7);
///
/// let jobs = queue.clone();
/// let connect = connect_fn(move |attempt| {
///     let jobs = jobs.clone();
///     async move {
///         match attempt {
///             1 | 2 => Err("the broker starts".to_owned()),
///             _ => jobs.subscribe(64).map_err(|error| error.to_string()),
///         }
///     }
/// });
/// let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
/// let summary = Consumer::reconnecting(connect, |_| {
///     service_fn(|_: Delivery<u32>| async { Ok::<_, Infallible>(()) })
/// })
/// .sentinel(layer)
/// .with_graceful_shutdown(async move {
///     queue.emptied().await;
/// })
/// .run()
/// .await
/// .unwrap();
/// assert_eq!(summary.answered, 1);
/// # }
/// ```
pub fn connect_fn<F, Fut>(connect: F) -> ConnectFn<F>
where
    F: FnMut(u32) -> Fut,
{
    ConnectFn(connect)
}

/// [`Connect`] of [`connect_fn`].
#[derive(Clone, Copy)]
pub struct ConnectFn<F>(F);

impl<F, Fut, B, X> Connect for ConnectFn<F>
where
    F: FnMut(u32) -> Fut,
    Fut: Future<Output = Result<B, X>>,
    B: Subscription,
{
    type Subscription = B;
    type Error = X;
    type Future = Fut;

    fn connect(&mut self, attempt: u32) -> Fut {
        (self.0)(attempt)
    }
}

impl<F> fmt::Debug for ConnectFn<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ConnectFn")
    }
}
