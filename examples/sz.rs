use std::mem::size_of_val;
use tower::{Service, service_fn};
use tower_layer::Layer;
use tower_sentinel::*;
#[tokio::main]
async fn main() {
    #[derive(Clone, Copy)]
    struct W(u64);
    impl Job for W {
        type Tag = u64;
        fn tag(&self) -> u64 {
            self.0
        }
    }
    let mut s = SentinelLayer::new(service_fn(|r: Report<u64, u64, &'static str>| async move {
        tokio::task::yield_now().await;
        Ok::<u64, ()>(r.tag)
    }))
    .layer(service_fn(|w: W| async move {
        tokio::task::yield_now().await;
        Ok::<u64, &'static str>(w.0)
    }));
    let f = s.call(W(1));
    println!(
        "response {} timeout(join) {} sleep {} report {} span {} token {}",
        size_of_val(&f),
        size_of_val(&tokio::time::timeout(
            std::time::Duration::from_secs(1),
            tokio::spawn(async { 0u64 })
        )),
        std::mem::size_of::<tokio::time::Sleep>(),
        std::mem::size_of::<Report<u64, u64, &'static str>>(),
        std::mem::size_of::<tracing::Span>(),
        std::mem::size_of::<tokio_util::sync::CancellationToken>()
    );
}
