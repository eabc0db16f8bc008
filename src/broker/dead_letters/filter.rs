//! [`Filter`], which chooses among dead letters.

use std::time::{Duration, SystemTime};

use super::letter::DeadLetter;

/// Choice among dead letters: those that meet each of its conditions.
///
/// A dead letter of which a condition's value is not known does not meet it.
///
/// ```
/// use std::time::{Duration, SystemTime};
/// use tower_sentinel::broker::dead_letters::{DeadLetter, Filter};
///
/// let mut letter = DeadLetter::new();
/// letter.kind = Some("panicked".to_owned());
/// letter.message = Some("index out of bounds: 7".to_owned());
/// letter.time = Some(SystemTime::now() - Duration::from_secs(60));
///
/// let minute = Duration::from_secs(60);
/// let filter = Filter::all().kind("panicked").message("out of bounds").older_than(minute);
/// assert!(filter.matches(&letter));
/// assert!(!filter.destination("orders").matches(&letter));
///
/// // Those of an outage, but not the ones before it; and a single one.
/// let outage = Filter::all().younger_than(2 * minute).after(SystemTime::now() - 2 * minute).before(SystemTime::now());
/// assert!(outage.matches(&letter));
/// assert!(!outage.id("1526919030474-55").matches(&letter));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    kinds: Vec<String>,
    messages: Vec<String>,
    destinations: Vec<String>,
    ids: Vec<String>,
    before: Option<SystemTime>,
    after: Option<SystemTime>,
}

impl Filter {
    /// Creates the filter without a condition, which all dead letters meet.
    pub fn all() -> Self {
        Self::default()
    }

    /// Adds a kind: a dead letter must have one of those that are added.
    ///
    /// A kind is that of an [outcome](crate::outcome::OutcomeKind::as_str), such as `failed`, or one of RabbitMQ's
    /// own, such as `expired`.
    pub fn kind(mut self, kind: impl Into<String>) -> Self {
        self.kinds.push(kind.into());
        self
    }

    /// Adds a text that must be within the message. Case matters.
    pub fn message(mut self, text: impl Into<String>) -> Self {
        self.messages.push(text.into());
        self
    }

    /// Adds a place: a dead letter must have come from one of those that are added.
    pub fn destination(mut self, destination: impl Into<String>) -> Self {
        self.destinations.push(destination.into());
        self
    }

    /// Adds an id: a dead letter must have one of those that are added.
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.ids.push(id.into());
        self
    }

    /// Leaves out dead letters that are younger than `age`, counted from this call.
    pub fn older_than(self, age: Duration) -> Self {
        // No dead letter is older than the clock can tell.
        let start = SystemTime::UNIX_EPOCH;
        self.before(SystemTime::now().checked_sub(age).unwrap_or(start))
    }

    /// Leaves out dead letters of `age` or more, counted from this call.
    pub fn younger_than(self, age: Duration) -> Self {
        let start = SystemTime::UNIX_EPOCH;
        self.after(SystemTime::now().checked_sub(age).unwrap_or(start))
    }

    /// Leaves out dead letters from after `time`. The last call counts.
    pub fn before(mut self, time: SystemTime) -> Self {
        self.before = Some(time);
        self
    }

    /// Leaves out dead letters from `time` or before it. The last call counts.
    pub fn after(mut self, time: SystemTime) -> Self {
        self.after = Some(time);
        self
    }

    /// Returns whether `letter` meets each condition.
    pub fn matches(&self, letter: &DeadLetter) -> bool {
        let is_one = |wanted: &[String], value: &Option<String>| {
            wanted.is_empty() || value.as_ref().is_some_and(|value| wanted.contains(value))
        };
        let message = letter.message.as_deref();
        is_one(&self.kinds, &letter.kind)
            && is_one(&self.destinations, &letter.destination)
            && is_one(&self.ids, &letter.id)
            && (self.messages.iter())
                .all(|text| message.is_some_and(|message| message.contains(text)))
            && (self.before).is_none_or(|before| letter.time.is_some_and(|time| time <= before))
            && (self.after).is_none_or(|after| letter.time.is_some_and(|time| time > after))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn letter() -> DeadLetter {
        DeadLetter {
            id: Some("7".to_owned()),
            kind: Some("failed".to_owned()),
            message: Some("no such table".to_owned()),
            time: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(100)),
            destination: Some("orders".to_owned()),
            ..DeadLetter::default()
        }
    }

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn each_condition_must_be_met() {
        let met = [
            Filter::all(),
            Filter::all().kind("panicked").kind("failed"),
            Filter::all().message("such").message("table"),
            Filter::all().destination("orders"),
            Filter::all().id("6").id("7"),
            Filter::all().before(at(100)).after(at(99)),
            Filter::all().older_than(Duration::from_secs(1)),
        ];
        let unmet = [
            Filter::all().kind("panicked"),
            Filter::all().message("such").message("index"),
            Filter::all().message("Table"),
            Filter::all().destination("mails"),
            Filter::all().id("77"),
            Filter::all().before(at(99)),
            Filter::all().after(at(100)),
            Filter::all().younger_than(Duration::from_secs(1)),
            Filter::all().kind("failed").id("6"),
        ];
        for filter in met {
            assert!(filter.matches(&letter()), "{filter:?}");
        }
        for filter in unmet {
            assert!(!filter.matches(&letter()), "{filter:?}");
            assert!(!filter.matches(&DeadLetter::new()), "{filter:?}");
        }
        assert!(Filter::all().matches(&DeadLetter::new()));
    }

    #[test]
    fn an_age_beyond_the_clock_is_no_panic() {
        assert!(!Filter::all().older_than(Duration::MAX).matches(&letter()));
        assert!(Filter::all().younger_than(Duration::MAX).matches(&letter()));
    }
}
