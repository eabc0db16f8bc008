//! How a worker connects to NATS.

use std::{error::Error, time::Duration};

use tower_sentinel::{
    broker::nats::{
        Deliveries, Pull,
        async_nats::{ConnectOptions, ServerAddr, jetstream},
    },
    consumer::Connect,
};

use super::{DEAD, WORKERS};
use crate::{child::setting, worker::PREFETCH};

type BoxError = Box<dyn Error + Send + Sync>;

/// Begins with the first address. The client knows the others too, and goes there by itself.
pub(crate) fn connector(
    addresses: Vec<String>,
) -> impl Connect<Subscription = Deliveries, Error = BoxError, Future: Send> + Send {
    move || {
        let addresses = addresses.clone();
        async move {
            let servers = addresses.iter().map(|address| address.parse());
            let servers = servers.collect::<Result<Vec<ServerAddr>, _>>()?;
            let options = ConnectOptions::new()
                .retain_servers_order()
                .connection_timeout(Duration::from_secs(3));
            let client = options.connect(servers).await?;
            let stream = setting("QUEUE").expect("a stream to read");
            let pull = Pull::new(stream, WORKERS)
                .prefetch(PREFETCH)
                .dead_letter(DEAD);
            Ok(pull.subscribe(&jetstream::new(client)).await?)
        }
    }
}
