//! [`Keys`] of a group.

/// The keys of a group. Those that are made for it are in the hash slot of its stream.
#[derive(Clone, Debug)]
pub(super) struct Keys {
    pub(super) stream: String,
    pub(super) delayed: String,
    pub(super) dead: Option<String>,
    pub(super) suspects: Option<String>,
    /// Prefix that is set.
    prefix: String,
    /// Prefix of the keys that are made.
    made: String,
}

impl Keys {
    pub(super) fn new(stream: String, group: &str, prefix: &str) -> Self {
        let made = format!("{prefix}{}:{group}", in_slot_of(&stream));
        Self {
            delayed: format!("{made}:delayed"),
            dead: Some(made_dead(&made)),
            suspects: None,
            prefix: prefix.to_owned(),
            stream,
            made,
        }
    }

    /// Returns the keys with another prefix; dead letters with a set name keep it.
    pub(super) fn prefixed(self, group: &str, prefix: &str) -> Self {
        let is_made = self.dead.as_ref() == Some(&made_dead(&self.made));
        let keys = Self::new(self.stream, group, prefix);
        let dead = match is_made {
            true => keys.dead,
            false => self.dead,
        };
        Self {
            dead,
            suspects: self.suspects,
            ..keys
        }
    }

    /// Returns the keys of `group` for the stream of the suspects, with the same dead letters.
    pub(super) fn of_suspects(&self, group: &str) -> Option<Self> {
        let suspects = self.suspects.clone()?;
        Some(Self {
            dead: self.dead.clone(),
            ..Self::new(suspects, group, &self.prefix)
        })
    }
}

fn made_dead(made: &str) -> String {
    format!("{made}:dead")
}

/// Returns a prefix that puts a key into the hash slot of `stream`.
///
/// Redis Cluster hashes the content of the first braces, if it is not empty, or else the whole key.
pub(super) fn in_slot_of(stream: &str) -> String {
    let tag = stream
        .split_once('{')
        .and_then(|(_, rest)| rest.split_once('}'))
        .is_some_and(|(tag, _)| !tag.is_empty());
    match tag {
        true => stream.to_owned(),
        false => format!("{{{stream}}}"),
    }
}
