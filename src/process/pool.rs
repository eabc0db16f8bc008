//! [`ProcessPool`], a service whose calls run in other processes.

use std::{
    ffi::OsString,
    fmt,
    future::Future,
    mem,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tower_service::Service;
use tracing::Level;

use super::{
    call::call,
    error::ProcessError,
    frame,
    head::{BytesOnly, Crossing, WithHeaders},
    lease::{Lease, Settings, Shared, acquire},
    limits::Limits,
    output::Output,
    warm::Warm,
    worker::Program,
};
use crate::{cancel, outcome::guard};

/// Service that runs each job in another process.
///
/// A job may abort, overflow its stack, crash in a C library, use all memory, or never yield: it takes its own process
/// down, and its caller gets a [`ProcessError`]. The other jobs of the worker don't notice. A process that has done its
/// job well is kept for the next one.
///
/// It belongs inside a [`SentinelLayer`](crate::SentinelLayer). A job is any `AsRef<[u8]>`, such as the deliveries of all
/// brokers. In the child, [`serve`](crate::process::serve) hands its bytes to a service, whose result comes back.
///
/// # Contract
///
/// - *Readiness*: there is a free process, or one was started. If none can be started, the service stays unready, tries
///   again after a pause of up to 10 s, and an event at WARN says why. So a program that is missing does not drain the
///   queue.
/// - *Stop*: when the job is told to stop ([`cancelled()`](crate::cancelled)), the job in its process is told, too. When
///   the response future is dropped, the process and all that it has started are killed at once. So a job's
///   [`grace`](crate::SentinelLayer::grace) is the time between, and the sentinel's `stopped()` is true for each job that
///   runs here.
/// - *Panics* of the job are caught in its process, which goes on, unless
///   [`reuse_after_panic`](Self::reuse_after_panic) says otherwise.
/// - *The end of this process*, by SIGKILL too, ends the children and what they have started: their sockets close, and
///   they notice whatever their jobs do.
///
/// # Examples
///
/// ```no_run
/// use std::{error::Error, time::Duration};
/// use tower::service_fn;
/// use tower_sentinel::{
///     Consumer, SentinelLayer, SettlePolicy, ack_on_success,
///     broker::memory::Broker,
///     process::{self, ProcessPool, Request},
/// };
///
/// async fn process(order: Request) -> Result<usize, String> {
///     Ok(order.as_ref().len()) // may call into a C library that crashes
/// }
///
/// fn main() -> Result<(), Box<dyn Error>> {
///     // In a child this serves jobs, and does not return.
///     process::serve_json(service_fn(process));
///     work()
/// }
///
/// #[tokio::main]
/// async fn work() -> Result<(), Box<dyn Error>> {
///     let queue = Broker::<String>::new().queue("orders").declare();
///     let pool = ProcessPool::json::<usize, String>(4).memory(512 << 20).max_jobs(1_000);
///     let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success())).timeout(Duration::from_secs(30));
///     Consumer::new(queue.subscribe(4)?, pool).sentinel(layer).await?;
///     Ok(())
/// }
/// ```
///
/// Children of another program, with limits, whose lines and events go to the log of this process:
///
/// ```no_run
/// use std::time::Duration;
/// use tower_sentinel::process::{Output, ProcessPool};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let pool = ProcessPool::json::<u64, String>(4)
///     .program("/usr/lib/acme/thumbnails")
///     .arguments(["--quality", "80"])
///     .start_timeout(Duration::from_secs(20)) // it loads a model
///     .warm(2)
///     .max_rss(1 << 30) // replaced when it has grown beyond that
///     .address_space(4 << 30)
///     .cpu_time(Duration::from_secs(60))
///     .open_files(256)
///     .nice(10)
///     .reuse_after_panic(false)
///     .output(Output::Events)
///     .events(tracing::Level::INFO);
/// # drop(pool);
/// # }
/// ```
pub struct ProcessPool<D, H = BytesOnly> {
    decode: D,
    crossing: H,
    trace_context: Option<TraceContext>,
    shared: Arc<Shared>,
    warm: Arc<Warm>,
    state: State,
}

/// Function of the user that returns headers with the trace context of the current span.
type TraceContext = Arc<dyn Fn() -> Vec<(String, String)> + Send + Sync>;

enum State {
    Idle,
    Acquiring(Pin<Box<dyn Future<Output = Box<Lease>> + Send + Sync>>),
    Ready(Box<Lease>),
}

impl<D> ProcessPool<D> {
    /// Creates a pool of at most `processes`, whose results `decode` reads: a
    /// `Fn(&[u8]) -> Result<Result<T, E>, C>`.
    ///
    /// # Panics
    ///
    /// Panics if there are to be 0 processes.
    #[track_caller]
    pub fn new(processes: usize, decode: D) -> Self {
        assert!(processes > 0, "a pool of 0 processes would run nothing");
        let settings = Settings {
            program: Program {
                path: None,
                arguments: Vec::new(),
                start_timeout: Duration::from_secs(10),
                output: Output::Inherit,
                events: None,
                limits: Limits::default(),
            },
            max_jobs: None,
            memory: None,
            max_rss: None,
            keeps_panicked: true,
            warm: 0,
        };
        Self {
            decode,
            crossing: BytesOnly,
            trace_context: None,
            shared: Arc::new(Shared::new(settings, processes)),
            warm: Arc::default(),
            state: State::Idle,
        }
    }
}

impl<D, H> ProcessPool<D, H> {
    /// Sets the headers that cross to the child; none by default.
    ///
    /// The jobs are [`Envelope`](crate::broker::Envelope)s then, as the deliveries of all brokers are. Their message
    /// id, routing key and number of deliveries cross, too. The handler reads them from its
    /// [`Request`](crate::process::Request). Name only what it needs: each header is copied for each job.
    ///
    /// ```
    /// use tower_sentinel::process::{ProcessPool, Request};
    ///
    /// let pool = ProcessPool::json::<(), String>(4).headers(["tenant"]);
    /// # drop(pool);
    ///
    /// async fn process(order: Request) -> Result<(), String> {
    ///     let tenant = order.header("tenant").ok_or("the order has no tenant")?;
    ///     println!("delivery {:?} of an order of {tenant}", order.deliveries());
    ///     Ok(())
    /// }
    /// ```
    pub fn headers<N: Into<String>>(
        self,
        names: impl IntoIterator<Item = N>,
    ) -> ProcessPool<D, WithHeaders> {
        ProcessPool {
            decode: self.decode,
            crossing: WithHeaders {
                names: names.into_iter().map(Into::into).collect(),
            },
            trace_context: self.trace_context,
            shared: self.shared,
            warm: self.warm,
            state: State::Idle,
        }
    }

    /// Sets the function that writes the trace context of the job's span as headers; none by default.
    ///
    /// It is called for each job, and [`Span::current`](tracing::Span::current) is the job's span. The handler finds the
    /// headers in its [`Request`](crate::process::Request), in place of others with the same names, and makes its own
    /// span a child of that one. With OpenTelemetry:
    ///
    /// ```ignore
    /// let propagator = TraceContextPropagator::new();
    /// let pool = ProcessPool::json::<usize, String>(4).trace_context(move || {
    ///     let mut headers = HashMap::new();
    ///     propagator.inject_context(&Span::current().context(), &mut headers);
    ///     headers
    /// });
    ///
    /// async fn process(order: Request) -> Result<usize, String> {
    ///     let headers = order.headers().map(|(name, value)| (name.to_owned(), value.to_owned()));
    ///     let headers: HashMap<_, _> = headers.collect();
    ///     let span = tracing::info_span!("order");
    ///     span.set_parent(TraceContextPropagator::new().extract(&headers)).ok();
    ///     run(order).instrument(span).await
    /// }
    /// ```
    ///
    /// If the function panics, the job runs without.
    pub fn trace_context<F, C>(mut self, write: F) -> Self
    where
        F: Fn() -> C + Send + Sync + 'static,
        C: IntoIterator<Item = (String, String)>,
    {
        self.trace_context = Some(Arc::new(move || write().into_iter().collect()));
        self
    }

    /// Sets the program of the children; by default it is that of this process, without arguments.
    ///
    /// It must call [`serve`](crate::process::serve), or start a program that does: see
    /// [the guide](crate::_guide::isolation#input-of-strangers) for sandboxes.
    pub fn program(self, path: impl Into<PathBuf>) -> Self {
        self.set(|settings| settings.program.path = Some(path.into()))
    }

    /// Sets the arguments of the program; none by default.
    pub fn arguments<A: Into<OsString>>(self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.set(|settings| {
            settings.program.arguments = arguments.into_iter().map(Into::into).collect();
        })
    }

    /// Sets the time that a child has until it is ready for jobs; 10 s by default.
    pub fn start_timeout(self, limit: Duration) -> Self {
        self.set(|settings| settings.program.start_timeout = limit)
    }

    /// Sets the number of jobs after which a child is replaced; never by default.
    ///
    /// Use it against libraries that leak.
    ///
    /// # Panics
    ///
    /// Panics if `jobs` is 0.
    #[track_caller]
    pub fn max_jobs(self, jobs: u64) -> Self {
        assert!(jobs > 0, "a child that runs 0 jobs is of no use");
        self.set(|settings| settings.max_jobs = Some(jobs))
    }

    /// Sets the number of bytes that a child may have in memory while it runs a job; no limit by default.
    ///
    /// The pool looks every 20 ms, on Linux; elsewhere there is no limit. A child above it is killed, and its job fails
    /// with [`ProcessError::OutOfMemory`]. A job can use more for so long: leave some room.
    pub fn memory(self, bytes: u64) -> Self {
        self.set(|settings| settings.memory = Some(bytes))
    }

    /// Sets the destination of what the children write to their standard output and standard error; by default it is
    /// [inherited](Output::Inherit).
    pub fn output(self, output: Output) -> Self {
        self.set(|settings| settings.program.output = output)
    }

    /// Sets the most verbose level of the children's `tracing` events that are emitted in this process; by default none
    /// are.
    ///
    /// They have the child's level and message, and are in the span of the job that runs. Their target is
    /// `tower_sentinel::process`. The field `child.target` has the child's, `child.fields` all its fields as one text, and
    /// `process.pid` its process id. Spans of the child don't cross. Message and fields are cut at 8 KiB each.
    ///
    /// An event crosses before the code after it runs, so the last one before a crash arrives. Nothing is kept: a child
    /// that emits events faster than they are handled waits. Between two jobs nobody reads; what is emitted there arrives
    /// before the next job.
    ///
    /// [`serve`](crate::process::serve) installs the subscriber that sends them as the global default. If the child has
    /// one before that, it is kept, and nothing crosses.
    pub fn events(self, level: Level) -> Self {
        self.set(|settings| settings.program.events = Some(level))
    }

    /// Sets the number of bytes that a child may have in memory after a job, above which it is replaced; no limit by
    /// default.
    ///
    /// Use it against libraries that leak, where [`max_jobs`](Self::max_jobs) is too coarse. The job has its result, and
    /// no job fails by this. It works on Linux; elsewhere there is no limit.
    pub fn max_rss(self, bytes: u64) -> Self {
        self.set(|settings| settings.max_rss = Some(bytes))
    }

    /// Sets whether a child takes other jobs after one has panicked in it; `true` by default.
    ///
    /// Set it to `false` if a panic can leave the memory of the child in a state that the next job must not see, such as a
    /// poisoned lock.
    pub fn reuse_after_panic(self, is_reused: bool) -> Self {
        self.set(|settings| settings.keeps_panicked = is_reused)
    }

    /// Sets the number of children that are kept started, with those that run jobs; none by default.
    ///
    /// They are started one after the other in the background, as soon as the pool is first polled, and so is another one
    /// when one has ended with its job or was replaced. So a job seldom waits until a child has started. Jobs never
    /// wait for this: they start children, too, up to the number of processes, which this can't exceed. A child that
    /// ends while it has no job is replaced when its turn comes.
    pub fn warm(self, children: usize) -> Self {
        self.set(|settings| settings.warm = children)
    }

    /// Sets the number of bytes that the address space of a child may have (`RLIMIT_AS`); no limit by default.
    ///
    /// Unlike [`memory`](Self::memory), it can't be exceeded even for a moment: an allocation fails, which aborts a Rust
    /// program ([`ProcessError::Crashed`] with signal 6), and may be an error of the job in a C library. It counts what
    /// is only reserved, such as the stacks of threads, so it must be some hundred megabytes more than what is used.
    ///
    /// This and the limits below are set by [`serve`](crate::process::serve). Processes that a job starts have them,
    /// too, each for itself. If one can't be set, the child does not start: the pool is unready, and the event at WARN
    /// says which.
    pub fn address_space(self, bytes: u64) -> Self {
        self.set(|settings| settings.program.limits.address_space = Some(bytes))
    }

    /// Sets the CPU time that a job may use, on all threads of its child (`RLIMIT_CPU`); no limit by default.
    ///
    /// The system counts in whole seconds: a job may use up to one second more. Then its child ends by SIGXCPU, and the
    /// job fails with [`ProcessError::OutOfCpuTime`]. What a job has left running counts for the next one. A job that
    /// waits uses no CPU time: it needs a [time limit](crate::SentinelLayer::timeout), too.
    ///
    /// # Panics
    ///
    /// Panics if `limit` is 0.
    #[track_caller]
    pub fn cpu_time(self, limit: Duration) -> Self {
        assert!(!limit.is_zero(), "a job without CPU time would never run");
        self.set(|settings| settings.program.limits.cpu_time = Some(limit))
    }

    /// Sets the number of files and sockets that a child may have open (`RLIMIT_NOFILE`); that of this process by
    /// default.
    ///
    /// The child itself needs about 20. To open one more fails, with an error that is the job's.
    pub fn open_files(self, number: u64) -> Self {
        self.set(|settings| settings.program.limits.open_files = Some(number))
    }

    /// Sets the increment of the nice value of the children: a positive one lets other processes go before, up to 19; 0
    /// by default.
    ///
    /// So work on the CPU leaves this process its time to settle and keep leases alive. A negative one needs a
    /// privilege.
    pub fn nice(self, increment: i32) -> Self {
        self.set(|settings| settings.program.limits.nice = Some(increment))
    }

    /// Changes the settings, as long as the pool has no process.
    fn set(mut self, change: impl FnOnce(&mut Settings)) -> Self {
        self.shared = Arc::new(self.shared.with(change));
        self.warm = Arc::default();
        self
    }
}

/// Decoder of results in JSON.
#[cfg(feature = "json")]
type Json<T, E> = fn(&[u8]) -> Result<Result<T, E>, serde_json::Error>;

#[cfg(feature = "json")]
impl ProcessPool<()> {
    /// Creates a pool of at most `processes`, whose results are JSON, as [`serve_json`](crate::process::serve_json)
    /// writes them.
    ///
    /// # Panics
    ///
    /// Panics if there are to be 0 processes.
    #[track_caller]
    pub fn json<T, E>(processes: usize) -> ProcessPool<Json<T, E>>
    where
        T: serde::de::DeserializeOwned,
        E: serde::de::DeserializeOwned,
    {
        ProcessPool::new(processes, |bytes: &[u8]| serde_json::from_slice(bytes))
    }
}

impl<D, H, J, T, E, C> Service<J> for ProcessPool<D, H>
where
    H: Crossing<J>,
    D: Fn(&[u8]) -> Result<Result<T, E>, C> + Clone + Send + 'static,
    J: AsRef<[u8]>,
    T: Send + 'static,
    E: Send + 'static,
    C: Send + 'static,
{
    type Response = T;
    type Error = ProcessError<E, C>;
    type Future = Pin<Box<dyn Future<Output = Result<T, ProcessError<E, C>>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        loop {
            self.state = match &mut self.state {
                State::Idle => {
                    self.warm.begin(&self.shared);
                    State::Acquiring(Box::pin(acquire(Arc::clone(&self.shared))))
                }
                State::Acquiring(lease) => {
                    self.state = State::Ready(ready!(lease.as_mut().poll(cx)));
                    return Poll::Ready(Ok(()));
                }
                State::Ready(lease) => match lease.is_usable() {
                    true => return Poll::Ready(Ok(())),
                    // It has ended while it waited for a job.
                    false => State::Idle,
                },
            };
        }
    }

    #[track_caller]
    fn call(&mut self, job: J) -> Self::Future {
        let State::Ready(lease) = mem::replace(&mut self.state, State::Idle) else {
            panic!("`ProcessPool` called before it was ready")
        };
        let mut head = self.crossing.head(&job);
        if let Some(write) = &self.trace_context {
            guard(|| head.replace(write()));
        }
        // Of the job that this call is part of.
        let (stopped, time_left) = (cancel::cancelled(), cancel::time_left());
        let frame = frame::job(time_left, &head, job.as_ref());
        drop(job);
        Box::pin(call(lease, frame, stopped, self.decode.clone()))
    }
}

impl<D: Clone, H: Clone> Clone for ProcessPool<D, H> {
    fn clone(&self) -> Self {
        Self {
            decode: self.decode.clone(),
            crossing: self.crossing.clone(),
            trace_context: self.trace_context.clone(),
            shared: Arc::clone(&self.shared),
            warm: Arc::clone(&self.warm),
            state: State::Idle,
        }
    }
}

impl<D, H: fmt::Debug> fmt::Debug for ProcessPool<D, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProcessPool")
            .field("crossing", &self.crossing)
            .field("settings", &self.shared.settings)
            .field("idle", &self.shared.number_idle())
            .finish_non_exhaustive()
    }
}
