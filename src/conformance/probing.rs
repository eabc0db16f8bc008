//! Scenario of the broker's own view.

use tokio::time::timeout;

use crate::{
    conformance::{
        error::ConformanceError,
        fixture::Fixture,
        run::{PATIENCE, Run, Step},
    },
    consumer::{Probe, Subscription},
    settle::Verdict,
};

/// Scenario of a probe: it counts the jobs that wait and those that are unsettled, and changes nothing. An adapter
/// without probes, and one that leaves a number out, pass.
///
/// # Errors
///
/// Returns the first expectation that was not met.
pub async fn a_probe_counts_what_waits<F: Fixture>(
    fixture: &F,
) -> Result<(), ConformanceError<F::Error>> {
    let run = Run::new("a_probe_counts_what_waits", fixture);
    let mut jobs = run.subscribe(2).await?;
    let Some(first) = run.probe(&jobs).await? else {
        return Ok(());
    };
    run.probed(&jobs, &first, 0, 0).await?;
    run.publish_n(5).await?;
    for left in [3, 1] {
        let taken = run.take_n(&mut jobs, 2).await?;
        // The prefetch is used up.
        run.probed(&jobs, &first, left, 2).await?;
        for job in &taken {
            run.settle(job, Verdict::Ack).await?;
        }
    }
    let last = run.take(&mut jobs).await?;
    run.probed(&jobs, &first, 0, 1).await?;
    run.settle(&last, Verdict::Ack).await?;
    run.probed(&jobs, &first, 0, 0).await?;
    run.left(0).await?;
    run.close(&mut jobs).await
}

impl<F: Fixture> Run<'_, F> {
    async fn probe(&self, jobs: &F::Subscription) -> Step<F, Option<Probe>> {
        let Some(probing) = jobs.probe() else {
            return Ok(None);
        };
        match timeout(PATIENCE, probing).await {
            Ok(probe) => self.succeeds("a probe", probe).map(Some),
            Err(_) => self.violated(
                "a probe to resolve",
                format_args!("none within {PATIENCE:?}"),
            ),
        }
    }

    /// Waits until a probe has these numbers, where the `first` one had any.
    async fn probed(
        &self,
        jobs: &F::Subscription,
        first: &Probe,
        waiting: u64,
        unsettled: u64,
    ) -> Step<F> {
        let expected = (
            first.waiting.map(|_| waiting),
            first.unsettled.map(|_| unsettled),
        );
        let find = async || {
            let probe = self.probe(jobs).await?.unwrap_or_default();
            Ok((probe.waiting, probe.unsettled))
        };
        let subject = "the jobs of a probe that wait, and that are unsettled,";
        self.eventually(subject, expected, find).await
    }
}
