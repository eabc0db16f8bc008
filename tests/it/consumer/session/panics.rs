//! Streams and services that panic.

use tokio::time::sleep;
use tower_sentinel::{Consumer, Verdict, consumer::EndCause};

use super::{MS, Panics, call_alone, consume};
use crate::{
    consumer::ends,
    support::{
        Fate,
        subscription::{Channel, End},
    },
};

#[tokio::test(start_paused = true)]
async fn a_stream_that_panics_ends_the_consumer() {
    for jobs in [vec![], vec![Fate::Value; 2]] {
        let acks = vec![Verdict::Ack; jobs.len()];
        let channel = Channel::of(jobs);
        let later = channel.clone();
        tokio::spawn(async move {
            sleep(MS(10)).await;
            later.end(End::Panics);
        });
        let error = consume(&channel).await.unwrap_err();
        let EndCause::StreamPanicked(panic) = error.cause() else {
            panic!("{error:?}");
        };
        assert_eq!(panic.message(), "in the stream");
        assert_eq!((channel.verdicts(), channel.closed()), (acks, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_that_panics_ends_the_consumer() {
    for (in_readiness, in_call, called) in [(true, false, 0), (false, true, 1), (false, false, 1)] {
        let channel = Channel::of([Fate::PanicLater]);
        let service = Panics {
            in_readiness,
            in_call,
        };
        let consumer = Consumer::new(channel.subscribe(), service).escalation(call_alone);
        let error = ends(consumer).await.unwrap_err();
        match error.cause() {
            EndCause::UnreadyPanicked(_) if in_readiness => {}
            EndCause::CallPanicked(_) if !in_readiness => {}
            other => panic!("{other:?}"),
        }
        let summary = error.summary();
        assert_eq!((summary.called, summary.unanswered), (called, called));
        assert_eq!((summary.answered, summary.failed), (0, called));
        assert_eq!((channel.taken(), channel.closed()), (called, 1));
    }
}
