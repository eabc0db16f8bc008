//! Commands that only newer servers have.
//!
//! `XACKDEL` and `CLAIM` run if the server has them. A fake server, which knows no streams, reads the
//! requests with `CLAIM` and `XNACK`.

use std::{collections::VecDeque, time::Duration};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufStream},
    net::{TcpListener, TcpStream},
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    task::JoinSet,
    time::{sleep, timeout},
};
use tower_sentinel::{
    Job, Verdict,
    broker::redis::{
        ConsumerGroup,
        redis::{Commands, Connection, Value, cmd},
    },
    settle::Settle,
};

use super::{GROUP, STREAM, add, close, count, dead, group, next, pending, server::Server, settle};

fn has(connection: &mut Connection, command: &str) -> bool {
    let known: Vec<Value> = cmd("COMMAND")
        .arg("INFO")
        .arg(command)
        .query(connection)
        .unwrap();
    known != [Value::Nil] && known != [Value::Array(Vec::new())]
}

#[tokio::test]
async fn what_is_deleted_waits_for_other_groups_where_the_server_can() {
    for verdict in [Verdict::Ack, Verdict::Reject] {
        let server = Server::start();
        let mut inspect = server.inspect();
        let waits = has(&mut inspect, "XACKDEL");
        let () = inspect
            .xgroup_create_mkstream(STREAM, "others", "0")
            .unwrap();
        let ids: Vec<_> = (0..20).map(|n| add(&mut inspect, &n.to_string())).collect();
        let group = group().prefetch(20).delete_settled();
        let mut deliveries = group.connect(server.url()).await.unwrap();
        let mut held = Vec::new();
        for _ in &ids {
            held.push(next(&mut deliveries).await);
        }
        let settling = held.iter().map(|delivery| settle(delivery, verdict));
        let settled = futures_util::future::join_all(settling).await;
        assert!(settled.iter().all(Result::is_ok), "{settled:?}");
        assert_eq!(pending(&mut inspect), 0);
        let left: usize = inspect.xlen(STREAM).unwrap();
        assert_eq!(left, if waits { 20 } else { 0 }, "{verdict}");
        if waits {
            let others = ConsumerGroup::new(STREAM, "others").delete_settled();
            let mut deliveries = others.connect(server.url()).await.unwrap();
            for _ in &ids {
                settle(&next(&mut deliveries).await, Verdict::Ack)
                    .await
                    .unwrap();
            }
            let left: usize = inspect.xlen(STREAM).unwrap();
            assert_eq!(left, 0, "{verdict}");
        }
    }
}

#[tokio::test]
async fn an_entry_that_was_given_up_for_good_ends_no_subscription() {
    let server = Server::start();
    let mut inspect = server.inspect();
    for marked in ["4294967296", "9223372036854775807"] {
        let mut deliveries = group()
            .min_idle(Duration::from_millis(500))
            .connect(server.url())
            .await
            .unwrap();
        let id = add(&mut inspect, "poison");
        next(&mut deliveries).await;
        close(&mut deliveries).await;
        // As `XNACK … FATAL` does.
        let () = cmd("XCLAIM")
            .arg(&[STREAM, GROUP, "nobody", "0", &id])
            .arg(&["RETRYCOUNT", marked, "FORCE", "JUSTID"])
            .query(&mut inspect)
            .unwrap();
        let () = inspect.del(group().delayed_key()).unwrap();
        let mut deliveries = group()
            .min_idle(Duration::from_millis(500))
            .connect(server.url())
            .await
            .unwrap();
        for verdict in [Verdict::retry(), Verdict::release(), Verdict::Reject] {
            let delivery = next(&mut deliveries).await;
            assert_eq!(count(&delivery), u32::MAX, "{marked}");
            settle(&delivery, verdict).await.unwrap();
        }
        assert_eq!(pending(&mut inspect), 0);
        close(&mut deliveries).await;
    }
    assert_eq!(dead(&mut inspect).len(), 2);
}

// === Requests to a server that has all of them ===

/// A server that replies like one of Redis 8.8, and reports the commands that it received.
struct Fake {
    port: u16,
    sent: UnboundedReceiver<Vec<String>>,
    // Ends with the fake.
    _serving: JoinSet<()>,
}

impl Fake {
    /// Starts one that delivers `replies` to the group.
    async fn start(replies: &[&str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sender, sent) = unbounded_channel();
        let replies: Vec<_> = replies.iter().map(|&reply| reply.to_owned()).collect();
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                connections.spawn(serve(stream, sender.clone(), replies.clone().into()));
            }
        });
        Self {
            port,
            sent,
            _serving: serving,
        }
    }

    /// Waits for the next command that begins so, and returns all of it.
    async fn sent(&mut self, begin: &[&str]) -> Vec<String> {
        let found = async {
            loop {
                let words = self.sent.recv().await.unwrap();
                if words.len() >= begin.len() && words.iter().zip(begin).all(|(a, b)| a == b) {
                    return words;
                }
            }
        };
        let found = timeout(Duration::from_secs(10), found).await;
        found.unwrap_or_else(|_| panic!("{begin:?} is not sent"))
    }
}

