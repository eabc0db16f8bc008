//! Scenario of an [`Envelope`]: the parts of a job beside its payload, when it comes back.

use std::{borrow::Cow, future::Future, time::Duration};

use crate::{
    broker::Envelope,
    conformance::{
        error::ConformanceError,
        fixture::{Fixture, JobOf},
        run::{Run, Step, body},
    },
    consumer::Subscription,
    job::Job,
    settle::Verdict,
};

/// Name of the header of a job, as it is published, and its value.
const HEADER: (&str, &str) = ("Tenant-Id", "acme");

/// [`Fixture`] of an adapter whose jobs are [`Envelope`]s.
///
/// ```
/// use tower_sentinel::{
///     broker::memory::{Broker, ConnectError, Deliveries, Queue},
///     conformance::{self, Backlog, DeadLetter, EnvelopeFixture, Fixture, Published},
///     settle::Capabilities,
/// };
///
/// struct Memory(Queue<String>);
///
/// impl EnvelopeFixture for Memory {
///     async fn publish_with(
///         &self,
///         body: &str,
///         header: Option<(&str, &str)>,
///         _: Option<&str>,
///     ) -> Result<Published, ConnectError> {
///         self.0.publish_with_headers(body.to_owned(), header);
///         // Jobs are numbered as they are published.
///         let counts = self.0.counts();
///         let number = (counts.ready + counts.delayed + counts.unacked) as u64 + counts.acked;
///         Ok(Published {
///             message_id: Some(number.to_string()),
///             routing_key: self.0.name().to_owned(),
///         })
///     }
/// }
///
/// impl Fixture for Memory {
///     type Subscription = Deliveries<String>;
///     // …
/// #     type Error = ConnectError;
/// #     async fn publish(&self, body: &str) -> Result<(), ConnectError> {
/// #         self.0.publish(body.to_owned());
/// #         Ok(())
/// #     }
/// #     async fn subscribe(&self, prefetch: usize) -> Result<Deliveries<String>, ConnectError> {
/// #         self.0.subscribe(prefetch)
/// #     }
/// #     async fn backlog(&self) -> Result<Backlog, ConnectError> {
/// #         let counts = self.0.counts();
/// #         let total = counts.ready + counts.delayed + counts.unacked;
/// #         Ok(Backlog { unacked: counts.unacked, total })
/// #     }
/// #     async fn dead_letters(&self) -> Result<Vec<DeadLetter>, ConnectError> {
/// #         Ok(Vec::new())
/// #     }
/// #     fn capabilities(&self) -> Capabilities {
/// #         Capabilities::none().free_release().delay()
/// #     }
/// }
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// let fixture = Memory(Broker::new().queue("jobs").declare());
/// let kept = conformance::a_job_keeps_its_envelope_when_it_comes_back(&fixture).await;
/// kept.unwrap_or_else(|error| panic!("{error}"));
/// # }
/// ```
pub trait EnvelopeFixture: Fixture<Subscription: Subscription<Job: Envelope>> {
    /// Publishes a job with this header, and with this id if the publisher sets the id; the broker has the
    /// job when the future resolves.
    ///
    /// # Errors
    ///
    /// Returns an error if the broker did not take the job. The scenario ends.
    fn publish_with(
        &self,
        body: &str,
        header: Option<(&str, &str)>,
        message_id: Option<&str>,
    ) -> impl Future<Output = Result<Published, Self::Error>>;
}

/// Envelope that a job was published with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// Id of the message, if it has one.
    pub message_id: Option<String>,
    /// Name that the message was published to.
    pub routing_key: String,
}

/// Scenario of an envelope: it is read as it was published, and stays the same in each way that the job
/// comes back; a job that came back never reports to be delivered for the first time.
///
/// It is not among [`all`](crate::conformance::all), since not every job is an [`Envelope`].
///
/// # Errors
///
/// Returns the first expectation that was not met.
pub async fn a_job_keeps_its_envelope_when_it_comes_back<F: EnvelopeFixture>(
    fixture: &F,
) -> Result<(), ConformanceError<F::Error>> {
    let run = Run::new("a_job_keeps_its_envelope_when_it_comes_back", fixture);
    let delay = Duration::from_millis(200);
    let verdicts = [
        Verdict::retry(),
        Verdict::release(),
        Verdict::retry_after(delay),
        Verdict::release_after(delay),
    ];
    let capabilities = fixture.capabilities();
    let mut jobs = run.subscribe(1).await?;
    let can = |verdict: &Verdict| capabilities.can(*verdict);
    for (n, verdict) in verdicts.into_iter().filter(can).enumerate() {
        // Each job has its own id: a broker may drop an apparent duplicate.
        let id = format!("order-{n}");
        for (header, message_id) in [(Some(HEADER), Some(&*id)), (None, None)] {
            let publishing = fixture.publish_with("one", header, message_id);
            let published = run.fixture(publishing.await)?;
            let value = header.map(|(_, value)| value);
            let job = run.take(&mut jobs).await?;
            bears(&run, &job, value, &published, "at first")?;
            run.delivered(&job.tag(), 1)?;
            let expected = "`redelivered` at first to be false, or unknown";
            run.holds(job.redelivered() != Some(true), expected, "true")?;
            run.settle(&job, verdict).await?;

            let job = run.take(&mut jobs).await?;
            let when = format!("after the verdict \"{verdict}\"");
            bears(&run, &job, value, &published, &when)?;
            let charged = u32::from(capabilities.charges(verdict));
            run.delivered(&job.tag(), 1 + charged)?;
            let expected = format_args!("`redelivered` {when} to be true, or unknown");
            run.holds(job.redelivered() != Some(false), expected, "false")?;
            run.settle(&job, Verdict::Ack).await?;
            run.left(0).await?;
        }
    }
    Ok(())
}

/// Expects `job` to have the value and the envelope of its publish.
fn bears<F: EnvelopeFixture>(
    run: &Run<'_, F>,
    job: &JobOf<F>,
    value: Option<&str>,
    published: &Published,
    when: &str,
) -> Step<F> {
    run.equal(format_args!("the job {when}"), &*body(job), "one")?;
    let name = HEADER.0;
    for name in [name.to_owned(), name.to_lowercase(), name.to_uppercase()] {
        let subject = format_args!("the header {name} {when}");
        run.equal(subject, job.header(&name), value)?;
    }
    let subject = format_args!("a header that was not published, {when},");
    run.equal(subject, job.header("Tenant"), None)?;
    let message_id = job.message_id().map(Cow::into_owned);
    let subject = format_args!("the message's id {when}");
    run.equal(subject, message_id, published.message_id.clone())?;
    let subject = format_args!("the routing key {when}");
    run.equal(subject, job.routing_key(), &*published.routing_key)
}
