//! NATS: three servers, and a stream with a replica on each.

pub(crate) mod cluster;
pub(crate) mod connect;

use std::time::Duration;

use tokio::time::sleep;

use self::cluster::Servers;
use crate::trial::Plan;

const JOBS: &str = "jobs";
const DEAD: &str = "dead";
const WORKERS: &str = "workers";

#[tokio::test]
async fn nats_goes_on_when_the_server_of_all_workers_is_killed() {
    let plan = Plan::new("node_killed");
    let figures = plan.run(Servers::start().await, async |cluster| {
        let used = cluster.used();
        cluster.kill(used);
        sleep(Duration::from_secs(12)).await;
        cluster.restart(&[used]).await;
    });
    figures.await.assert(Duration::from_secs(20), 96);
}

#[tokio::test]
async fn nats_goes_on_when_the_leader_is_killed() {
    let plan = Plan::new("leader_killed");
    let figures = plan.run(Servers::start().await, async |cluster| {
        let leader = cluster.leader().await;
        cluster.kill(leader);
        sleep(Duration::from_secs(12)).await;
        cluster.restart(&[leader]).await;
    });
    figures.await.assert(Duration::from_secs(20), 96);
}

#[tokio::test]
async fn nats_goes_on_when_a_server_stops() {
    let plan = Plan::new("node_stopped");
    let figures = plan.run(Servers::start().await, async |cluster| {
        let used = cluster.used();
        cluster.stop(used).await;
        sleep(Duration::from_secs(12)).await;
        cluster.restart(&[used]).await;
    });
    figures.await.assert(Duration::from_secs(20), 96);
}

#[tokio::test]
async fn nats_goes_on_in_a_rolling_restart() {
    let plan = Plan::new("rolling_restart").work(400);
    let figures = plan.run(Servers::start().await, async |cluster| {
        for server in 0..3 {
            cluster.stop(server).await;
            cluster.restart(&[server]).await;
            sleep(Duration::from_secs(5)).await;
        }
    });
    figures.await.assert(Duration::from_secs(20), 3 * 96);
}

#[tokio::test]
async fn nats_goes_on_when_a_link_is_cut() {
    let plan = Plan::new("link_cut").work(600);
    let figures = plan.run(Servers::start().await, async |cluster| {
        let used = cluster.used();
        cluster.cut(used);
        sleep(Duration::from_secs(60)).await;
        cluster.join(used);
    });
    figures.await.assert(Duration::from_secs(60), 2 * 96);
}

#[tokio::test]
async fn nats_comes_back_after_the_loss_of_its_majority() {
    let plan = Plan::new("majority_lost");
    let figures = plan.run(Servers::start().await, async |cluster| {
        let used = cluster.used();
        let others = [(used + 1) % 3, (used + 2) % 3];
        for server in others {
            cluster.kill(server);
        }
        sleep(Duration::from_secs(30)).await;
        cluster.restart(&others).await;
    });
    figures.await.assert(Duration::from_secs(90), 96);
}

#[tokio::test]
async fn nats_goes_on_when_the_leader_hangs() {
    let plan = Plan::new("leader_hangs").work(400);
    let figures = plan.run(Servers::start().await, async |cluster| {
        let leader = cluster.leader().await;
        cluster.hang(leader);
        sleep(Duration::from_secs(30)).await;
        cluster.resume(leader);
    });
    figures.await.assert(Duration::from_secs(60), 96);
}
