//! [`Panic`]: a panic that was caught, and the one way to catch and to drop what may panic.

use std::{
    any::Any,
    backtrace::Backtrace,
    borrow::Cow,
    error::Error,
    fmt, mem,
    panic::{self, AssertUnwindSafe},
    sync::{Mutex, PoisonError},
};

use crate::panic_hook::{Location, Origin, Watch, message};

/// A caught panic.
///
/// Unlike the bare payload, which is `Send` only, it is `Sync` too, and dropping it is safe when
/// the destructor of the payload panics in its turn.
///
/// ```
/// use tower_sentinel::Panic;
///
/// let user = 7;
/// let payload = std::panic::catch_unwind(|| panic!("no such user: {user}")).unwrap_err();
/// let panic = Panic::from_payload(payload);
/// assert_eq!(panic.message(), "no such user: 7");
/// assert_eq!(*panic.into_payload().downcast::<String>().unwrap(), "no such user: 7");
/// ```
// Boxed, so that the rarest of outcomes does not set the size of all others.
pub struct Panic(Box<Caught>);

struct Caught {
    message: Cow<'static, str>,
    /// Empty only while it is moved out. The lock is never taken: it lends its `Sync`.
    payload: Mutex<Option<Box<dyn Any + Send>>>,
    origin: Option<Origin>,
}

impl Panic {
    /// Creates a panic with `payload`, as [`std::panic::panic_any`] would raise it.
    ///
    /// For tests of a policy.
    pub fn new(payload: impl Any + Send) -> Self {
        Self::from_payload(Box::new(payload))
    }

    /// Creates a panic from what [`std::panic::catch_unwind`] or a `JoinError` gives.
    pub fn from_payload(payload: Box<dyn Any + Send>) -> Self {
        Self::with_origin(payload, None)
    }

    fn with_origin(payload: Box<dyn Any + Send>, origin: Option<Origin>) -> Self {
        let message = match payload.downcast_ref::<&'static str>() {
            Some(message) => Cow::Borrowed(*message),
            None => match message(&*payload) {
                Some(message) => Cow::Owned(message.to_owned()),
                None => Cow::Borrowed("Box<dyn Any>"),
            },
        };
        Self(Box::new(Caught {
            message,
            payload: Mutex::new(Some(payload)),
            origin,
        }))
    }

    /// Returns the message, if the payload is a `&'static str` or a `String`; otherwise
    /// `Box<dyn Any>`, as the standard library's panic hook prints it.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Returns where the panic was raised, if the [panic hook](crate::panic_hook) was installed and
    /// saw it.
    pub fn location(&self) -> Option<&Location> {
        Some(&self.0.origin.as_ref()?.location)
    }

    /// Returns the stack at the panic, if the [panic hook](crate::panic_hook) was installed
    /// [with backtraces](crate::panic_hook::install_with_backtraces) and saw it.
    pub fn backtrace(&self) -> Option<&Backtrace> {
        self.0.origin.as_ref()?.backtrace.as_ref()
    }

    /// Returns the payload that the panic was raised with.
    pub fn into_payload(mut self) -> Box<dyn Any + Send> {
        // Invariant: only this method empties the slot, and it consumes the panic.
        self.take().expect("the payload is taken once")
    }

    /// Lets the panic go on in the current thread, without calling the panic hook again.
    pub fn resume(self) -> ! {
        panic::resume_unwind(self.into_payload())
    }

    /// Returns whether the job was asked to stop as this panic unwound; only the hook knows.
    pub(crate) fn has_asked(&self) -> Option<bool> {
        Some(self.0.origin.as_ref()?.has_asked)
    }

    fn take(&mut self) -> Option<Box<dyn Any + Send>> {
        let slot = self.0.payload.get_mut();
        slot.unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Drop for Panic {
    fn drop(&mut self) {
        if let Some(payload) = self.take() {
            drop_quietly(payload);
        }
    }
}

impl fmt::Debug for Panic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut panic = f.debug_tuple("Panic");
        panic.field(&self.message());
        if let Some(location) = self.location() {
            panic.field(&format_args!("{location}"));
        }
        panic.finish()
    }
}

impl fmt::Display for Panic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "panicked: {}", self.message())
    }
}

impl Error for Panic {}

/// Runs `f` and catches its panic.
///
/// `AssertUnwindSafe` holds because callers drop whatever `f` touched, unused, once it panicked,
/// but for a service that panics in `poll_ready`: its owner is told to discard it.
pub(crate) fn catch<R>(f: impl FnOnce() -> R) -> Result<R, Panic> {
    let watch = Watch::begin();
    panic::catch_unwind(AssertUnwindSafe(f)).map_err(|payload| {
        let origin = watch.origin_of(&*payload);
        Panic::with_origin(payload, origin)
    })
}

/// Runs code of others that is told of something and asked for nothing: a subscriber, a recorder, a
/// waker, a destructor. Its panic ends here.
///
/// The panic hook has told of that panic. Its payload is leaked: to drop it could panic again,
/// without end.
pub(crate) fn guard(foreign: impl FnOnce()) {
    if let Err(payload) = panic::catch_unwind(AssertUnwindSafe(foreign)) {
        mem::forget(payload);
    }
}

/// Drops a value of the user's where an unwinding destructor would take the sentinel with it.
pub(crate) fn drop_quietly<T>(value: T) {
    if mem::needs_drop::<T>() {
        guard(|| drop(value));
    }
}

/// A value of the user's that is dropped quietly wherever it is dropped: by tokio, where nobody waits
/// for a task any more, which meets a panic whose payload panics too with an abort.
pub(crate) struct Quiet<T>(
    // `None` once it is taken.
    Option<T>,
);

impl<T> Quiet<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Some(value))
    }

    pub(crate) fn into_inner(mut self) -> T {
        // Invariant: only this method, which consumes it, and the destructor empty it.
        self.0.take().expect("a value is taken once")
    }
}

impl<T> Drop for Quiet<T> {
    fn drop(&mut self) {
        if let Some(value) = self.0.take() {
            drop_quietly(value);
        }
    }
}

/// Prints a value of the user's, also one that panics then; an error with its causes, if it has a form with
/// them (`{:#}`).
pub(crate) fn print(what: &str, value: &dyn fmt::Display) -> String {
    catch(|| format!("{value:#}"))
        .unwrap_or_else(|panic| format!("the {what} cannot be printed: {}", panic.message()))
}
