//! A guide to supervised workers, page by page.
//!
//! - [Getting started](getting_started): a first worker, and where each part of it belongs.
//! - [Handler state and context](context): how a pool reaches a handler, and how a handler reads its delivery.
//! - [Layer order](layer_order): which middleware belongs outside of the sentinel, and which inside.
//! - [Retry, dead letters, backoff](retry): verdicts, and how decisions compose.
//! - [Dead letters](dead_letters): how they are listed, moved back and deleted.
//! - [Shutdown and deploys](shutdown): what ends a worker, in which order, and how long it takes.
//! - [Operating a worker](operating): its state from outside, probes, stuck jobs, zombies, and alerts.
//! - [Running on clusters](clusters): several addresses, faults of servers, and many workers.
//! - [Time limits and blocking work](time_limits): what a limit can promise, leases, and jobs that block.
//! - [How much isolation?](isolation): tasks, runtimes and processes, and what each survives.
//! - [Bring your own broker](own_broker): a complete adapter, with its tests.
//! - [From a raw lapin loop](lapin_loop): a loop by hand, and what to replace in it.
//! - [From Celery, Broadway, apalis](others): their words, and where to find them here.
//! - [Testing a worker](testing): the whole stack in memory, on paused time.
//!
//! One page for each broker tells of rights, limits, and what its servers do in a fault:
//! [RabbitMQ](rabbitmq), [NATS JetStream](nats), [Redis and Valkey](redis).

pub mod getting_started {
    #![doc = include_str!("getting_started.md")]
}

pub mod context {
    #![doc = include_str!("context.md")]
}

pub mod layer_order {
    #![doc = include_str!("layer_order.md")]
}

pub mod retry {
    #![doc = include_str!("retry.md")]
}

pub mod dead_letters {
    #![doc = include_str!("dead_letters.md")]
}

pub mod shutdown {
    #![doc = include_str!("shutdown.md")]
}

pub mod operating {
    #![doc = include_str!("operating.md")]
}

pub mod clusters {
    #![doc = include_str!("clusters.md")]
}

pub mod time_limits {
    #![doc = include_str!("time_limits.md")]
}

#[cfg(feature = "process")]
pub mod isolation {
    #![doc = include_str!("isolation.md")]
}

#[cfg(feature = "conformance")]
pub mod own_broker {
    #![doc = include_str!("own_broker.md")]
}

#[cfg(feature = "rabbitmq")]
pub mod lapin_loop {
    #![doc = include_str!("lapin_loop.md")]
}

pub mod others {
    #![doc = include_str!("others.md")]
}

pub mod testing {
    #![doc = include_str!("testing.md")]
}

#[cfg(feature = "rabbitmq")]
pub mod rabbitmq {
    #![doc = include_str!("rabbitmq.md")]

    #[allow(unused_imports)] // for links
    use crate::broker::rabbitmq::*;
}

#[cfg(feature = "nats")]
pub mod nats {
    #![doc = include_str!("nats.md")]

    #[allow(unused_imports)] // for links
    use crate::broker::nats::*;
}

#[cfg(feature = "redis")]
pub mod redis {
    #![doc = include_str!("redis.md")]

    #[allow(unused_imports)] // for links
    use crate::broker::redis::*;
}
