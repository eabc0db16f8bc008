//! Side of a sentinel on which a middleware belongs: each row of the table in the crate docs, as the
//! difference that can be observed.

use std::{
    convert::Infallible,
    future::{self, Future, IntoFuture, Ready, ready},
    io,
    pin::pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::time::sleep;
use tower::{
    BoxError, Service, ServiceBuilder, ServiceExt, buffer::BufferLayer, filter::FilterLayer,
    retry::Policy as RetryPolicy, service_fn, timeout::error::Elapsed,
};
use tower_sentinel::{
    Consumer, DecisionExt, DecodeLayer, IntensityLayer, KeepAliveLayer, Outcome, Report,
    SentinelError, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::memory::{Broker, Delivery, SettleFault},
    consumer::{AfterError, Escalation},
    decode::{DecodeError, Decoded},
    outcome::OutcomeKind,
    sentinel::OnDrop,
    settle::Lease,
};

use crate::support::{Count, raise, tag::Tag};

type Id = Arc<u64>;

/// Reports of the policy, in order: the job and the name of its outcome.
type Told = Arc<Mutex<Vec<(u64, String)>>>;

fn telling<E: Send + 'static>(
    told: &Told,
) -> impl Service<Report<Id, (), E>, Response = OutcomeKind, Error = Infallible, Future: Send + 'static>
+ Clone
+ Send
+ 'static
+ use<E> {
    let told = Arc::clone(told);
    service_fn(move |report: Report<Id, (), E>| {
        let kind = report.outcome.kind();
        let name = match &report.outcome {
            Outcome::Cancelled(cancelled) => cancelled.reason().as_str(),
            _ => kind.as_str(),
        };
        told.lock().unwrap().push((*report.tag, name.to_owned()));
        ready(Ok::<_, Infallible>(kind))
    })
}

fn told(told: &Told) -> Vec<(u64, String)> {
    told.lock().unwrap().clone()
}

fn answers<const N: usize>(expected: [(u64, &str); N]) -> Vec<(u64, String)> {
    expected.map(|(id, name)| (id, name.to_owned())).to_vec()
}

/// Takes a minute.
async fn slow(_: Id) -> Result<(), io::Error> {
    sleep(Duration::from_secs(60)).await;
    Ok(())
}

async fn refuse(_: Id) -> Result<(), io::Error> {
    Err(io::Error::other("no"))
}

const HOUR: Duration = Duration::from_secs(60 * 60);

async fn call<S: Service<J>, J>(service: &mut S, job: J) -> Result<S::Response, S::Error> {
    service.ready().await?.call(job).await
}

/// Returns whether `service` becomes ready within a second of virtual time.
async fn is_ready<S: Service<Id>>(service: &mut S) -> bool {
    tokio::time::timeout(Duration::from_secs(1), service.ready())
        .await
        .is_ok()
}

#[tokio::test(start_paused = true)]
async fn a_concurrency_limit_outside_counts_what_is_not_answered_and_inside_it_does_not() {
    // A policy that takes a minute to settle.
    let policy = service_fn(|_: Report<Id, (), io::Error>| async {
        sleep(Duration::from_secs(60)).await;
        Ok::<_, Infallible>(())
    });
    let at_once = service_fn(|_: Id| ready(Ok::<_, io::Error>(())));

    let mut outside = ServiceBuilder::new()
        .concurrency_limit(1)
        .layer(SentinelLayer::new(policy))
        .service(at_once);
    let _settling = tokio::spawn(outside.ready().await.unwrap().call(Id::new(1)));
    assert!(!is_ready(&mut outside).await);

    let mut inside = ServiceBuilder::new()
        .layer(SentinelLayer::new(policy))
        .concurrency_limit(1)
        .service(at_once);
    let _settling = tokio::spawn(inside.ready().await.unwrap().call(Id::new(1)));
    // The job is done and its permit free, though it is not settled: two are unsettled.
    assert!(is_ready(&mut inside).await);
}

