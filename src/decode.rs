//! Middleware that decodes the bytes of a job, so that the handler gets a value.
//!
//! See [`DecodeLayer`].

use std::{
    any::type_name,
    error::Error,
    fmt,
    future::Future,
    marker::PhantomData,
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, SystemTime},
};

use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use crate::{
    job::{Job, TimeLimit},
    outcome::boxed_source,
    telemetry::messaging::Messaging,
};

// === impl DecodeLayer ===

/// Layer that decodes the bytes of each job with `F`, and hands the value to the inner service.
///
/// A job is any `AsRef<[u8]>`, such as the deliveries of all brokers. `F` is a
/// `Fn(&[u8]) -> Result<T, C>`, and the inner service is a `Service<T>`. So a handler stays
/// `async fn process(order: Order)`. A handler that also needs the headers or ids of the delivery gets
/// both with [`with_job`](Self::with_job).
///
/// It belongs *inside* a [`SentinelLayer`](crate::SentinelLayer). There a job that can't be decoded is a
/// failure of that job, and its delivery is still settled. If the stream did the decoding, it would be an
/// error of the stream, without a tag to settle.
///
/// # Jobs that can't be decoded
///
/// Their outcome is [`Failed`](crate::Outcome::Failed), with [`DecodeError::Undecodable`]. Add
/// [`reject_undecodable`](crate::DecisionExt::reject_undecodable) to the decision to dead-letter them.
/// [`ack_on_success`](crate::ack_on_success) alone does not know about decoding: it retries them at once,
/// for ever.
///
/// # Contract
///
/// - *Readiness* is the inner service's. If a job can't be decoded, the inner service was made ready and is
///   not called; a sentinel drops that instance.
/// - *Calls*: the codec runs in `call`. Inside a sentinel that is on the job's own task, and counts toward
///   its time limit. The codec does not yield, so it should be short.
/// - *The job* is dropped after decoding, before the inner `call`, unless it is
///   [handed on](Self::with_job).
/// - *Panics* in the codec are not caught here. Inside a sentinel the outcome of the job is
///   [`Panicked`](crate::Outcome::Panicked).
///
/// # Examples
///
/// ```
/// use std::{convert::Infallible, str};
/// use tower::{ServiceBuilder, ServiceExt, service_fn};
/// use tower_sentinel::{
///     DecisionExt, DecodeLayer, Job, Report, SentinelLayer, Verdict, ack_on_success,
///     settle::decision::Decision,
/// };
///
/// struct Delivery { tag: u64, body: &'static [u8] }
///
/// impl Job for Delivery {
///     type Tag = u64;
///     fn tag(&self) -> u64 { self.tag }
/// }
///
/// impl AsRef<[u8]> for Delivery {
///     fn as_ref(&self) -> &[u8] { self.body }
/// }
///
/// async fn process(order: String) -> Result<(), Infallible> {
///     assert_eq!(order, "two of these");
///     Ok(())
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// // With a tag that can `Settle` this is a `SettlePolicy::new(decision)`.
/// let decision = ack_on_success().reject_undecodable();
/// let policy = service_fn(move |report: Report<u64, _, _>| {
///     let verdict = decision.decide(&report.tag, &report.outcome);
///     async move { Ok::<_, Infallible>(verdict) }
/// });
/// let handler = ServiceBuilder::new()
///     .layer(SentinelLayer::new(policy))
///     .layer(DecodeLayer::new(|body: &[u8]| str::from_utf8(body).map(str::to_owned)))
///     .service_fn(process);
///
/// let order = Delivery { tag: 1, body: b"two of these" };
/// assert_eq!(handler.clone().oneshot(order).await.unwrap(), Ok(Verdict::Ack));
/// let noise = Delivery { tag: 2, body: b"\xff\xff" };
/// assert_eq!(handler.oneshot(noise).await.unwrap(), Ok(Verdict::Reject));
/// # }
/// ```
#[must_use = "a layer does nothing until it is applied to a service"]
pub struct DecodeLayer<F, M = ValueOnly> {
    codec: F,
    passing: PhantomData<fn() -> M>,
}

impl<F> DecodeLayer<F> {
    /// Creates a layer that decodes with `codec`.
    pub fn new<T, C>(codec: F) -> Self
    where
        F: Fn(&[u8]) -> Result<T, C>,
    {
        let passing = PhantomData;
        Self { codec, passing }
    }

