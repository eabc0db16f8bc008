//! [`Purge`], which deletes dead letters.

use std::ops::ControlFlow;

use super::{
    counts::{Interrupted, Tally},
    filter::Filter,
    pass::{DeadLetters, Pass},
    walk::Walk,
};

/// Builder of a run that deletes dead letters for good.
///
/// ```
/// use std::{ops::ControlFlow, time::Duration};
/// use tower_sentinel::broker::{dead_letters::{Filter, Purge}, memory::{Broker, DeadLetterQueue}};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let broker = Broker::<&str>::new();
/// let dead = DeadLetterQueue::new(&broker.queue("orders.dead").declare());
/// let month = Duration::from_secs(30 * 86_400);
/// let purge = Purge::new(Filter::all().older_than(month)).batch(100).limit(10_000);
/// println!("{} would be deleted", purge.clone().dry_run().run(&dead).await?.deleted);
///
/// let tally = purge.run_with(&dead, |so_far| {
///     println!("{} deleted", so_far.deleted);
///     ControlFlow::Continue(()) // or `Break`, after Ctrl-C
/// });
/// println!("{} are left", tally.await?.left());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "nothing is deleted before `run`"]
pub struct Purge {
    walk: Walk,
}

impl Purge {
    /// Creates the run for the letters that match; with [`Filter::all`] each letter that is there is deleted.
    pub fn new(filter: Filter) -> Self {
        let walk = Walk::new(filter);
        Self { walk }
    }

    /// Sets the number of letters that are taken at a time; 100 by default.
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

    /// Sets the greatest number of letters that are deleted; by default there is none.
    pub fn limit(mut self, letters: u64) -> Self {
        self.walk.limit = letters;
        self
    }

    /// Deletes nothing, and only counts.
    pub fn dry_run(mut self) -> Self {
        self.walk.is_dry = true;
        self
    }

    /// Runs to the end.
    ///
    /// # Errors
    ///
    /// [`Interrupted`], with the numbers so far.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the letters that are not deleted yet stay.
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
    /// A panic of `progress` is passed on. No letter is lost by it.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the letters that are not deleted yet stay.
    pub async fn run_with<D: DeadLetters>(
        &self,
        dead_letters: &D,
        mut progress: impl FnMut(&Tally) -> ControlFlow<()>,
    ) -> Result<Tally, Interrupted<<D::Pass as Pass>::Error>> {
        let mut tally = Tally::default();
        let run = async {
            let mut pass = dead_letters.pass().await?;
            tally.total = pass.total();
            while let Some(taken) = self.walk.next(&mut pass, usize::MAX, tally.deleted).await? {
                tally.seen += taken.len() as u64;
                let (matching, others): (Vec<_>, Vec<_>) = taken
                    .into_iter()
                    .partition(|taken| self.walk.filter.matches(&taken.letter));
                tally.skipped += others.len() as u64;
                pass.put_back(others).await?;
                let number = matching.len() as u64;
                let deleted = match self.walk.is_dry {
                    true => {
                        pass.put_back(matching).await?;
                        number
                    }
                    false => pass.delete(matching).await?,
                };
                tally.deleted += deleted;
                tally.gone += number.saturating_sub(deleted);
                if progress(&tally).is_break() {
                    break;
                }
            }
            pass.close().await
        };
        match run.await {
            Ok(()) => Ok(tally),
            Err(error) => Err(Interrupted { tally, error }),
        }
    }
}