#[tokio::test(start_paused = true)]
async fn a_timeout_outside_cancels_the_job_and_inside_fails_it() {
    let reports = Told::default();
    let mut outside = ServiceBuilder::new()
        .timeout(Duration::from_secs(1))
        .layer(SentinelLayer::new(telling(&reports)))
        .service_fn(slow);
    let error = call(&mut outside, Id::new(1)).await.unwrap_err();
    assert!(error.is::<Elapsed>());
    sleep(Duration::from_millis(1)).await;
    assert_eq!(told(&reports), answers([(1, "caller_dropped")]));

    let reports = Told::default();
    let mut inside = ServiceBuilder::new()
        .layer(SentinelLayer::new(telling(&reports)))
        .timeout(Duration::from_secs(1))
        .service_fn(slow);
    let kind = call(&mut inside, Id::new(2)).await.unwrap();
    assert_eq!(kind, OutcomeKind::Failed);
    assert_eq!(told(&reports), answers([(2, "failed")]));

    let reports = Told::default();
    let layer = SentinelLayer::new(telling(&reports)).timeout(Duration::from_secs(1));
    let mut own = ServiceBuilder::new().layer(layer).service_fn(slow);
    let kind = call(&mut own, Id::new(3)).await.unwrap();
    assert_eq!(kind, OutcomeKind::TimedOut);
}

#[tokio::test(start_paused = true)]
async fn a_timeout_outside_needs_on_unsettled_to_give_up_the_channel() {
    for gives_up in [false, true] {
        let broker = Broker::new();
        let queue = broker.queue("jobs").declare();
        let connection = broker.connect().unwrap();
        let jobs = connection.subscribe(&queue, 1).unwrap();
        queue.publish("slow");
        queue.fail_settlements(1, SettleFault::Last);
        let sentinel = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
        let sentinel = sentinel.on_unsettled(move |_: SentinelError<_, _>| {
            if gives_up {
                connection.drop_now();
            }
        });
        let service = ServiceBuilder::new()
            .layer(jobs.gate())
            .timeout(Duration::from_secs(1))
            .layer(sentinel)
            .service_fn(|_: Delivery<_>| future::pending::<Result<(), io::Error>>());
        // The consumer learns only of this error, and it comes before the settlement is tried.
        let escalation = |error: &BoxError| {
            assert!(error.is::<Elapsed>());
            Escalation::Call
        };
        let consumer = Consumer::new(jobs, service)
            .escalation(escalation)
            .on_error(AfterError::Continue);
        let mut consumer = pin!(consumer.into_future());
        let ended = tokio::time::timeout(HOUR, &mut consumer).await;
        let counts = queue.counts();
        match gives_up {
            // It goes on, and the job is held for as long.
            false => assert!(ended.is_err() && counts.unacked == 1, "{counts:?}"),
            true => assert!(
                matches!(ended, Ok(Err(_))) && counts.ready == 1,
                "{counts:?}"
            ),
        }
    }
}

/// Tries three times in all.
#[derive(Clone)]
struct Thrice(usize);

impl<J: Clone, T, E> RetryPolicy<J, T, E> for Thrice {
    type Future = Ready<()>;

    fn retry(&mut self, _: &mut J, result: &mut Result<T, E>) -> Option<Ready<()>> {
        if result.is_ok() || self.0 == 0 {
            return None;
        }
        self.0 -= 1;
        Some(ready(()))
    }

    fn clone_request(&mut self, job: &J) -> Option<J> {
        Some(job.clone())
    }
}

#[tokio::test(start_paused = true)]
async fn a_retry_inside_repeats_the_work_under_one_answer_and_outside_it_sees_no_failure() {
    let (reports, tries) = (Told::default(), Count::default());
    let counted = tries.clone();
    let failing = service_fn(move |job: Id| {
        counted.add();
        refuse(job)
    });
    let mut inside = ServiceBuilder::new()
        .layer(SentinelLayer::new(telling(&reports)))
        .retry(Thrice(2))
        .service(failing.clone());
    assert_eq!(
        call(&mut inside, Id::new(1)).await.unwrap(),
        OutcomeKind::Failed
    );
    assert_eq!(tries.get(), 3);
    assert_eq!(told(&reports), answers([(1, "failed")]));

    let (reports, before) = (Told::default(), tries.get());
    let mut outside = ServiceBuilder::new()
        .retry(Thrice(2))
        .layer(SentinelLayer::new(telling(&reports)))
        .service(failing);
    // The job failed and was settled: to the caller that is a success.
    assert_eq!(
        call(&mut outside, Id::new(2)).await.unwrap(),
        OutcomeKind::Failed
    );
    assert_eq!(tries.get() - before, 1);
    assert_eq!(told(&reports), answers([(2, "failed")]));
}

