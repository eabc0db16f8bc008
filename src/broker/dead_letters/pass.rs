//! [`DeadLetters`] of a broker, and a [`Pass`] over them.

use std::{error::Error, future::Future};

use super::{filter::Filter, letter::DeadLetter};

/// Number of letters that a list takes at a time.
const BATCH: usize = 100;

/// Place where dead letters lie: a queue, a subject or a stream.
///
/// Each adapter implements it for its `DeadLetterQueue`. To use it, see [`list`](Self::list),
/// [`Redrive`](super::Redrive) and [`Purge`](super::Purge). An adapter of your own needs only the few operations of a
/// [`Pass`].
pub trait DeadLetters {
    /// Pass over these letters.
    type Pass: Pass;

    /// Begins a pass.
    ///
    /// # Errors
    ///
    /// If the place does not exist, may not be read, or the server does not respond.
    ///
    /// # Cancel safety
    ///
    /// Must be cancel safe.
    fn pass(&self) -> impl Future<Output = Result<Self::Pass, <Self::Pass as Pass>::Error>> + Send;

    /// Returns the first letters that match, at most `limit`, in the order of their arrival.
    ///
    /// The letters stay. Where a queue can't be browsed, as on RabbitMQ, they are taken and put back.
    ///
    /// # Errors
    ///
    /// If the place does not exist, may not be read, or the server does not respond.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: letters that were taken go back.
    fn list(
        &self,
        filter: &Filter,
        limit: usize,
    ) -> impl Future<Output = Result<Vec<DeadLetter>, <Self::Pass as Pass>::Error>> + Send
    where
        Self: Sync,
    {
        async move {
            let mut found = Vec::new();
            if limit == 0 {
                return Ok(found);
            }
            let mut pass = self.pass().await?;
            while found.len() < limit {
                let taken = pass.next(BATCH).await?;
                if taken.is_empty() {
                    break;
                }
                let letters = taken.iter().map(|taken| &taken.letter);
                let matching = letters.filter(|letter| filter.matches(letter));
                found.extend(matching.take(limit - found.len()).cloned());
                pass.put_back(taken).await?;
            }
            pass.close().await?;
            Ok(found)
        }
    }
}

/// Walk over the dead letters that are there when it begins.
///
/// # Contract
///
/// - [`next`](Self::next) returns each letter once, and none that came after the beginning of the pass. So a redrive to
///   a worker that still fails comes to an end.
/// - [`redrive`](Self::redrive) removes a letter only after the server has confirmed its copy.
/// - Each call of `next` waits until the removals before it have taken effect, and so does `close`. So at most the last
///   batch is there twice if the process is killed.
/// - If the pass, or a future of it, is dropped, the letters that were taken and not moved are dead letters as before.
pub trait Pass: Send {
    /// Handle to a letter, with which it is moved or deleted.
    type Key: Send;

    /// Error of the broker.
    type Error: Error + Send + Sync + 'static;

    /// Returns the number of letters at the beginning.
    fn total(&self) -> u64;

    /// Takes the next letters, at most `limit`; none at the end of the pass.
    fn next(
        &mut self,
        limit: usize,
    ) -> impl Future<Output = Result<Vec<Taken<Self::Key>>, Self::Error>> + Send;

    /// Moves letters, each to the [`destination`](DeadLetter::destination) of its description.
    ///
    /// A moved job has its payload, its properties and its own headers. It has no header of a dead letter, and
    /// [`x-redriven`](crate::broker::dead_letter::REDRIVEN) is [`redriven`](DeadLetter::redriven) plus one. Its
    /// deliveries are counted anew.
    fn redrive(
        &mut self,
        letters: Vec<Taken<Self::Key>>,
    ) -> impl Future<Output = Moved<Self::Error>> + Send;

    /// Deletes letters, and returns the number of those that were still there.
    fn delete(
        &mut self,
        letters: Vec<Taken<Self::Key>>,
    ) -> impl Future<Output = Result<u64, Self::Error>> + Send;

    /// Leaves letters where they were, at the latest when the pass is closed.
    fn put_back(
        &mut self,
        letters: Vec<Taken<Self::Key>>,
    ) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// Ends the pass, and waits until all of it has taken effect.
    fn close(self) -> impl Future<Output = Result<(), Self::Error>> + Send;
}

/// A dead letter that was taken in a [`Pass`].
#[derive(Clone, Debug)]
pub struct Taken<K> {
    /// Its description.
    pub letter: DeadLetter,
    /// Handle to it.
    pub key: K,
}

/// Result of a batch that is moved.
#[derive(Clone, Debug)]
pub struct Moved<E> {
    /// One for each letter, in their order.
    pub fates: Vec<Fate>,
    /// Error that ends the run, if there is one. The fates tell what was done nevertheless.
    pub error: Option<E>,
}

/// Result for one letter that is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Its copy is confirmed, and the letter is removed.
    Moved,
    /// It stays: its destination is not known or does not exist.
    Unroutable,
    /// Somebody else took it.
    Gone,
    /// It stays, or it is not known: the server did not confirm it.
    Unconfirmed,
}
