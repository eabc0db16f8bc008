//! [`Watchdog`] of a session, which probes the broker.

use std::{
    mem,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    counts::{Standing, View},
    probe::{Probe, ProbeError, Probing},
    stall::{Stall, StallKind},
    watched::Watched,
};
use crate::{
    outcome::{Panic, catch, drop_quietly, guard},
    telemetry::metrics,
    time::Timer,
};

/// Settings of a watchdog.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    every: Duration,
    patience: Duration,
}

impl Timing {
    #[track_caller]
    pub(super) fn new(every: Duration, patience: Duration) -> Self {
        assert!(
            !every.is_zero(),
            "a watchdog that probes every 0 s would do nothing else"
        );
        assert!(
            patience >= every,
            "a watchdog with a patience of {patience:?} would give up before its second probe, after {every:?}"
        );
        Self { every, patience }
    }
}

/// Watchdog of one session. It acts only while a task of the session waits for jobs, or for its service.
pub(super) struct Watchdog {
    timing: Timing,
    watched: Arc<Watched>,
    step: Step,
    timer: Timer,
    suspicion: Option<Suspicion>,
    /// `true` once the present hindrance was logged.
    knows_hindrance: bool,
    /// `true` once it was logged that probes fail.
    knows_failure: bool,
}

enum Step {
    Rests,
    Probes {
        probing: Probing,
        begun: Begun,
    },
    /// The subscription has no probes.
    Off,
}

/// Begin of a probe.
#[derive(Clone, Copy)]
struct Begun {
    at: Instant,
    view: View,
}

/// First of several probes in a row with the same result, between which nothing has happened.
#[derive(Clone, Copy)]
struct Suspicion {
    kind: StallKind,
    begun: Begun,
}

impl Watchdog {
    pub(super) fn new(timing: Timing, watched: Arc<Watched>) -> Self {
        Self {
            timing,
            watched,
            step: Step::Rests,
            timer: Timer::after(timing.every),
            suspicion: None,
            knows_hindrance: false,
            knows_failure: false,
        }
    }

