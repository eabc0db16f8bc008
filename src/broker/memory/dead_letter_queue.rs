//! [`DeadLetterQueue`], to move dead letters back and to delete them.

use std::{collections::VecDeque, convert::Infallible, fmt, sync::Arc};

use super::{
    death::Death,
    entry::Mark,
    properties::Properties,
    queue::Queue,
    state::{Declared, State},
    step::{Step, Wakers},
};
use crate::broker::{
    dead_letter::REDRIVEN,
    dead_letters::{DeadLetter, DeadLetters, Fate, Moved, Pass, Taken},
};

/// Dead letters of a queue in memory, as [`DeadLetters`].
///
/// Letters that a consumer holds when a run begins are left out.
pub struct DeadLetterQueue<P> {
    inner: Arc<Declared<P>>,
}

impl<P> DeadLetterQueue<P> {
    /// Creates it for the queue in which the dead letters lie.
    ///
    /// ```
    /// use tower_sentinel::broker::{
    ///     dead_letters::{Filter, Purge},
    ///     memory::{Broker, DeadLetterQueue},
    /// };
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let queue = Broker::new().queue("orders.dead").declare();
    /// queue.publish("a job that nobody wants");
    /// let tally = Purge::new(Filter::all()).run(&DeadLetterQueue::new(&queue)).await?;
    /// assert_eq!((tally.deleted, queue.counts().ready), (1, 0));
    /// # Ok(())
    /// # }
    /// ```
    pub fn new(queue: &Queue<P>) -> Self {
        let inner = Arc::clone(&queue.inner);
        Self { inner }
    }
}

impl<P> Clone for DeadLetterQueue<P> {
    fn clone(&self) -> Self {
        let inner = Arc::clone(&self.inner);
        Self { inner }
    }
}

impl<P> fmt::Debug for DeadLetterQueue<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeadLetterQueue")
            .field("name", &self.inner.config.name)
            .finish()
    }
}

impl<P: Send> DeadLetters for DeadLetterQueue<P> {
    type Pass = DeadLetterPass<P>;

    async fn pass(&self) -> Result<DeadLetterPass<P>, Infallible> {
        let Declared { server, index, .. } = &*self.inner;
        let state = server.lock();
        let letters: VecDeque<_> = state.queues[*index].jobs.waiting().collect();
        Ok(DeadLetterPass {
            inner: Arc::clone(&self.inner),
            total: letters.len() as u64,
            letters,
        })
    }
}

/// Pass over a [`DeadLetterQueue`].
pub struct DeadLetterPass<P> {
    inner: Arc<Declared<P>>,
    total: u64,
    /// Letters that are not taken yet.
    letters: VecDeque<Mark>,
}

/// Handle to a dead letter in memory.
#[derive(Clone, Copy, Debug)]
pub struct DeadLetterKey(Mark);

impl<P: Send> Pass for DeadLetterPass<P> {
    type Key = DeadLetterKey;
    type Error = Infallible;

    fn total(&self) -> u64 {
        self.total
    }

    async fn next(&mut self, limit: usize) -> Result<Vec<Taken<DeadLetterKey>>, Infallible> {
        let state = self.inner.server.lock();
        let jobs = &state.queues[self.inner.index].jobs;
        let mut taken = Vec::new();
        while taken.len() < limit {
            let Some(mark) = self.letters.pop_front() else {
                break;
            };
            if let Some((properties, death)) = jobs.find(mark) {
                let letter = describe(properties, death);
                let key = DeadLetterKey(mark);
                taken.push(Taken { letter, key });
            }
        }
        Ok(taken)
    }

    async fn redrive(&mut self, letters: Vec<Taken<DeadLetterKey>>) -> Moved<Infallible> {
        let Declared { server, index, .. } = &*self.inner;
        let fates = letters.into_iter().map(|taken| {
            let step = server.lock().redrive(*index, taken.key.0, &taken.letter);
            step.finish()
        });
        let fates = fates.collect();
        Moved { fates, error: None }
    }

    async fn delete(&mut self, letters: Vec<Taken<DeadLetterKey>>) -> Result<u64, Infallible> {
        let Declared { server, index, .. } = &*self.inner;
        let deleted = letters.into_iter().filter(|taken| {
            let step = server.lock().delete(*index, taken.key.0);
            step.finish()
        });
        Ok(deleted.count() as u64)
    }

    async fn put_back(&mut self, _: Vec<Taken<DeadLetterKey>>) -> Result<(), Infallible> {
        Ok(())
    }

    async fn close(self) -> Result<(), Infallible> {
        Ok(())
    }
}

impl<P> fmt::Debug for DeadLetterPass<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeadLetterPass")
            .field("name", &self.inner.config.name)
            .field("total", &self.total)
            .field("left", &self.letters.len())
            .finish()
    }
}

fn describe(properties: &Properties, death: Option<&Death>) -> DeadLetter {
    let mut letter = DeadLetter::new();
    letter.id = Some(properties.message_id.to_string());
    let redriven = properties.header(REDRIVEN);
    letter.redriven = redriven.and_then(|it| it.parse().ok()).unwrap_or(0);
    if let Some(death) = death {
        letter.kind = Some(death.reason.kind.as_str().to_owned());
        letter.message.clone_from(&death.reason.message);
        letter.time = Some(death.time);
        letter.deliveries = Some(death.deliveries);
        letter.destination = Some(death.queue.to_string());
    }
    letter
}

impl<P> State<P> {
    /// Moves a job that waits in the queue `from` to the destination of its letter.
    fn redrive(&mut self, from: usize, mark: Mark, letter: &DeadLetter) -> Step<Fate, P> {
        let destination = letter.destination.as_ref();
        let Some(to) = destination.and_then(|destination| self.find(destination)) else {
            return Step::new(Fate::Unroutable, Wakers::default());
        };
        let mut wakers = Wakers::default();
        let queue = &mut self.queues[from];
        let Some((payload, mut properties)) = queue.jobs.take_out(mark) else {
            return Step::new(Fate::Gone, wakers);
        };
        queue.wake_if_empty(&mut wakers);
        properties.set(REDRIVEN, letter.redriven.saturating_add(1).to_string());
        let queue = &mut self.queues[to];
        queue.jobs.push(payload, properties, None);
        queue.wake_all(&mut wakers);
        Step::new(Fate::Moved, wakers)
    }

    /// Deletes a job that waits, and returns whether it was there.
    fn delete(&mut self, queue: usize, mark: Mark) -> Step<bool, P> {
        let mut wakers = Wakers::default();
        let queue = &mut self.queues[queue];
        let taken = queue.jobs.take_out(mark);
        queue.wake_if_empty(&mut wakers);
        Step {
            output: taken.is_some(),
            wakers,
            garbage: taken.map(|(payload, _)| payload),
        }
    }
}
