//! Decoding: the handler's job, the policy's report of a job that can't be decoded, and the verdict of the
//! broker.

use std::{
    convert::Infallible,
    future::ready,
    io,
    num::ParseIntError,
    str,
    time::{Duration, SystemTime},
};

use tokio::time::sleep;
use tower::{BoxError, Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_sentinel::{
    DecisionExt, DecodeLayer, Job, Outcome, Panic, SentinelLayer, SettlePolicy, TimeLimit, Verdict,
    ack_on_success,
    decode::{DecodeError, Decoded},
    outcome::{OutcomeKind, TimedOut},
    settle::{Capabilities, Messaging, Settled, decision::Decision},
};

use crate::support::{Count, Guard, Recorder, Refused, Seen, raise, tag::Tag};

const SECOND: Duration = Duration::from_secs(1);

// === a delivery ===

fn tag() -> Tag {
    Tag::new().delivered(1).can(Capabilities::none().delay())
}

#[derive(Debug)]
struct Delivery {
    message_id: &'static str,
    body: Vec<u8>,
    _dropped: Guard,
}

impl Delivery {
    fn new(body: &str) -> Self {
        Self::counted(body, &Count::default())
    }

    fn counted(body: &str, drops: &Count) -> Self {
        Self {
            message_id: "m-1",
            body: body.into(),
            _dropped: drops.guard(),
        }
    }
}

impl AsRef<[u8]> for Delivery {
    fn as_ref(&self) -> &[u8] {
        &self.body
    }
}

impl Job for Delivery {
    type Tag = Tag;

    fn tag(&self) -> Tag {
        tag()
    }

    fn time_limit(&self) -> TimeLimit {
        TimeLimit::After(7 * SECOND)
    }

    fn messaging(&self) -> Option<Messaging<'_>> {
        Some(Messaging::new("memory", "orders"))
    }

    fn queued_since(&self) -> Option<SystemTime> {
        Some(SystemTime::UNIX_EPOCH)
    }
}

#[derive(Debug, PartialEq)]
struct Order(u32);

fn order(body: &[u8]) -> Result<Order, ParseIntError> {
    match body {
        b"bomb" => raise("in the codec"),
        _ => str::from_utf8(body).unwrap().parse().map(Order),
    }
}

async fn process(order: Order) -> Result<u32, Refused> {
    match order {
        Order(0) => Err(Refused),
        Order(number) => Ok(number),
    }
}

async fn settle<D>(decision: D, body: &str) -> Settled
where
    D: Decision<Tag, u32, DecodeError<ParseIntError, Refused>> + Clone + Send + 'static,
{
    ServiceBuilder::new()
        .layer(SentinelLayer::new(SettlePolicy::new(decision)))
        .layer(DecodeLayer::new(order))
        .service_fn(process)
        .oneshot(Delivery::new(body))
        .await
        .unwrap()
}

// === the handler's job ===

#[tokio::test]
async fn the_handler_gets_the_value_and_its_answer_comes_back() {
    let handler = DecodeLayer::new(order).layer(service_fn(process));
    let answer = handler.clone().oneshot(Delivery::new("42")).await;
    assert_eq!(answer, Ok(42));
    let answer = handler.clone().oneshot(Delivery::new("0")).await;
    assert_eq!(answer, Err(DecodeError::Inner(Refused)));
    // Anything with bytes is a job.
    assert_eq!(handler.oneshot("42").await, Ok(42));
}

#[tokio::test]
async fn with_the_job_the_handler_sees_the_delivery_as_well() {
    let handler = DecodeLayer::new(order).with_job().layer(service_fn(
        |Decoded { job, value }: Decoded<Delivery, Order>| async move {
            assert_eq!(job.message_id, "m-1");
            assert_eq!(job.as_ref(), b"42");
            Ok::<_, Refused>(value.0)
        },
    ));
    assert_eq!(handler.oneshot(Delivery::new("42")).await, Ok(42));
}

#[test]
fn a_decoded_job_has_the_tag_the_limit_and_the_description_of_the_job() {
    let decoded = Decoded {
        job: Delivery::new("42"),
        value: (),
    };
    let _: Tag = decoded.tag();
    assert_eq!(decoded.time_limit(), TimeLimit::After(7 * SECOND));
    assert_eq!(decoded.messaging(), decoded.job.messaging());
    assert_eq!(decoded.queued_since(), Some(SystemTime::UNIX_EPOCH));
}

