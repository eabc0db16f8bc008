//! [`Redrive`], which moves dead letters back.

use std::{collections::BTreeSet, ops::ControlFlow, time::Duration};

use tokio::time::{Instant, sleep_until};

use super::{
    counts::{Interrupted, Tally},
    filter::Filter,
    pass::{DeadLetters, Fate, Pass, Taken},
    walk::Walk,
};
use crate::outcome::guard;

/// Builder of a run that moves dead letters back to the place that they came from.
///
/// A letter is removed only after the server has confirmed its copy. If the process is killed, no job is lost, and at
/// most those of one batch are there twice; on Redis none is. A moved job begins with its first delivery, and its header
/// [`x-redriven`](crate::broker::dead_letter::REDRIVEN) counts the times.
///
/// A run ends even if each job that it moves fails again at once: it does not take letters that came after its
/// beginning. And a letter that was moved back [three times](Self::max_redrives) stays.
///
/// ```
/// use std::ops::ControlFlow;
/// use tower_sentinel::broker::{dead_letters::{Filter, Redrive}, memory::{Broker, DeadLetterQueue}};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let broker = Broker::<&str>::new();
/// let dead = DeadLetterQueue::new(&broker.queue("orders.dead").declare());
/// let redrive = Redrive::new(Filter::all().kind("panicked")).rate(100.0).limit(10_000);
///
/// let would = redrive.clone().dry_run().run(&dead).await?;
/// println!("{} of {} dead letters would be moved", would.moved, would.total);
///
/// let tally = redrive.run_with(&dead, |so_far| {
///     println!("{} moved", so_far.moved);
///     ControlFlow::Continue(()) // or `Break`, after Ctrl-C
/// });
/// println!("{} are left", tally.await?.left());
///
/// // What failed three times goes to a queue of another program, ten at a time.
/// let other = broker.queue("orders.repair").declare();
/// let redrive = Redrive::new(Filter::all()).max_redrives(None).destination(other.name()).batch(10);
/// println!("{} moved", redrive.run(&dead).await?.moved);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "nothing is moved before `run`"]
pub struct Redrive {
    walk: Walk,
    rate: Option<f64>,
    max_redrives: Option<u32>,
    destination: Option<String>,
}

impl Redrive {
    /// Creates the run for the letters that match.
    pub fn new(filter: Filter) -> Self {
        Self {
            walk: Walk::new(filter),
            rate: None,
            max_redrives: Some(3),
            destination: None,
        }
    }

    /// Sets the greatest number of letters that are moved per second; by default there is none.
    ///
    /// Batches are smaller then, so that the jobs come evenly: about two batches per second.
    ///
    /// # Panics
    ///
    /// Panics unless it is a number above 0.
    #[track_caller]
    pub fn rate(mut self, per_second: f64) -> Self {
        let is_rate = per_second.is_finite() && per_second > 0.0;
        assert!(is_rate, "a rate is a number above 0");
        self.rate = Some(per_second);
        self
    }

    /// Sets the number of letters that are taken and moved at a time; 100 by default.
    ///
    /// If the process is killed, at most so many jobs are there twice.
    ///
    /// # Panics
    ///
    /// Panics if it is 0: nothing would ever be taken.
    #[track_caller]
    pub fn batch(mut self, letters: usize) -> Self {
        assert!(letters > 0, "a batch of 0 letters");
        self.walk.batch = letters;
        self
    }

    /// Sets the greatest number of letters that are moved; by default there is none.
    pub fn limit(mut self, letters: u64) -> Self {
        self.walk.limit = letters;
        self
    }

    /// Moves nothing, and only counts. Destinations are not looked for.
    pub fn dry_run(mut self) -> Self {
        self.walk.is_dry = true;
        self
    }

    /// Sets the number of times that a letter may be moved back; 3 by default, and `None` for no limit.
    ///
    /// A letter that was moved so often stays, and counts as [refused](Tally::refused).
    pub fn max_redrives(mut self, times: impl Into<Option<u32>>) -> Self {
        self.max_redrives = times.into();
        self
    }

    /// Sets the queue, the subject or the stream that all letters are moved to; by default each goes back to the place
    /// that it came from.
    ///
    /// Dead letters that were not written by this crate don't tell that place, except RabbitMQ's own.
    pub fn destination(mut self, destination: impl Into<String>) -> Self {
        self.destination = Some(destination.into());
        self
    }

