//! [`Panic`], and the only functions that catch panics and drop values whose destructors may panic.

use std::{
    any::Any,
    backtrace::Backtrace,
    borrow::Cow,
    error::Error,
    fmt, mem,
    panic::{self, AssertUnwindSafe},
    sync::{Mutex, PoisonError},
};

use crate::panic_hook::{Location, Raised, Watch, message};

/// A caught panic.
///
/// The bare payload is `Send` only; this type is `Sync` too. Dropping it is safe even if the destructor
/// of the payload panics.
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
// Boxed, so that the rarest outcome does not set the size of all others.
pub struct Panic(Box<Caught>);

struct Caught {
    message: Cow<'static, str>,
    /// `None` only while it is moved out. The lock is never taken: it is here because a `Mutex` is `Sync`.
    payload: Mutex<Option<Box<dyn Any + Send>>>,
    origin: Option<Raised>,
}

impl Panic {
    /// Creates a panic with `payload`, as if raised by [`std::panic::panic_any`].
    ///
    /// For tests of a policy.
    pub fn new(payload: impl Any + Send) -> Self {
        Self::from_payload(Box::new(payload))
    }

    /// Creates a panic from the payload of [`std::panic::catch_unwind`] or of a `JoinError`.
    pub fn from_payload(payload: Box<dyn Any + Send>) -> Self {
        Self::with_origin(payload, None)
    }

    #[cold]
    fn caught(payload: Box<dyn Any + Send>, watch: Watch) -> Self {
        let origin = watch.origin_of(&*payload);
        Self::with_origin(payload, origin)
    }

    fn with_origin(payload: Box<dyn Any + Send>, origin: Option<Raised>) -> Self {
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

    /// Returns the place where the panic was raised, if the [panic hook](crate::panic_hook) was installed
    /// and saw it.
    pub fn location(&self) -> Option<&Location> {
        Some(&self.0.origin.as_ref()?.location)
    }

    /// Returns the stack at the panic, if the [panic hook](crate::panic_hook) was installed
    /// [with backtraces](crate::panic_hook::install_with_backtraces) and saw it.
    pub fn backtrace(&self) -> Option<&Backtrace> {
        self.0.origin.as_ref()?.backtrace.as_ref()
    }

    /// Returns the payload of the panic.
    pub fn into_payload(mut self) -> Box<dyn Any + Send> {
        // Invariant: only this method empties the slot, and it consumes the panic.
        self.take().expect("the payload is taken once")
    }

    /// Resumes the panic in the current thread, without calling the panic hook again.
    pub fn resume(self) -> ! {
        panic::resume_unwind(self.into_payload())
    }

    /// Returns whether a stop of the job was requested while this panic unwound; `None` without the hook.
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
/// `AssertUnwindSafe` holds because callers drop everything that `f` touched, unused, once it panicked.
/// The exception is a service that panics in `poll_ready`: the error tells its owner to discard it.
pub(crate) fn catch<R>(f: impl FnOnce() -> R) -> Result<R, Panic> {
    let watch = Watch::begin();
    match panic::catch_unwind(AssertUnwindSafe(f)) {
        Ok(value) => Ok(value),
        Err(payload) => Err(Panic::caught(payload, watch)),
    }
}

/// Calls `f` and catches its panic, as [`catch`] does.
///
/// It is compiled once. So it is for code that is compiled for each handler: there a `catch` would be large.
pub(crate) fn catch_dyn(f: &mut dyn Run) -> Result<(), Panic> {
    catch(|| f.run())
}

/// Calls `f` and swallows its panic, as [`guard`] does; compiled once, like [`catch_dyn`].
pub(crate) fn guard_dyn(f: &mut dyn Run) {
    guard(|| f.run());
}

/// An `FnMut()` as a trait object. Such an object of `FnMut` itself has the closure's code a second time, for `FnOnce`.
pub(crate) trait Run {
    fn run(&mut self);
}

impl<F: FnMut()> Run for F {
    fn run(&mut self) {
        self();
    }
}

/// Runs foreign code that returns nothing, such as a subscriber, a recorder, a waker or a destructor,
/// and swallows its panic.
///
/// The panic hook has reported that panic. Its payload is leaked, since dropping it could panic again,
/// without end.
pub(crate) fn guard(foreign: impl FnOnce()) {
    if let Err(payload) = panic::catch_unwind(AssertUnwindSafe(foreign)) {
        mem::forget(payload);
    }
}

/// Drops a value of the user, and swallows a panic of its destructor, which would end the sentinel too.
pub(crate) fn drop_quietly<T>(value: T) {
    if mem::needs_drop::<T>() {
        let mut value = Some(value);
        // Even if the drop of the old value unwinds, the new one is there.
        guard_dyn(&mut || value = None);
    }
}

/// A value of the user whose drop never panics, wherever it is dropped.
///
/// tokio drops the output of a task that nobody waits for. If that panics, and the payload of the panic
/// panics too, the process aborts.
pub(crate) struct Quiet<T>(
    // `None` once taken.
    Option<T>,
);

impl<T> Quiet<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Some(value))
    }

    pub(crate) fn into_inner(mut self) -> T {
        // Invariant: only this method, which consumes `self`, and the destructor empty it.
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

/// Returns a value of the user as text, also if its `Display` panics.
///
/// It uses the form `{:#}`, in which some errors include their causes.
pub(crate) fn print(what: &str, value: &dyn fmt::Display) -> String {
    catch(|| format!("{value:#}"))
        .unwrap_or_else(|panic| format!("the {what} cannot be printed: {}", panic.message()))
}