    /// Hands the job to the inner service as well, which is then a `Service<Decoded<J, T>>`.
    ///
    /// ```
    /// use std::{convert::Infallible, num::ParseIntError, str};
    /// use tower::{Service, ServiceBuilder, ServiceExt};
    /// use tower_sentinel::{DecodeLayer, decode::Decoded};
    ///
    /// struct Delivery { message_id: &'static str, body: &'static str }
    ///
    /// impl AsRef<[u8]> for Delivery {
    ///     fn as_ref(&self) -> &[u8] { self.body.as_bytes() }
    /// }
    ///
    /// async fn process(decoded: Decoded<Delivery, usize>) -> Result<String, Infallible> {
    ///     let Decoded { job, value } = decoded;
    ///     Ok(format!("{value} of {}", job.message_id))
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// let mut handler = ServiceBuilder::new()
    ///     .layer(DecodeLayer::new(|body: &[u8]| Ok::<_, Infallible>(body.len())).with_job())
    ///     .service_fn(process);
    ///
    /// let job = Delivery { message_id: "m-1", body: "abc" };
    /// assert_eq!(handler.ready().await.unwrap().call(job).await.unwrap(), "3 of m-1");
    /// # }
    /// ```
    pub fn with_job(self) -> DecodeLayer<F, WithJob> {
        DecodeLayer {
            codec: self.codec,
            passing: PhantomData,
        }
    }
}

/// The codec of [`DecodeLayer::json`].
#[cfg(feature = "json")]
type Json<T> = fn(&[u8]) -> Result<T, serde_json::Error>;

#[cfg(feature = "json")]
impl DecodeLayer<()> {
    /// Creates a layer that decodes JSON, with `serde_json`.
    ///
    /// `T` is the request of the handler, and can mostly be inferred. Bytes after the value, other than
    /// white space, are an error.
    ///
    /// ```
    /// use std::convert::Infallible;
    /// use serde::Deserialize;
    /// use tower::{ServiceBuilder, ServiceExt};
    /// use tower_sentinel::DecodeLayer;
    ///
    /// #[derive(Deserialize)]
    /// struct Order { quantity: u32 }
    ///
    /// async fn process(order: Order) -> Result<u32, Infallible> {
    ///     Ok(order.quantity)
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// let handler = ServiceBuilder::new()
    ///     .layer(DecodeLayer::json())
    ///     .service_fn(process);
    ///
    /// let body = r#"{ "quantity": 2 }"#;
    /// assert_eq!(handler.clone().oneshot(body).await.unwrap(), 2);
    ///
    /// let error = handler.oneshot("{}").await.unwrap_err();
    /// let message = "the job cannot be decoded: missing field `quantity` at line 1 column 2";
    /// assert_eq!(error.to_string(), message);
    /// # }
    /// ```
    pub fn json<T: serde::de::DeserializeOwned>()
    -> DecodeLayer<fn(&[u8]) -> Result<T, serde_json::Error>> {
        let codec: Json<T> = |bytes| serde_json::from_slice(bytes);
        DecodeLayer::new(codec)
    }
}

impl<F: Clone, M> Clone for DecodeLayer<F, M> {
    fn clone(&self) -> Self {
        Self {
            codec: self.codec.clone(),
            passing: PhantomData,
        }
    }
}

impl<F, M> fmt::Debug for DecodeLayer<F, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DecodeLayer")
            .field("codec", &format_args!("{}", type_name::<F>()))
            .finish()
    }
}

impl<S, F: Clone, M> Layer<S> for DecodeLayer<F, M> {
    type Service = Decode<S, F, M>;

    fn layer(&self, inner: S) -> Decode<S, F, M> {
        Decode {
            inner,
            layer: self.clone(),
        }
    }
}

// === Passing ===

/// A job, and the value decoded from its bytes.
///
/// It is a [`Job`] if `J` is one, with the same tag and time limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decoded<J, T> {
    /// The job as it was delivered, with its headers, ids and bytes.
    pub job: J,
    /// The decoded value.
    pub value: T,
}

impl<J: Job, T> Job for Decoded<J, T> {
    type Tag = J::Tag;

    fn tag(&self) -> J::Tag {
        self.job.tag()
    }

    fn time_limit(&self) -> TimeLimit {
        self.job.time_limit()
    }

    fn lease(&self) -> Option<Duration> {
        self.job.lease()
    }

    fn messaging(&self) -> Option<Messaging<'_>> {
        self.job.messaging()
    }

    fn queued_since(&self) -> Option<SystemTime> {
        self.job.queued_since()
    }
}

/// Choice of the request that a [`Decode`] hands to its inner service.
///
/// Implemented for [`ValueOnly`] and [`WithJob`]. The name appears in error messages; it is not meant to be
/// implemented.
pub trait Passing<J, T> {
    /// The request of the inner service.
    type Request;

    /// Makes the request.
    fn pass(job: J, value: T) -> Self::Request;
}

/// The default [`Passing`]: the value alone.
#[derive(Clone, Copy, Debug)]
pub enum ValueOnly {}

impl<J, T> Passing<J, T> for ValueOnly {
    type Request = T;

