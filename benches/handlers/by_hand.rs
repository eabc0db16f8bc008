//! A consumer as it is mostly written: a loop, a task for each delivery, a limit, and a place of the prefetch.

use std::{sync::Arc, time::Duration};

use futures_util::StreamExt;
use tokio::{sync::Semaphore, task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    broker::{self, Answer, Delivery},
    handler_NUMBER::process,
};

pub async fn consume(shutdown: CancellationToken) -> Result<(), crate::BoxError> {
    loop {
        let mut deliveries = match broker::subscribe("jobs-NUMBER", 64).await {
            Ok(deliveries) => deliveries,
            Err(error) => {
                warn!(error, "connecting again after a pause");
                tokio::select! {
                    () = shutdown.cancelled() => return Ok(()),
                    () = tokio::time::sleep(Duration::from_secs(5)) => continue,
                }
            }
        };
        info!("connected");
        let places = Arc::new(Semaphore::new(64));
        let mut running = JoinSet::new();
        let is_asked = loop {
            while running.try_join_next().is_some() {}
            let place = Arc::clone(&places).acquire_owned().await?;
            tokio::select! {
                () = shutdown.cancelled() => break true,
                delivery = deliveries.next() => match delivery {
                    Some(Ok(delivery)) => {
                        running.spawn(async move {
                            handle(delivery).await;
                            drop(place);
                        });
                    }
                    Some(Err(error)) => {
                        warn!(%error, "stream failed");
                        break false;
                    }
                    None => break false,
                },
            }
        };
        while running.join_next().await.is_some() {}
        if is_asked {
            return Ok(());
        }
    }
}

async fn handle(delivery: Delivery) {
    let job = match serde_json::from_slice(&delivery.data) {
        Ok(job) => job,
        Err(error) => {
            error!(%error, "job cannot be decoded");
            return broker::settle(&delivery, Answer::Reject).await;
        }
    };
    let mut running = tokio::spawn(process(job));
    let answer = match timeout(Duration::from_secs(30), &mut running).await {
        Ok(Ok(Ok(_))) => Answer::Ack,
        Ok(Ok(Err(error))) => {
            warn!(%error, "job failed");
            Answer::Retry
        }
        Ok(Err(error)) if error.is_panic() => {
            error!(%error, "job panicked");
            Answer::Reject
        }
        Ok(Err(error)) => {
            warn!(%error, "job aborted");
            Answer::Retry
        }
        Err(_) => {
            warn!("job passed its time limit");
            running.abort();
            Answer::Retry
        }
    };
    broker::settle(&delivery, answer).await;
}
