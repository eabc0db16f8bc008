//! Cost of a settlement, and the runtimes that it needs and outlives.

use std::mem;

use futures_util::FutureExt;
use tokio::{
    runtime::Builder,
    task::yield_now,
    time::{advance, sleep},
};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_sentinel::{
    Outcome, Report, SentinelLayer, SettlePolicy, Verdict,
    settle::{Settle, SettleFuture, Unsettled},
};

use super::{SECOND, Try, failed, ms, scripted, settle};
use crate::support::{Refused, block_on, current_thread, idle, paused_time, tag::Tag};

#[test]
fn a_settlement_that_is_ready_at_once_needs_no_timer() {
    // A runtime without timers, where to make one panics.
    let runtime = Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let tag = scripted(&[Try::Ok]);
        let done = Outcome::<_, Refused>::Completed(());
        let report = Report::new(tag.clone(), done, SECOND);
        let settled = SettlePolicy::default().call(report).now_or_never();
        assert_eq!(settled.unwrap().unwrap().verdict, Verdict::Ack);
        let last = scripted(&[Try::LastAtOnce]);
        settle(SettlePolicy::default(), &last, failed())
            .await
            .unwrap_err();
    });
}

#[test]
fn the_tag_is_settled_in_the_call() {
    let tag = scripted(&[Try::Ok]);
    let report = Report::new(tag.clone(), failed(), SECOND);
    let future = SettlePolicy::default().call(report);
    assert_eq!(tag.tries(), 1);
    assert!(
        format!("{future:?}").contains("verdict: Retry"),
        "{future:?}"
    );
}

#[test]
fn a_settlement_adds_little_to_the_future_of_its_tag() {
    type Boxed = <Tag as Settle>::Future;
    let added = mem::size_of::<SettleFuture<u8, Boxed, Refused>>() - mem::size_of::<Boxed>();
    // Its own span is 40 of them.
    let measured = if cfg!(feature = "metrics") { 32 } else { 0 };
    assert!(added <= 224 + measured, "{added} bytes");
    // And the outcome, which is dropped last.
    type Done = Outcome<(), Refused>;
    type Keeping = SettleFuture<u8, Boxed, Refused, Done>;
    let added = mem::size_of::<Keeping>() - mem::size_of::<SettleFuture<u8, Boxed, Refused>>();
    assert!(added <= mem::size_of::<Done>(), "{added} bytes");
}

/// Returns a tag that lets itself be waited for without a timer, and fails so often.
fn timerless(fails: usize) -> Tag {
    Tag::new().settling(move |tag| async move {
        yield_now().await;
        match tag.tries() > fails {
            true => Ok(()),
            false => Err(Unsettled::again(tag, Refused)),
        }
    })
}

#[test]
fn a_settlement_outside_of_a_runtime_has_no_limit_and_is_not_repeated() {
    for fails in [0, 1] {
        let tag = timerless(fails);
        let report = Report::new(tag.clone(), failed(), SECOND);
        let answer = block_on(SettlePolicy::default().oneshot(report));
        assert_eq!(answer.is_ok(), fails == 0);
        assert_eq!(tag.tries(), 1);
    }
}

#[test]
fn a_settlement_may_be_polled_outside_of_the_runtime_it_began_in() {
    let runtime = paused_time();
    for script in [&[Try::AgainAtOnce, Try::Ok] as &'static [Try], &[Try::Hang]] {
        let tag = scripted(script);
        let report = Report::new(tag.clone(), failed(), SECOND);
        let mut settlement = Box::pin(SettlePolicy::default().oneshot(report));
        runtime.block_on(async {
            assert!(settlement.as_mut().now_or_never().is_none());
        });
        // The timer that was made is still waited for.
        assert!(settlement.as_mut().now_or_never().is_none());
        assert_eq!(tag.tries(), 1);
        runtime.block_on(advance(10 * SECOND));
        let answer = block_on(settlement);
        assert_eq!(answer.is_ok(), script.contains(&Try::Ok));
        assert_eq!(tag.tries(), script.len());
    }
}

#[test]
fn a_settlement_goes_on_though_the_runtime_of_its_timer_ends() {
    for script in [&[Try::AgainAtOnce, Try::Ok] as &'static [Try], &[Try::Hang]] {
        let tag = scripted(script);
        let report = Report::new(tag.clone(), failed(), SECOND);
        let mut settlement = Box::pin(SettlePolicy::default().oneshot(report));
        let first = paused_time();
        first.block_on(async {
            assert!(settlement.as_mut().now_or_never().is_none());
        });
        drop(first);
        let answer = paused_time().block_on(settlement);
        assert_eq!(answer.is_ok(), script.contains(&Try::Ok), "{answer:?}");
        assert_eq!(tag.tries(), script.len());
    }
}

#[test]
fn g1_a_job_is_settled_though_its_callers_runtime_ends_while_it_settles() {
    let jobs = Builder::new_multi_thread().enable_all().build().unwrap();
    for drops in [false, true] {
        let tag = scripted(&[Try::AgainAtOnce, Try::Ok]);
        let (settling, tried) = (tag.clone(), tag.clone());
        let layer = SentinelLayer::new(SettlePolicy::default()).runtime(jobs.handle().clone());
        let sentinel = layer.layer(service_fn(async |_: Tag| Ok::<_, Refused>(())));
        let callers = current_thread();
        let mut response = Box::pin(sentinel.oneshot(settling));
        callers.block_on(async {
            while tried.tries() == 0 {
                assert!(response.as_mut().now_or_never().is_none());
                sleep(ms(1)).await;
            }
        });
        if drops {
            callers.block_on(async {
                tokio::spawn(response);
                yield_now().await;
            });
            drop(callers);
            jobs.block_on(idle(jobs.handle()));
        } else {
            drop(callers);
            assert!(block_on(&mut response).is_ok());
        }
        assert_eq!(tag.tries(), 2, "drops: {drops}");
    }
}
