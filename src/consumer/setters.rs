//! Setters that each kind of consumer has.

macro_rules! setters {
    () => {
        /// Sets the name of the consumer, by which two consumers in one process can be told apart; none by
        /// default.
        ///
        /// - *Events* are in a span `consumer`, of level `INFO`, with the field `consumer.name`. These are
        ///   the events of the consumer, of its subscription and of its jobs.
        /// - *Spans*: each [`process`](crate::settle::ProcessSpan) span has the field `consumer.name`. It is
        ///   no child of the span `consumer`, since that would make one trace of all jobs. It is a child of
        ///   the span in which the consumer is awaited, if there is one. Other spans are children of the span
        ///   `consumer`. So if you export traces without
        ///   [`process_span`](crate::SentinelLayer::process_span), filter out the target
        ///   `tower_sentinel::telemetry::consumer_name`.
        /// - *Metrics* of the feature `metrics` have the label `consumer.name`. Clones of one sentinel have
        ///   the name of the first consumer that called one of them.
        ///
        /// The name should have few values: use the name of a queue, and not a number that is drawn at the
        /// start.
        ///
        /// ```
        /// # use tower_sentinel::{Consumer, broker::memory::Broker};
        /// # let queue = Broker::<u32>::new().queue("orders").declare();
        /// # let deliveries = queue.subscribe(1).unwrap();
        /// # let service = tower::service_fn(|_| async { Ok::<_, std::convert::Infallible>(()) });
        /// let consumer = Consumer::new(deliveries, service).name("orders");
        /// # drop(consumer);
        /// ```
        pub fn name(mut self, name: impl Into<std::sync::Arc<str>>) -> Self {
            self.name = Some(name.into());
            self
        }

        /// Returns a handle to see the consumer's state from outside, and to operate it.
        pub fn watch(&self) -> crate::consumer::Watch {
            let watched = self.options.watched.get_or_init(Default::default);
            crate::consumer::Watch::new(std::sync::Arc::clone(watched))
        }

        /// Drains and returns once `signal` resolves.
        ///
        /// A signal that panics counts as given.
        pub fn with_graceful_shutdown<G>(mut self, signal: G) -> Self
        where
            G: std::future::Future<Output = ()> + Send + 'static,
        {
            self.signals.graceful = Some(Box::pin(signal));
            self
        }

        /// Cuts the drain short once `signal` resolves: the second signal.
        ///
        /// It is not polled before a shutdown is in progress, by [the first
        /// signal](Self::with_graceful_shutdown) or because the consumer's future was dropped. So both may be
        /// `async { ctrl_c().await.unwrap() }`: the first key press drains, the second stops.
        pub fn with_forced_shutdown<G>(mut self, signal: G) -> Self
        where
            G: std::future::Future<Output = ()> + Send + 'static,
        {
            self.signals.forced = Some(Box::pin(signal));
            self
        }

        /// Sets the time that running calls have to finish once the consumer, or one of its sessions, ends;
        /// 30 s by default.
        ///
        /// It is one limit for all of them. `Duration::MAX` is no limit.
        pub fn drain_timeout(mut self, limit: std::time::Duration) -> Self {
            self.options.drain_timeout = limit;
            self
        }

        /// Sets the time limit for jobs that were told to stop to be settled; 40 s by default.
        ///
        /// It should be longer than the sentinel's [`grace`](crate::SentinelLayer::grace),
        /// [`stop_wait`](crate::SentinelLayer::stop_wait) and
        /// [`settle_timeout`](crate::SentinelLayer::settle_timeout) together, which are 35 s by
        /// default.
        pub fn stop_timeout(mut self, limit: std::time::Duration) -> Self {
            self.options.stop_timeout = limit;
            self
        }

        /// Sets the reaction to an error that concerns [only one call](crate::consumer::Escalation::Call);
        /// [`AfterError::Stop`](crate::consumer::AfterError::Stop) by default.
        pub fn on_error(mut self, after_error: crate::consumer::AfterError) -> Self {
            self.options.after_error = after_error;
            self
        }
    };
}

pub(super) use setters;
