//! Setters that each kind of consumer has.

/// For a type that has its options, signals and name itself, or in the given field.
macro_rules! setters {
    ($($field:ident)?) => {
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
            self$(.$field)?.name = Some(name.into());
            self
        }

        /// Returns a handle to see the consumer's state from outside, and to operate it.
        pub fn watch(&self) -> crate::consumer::Watch {
            let watched = self$(.$field)?.options.watched.get_or_init(Default::default);
            crate::consumer::Watch::new(std::sync::Arc::clone(watched))
        }

        /// Probes the broker `every` so often, and gives up a session that makes no progress for `patience`; off by
        /// default.
        ///
        /// A half-open connection, a broker that hangs, an ack that was lost on its way, a service that does not
        /// become ready: none of it is an error, and all of it looks idle. So the watchdog [asks the
        /// broker](crate::consumer::Subscription::probe). The consumer is [stalled](crate::consumer::StallKind) if
        ///
        /// - the broker does not respond to a probe for `patience`;
        /// - or in each probe for `patience` jobs wait at the broker and places are free, and none was delivered;
        /// - or in each probe for `patience` the broker counts more unsettled jobs than run, and none was delivered;
        /// - or in each probe for `patience` jobs wait at the broker, none runs, and the service is not ready.
        ///
        /// It is seen within `patience` and twice `every`. Then there is an event "consumer stalled" at WARN with all
        /// numbers, the metric `tower_sentinel.consumer.stalled`, and a count in
        /// [`Progress::stalls`](crate::consumer::Progress::stalls), and the session is given up. A
        /// [`ReconnectingConsumer`](crate::consumer::ReconnectingConsumer) begins the next one after its usual pause,
        /// and the former one drains beside it. A [`Consumer`](crate::Consumer) ends with
        /// [`EndCause::Stalled`](crate::consumer::EndCause::Stalled). If the broker names a reason that a new session
        /// would not mend, such as a full `max_ack_pending`, there are only the event, the metric and the count, and
        /// the session goes on.
        ///
        /// It leaves a consumer alone whose places are all taken, which an operator or an
        /// [`IntensityLayer`](crate::IntensityLayer) pauses, which drains, or for which no job waits. It does not see
        /// a lost ack on RabbitMQ before the places that it holds are missed, since AMQP does not report who holds how
        /// many.
        ///
        /// `patience` should be longer than a failover of the broker, and than a rate limit of the service may last.
        /// 10 s and 60 s are a good start. Don't set it for a standby that waits for others, such as a second consumer
        /// of a queue with a single active consumer: jobs wait, and it gets none.
        ///
        /// # Panics
        ///
        /// Panics if `every` is zero, or longer than `patience`.
        ///
        /// # Examples
        ///
        /// ```
        /// use std::{convert::Infallible, time::Duration};
        /// use tower::{ServiceBuilder, service_fn};
        /// use tower_sentinel::{
        ///     Consumer, SentinelLayer, SettlePolicy, ack_on_success,
        ///     broker::memory::{Broker, Delivery},
        ///     consumer::{EndCause, StallKind},
        /// };
        ///
        /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
        /// # async fn main() {
        /// let queue = Broker::new().queue("orders").declare();
        /// queue.publish(7);
        ///
        /// // By mistake it is never ready.
        /// let handler = ServiceBuilder::new()
        ///     .concurrency_limit(0)
        ///     .service(service_fn(|_: Delivery<u32>| async { Ok::<_, Infallible>(()) }));
        /// let error = Consumer::new(queue.subscribe(64).unwrap(), handler)
        ///     .sentinel(SentinelLayer::new(SettlePolicy::new(ack_on_success())))
        ///     .watchdog(Duration::from_secs(10), Duration::from_secs(60))
        ///     .await
        ///     .unwrap_err();
        /// let EndCause::Stalled(stall) = error.cause() else { panic!() };
        /// assert_eq!((stall.kind, stall.probe.waiting), (StallKind::Unready, Some(1)));
        /// # }
        /// ```
        #[track_caller]
        pub fn watchdog(
            mut self,
            every: std::time::Duration,
            patience: std::time::Duration,
        ) -> Self {
            let timing = crate::consumer::watchdog::Timing::new(every, patience);
            self$(.$field)?.options.watchdog = Some(timing);
            self$(.$field)?.options.watched.get_or_init(Default::default);
            self
        }

        /// Drains and returns once `signal` resolves.
        ///
        /// A signal that panics counts as given.
        pub fn with_graceful_shutdown<G>(mut self, signal: G) -> Self
        where
            G: std::future::Future<Output = ()> + Send + 'static,
        {
            self$(.$field)?.signals.graceful = Some(Box::pin(signal));
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
            self$(.$field)?.signals.forced = Some(Box::pin(signal));
            self
        }

        /// Sets the time that running calls have to finish once the consumer, or one of its sessions, ends;
        /// 30 s by default.
        ///
        /// It is one limit for all of them. `Duration::MAX` is no limit.
        pub fn drain_timeout(mut self, limit: std::time::Duration) -> Self {
            self$(.$field)?.options.drain_timeout = limit;
            self
        }

        /// Sets the time limit for jobs that were told to stop to be settled; 40 s by default.
        ///
        /// It should be longer than the sentinel's [`grace`](crate::SentinelLayer::grace),
        /// [`stop_wait`](crate::SentinelLayer::stop_wait) and
        /// [`settle_timeout`](crate::SentinelLayer::settle_timeout) together, which are 35 s by
        /// default.
        pub fn stop_timeout(mut self, limit: std::time::Duration) -> Self {
            self$(.$field)?.options.stop_timeout = limit;
            self
        }

        /// Sets the reaction to an error that concerns [only one call](crate::consumer::Escalation::Call);
        /// [`AfterError::Stop`](crate::consumer::AfterError::Stop) by default.
        pub fn on_error(mut self, after_error: crate::consumer::AfterError) -> Self {
            self$(.$field)?.options.after_error = after_error;
            self
        }
    };
}

pub(super) use setters;