#[tokio::test]
async fn the_job_is_dropped_before_the_inner_call_unless_it_is_handed_on() {
    for (handed_on, dropped) in [(false, 1), (true, 0)] {
        let drops = Count::default();
        let seen = drops.clone();
        let delivery = Delivery::counted("42", &drops);
        if handed_on {
            let inner = service_fn(move |_: Decoded<Delivery, Order>| {
                ready(Ok::<_, Infallible>(seen.get()))
            });
            let layer = DecodeLayer::new(order).with_job();
            assert_eq!(layer.layer(inner).oneshot(delivery).await, Ok(dropped));
        } else {
            let inner = service_fn(move |_: Order| ready(Ok::<_, Infallible>(seen.get())));
            let layer = DecodeLayer::new(order);
            assert_eq!(layer.layer(inner).oneshot(delivery).await, Ok(dropped));
        }
        assert_eq!(drops.get(), 1);
    }
}

#[tokio::test]
async fn what_cannot_be_decoded_never_reaches_the_handler() {
    let calls = Count::default();
    let counted = calls.clone();
    let handler = DecodeLayer::new(order).layer(service_fn(move |_: Order| {
        counted.add();
        ready(Ok::<_, Refused>(()))
    }));
    let error = handler.oneshot(Delivery::new("two")).await.unwrap_err();
    assert!(error.is_undecodable());
    let message = "the job cannot be decoded: invalid digit found in string";
    assert_eq!(error.to_string(), message);
    assert_eq!(calls.get(), 0);
}

// === inside of a sentinel ===

#[tokio::test]
async fn what_cannot_be_decoded_is_a_failure_of_that_job_and_a_panic_of_the_codec_its_panic() {
    let recorder = Recorder::default();
    let mut sentinel = ServiceBuilder::new()
        .layer(SentinelLayer::new(recorder.policy()))
        .layer(DecodeLayer::new(order))
        .service_fn(process);
    let mut run = async |body| {
        let ready = ServiceExt::<Delivery>::ready(&mut sentinel).await.unwrap();
        ready.call(Delivery::new(body)).await.unwrap().outcome
    };
    assert!(matches!(run("42").await, Outcome::Completed(42)));
    let outcome = run("two").await;
    assert!(matches!(
        outcome,
        Outcome::Failed(DecodeError::Undecodable(_))
    ));
    let outcome = run("0").await;
    assert!(matches!(
        outcome,
        Outcome::Failed(DecodeError::Inner(Refused))
    ));
    let outcome = run("bomb").await;
    assert!(matches!(outcome, Outcome::Panicked(panic) if panic.message() == "in the codec"));
    let (completed, failed) = (Seen::completed(), Seen::failed());
    let expected = [completed, failed, failed, Seen::panicked()];
    assert_eq!(recorder.reports(), expected);
}

#[tokio::test]
async fn what_cannot_be_decoded_is_rejected_by_the_ready_decision_and_retried_for_ever_without() {
    let decision = ack_on_success().reject_undecodable();
    assert_eq!(settle(decision, "42").await.verdict, Verdict::Ack);
    assert_eq!(settle(decision, "0").await.verdict, Verdict::retry());
    assert_eq!(settle(decision, "bomb").await.verdict, Verdict::retry());
    let settled = settle(decision, "two").await;
    assert_eq!(settled.kind, OutcomeKind::Failed);
    assert_eq!(settled.verdict, Verdict::Reject);

    assert_eq!(
        settle(ack_on_success(), "two").await.verdict,
        Verdict::retry()
    );
}

#[tokio::test(start_paused = true)]
async fn the_jobs_time_limit_holds_for_a_handler_that_is_decoded_for() {
    let slow = service_fn(|_: Order| async {
        sleep(60 * SECOND).await;
        Ok::<_, Refused>(())
    });
    let decision = ack_on_success().reject_undecodable();
    let settled = ServiceBuilder::new()
        .layer(SentinelLayer::new(SettlePolicy::new(decision)))
        .layer(DecodeLayer::new(order))
        .service(slow)
        .oneshot(Delivery::new("42"))
        .await
        .unwrap();
    assert_eq!(settled.kind, OutcomeKind::TimedOut);
    assert_eq!(settled.elapsed, 7 * SECOND);
}

// === the decision ===

type Fault = DecodeError<&'static str, Refused>;

fn undecodable() -> Outcome<(), Fault> {
    Outcome::Failed(DecodeError::Undecodable("no number"))
}

fn refused() -> Outcome<(), Fault> {
    Outcome::Failed(DecodeError::Inner(Refused))
}