#[tokio::test(start_paused = true)]
async fn a_retry_outside_runs_a_job_again_whose_answer_failed_and_on_the_policy_it_does_not() {
    let runs = Count::default();
    let counted = runs.clone();
    let job = service_fn(move |_: Id| {
        counted.add();
        ready(Ok::<(), io::Error>(()))
    });
    let refusing = |acks: &Count| {
        let acks = acks.clone();
        move || {
            acks.add();
            ready(Err::<(), _>("the channel is closed"))
        }
    };

    let acks = Count::default();
    let ack = refusing(&acks);
    let policy = service_fn(move |_: Report<Id, (), io::Error>| ack());
    let mut outside = ServiceBuilder::new()
        .retry(Thrice(2))
        .layer(SentinelLayer::new(policy))
        .service(job.clone());
    call(&mut outside, Id::new(1)).await.unwrap_err();
    assert_eq!((runs.get(), acks.get()), (3, 3));

    let (acks, before) = (Count::default(), runs.get());
    let ack = refusing(&acks);
    let policy = ServiceBuilder::new()
        .map_request(Arc::new)
        .retry(Thrice(2))
        .service_fn(move |_: Arc<Report<Id, (), io::Error>>| ack());
    let mut around_the_policy = ServiceBuilder::new()
        .layer(SentinelLayer::new(policy))
        .service(job);
    call(&mut around_the_policy, Id::new(2)).await.unwrap_err();
    assert_eq!((runs.get() - before, acks.get()), (1, 3));
}

#[tokio::test(start_paused = true)]
async fn load_shed_outside_takes_jobs_that_nobody_answers_for_and_inside_fails_them() {
    let reports = Told::default();
    let mut outside = ServiceBuilder::new()
        .load_shed()
        .concurrency_limit(1)
        .layer(SentinelLayer::new(telling(&reports)))
        .service_fn(slow);
    let _running = tokio::spawn(outside.ready().await.unwrap().call(Id::new(1)));
    call(&mut outside, Id::new(2)).await.unwrap_err();
    assert_eq!(told(&reports), answers([]), "job 2 has no answer");

    let reports = Told::default();
    let mut inside = ServiceBuilder::new()
        .layer(SentinelLayer::new(telling(&reports)))
        .load_shed()
        .concurrency_limit(1)
        .service_fn(slow);
    let _running = tokio::spawn(inside.ready().await.unwrap().call(Id::new(1)));
    assert_eq!(
        call(&mut inside, Id::new(2)).await.unwrap(),
        OutcomeKind::Failed
    );
    assert_eq!(told(&reports), answers([(2, "failed")]));
}

#[tokio::test(start_paused = true)]
async fn jobs_wait_in_a_buffer_outside_without_a_limit_and_inside_under_it() {
    let waits = Duration::from_secs(40);
    let first_takes = move |id: Id| async move {
        if *id == 1 {
            sleep(waits).await;
        }
        Ok::<_, io::Error>(())
    };
    let reports = Told::default();
    let mut outside = ServiceBuilder::new()
        .layer(BufferLayer::new(8))
        .concurrency_limit(1)
        .layer(SentinelLayer::new(telling(&reports)).timeout(waits * 2))
        .service_fn(first_takes);
    let first = outside.ready().await.unwrap().call(Id::new(1));
    let second = outside.ready().await.unwrap().call(Id::new(2));
    // Dropped while it waits: the sentinel never saw it, so nobody settles it.
    drop(second);
    first.await.unwrap();
    sleep(Duration::from_secs(1)).await;
    assert_eq!(told(&reports), answers([(1, "completed")]));

    let reports = Told::default();
    let mut inside = ServiceBuilder::new()
        .layer(SentinelLayer::new(telling::<BoxError>(&reports)).timeout(waits / 2))
        .layer(BufferLayer::new(8))
        .concurrency_limit(1)
        .service_fn(first_takes);
    let first = tokio::spawn(inside.ready().await.unwrap().call(Id::new(1)));
    let second = tokio::spawn(inside.ready().await.unwrap().call(Id::new(2)));
    // Job 2 does nothing but wait in the buffer, and its limit passes there.
    assert_eq!(first.await.unwrap().unwrap(), OutcomeKind::TimedOut);
    assert_eq!(second.await.unwrap().unwrap(), OutcomeKind::TimedOut);
}

