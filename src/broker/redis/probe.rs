//! Checks of a server before a subscription: the user's right to each command, the newer commands of the
//! server, and the slots of the keys.
//!
//! Each command is sent once so that it changes nothing: to a group that does not exist, for an id that no
//! entry has. A missing right is refused before the server looks at either. A request for the rights
//! themselves (`ACL DRYRUN`) takes an administrator's right.

use ::redis::{Cmd, RedisError, Value, aio::MultiplexedConnection};
use futures_util::future::join_all;

use super::{error::is_of_the_connection, keys::Keys, standing::Standing};

/// Newer commands that the server has and the user may run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Newer {
    /// `XREADGROUP … CLAIM`, of Redis 8.4.
    pub(super) claim: bool,
    /// `XACKDEL`, of Redis 8.2.
    pub(super) ack_delete: bool,
    /// `XNACK`, of Redis 8.8, where there is also `CLAIM`: only `CLAIM` finds at once an entry that was given
    /// back.
    pub(super) nack: bool,
}

/// What a group needs beside the commands of every group.
#[derive(Clone, Copy)]
pub(super) struct Needs<'a> {
    pub(super) keys: &'a Keys,
    /// It deletes entries that are settled.
    pub(super) deletes: bool,
    /// It waits for replicas.
    pub(super) waits: bool,
}

/// Reason why a server can't serve a group.
pub(super) enum Unfit {
    /// It did not respond.
    Failed(RedisError),
    Forbidden {
        command: &'static str,
        key: Option<String>,
        error: RedisError,
    },
    NoGroup(RedisError),
    /// Another server serves the stream, or none at present.
    Misplaced(Standing, RedisError),
    /// A key is in another slot than the stream.
    OtherSlot {
        key: String,
        error: RedisError,
    },
}

impl Unfit {
    /// Returns the reason that has nothing to do with the command, if the error is one.
    pub(super) fn of(error: &RedisError) -> Option<Self> {
        match Standing::of(error) {
            Some(standing) => Some(Unfit::Misplaced(standing, error.clone())),
            None if is_of_the_connection(error) => Some(Unfit::Failed(error.clone())),
            None => None,
        }
    }
}

struct Probe<'a> {
    command: &'static str,
    key: Option<&'a str>,
    sent: Cmd,
}

impl<'a> Probe<'a> {
    /// Creates one from a command, whose second word is its subcommand, and its arguments.
    fn new(command: &'static str, key: Option<&'a str>, arguments: &[&str]) -> Self {
        let mut sent = Cmd::new();
        for word in command.split(' ') {
            sent.arg(word);
        }
        sent.arg(arguments);
        Self { command, key, sent }
    }

    async fn send(&self, connection: &MultiplexedConnection) -> Result<Value, RedisError> {
        self.sent.query_async(&mut connection.clone()).await
    }
}

/// Checks what the server and the user lack, and which newer commands they have.
///
/// `nobody` is the name of a group that does not exist.
pub(super) async fn probe(
    connection: &MultiplexedConnection,
    mut needs: Needs<'_>,
    nobody: &str,
) -> Result<Newer, Unfit> {
    let newer = find_newer(connection, &needs.keys.stream, nobody).await?;
    needs.deletes &= !newer.ack_delete;
    let probes = needed(needs, nobody);
    let answers = join_all(probes.iter().map(|probe| probe.send(connection))).await;
    let mut misplaced = None;
    for (probe, answer) in probes.iter().zip(answers) {
        // There is no such group, entry or script; any other error will show when the command is needed.
        let Err(error) = answer else { continue };
        match error.code() {
            Some("NOPERM") => {
                return Err(Unfit::Forbidden {
                    command: probe.command,
                    key: probe.key.map(str::to_owned),
                    error,
                });
            }
            Some("CROSSSLOT") => {
                return Err(Unfit::OtherSlot {
                    key: probe.key.unwrap_or_default().to_owned(),
                    error,
                });
            }
            // A key in another slot may be on another server: first of all it is in another slot.
            _ => misplaced = misplaced.or_else(|| Unfit::of(&error)),
        }
    }
    if let Some(unfit) = misplaced {
        return Err(unfit);
    }
    Ok(newer)
}

async fn find_newer(
    connection: &MultiplexedConnection,
    stream: &str,
    nobody: &str,
) -> Result<Newer, Unfit> {
    let claim = [
        "GROUP", nobody, nobody, "CLAIM", "1", "STREAMS", stream, ">",
    ];
    let probes = [
        Probe::new("XREADGROUP", None, &claim),
        Probe::new(
            "XACKDEL",
            None,
            &[stream, nobody, "ACKED", "IDS", "1", "0-0"],
        ),
        Probe::new("XNACK", None, &[stream, nobody, "FAIL", "IDS", "1", "0-0"]),
    ];
    let answers = join_all(probes.iter().map(|probe| probe.send(connection))).await;
    let mut found = [false; 3];
    for (found, answer) in found.iter_mut().zip(answers) {
        *found = match answer {
            Ok(_) => true,
            Err(error) => match Unfit::of(&error) {
                Some(unfit) => return Err(unfit),
                None => error.code() == Some("NOGROUP"),
            },
        };
    }
    let [claim, ack_delete, nack] = found;
    Ok(Newer {
        claim,
        ack_delete,
        nack: nack && claim,
    })
}

/// Returns a probe for each command that is always needed, and each key of the scripts.
fn needed<'a>(needs: Needs<'a>, nobody: &str) -> Vec<Probe<'a>> {
    let Keys {
        stream,
        delayed,
        dead,
        suspects,
        ..
    } = needs.keys;
    let of_stream = |command, arguments: &[&str]| {
        let mut with_key = vec![&**stream];
        with_key.extend(arguments);
        Probe::new(command, Some(stream), &with_key)
    };
    let read = ["GROUP", nobody, nobody, "STREAMS", stream, ">"];
    let mut probes = vec![
        Probe::new("PING", None, &[]),
        Probe::new("TIME", None, &[]),
        // An invalid script, so nothing is loaded.
        Probe::new("SCRIPT LOAD", None, &["("]),
        Probe::new("XREADGROUP", Some(stream), &read),
        of_stream("XACK", &[nobody, "0-0"]),
        of_stream("XPENDING", &[nobody, "-", "+", "1"]),
        of_stream("XRANGE", &["+", "-"]),
        of_stream("XCLAIM", &[nobody, nobody, "0", "0-0", "JUSTID"]),
        of_stream("XAUTOCLAIM", &[nobody, nobody, "0", "0-0"]),
        of_stream("XINFO CONSUMERS", &[nobody]),
        of_stream("XGROUP DELCONSUMER", &[nobody, nobody]),
        Probe::new("ZADD", Some(delayed), &[delayed, "XX", "0", "-"]),
        Probe::new("ZRANGE", Some(delayed), &[delayed, "1", "0"]),
        Probe::new("ZREM", Some(delayed), &[delayed, "-"]),
    ];
    if needs.waits {
        // For no replica, so that it does not wait.
        probes.push(Probe::new("WAIT", None, &["0", "1"]));
    }
    if needs.deletes {
        probes.push(of_stream("XDEL", &["0-0"]));
    }
    for copies in dead.iter().chain(suspects) {
        let arguments = [&**copies, "0-0", "-", "-"];
        probes.push(Probe::new("XADD", Some(copies), &arguments));
    }
    let no_script = "0".repeat(40);
    for key in std::iter::once(delayed).chain(dead).chain(suspects) {
        probes.push(Probe::new(
            "EVALSHA",
            Some(key),
            &[&no_script, "2", stream, key],
        ));
    }
    probes
}
