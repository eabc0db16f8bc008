//! Two queues in one process; one of them has a handler for each type of message.
//!
//! ```sh
//! cargo run --example queues
//! ```
//!
//! It uses a broker within the process. With RabbitMQ, NATS or Redis only the lines that subscribe differ.

use std::{convert::Infallible, error::Error};

use tokio::{join, sync::watch};
use tower::{service_fn, steer::Steer, util::BoxCloneService};
use tower_sentinel::{
    Consumer, SentinelLayer, SettlePolicy, ack_on_success,
    broker::{
        Envelope,
        memory::{Broker, Delivery},
    },
};

type Mail = Delivery<&'static str>;
type Handler = BoxCloneService<Mail, (), Infallible>;

/// State shared by all jobs, such as a pool of connections; each handler has a clone.
#[derive(Clone)]
struct App {
    sender: &'static str,
}

async fn invoice(app: App, mail: Mail) -> Result<(), Infallible> {
    println!("{} sends an invoice to {}", app.sender, mail.payload());
    Ok(())
}

async fn refund(app: App, mail: Mail) -> Result<(), Infallible> {
    println!("{} sends a refund to {}", app.sender, mail.payload());
    Ok(())
}

async fn thumbnail(image: Delivery<&'static str>) -> Result<(), Infallible> {
    println!("makes a thumbnail of {}", image.payload());
    Ok(())
}

/// Picks the handler by the header `type`.
fn pick(mail: &Mail, _: &[Handler]) -> usize {
    usize::from(Envelope::header(mail, "type") == Some("refund"))
}

/// Waits until `ended` is true. In a service this is a signal, which both consumers get.
async fn end(mut ended: watch::Receiver<bool>) {
    // An error means that the sender is gone.
    drop(ended.wait_for(|ended| *ended).await);
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let broker = Broker::new();
    let (mails, images) = (
        broker.queue("mails").declare(),
        broker.queue("images").declare(),
    );
    mails.publish_with_headers("acme", [("type", "invoice")]);
    mails.publish_with_headers("globex", [("type", "refund")]);
    images.publish("cat.png");

    let app = App { sender: "me" };
    let refunds = app.clone();
    let handlers: Vec<Handler> = vec![
        BoxCloneService::new(service_fn(move |mail| invoice(app.clone(), mail))),
        BoxCloneService::new(service_fn(move |mail| refund(refunds.clone(), mail))),
    ];
    let by_type: Steer<Handler, _, Mail> = Steer::new(handlers, pick);

    let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
    let (ender, ended) = watch::channel(false);
    let mailing = Consumer::new(mails.subscribe(64)?, by_type)
        .sentinel(layer.clone())
        .name("mails") // in its events, spans and metrics
        .with_graceful_shutdown(end(ended.clone()));
    let drawing = Consumer::new(images.subscribe(4)?, service_fn(thumbnail))
        .sentinel(layer)
        .name("images")
        .with_graceful_shutdown(end(ended));
    let (mailed, drawn, ()) = join!(mailing.run(), drawing.run(), async {
        join!(mails.emptied(), images.emptied());
        ender.send_replace(true);
    });
    println!(
        "{} mails and {} images are settled",
        mailed?.answered, drawn?.answered
    );
    Ok(())
}
