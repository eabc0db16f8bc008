//! Labels of the metrics.

use ::metrics::{Label, SharedString};

use crate::{
    outcome::catch,
    telemetry::{consumer_name, messaging::Messaging},
};

pub(super) const ERROR_TYPE: &str = "error.type";
pub(super) const OPERATION: &str = "messaging.operation.name";

/// Labels set by the user.
pub(crate) type Labels = Vec<Label>;

pub(crate) fn labels<K, V>(labels: impl IntoIterator<Item = (K, V)>) -> Labels
where
    K: Into<SharedString>,
    V: Into<SharedString>,
{
    let label = |(key, value): (K, V)| Label::new(key, value);
    labels.into_iter().map(label).collect()
}

/// Adds the name of the consumer that calls this, if it has one.
pub(super) fn of_consumer(labels: &Labels) -> Labels {
    let mut labels = labels.clone();
    let name = consumer_name::current();
    labels.extend(name.map(|name| Label::new(consumer_name::LABEL, name)));
    labels
}

/// Adds the name of the consumer, and the description of the first delivery. A label set by the user stays.
pub(super) fn of_delivery<'a>(
    labels: &Labels,
    describe: impl FnOnce() -> Option<Messaging<'a>>,
) -> Labels {
    let mut labels = of_consumer(labels);
    // The description is foreign code.
    if let Ok(Some(messaging)) = catch(describe) {
        let Messaging {
            system,
            destination,
            queue,
            consumer_group,
            ..
        } = messaging;
        for (key, value) in [
            ("messaging.system", Some(system.into())),
            (
                "messaging.destination.name",
                Some(queue.unwrap_or(destination)),
            ),
            ("messaging.consumer.group.name", consumer_group),
        ] {
            let is_set = labels.iter().any(|label| label.key() == key);
            if let (Some(value), false) = (value, is_set) {
                labels.push(Label::new(key, value.into_owned()));
            }
        }
    }
    labels
}

pub(super) fn with<const N: usize>(
    labels: &Labels,
    more: [(&'static str, &'static str); N],
) -> Labels {
    let mut labels = labels.clone();
    labels.extend(more.map(|(key, value)| Label::from_static_parts(key, value)));
    labels
}
