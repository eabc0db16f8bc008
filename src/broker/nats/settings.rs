//! Requirements on the configuration of a consumer and its stream, checked by `subscribe`.

use std::time::Duration;

use async_nats::{
    Subject,
    jetstream::{
        consumer::{AckPolicy, Config, Info, PriorityPolicy},
        context::GetStreamByNameError,
        stream::RetentionPolicy,
    },
};

use super::{
    SubscriptionError,
    error::{NoPriority, NoSchedules},
    priority::Priority,
    repeat::{Asking, LIMIT},
};
use crate::outcome::guard;

/// Shortest `inactive_threshold` that a subscription's requests can keep up with.
const LEAST_THRESHOLD: Duration = Duration::from_secs(1);

/// Checks the consumer's own configuration.
pub(super) fn check_consumer(info: &Info, priority: &Priority) -> Result<(), SubscriptionError> {
    let config = &info.config;
    if !matches!(config.ack_policy, AckPolicy::Explicit) {
        return Err(SubscriptionError::NotExplicit);
    }
    let threshold = config.inactive_threshold;
    if !threshold.is_zero() && threshold < LEAST_THRESHOLD {
        return Err(SubscriptionError::InactiveThreshold {
            threshold,
            least: LEAST_THRESHOLD,
        });
    }
    if config.max_deliver > 0 {
        guard(|| {
            tracing::warn!(
                stream = info.stream_name,
                consumer = info.name,
                max_deliver = config.max_deliver,
                "jobs stranded by the server after `max_deliver` deliveries: keep the delivery limit below it, or leave it out"
            );
        });
    }
    check_priority(config, priority).map_err(|reason| SubscriptionError::Priority { reason })
}

fn check_priority(config: &Config, priority: &Priority) -> Result<(), NoPriority> {
    let policy = &config.priority_policy;
    if *policy == PriorityPolicy::PinnedClient {
        return Err(NoPriority::Pinned);
    }
    let groups = &config.priority_groups;
    let is_known = match &priority.group {
        Some(group) => groups.contains(group),
        None => groups.is_empty(),
    };
    if !is_known {
        return Err(NoPriority::Group {
            asked: priority.group.clone(),
            groups: groups.clone(),
        });
    }
    if priority.overflows() && *policy != PriorityPolicy::Overflow {
        return Err(NoPriority::NotOverflow);
    }
    if priority.rank.is_some() && *policy != PriorityPolicy::Prioritized {
        return Err(NoPriority::NotPrioritized);
    }
    Ok(())
}

/// Checks that a stream stores the dead letters, and that it is not the stream of the jobs.
pub(super) async fn check_dead_letter(
    asking: &Asking<'_>,
    info: &Info,
    subject: &Subject,
) -> Result<(), SubscriptionError> {
    match stream_of(asking, subject).await? {
        Ok(stream) if stream == info.stream_name => Err(SubscriptionError::DeadLetterAmongJobs {
            subject: subject.to_string(),
            stream,
        }),
        Ok(_) => Ok(()),
        Err(error) => Err(SubscriptionError::NoDeadLetterStream {
            subject: subject.to_string(),
            error: error.into(),
        }),
    }
}

/// Checks that a stream stores the suspects, and that it is not the stream of the jobs.
pub(super) async fn check_suspects(
    asking: &Asking<'_>,
    info: &Info,
    subject: &Subject,
) -> Result<(), SubscriptionError> {
    match stream_of(asking, subject).await? {
        Ok(stream) if stream == info.stream_name => Err(SubscriptionError::SuspectsAmongJobs {
            subject: subject.to_string(),
            stream,
        }),
        Ok(_) => Ok(()),
        Err(error) => Err(SubscriptionError::NoStreamOfSuspects {
            subject: subject.to_string(),
            error: error.into(),
        }),
    }
}

/// Returns the name of the stream that stores `subject`, or the error of the server.
async fn stream_of(
    asking: &Asking<'_>,
    subject: &Subject,
) -> Result<Result<String, GetStreamByNameError>, SubscriptionError> {
    let stream = asking.ask(|| asking.context.stream_by_subject(subject.as_str()));
    match stream.await {
        Ok(stream) => Ok(Ok(stream)),
        Err(Some(error)) => Ok(Err(error)),
        Err(None) => Err(SubscriptionError::Unreachable { silence: LIMIT }),
    }
}

/// Checks that the stream stores schedules below `prefix`, and that the consumer reads none of them as a job.
pub(super) async fn check_schedules(
    asking: &Asking<'_>,
    info: &Info,
    prefix: &Subject,
) -> Result<(), SubscriptionError> {
    let stream = asking.ask(|| asking.context.get_stream(&info.stream_name));
    let stream = stream.await.map_err(|error| match error {
        Some(error) => SubscriptionError::Stream(error.into()),
        None => SubscriptionError::Unreachable { silence: LIMIT },
    })?;
    let stream = &stream.cached_info().config;
    let subject = format!("{prefix}.1");
    let is_among = |patterns: &[String]| patterns.iter().any(|pattern| matches(pattern, &subject));
    let reason = if !stream.allow_message_schedules {
        NoSchedules::NotAllowed
    } else if stream.retention != RetentionPolicy::WorkQueue {
        NoSchedules::NotWorkQueue
    } else if !is_among(&stream.subjects) {
        NoSchedules::NotInStream
    } else if is_among(&filters(&info.config)) {
        NoSchedules::Jobs
    } else {
        return Ok(());
    };
    Err(SubscriptionError::Schedules {
        subject: prefix.to_string(),
        stream: info.stream_name.clone(),
        reason,
    })
}

/// Returns the subjects that a consumer reads.
fn filters(config: &Config) -> Vec<String> {
    if !config.filter_subjects.is_empty() {
        return config.filter_subjects.clone();
    }
    vec![match config.filter_subject.as_str() {
        "" => ">".to_owned(),
        filter => filter.to_owned(),
    }]
}

/// Returns whether `subject`, which has no wildcards, matches `pattern`.
fn matches(pattern: &str, subject: &str) -> bool {
    let mut subject = subject.split('.');
    for token in pattern.split('.') {
        match (token, subject.next()) {
            (">", Some(_)) => return true,
            ("*", Some(_)) => {}
            (token, Some(other)) if token == other => {}
            _ => return false,
        }
    }
    subject.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn a_pattern_matches_by_tokens() {
        for pattern in ["jobs.delayed.1", "jobs.*.1", "jobs.>", ">", "*.*.*"] {
            assert!(matches(pattern, "jobs.delayed.1"), "{pattern}");
        }
        for pattern in [
            "jobs",
            "jobs.delayed",
            "jobs.*",
            "jobs.delayed.1.>",
            "j.>",
            "*",
        ] {
            assert!(!matches(pattern, "jobs.delayed.1"), "{pattern}");
        }
    }
}