async fn serve(
    stream: TcpStream,
    sent: UnboundedSender<Vec<String>>,
    mut replies: VecDeque<String>,
) {
    let mut stream = BufStream::new(stream);
    while let Some(words) = read(&mut stream).await {
        let word = |index: usize| words.get(index).map_or("", |word| word);
        let reply = match (word(0), word(2)) {
            ("HELLO", _) => "%1\r\n+proto\r\n:3\r\n".to_owned(),
            ("XACKDEL", _) => "*1\r\n:-1\r\n".to_owned(),
            ("XNACK", _) => "-NOGROUP no such group\r\n".to_owned(),
            ("XREADGROUP", group) if group != GROUP => "-NOGROUP no such group\r\n".to_owned(),
            ("XREADGROUP", _) => match replies.pop_front() {
                Some(entries) => format!("%1\r\n+{STREAM}\r\n{entries}"),
                None => {
                    sleep(Duration::from_millis(20)).await;
                    "_\r\n".to_owned()
                }
            },
            // The number of their keys distinguishes them: these look for entries that came back.
            ("EVALSHA", "1") => "*2\r\n+0-0\r\n*0\r\n".to_owned(),
            ("EVALSHA", "2") => "*0\r\n".to_owned(),
            ("EVALSHA", _) => "+settled\r\n".to_owned(),
            _ => "+OK\r\n".to_owned(),
        };
        drop(sent.send(words));
        stream.write_all(reply.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
    }
}

/// Reads a command, an array of strings.
pub(super) async fn read(stream: &mut BufStream<TcpStream>) -> Option<Vec<String>> {
    let count = length(stream).await?;
    let mut words = Vec::with_capacity(count);
    for _ in 0..count {
        let mut word = vec![0; length(stream).await? + 2];
        stream.read_exact(&mut word).await.ok()?;
        word.truncate(word.len() - 2);
        words.push(String::from_utf8_lossy(&word).into_owned());
    }
    Some(words)
}

async fn length(stream: &mut BufStream<TcpStream>) -> Option<usize> {
    let mut line = String::new();
    stream.read_line(&mut line).await.ok()?;
    line.get(1..)?.trim_end().parse().ok()
}

const FIELDS: &str = "*2\r\n$7\r\npayload\r\n$3\r\none\r\n";

#[tokio::test]
async fn a_server_that_has_them_is_sent_claim_and_xnack() {
    // One that is new, and two that were delivered before.
    let replies = [
        format!("*1\r\n*4\r\n+1-0\r\n{FIELDS}:0\r\n:0\r\n"),
        format!("*2\r\n*4\r\n+2-0\r\n{FIELDS}:70000\r\n:4\r\n*4\r\n+3-0\r\n{FIELDS}:-1\r\n:0\r\n"),
    ];
    let mut fake = Fake::start(&replies.each_ref().map(|reply| &**reply)).await;
    let url = format!("redis://127.0.0.1:{}", fake.port);
    let mut deliveries = group().connect(url).await.unwrap();
    let read = fake.sent(&["XREADGROUP", "GROUP", GROUP]).await;
    let claim = read.iter().position(|word| word == "CLAIM").unwrap();
    assert_eq!(read[claim..], ["CLAIM", "60000", "STREAMS", STREAM, ">"]);

    let consumer = deliveries.consumer().to_owned();
    for (expected, verdict, arguments) in [
        (1, Verdict::release(), &["1-0", "1", "SILENT"][..]),
        (5, Verdict::retry(), &["2-0", "5", "FAIL"]),
        // It can't express a delay.
        (
            1,
            Verdict::retry_after(Duration::from_secs(1)),
            &["3-0", "1", "1", "1000"],
        ),
    ] {
        let delivery = next(&mut deliveries).await;
        assert_eq!(count(&delivery), expected);
        settle(&delivery, verdict).await.unwrap();
        loop {
            let script = fake.sent(&["EVALSHA"]).await;
            if script[2] == "3" {
                assert_eq!(script[6..8], [GROUP, &consumer]);
                assert_eq!(&script[8..], arguments);
                break;
            }
        }
    }
    close(&mut deliveries).await;
    let given_back = loop {
        let script = fake.sent(&["EVALSHA"]).await;
        if script.len() == 8 && script[7] == "1" {
            break script;
        }
    };
    assert_eq!(given_back[5..], [GROUP, &*consumer, "1"]);
}

/// What comes back by `XNACK` looks like what nobody has settled.
#[tokio::test]
async fn a_group_with_suspects_does_not_use_xnack() {
    let reply = |id, count| format!("*1\r\n*4\r\n+{id}\r\n{FIELDS}:{count}\r\n:{count}\r\n");
    let replies = [reply("1-0", 0), reply("2-0", 4)];
    let mut fake = Fake::start(&replies.each_ref().map(|reply| &**reply)).await;
    let url = format!("redis://127.0.0.1:{}", fake.port);
    let group = group().suspects("{jobs}:suspects");
    let mut deliveries = group.connect(url).await.unwrap();
    let consumer = deliveries.consumer().to_owned();
    for (verdict, parked) in [
        (Verdict::release(), ["1-0", "1", "0", "0"]),
        (Verdict::retry(), ["2-0", "5", "5", "0"]),
    ] {
        let delivery = next(&mut deliveries).await;
        assert_eq!(delivery.tag().is_suspect(), parked[0] == "2-0");
        settle(&delivery, verdict).await.unwrap();
        let script = loop {
            let script = fake.sent(&["EVALSHA"]).await;
            if script[2] == "3" {
                break script;
            }
        };
        assert_eq!(script[8..], parked);
    }
    close(&mut deliveries).await;
    let given_back = loop {
        let script = fake.sent(&["EVALSHA"]).await;
        if script.len() == 8 && script[6] == consumer {
            break script;
        }
    };
    assert_eq!(given_back[7], "0");
}
