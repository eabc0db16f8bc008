//! RabbitMQ: three nodes, a quorum queue with a member on each.

pub(crate) mod cluster;
pub(crate) mod connect;
#[path = "../../brokers/rabbitmq/program.rs"]
mod program;

use std::time::Duration;

use tokio::time::sleep;

use self::cluster::Rabbits;
use crate::trial::Plan;

const JOBS: &str = "jobs";
const DEAD: &str = "jobs.dead";

/// Where the workers connect first.
const USED: usize = 0;
/// Where the queues have their leaders.
const LEADER: usize = 1;

#[tokio::test]
async fn rabbitmq_goes_on_when_the_node_of_all_workers_is_killed() {
    let plan = Plan::new("node_killed");
    let cluster = Rabbits::start(LEADER).await;
    let figures = plan.run(cluster, async |cluster| {
        cluster.kill(USED);
        sleep(Duration::from_secs(12)).await;
        cluster.restart(&[USED]).await;
    });
    figures.await.assert(Duration::from_secs(20), 96);
}

#[tokio::test]
async fn rabbitmq_goes_on_when_the_leader_is_killed() {
    let plan = Plan::new("leader_killed");
    let cluster = Rabbits::start(LEADER).await;
    let figures = plan.run(cluster, async |cluster| {
        cluster.kill(LEADER);
        sleep(Duration::from_secs(12)).await;
        cluster.restart(&[LEADER]).await;
    });
    figures.await.assert(Duration::from_secs(20), 96);
}

#[tokio::test]
async fn rabbitmq_goes_on_when_a_node_stops() {
    let plan = Plan::new("node_stopped");
    let cluster = Rabbits::start(USED).await;
    let figures = plan.run(cluster, async |cluster| {
        cluster.stop(USED).await;
        sleep(Duration::from_secs(12)).await;
        cluster.restart(&[USED]).await;
    });
    figures.await.assert(Duration::from_secs(20), 96);
}

#[tokio::test]
async fn rabbitmq_goes_on_in_a_rolling_restart() {
    let plan = Plan::new("rolling_restart").work(400);
    let cluster = Rabbits::start(USED).await;
    let figures = plan.run(cluster, async |cluster| {
        for node in 0..3 {
            cluster.stop(node).await;
            cluster.restart(&[node]).await;
            sleep(Duration::from_secs(5)).await;
        }
    });
    figures.await.assert(Duration::from_secs(20), 3 * 96);
}

#[tokio::test]
async fn rabbitmq_goes_on_when_a_link_is_cut() {
    let plan = Plan::new("link_cut").work(600);
    let cluster = Rabbits::start(USED).await;
    let figures = plan.run(cluster, async |cluster| {
        cluster.cut(USED);
        sleep(Duration::from_secs(60)).await;
        cluster.join(USED);
    });
    figures.await.assert(Duration::from_secs(40), 2 * 96);
}

#[tokio::test]
async fn rabbitmq_comes_back_after_the_loss_of_its_majority() {
    let plan = Plan::new("majority_lost").mended();
    let cluster = Rabbits::start(LEADER).await;
    let figures = plan.run(cluster, async |cluster| {
        cluster.kill(LEADER);
        cluster.kill(2);
        sleep(Duration::from_secs(30)).await;
        cluster.restart(&[LEADER, 2]).await;
    });
    figures.await.assert(Duration::from_secs(90), 96);
}

#[tokio::test]
async fn rabbitmq_goes_on_when_the_leader_hangs() {
    let plan = Plan::new("leader_hangs").work(400);
    let cluster = Rabbits::start(LEADER).await;
    let figures = plan.run(cluster, async |cluster| {
        cluster.hang(LEADER);
        sleep(Duration::from_secs(30)).await;
        cluster.resume(LEADER);
    });
    figures.await.assert(Duration::from_secs(60), 96);
}