#[tokio::test(start_paused = true)]
async fn a_filter_outside_refuses_jobs_that_nobody_answers_for_and_inside_fails_them() {
    let odd_only = |id: Id| match *id % 2 {
        1 => Ok(id),
        _ => Err(BoxError::from("even")),
    };
    let reports = Told::default();
    let mut outside = ServiceBuilder::new()
        .layer(FilterLayer::new(odd_only))
        .layer(SentinelLayer::new(telling(&reports)))
        .service_fn(refuse);
    call(&mut outside, Id::new(2)).await.unwrap_err();
    assert_eq!(told(&reports), answers([]));

    let reports = Told::default();
    let mut inside = ServiceBuilder::new()
        .layer(SentinelLayer::new(telling(&reports)))
        .layer(FilterLayer::new(odd_only))
        .service_fn(refuse);
    assert_eq!(
        call(&mut inside, Id::new(2)).await.unwrap(),
        OutcomeKind::Failed
    );
    assert_eq!(told(&reports), answers([(2, "failed")]));
}

#[tokio::test(start_paused = true)]
async fn a_spawn_inside_outlives_its_job_and_the_sentinels_own_does_not() {
    let (reports, finished) = (Told::default(), Count::default());
    let counted = finished.clone();
    let work = move |job: Id| {
        let finished = counted.clone();
        async move {
            slow(job).await?;
            finished.add();
            Ok::<_, io::Error>(())
        }
    };
    let spawning = {
        let work = work.clone();
        move |job: Id| {
            let task = tokio::spawn(work(job));
            async move { task.await.unwrap_or_else(|error| Err(error.into())) }
        }
    };
    let layer = SentinelLayer::new(telling(&reports)).timeout(Duration::from_secs(1));

    let mut inside = ServiceBuilder::new()
        .layer(layer.clone())
        .service_fn(spawning);
    call(&mut inside, Id::new(1)).await.unwrap();
    sleep(Duration::from_secs(100)).await;
    // Reported as timed out and stopped, and the effect came all the same.
    assert_eq!(told(&reports), answers([(1, "timed_out")]));
    assert_eq!(finished.get(), 1);

    let mut own = ServiceBuilder::new().layer(layer).service_fn(work);
    call(&mut own, Id::new(2)).await.unwrap();
    sleep(Duration::from_secs(100)).await;
    assert_eq!(finished.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_caught_panic_inside_is_a_failure_and_one_that_the_sentinel_catches_is_a_panic() {
    async fn panics(_: Id) -> Result<(), io::Error> {
        raise("a bug")
    }
    /// Behaviour of a middleware such as tower-http's `CatchPanic`.
    async fn catches(job: Id) -> Result<(), io::Error> {
        let caught = tokio::spawn(panics(job)).await;
        caught.unwrap_or_else(|error| Err(io::Error::other(error.to_string())))
    }
    let reports = Told::default();
    let layer = SentinelLayer::new(telling(&reports));

    let mut inside = ServiceBuilder::new()
        .layer(layer.clone())
        .service_fn(catches);
    call(&mut inside, Id::new(1)).await.unwrap();
    let mut own = ServiceBuilder::new().layer(layer).service_fn(panics);
    call(&mut own, Id::new(2)).await.unwrap();
    assert_eq!(told(&reports), answers([(1, "failed"), (2, "panicked")]));
}

#[tokio::test(start_paused = true)]
async fn an_intensity_outside_sees_no_failure_and_inside_pauses() {
    let reports = Told::default();
    let intensity = || IntensityLayer::new().window(10).pause(HOUR..=HOUR);
    let mut outside = ServiceBuilder::new()
        .layer(intensity())
        .layer(SentinelLayer::new(telling(&reports)))
        .service_fn(refuse);
    for id in 0..100 {
        assert!(is_ready(&mut outside).await);
        outside.call(Id::new(id)).await.unwrap();
    }
    assert_eq!(told(&reports).len(), 100);

    let reports = Told::default();
    let mut inside = ServiceBuilder::new()
        .layer(SentinelLayer::new(telling(&reports)))
        .layer(intensity())
        .service_fn(refuse);
    let mut taken = 0;
    while is_ready(&mut inside).await {
        inside.call(Id::new(taken)).await.unwrap();
        taken += 1;
    }
    assert_eq!((taken, told(&reports).len()), (10, 10));
}

#[tokio::test(start_paused = true)]
async fn an_intensity_sees_no_limit_that_drops_it_unless_it_is_the_sentinels() {
    let reports = Told::default();
    let intensity = || IntensityLayer::new().window(10).pause(HOUR..=HOUR);
    let mut between = ServiceBuilder::new()
        .layer(SentinelLayer::new(telling(&reports)))
        .timeout(Duration::from_secs(1))
        .layer(intensity())
        .service_fn(slow);
    for id in 0..100 {
        assert!(is_ready(&mut between).await);
        between.call(Id::new(id)).await.unwrap();
    }

    let reports = Told::default();
    let layer = SentinelLayer::new(telling(&reports)).timeout(Duration::from_secs(1));
    let mut own = ServiceBuilder::new()
        .layer(layer)
        .layer(intensity())
        .service_fn(slow);
    for id in 0..10 {
        call(&mut own, Id::new(id)).await.unwrap();
    }
    assert!(!is_ready(&mut own).await);
}

#[tokio::test(start_paused = true)]
async fn an_outer_sentinel_holds_the_gate_though_its_caller_drops() {
    fn dropping<S>(gate: &mut S, job: Id) -> impl Future<Output = ()> + use<S>
    where
        S: Service<Id, Future: Send + 'static>,
    {
        drop(gate.call(job));
        future::ready(())
    }
    let reports = Told::default();
    // Its destructor keeps the job from being gone at once.
    let lingering = |_: Id| async {
        tower_sentinel::cancelled().await;
        sleep(Duration::from_secs(30)).await;
        Ok::<_, io::Error>(())
    };
    let layer = SentinelLayer::new(telling(&reports)).grace(Duration::from_secs(60));
    let gated = || {
        ServiceBuilder::new()
            .concurrency_limit(1)
            .layer(layer.clone())
            .service_fn(lingering)
    };

    let mut alone = gated();
    alone.ready().await.unwrap();
    dropping(&mut alone, Id::new(1)).await;
    // The permit is free while the job still runs.
    assert!(is_ready(&mut alone).await);

    let forwarding =
        service_fn(
            |report: Report<Id, OutcomeKind, _>| async move { report.outcome.into_result() },
        );
    let outer = SentinelLayer::new(forwarding)
        .no_timeout()
        .on_drop(OnDrop::Detach);
    let mut owned = ServiceBuilder::new().layer(outer).service(gated());
    owned.ready().await.unwrap();
    dropping(&mut owned, Id::new(2)).await;
    assert!(!is_ready(&mut owned).await);
}

/// A tag whose broker takes it away at a keep-alive, if it does.
fn leased(lost_at: Option<usize>) -> Tag {
    let asked = Count::default();
    Tag::new().keeping(move || {
        asked.add();
        let is_lost = lost_at.is_some_and(|at| at <= asked.get());
        ready(Ok(if is_lost { Lease::Lost } else { Lease::Held }))
    })
}

fn settling() -> SentinelLayer<SettlePolicy> {
    SentinelLayer::new(SettlePolicy::new(ack_on_success())).no_timeout()
}

async fn slow_lease<J>(_: J) -> Result<(), io::Error> {
    sleep(Duration::from_secs(60)).await;
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn a_keep_alive_outside_cannot_stop_a_job_whose_lease_is_lost_and_inside_it_does() {
    let keep_alive = KeepAliveLayer::new(Duration::from_secs(8));
    let lost = || leased(Some(2));

    let job = lost();
    let mut outside = ServiceBuilder::new()
        .layer(keep_alive.clone())
        .layer(settling())
        .service_fn(slow_lease::<Tag>);
    call(&mut outside, job.clone()).await.unwrap();
    assert_eq!(job.verdicts(), [Verdict::Ack]);
    assert_eq!(job.asked(), 2);

    let job = lost();
    let mut inside = ServiceBuilder::new()
        .layer(settling())
        .layer(keep_alive)
        .service_fn(slow_lease::<Tag>);
    call(&mut inside, job.clone()).await.unwrap();
    assert_eq!(job.verdicts(), [Verdict::Abandon]);
    assert_eq!(job.asked(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_keep_alive_inside_of_a_wait_is_not_asked_for_in_it_and_around_it_is() {
    /// Waits for half a minute before each call, as a retry with a backoff does.
    fn waiting<S>(
        inner: S,
    ) -> impl Service<Tag, Response = (), Error = io::Error, Future: Send> + Clone + Send
    where
        S: Service<Tag, Response = (), Error = io::Error, Future: Send> + Clone + Send + 'static,
    {
        service_fn(move |job| {
            let mut inner = inner.clone();
            async move {
                sleep(Duration::from_secs(30)).await;
                call(&mut inner, job).await
            }
        })
    }
    let keep_alive = KeepAliveLayer::new(Duration::from_secs(8));

    let job = leased(None);
    let mut around = ServiceBuilder::new()
        .layer(settling())
        .layer(keep_alive.clone())
        .layer_fn(waiting)
        .service_fn(slow_lease::<Tag>);
    call(&mut around, job.clone()).await.unwrap();
    // In 90 s.
    assert_eq!(job.asked(), 11);

    let job = leased(None);
    let mut within = ServiceBuilder::new()
        .layer(settling())
        .layer_fn(waiting)
        .layer(keep_alive)
        .service_fn(slow_lease::<Tag>);
    call(&mut within, job.clone()).await.unwrap();
    // In the last 60 s of them.
    assert_eq!(job.asked(), 7);
}

#[tokio::test(start_paused = true)]
async fn what_a_decode_outside_cannot_decode_has_no_answer_and_inside_it_is_rejected() {
    let layer = DecodeLayer::new(|body: &[u8]| std::str::from_utf8(body).unwrap().parse::<u32>());
    let noise = || leased(None).body("noise");

    let job = noise();
    let mut outside = ServiceBuilder::new()
        .layer(layer.clone().with_job())
        .layer(settling())
        .service_fn(slow_lease::<Decoded<Tag, u32>>);
    let error = call(&mut outside, job.clone()).await.unwrap_err();
    assert!(matches!(error, DecodeError::Undecodable(_)));
    assert_eq!(job.verdicts(), []);

    let job = noise();
    let policy = SettlePolicy::new(ack_on_success().reject_undecodable());
    let mut inside = ServiceBuilder::new()
        .layer(SentinelLayer::new(policy))
        .layer(layer)
        .service_fn(slow_lease::<u32>);
    call(&mut inside, job.clone()).await.unwrap();
    assert_eq!(job.verdicts(), [Verdict::Reject]);
}

#[tokio::test(start_paused = true)]
async fn a_keep_alive_goes_around_a_decode_or_inside_of_one_that_hands_on_the_job() {
    let layer = DecodeLayer::new(|body: &[u8]| Ok::<_, Infallible>(body.len()));
    let keep_alive = KeepAliveLayer::new(Duration::from_secs(8));

    let job = leased(None);
    let mut around = ServiceBuilder::new()
        .layer(settling())
        .layer(keep_alive.clone())
        .layer(layer.clone())
        .service_fn(slow_lease::<usize>);
    call(&mut around, job.clone()).await.unwrap();
    assert_eq!((job.asked(), job.verdicts()), (7, vec![Verdict::Ack]));

    let job = leased(None);
    let mut within = ServiceBuilder::new()
        .layer(settling())
        .layer(layer.with_job())
        .layer(keep_alive)
        .service_fn(slow_lease::<Decoded<Tag, usize>>);
    call(&mut within, job.clone()).await.unwrap();
    assert_eq!((job.asked(), job.verdicts()), (7, vec![Verdict::Ack]));
}