    /// Waits until the session is stalled; `probe` begins a probe of its subscription.
    ///
    /// The stall is counted and logged by then.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        probe: impl Fn() -> Option<Probing>,
    ) -> Poll<Stall> {
        loop {
            let stall = match &mut self.step {
                Step::Off => return Poll::Pending,
                Step::Rests => {
                    ready!(self.poll_timer(cx));
                    self.begin(&probe);
                    continue;
                }
                Step::Probes { probing, begun } => {
                    let begun = *begun;
                    match catch(|| probing.as_mut().poll(cx)) {
                        Ok(Poll::Pending) => {
                            ready!(self.poll_timer(cx));
                            self.silence(begun)
                        }
                        Ok(Poll::Ready(Ok(probe))) => self.judge(probe, begun),
                        Ok(Poll::Ready(Err(error))) => self.fail(Ok(error)),
                        Err(panic) => self.fail(Err(panic)),
                    }
                }
            };
            if let Some(stall) = stall {
                drop_quietly(mem::replace(&mut self.step, Step::Off));
                return Poll::Ready(stall);
            }
        }
    }

    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        // A session runs in a runtime with timers.
        self.timer.poll(cx).unwrap_or(Poll::Pending)
    }

    fn rest(&mut self, time: Duration) {
        self.timer = Timer::after(time);
        drop_quietly(mem::replace(&mut self.step, Step::Rests));
    }

    /// Begins a probe, unless the consumer is to be left alone.
    fn begin(&mut self, probe: impl Fn() -> Option<Probing>) {
        let view = self.watched.view();
        if view.standing == Standing::Other {
            self.suspicion = None;
            return self.rest(self.timing.every);
        }
        match catch(probe) {
            Ok(Some(probing)) => {
                let at = Instant::now();
                self.timer = Timer::after(self.timing.patience);
                let begun = Begun { at, view };
                self.step = Step::Probes { probing, begun };
            }
            Ok(None) => {
                self.step = Step::Off;
                guard(|| tracing::warn!("watchdog off: the subscription can't be probed"));
            }
            Err(panic) => {
                self.fail(Err(panic));
            }
        }
    }

    fn silence(&mut self, begun: Begun) -> Option<Stall> {
        self.suspicion = None;
        let view = self.watched.view();
        // A delivery is a sign of life, too.
        if view.standing == Standing::Other || view.turn.called != begun.view.turn.called {
            self.rest(self.timing.every);
            return None;
        }
        Some(self.stall(StallKind::Silent, Probe::new(), view))
    }

    fn fail(&mut self, reason: Result<ProbeError, Panic>) -> Option<Stall> {
        self.suspicion = None;
        self.rest(self.timing.every);
        if !mem::replace(&mut self.knows_failure, true) {
            guard(|| match &reason {
                Ok(error) => tracing::warn!(
                    error = format_args!("{error:#}"),
                    "probe failed: the watchdog sees only a broker that is silent"
                ),
                Err(panic) => tracing::error!(%panic, "subscription panicked in a probe"),
            });
        }
        drop_quietly(reason);
        None
    }

    fn judge(&mut self, probe: Probe, begun: Begun) -> Option<Stall> {
        let Timing { every, patience } = self.timing;
        self.knows_failure = false;
        let view = self.watched.view();
        let suspected = match view.turn == begun.view.turn {
            true => suspect(&probe, &view),
            false => None,
        };
        self.knows_hindrance &= suspected == Some(StallKind::Hindered);
        let Some(kind) = suspected else {
            self.suspicion = None;
            self.rest(every);
            return None;
        };
        let is_known = |it: &Suspicion| it.kind == kind && it.begun.view.turn == begun.view.turn;
        let suspicion = self.suspicion.filter(is_known);
        let suspicion = suspicion.unwrap_or(Suspicion { kind, begun });
        self.suspicion = Some(suspicion);
        let lasted = suspicion.begun.at.elapsed();
        if lasted < patience {
            self.rest(every.min(patience - lasted));
            return None;
        }
        if kind != StallKind::Hindered {
            return Some(self.stall(kind, probe, view));
        }
        self.rest(every);
        if !mem::replace(&mut self.knows_hindrance, true) {
            self.stall(kind, probe, view);
        }
        None
    }

    /// Counts a stall, and logs it.
    fn stall(&self, kind: StallKind, probe: Probe, view: View) -> Stall {
        let stall = Stall {
            kind,
            probe,
            running: view.running,
            free: view.free,
            last_delivery: view.last_delivery.map(|it| it.elapsed()),
            patience: self.timing.patience,
        };
        self.watched.note_stall();
        metrics::count_stall(kind.as_str());
        let Probe {
            waiting,
            unsettled,
            ref hindrance,
            ref details,
            ..
        } = stall.probe;
        let (running, free) = (stall.running, stall.free);
        let (last_delivery, patience) = (stall.last_delivery, stall.patience);
        let consequence = match kind {
            StallKind::Hindered => "consumer stalled, and the session goes on",
            _ => "consumer stalled: the session is given up",
        };
        guard(|| {
            tracing::warn!(
                kind = kind.as_str(),
                waiting,
                unsettled,
                running,
                free,
                ?last_delivery,
                ?patience,
                hindrance,
                ?details,
                "{consequence}"
            );
        });
        stall
    }
}

/// Returns what is wrong, if it lasts.
fn suspect(probe: &Probe, view: &View) -> Option<StallKind> {
    let is_waiting = probe.waiting > Some(0);
    let running = u64::try_from(view.running).unwrap_or(u64::MAX);
    match view.standing {
        Standing::Takes if is_waiting && probe.hindrance.is_some() => Some(StallKind::Hindered),
        Standing::Takes if is_waiting => Some(StallKind::Undelivered),
        Standing::Takes if !probe.has_leases && probe.unsettled > Some(running) => {
            Some(StallKind::Unsettled)
        }
        Standing::Unready if is_waiting => Some(StallKind::Unready),
        Standing::Takes | Standing::Unready | Standing::Other => None,
    }
}
