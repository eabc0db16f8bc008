//! Tests on clusters of private servers on one machine, whose nodes are killed, stopped and cut off while
//! three workers in processes of their own do 10 000 jobs.
//!
//! Each node has a network namespace, so the suite wants root, and a tree of `.ci/make-suite` for the servers:
//!
//! ```sh
//! .ci/make-suite forky /var/tmp/forky
//! CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="$PWD/.ci/in-suite /var/tmp/forky" \
//!     cargo test --all-features --test clusters -- --show-output --test-threads 3
//! ```
//!
//! Each test prints a line of figures. `CLUSTER_LOGS=FOLDER` keeps the logs of the workers.
#![allow(clippy::unwrap_used)]

#[allow(dead_code)] // `brokers` uses the rest
#[path = "../brokers/child.rs"]
mod child;
mod figures;
mod nats;
mod network;
mod node;
mod rabbitmq;
mod redis;
mod scale;
mod trial;
mod worker;
