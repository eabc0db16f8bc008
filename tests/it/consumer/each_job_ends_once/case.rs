//! [`Case`], which is drawn at random.

use std::time::Duration;

use proptest::{collection::vec, option, prelude::*, sample::select};
use tower_sentinel::broker::memory::SettleFault;

use crate::{
    sentinel::foreign_code::{SITES, Site},
    support::raise,
};

#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) jobs: Vec<Work>,
    pub(super) rules: Rules,
    pub(super) patience: Patience,
    pub(super) workers: Vec<Worker>,
    /// In the order of time.
    pub(super) faults: Vec<(Duration, Fault)>,
    pub(super) lease: Option<Lease>,
    pub(super) has_intensity: bool,
    /// Place at which the subscriber of traces panics.
    pub(super) burst: Option<Site>,
    /// Time at which the whole process is killed.
    pub(super) killed: Option<Duration>,
}

/// A job, with its fate at each delivery; afterwards it completes.
#[derive(Clone, Debug)]
pub(super) struct Work {
    pub(super) published: Duration,
    pub(super) fates: Vec<Fate>,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Fate {
    Value(Duration),
    Error(Duration, Failed),
    PanicInCall,
    PanicFirst,
    PanicLater(Duration),
    /// Hangs, and panics when it is aborted.
    PanicInDrop,
    Hang,
    /// Hangs, and waits for its cancellation with a waker that panics.
    BadWaker,
    /// Hangs, and returns a value once it is cancelled.
    StopsWithValue,
}

/// The error of a job, which says how it wants to be given back.
#[derive(Clone, Copy, Debug)]
pub(super) enum Failed {
    Retry,
    Release,
    Reject,
    /// It panics when it is printed, and is given back as it comes.
    Unprintable,
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failed::Unprintable => raise("in the printer"),
            _ => f.write_str("failed"),
        }
    }
}

impl std::error::Error for Failed {}

/// The decision.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) delivery_limit: Option<u32>,
    pub(super) backoff: Option<Duration>,
    pub(super) is_panic_poison: bool,
}

/// The limits of the sentinel and of the policy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    pub(super) timeout: Duration,
    pub(super) grace: Duration,
    pub(super) settle_timeout: Duration,
    pub(super) try_timeout: Duration,
    pub(super) retry_budget: Duration,
    pub(super) is_detached_on_drop: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Worker {
    pub(super) prefetch: usize,
    /// Each has a part of the prefetch, rounded up.
    pub(super) tasks: usize,
    pub(super) reconnects: bool,
    pub(super) end: End,
    pub(super) drain_timeout: Duration,
    pub(super) stop_timeout: Duration,
    /// After which a middleware outside of the sentinel drops a call.
    pub(super) call_timeout: Option<Duration>,
    pub(super) goes_on: bool,
}

/// Cause of a worker's end.
#[derive(Clone, Copy, Debug)]
pub(super) enum End {
    /// The queue is empty.
    Done,
    Graceful(Duration),
    /// A second signal after the first.
    Forced(Duration, Duration),
    FutureDropped(Duration),
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    /// Of one worker.
    DropConnection(usize),
    DropConnections,
    RefuseConnections(u32),
    FailSettlements(u32, SettleFault),
    DelaySettlements(Duration),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Lease {
    pub(super) length: Duration,
    pub(super) is_kept_alive: bool,
}

fn ms(range: std::ops::Range<u64>) -> impl Strategy<Value = Duration> {
    range.prop_map(Duration::from_millis)
}

fn fate() -> impl Strategy<Value = Fate> {
    let failed = prop_oneof![
        Just(Failed::Retry),
        Just(Failed::Release),
        Just(Failed::Reject),
        Just(Failed::Unprintable)
    ];
    prop_oneof![
        3 => ms(0..40).prop_map(Fate::Value),
        3 => (ms(0..40), failed).prop_map(|(after, failed)| Fate::Error(after, failed)),
        1 => Just(Fate::PanicInCall),
        1 => Just(Fate::PanicFirst),
        1 => ms(0..40).prop_map(Fate::PanicLater),
        1 => Just(Fate::PanicInDrop),
        1 => Just(Fate::Hang),
        1 => Just(Fate::BadWaker),
        1 => Just(Fate::StopsWithValue),
    ]
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        2 => (0..3_usize).prop_map(Fault::DropConnection),
        1 => Just(Fault::DropConnections),
        1 => (1..4_u32).prop_map(Fault::RefuseConnections),
        2 => (1..6_u32).prop_map(|n| Fault::FailSettlements(n, SettleFault::Again)),
        2 => (1..4_u32).prop_map(|n| Fault::FailSettlements(n, SettleFault::Last)),
        2 => ms(0..120).prop_map(Fault::DelaySettlements),
    ]
}

