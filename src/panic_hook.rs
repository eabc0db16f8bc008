//! Optional panic hook that records the location and the backtrace of a job's panic.
//!
//! A caught panic is only a payload. Only the panic hook knows where it was raised, and only while it
//! happens. The hook of this module keeps that for [`Panic::location`](crate::Panic::location) and, if you
//! enable it, [`Panic::backtrace`](crate::Panic::backtrace). It silences nothing: it calls the previous
//! hook for each panic.
//!
//! ```
//! use std::convert::Infallible;
//! use tower::{Service, ServiceExt, service_fn};
//! use tower_layer::Layer;
//! use tower_sentinel::{Outcome, Report, SentinelLayer, panic_hook};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() {
//! panic_hook::install();
//!
//! let policy = service_fn(|report: Report<_, (), Infallible>| async move {
//!     let Outcome::Panicked(panic) = report.outcome else { panic!("{report:?}") };
//!     Ok::<_, Infallible>(panic.location().map(|location| location.line()))
//! });
//! let line = line!() + 1;
//! let job = service_fn(|_: std::sync::Arc<u64>| async { panic!("a poison message") });
//! let mut sentinel = SentinelLayer::new(policy).layer(job);
//! assert_eq!(sentinel.ready().await.unwrap().call(7.into()).await.unwrap(), Some(line));
//! # }
//! ```
//!
//! The hook also distinguishes two panics in one poll. If a job catches a panic during which a guard asks for
//! its [stop](crate::cancel::Cancellation::cancel), and then panics again in the same poll, its outcome is
//! `Cancelled` with the hook, and `Panicked` without it.
//!
//! # Limits
//!
//! The hook runs on the thread that panics, and leaves its record on that thread for the sentinel. So
//! there is no location
//!
//! - for a panic of a child task that the job resumes with
//!   [`JoinError::into_panic`](tokio::task::JoinError::into_panic);
//! - for a panic in the destructor of a job that is aborted;
//! - if a hook that was installed later does not call this one;
//! - if the job or one of its destructors catches a panic, and then raises another one with
//!   [`resume_unwind`](std::panic::resume_unwind), which calls no hook.

use std::{
    any::Any,
    backtrace::Backtrace,
    cell::RefCell,
    fmt,
    panic::{self, PanicHookInfo},
    sync::{
        Once,
        atomic::{AtomicBool, Ordering},
    },
};

/// Installs the hook in front of the present one.
///
/// A second call does nothing. The cost is one atomic load for each poll of a job, and some work for each
/// panic.
///
/// # Panics
///
/// Panics if the current thread is panicking.
pub fn install() {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        let next = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            leave(Raised::of(info));
            next(info);
        }));
        INSTALLED.store(true, Ordering::Relaxed);
    });
}

/// Installs the hook, and makes it capture a backtrace for each panic, regardless of `RUST_BACKTRACE`.
///
/// Walking the stack takes microseconds. The symbols are looked up when the backtrace is printed.
///
/// # Panics
///
/// Panics if the current thread is panicking.
pub fn install_with_backtraces() {
    install();
    BACKTRACES.store(true, Ordering::Relaxed);
}

static INSTALLED: AtomicBool = AtomicBool::new(false);
static BACKTRACES: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// The last panic of this thread that nobody has taken yet.
    static LAST: RefCell<Option<Raised>> = const { RefCell::new(None) };
}

/// The place in the source where a panic was raised.
///
/// An owned [`std::panic::Location`], since that one lives only as long as the panic hook runs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Location {
    file: Box<str>,
    line: u32,
    column: u32,
}

impl Location {
    /// Returns the path of the source file, as it was passed to the compiler.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// Returns the line, counted from 1.
    pub fn line(&self) -> u32 {
        self.line
    }

    /// Returns the column, counted from 1.
    pub fn column(&self) -> u32 {
        self.column
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file, self.line, self.column)
    }
}

/// The hook's record of a panic.
pub(crate) struct Raised {
    pub(crate) location: Location,
    pub(crate) backtrace: Option<Backtrace>,
    /// `true` if a destructor asked for the stop of its job while this panic unwound.
    pub(crate) has_asked: bool,
    /// Distinguishes this panic from another one that called no hook.
    message: Option<Box<str>>,
}

impl Raised {
    fn of(info: &PanicHookInfo<'_>) -> Option<Self> {
        let location = info.location()?;
        Some(Self {
            location: Location {
                file: location.file().into(),
                line: location.line(),
                column: location.column(),
            },
            backtrace: BACKTRACES
                .load(Ordering::Relaxed)
                .then(Backtrace::force_capture),
            has_asked: false,
            message: message(info.payload()).map(Into::into),
        })
    }
}

/// Returns the message of a panic, if its payload is a `&'static str` or a `String`.
pub(crate) fn message(payload: &(dyn Any + Send)) -> Option<&str> {
    let literal = payload.downcast_ref::<&'static str>();
    let string = || payload.downcast_ref::<String>().map(String::as_str);
    literal.copied().or_else(string)
}

/// Leaves `origin` for the code that catches the panic, and returns the previous record if nobody took it.
fn leave(origin: Option<Raised>) -> Option<Raised> {
    // Fails in a thread that is about to end.
    LAST.try_with(|last| last.replace(origin)).ok().flatten()
}

/// Forgets the last panic of this thread.
fn forget() {
    drop(leave(None));
}

/// Records that a destructor asked for the stop of its job while the last panic of this thread unwinds.
pub(crate) fn ask() {
    let _ended = LAST.try_with(|last| {
        if let Some(origin) = &mut *last.borrow_mut() {
            origin.has_asked = true;
        }
    });
}

/// Returns whether a destructor did so during the last panic of this thread, if the hook saw that panic.
pub(crate) fn has_asked() -> Option<bool> {
    let asked = LAST.try_with(|last| Some(last.borrow().as_ref()?.has_asked));
    asked.ok().flatten()
}

/// A section of code whose panic will be caught.
pub(crate) struct Watch {
    installed: bool,
}

impl Watch {
    /// Begins the section, and forgets the panics before it.
    // On the path of each poll of a job.
    #[inline]
    pub(crate) fn begin() -> Self {
        let installed = INSTALLED.load(Ordering::Relaxed);
        if installed {
            forget();
        }
        Self { installed }
    }

    /// Returns the hook's record of the panic that was caught with `payload`.
    pub(crate) fn origin_of(self, payload: &(dyn Any + Send)) -> Option<Raised> {
        if !self.installed {
            return None;
        }
        leave(None).filter(|origin| origin.message.as_deref() == message(payload))
    }
}
