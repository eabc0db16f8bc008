//! quick prototype
use futures_util::{StreamExt, stream::FuturesUnordered};
use std::{
    convert::Infallible,
    sync::Arc,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};
use tower::{Service, ServiceExt, limit::ConcurrencyLimit, service_fn};
use tower_layer::Layer;
use tower_sentinel::*;

#[derive(Clone, Copy)]
struct Work(u64);
impl Job for Work {
    type Tag = u64;
    fn tag(&self) -> u64 {
        self.0
    }
}

async fn job(w: Work) -> Result<u64, &'static str> {
    tokio::task::yield_now().await;
    Ok(w.0)
}

static ACKS: AtomicU64 = AtomicU64::new(0);
async fn ack(tag: u64) -> Result<(), Infallible> {
    ACKS.fetch_add(tag & 1, Ordering::Relaxed);
    Ok(())
}

const FLIGHT: usize = 64;
async fn drive<F, Fut>(n: u64, mut start: F)
where
    F: FnMut(u64) -> Fut,
    Fut: Future,
{
    let mut set = FuturesUnordered::new();
    for i in 0..n {
        if set.len() == FLIGHT {
            set.next().await;
        }
        set.push(start(i));
    }
    while set.next().await.is_some() {}
}
fn main() {
    let rt = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let n: u64 = std::env::var("JOBS")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(200_000);
    let d = Duration::from_secs(30);
    let mk = |limit: bool| {
        let l = SentinelLayer::new(service_fn(|r: Report<u64, u64, &'static str>| async move {
            ack(r.tag).await
        }));
        let l = if limit { l.timeout(d) } else { l.no_timeout() };
        l.layer(service_fn(job))
    };
    let mut t: Vec<Vec<f64>> = vec![vec![]; 5];
    for _ in 0..std::env::var("ROUNDS")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(15)
    {
        let only: Option<usize> = std::env::var("ONLY").ok().and_then(|s| s.parse().ok());
        let mut time = |k: usize, f: &mut dyn FnMut() -> tokio::task::JoinHandle<()>| {
            if only.is_some_and(|o| o != k) {
                t[k].push(1.0);
                return;
            }
            let s = Instant::now();
            rt.block_on(f()).unwrap();
            t[k].push(s.elapsed().as_nanos() as f64 / n as f64);
        };
        time(0, &mut || {
            rt.spawn(drive(n, |i| async move {
                let r = tokio::spawn(job(Work(i))).await;
                if let Ok(Ok(x)) = r {
                    ack(x).await.unwrap();
                }
            }))
        });
        time(1, &mut || {
            rt.spawn(drive(n, move |i| async move {
                let r = tokio::time::timeout(d, tokio::spawn(job(Work(i)))).await;
                if let Ok(Ok(Ok(x))) = r {
                    ack(x).await.unwrap();
                }
            }))
        });
        let mut s = mk(false);
        time(2, &mut || {
            let mut s = s.clone();
            rt.spawn(drive(n, move |i| s.call(Work(i))))
        });
        s = mk(true);
        time(3, &mut || {
            let mut s = s.clone();
            rt.spawn(drive(n, move |i| s.call(Work(i))))
        });
        time(4, &mut || {
            let mut s = ConcurrencyLimit::new(s.clone(), 64);
            rt.spawn(async move {
                let mut set = FuturesUnordered::new();
                for i in 0..n {
                    if set.len() == FLIGHT {
                        set.next().await;
                    }
                    set.push(s.ready().await.unwrap().call(Work(i)));
                }
                while set.next().await.is_some() {}
            })
        });
    }
    let med = |mut v: Vec<f64>| {
        v.sort_by(f64::total_cmp);
        v[v.len() / 2]
    };
    let ratio = |a: usize, b: usize| med(t[a].iter().zip(&t[b]).map(|(x, y)| x / y).collect());
    println!(
        "bare {:.0} timeout {:.0} sentinel-nolimit {:.0} sentinel {:.0} +cl {:.0}",
        med(t[0].clone()),
        med(t[1].clone()),
        med(t[2].clone()),
        med(t[3].clone()),
        med(t[4].clone())
    );
    println!(
        "nolimit/bare {:.3}  limit/timeout {:.3} cl/timeout {:.3}",
        ratio(2, 0),
        ratio(3, 1),
        ratio(4, 1)
    );
}