fn worker() -> impl Strategy<Value = Worker> {
    let end = prop_oneof![
        4 => Just(End::Done),
        1 => ms(0..300).prop_map(End::Graceful),
        1 => (ms(0..300), ms(0..50)).prop_map(|(first, second)| End::Forced(first, second)),
        1 => ms(0..300).prop_map(End::FutureDropped),
    ];
    (
        (1..5_usize, prop_oneof![2 => Just(1_usize), 1 => 2..4_usize]),
        prop::bool::weighted(0.75),
        end,
        ms(0..100),
        prop_oneof![ms(0..20), ms(500..501)],
        option::weighted(0.2, ms(5..100)),
        any::<bool>(),
    )
        .prop_map(
            |(
                (prefetch, tasks),
                reconnects,
                end,
                drain_timeout,
                stop_timeout,
                call_timeout,
                goes_on,
            )| {
                Worker {
                    prefetch,
                    tasks,
                    reconnects,
                    end,
                    drain_timeout,
                    stop_timeout,
                    call_timeout,
                    goes_on,
                }
            },
        )
}

pub(super) fn case() -> impl Strategy<Value = Case> {
    let jobs = (
        prop_oneof![2 => ms(0..1), 1 => ms(0..200)],
        vec(fate(), 0..3),
    )
        .prop_map(|(published, fates)| Work { published, fates });
    let rules = (option::of(1..4_u32), option::of(ms(1..30)), any::<bool>()).prop_map(
        |(delivery_limit, backoff, is_panic_poison)| Rules {
            delivery_limit,
            backoff,
            is_panic_poison,
        },
    );
    let patience = (
        ms(20..100),
        ms(0..20),
        prop_oneof![ms(10..50), ms(400..401)],
        ms(10..60),
        ms(0..30),
        any::<bool>(),
    )
        .prop_map(
            |(timeout, grace, settle_timeout, try_timeout, retry_budget, is_detached_on_drop)| {
                Patience {
                    timeout,
                    grace,
                    settle_timeout,
                    try_timeout,
                    retry_budget,
                    is_detached_on_drop,
                }
            },
        );
    let lease = (ms(15..80), any::<bool>()).prop_map(|(length, is_kept_alive)| Lease {
        length,
        is_kept_alive,
    });
    (
        vec(jobs, 1..8),
        rules,
        patience,
        vec(worker(), 1..4),
        vec((ms(0..250), fault()), 0..6),
        option::weighted(0.25, lease),
        prop::bool::weighted(0.25),
        option::weighted(0.2, select(&SITES[..4])),
        option::weighted(0.1, ms(0..250)),
    )
        .prop_map(
            |(jobs, rules, patience, workers, mut faults, lease, has_intensity, burst, killed)| {
                faults.sort_by_key(|(at, _)| *at);
                Case {
                    jobs,
                    rules,
                    patience,
                    workers,
                    faults,
                    lease,
                    has_intensity,
                    burst,
                    killed,
                }
            },
        )
}
