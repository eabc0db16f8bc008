//! RabbitMQ, by [`lapin`]: classic and quorum queues.
//!
//! ```no_run
//! use futures_util::StreamExt;
//! use tower::{Service, ServiceBuilder, ServiceExt};
//! use tower_sentinel::{SentinelLayer, SettlePolicy, ack_on_success};
//! use tower_sentinel::broker::rabbitmq::{Delivery, Queue, self};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let connection = rabbitmq::connect("amqp://guest:guest@127.0.0.1:5672/%2f").await?;
//! let mut jobs = Queue::quorum("orders")
//!     .prefetch(64) // both `basic.qos` and the gate
//!     .dead_letter("orders.dead")
//!     .delivery_limit(None) // declared with `x-delivery-limit: -1`
//!     .subscribe(&connection)
//!     .await?;
//! let mut handler = ServiceBuilder::new()
//!     .layer(jobs.gate())
//!     .layer(SentinelLayer::new(SettlePolicy::new(ack_on_success())))
//!     .service_fn(|job: Delivery| async move { std::str::from_utf8(job.as_ref()).map(str::len) });
//! while let Some(job) = jobs.next().await {
//!     let settling = handler.ready().await?.call(job?);
//!     tokio::spawn(settling);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Verdicts
//!
//! | | quorum queue | classic queue |
//! | --- | --- | --- |
//! | `Ack` | `basic.ack` | `basic.ack` |
//! | `Retry` | `basic.reject` with requeue; near the [limit](Queue::delivery_limit) republished to the end of the queue, then acked | republished to the end of the queue, then acked |
//! | `Retry` after a delay | republished to a retry queue, then acked; `basic.reject` if the [queue delays](Queue::delayed_retry) | republished to a retry queue, then acked |
//! | `Release` | `basic.nack` with requeue; before 4.3 near the limit republished to the end of the queue, then acked | `basic.nack` with requeue |
//! | `Release` after a delay | republished to a retry queue, then acked | the same |
//! | `Reject`, with a [dead letter](Queue::dead_letter) | republished there with its reason, then acked | the same |
//! | `Reject` without | `basic.reject` without requeue: what the queue's own dead-letter exchange gets, or nobody | the same |
//! | `Abandon` | nothing: the job holds its place in the prefetch until the channel ends | the same |
//!
//! [One table](super#verdicts-and-the-servers-they-were-tested-on) has what they do to the count and to
//! the order, by version: 3.10, 4.0 and 4.3 were tested.
//!
//! What is republished is confirmed by the server before the original is acked. A crash between the
//! two leaves both, so that the job runs twice; none leaves neither. A republished job keeps its
//! properties, but for the `user-id` and the `CC` and `BCC` headers, and where it waits also for the
//! `expiration`. It comes by the default exchange from then on; [`Delivery::exchange`] and
//! [`Delivery::routing_key`] are still those of its first publish.
//!
//! `basic.ack`, `basic.nack` and `basic.reject` have no confirmation: that one of them is `Ok` says
//! that it was handed to the connection. If the connection is lost then, the job may come back.
//! Jobs that are acked at the same time share a frame (`multiple`) as far as they are the oldest of
//! their channel without an answer.
//!
//! If the *server* is killed, what comes back depends on the queue. A quorum queue logs an ack at once:
//! little more comes back than what was unanswered. A classic queue keeps acks in memory, and a kill under
//! load brings these jobs back: up to 32768 on 3.10 (`queue_index_max_journal_entries` in
//! `advanced.config`), up to 2048 on 4.0 and 4.3 (half of `classic_queue_index_v2_segment_entry_count`).
//! With smaller ones little comes back, as tests show on these three versions with 64.
//!
//! No settlement can be tried again, as lapin's acker is used up by the try: after a failed one the
//! channel is to be given up. lapin's own recovery of connections is off in what
//! [`connect`] returns. Where it is [turned on](connect_with), tags stay safe, as lapin makes the
//! ackers of the old connection unusable; but a stream may go on as if nothing had happened, since
//! lapin can drop the error with what it had received, and with 4.12.3 a connection that breaks while a
//! channel is being opened may hang for good.
//!
//! # Counts
//!
//! [`deliveries`](crate::settle::Settle::deliveries) is one more than the failed deliveries that were counted:
//! by the queue, in `x-delivery-count` (quorum queues), and by this adapter, in `x-deliveries`, on
//! what it republishes. A classic queue counts nothing itself, so that a job that takes its process
//! down is counted by nobody, and comes back for ever. A quorum queue counts that too, so a
//! [`delivery_limit`](crate::SentinelLayer::delivery_limit) bounds it.
//!
//! Servers before 4.3 count every return to a quorum queue, so there a `Release` at once is charged, and
//! [`release_is_free`](crate::settle::Capabilities::release_is_free) says so. One after a delay is republished
//! with the count that it had, so it is free on each server. From 4.3 on they count
//! `basic.reject` and not `basic.nack`. lapin does not tell the version of the server, so
//! [`subscribe`](Queue::subscribe) finds it out by a declaration that every server refuses (its log
//! has a line of it), if the user may configure the queue `<queue>.retry.quorum.0`. Else the server is taken
//! for an older one until a delivery bears `x-acquired-count`, which came with 4.3, or
//! [`Queue::free_release`] declares it. What is released while the subscription lives may be delivered
//! to it again at once. A [`Consumer`](crate::Consumer) that drains is delivered nothing, since it has
//! [stopped](crate::consumer::Subscription::poll_stop) the subscription.
//!
//! Since 4.0 a quorum queue has a delivery limit of 20 unless it is set up otherwise: over it the job
//! goes to the queue's own dead-letter exchange, or is dropped without a word. No verdict brings a job
//! over it: [`Queue::delivery_limit`]. The ends of channels do, as when a process is killed, so declare
//! the queue with `x-delivery-limit: -1` or a dead-letter exchange. Tested on 3.10, 4.0 and 4.3.
//!
//! # Delays
//!
//! A retry queue has one time to live for all of its messages: with a time for each message, one that
//! waits for long would hold up those behind it. So there is one for each delay, rounded up to one
//! of four steps per power of two milliseconds, which is at most a quarter longer. It is
//! declared when it is needed as `<queue>.retry.quorum.<milliseconds>`, and is deleted a week after its
//! last message is due. It is a quorum queue with at-least-once dead-lettering (RabbitMQ 3.10 or newer,
//! with the feature flag `stream_queue`), also for a classic queue: the way back is confirmed then.
//! Where the queue takes nothing, as it is full and has `x-overflow` set to `reject-publish`, the
//! server tries again each 3 minutes (`dead_letter_worker_publisher_confirm_timeout`). A queue that is
//! full for longer than that week loses what waits for it.
//!
//! To declare it takes the rights to configure and read `<queue>.retry.quorum.*`, and to write to the
//! default exchange. A user who may declare nothing [adds retry queues](Queue::retry_queue) that
//! somebody else declares.
//!
//! Before a subscription first uses a retry queue it waits for 2.5 s, because the queue may be new: see
//! below. If the channel ends meanwhile nothing is published, and the server redelivers the job.
//!
//! # Queues that are new
//!
//! A server that is killed may lose a durable queue that it has just confirmed, with all that it has
//! confirmed to be in it. A queue that is older than two seconds survives any kill. So a retry that
//! needs a new queue waits for 2.5 s before it is published, which is within the 5 s that a
//! [`SettlePolicy`](crate::SettlePolicy) gives to each try; with a
//! [`try_timeout`](crate::SettlePolicy::try_timeout) that is shorter no delayed retry would ever be
//! published. Declare your own queues in advance.
//!
//! Servers that keep their metadata in Mnesia, as RabbitMQ 3.10 and 4.0 do, seldom do so: nearly always
//! the record of a queue is on disk when the declaration is confirmed, and otherwise two seconds later,
//! when Erlang's `disk_log` writes what it holds. It was seen in one kill out of some dozens, on 3.10.
//! 4.3 keeps them in Khepri, and lost none.
//!
//! With a quorum queue it is the rule, on 3.10 and on 4.3. The server writes the name of a new one to disk
//! half a second to a second after it has confirmed the declaration. If it is killed before that, it
//! does not find the queue's log when it starts again, and starts the queue anew, without a word in
//! its log: what was confirmed in that time is gone. On 3.10 a queue with one member is then a follower
//! that holds no election: a subscription to it is answered with an internal error (541), which ends the
//! connection, or not at all ([`SubscriptionError::TimedOut`]). On 4.3 it is there, and empty.
//!
//! # Dead letters
//!
//! A job that is rejected bears these headers:
//!
//! | header | |
//! | --- | --- |
//! | `x-outcome-kind` | how the job ended, as [`OutcomeKind::as_str`](crate::outcome::OutcomeKind::as_str) says |
//! | `x-outcome-message` | the error's or the panic's message, if there is one; cut off at 4096 bytes, or where the frame ends |
//! | `x-outcome-time` | when it was rejected, in seconds since 1970 |
//! | `x-deliveries` | how often it was delivered, if that is known |
//! | `x-original-exchange`, `x-original-routing-key` | what it was published with at first; on a retry, too |
//!
//! When somebody moves it back to its queue, it is counted from one again.
//!
//! # Jobs that can't be republished
//!
//! - What the server refuses as configured is [misconfigured](crate::settle::Unsettled::misconfigured): a right
//!   that is missing, an exchange or a queue that is gone, a retry queue with other arguments. A
//!   consumer stops with an error that names it, as a new channel would meet the same.
//! - The properties of a message must fit into one frame of the connection (128 KiB by default), or the
//!   server closes the connection. So the reason is cut off, and then headers of a retry or a dead
//!   letter are left out. If the job's own leave no room for the count of a retry, it is given back
//!   after a second, and its settlement is [moot](crate::settle::Unsettled::moot)
//!   ([`DeliveryError::NoRoom`]); the other jobs go on. It is not counted (a quorum queue has no room for
//!   its own count either, and the server closes the connection), and comes back until
//!   somebody takes it out, or raises `frame_max` at the server.
//! - During a memory or disk alarm the server blocks the [connection that publishes](Connection). A retry
//!   waits for 2 s; then the job is given back without a delay, and its settlement is moot
//!   ([`DeliveryError::Blocked`]). Acks go on. What was sent just before the connection was blocked
//!   comes too, when the alarm is over.
//!   Before 4.3 a quorum queue counts what is given back, so from half of its delivery limit on the job
//!   keeps its place instead, and is retried when the alarm is over.
//! - A queue that is full and has `x-overflow` set to `reject-publish` takes nothing. A job that would go
//!   there, at once or as a dead letter, is given back after a second, and its settlement is moot
//!   ([`DeliveryError::NotConfirmed`]); from half of the delivery limit on it is kept, as in an alarm.
//!
//! A message that lapin can't parse never becomes a job: its content type, another property or the name
//! of a header is not UTF-8. The subscription ends with [`SubscriptionError::Unreadable`], and so does
//! each new one, until somebody takes the message out: by the management page, by a client of another
//! language, or with `rabbitmqctl purge_queue` where the queue has nothing else.
//!
//! All this was tested on RabbitMQ 3.10, 4.0 and 4.3.
//!
//! # The consumer timeout
//!
//! A delivery that is not settled within the consumer timeout, 30 minutes by default, goes back to its
//! queue. RabbitMQ has no keep-alive. So a sentinel's time limit should be shorter, with its settlement
//! included; or let the server wait longer (`consumer_timeout` in `rabbitmq.conf`; from 3.12 on also
//! `x-consumer-timeout` of a queue; from 4.3 on that of a consumer, [`Queue::consumer_timeout`]).
//!
//! | | 3.10 and 4.0 | 4.3, quorum queue | 4.3, classic queue |
//! | --- | --- | --- | --- |
//! | the server | closes the *channel* | cancels the *consumer*, and takes back what is overdue | waits for ever |
//! | the stream ends with | [`ChannelClosed`](SubscriptionError::ChannelClosed) | [`Cancelled`](SubscriptionError::Cancelled) | |
//! | comes back | all jobs of the subscription | what is overdue; the others with the channel | |
//! | counted by a quorum queue | yes | no | |
//! | later settlements | [`Stale`](DeliveryError::Stale) | those that republish are [`Lost`](DeliveryError::Lost), and [moot](crate::settle::Unsettled::moot); acks are sent, and do nothing for a job that was taken back | |
//!
//! After a cancel of its own the server would take a consumer for alive again as soon as all that was
//! overdue is acked, and deliver to it what nobody receives. So the adapter answers with a
//! `basic.cancel`. A job that gets overdue after that makes 4.3 close the channel.
//!
//! # TLS
//!
//! [`connect`] with `amqps://` encrypts. It needs the feature `rustls` (with ring, and the authorities
//! of the system) or `native-tls`; with both it is rustls. Without either it is refused
//! ([`ConnectError::NoTls`]), and nothing is sent. The certificate must be for the host of the
//! address. An authority of one's own is trusted besides those of the system; lapin wants at least one
//! there, so in a bare container name your own as `SSL_CERT_FILE`:
//!
//! ```no_run
//! use tower_sentinel::broker::rabbitmq;
//! use tower_sentinel::broker::rabbitmq::lapin::tcp::{OwnedIdentity, OwnedTLSConfig};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let tls = OwnedTLSConfig {
//!     cert_chain: Some(std::fs::read_to_string("authority.pem")?),
//!     // The certificate of this worker, if the server asks for one (`fail_if_no_peer_cert`).
//!     identity: Some(OwnedIdentity::PKCS8 {
//!         pem: std::fs::read("worker.pem")?,
//!         key: std::fs::read("worker.key")?,
//!     }),
//! };
//! let address = "amqps://me:secret@rabbitmq.internal:5671/%2f";
//! let connection = rabbitmq::connect_with(Default::default(), tls, address).await?;
//! # Ok(())
//! # }
//! ```
//!
//! `OwnedTLSConfig` prints its key by `Debug`.
//!
//! # Secrets
//!
//! A secret that runs out, such as an OAuth 2 token, is renewed on the connection by
//! [`update_secret`](Connection::update_secret). With an
//! [`AuthProvider`](lapin::auth::AuthProvider) in the properties of [`connect_with`] lapin does so by
//! itself. A password that is changed ends no connection: let the function that
//! [`Consumer::reconnecting`](crate::Consumer::reconnecting) connects with read it each time.
//!
//! No error and no event of this crate has a user, a password or a payload in it. lapin's own events
//! do: at TRACE the frames, which are credentials and payloads as numbers; and at WARN, with the
//! target `lapin::returned_messages`, a dead letter that no queue takes. With lapin 4.12 a
//! filter of events should have `lapin=debug,lapin::returned_messages=off`.

mod acks;
mod connect;
mod connection;
mod deliveries;
mod delivery;
mod delivery_error;
mod delivery_limit;
mod ending;
mod endpoint;
mod error;
mod half_made;
mod headers;
mod kind;
mod message;
mod publisher;
mod queue;
mod republished;
mod retry_queues;
mod server;
mod settlement;
mod targets;

pub use lapin;

pub use self::{
    connect::{connect, connect_with},
    connection::Connection,
    deliveries::Deliveries,
    delivery::{Delivery, DeliveryTag},
    delivery_error::{DeliveryError, Right},
    error::{ConnectError, SubscriptionError},
    kind::QueueKind,
    queue::Queue,
    settlement::Settlement,
};
