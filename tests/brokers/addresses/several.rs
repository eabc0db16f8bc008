//! Several addresses: their order, their limits and their errors.

use tokio::net::TcpListener;
use tower_sentinel::broker::rabbitmq::{self, ConnectError};

use crate::rabbitmq::server::shared;

/// An address where somebody listens and says nothing.
async fn silent() -> (TcpListener, String) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let place = listener.local_addr().unwrap();
    let address = format!("amqp://us3r:s3cr3t@{place}?connection_timeout=200");
    (listener, address)
}

#[tokio::test]
async fn the_address_that_works_is_found() {
    let (_listener, silent) = silent().await;
    let refused = "amqp://us3r:s3cr3t@127.0.0.1:9";
    let works = shared().address();
    rabbitmq::connect([refused, &silent, &works]).await.unwrap();
    let list = format!("{refused}, {silent},{works}");
    rabbitmq::connect(list).await.unwrap();
}

#[tokio::test]
async fn the_error_has_each_address_and_no_password() {
    let (listener, silent) = silent().await;
    let refused = "amqp://us3r:s3cr3t@127.0.0.1:9";
    let denied = format!("amqp://us3r:s3cr3t@{}/%2f", shared().host());
    for addresses in [
        vec![refused.to_owned(), silent.clone(), denied.clone()],
        vec![format!("{refused},{silent},{denied}")],
    ] {
        let error = rabbitmq::connect(addresses).await.unwrap_err();
        let ConnectError::AllFailed { errors } = &error else {
            panic!("{error:?}");
        };
        assert_eq!(errors.len(), 3);
        let text = format!("{error:#} {error:?}");
        let place = listener.local_addr().unwrap();
        for part in [
            "rabbitmq at 127.0.0.1:9 can't be reached: ",
            &format!("rabbitmq at {place} did not respond within 200ms"),
            &format!("rabbitmq at {} refuses the credentials", shared().host()),
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("s3cr3t"), "{text}");
        assert!(!format!("{error}").contains('\n'), "{error}");
    }
}

#[tokio::test]
async fn one_that_is_invalid_is_refused_before_any_is_tried() {
    let works = shared().address();
    for list in [
        vec![works.clone(), "amqp://us3r:s3/cr3t@host".to_owned()],
        // Separated by a sign that is none.
        vec![format!("{works};amqp://us3r:s3cr3t@host")],
        vec![format!("{works} amqp://us3r:s3cr3t@host")],
        vec![],
    ] {
        let error = rabbitmq::connect(list).await.unwrap_err();
        assert!(
            matches!(error, ConnectError::InvalidAddress { .. }),
            "{error}"
        );
        let text = format!("{error:#} {error:?}");
        assert!(!text.contains("s3") && !text.contains("cr3t"), "{text}");
    }
}
