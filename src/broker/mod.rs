//! Adapters for brokers: their deliveries are jobs, and their tags settle them.
//!
//! # Verdicts, and the tested servers
//!
//! The table shows the effect of each [`Verdict`](crate::Verdict) on a job, and the tested versions of the
//! server.
//!
//! - *Charged*: the next delivery counts one more.
//! - *Comes back*: the time at which the job is delivered again, relative to others that wait in the queue.
//! - *If the server is killed then*: the fate of the job after a SIGKILL, right after the settlement was
//!   `Ok`. Redis and Valkey have `appendfsync always`.
//!
//! NATS has no message schedules (`Pull::schedules`) here. With them (2.12 or later, tested on 2.15) a
//! `Release` after a delay is not charged, and a delayed job comes back behind those that wait.
//!
//! | server | verdict | charged | comes back | if the server is killed then |
//! | --- | --- | --- | --- | --- |
//! | RabbitMQ, quorum queue (3.10) | `Ack` |  | never | may be delivered again |
//! |  | `Retry` | yes | behind those that wait | is delivered |
//! |  | `Retry` after a delay | yes | when it is due | is delivered |
//! |  | `Release` | yes | behind those that wait | is delivered |
//! |  | `Release` after a delay | no | when it is due | is delivered |
//! |  | `Reject` |  | never | may be delivered again |
//! |  | none, as the connection is lost | yes |  |  |
//! | RabbitMQ, quorum queue (4.0) | `Ack` |  | never | may be delivered again |
//! |  | `Retry` | yes | before those that wait | is delivered |
//! |  | `Retry` after a delay | yes | when it is due | is delivered |
//! |  | `Release` | yes | before those that wait | is delivered |
//! |  | `Release` after a delay | no | when it is due | is delivered |
//! |  | `Reject` |  | never | may be delivered again |
//! |  | none, as the connection is lost | yes |  |  |
//! | RabbitMQ, quorum queue (4.3) | `Ack` |  | never | may be delivered again |
//! |  | `Retry` | yes | before those that wait | is delivered |
//! |  | `Retry` after a delay | yes | when it is due | is delivered |
//! |  | `Release` | no | before those that wait | is delivered |
//! |  | `Release` after a delay | no | when it is due | is delivered |
//! |  | `Reject` |  | never | may be delivered again |
//! |  | none, as the connection is lost | yes |  |  |
//! | RabbitMQ, classic queue (3.10, 4.0, 4.3) | `Ack` |  | never | may be delivered again |
//! |  | `Retry` | yes | behind those that wait | is delivered |
//! |  | `Retry` after a delay | yes | when it is due | is delivered |
//! |  | `Release` | no | before those that wait | is delivered |
//! |  | `Release` after a delay | no | when it is due | is delivered |
//! |  | `Reject` |  | never | may be delivered again |
//! |  | none, as the connection is lost | no |  |  |
//! | NATS JetStream (2.9, 2.10, 2.15) | `Ack` |  | never | may be delivered again |
//! |  | `Retry` | yes | before those that wait | is delivered |
//! |  | `Retry` after a delay | yes | when it is due | is delivered |
//! |  | `Release` | yes | before those that wait | is delivered |
//! |  | `Release` after a delay | yes | when it is due | is delivered |
//! |  | `Reject` |  | never | may be delivered again |
//! |  | none, as the connection is lost | yes |  |  |
//! | Redis Streams (7.0, 8.0) | `Ack` |  | never | stays settled |
//! |  | `Retry` | yes | in no order | is delivered |
//! |  | `Retry` after a delay | yes | when it is due | is delivered |
//! |  | `Release` | no | in no order | is delivered |
//! |  | `Release` after a delay | no | when it is due | is delivered |
//! |  | `Reject` |  | never | stays settled |
//! |  | none, as the connection is lost | yes |  |  |
//! | Valkey Streams (8.1, 9.1) | `Ack` |  | never | stays settled |
//! |  | `Retry` | yes | in no order | is delivered |
//! |  | `Retry` after a delay | yes | when it is due | is delivered |
//! |  | `Release` | no | in no order | is delivered |
//! |  | `Release` after a delay | no | when it is due | is delivered |
//! |  | `Reject` |  | never | stays settled |
//! |  | none, as the connection is lost | yes |  |  |
//! | `broker::memory` | `Ack` |  | never | stays settled |
//! |  | `Retry` | yes | before those that wait | is delivered |
//! |  | `Retry` after a delay | yes | when it is due | is delivered |
//! |  | `Release` | no | before those that wait | is delivered |
//! |  | `Release` after a delay | no | when it is due | is delivered |
//! |  | `Reject` |  | never | stays settled |
//! |  | none, as the connection is lost | yes |  |  |

#[cfg(any(feature = "nats", feature = "rabbitmq", feature = "redis"))]
mod address;
#[cfg(any(feature = "nats", feature = "rabbitmq", feature = "redis"))]
mod addresses;
#[cfg(any(feature = "nats", feature = "rabbitmq", feature = "redis"))]
mod cause;
pub mod dead_letter;
pub mod dead_letters;
#[cfg(any(feature = "nats", feature = "rabbitmq", feature = "redis"))]
mod ending;
mod envelope;
#[cfg(any(feature = "rabbitmq", feature = "redis"))]
mod gathering;
pub mod memory;
#[cfg(feature = "nats")]
pub mod nats;
#[cfg(feature = "rabbitmq")]
pub mod rabbitmq;
#[cfg(feature = "redis")]
pub mod redis;
#[cfg(any(feature = "nats", feature = "rabbitmq", feature = "redis"))]
mod settlement;

#[cfg(any(feature = "nats", feature = "rabbitmq", feature = "redis"))]
pub use self::addresses::ToAddresses;
pub use self::envelope::Envelope;
#[cfg(any(feature = "nats", feature = "rabbitmq", feature = "redis"))]
pub use self::settlement::Settlement;