    fn pass(_: J, value: T) -> T {
        value
    }
}

/// The [`Passing`] of [`DecodeLayer::with_job`]: the job and the value, as a [`Decoded`].
#[derive(Clone, Copy, Debug)]
pub enum WithJob {}

impl<J, T> Passing<J, T> for WithJob {
    type Request = Decoded<J, T>;

    fn pass(job: J, value: T) -> Decoded<J, T> {
        Decoded { job, value }
    }
}

// === impl Decode ===

/// Service that decodes jobs for its inner service; see [`DecodeLayer`].
pub struct Decode<S, F, M = ValueOnly> {
    inner: S,
    layer: DecodeLayer<F, M>,
}

impl<S, F, M> Decode<S, F, M> {
    /// Returns the inner service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// Returns the inner service, mutably.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// Returns the inner service, without the decoding.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S: Clone, F: Clone, M> Clone for Decode<S, F, M> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            layer: self.layer.clone(),
        }
    }
}

impl<S: fmt::Debug, F, M> fmt::Debug for Decode<S, F, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decode")
            .field("inner", &self.inner)
            .field("codec", &format_args!("{}", type_name::<F>()))
            .finish()
    }
}

impl<S, F, M, J, T, C> Service<J> for Decode<S, F, M>
where
    F: Fn(&[u8]) -> Result<T, C>,
    M: Passing<J, T>,
    S: Service<M::Request>,
    J: AsRef<[u8]>,
{
    type Response = S::Response;
    type Error = DecodeError<C, S::Error>;
    type Future = DecodeFuture<S::Future, C>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(DecodeError::Inner)
    }

    fn call(&mut self, job: J) -> Self::Future {
        DecodeFuture {
            state: match (self.layer.codec)(job.as_ref()) {
                Ok(value) => State::Running {
                    future: self.inner.call(M::pass(job, value)),
                },
                Err(error) => State::Undecodable { error: Some(error) },
            },
        }
    }
}

// === impl DecodeFuture ===

pin_project! {
    /// The future of a [`Decode`].
    #[must_use = "futures do nothing unless polled"]
    pub struct DecodeFuture<F, C> {
        #[pin]
        state: State<F, C>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, C> {
        // `None` once it is returned.
        Undecodable { error: Option<C> },
        Running { #[pin] future: F },
    }
}

impl<F, C, T, E> Future for DecodeFuture<F, C>
where
    F: Future<Output = Result<T, E>>,
{
    type Output = Result<T, DecodeError<C, E>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(match self.project().state.project() {
            StateProj::Running { future } => ready!(future.poll(cx)).map_err(DecodeError::Inner),
            StateProj::Undecodable { error } => {
                let error = error.take().expect("a future is not polled after its end");
                Err(DecodeError::Undecodable(error))
            }
        })
    }
}

impl<F, C> fmt::Debug for DecodeFuture<F, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DecodeFuture")
            .field("is_decoded", &matches!(self.state, State::Running { .. }))
            .finish_non_exhaustive()
    }
}

// === DecodeError ===

/// Error of a [`Decode`]: that of its codec, or that of its inner service.
///
/// For an error of the inner service, `Display` prints that error alone. The type implements [`Error`] for
/// every `C` and `E` that can be printed, including `tower::BoxError`. If the error is a `BoxError`,
/// `source()` is the boxed error of the codec, or the source of the boxed error of the inner service.
///
/// ```
/// use std::io;
/// use tower_sentinel::decode::DecodeError;
///
/// type Error = DecodeError<&'static str, io::Error>;
///
/// let error = Error::Undecodable("no opening brace");
/// assert_eq!(error.to_string(), "the job cannot be decoded: no opening brace");
/// assert_eq!(Error::Inner(io::Error::other("no such user")).to_string(), "no such user");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DecodeError<C, E> {
    /// The codec failed: the job never reached the inner service.
    Undecodable(C),
    /// The inner service failed.
    Inner(E),
}

impl<C, E> DecodeError<C, E> {
    /// Returns whether the codec failed.
    pub fn is_undecodable(&self) -> bool {
        matches!(self, DecodeError::Undecodable(_))
    }
}

impl<C: fmt::Display, E: fmt::Display> fmt::Display for DecodeError<C, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DecodeError::Undecodable(error) => write!(f, "the job cannot be decoded: {error}"),
            DecodeError::Inner(error) => error.fmt(f),
        }
    }
}

impl<C, E> Error for DecodeError<C, E>
where
    C: fmt::Debug + fmt::Display + 'static,
    E: fmt::Debug + fmt::Display + 'static,
{
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            DecodeError::Undecodable(error) => boxed_source(error),
            DecodeError::Inner(error) => boxed_source(error).and_then(Error::source),
        }
    }
}
