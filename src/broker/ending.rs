//! [`Ending`]: the last item of a stream of deliveries.

/// End of a stream, whose error is its last item.
#[derive(Clone, Debug)]
pub(super) struct Ending<E> {
    result: Result<(), E>,
    is_told: bool,
}

impl<E: Clone> Ending<E> {
    pub(super) fn new(result: Result<(), E>) -> Self {
        let is_told = false;
        Self { result, is_told }
    }

    /// Returns the result of the stream.
    pub(super) fn result(&self) -> Result<(), E> {
        self.result.clone()
    }

    /// Returns the next item of the stream: the error, and then `None`.
    pub(super) fn next<T>(&mut self) -> Option<Result<T, E>> {
        if std::mem::replace(&mut self.is_told, true) {
            return None;
        }
        self.result().err().map(Err)
    }
}

#[cfg(test)]
mod tests {
    use super::Ending;

    #[test]
    fn an_error_is_the_last_item_and_stays_the_result() {
        let mut ending = Ending::new(Err("lost"));
        assert_eq!(ending.result(), Err("lost"));
        assert_eq!(ending.next::<u8>(), Some(Err("lost")));
        assert_eq!(ending.next::<u8>(), None);
        assert_eq!(ending.result(), Err("lost"));
    }

    #[test]
    fn an_end_without_an_error_has_no_item() {
        let mut ending = Ending::<&str>::new(Ok(()));
        assert_eq!(ending.next::<u8>(), None);
        assert_eq!(ending.result(), Ok(()));
    }
}