#[test]
fn reject_undecodable_decides_on_nothing_else() {
    let decision = ack_on_success().reject_undecodable();
    for (outcome, verdict) in [
        (undecodable(), Verdict::Reject),
        (refused(), Verdict::retry()),
        (Outcome::Completed(()), Verdict::Ack),
        (Outcome::Panicked(Panic::new("a bug")), Verdict::retry()),
        (
            Outcome::TimedOut(TimedOut::new(SECOND, true)),
            Verdict::retry(),
        ),
    ] {
        assert_eq!(
            decision.decide(&tag(), &outcome),
            Ok(verdict),
            "{outcome:?}"
        );
    }
}

#[test]
fn the_order_of_reject_undecodable_and_on_error_matters_and_of_the_bounds_it_does_not() {
    let later = Verdict::retry_after(SECOND);
    let base = ack_on_success();
    let bounds = SECOND..=SECOND;
    let decide =
        |decision: &dyn Decision<Tag, (), Fault>, outcome| decision.decide(&tag(), &outcome);

    let first = base.on_error(move |_: &Fault| later).reject_undecodable();
    assert_eq!(decide(&first, undecodable()), Ok(Verdict::Reject));
    assert_eq!(decide(&first, refused()), Ok(later));

    let last = base.reject_undecodable().on_error(move |_: &Fault| later);
    assert_eq!(decide(&last, undecodable()), Ok(later));
    assert_eq!(decide(&last, refused()), Ok(later));

    let bounded = base
        .reject_undecodable()
        .backoff(bounds.clone())
        .random(|| 1.0);
    assert_eq!(decide(&bounded, undecodable()), Ok(Verdict::Reject));
    assert_eq!(decide(&bounded, refused()), Ok(later));
    let rejecting = base.backoff(bounds).random(|| 1.0).reject_undecodable();
    assert_eq!(decide(&rejecting, undecodable()), Ok(Verdict::Reject));
    assert_eq!(decide(&rejecting, refused()), Ok(later));

    // Delivered once, which is the limit.
    let limited = base.delivery_limit(1).reject_undecodable();
    assert_eq!(decide(&limited, undecodable()), Ok(Verdict::Reject));
    // The last row of the table: nothing bounds it.
    assert_eq!(decide(&base, undecodable()), Ok(Verdict::retry()));
}

// === the service and its error ===

#[tokio::test]
async fn readiness_is_the_inner_services() {
    let (mock, mut handle) = tower_test::mock::pair::<Order, ()>();
    let mut service = DecodeLayer::new(order).layer(mock);
    handle.allow(0);
    let ready = tokio::time::timeout(
        Duration::from_millis(1),
        ServiceExt::<Delivery>::ready(&mut service),
    );
    assert!(ready.await.is_err());
    handle.send_error(Refused);
    let error = ServiceExt::<Delivery>::ready(&mut service)
        .await
        .unwrap_err();
    assert!(matches!(error, DecodeError::Inner(error) if error.is::<Refused>()));
}

#[test]
fn an_error_goes_under_the_middleware_that_boxes_and_has_the_source_that_is_in_a_box() {
    type Boxed = DecodeError<BoxError, BoxError>;

    let io = || Box::new(io::Error::other(Refused));
    let error: BoxError = Boxed::Undecodable(io()).into();
    assert_eq!(error.to_string(), "the job cannot be decoded: refused");
    assert!(error.source().unwrap().is::<io::Error>());

    let error: BoxError = Boxed::Inner(Box::new(DecodeError::<BoxError, BoxError>::Undecodable(
        io(),
    )))
    .into();
    assert_eq!(error.to_string(), "the job cannot be decoded: refused");
    // An error that prints the inner error must not name it as its source too.
    assert!(error.source().unwrap().is::<io::Error>());

    let error: BoxError = DecodeError::<&str, _>::Inner(Refused).into();
    assert!(error.source().is_none());
}

#[cfg(feature = "json")]
#[tokio::test]
async fn json_is_decoded_to_what_the_handler_takes() {
    #[derive(serde::Deserialize)]
    struct Json {
        quantity: u32,
    }

    async fn process(json: Json) -> Result<u32, Infallible> {
        Ok(json.quantity)
    }

    let handler = DecodeLayer::json().layer(service_fn(process));
    for (body, answer) in [
        (r#" {"quantity": 2} "#, Ok(2)),
        ("{}", Err("missing field `quantity` at line 1 column 2")),
        (
            r#"{"quantity": 2} x"#,
            Err("trailing characters at line 1 column 17"),
        ),
        ("", Err("EOF while parsing a value at line 1 column 0")),
    ] {
        let answered = handler.clone().oneshot(Delivery::new(body)).await;
        let expected = answer.map_err(|error| format!("the job cannot be decoded: {error}"));
        assert_eq!(answered.map_err(|error| error.to_string()), expected);
    }
}
