//! [`Targets`] of rejected jobs, and the check that they and the retry queues exist, before a job needs them.

use lapin::{
    Channel, ErrorKind, ExchangeKind,
    options::{ExchangeDeclareOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::{FieldTable, ShortString},
};

use super::{
    connection::Connection,
    error::{exchange_named, queue_named},
    moves::Moves,
    publish::Target,
    retry_queues::RetryQueues,
};
use crate::outcome::guard;

/// Targets of rejected jobs.
#[derive(Clone, Debug, Default)]
pub(super) struct Targets {
    pub(super) dead_letter: Option<Target>,
    pub(super) suspects: Option<(Target, Moves)>,
}

/// Failure of the check.
pub(super) enum Unmet {
    NoTarget { target: String, error: lapin::Error },
    Client(lapin::Error),
}

/// Checks the targets of rejected jobs and the retry queues of `queue`.
///
/// It uses the connection that consumes: an exclusive queue does not exist for any other connection, though
/// each may publish to it.
pub(super) async fn check(
    connection: &Connection,
    queue: &ShortString,
    targets: &Targets,
    retry_queues: &mut RetryQueues,
) -> Result<(), Unmet> {
    let channel = connection.create_channel().await.map_err(Unmet::Client)?;
    let suspects = targets.suspects.as_ref().map(|(target, _)| target);
    for target in targets.dead_letter.iter().chain(suspects) {
        match target.exchange.as_str() {
            "" => check_queue(&channel, &target.routing_key).await?,
            _ => check_exchange(&channel, &target.exchange).await?,
        }
    }
    for name in retry_queues.given() {
        check_queue(&channel, name).await?;
    }
    if let Some(name) = retry_queues.probe() {
        if !may_configure(&channel, queue, name).await? {
            retry_queues.forbid();
        }
    }
    Ok(())
}

async fn check_queue(channel: &Channel, name: &ShortString) -> Result<(), Unmet> {
    let options = QueueDeclareOptions {
        passive: true,
        ..QueueDeclareOptions::default()
    };
    let declared = channel.queue_declare(name.clone(), options, FieldTable::default());
    found(declared.await.map(drop), || queue_named(name.as_str()))
}

async fn check_exchange(channel: &Channel, name: &ShortString) -> Result<(), Unmet> {
    let options = ExchangeDeclareOptions {
        passive: true,
        ..ExchangeDeclareOptions::default()
    };
    // In a passive declaration the server reads only the name.
    let kind = ExchangeKind::Direct;
    let declared = channel.exchange_declare(name.clone(), kind, options, FieldTable::default());
    found(declared.await, || exchange_named(name.as_str()))
}

fn found(declared: lapin::Result<()>, target: impl FnOnce() -> String) -> Result<(), Unmet> {
    declared.map_err(|error| match error.kind() {
        // NOT_FOUND
        ErrorKind::ProtocolError(reason) if reason.get_id() == 404 => Unmet::NoTarget {
            target: target(),
            error,
        },
        _ => Unmet::Client(error),
    })
}

/// Returns whether retry queues can be declared, and logs a warning if not: it is no error yet, as not every
/// worker delays jobs.
///
/// The deletion of a queue takes the same right as its declaration, and no queue has this name.
async fn may_configure(
    channel: &Channel,
    queue: &ShortString,
    probe: ShortString,
) -> Result<bool, Unmet> {
    let options = QueueDeleteOptions {
        if_unused: true,
        if_empty: true,
        ..QueueDeleteOptions::default()
    };
    match channel.queue_delete(probe, options).await {
        Ok(_) => Ok(true),
        Err(error) => match error.kind() {
            // ACCESS_REFUSED
            ErrorKind::ProtocolError(reason) if reason.get_id() == 403 => {
                guard(|| {
                    tracing::warn!(
                        queue = queue.as_str(),
                        right = "configure",
                        "no right to declare retry queues: retries with a delay will fail"
                    );
                });
                Ok(false)
            }
            _ => Err(Unmet::Client(error)),
        },
    }
}