    /// Runs to the end.
    ///
    /// # Errors
    ///
    /// [`Interrupted`], with the numbers so far.
    ///
    /// # Panics
    ///
    /// With a [rate](Self::rate), panics outside of a tokio runtime with a timer.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe in that no job is lost; as after a kill, those of one batch may be there twice.
    pub async fn run<D: DeadLetters>(
        &self,
        dead_letters: &D,
    ) -> Result<Tally, Interrupted<<D::Pass as Pass>::Error>> {
        self.run_with(dead_letters, |_| ControlFlow::Continue(()))
            .await
    }

    /// Runs to the end, or until `progress` breaks it off. It is called after each batch.
    ///
    /// # Errors
    ///
    /// [`Interrupted`], with the numbers so far.
    ///
    /// # Panics
    ///
    /// With a [rate](Self::rate), panics outside of a tokio runtime with a timer. A panic of `progress` is passed on; no
    /// letter is lost by it.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe in that no job is lost; as after a kill, those of one batch may be there twice.
    pub async fn run_with<D: DeadLetters>(
        &self,
        dead_letters: &D,
        mut progress: impl FnMut(&Tally) -> ControlFlow<()>,
    ) -> Result<Tally, Interrupted<<D::Pass as Pass>::Error>> {
        let mut tally = Tally::default();
        let run = async {
            let mut pass = dead_letters.pass().await?;
            tally.total = pass.total();
            let start = Instant::now();
            let mut unroutable = BTreeSet::new();
            while let Some(taken) = self.walk.next(&mut pass, self.most(), tally.moved).await? {
                let (chosen, others) = self.choose(taken, &mut tally);
                pass.put_back(others).await?;
                if self.walk.is_dry {
                    tally.moved += chosen.len() as u64;
                    pass.put_back(chosen).await?;
                } else if !chosen.is_empty() {
                    let places = chosen.iter().map(|taken| taken.letter.destination.clone());
                    let places: Vec<_> = places.collect();
                    let moved = pass.redrive(chosen).await;
                    for (fate, place) in moved.fates.into_iter().zip(places) {
                        match fate {
                            Fate::Moved => tally.moved += 1,
                            Fate::Gone => tally.gone += 1,
                            Fate::Unconfirmed => {}
                            Fate::Unroutable => {
                                tally.unroutable += 1;
                                if unroutable.insert(place.clone()) {
                                    warn(place.as_deref());
                                }
                            }
                        }
                    }
                    if let Some(error) = moved.error {
                        return Err(error);
                    }
                }
                if progress(&tally).is_break() {
                    break;
                }
                if let Some(due) = self.due(tally.moved) {
                    sleep_until(start + due).await;
                }
            }
            pass.close().await
        };
        match run.await {
            Ok(()) => Ok(tally),
            Err(error) => Err(Interrupted { tally, error }),
        }
    }

    /// Returns those that are to be moved, with their destination, and the others.
    fn choose<K>(&self, taken: Vec<Taken<K>>, tally: &mut Tally) -> (Vec<Taken<K>>, Vec<Taken<K>>) {
        let (mut chosen, mut others) = (Vec::new(), Vec::new());
        for mut taken in taken {
            tally.seen += 1;
            let times = taken.letter.redriven;
            if !self.walk.filter.matches(&taken.letter) {
                tally.skipped += 1;
                others.push(taken);
            } else if self.max_redrives.is_some_and(|most| times >= most) {
                tally.refused += 1;
                others.push(taken);
            } else {
                if let Some(destination) = &self.destination {
                    taken.letter.destination = Some(destination.clone());
                }
                chosen.push(taken);
            }
        }
        (chosen, others)
    }

    /// Returns the greatest size of a batch at this rate.
    fn most(&self) -> usize {
        // A float that is too large becomes the greatest number.
        self.rate
            .map_or(usize::MAX, |rate| ((rate / 2.0).ceil() as usize).max(1))
    }

    /// Returns the time after the beginning at which so many letters may be moved.
    fn due(&self, moved: u64) -> Option<Duration> {
        let rate = self.rate.filter(|_| !self.walk.is_dry)?;
        // A pause that no clock can measure is one for ever.
        let far = Duration::from_secs(86_400 * 365 * 30);
        let due = Duration::try_from_secs_f64(moved as f64 / rate).unwrap_or(far);
        Some(due.min(far))
    }
}

/// Warns of a destination that does not exist.
fn warn(destination: Option<&str>) {
    guard(|| match destination {
        Some(destination) => tracing::warn!(
            destination,
            "dead letters not moved: their destination does not exist; create it, or name another"
        ),
        None => tracing::warn!(
            "dead letters not moved: they don't tell where they came from; name a destination"
        ),
    });
}
