//! A handler: its job, its error and its work. The parts of each have sizes of their own, so that no two of them
//! become one function.

use std::time::Duration;

use serde::Deserialize;

#[derive(Deserialize)]
pub struct Job {
    id: u64,
    amounts: [u32; NUMBER],
}

#[derive(Debug, thiserror::Error)]
pub enum JobError {
    #[error("job {0} of handler NUMBER is empty")]
    Empty(u64),
    #[error("too much in handler NUMBER: {0:?}")]
    TooMuch([u32; NUMBER]),
}

pub async fn process(job: Job) -> Result<u32, JobError> {
    tokio::time::sleep(Duration::from_millis(NUMBER)).await;
    match job.amounts.iter().sum() {
        0 => Err(JobError::Empty(job.id)),
        1_000.. => Err(JobError::TooMuch(job.amounts)),
        sum => Ok(sum),
    }
}
